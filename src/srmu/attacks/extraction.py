"""E2: how little of a text has to be given for the model to recite the rest."""

from __future__ import annotations

import random
from collections.abc import Sequence

from srmu.attacks.base import AttackResult, Exam, Texts, Tier
from srmu.attacks.generation import next_logits
from srmu.attacks.listing import unlist_options
from srmu.evals.statistics import LEAST, bootstrap_estimate
from srmu.evals.subject import Subject, list_facts

FORGET_TEXTS = 64
TOKENS = 512  # of a forget text
POSITIONS = 512  # whose logits are held at once

Pair = tuple[list[int], list[int]]  # what is given, what is to be recited


def extraction(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> AttackResult:
    """Extraction strength on the answers (as text, no options listed) and on forget texts.

    Of a forget text, the second half is to be recited after the first.
    """
    questions = [unlist_options(q) for q in exam.test]
    strengths = extraction_strengths(model, [model.split(q.prompt, q.answer) for q in questions])
    metrics = {"answers": bootstrap_estimate([strengths], [list_facts(questions)], seed=seed)}
    drawn = random.Random(seed).sample(texts.forget, min(FORGET_TEXTS, len(texts.forget)))
    rows = [model.tokens(text)[: min(TOKENS, model.max_length)] for text in drawn]
    halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows if len(row) > 1]
    if len(halves) >= LEAST:
        strengths = extraction_strengths(model, halves)
        metrics["forget texts"] = bootstrap_estimate([strengths], [range(len(halves))], seed=seed)
    return AttackResult(metrics=metrics, budget={"forget texts": len(halves), "tokens": TOKENS})


def extraction_strengths(model: Subject, pairs: Sequence[Pair]) -> list[float]:
    """Extraction strength of each text, of the tokens it adds to what is given."""
    found = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
    while order:
        width = len(pairs[order[-1]][1])  # the longest that is left
        batch = [order.pop() for _ in range(min(len(order), max(1, POSITIONS // width)))]
        rows = [(before + answer)[:-1] for before, answer in (pairs[i] for i in batch)]
        greedy = next_logits(model, rows, width).argmax(-1).tolist()
        for i, tokens in zip(batch, greedy, strict=True):
            answer = pairs[i][1]
            found[i] = extraction_strength(tokens[-len(answer) :], answer)
    return found


def extraction_strength(greedy: Sequence[int], answer: Sequence[int]) -> float:
    """ES = 1 - k*/T (arXiv 2406.09179): k* answer tokens to give, then all greedy ones match."""
    wrong = [i for i, pair in enumerate(zip(greedy, answer, strict=True)) if pair[0] != pair[1]]
    return 1 - (wrong[-1] + 1 if wrong else 0) / len(answer)
