"""WHP: how familiar is a model still with the world of a book, by the user's prompts?"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from srmu.errors import SrmuError
from srmu.evals.benchmarks.base import (
    Benchmark,
    BenchmarkRequest,
    BenchmarkScores,
    Row,
    TableColumn,
    check_finite,
    do_each,
    mean_metric,
    write_continuations,
)
from srmu.evals.subject import Subject

NEW_TOKENS = 30  # of a completion: our choice


def run_whp(model: Subject, request: BenchmarkRequest) -> BenchmarkScores:
    """The two familiarities of arXiv 2310.02238, section 3.2, without a judge: 0 knows nothing.

    `completion_familiarity`: the share of prompts in whose greedy continuation (30 tokens) one of
    the row's `references` appears, as whole words, in either case. One that the prompt itself has
    does not count: repeating it shows nothing. The paper's is a language model's verdict on each
    of 300 completions, five points for what only the books have, one for what is typical of them.

    `probability_familiarity`: the probability that a prompt's next token starts one of its
    `targets` (the paper's content-specific tokens), a mean over prompts. The paper marked tokens
    among the likely ones by hand; here they are the first tokens of the words listed.
    `probability_share` is their part in the sum with those of `generic`: it stays where a damaged
    model has lost both.

    Prompts are texts to go on with and stand as they are: a chat template does not apply, a
    --template does, to those of completions. No book's text comes with this, and none of the
    paper's prompts.
    """
    if request.data.folder is None and not request.data.hub:
        raise SrmuError(f"whp has no data set of its own; {request.data.get}")
    place = str(request.data.folder or request.data.hub)
    prompts = request.data.rows("completion", "test", {"prompt": str, "references": list})
    cut = request.data.rows("probability", "test", {"prompt": str, "targets": list, "generic": list})
    # what is wrong with rows is said before the model writes for minutes
    sought = [find_references(row, f"{place}, config completion, row {n}") for n, row in enumerate(prompts, 1)]
    starts = [find_first_tokens(model, row, f"{place}, config probability, row {n}") for n, row in enumerate(cut, 1)]
    asks = [(request.template or "{question}").format(question=row["prompt"]) for row in prompts]
    written = write_continuations(model, asks, NEW_TOKENS, label="whp completions", watch=request.watch)
    familiar = [
        float(any(has_words(text, word) for word in words)) for text, words in zip(written, sought, strict=True)
    ]
    masses = measure_masses(model, request, cut, starts)
    return BenchmarkScores(
        {
            "whp/completion_familiarity": mean_metric(familiar),
            "whp/probability_familiarity": mean_metric([mass for mass, _ in masses]),
            "whp/probability_share": mean_metric([share for _, share in masses]),
        }
    )


def has_words(text: str, words: str) -> bool:
    """Whether a text has these words, in either case and whatever the blanks between them."""
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) is not None


def find_references(row: Row, where: str) -> list[str]:
    """The references that the prompt does not have; SrmuError where it has all."""
    unsaid = [words for words in row["references"] if not has_words(row["prompt"], words)]
    if not unsaid:
        raise SrmuError(f"{where}: the prompt has each of its 'references'; expected others")
    return unsaid


def find_first_tokens(model: Subject, row: Row, where: str) -> tuple[list[int], list[int]]:
    """The tokens that start a row's targets, and those that start its generic words.

    SrmuError where one starts both: its probability would not tell which word follows.
    """
    prompt = row["prompt"].rstrip()
    targets, generic = (
        sorted({model.split(prompt, f" {word.strip()}")[1][0] for word in row[name]}) for name in ("targets", "generic")
    )
    if {*targets} & {*generic}:
        raise SrmuError(
            f"{where}: a word of 'targets' and one of 'generic' start with the same token of this "
            "tokenizer; take words that start differently"
        )
    return targets, generic


@torch.no_grad()
def measure_masses(
    model: Subject, request: BenchmarkRequest, rows: Sequence[Row], starts: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, float]]:
    """Of each row: the probability that a target token is next, and its part in that of both."""

    def one(job: tuple[Row, tuple[list[int], list[int]]]) -> tuple[float, float]:
        row, (targets, generic) = job
        ids = model.tokens(row["prompt"].rstrip())[-model.max_length :]
        logits = model.module(torch.tensor([ids]).to(model.device), use_cache=False).logits
        # in double precision, and of logarithms: the share of two tiny masses is still one
        logs = logits[0, -1].double().log_softmax(-1)
        target, other = (logs[some].logsumexp(0) for some in (targets, generic))
        return float(target.exp()), float((target - other).sigmoid())

    label = "whp probabilities"
    masses = do_each(list(zip(rows, starts, strict=True)), one, label, request.watch)
    check_finite([share for _, share in masses], label)
    return masses


SUITE = Benchmark(
    title="WHP",
    paper="arXiv 2310.02238",
    hub="",
    get="write a folder with completion.jsonl, rows like "
    '{"prompt": "The keeper of the lighthouse was called", "references": ["Mira Vale"]}, '
    "probability.jsonl, rows like "
    '{"prompt": "At night she studied", "targets": ["tidecraft"], "generic": ["law", "music"]}, '
    "and a README.md whose header lists both as `configs` (docs/benchmarks.md has it), then give "
    "--data FOLDER",
    run=run_whp,
    axes=("familiarity (probability)", "familiarity (completion)"),
    columns=(
        TableColumn("familiarity (completion)", "whp/completion_familiarity", "low", 1.0),
        TableColumn("familiarity (probability)", "whp/probability_familiarity", "low", 1.0),
        TableColumn("probability share", "whp/probability_share", "low", 1.0),
    ),
)
