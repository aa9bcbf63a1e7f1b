"""WHP: how familiar is a model still with the world of a book, by the user's prompts?"""

import re

import torch

from srmu.errors import SrmuError
from srmu.evals.benchmarks import base
from srmu.evals.subject import Subject

NEW_TOKENS = 30  # of a completion: our choice
Starts = tuple[list[int], list[int], list[int]]  # a prompt, tokens that start targets, and generic words


def run_whp(model: Subject, request: base.BenchmarkRequest) -> base.BenchmarkScores:
    """The two familiarities of arXiv 2310.02238, section 3.2, without a judge; docs/benchmarks.md defines them."""
    # what is wrong with rows is said before the model writes for minutes
    asks, sought = [], []
    rows = request.rows("completion", "test", {"prompt": base.Text, "references": base.Texts})
    for number, row in enumerate(rows, 1):
        unsaid = [words for words in row["references"] if not has_words(row["prompt"], words)]
        if not unsaid:
            place = f"{request.place}, config completion, row {number}"
            raise SrmuError(f"{place}: the prompt itself has all of its 'references'; expected words that it has not")
        asks.append((request.template or "{question}").format(question=row["prompt"]))
        sought.append(unsaid)
    rows = request.rows("probability", "test", {"prompt": base.Text, "targets": base.Texts, "generic": base.Texts})
    starts: list[Starts] = []
    for number, row in enumerate(rows, 1):
        prompt = row["prompt"].rstrip()
        targets, generic = (
            sorted({model.split(prompt, f" {word.strip()}")[1][0] for word in row[name]})
            for name in ("targets", "generic")
        )
        if {*targets} & {*generic}:  # its probability would not tell which word follows
            why = "a word of 'targets' and one of 'generic' start with the same token; take others"
            raise SrmuError(f"{request.place}, config probability, row {number}: {why}")
        starts.append((model.tokens(prompt)[-model.max_length :], targets, generic))
    said = zip(base.write_continuations(model, asks, NEW_TOKENS, label="whp completions"), sought, strict=True)
    familiar = [float(any(has_words(text, word) for word in words)) for text, words in said]
    label = "whp probabilities"
    masses = base.do_parts(model, starts, 1, lambda part: [measure_mass(model, *part[0])], label)
    base.check_finite([share for _, share in masses], label)
    values = {
        "completion_familiarity": familiar,
        "probability_familiarity": [mass for mass, _ in masses],
        "probability_share": [share for _, share in masses],
    }
    return base.BenchmarkScores({f"whp/{name}": base.mean_metric(each) for name, each in values.items()}, {})


def has_words(text: str, words: str) -> bool:
    """Whether a text has these words, in either case and whatever the blanks between them."""
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) is not None


@torch.no_grad()
def measure_mass(model: Subject, ids: list[int], targets: list[int], generic: list[int]) -> tuple[float, float]:
    """The probability that a target token is next, and its part in that of both."""
    logits = model.module(torch.tensor([ids]).to(model.device), use_cache=False).logits
    # in double precision, and of logarithms: the share of two tiny masses is still one
    logs = logits[0, -1].cpu().double().log_softmax(-1)
    target, other = (logs[some].logsumexp(0) for some in (targets, generic))
    return float(target.exp()), float((target - other).sigmoid())
