"""Fine-tuning as an attacker would: what the relearning attacks have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch

from srmu.attacks.base import Exam
from srmu.engine.generate import Ids, join_responses
from srmu.engine.losses import mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.train import master_of, move_batch
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts

LENGTH = 512  # tokens of a text that are read
WARMUP = 0.05  # share of the steps in which the learning rate rises
SMALL = 100_000_000  # parameters; a model with fewer bears higher learning rates
ALPHA = 16  # of LoRA
PARTS = 5  # of the validation facts, one is asked for and the rest are learned

Row = tuple[Ids, Ids]  # what is read first, and the tokens whose likelihood is raised


def text_rows(model: Subject, texts: Sequence[str]) -> list[Row]:
    """Texts as rows of which all tokens count."""
    ids = [model.tokens(text)[: min(LENGTH, model.max_length)] for text in texts]
    rows: list[Row] = [([], row) for row in ids if len(row) > 1]
    if not rows:
        raise NotApplicable("there are no neutral texts to fine-tune on; name some")
    return rows


def split_validation(exam: Exam, seed: int) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """The validation questions to learn from, and those on the fifth of its facts to ask."""
    known = list(dict.fromkeys(list_facts(exam.val)))
    assert not {*known} & {*list_facts(exam.test)}, "the halves of the exam share facts"
    if len(known) < PARTS:
        raise NotApplicable(f"it needs {PARTS} or more facts on the validation half")
    held = {*random.Random(seed).sample(known, len(known) // PARTS)}
    learned = tuple(q for q in exam.val if q.fact not in held)
    return learned, tuple(q for q in exam.val if q.fact in held)


@contextmanager
def prepare_learner(model: Subject, rank: int, seed: int) -> Iterator[EditableModel]:
    """The model to be tuned: all its weights, or LoRA of that rank beside its matrices."""
    with model.editable("*.linear" if rank else "*") as edited:
        rank = min(rank, *(side for p in edited.trained.values() for side in p.shape))
        with edited.adapted(rank, ALPHA, seed) if rank else nullcontext():
            yield edited


def tune_model(
    model: EditableModel,
    rows: Sequence[Row],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    optimiser: Literal["adamw", "sgd"] = "adamw",
    schedule: Literal["linear", "constant"] = "linear",
    after: Callable[[int], None] | None = None,
) -> int:
    """Raise the likelihood of the rows, dealt anew each epoch; the steps that were taken.

    They are fewer than `steps` where the loss or its gradient is no longer finite: the weights then
    are those of the last step. `after` is called with the number of each step that was taken. No
    weight decay and no clipping; SGD has a momentum of 0.9.
    """
    parameters = list(model.trained.values())
    masters = [master_of(name, p, "fp32") for name, p in model.trained.items()]
    stepper: torch.optim.Optimizer = (
        torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0, fused=True)
        if optimiser == "adamw"
        else torch.optim.SGD(masters, lr=learning_rate, momentum=0.9)
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        stepper, lambda done: rate_factor(done, steps, schedule)
    )
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for step in range(steps):
        waiting = waiting or torch.randperm(len(rows), generator=generator).tolist()
        drawn, waiting = waiting[:batch_size], waiting[batch_size:]
        batch = move_batch(
            join_responses(*zip(*(rows[i] for i in drawn), strict=True)), model.device
        )
        loss = mean_nll(model.logits(batch), batch["labels"]).value
        loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        if not (loss + norm).isfinite():
            return step
        stepper.step()
        stepper.zero_grad()
        rate.step()
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter:
                parameter.data.copy_(master)
        if after is not None:
            after(step + 1)
    return steps


def rate_factor(done: int, steps: int, schedule: str) -> float:
    """The share of the learning rate for the step after `done` ones: up, then level or down."""
    warm = WARMUP * steps
    rising = (done + 1) / max(1.0, warm)
    falling = (steps - done) / (steps - warm) if schedule == "linear" else 1.0
    return min(1.0, rising, falling)
