"""E18: what it cost: knowledge to keep, ordinary text, and whether forget prompts end in babble."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp

import torch
from torch import Tensor

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts
from srmu.engine.generate import batch_texts, continue_greedily
from srmu.engine.losses import is_predicted, token_kl, token_nll
from srmu.engine.model import Batch
from srmu.engine.train import move_batch
from srmu.evals.statistics import LEAST, Estimate, bootstrap_estimate, estimate_accuracy
from srmu.evals.subject import Subject, list_facts, mark_answers

ROWS = 16  # texts read at once


@dataclass(frozen=True, kw_only=True)
class Utility(Attack):
    """Answers to the tasks to keep, a way each. Of neutral texts the nats a token costs, their
    perplexity and KL(original || model); the share of repeated token pairs after forget prompts."""

    id = "E18"
    name = "utility"
    tier = "smoke"
    recovers = False

    count: int = 64  # texts read, and prompts continued
    length: int = 256  # tokens of a text
    new_tokens: int = 32

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        kept = {task: mark_answers(model, asked) for task, asked in exam.utility.items()}
        metrics = {
            f"accuracy, {task}": estimate_accuracy(kept[task], list_facts(asked), seed=seed)
            for task, asked in exam.utility.items()
            if len({*list_facts(asked)}) >= LEAST
        }
        rows = [model.tokens(text)[: self.length] for text in texts.neutral[: self.count]]
        rows = [row for row in rows if len(row) > 1]
        if len(rows) >= LEAST:
            metrics |= measure_texts(model, rows, seed)
        asked = exam.test[: self.count]
        prompts = [model.tokens(q.prompt) for q in asked]
        repeats = measure_repetition(model, prompts, self.new_tokens)
        metrics["repetition"] = bootstrap_estimate([repeats], [list_facts(asked)], seed=seed)
        budget = {"neutral texts": len(rows), "prompts continued": len(prompts), "new tokens": self.new_tokens}
        ways = tuple(Setting(task, (), right) for task, right in kept.items())
        return AttackResult(ways, metrics, budget)


def measure_texts(model: Subject, rows: Sequence[list[int]], seed: int) -> dict[str, Estimate]:
    """What a token of the texts costs, and how far the model is from the original on them."""
    costs, drifts = [], []
    for batch in text_batches(model, rows):
        logits, before = both_logits(model, batch)
        mask = is_predicted(batch["labels"])
        nll = token_nll(logits, batch["labels"])
        costs += (nll.sum(dim=1) / mask.sum(dim=1)).tolist()
        if before is not None:
            kl = token_kl(before, logits) * mask
            drifts += (kl.sum(dim=1) / mask.sum(dim=1)).tolist()
    names = list(range(len(costs)))
    cost = bootstrap_estimate([costs], [names], seed=seed)
    low, high = exp(cost.low), exp(cost.high)
    metrics = {"nats a neutral token": cost, "perplexity of neutral text": Estimate(exp(cost.value), low, high, cost.n)}
    if drifts:
        metrics["KL of neutral text"] = bootstrap_estimate([drifts], [names], seed=seed)
    return metrics


def text_batches(model: Subject, rows: Sequence[list[int]]) -> Iterator[Batch]:
    """Whole texts, padded on the right, all their tokens counted."""
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        yield move_batch(batch_texts(part), model.device)


@torch.no_grad()
def both_logits(model: Subject, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The logits of the model and, where it has one, of the original."""

    def logits() -> Tensor:
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model.module(**read, use_cache=False).logits

    if not model.original or model.fixed:
        return logits(), None
    with model.as_original():
        before = logits()
    return logits(), before


def measure_repetition(model: Subject, prompts: Sequence[list[int]], new_tokens: int) -> list[float]:
    """Of each greedy continuation the share of its token pairs that occurred in it before."""
    shares = []
    for start in range(0, len(prompts), ROWS):
        part = prompts[start : start + ROWS]
        for row in continue_greedily(model.module, model.tokenizer, part, new_tokens):
            pairs = list(pairwise(row))
            shares.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return shares
