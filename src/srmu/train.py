"""The training loop: topics in turn, float32 master weights, a stop before anything is spoilt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from srmu.data import Padding, Topic
from srmu.errors import Diverged, UserError
from srmu.model import Batch, EditableModel

LARGEST = 3e37  # AdamW multiplies in float32

Log = Callable[[int, dict[str, float | str]], None]


class Terms(NamedTuple):
    """What a method returns for a step: losses that are summed and optimised, and what to log."""

    losses: dict[str, Tensor]
    logged: dict[str, Tensor]


LossFunction = Callable[[Batch, Batch, int], Terms]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train; the names are those of transformers' TrainingArguments where it has them."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    learning_rate: float = 5e-5
    max_steps: int = 150  # over all topics together
    batch_size: int = 4  # documents of each of forget and retain
    weight_decay: float = 0.0  # torch's AdamW would take 0.01; the public RMU code has none
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = None
    shuffle: bool = True
    padding: Padding = "mask"  # count: left padding that the losses count, as the public code
    weights: Literal["fp32", "bf16"] = "fp32"  # bf16: no float32 masters, as the public code

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_steps", "batch_size", "adam_epsilon"):
            if not 0 < getattr(self, name) <= LARGEST:
                raise UserError(f"train.{name} must be above 0 and at most {LARGEST:g}")
        if not 0 <= self.weight_decay <= LARGEST:
            raise UserError(f"train.weight_decay must be at least 0 and at most {LARGEST:g}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError("train.max_grad_norm must be above 0, or null for no clipping")


def fit(
    model: EditableModel,
    parts: Sequence[tuple[Topic, LossFunction]],
    options: TrainOptions,
    log: Log,
) -> None:
    """Optimise the trained tensors of `model` for `max_steps` steps, topics alternating by step.

    Raises Diverged at the first non-finite loss or gradient, with the model put back to the last
    weights whose loss was finite.
    """
    names, parameters = zip(*model.trained.items(), strict=True)
    masters = [
        master_of(name, p, options.weights) for name, p in zip(names, parameters, strict=True)
    ]
    optimiser = torch.optim.AdamW(
        masters,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        eps=options.adam_epsilon,
    )
    streams = [topic.pairs() for topic, _ in parts]
    good = [p.detach().clone() for p in parameters]
    for step in range(options.max_steps):
        topic, loss = parts[step % len(parts)]
        batches = [to(batch, model.device) for batch in next(streams[step % len(parts)])]
        terms = loss(batches[0], batches[1], step)
        total = torch.stack(list(terms.losses.values())).sum()
        place = f"step {step}, topic {topic.name}, batch {step // len(parts)}"
        if not total.isfinite():
            restore(parameters, good)
            raise Diverged(f"the loss is not finite at {place} ({numbers(terms.losses)}); {ADVICE}")
        if total.requires_grad:
            total.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            if parameter.grad is None:
                raise UserError(
                    "the loss reaches none of the trained tensors: wrong layer or window"
                )
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.to(master.dtype), None
        norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        if not norm.isfinite():
            raise Diverged(f"the gradient is not finite at {place}; {ADVICE}")
        if options.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(masters, options.max_grad_norm, norm)
        restore(good, parameters)  # their loss was finite
        optimiser.step()
        optimiser.zero_grad()
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter:
                parameter.data.copy_(master)
        values = {"loss": total, **terms.losses, **terms.logged, "grad_norm": norm}
        log(step, {"topic": topic.name} | {k: float(v.detach()) for k, v in values.items()})
    if not all(p.isfinite().all() for p in parameters):
        restore(parameters, good)
        raise Diverged(f"the weights are not finite after {place}; {ADVICE}")


ADVICE = "lower train.learning_rate or the strength (method.kappa or method.coeff)"


def master_of(name: str, parameter: torch.nn.Parameter, weights: str) -> torch.nn.Parameter:
    """The tensor that the optimiser steps: the parameter itself, or a float32 copy of it.

    A step of 5e-5 on a bf16 weight near 0.02 rounds to nothing; the float32 copy keeps it.
    """
    check_precision(name, parameter.dtype, weights)
    if weights == "bf16" or parameter.dtype == torch.float32:
        return parameter
    return torch.nn.Parameter(parameter.detach().float().clone())


def check_precision(name: str, dtype: torch.dtype, weights: str) -> None:
    """UserError where the trained weights cannot be stepped as they are."""
    if weights == "bf16" and dtype != torch.bfloat16:
        raise UserError(
            f"train.weights=bf16 needs a bf16 model, but {name} is {dtype}; set dtype=bfloat16"
        )


def restore(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors that are there."""
    for place, value in zip(places, values, strict=True):
        place.data.copy_(value)


def to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def numbers(values: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in values.items())
