"""E12: a universal suffix found by greedy coordinate gradient (arXiv 2307.15043)."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, ask_exam
from srmu.evals.subject import Question, Subject


class Target(NamedTuple):
    """A question ready for suffixes: what is before them is read already."""

    past: Any
    cue: Tensor
    answer: Tensor


class SuffixedSubject(Subject):
    """The subject as it answers with a suffix before the last `cue` tokens of each prompt."""

    def __init__(self, model: Subject, suffix: list[int], cue: int) -> None:
        super().__init__(model.module, model.tokenizer)
        self.suffix, self.cue = suffix, cue

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        before, added = super().split(prompt, answer)
        at = len(before) - self.cue
        return [*before[:at], *self.suffix, *before[at:]], added


@dataclass(frozen=True, kw_only=True)
class GCG(Attack):
    """Tokens between a question and its cue that make right answers likely.

    Found on a few validation questions, whose answers count in `val` like the others'. The cue is
    whatever all prompts end with. The suffix is used as tokens, not as text.
    """

    id = "E12"
    name = "gcg"
    tier = "deep"

    steps: int = 200
    candidates: int = 128  # suffixes tried a step
    length: int = 20  # tokens of the suffix
    top: int = 256  # replacements considered for each of them
    questions: int = 5  # trained on
    rows: int = 32  # candidates read at once
    behind: int = 10  # tokens of cue and answer, as `cost` guesses

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        generator = torch.Generator().manual_seed(seed)
        chosen = random.Random(seed).sample(exam.val, min(self.questions, len(exam.val)))
        cue = common_end([model.tokens(q.prompt) for q in (*exam.val, *exam.test)])
        targets = [make_target(model, q, cue, self.length) for q in chosen]
        allowed = ordinary_tokens(model)
        suffix = allowed[torch.randint(len(allowed), (self.length,), generator=generator)]
        best, least = suffix, float(suffix_losses(model, targets, suffix[None], self.rows))
        before = least
        for _ in range(self.steps):
            slopes = suffix_gradient(model, targets, suffix)
            tried = draw_swaps(slopes, suffix, allowed, self.candidates, self.top, generator)
            values = suffix_losses(model, targets, tried, self.rows)
            suffix = tried[values.argmin()]  # Algorithm 2: also where it is worse
            if values.min() < least:
                best, least = suffix, float(values.min())
        way = ask_exam(SuffixedSubject(model, best.tolist(), cue), exam, "suffix")
        budget = {
            "steps": self.steps,
            "candidates": self.candidates,
            "tokens": self.length,
            "questions": len(targets),
            "loss before": before,
            "loss after": least,
        }
        return AttackResult((way,), budget=budget)

    def cost(self, model: Subject) -> str:
        """From the time of one forward."""
        shape = self.rows, self.length + self.behind
        ids = torch.zeros(*shape, dtype=torch.long, device=model.device)
        for _ in range(2):  # the first one gets going
            start = time.perf_counter()
            with torch.no_grad():
                float(model.module(ids, use_cache=False, logits_to_keep=1).logits.sum())
            seconds = time.perf_counter() - start
        # a gradient of one row costs less than a forward of `rows`
        forwards = self.steps * self.questions * (1 + -(-self.candidates // self.rows))
        return (
            f"gcg takes about {forwards:,} forwards of {shape[0]} x {shape[1]} tokens: "
            f"{forwards * seconds / 60:,.1f} minutes on this machine"
        )


def common_end(rows: Sequence[Sequence[int]]) -> int:
    """How many last tokens all rows have in common; each keeps one or more before them."""
    shared = 0
    while shared + 1 < min(map(len, rows)) and len({row[-shared - 1] for row in rows}) == 1:
        shared += 1
    return shared


def ordinary_tokens(model: Subject) -> Tensor:
    """The tokens that a suffix may have: those of the tokenizer, but for special ones."""
    size = min(len(model.tokenizer), model.module.get_input_embeddings().weight.shape[0])
    return torch.tensor([*{*range(size)} - {*model.tokenizer.all_special_ids}])


@torch.no_grad()
def make_target(model: Subject, question: Question, cue: int, length: int) -> Target:
    before, answer = (torch.tensor(ids) for ids in model.split(question.prompt, question.answer))
    at, room = len(before) - cue, model.max_length - length - cue - len(answer)
    start = before[max(0, at - room) : at].to(model.device)
    past = model.module(start[None], use_cache=True, logits_to_keep=1).past_key_values
    end = torch.cat([before[at:], answer[:-1]])
    return Target(past, end.to(model.device), answer.to(model.device))


def target_nll(model: Subject, target: Target, rows: int, **read: Tensor) -> Tensor:
    """Mean negative log-likelihood of a right answer's tokens, (rows,)."""
    past = deepcopy(target.past)  # a forward adds to it
    past.batch_repeat_interleave(rows)
    keep = len(target.answer)
    logits = model.module(**read, past_key_values=past, use_cache=True, logits_to_keep=keep).logits
    answers = target.answer.expand(rows, -1)
    return cross_entropy(logits.float().transpose(1, 2), answers, reduction="none").mean(1)


@torch.no_grad()
def suffix_losses(model: Subject, targets: Sequence[Target], suffixes: Tensor, at_once: int) -> Tensor:
    """Mean over the questions of the loss with each suffix, (suffixes,)."""
    losses = torch.zeros(len(suffixes))
    for rows in torch.arange(len(suffixes)).split(at_once):
        part = suffixes[rows].to(model.device)
        for one in targets:
            ids = torch.cat([part, one.cue.expand(len(part), -1)], dim=1)
            losses[rows] += target_nll(model, one, len(part), input_ids=ids).cpu() / len(targets)
    return losses


@torch.enable_grad()
def suffix_gradient(model: Subject, targets: Sequence[Target], suffix: Tensor) -> Tensor:
    """Gradient of the loss by the one-hot tokens of the suffix, (tokens, V), up to a factor."""
    embedding: Any = model.module.get_input_embeddings()
    total = torch.zeros(len(suffix), embedding.weight.shape[1], device=model.device)
    for one in targets:
        ids = torch.cat([suffix.to(model.device), one.cue])[None]
        read = embedding(ids).detach().requires_grad_()
        loss = target_nll(model, one, 1, inputs_embeds=read).sum()
        total += torch.autograd.grad(loss, read)[0][0, : len(suffix)].float()
    weight = embedding.weight.detach()
    return (total.to(weight.dtype) @ weight.T).float().cpu()


def draw_swaps(
    slopes: Tensor, suffix: Tensor, allowed: Tensor, count: int, top: int, generator: torch.Generator
) -> Tensor:
    """Different suffixes, each with one token replaced by one of the `top` that promise most."""
    promising = allowed[slopes[:, allowed].topk(min(top, len(allowed)), largest=False).indices]
    drawn = torch.randperm(promising.numel(), generator=generator)[:count]
    position = drawn // promising.shape[1]
    tried = suffix.repeat(len(drawn), 1)
    tried[torch.arange(len(drawn)), position] = promising.flatten()[drawn]
    return tried
