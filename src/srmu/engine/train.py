"""The training loop: topics in turn, float32 master weights, a stop before anything is spoilt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from srmu.engine import distributed
from srmu.engine.losses import is_predicted, token_kl, token_nll
from srmu.engine.model import Batch, EditableModel
from srmu.engine.resume import Checkpoints, pack_memory, unpack_memory
from srmu.engine.topic import Padding, Topic
from srmu.errors import DivergedError, SrmuError

LARGEST = 3e37  # AdamW multiplies in float32
FINISHED = "max_steps"  # the stop reason of a run that nothing stopped
RECENT = 10  # steps of a topic that its usual retain loss is the median of
CHECKED_BATCHES = 4  # of each role and topic, on which the stop rules are measured

Log = Callable[[int, dict[str, float | str]], None]
Schedule = Literal["constant", "linear"]


class Terms(NamedTuple):
    """What a method returns for a step: losses that are summed and optimised, and what to log.

    With a `stop`, which says why, the training ends before the step is taken.
    """

    losses: dict[str, Tensor]
    logged: dict[str, Tensor]
    stop: str = ""


NOWHERE = Checkpoints()
NOTHING: Mapping[str, dict[str, Any]] = {}

LossFunction = Callable[[Batch, Batch, int], Terms]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train; the names are those of transformers' TrainingArguments where it has them."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    learning_rate: float | None = None  # None: the method's own
    schedule: Schedule | None = None  # linear: falls to 0 at max_steps; None: the method's own
    warmup_steps: int = 0  # over which the learning rate rises from 0
    max_steps: int = 150  # over all topics together
    batch_size: int = 4  # documents of each of forget and retain
    weight_decay: float = 0.0  # torch's AdamW would take 0.01; the public RMU code has none
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = None
    shuffle: bool = True
    padding: Padding = "mask"  # count: left padding that the losses count, as the public code
    weights: Literal["fp32", "bf16"] = "fp32"  # bf16: no float32 masters, as the public code
    # Stop rules. None: none, but ln V for `forget_ceiling` where a loss has no lower bound.
    forget_ceiling: float | None = None  # stop when a forget token costs as many nats; .inf: never
    utility_floor: float | None = None  # least likelihood of a retain token, as a share of before
    kl_budget: float | None = None  # most nats of KL(before || after) a retain token
    retain_spike: float | None = 1000.0  # times its recent median, above which it has diverged
    check_every: int = 5  # steps between two measurements of these
    checkpoint_seconds: float = 60.0  # between two checkpoints, from which a killed run goes on

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_steps", "batch_size", "adam_epsilon", "check_every"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= LARGEST:
                raise SrmuError(f"train.{name} must be above 0 and at most {LARGEST:g}")
        if not 0 <= self.warmup_steps < self.max_steps:
            raise SrmuError(
                f"train.warmup_steps={self.warmup_steps} must be at least 0 and below "
                f"train.max_steps={self.max_steps}"
            )
        if not 0 <= self.weight_decay <= LARGEST:
            raise SrmuError(f"train.weight_decay must be at least 0 and at most {LARGEST:g}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise SrmuError("train.max_grad_norm must be above 0, or null for no clipping")
        for name in ("forget_ceiling", "kl_budget"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise SrmuError(f"train.{name} must be above 0 nats, or null")
        if self.utility_floor is not None and not 0 < self.utility_floor <= 1:
            raise SrmuError("train.utility_floor must be above 0 and at most 1, or null")
        if self.retain_spike is not None and not self.retain_spike > 1:
            raise SrmuError("train.retain_spike must be above 1, or null for no such stop")
        if not self.checkpoint_seconds >= 0:
            raise SrmuError("train.checkpoint_seconds must be at least 0; .inf: no checkpoints")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        assert self.learning_rate is not None
        rising = self.warmup_steps
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.schedule == "linear":
            return self.learning_rate * (1 - (step - rising) / (self.max_steps - rising))
        return self.learning_rate

    def first_rule(self) -> str | None:
        """The name of a stop rule that is set, if there is one."""
        rules = ("forget_ceiling", "utility_floor", "kl_budget")
        return next((name for name in rules if getattr(self, name) is not None), None)


def fit_model(
    model: EditableModel,
    parts: Sequence[tuple[Topic, LossFunction]],
    options: TrainOptions,
    log: Log,
    extra: Sequence[nn.Parameter] = (),
    checkpoints: Checkpoints = NOWHERE,
    memory: Mapping[str, dict[str, Any]] = NOTHING,
    *,
    spread: bool = False,
) -> str:
    """Optimise the trained tensors of `model`, and `extra`, topics alternating by step.

    Returns why it ended: FINISHED after `max_steps` steps, the stop rule that held, or what the
    loss itself says. Raises DivergedError at the first non-finite loss or gradient, with the model
    put back to the last weights whose loss was finite. Goes on from the newest of `checkpoints`;
    `memory` is what the losses hand from step to step, by a name for each, and is kept there too.
    With `spread` each process reads its rows of a batch, and the losses are shares of the whole.
    """
    assert options.learning_rate is not None, "Method.training fills it in"
    names = [*model.trained, *(f"extra {i}" for i in range(len(extra)))]
    parameters = [*model.trained.values(), *extra]
    masters = [
        master_of(name, p, options.weights) for name, p in zip(names, parameters, strict=True)
    ]
    optimiser = torch.optim.AdamW(
        group_by_layout(masters),
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        eps=options.adam_epsilon,
    )
    spread = spread and distributed.get_size() > 1
    streams = [topic.pairs() for topic, _ in parts]
    limits = Limits(model, [topic for topic, _ in parts], options)
    good = [p.detach().clone() for p in parameters]
    spikes = Spikes(options.retain_spike)
    training = Training(parameters, masters, good, optimiser, limits, memory, spikes)
    done = training.resume(checkpoints)
    for step in range(options.max_steps):
        topic, loss = parts[step % len(parts)]
        if step < done:
            next(streams[step % len(parts)])
            continue
        pair = next(streams[step % len(parts)])
        batches = [
            move_batch(distributed.take_rows(b) if spread else b, model.device) for b in pair
        ]
        with distributed.spread_rows(spread):
            terms = loss(batches[0], batches[1], step)
            if terms.stop:
                return f"{terms.stop} (before step {step})"
            total = torch.stack(list(terms.losses.values())).sum()
            losses = sum_over_ranks(terms.losses)
            values = {
                "loss": distributed.total_spread(total.detach()),
                **losses,
                **sum_over_ranks(terms.logged),
            }
        place = f"step {step}, topic {topic.name}, batch {step // len(parts)}"
        if not values["loss"].isfinite():
            copy_values(parameters, good)
            raise DivergedError(
                f"the loss is not finite at {place} ({format_numbers(losses)}); {ADVICE}"
            )
        if spike := spikes.after(topic.name, losses, float(values["loss"])):
            copy_values(parameters, good)
            raise DivergedError(f"{spike} at {place}; {ADVICE}")
        if total.requires_grad:
            # of sharded tensors FSDP takes the processes' mean
            (total * distributed.get_size() if spread else total).backward()
        if all(parameter.grad is None for parameter in parameters):
            raise SrmuError("the loss reaches none of the trained tensors: wrong layer or window")
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.to(master.dtype), None
        if spread:
            distributed.sum_gradients(masters)
        norm = distributed.joint_norm([m.grad for m in masters if m.grad is not None])
        if not norm.isfinite():
            raise DivergedError(f"the gradient is not finite at {place}; {ADVICE}")
        if options.max_grad_norm is not None:
            for part in group_by_layout(masters):
                torch.nn.utils.clip_grads_with_norm_(part["params"], options.max_grad_norm, norm)
        copy_values(good, parameters)  # their loss was finite
        for group in optimiser.param_groups:
            group["lr"] = options.rate(step)
        optimiser.step()
        optimiser.zero_grad()
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter:
                parameter.data.copy_(master)
        values["grad_norm"] = norm
        reason, measured = limits.after(step)
        if any(map(math.isnan, measured.values())):
            copy_values(parameters, good)
            raise DivergedError(f"what the stop rules measure is no number after {place}; {ADVICE}")
        row = {k: float(v.detach()) for k, v in values.items()} | measured
        log(step, {"topic": topic.name} | row)
        if reason:
            return reason
        if checkpoints.folder is not None and distributed.agree_on(checkpoints.due()):
            state = training.state()
            if distributed.is_first():
                checkpoints.save(step + 1, *state)
    if not distributed.holds_everywhere(
        all(distributed.local_part(p).isfinite().all() for p in parameters)
    ):
        copy_values(parameters, good)
        raise DivergedError(f"the weights are not finite after {place}; {ADVICE}")
    return FINISHED


def sum_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of what the processes hold of each value, where they share the work."""
    place = next(iter(values.values())).device if values else None
    each = [value.detach().float().to(place) for value in values.values()]
    return dict(
        zip(values, distributed.total_spread(torch.stack(each)) if each else (), strict=True)
    )


