"""E2: how little of a text has to be given for the model to recite the rest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from srmu.attacks.base import Attack, AttackResult, Exam, Texts
from srmu.attacks.listing import unlist_options
from srmu.engine.fine_tune import Row
from srmu.engine.generate import next_logits
from srmu.evals.statistics import LEAST, bootstrap_estimate
from srmu.evals.subject import Subject, list_facts


@dataclass(frozen=True, kw_only=True)
class Extraction(Attack):
    """Extraction strength on the answers (as text, no options listed) and on forget texts.

    Of a forget text, the second half is to be recited after the first.
    """

    id = "E2"
    name = "extraction"
    tier = "smoke"

    texts: int = 64  # forget texts
    tokens: int = 512  # of a forget text
    positions: int = 512  # whose logits are held at once

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        questions = [unlist_options(q) for q in exam.test]
        strengths = self.measure_strengths(model, [model.split(q.prompt, q.answer) for q in questions])
        metrics = {"answers": bootstrap_estimate([strengths], [list_facts(questions)], seed=seed)}
        drawn = random.Random(seed).sample(texts.forget, min(self.texts, len(texts.forget)))
        rows = [model.tokens(text)[: min(self.tokens, model.max_length)] for text in drawn]
        halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows if len(row) > 1]
        if len(halves) >= LEAST:
            strengths = self.measure_strengths(model, halves)
            names = range(len(halves))
            metrics["forget texts"] = bootstrap_estimate([strengths], [names], seed=seed)
        budget = {"forget texts": len(halves), "tokens": self.tokens}
        return AttackResult(metrics=metrics, budget=budget)

    def measure_strengths(self, model: Subject, rows: Sequence[Row]) -> list[float]:
        """Extraction strength of each row, of the tokens to recite after what is given."""
        strengths = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i][1]), len(rows[i][0])))
        while order:
            width = len(rows[order[-1]][1])  # the longest that is left
            size = max(1, self.positions // width)
            batch = [order.pop() for _ in range(min(len(order), size))]
            read = [(before + answer)[:-1] for before, answer in (rows[i] for i in batch)]
            read = [row[-model.max_length :] for row in read]
            greedy = next_logits(model.module, read, width).argmax(-1).tolist()
            for i, tokens in zip(batch, greedy, strict=True):
                answer = rows[i][1]
                strengths[i] = extraction_strength(tokens[-len(answer) :], answer)
        return strengths


def extraction_strength(greedy: Sequence[int], answer: Sequence[int]) -> float:
    """ES = 1 - k*/T (arXiv 2406.09179): k* answer tokens to give, then all greedy ones match."""
    wrong = [i for i, pair in enumerate(zip(greedy, answer, strict=True)) if pair[0] != pair[1]]
    return 1 - (wrong[-1] + 1 if wrong else 0) / len(answer)
