"""Plain fine-tuning, as an attacker would do it: until the last step, or until it breaks."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from srmu.engine.generate import Ids, join_responses
from srmu.engine.losses import mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.topic import move_batch
from srmu.engine.train import master_of

WARMUP = 0.05  # share of the steps in which the learning rate rises

Row = tuple[Ids, Ids]  # what is read first, and the tokens whose likelihood is raised


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
    after: Callable[[int], bool | None] | None = None,
) -> int:
    """Raise the likelihood of the rows, dealt anew each epoch, without decay and clipping; the steps taken."""
    pairs = [(p, master_of(name, p, "fp32")) for name, p in model.trained.items()]
    masters = [master for _, master in pairs]
    stepper: torch.optim.Optimizer = torch.optim.SGD(masters, lr=learning_rate, momentum=0.9)
    if optimiser == "adamw":
        stepper = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0, fused=True)
    dealer = torch.Generator().manual_seed(seed)
    order: list[int] = []

    def loss() -> Tensor:
        nonlocal order
        order = order or torch.randperm(len(rows), generator=dealer).tolist()
        dealt, order = order[:batch_size], order[batch_size:]
        batch = move_batch(join_responses(*zip(*(rows[i] for i in dealt), strict=True)), model.device)
        return mean_nll(model.logits(batch), batch["labels"]).value

    def rate(done: int) -> float:
        return learning_rate * rate_factor(done, steps, schedule)

    return descend(pairs, stepper, loss, steps, rate=rate, after=after)


def descend(
    pairs: Sequence[tuple[Tensor, Tensor]],
    optimiser: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    steps: int,
    *,
    rate: Callable[[int], float] | None = None,
    after: Callable[[int], bool | None] | None = None,
) -> int:
    """Step tensors down a loss that is made anew for each step; the number of steps taken.

    `pairs` are tensors and what the optimiser steps: the tensor itself, or a float32 copy of it. Nothing else gets a
    gradient. `rate` and `after` take the number of steps done. Ends early where the loss or its gradient is not finite,
    or where `after` says True.
    """
    tensors = [tensor for tensor, _ in pairs]
    copies = [(tensor, master) for tensor, master in pairs if master is not tensor]
    for step in range(steps):
        if rate is not None:
            for group in optimiser.param_groups:
                group["lr"] = rate(step)
        value = loss()
        value.backward(inputs=tensors)
        for tensor, master in copies:
            if tensor.grad is not None:
                master.grad, tensor.grad = tensor.grad.float(), None
        norm = torch.nn.utils.get_total_norm([m.grad for _, m in pairs if m.grad is not None])
        if not (value + norm).isfinite():
            return step
        optimiser.step()
        optimiser.zero_grad()
        for tensor, master in copies:
            tensor.data.copy_(master)
        if after is not None and after(step + 1):
            return step + 1
    return steps


def rate_factor(done: int, steps: int, schedule: str) -> float:
    """The share of the learning rate for the step after `done` ones: up, then level or down."""
    warm = WARMUP * steps
    falling = (steps - done) / (steps - warm) if schedule == "linear" else 1.0
    return min(1.0, (done + 1) / max(1.0, warm), falling)
