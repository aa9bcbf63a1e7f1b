"""What every benchmark uses: rows of a data set, a model that answers, metrics by name."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import isfinite, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, ValidationError, ValidationInfo, create_model

from srmu.engine import distributed, files, generate
from srmu.errors import SrmuError, first_line
from srmu.evals.lm_eval import silence_output
from srmu.evals.subject import Question, Subject, answer_likelihoods

S = TypeVar("S")
T = TypeVar("T")
Row = dict[str, Any]
Fields = dict[str, Any]  # of a row: name -> type, as pydantic reads it
Metrics = dict[str, dict[str, float]]  # "tofu/model_utility" -> value, n and, if known, stderr
Values = dict[str, list[float]]  # a number for each question or text, by name
PLAIN = "Question: {question}\nAnswer:"
LETTERS = "ABCD"  # of options
ROWS = 32  # prompts continued at once
PAIRS = 256  # answers whose likelihoods are read at once

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]


def check_place(answer: int, info: ValidationInfo) -> int:
    """Refuse an answer that is not the place of one of the row's choices."""
    if answer not in range(len(info.data.get("choices", ()))):
        raise ValueError("expected the place of one of the choices, from 0")
    return answer


Place = Annotated[int, AfterValidator(check_place)]  # of the right one of a row's `choices`


@dataclass
class BenchmarkRequest:
    """What a benchmark is to measure and how, and its data set: on the hub, or in a folder that `datasets` loads."""

    hub: str
    get: str  # how to come by it
    revision: str = "main"
    folder: Path | None = None
    limit: int | None = None  # rows of each part
    part: str = ""  # what follows the slash in `--tasks tofu/forget10`
    template: str = ""  # has {question}; "": the chat template, else PLAIN
    reference: Values | None = None  # of a model that never saw the forget set
    seen: dict[str, str] = field(default_factory=dict)  # digests of the rows that were read

    @property
    def place(self) -> str:
        return str(self.folder or self.hub)

    @property
    def pin(self) -> dict[str, str]:
        """What tells `datasets` the revision of a set on the hub."""
        return {} if self.folder else {"revision": self.revision}

    def rows(self, config: str, split: str, fields: Fields) -> list[Row]:
        """The rows of a part; SrmuError where it is out of reach, or names the first bad row."""
        import datasets

        where = f"{self.place}, config {config}, split {split}"
        try:
            # the user's cache gains and lends nothing where files are local
            with TemporaryDirectory() as scratch, silence_output():
                kept = {"cache_dir": scratch, "keep_in_memory": True} if self.folder else {}
                rows = [*map(dict, datasets.load_dataset(self.place, config, split=split, **self.pin, **kept))]
        except Exception as error:  # whatever the library cannot read is for the user to fix
            raise SrmuError(f"{where} cannot be read: {first_line(error.__cause__ or error)}; {self.get}") from error
        if not rows:
            raise SrmuError(f"{where} has no rows; {self.get}")
        shapes: dict[str, Any] = {name: (kind, ...) for name, kind in fields.items()}
        model = create_model("Fields", __config__=ConfigDict(strict=True), **shapes)
        for number, row in enumerate(rows, 1):
            try:
                model.model_validate(row)
            except ValidationError as error:  # its message would show texts
                first = error.errors()[0]
                name = first["loc"][0]
                no_field = f"no field {name!r}; it has {', '.join(row)}"
                why = f"field {name!r}: {first['msg']}" if name in row else no_field
                raise SrmuError(f"{where}, row {number}: {why}") from None
        rows = rows[: self.limit]
        text = json.dumps(rows, sort_keys=True, default=str)
        self.seen[f"{config}/{split}"] = files.sha256(text.encode())[:16]
        return rows


class BenchmarkScores(NamedTuple):
    """A benchmark's metrics of a model, and the values of single questions behind them."""

    metrics: Metrics
    values: Values


