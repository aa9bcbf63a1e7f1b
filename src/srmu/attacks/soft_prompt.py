"""E13: answers after embeddings that were learned on other facts."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, ask_exam
from srmu.attacks.layers import answer_nll, answer_rows, pad_rows
from srmu.engine.fine_tune import Row, descend
from srmu.engine.hooks import hook_outputs
from srmu.evals.subject import Subject, list_facts


class PromptedSubject(Subject):
    """A model that reads `length` placeholders after the first token of each text."""

    def __init__(self, model: Subject, place: int, length: int) -> None:
        super().__init__(model.module, model.tokenizer)
        self.place, self.length = place, length

    def tokens(self, text: str) -> list[int]:
        first, *rest = super().tokens(text)
        return [first, *[self.place] * self.length, *rest]


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Attack):
    """Embeddings put after the first token, trained by AdamW on right answers.

    They are trained on 80 % of the validation half's facts. A way's `val` holds the questions on
    the other facts only. Soft prompts can make a model say what it never learned (arXiv
    2502.15836): the result means nothing but beside the same attack on a model without the facts.
    """

    id = "E13"
    name = "soft_prompt"
    tier = "deep"

    length: int = 16  # embeddings
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    steps: int = 100
    batch: int = 16  # questions a step

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        names = sorted(set(list_facts(exam.val)))
        random.Random(seed).shuffle(names)
        rest = set(names[: max(1, len(names) // 5)])
        train = [q for q in exam.val if q.fact not in rest]
        chosen = replace(exam, val=tuple(q for q in exam.val if q.fact in rest))
        prompted = PromptedSubject(model, unused_token(model, exam), self.length)
        answers = answer_rows(prompted, [(q.prompt, q.answer) for q in train])
        ways = []
        for rate in self.rates:
            soft = self.learn_prompt(prompted, answers, rate, seed)
            with insert_prompt(prompted, soft):
                ways.append(ask_exam(prompted, chosen, f"learning rate {rate:g}"))
        budget = {"steps": self.steps, "embeddings": self.length, "batch": self.batch}
        return AttackResult(tuple(ways), budget=budget)

    def learn_prompt(
        self, model: PromptedSubject, answers: Sequence[Row], rate: float, seed: int
    ) -> Float[Tensor, "P D"]:
        """The embeddings after the last step, begun as those of random tokens."""
        generator = torch.Generator().manual_seed(seed)
        embed = model.module.get_input_embeddings()
        words = torch.randint(embed.weight.shape[0], (self.length,), generator=generator)
        soft = embed(words.to(model.device)).detach().float().requires_grad_()

        def loss() -> Tensor:
            picked = torch.randperm(len(answers), generator=generator)[: self.batch].tolist()
            batch = pad_rows([answers[i] for i in picked], model.device)
            with insert_prompt(model, soft):
                return answer_nll(model, batch["input_ids"], batch["labels"]).mean()

        optimiser = torch.optim.AdamW([soft], lr=rate, weight_decay=0.0)
        descend([(soft, soft)], optimiser, loss, self.steps)
        return soft.detach()


def unused_token(model: Subject, exam: Exam) -> int:
    """A token that no question holds, nor padding, which is 0: it marks where embeddings go."""
    questions = (*exam.val, *exam.test)
    held = {t for q in questions for option in q.options for t in model.tokens(q.prompt + option)}
    size = model.module.get_input_embeddings().weight.shape[0]
    return next(i for i in range(1, size) if i not in held)


def insert_prompt(model: PromptedSubject, soft: Float[Tensor, "P D"]) -> AbstractContextManager[None]:
    """Run the model with the embeddings in the places of the placeholders, in their order."""

    def insert(args: tuple[Int[Tensor, "B T"]], read: Tensor) -> Any:
        at = args[0] == model.place
        number = (at.cumsum(dim=1) - 1).clamp(0, len(soft) - 1)
        return torch.where(at.unsqueeze(-1), soft[number].to(read), read)

    return hook_outputs({model.module.get_input_embeddings(): insert})