def group_by_layout(masters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The tensors in groups, those that are sharded apart: products of both kinds do not mix."""
    parts = [[m for m in masters if distributed.is_sharded(m) is kind] for kind in (True, False)]
    return [{"params": part} for part in parts if part]


class Training(NamedTuple):
    """All that the rest of a training depends on, but for what is set up anew from the config."""

    parameters: list[nn.Parameter]
    masters: list[nn.Parameter]
    good: list[Tensor]  # the weights before the last step
    optimiser: torch.optim.Optimizer
    limits: Limits
    memory: Mapping[str, dict[str, Any]]
    spikes: Spikes

    def lists(self) -> dict[str, Sequence[Tensor]]:
        """The tensors that are there from the start, to be filled in place."""
        found: dict[str, Sequence[Tensor]] = {
            "parameter": self.parameters, "good": self.good, "kept": self.limits.kept,
        }  # fmt: skip
        if any(m is not p for m, p in zip(self.masters, self.parameters, strict=True)):
            found["master"] = self.masters
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """It as tensors and JSON values; all processes must ask, the first gets all of it."""
        tensors = {f"{k}/{i}": t for k, ts in self.lists().items() for i, t in enumerate(ts)}
        for i, master in enumerate(self.masters):
            entry = self.optimiser.state.get(master, {})
            tensors |= {f"optimiser/{i}/{key}": value for key, value in entry.items()}
        numbers: dict[str, Any] = {"kept_step": self.limits.kept_step, "memory": {}}
        numbers["spikes"] = {"first": self.spikes.first, "recent": self.spikes.recent}
        for name, memory in self.memory.items():
            changing, numbers["memory"][name] = pack_memory(memory)
            tensors |= {f"memory/{name}/{key}": value for key, value in changing.items()}
        return {
            name: distributed.gather_to_first(tensor) for name, tensor in tensors.items()
        }, numbers

    def resume(self, checkpoints: Checkpoints) -> int:
        """Put back what the newest checkpoint holds; how many steps are done."""
        if (found := checkpoints.load()) is None:
            return 0
        done, tensors, numbers = found
        for key, places in self.lists().items():
            kept = [tensors[f"{key}/{i}"] for i in range(len(places))]
            copy_values(places, [*map(distributed.shard_like, kept, places)])
        under = partial(with_prefix, tensors)
        order = [m for part in self.optimiser.param_groups for m in part["params"]]
        state = {}
        for i, master in enumerate(order):
            number = next(j for j, m in enumerate(self.masters) if m is master)
            entry = under(f"optimiser/{number}/")
            like = {k: distributed.shard_like(v, master) for k, v in entry.items() if v.ndim}
            if entry:
                state[i] = entry | like
        whole = self.optimiser.state_dict()
        self.optimiser.load_state_dict(whole | {"state": state})
        self.limits.kept_step = numbers["kept_step"]
        self.spikes.first, self.spikes.recent = (numbers["spikes"][k] for k in ("first", "recent"))
        for name, memory in self.memory.items():
            unpack_memory(memory, under(f"memory/{name}/"), numbers["memory"][name])
        return done


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start so, by the rest of their names."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


class Spikes:
    """Tells a retain loss that runs away from one that rises.

    It has run away when it is `times` its median over the last steps of its topic, and above the
    whole loss that the run began with: a retain loss begins at 0, and many times nothing is little.
    """

    def __init__(self, times: float | None) -> None:
        self.times = times
        self.first: float | None = None
        self.recent: dict[str, list[float]] = {}  # by topic

    def after(self, topic: str, losses: Mapping[str, Tensor], total: float) -> str:
        """What is wrong with a step's losses; "" for nothing."""
        if self.times is None or "retain" not in losses:
            return ""
        if self.first is None:
            self.first = abs(total)
        recent = self.recent.setdefault(topic, [])
        retain = float(losses["retain"].detach())
        usual = median(recent) if len(recent) == RECENT else math.inf
        if retain > max(self.times * usual, self.first):
            times = f"over {self.times:g} times its usual {usual:.3g}"
            return f"the retain loss is {retain:.3g}, {times},"
        recent.append(retain)
        del recent[:-RECENT]
        return ""


class Limits:
    """The stop rules, measured every few steps on the first batches of each topic.

    Where the utility floor or the KL budget is broken, the model goes back to the weights of the
    last measurement that kept them.
    """

    def __init__(
        self, model: EditableModel, topics: Sequence[Topic], options: TrainOptions
    ) -> None:
        self.model, self.options = model, options
        checked = CHECKED_BATCHES if options.first_rule() else 0
        self.forget = [move_batch(b, model.device) for t in topics for b in t.forget[:checked]]
        self.retain = [move_batch(b, model.device) for t in topics for b in t.retain[:checked]]
        self.keeps = options.utility_floor is not None or options.kl_budget is not None
        self.kept, self.kept_step = self.copies(), -1

    def copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.trained.values()] if self.keeps else []

    @torch.no_grad()
    def after(self, step: int) -> tuple[str, dict[str, float]]:
        """Why to stop after this step ("" to go on), and what was measured."""
        options = self.options
        last = step == options.max_steps - 1
        if options.first_rule() is None or ((step + 1) % options.check_every and not last):
            return "", {}
        found: dict[str, float] = {}
        if options.forget_ceiling is not None:
            found["forget_nll"] = self.mean(self.forget, self.nll)
            if not found["forget_nll"] < options.forget_ceiling:
                return (
                    f"forget_ceiling: {found['forget_nll']:.3g} nats a forget token after step "
                    f"{step} (train.forget_ceiling={options.forget_ceiling:.3g})",
                    found,
                )
        if self.keeps:
            with self.model.frozen():
                before = self.mean(self.retain, self.nll)
            found["utility"] = math.exp(before - self.mean(self.retain, self.nll))
            found["kl"] = self.mean(self.retain, self.divergence)
            for rule, broken, value in (
                ("utility_floor", found["utility"] < (options.utility_floor or 0), "utility"),
                ("kl_budget", found["kl"] > (options.kl_budget or math.inf), "kl"),
            ):
                if broken:
                    copy_values([*self.model.trained.values()], self.kept)
                    kept = f"step {self.kept_step}" if self.kept_step >= 0 else "the start"
                    return (
                        f"{rule}: {value} {found[value]:.3g} after step {step} "
                        f"(train.{rule}={getattr(options, rule):g}); put back to {kept}",
                        found,
                    )
            self.kept, self.kept_step = self.copies(), step
        return "", found

    def nll(self, batch: Batch) -> Tensor:
        return token_nll(self.model.logits(batch), batch["labels"])

    def divergence(self, batch: Batch) -> Tensor:
        with self.model.frozen():
            before = self.model.logits(batch)
        return token_kl(before, self.model.logits(batch)) * is_predicted(batch["labels"])

    def mean(self, batches: Sequence[Batch], function: Callable[[Batch], Tensor]) -> float:
        """Mean over the counted tokens of all the batches."""
        total = sum(float(function(batch).sum()) for batch in batches)
        return total / sum(int(is_predicted(batch["labels"]).sum()) for batch in batches)


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
    """SrmuError where the trained weights cannot be stepped as they are."""
    if weights == "bf16" and dtype != torch.bfloat16:
        raise SrmuError(
            f"train.weights=bf16 needs a bf16 model, but {name} is {dtype}; set dtype=bfloat16"
        )


def copy_values(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors that are there."""
    for place, value in zip(places, values, strict=True):
        place.data.copy_(value)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def format_numbers(values: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in values.items())
