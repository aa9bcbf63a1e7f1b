"""A model that is examined, questions, and how it answers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from srmu.engine.likelihoods import score_answers
from srmu.engine.model import EditableModel, replace_tensor
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError


class NotApplicable(Exception):  # noqa: N818 (nothing went wrong)
    """An attack says nothing about this model, these texts or these questions; says why."""


@dataclass(frozen=True)
class Question:
    """A prompt and the options that can follow it, each with the space before it.

    `fact` is the same in all phrasings of what is asked; `entry` the thing that it is about, if that is known.
    """

    prompt: str
    options: tuple[str, ...]
    gold: int
    fact: str
    paraphrases: tuple[str, ...] = ()
    entry: str = ""

    @property
    def answer(self) -> str:
        return self.options[self.gold]


@dataclass(eq=False)
class Subject:
    """A model under attack. Whatever an attack does to it is undone afterwards.

    `original` holds the tensors before unlearning that differ from its own, by parameter name. `fixed` says why its
    weights cannot be attacked (it answers with more than them).
    """

    module: Any  # a PreTrainedModel
    tokenizer: Any
    original: Mapping[str, Tensor] = field(default_factory=dict)
    oracle: Subject | None = None
    fixed: str = ""
    watch: Watch = ignore_progress  # of benchmarks

    def __post_init__(self) -> None:
        self.module.eval()
        self._known = lru_cache(1 << 16)(lambda text: tuple(self.tokenizer(text)["input_ids"]))

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def max_length(self) -> int:
        """The most tokens the model can read."""
        return getattr(self.module.config, "max_position_embeddings", None) or 2048

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Run the block as the model before unlearning; NotApplicable where this is it."""
        if not self.original:
            raise NotApplicable("this is the original model")
        if self.fixed:
            raise NotApplicable(self.fixed)
        parameters = dict(self.module.named_parameters())
        current = {name: replace_tensor(parameters[name], tensor) for name, tensor in self.original.items()}
        try:
            yield
        finally:
            for name, tensor in current.items():
                replace_tensor(parameters[name], tensor)

    @contextmanager
    def editable(self, *trainable: str) -> Iterator[EditableModel]:
        """The model with copies of the parameters that match, to be changed freely.

        `trainable` is as for methods: `"*"`, `"*.linear"`, names, globs. `frozen()` of it is the model under attack.
        """
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
        ids = list(self._known(text))
        for start in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if not ids and start is not None:
                ids = [start]
        if not ids:
            raise SrmuError("a question has no prompt, and the tokenizer no token to begin a text with")
        return ids

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt, and those that the answer after it adds."""
        before, whole = self._known(prompt), self._known(prompt + answer)
        return self.tokens(prompt), list(whole[len(before) :])


def answer_likelihoods(model: Subject, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int, bool]]:
    """For each (prompt, answer): the answer's log-probability, its tokens, whether it is greedy."""
    split = [model.split(prompt, answer) for prompt, answer in pairs]
    results = score_answers(model.module, split, model.max_length, dtype=torch.float32)
    return [(logp, len(a), sure) for (logp, sure), (_, a) in zip(results, split, strict=True)]


def option_scores(model: Subject, questions: Sequence[Question], *, normalised: bool = False) -> list[list[float]]:
    """The log-probability of each option of each question; `normalised`: a token's mean."""
    pairs = [(q.prompt, option) for q in questions for option in q.options]
    scores = iter(logp / length if normalised else logp for logp, length, _ in answer_likelihoods(model, pairs))
    return [[next(scores) for _ in q.options] for q in questions]


def mark_right(scores: Sequence[Sequence[float]], questions: Sequence[Question]) -> tuple[float, ...]:
    """1 where the right option has the highest score, else 0; the first of equals is chosen."""
    return tuple(float(row.index(max(row)) == q.gold) for row, q in zip(scores, questions, strict=True))


def mark_answers(model: Subject, questions: Sequence[Question]) -> tuple[float, ...]:
    """1 for each question whose right option the model finds likeliest, else 0."""
    return mark_right(option_scores(model, questions), questions)


def list_facts(questions: Sequence[Question]) -> list[str]:
    return [question.fact for question in questions]
