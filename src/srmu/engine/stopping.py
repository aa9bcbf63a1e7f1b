"""What ends a training early: stop rules, and a retain loss that runs away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srmu.engine.batch import Batch, move_batch
from srmu.engine.losses import is_predicted, token_kl, token_nll
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.topic import Topic
from srmu.errors import DivergedError

if TYPE_CHECKING:
    from srmu.engine.train import TrainOptions

ADVICE = "lower train.learning_rate or the strength (method.kappa or method.coeff)"
CHECKED_BATCHES = 4  # of each role and topic, on which the stop rules are checked
RECENT = 10  # steps of a topic, whose median is its usual retain loss


class StopRules:
    """The stop rules, checked every few steps on the first batches of each topic.

    An `endless` loss has no lower bound: unless `train.forget_ceiling` is set, training stops when
    a forget token costs as much as a guess among all tokens. When the utility floor or the KL
    budget is broken, the model goes back to the weights of the last check that passed.
    """

    def __init__(self, model: EditableModel, topics: Sequence[Topic], options: TrainOptions, endless: bool) -> None:
        self.model, self.options = model, options
        self.ceiling = options.forget_ceiling
        if endless and self.ceiling is None:
            self.ceiling = math.log(model.vocabulary_size)
        self.restores = options.utility_floor is not None or options.kl_budget is not None
        self.active = self.restores or self.ceiling is not None
        checked = CHECKED_BATCHES if self.active else 0
        self.forget, self.retain = (
            [move_batch(b, model.device) for t in topics for b in getattr(t, role)[:checked]]
            for role in ("forget", "retain")
        )
        self.kept, self.kept_step = self.copy_weights(), -1

    def copy_weights(self) -> list[Tensor]:
        """A copy of the weights, where a rule may restore them."""
        return [p.detach().clone() for p in self.model.trained.values()] if self.restores else []

    @torch.no_grad()
    def check_step(self, step: int, place: str) -> tuple[str, dict[str, float]]:
        """Why to stop after this step ("" to go on), and what was measured.

        Raises DivergedError, naming the place, if a measurement is not a number.
        """
        last = step == self.options.max_steps - 1
        if not self.active or ((step + 1) % self.options.check_every and not last):
            return "", {}
        measured: dict[str, float] = {}
        reason = self.check_ceiling(step, measured) or self.check_retain(step, measured)
        if any(map(math.isnan, measured.values())):
            raise DivergedError(f"what the stop rules measure is not a number after {place}; {ADVICE}")
        return reason, measured

    def check_ceiling(self, step: int, measured: dict[str, float]) -> str:
        """The reason to stop if a forget token costs too many nats; adds the cost to `measured`."""
        if self.ceiling is None:
            return ""
        measured["forget_nll"] = nll = self.average(self.forget, self.nll)
        if nll < self.ceiling:
            return ""
        return (
            f"forget_ceiling: {nll:.3g} nats a forget token after step {step} (train.forget_ceiling={self.ceiling:.3g})"
        )

    def check_retain(self, step: int, measured: dict[str, float]) -> str:
        """The reason to stop if retain texts have suffered; adds utility and KL to `measured`."""
        if not self.restores:
            return ""
        with self.model.frozen():
            before = self.average(self.retain, self.nll)
        measured["utility"] = math.exp(before - self.average(self.retain, self.nll))
        measured["kl"] = self.average(self.retain, self.divergence)
        floor, budget = self.options.utility_floor, self.options.kl_budget
        for rule, bound, name, broken in (
            ("utility_floor", floor, "utility", measured["utility"] < (floor or 0)),
            ("kl_budget", budget, "kl", measured["kl"] > (budget or math.inf)),
        ):
            if broken:
                copy_values([*self.model.trained.values()], self.kept)
                kept = f"step {self.kept_step}" if self.kept_step >= 0 else "the start"
                return (
                    f"{rule}: {name} {measured[name]:.3g} after step {step} "
                    f"(train.{rule}={bound:g}); put back to {kept}"
                )
        self.kept, self.kept_step = self.copy_weights(), step
        return ""

    def nll(self, batch: Batch) -> Tensor:
        return token_nll(self.model.logits(batch), batch["labels"])

    def divergence(self, batch: Batch) -> Tensor:
        with self.model.frozen():
            before = self.model.logits(batch)
        return token_kl(before, self.model.logits(batch)) * is_predicted(batch["labels"])

    def average(self, batches: Sequence[Batch], function: Callable[[Batch], Tensor]) -> float:
        """Mean over the counted tokens of all the batches."""
        total = sum(float(function(batch).sum()) for batch in batches)
        return total / sum(int(is_predicted(batch["labels"]).sum()) for batch in batches)


class RetainWatch:
    """Tells a retain loss that runs away from one that merely rises.

    It has run away when it is `times` its median over the last steps of its topic and above the
    whole loss of the first step: a retain loss begins at 0, and many times nothing is still little.
    """

    def __init__(self, times: float | None) -> None:
        self.times = times
        self.first: float | None = None
        self.recent: dict[str, list[float]] = {}  # by topic

    def check_step(self, topic: str, losses: Mapping[str, Tensor], total: float) -> str:
        """What is wrong with the losses of a step; "" for nothing."""
        if self.times is None or "retain" not in losses:
            return ""
        if self.first is None:
            self.first = abs(total)
        recent = self.recent.setdefault(topic, [])
        retain = float(losses["retain"])
        usual = median(recent) if len(recent) == RECENT else math.inf
        if retain > max(self.times * usual, self.first):
            times = f"over {self.times:g} times its usual {usual:.3g}"
            return f"the retain loss is {retain:.3g}, {times},"
        recent.append(retain)
        del recent[:-RECENT]
        return ""
