"""E18: what it cost: knowledge to keep, ordinary text, and whether forget prompts end in babble."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import exp

import torch
from torch import Tensor

from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier
from srmu.engine.generate import join_responses
from srmu.engine.losses import is_predicted, token_kl, token_nll
from srmu.engine.model import Batch
from srmu.engine.train import move_batch
from srmu.evals.statistics import LEAST, Estimate, bootstrap_estimate, estimate_accuracy
from srmu.evals.subject import Subject, list_facts, mark_answers

COUNT = 64  # texts read
ROWS = 16  # at once
LENGTH = 256  # tokens of a text
NEW_TOKENS = 32


def utility(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> AttackResult:
    """Answers to the tasks to keep, a way each. Of neutral texts the nats a token costs, their
    perplexity and KL(original || model); the share of repeated token pairs after forget prompts."""
    kept = {task: mark_answers(model, asked) for task, asked in exam.utility.items()}
    found = {
        f"accuracy, {task}": estimate_accuracy(kept[task], list_facts(asked), seed=seed)
        for task, asked in exam.utility.items()
        if len({*list_facts(asked)}) >= LEAST
    }
    rows = [model.tokens(text)[:LENGTH] for text in texts.neutral[:COUNT]]
    rows = [row for row in rows if len(row) > 1]
    if len(rows) >= LEAST:
        found |= measure_texts(model, rows, seed)
    prompts = [model.tokens(q.prompt) for q in exam.test[:COUNT]]
    repeats = measure_repetition(model, prompts)
    found["repetition"] = bootstrap_estimate([repeats], [list_facts(exam.test[:COUNT])], seed=seed)
    budget = {"neutral texts": len(rows), "prompts continued": len(prompts)}
    ways = tuple(Setting(task, (), right) for task, right in kept.items())
    return AttackResult(ways, found, budget | {"new tokens": NEW_TOKENS})


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
    found = {
        "nats a neutral token": cost,
        "perplexity of neutral text": Estimate(exp(cost.value), low, high, cost.n),
    }
    if drifts:
        found["KL of neutral text"] = bootstrap_estimate([drifts], [names], seed=seed)
    return found


def text_batches(model: Subject, rows: Sequence[list[int]]) -> Iterator[Batch]:
    """Whole texts, padded on the right, all their tokens counted."""
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        yield move_batch(join_responses([[]] * len(part), part), model.device)


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


@torch.no_grad()
def measure_repetition(model: Subject, prompts: Sequence[list[int]]) -> list[float]:
    """Of each greedy continuation the share of its token pairs that occurred in it before."""
    found = []
    pad = model.tokenizer.pad_token_id
    for start in range(0, len(prompts), ROWS):
        part = prompts[start : start + ROWS]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in part]).to(model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part])
        made = model.module.generate(
            ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad,
        )[:, width:]
        end = model.tokenizer.eos_token_id
        for row in made.tolist():
            row = row[: row.index(end)] if end in row else row
            pairs = list(pairwise(row))
            found.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return found
