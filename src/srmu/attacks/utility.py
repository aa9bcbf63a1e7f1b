"""E18: what it cost: knowledge to keep, ordinary text, and whether forget prompts end in babble."""

from collections.abc import Sequence
from itertools import pairwise
from math import exp

import torch

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts
from srmu.engine.generate import batch_texts, continue_greedily
from srmu.engine.losses import is_predicted, token_kl, token_nll
from srmu.engine.train import move_batch
from srmu.evals.statistics import LEAST, Estimate, bootstrap_estimate, estimate_accuracy
from srmu.evals.subject import Subject, list_facts, mark_answers

ROWS = 16  # texts read at once


class Utility(Attack, id="E18", name="utility", tier="smoke", recovers=False):
    """Answers to the tasks to keep, a way each; what neutral texts cost, and KL(original || model) on them; of greedy
    continuations of forget prompts, the share of token pairs that occurred before."""

    count: int = 64  # texts read, and prompts continued
    length: int = 256  # tokens of a text
    new_tokens: int = 32

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        ways, metrics = [], {}
        for task, questions in exam.utility.items():
            ways.append(Setting(task, (), mark_answers(model, questions)))
            names = list_facts(questions)
            if len({*names}) >= LEAST:
                metrics[f"accuracy, {task}"] = estimate_accuracy(ways[-1].test, names, seed=seed)
        rows = [model.tokens(text)[: self.length] for text in texts.neutral[: self.count]]
        rows = [row for row in rows if len(row) > 1]
        if len(rows) >= LEAST:
            metrics |= measure_texts(model, rows, seed)
        asked, repeats = exam.test[: self.count], []
        for start in range(0, len(asked), ROWS):
            prompts = [model.tokens(q.prompt) for q in asked[start : start + ROWS]]
            for row in continue_greedily(model.module, model.tokenizer, prompts, self.new_tokens):
                pairs = list(pairwise(row))
                repeats.append(1 - len({*pairs}) / len(pairs) if pairs else 0.0)
        metrics["repetition"] = bootstrap_estimate(repeats, list_facts(asked), seed=seed)
        budget = {"neutral texts": len(rows), "prompts continued": len(asked), "new tokens": self.new_tokens}
        return AttackResult(tuple(ways), metrics, budget)


@torch.no_grad()
def measure_texts(model: Subject, rows: Sequence[list[int]], seed: int) -> dict[str, Estimate]:
    """What a token of the texts costs, and how far the model is from the original on them."""
    costs, drifts = [], []
    for start in range(0, len(rows), ROWS):
        batch = move_batch(batch_texts(rows[start : start + ROWS]), model.device)
        read = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        logits = model.module(**read).logits
        mask = is_predicted(batch["labels"])
        costs += (token_nll(logits, batch["labels"]).sum(dim=1) / mask.sum(dim=1)).tolist()
        if model.original and not model.fixed:
            with model.as_original():
                before = model.module(**read).logits
            drifts += ((token_kl(before, logits) * mask).sum(dim=1) / mask.sum(dim=1)).tolist()
    names = range(len(costs))
    cost = bootstrap_estimate(costs, names, seed=seed)
    perplexity = Estimate(exp(cost.value), exp(cost.low), exp(cost.high), cost.n)
    metrics = {"nats a neutral token": cost, "perplexity of neutral text": perplexity}
    if drifts:
        metrics["KL of neutral text"] = bootstrap_estimate(drifts, names, seed=seed)
    return metrics
