"""The training loop: topics in turn, float32 master weights, a stop before anything is spoilt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from srmu.engine import distributed
from srmu.engine.losses import Mean
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.resume import Checkpoints, pack_memory, unpack_memory
from srmu.engine.rounding import Kind, Rounder
from srmu.engine.stopping import ADVICE, PUT_BACK, StopRules
from srmu.engine.topic import Batch, Padding, Topic, move_batch
from srmu.errors import DivergedError, SrmuError

LARGEST = 3e37  # AdamW multiplies in float32
FINISHED = "max_steps"  # the stop reason of a run that nothing stopped

Log = Callable[[int, dict[str, float | str]], None]
Schedule = Literal["constant", "linear", "cosine"]
Memory = Mapping[str, dict[str, Any]]  # what the losses carry from step to step, by name

KEPT_NUMBERS = ("kept_step", "first_loss", "recent")  # of the stop rules, in a checkpoint


class Terms(NamedTuple):
    """Losses to sum and minimise, and values to log, by name: means, or tensors if one process has the whole batch."""

    losses: Mapping[str, Mean | Tensor]
    logged: Mapping[str, Mean | Tensor]
    stop: str = ""  # why the training ends before this step

    @property
    def loss_values(self) -> dict[str, Tensor]:
        """The losses as tensors, where one process has the whole batch."""
        return divide_means(self.losses, shared=False)


NOWHERE = Checkpoints()

LossFunction = Callable[[Batch, Batch, int], Terms]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train: what stands under `train:` in a config.

    Options have the names of transformers' TrainingArguments where those exist.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    learning_rate: float | None = None  # None: the method's own
    schedule: Schedule | None = None  # linear, cosine: falls to 0 at max_steps; None: the method's own
    warmup_steps: int = 0  # over which the learning rate rises from 0, that of the first step
    max_steps: int = 150  # over all topics together
    batch_size: int = 4  # documents of each of forget and retain
    weight_decay: float = 0.0  # torch's AdamW would take 0.01; the public RMU code has none
    adam_epsilon: float = 1e-8
    # transformers: added to the root of v before its correction, as its former AdamW did; torch: after.
    adam_epsilon_form: Literal["torch", "transformers"] = "torch"
    max_grad_norm: float | None = None
    shuffle: bool = True
    padding: Padding = "mask"  # count: left padding that the losses count, as the public code
    weights: Literal["fp32", "bf16"] = "fp32"  # bf16: no float32 masters, as the public code
    quantise_aware: Kind | None = None  # steps see the trained matrices rounded so; they are saved as they are
    # Stop rules. None: no rule, but ln V for `forget_ceiling` where a loss has no lower bound.
    forget_ceiling: float | None = None  # nats of a forget token at which to stop; .inf: never
    kl_budget: float | None = None  # nats of KL(before || after) per retain token, at most
    retain_spike: float | None = 1000.0  # times its recent median, above which it has diverged
    check_every: int = 5  # steps between two checks of these rules
    checkpoint_seconds: float = 60.0  # between two checkpoints, from which a killed run resumes

    def __post_init__(self) -> None:
        steps = self.max_steps
        positive = ("learning_rate", "max_steps", "batch_size", "adam_epsilon", "check_every")
        if self.quantise_aware and self.weights == "bf16":
            raise SrmuError("train.quantise_aware needs float32 masters: leave out train.weights=bf16")
        for names, holds, condition in (
            (positive, lambda value: 0 < value <= LARGEST, f"above 0 and at most {LARGEST:g}"),
            (("weight_decay",), lambda value: 0 <= value <= LARGEST, f"at least 0 and at most {LARGEST:g}"),
            (("max_grad_norm", "forget_ceiling", "kl_budget"), lambda value: value > 0, "above 0, or null"),
            (("retain_spike",), lambda value: value > 1, "above 1, or null for no such stop"),
            (("checkpoint_seconds",), lambda value: value >= 0, "at least 0, or .inf for none"),
            (("warmup_steps",), lambda value: 0 <= value < steps, f"at least 0 and below train.max_steps={steps}"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise SrmuError(f"train.{name} must be {condition}, not {value:g}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, as transformers' schedules; the first step is 0."""
        assert self.learning_rate is not None
        rising = self.warmup_steps
        if step < rising:
            return self.learning_rate * step / rising
        done = (step - rising) / (self.max_steps - rising)
        shares = {"linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}
        return self.learning_rate * shares.get(self.schedule or "", 1.0)

    def epsilon(self, step: int, beta: float) -> float:
        """Adam's epsilon in a step, in torch's form; `beta` is that of its mean of squares v."""
        # eq: AdamW, m' / (sqrt(v / (1 - beta^t)) + eps) in torch, m' sqrt(1 - beta^t) / (sqrt(v) + eps) in transformers
        return self.adam_epsilon / (1.0 if self.adam_epsilon_form == "torch" else sqrt(1 - beta ** (step + 1)))


def fit_model(
    model: EditableModel,
    parts: Sequence[tuple[Topic, LossFunction]],
    options: TrainOptions,
    log: Log,
    extra: Sequence[nn.Parameter] = (),
    checkpoints: Checkpoints = NOWHERE,
    memory: Memory | None = None,
    *,
    spread: bool = False,
    endless: bool = False,
) -> str:
    """Optimise the trained tensors of `model`, and `extra`, taking topics in turn; returns why it ended.

    Raises DivergedError at the first loss or gradient that is not finite, with the model put back to the last weights
    whose loss was finite. Resumes from `checkpoints`, where `memory` is saved too. With `spread` each process reads its
    rows of a batch and divides by the counts of the whole. An `endless` loss has no lower bound.
    """
    topics = [topic for topic, _ in parts]
    rules = StopRules(model, topics, options, endless)
    spread = spread and distributed.get_size() > 1
    training = Training(rules, extra, memory or {}, spread)
    done = training.resume(checkpoints)
    try:
        reason = take_steps(training, parts, log, checkpoints, done)
    except DivergedError:
        copy_values(training.parameters, training.good)
        raise
    if training.rounder and not reason.startswith(PUT_BACK):  # earlier weights, which the masters have left behind
        training.write_weights()
    return reason


def take_steps(
    training: "Training", parts: Sequence[tuple[Topic, LossFunction]], log: Log, checkpoints: Checkpoints, done: int
) -> str:
    """Take the steps after those that are `done`; returns why it ended."""
    rules, options, model = training.rules, training.options, training.rules.model
    streams = [topic.pairs() for topic, _ in parts]
    place = "the start"
    for step in range(options.max_steps):
        pair = next(streams[step % len(parts)])
        if step < done:
            continue
        topic, loss = parts[step % len(parts)]
        place = f"step {step}, topic {topic.name}, batch {step // len(parts)}"
        own = map(distributed.take_rows, pair) if training.shared else pair
        forget, retain = (move_batch(batch, model.device) for batch in own)
        terms = loss(forget, retain, step)
        if terms.stop:
            return f"{terms.stop} (before step {step})"
        values = training.take_step(terms, step, topic.name, place)
        reason, measured = rules.check_step(step, place)
        row = {name: float(value) for name, value in values.items()}
        log(step, {"topic": topic.name, **row, **measured})
        if reason:
            return reason
        if checkpoints.folder is not None and distributed.agree_on(checkpoints.due()):
            state = training.state()
            if distributed.is_first():
                checkpoints.save(step + 1, *state)
    whole = all(distributed.local_part(p).isfinite().all() for p in training.parameters)
    if not all(distributed.gather_values(whole)):
        raise DivergedError(f"the weights are not finite after {place}; {ADVICE}")
    return FINISHED


def divide_means(values: Mapping[str, Mean | Tensor], shared: bool) -> dict[str, Tensor]:
    """The values as tensors: each mean divided by its count, summed over the processes if they share the batch."""
    counts = [value.count for value in values.values() if isinstance(value, Mean)]
    if shared and counts:
        assert len(counts) == len(values), "what processes share has a count to divide by"
        counts = [*distributed.sum_values(torch.stack(counts))]
    rest = iter(counts)
    return {name: value.share(next(rest)) if isinstance(value, Mean) else value for name, value in values.items()}


class Training:
    """The state on which the remaining steps depend; the config gives the rest."""

    def __init__(self, rules: StopRules, extra: Sequence[nn.Parameter], memory: Memory, shared: bool) -> None:
        self.rules, self.memory = rules, memory
        self.shared = shared  # whether processes share each batch
        self.options = options = rules.options
        named = {**rules.model.trained, **{f"extra {i}": p for i, p in enumerate(extra)}}
        self.parameters = [*named.values()]
        self.rounder = Rounder(rules.model, options.quantise_aware) if options.quantise_aware else None
        apart = self.rounder is not None
        self.masters = [master_of(name, p, options.weights, apart) for name, p in named.items()]
        self.copies = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        self.good = [p.detach().clone() for p in self.parameters]  # the newest weights whose loss was finite
        # Sharded tensors and others lie in groups of their own: no operation may mix them.
        self.groups = [[m for m in self.masters if distributed.is_sharded(m) is kind] for kind in (True, False)]
        groups = [{"params": group} for group in self.groups if group]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=options.weight_decay)

    def take_step(self, terms: Terms, step: int, topic: str, place: str) -> dict[str, Tensor]:
        """Descend the sum of the losses; returns the step's values over all processes."""
        losses = divide_means(terms.losses, self.shared)
        total = torch.stack(list(losses.values())).sum()
        values = {"loss": total, **losses, **divide_means(terms.logged, self.shared)}
        values = {name: value.detach().float() for name, value in values.items()}
        if self.shared:
            parts = torch.stack([value.to(total.device) for value in values.values()])
            values = dict(zip(values, distributed.sum_values(parts), strict=True))
        losses = {name: values[name] for name in losses}
        if not values["loss"].isfinite():
            numbers = ", ".join(f"{name} {float(v):.3g}" for name, v in losses.items())
            raise DivergedError(f"the loss is not finite at {place} ({numbers}); {ADVICE}")
        if fault := self.rules.check_spike(topic, losses, float(values["loss"])):
            raise DivergedError(f"{fault} at {place}; {ADVICE}")
        copy_values(self.good, self.masters if self.rounder else self.parameters)
        norm = self.collect_gradients(total)
        if not norm.isfinite():
            raise DivergedError(f"the gradient is not finite at {place}; {ADVICE}")
        for group in self.optimiser.param_groups:
            if self.options.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(group["params"], self.options.max_grad_norm, norm)
            group["lr"], group["eps"] = self.options.rate(step), self.options.epsilon(step, group["betas"][1])
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.write_weights()
        if self.rounder:
            self.rounder.round_trained()
        return values | {"grad_norm": norm}

    def write_weights(self) -> None:
        for parameter, master in self.copies:
            parameter.data.copy_(master)

    def collect_gradients(self, total: Tensor) -> Tensor:
        """Backpropagate, and move the gradients to the masters; returns their joint norm."""
        if total.requires_grad:
            # FSDP averages the gradients of sharded tensors over processes, so the others are divided below.
            (total * distributed.get_size() if self.shared else total).backward()
        if all(parameter.grad is None for parameter in self.parameters):
            raise SrmuError("the loss reaches none of the trained tensors: wrong layer or window")
        for parameter, master in self.copies:
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.to(master.dtype), None
        groups = [[m.grad for m in group if m.grad is not None] for group in self.groups]
        for gradient in groups[1] if self.shared else ():
            gradient.copy_(distributed.sum_values(gradient) / distributed.get_size())
        norms = [distributed.gather_tensor(torch.nn.utils.get_total_norm(group)) for group in groups if group]
        return norms[0] if len(norms) == 1 else torch.stack(norms).norm()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that exist from the start, which `resume` fills in place."""
        masters = [master for _, master in self.copies]
        kinds = ("parameter", self.parameters), ("master", masters), ("good", self.good), ("kept", self.rules.kept)
        return {f"{name}/{i}": tensor for name, tensors in kinds for i, tensor in enumerate(tensors)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state as tensors and JSON values; every process must call this, the first gets it."""
        tensors = self.tensors()
        for i, master in enumerate(self.masters):
            tensors |= {f"optimiser/{i}/{key}": value for key, value in self.optimiser.state.get(master, {}).items()}
        numbers = {key: getattr(self.rules, key) for key in KEPT_NUMBERS} | {"memory": {}}
        for name, memory in self.memory.items():
            changing, numbers["memory"][name] = pack_memory(memory)
            tensors |= {f"memory/{name}/{key}": value for key, value in changing.items()}
        return {name: distributed.gather_to_first(tensor) for name, tensor in tensors.items()}, numbers

    def resume(self, checkpoints: Checkpoints) -> int:
        """Restore the newest checkpoint; returns the number of steps done."""
        if (newest := checkpoints.load()) is None:
            return 0
        done, tensors, numbers = newest

        def find(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

        for name, place in self.tensors().items():
            place.data.copy_(distributed.shard_like(tensors[name], place))
        for i, master in enumerate(self.masters):
            if entry := find(f"optimiser/{i}/"):
                like = {k: distributed.shard_like(v.to(master.device), master) for k, v in entry.items() if v.ndim}
                self.optimiser.state[master] = entry | like
        for key in KEPT_NUMBERS:
            setattr(self.rules, key, numbers[key])
        for name, memory in self.memory.items():
            unpack_memory(memory, find(f"memory/{name}/"), numbers["memory"][name])
        return done


def master_of(name: str, parameter: nn.Parameter, weights: str, apart: bool = False) -> nn.Parameter:
    """The tensor that the optimiser steps: the parameter, or a float32 copy, as bf16 loses small steps.

    `apart`: always a copy.
    """
    check_precision(name, parameter.dtype, weights)
    if not apart and (weights == "bf16" or parameter.dtype == torch.float32):
        return parameter
    return nn.Parameter(parameter.detach().float().clone())


def check_precision(name: str, dtype: torch.dtype, weights: str) -> None:
    if weights == "bf16" and dtype != torch.bfloat16:
        raise SrmuError(f"train.weights=bf16 needs a bf16 model, but {name} is {dtype}; set dtype=bfloat16")
