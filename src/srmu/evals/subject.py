"""A model that is examined, questions, how it answers them, and what tells that it has read a text."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from srmu.data.tokens import read_ids
from srmu.engine.generate import batch_texts
from srmu.engine.likelihoods import SharedHeadError, score_answers, score_layers
from srmu.engine.losses import mean_nll
from srmu.engine.model import EditableModel, replace_tensor
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.sites import cut_blocks
from srmu.engine.train import move_batch
from srmu.errors import SrmuError
from srmu.evals.statistics import Array

LENGTH = 512  # tokens of a text
SHARE = 0.2  # of the tokens that Min-K looks at
SCORES = ("loss", "zlib", "min-k", "min-k++")
MEMORISED = ("exact memorisation", "extraction strength")
LOGITS = 2**26  # numbers in a batch's logits: 256 MB in float32

T = TypeVar("T")


class NotApplicable(Exception):  # noqa: N818 (nothing went wrong)
    """An attack says nothing about this model, these texts or these questions; says why."""


@dataclass(frozen=True)
class Question:
    """A prompt and the options that can follow it, each with the space before it."""

    prompt: str
    options: tuple[str, ...]
    gold: int
    fact: str  # the same in all phrasings of what is asked
    paraphrases: tuple[str, ...] = ()
    translations: tuple[str, ...] = ()  # the prompt in other languages
    entry: str = ""  # the thing that it is about, if that is known

    @property
    def answer(self) -> str:
        return self.options[self.gold]


@dataclass(eq=False)
class Subject:
    """A model under attack. Whatever an attack does to it is undone afterwards."""

    module: Any  # a PreTrainedModel
    tokenizer: Any
    original: Mapping[str, Tensor] = field(default_factory=dict)  # tensors before unlearning that differ from its own
    oracle: "Subject | None" = None
    fixed: str = ""  # why its weights cannot be attacked: it answers with more than them
    watch: Watch = ignore_progress  # of benchmarks and long attacks
    # a JSON value by a key: what was made before, where that is kept, so that a long attack can go on
    remember: Callable[[Any, Callable[[], Any]], Any] = lambda key, make: make()

    def __post_init__(self) -> None:
        self.module.eval()
        self._known = lru_cache(1 << 16)(lambda text: tuple(read_ids(text, self.tokenizer)))

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def max_length(self) -> int:
        """The most tokens the model can read."""
        return read_positions(self.module.config)

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Run the block as the model before unlearning; NotApplicable where this is it."""
        if self.fixed or not self.original:
            raise NotApplicable(self.fixed or "this is the original model")
        with ExitStack() as restore:
            for name, tensor in self.original.items():
                parameter = self.module.get_parameter(name)
                restore.callback(replace_tensor, parameter, replace_tensor(parameter, tensor))
            yield

    @contextmanager
    def editable(self, *trainable: str) -> Iterator[EditableModel]:
        """The model with copies of the parameters that match, as for methods; `frozen()` of it is what is attacked."""
        if self.fixed:
            raise NotApplicable(self.fixed)
        flags = {name: p.requires_grad for name, p in self.module.named_parameters()}
        model = EditableModel(self.module, trainable)
        original = dict(model.original)
        try:
            yield model
        finally:
            for name, parameter in self.module.named_parameters():
                parameter.data = original.get(name, parameter.data)
                parameter.grad = None
                parameter.requires_grad_(flags[name])

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text with those that the tokenizer puts first; none at all: the one that texts begin with."""
        starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        ids = list(self._known(text)) or [start for start in starts if start is not None][:1]
        if not ids:
            raise SrmuError("a question has no prompt, and the tokenizer no token to begin a text with")
        return ids

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt, and those that the answer after it adds."""
        before, whole = self._known(prompt), self._known(prompt + answer)
        return self.tokens(prompt), list(whole[len(before) :])


def read_positions(config: Any) -> int:
    """The most tokens that a model with this config can read."""
    return getattr(config, "max_position_embeddings", None) or 2048


