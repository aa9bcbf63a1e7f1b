"""E13: answers after embeddings that were learned on other facts."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from srmu.attacks.base import AttackResult, Exam, Texts, Tier, ask_exam
from srmu.attacks.layers import Rows, answer_nll, answer_rows, pad_answers
from srmu.evals.subject import Subject, list_facts

LENGTH = 16
RATES = (1e-3, 1e-2, 1e-1)
BATCH = 16  # questions a step


class PromptedSubject(Subject):
    """A model that reads placeholders after the first token of each text."""

    def __init__(self, model: Subject, place: int) -> None:
        super().__init__(model.module, model.tokenizer)
        self.place = place

    def tokens(self, text: str) -> list[int]:
        first, *rest = super().tokens(text)
        return [first, *[self.place] * LENGTH, *rest]


def soft_prompt(
    model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int, steps: int = 100
) -> AttackResult:
    """Embeddings put after the first token, trained by AdamW on right answers.

    They are trained on 80 % of the validation half's facts. A way's `val` holds the questions on
    the other facts only. Soft prompts can make a model say what it never learned (arXiv
    2502.15836): the result means nothing but beside the same attack on a model without the facts.
    """
    names = sorted(set(list_facts(exam.val)))
    random.Random(seed).shuffle(names)
    rest = set(names[: max(1, len(names) // 5)])
    train = [q for q in exam.val if q.fact not in rest]
    chosen = replace(exam, val=tuple(q for q in exam.val if q.fact in rest))
    prompted = PromptedSubject(model, unused_token(model, exam))
    answers = answer_rows(prompted, [(q.prompt, q.answer) for q in train])
    ways = []
    for rate in RATES:
        soft = learn_prompt(prompted, answers, rate, steps, seed)
        with insert_prompt(prompted, soft):
            ways.append(ask_exam(prompted, chosen, f"learning rate {rate:g}"))
    return AttackResult(tuple(ways), budget={"steps": steps, "embeddings": LENGTH, "batch": BATCH})


def unused_token(model: Subject, exam: Exam) -> int:
    """A token that no question holds, nor padding, which is 0: it marks where embeddings go."""
    questions = (*exam.val, *exam.test)
    held = {t for q in questions for option in q.options for t in model.tokens(q.prompt + option)}
    size = model.module.get_input_embeddings().weight.shape[0]
    return next(i for i in range(1, size) if i not in held)


def learn_prompt(
    model: PromptedSubject, answers: Rows, rate: float, steps: int, seed: int
) -> Float[Tensor, "16 D"]:
    """The embeddings after `steps` steps, begun as those of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    embed = model.module.get_input_embeddings()
    words = torch.randint(embed.weight.shape[0], (LENGTH,), generator=generator)
    soft = embed(words.to(model.device)).detach().float().requires_grad_()
    optimiser = torch.optim.AdamW([soft], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        picked = torch.randperm(len(answers), generator=generator)[:BATCH].tolist()
        ids, labels = pad_answers([answers[i] for i in picked], model.device)
        with insert_prompt(model, soft):
            loss = answer_nll(model, ids, labels).mean()
        # grad, not backward: the parameters of the model get none
        (soft.grad,) = torch.autograd.grad(loss, [soft])
        optimiser.step()
    return soft.detach()


@contextmanager
def insert_prompt(model: PromptedSubject, soft: Float[Tensor, "16 D"]) -> Iterator[None]:
    """Run the block with the embeddings in the places of the placeholders, in their order."""

    def replaced(module: torch.nn.Module, args: tuple[Int[Tensor, "B T"]], read: Tensor) -> Tensor:
        at = args[0] == model.place
        number = (at.cumsum(dim=1) - 1).clamp(0, LENGTH - 1)
        return torch.where(at.unsqueeze(-1), soft[number].to(read), read)

    handle = model.module.get_input_embeddings().register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()