class TableColumn(NamedTuple):
    """A column of a suite's table, as its paper prints it: a metric times `scale`."""

    title: str
    metric: str
    better: str
    scale: float = 100.0


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: what measures a model on it, and what suites.yaml says of it."""

    run: Callable[[Subject, BenchmarkRequest], BenchmarkScores]
    title: str
    paper: str
    hub: str
    columns: Sequence[TableColumn]
    axes: Sequence[str]
    parts: Sequence[str] = ()
    oracle: str = ""
    revision: str = "main"
    get: str = ""


def prompt_of(model: Subject, question: str, template: str = "") -> str:
    """The prompt for a question: by a template, the chat template, or PLAIN."""
    if template or not model.tokenizer.chat_template:
        return (template or PLAIN).replace("{question}", question)
    messages = [{"role": "user", "content": question}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start = model.tokenizer.bos_token or ""
    # where the tokenizer puts its own first token there
    return text.removeprefix(start) if start and model.tokens("")[:1] == [model.tokenizer.bos_token_id] else text


def write_continuations(
    model: Subject, prompts: Sequence[str], new_tokens: int, *, stops: Sequence[str] = (), label: str = "answers"
) -> list[str]:
    """Greedy continuations of prompts, each cut before the first of `stops`, without blanks around.

    A continuation is at most half of what the model can read; a prompt that is too long for the rest loses its first
    tokens. SrmuError where a model that nothing was unlearned from writes nothing at all.
    """
    new_tokens = min(new_tokens, model.max_length // 2)
    rows = [model.tokens(prompt)[-(model.max_length - new_tokens) :] for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))

    def some(part: Sequence[int]) -> list[str]:
        continued = generate.continue_greedily(model.module, model.tokenizer, [rows[i] for i in part], new_tokens)
        return [cut_at_stop(model.tokenizer.decode(ids, skip_special_tokens=True), stops) for ids in continued]

    texts = dict(zip(order, do_parts(model, order, ROWS, some, label), strict=True))
    if prompts and not any(texts.values()) and not model.original:
        raise SrmuError(f"{label}: the model wrote nothing after any of {len(prompts)} prompts; is --template its own?")
    return [texts[i] for i in range(len(rows))]


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """A text before the first of some strings, without blanks around."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()


def option_likelihoods(
    model: Subject, asked: Sequence[tuple[str, Sequence[str]]], label: str
) -> list[list[tuple[float, int]]]:
    """The log-probability (nats) and the tokens of each option, with the space before it, of each (prompt, options)."""
    pairs = [(prompt, option) for prompt, options in asked for option in options]
    results = do_parts(model, pairs, PAIRS, lambda part: answer_likelihoods(model, part), label)
    check_finite([logp for logp, _ in results], label)
    read = iter(results)
    return [[next(read) for _ in options] for _, options in asked]


def score_options(model: Subject, questions: Sequence[Question], label: str) -> list[list[float]]:
    """The log-probability (nats) of each option of each question."""
    read = option_likelihoods(model, [(q.prompt, q.options) for q in questions], label)
    return [[logp for logp, _ in options] for options in read]


def letter_options(choices: Sequence[str]) -> str:
    """Options as a question lists them: one line `A. text` each."""
    return "\n".join(f"{a}. {text}" for a, text in zip(LETTERS, choices, strict=False))


def do_parts(
    model: Subject, items: Sequence[S], size: int, do: Callable[[Sequence[S]], Iterable[T]], label: str
) -> list[T]:
    """Call `do` with `size` items at a time; all results in order. Several processes share the work."""
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with model.watch(label, -(-len(parts) // distributed.get_size())) as tick:

        def one(part: Sequence[S]) -> list[T]:
            results = [*do(part)]
            tick("")
            return results

        return [*chain.from_iterable(distributed.share_work(parts, one))]


def check_finite(values: Iterable[float], label: str) -> None:
    """SrmuError where a model gave NaN or infinity."""
    if not all(map(isfinite, values)):
        raise SrmuError(f"{label}: the model's output is not a number (NaN)")


def mean_metric(values: Sequence[float]) -> dict[str, float]:
    """A metric that is a mean over questions, with its standard error."""
    count = len(values)
    metric = {"value": float(np.mean(values)), "n": float(count)}
    error = float(np.std(values, ddof=1)) / sqrt(count) if count > 1 else float("nan")
    return metric | ({"stderr": error} if isfinite(error) else {})


def rouge_scores(kind: str, answers: Sequence[str], truths: Sequence[str], **options: Any) -> list[float]:
    """ROUGE-L of each answer: its "recall" or "fmeasure" (0-1), by rouge-score with its options."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], **options)
    pairs = zip(truths, answers, strict=True)
    return [float(getattr(scorer.score(truth, answer)["rougeL"], kind)) for truth, answer in pairs]