def pick_evenly(items: Sequence[T], most: int | None) -> list[T]:
    """At most so many, evenly spaced, the first and the last among them."""
    count = min(most or len(items), len(items))
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def answer_likelihoods(model: Subject, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
    """For each (prompt, answer): the answer's log-probability and its tokens."""
    split = [model.split(prompt, answer) for prompt, answer in pairs]
    results = score_answers(model.module, split, model.max_length, dtype=torch.float32)
    return [(logp, len(answer)) for (logp, _), (_, answer) in zip(results, split, strict=True)]


def option_scores(model: Subject, questions: Sequence[Question], *, normalised: bool = False) -> list[list[float]]:
    """The log-probability of each option of each question; `normalised`: a token's mean."""
    pairs = [(q.prompt, option) for q in questions for option in q.options]
    scores = [logp / length if normalised else logp for logp, length in answer_likelihoods(model, pairs)]
    return group_options(scores, questions)


def group_options(scores: Iterable[float], questions: Sequence[Question]) -> list[list[float]]:
    """The scores of all options of all questions, question by question."""
    rest = iter(scores)
    return [[next(rest) for _ in q.options] for q in questions]


def mark_right(scores: Sequence[Sequence[float]], questions: Sequence[Question]) -> tuple[float, ...]:
    """1 where the right option has the highest score, else 0; the first of equals is chosen."""
    return tuple(float(row.index(max(row)) == q.gold) for row, q in zip(scores, questions, strict=True))


def weigh_right(scores: Sequence[Sequence[float]], questions: Sequence[Question]) -> tuple[float, ...]:
    """The probability of the right option among the options of each question."""
    pairs = zip(scores, questions, strict=True)
    return tuple(float(np.exp(row[q.gold] - np.logaddexp.reduce(row))) for row, q in pairs)


def mark_layers(
    model: Subject, questions: Sequence[Question], layers: Sequence[int]
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Each layer with what `mark_answers` gives for the model cut above it."""
    pairs = [model.split(q.prompt, option) for q in questions for option in q.options]
    try:
        scores = score_layers(model.module, layers, pairs, model.max_length, torch.float32)
    except SharedHeadError:  # each cut by itself, which takes longer
        for layer in layers:
            with cut_blocks(model.module, layer + 1):
                right = mark_answers(model, questions)
            yield layer, right
        return
    for layer, own in zip(layers, zip(*scores, strict=True), strict=True):
        yield layer, mark_right(group_options([log for log, _ in own], questions), questions)


def mark_answers(model: Subject, questions: Sequence[Question]) -> tuple[float, ...]:
    """1 for each question whose right option the model finds likeliest, else 0."""
    return mark_right(option_scores(model, questions), questions)


def list_facts(questions: Sequence[Question]) -> list[str]:
    return [question.fact for question in questions]


def cut_texts(model: Subject, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, as many as are read; without texts of fewer than two."""
    rows = (model.tokens(text)[: min(LENGTH, model.max_length)] for text in texts)
    return [row for row in rows if len(row) > 1]


@torch.no_grad()
def score_texts(
    model: Subject, texts: Sequence[str], names: Sequence[str], score: Callable[[list[int], Tensor], Sequence[float]]
) -> Array:
    """The named scores of each text of two tokens or more: (texts, names).

    `score` gets a text's tokens, and the logits before each but the first (T - 1, V), in float32.
    """
    rows = cut_texts(model, texts)
    size = model.module.get_input_embeddings().weight.shape[0]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores = np.empty((len(rows), len(names)))
    while order:
        count = max(1, LOGITS // (size * len(rows[order[0]])))
        part, order = order[:count], order[count:]
        batch = move_batch(batch_texts([rows[i] for i in part]), model.device)
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model.module(**read, use_cache=False).logits
        for i, row in zip(part, logits, strict=True):
            scores[i] = score(rows[i], row[: len(rows[i]) - 1].float())
    return scores


def membership_scores(model: Subject, texts: Sequence[str]) -> Array:
    """The SCORES of each text of two tokens or more, higher for a member: (texts, 4)."""

    def score(ids: list[int], logits: Tensor) -> tuple[float, ...]:
        logs = logits.log_softmax(-1)  # (T - 1, V)
        logp, p = logs.gather(-1, torch.tensor(ids[1:], device=logs.device)[:, None])[:, 0], logs.exp()
        # arXiv 2404.02936, Min-K++: (log p - mu) / sigma, of log p under p itself
        mu = (p * logs).sum(-1)
        sigma = (p * (logs - mu[:, None]) ** 2).sum(-1).sqrt()
        standard = (logp - mu) / sigma.clamp(min=1e-6)
        # arXiv 2012.07805: log-likelihood by the size of the compressed text
        compressed = zlib.compress(model.tokenizer.decode(ids, skip_special_tokens=True).encode())
        mean = float(logp.mean())
        return mean, mean / len(compressed), mean_lowest(logp), mean_lowest(standard)

    return score_texts(model, texts, SCORES, score)


def memorisation_scores(model: Subject, texts: Sequence[str]) -> Array:
    """MEMORISED of each text of two tokens or more: (texts, 2)."""

    def score(ids: list[int], logits: Tensor) -> tuple[float, ...]:
        right = (logits.argmax(-1).cpu() == torch.tensor(ids[1:])).tolist()
        # arXiv 2205.10770: the share of tokens that the model finds likeliest after the true ones before them
        exact = sum(right) / len(right)
        # as open-unlearning's: 1 - k / T, k the fewest true tokens after which it writes all of the rest
        return exact, next((i for i, hit in enumerate(reversed(right)) if not hit), len(right)) / len(right)

    return score_texts(model, texts, MEMORISED, score)


def gradient_norms(model: Subject, texts: Sequence[str]) -> Array:
    """The norm of the gradient of each text's mean loss over all weights, which is small for what was learned."""
    norms = []
    with model.editable("*") as edited:
        for ids in cut_texts(model, texts):
            batch = move_batch(batch_texts([ids]), model.device)
            loss = mean_nll(edited.logits(batch), batch["labels"]).value
            grads = torch.autograd.grad(loss, [*edited.trained.values()], allow_unused=True)
            norms.append(float(torch.stack([grad.float().norm() for grad in grads if grad is not None]).norm()))
    return np.array(norms)


def mean_lowest(values: Tensor, share: float = SHARE) -> float:
    """Mean of the lowest `share` of the values, at least of one (Min-K, arXiv 2310.16789)."""
    count = max(1, int(share * len(values)))
    return float(values.sort().values[:count].mean())
