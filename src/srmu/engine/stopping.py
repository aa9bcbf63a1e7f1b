"""What ends a training early: stop rules, and a retain loss that runs away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srmu.engine.losses import Mean, average_means, mean_kl, mean_nll
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.topic import Batch, Topic, move_batch
from srmu.errors import DivergedError

if TYPE_CHECKING:
    from srmu.engine.train import TrainOptions

PUT_BACK = "kl_budget"  # begins the reason of a stop that puts earlier weights back
ADVICE = "lower train.learning_rate or the strength (method.kappa or method.coeff)"
CHECKED_BATCHES = 4  # of each role and topic, on which stop rules are checked and the effect is measured
RECENT = 10  # steps of a topic, whose median is its usual retain loss


class StopRules:
    """The stop rules, checked every few steps on the first batches of each topic.

    An `endless` loss stops, unless `train.forget_ceiling` is set, when a forget token costs as much as a guess among
    all tokens. A broken KL budget puts the model back to the weights of the last check that passed.
    """

    def __init__(self, model: EditableModel, topics: Sequence[Topic], options: TrainOptions, endless: bool) -> None:
        self.model, self.options = model, options
        self.ceiling = options.forget_ceiling
        if endless and self.ceiling is None:
            self.ceiling = math.log(model.vocabulary_size)
        checked = 0 if self.ceiling is None and options.kl_budget is None else CHECKED_BATCHES
        self.forget, self.retain = (
            [move_batch(b, model.device) for t in topics for b in getattr(t, role)[:checked]]
            for role in ("forget", "retain")
        )
        self.kept, self.kept_step = self.copy_weights(), -1
        self.first_loss: float | None = None
        self.recent: dict[str, list[float]] = {}  # retain losses, by topic

    def copy_weights(self) -> list[Tensor]:
        wanted = self.options.kl_budget is not None
        return [p.detach().clone() for p in self.model.trained.values()] if wanted else []

    @torch.no_grad()
    def check_step(self, step: int, place: str) -> tuple[str, dict[str, float]]:
        """Why to stop after this step ("" to go on), and what was measured; DivergedError if that is not a number."""
        options = self.options
        if (step + 1) % options.check_every and step != options.max_steps - 1:
            return "", {}
        measured = {}  # nats of a forget token, KL of a retain token
        if self.ceiling is not None:
            measured["forget_nll"] = average_means([*map(self.nll, self.forget)])
        if options.kl_budget is not None:
            measured["kl"] = average_means([*map(self.kl, self.retain)])
        if any(map(math.isnan, measured.values())):
            raise DivergedError(f"what the stop rules measure is not a number after {place}; {ADVICE}")
        nll = measured.get("forget_nll", 0.0)
        if self.ceiling is not None and nll >= self.ceiling:
            bound = f"train.forget_ceiling={self.ceiling:.3g}"
            return f"forget_ceiling: {nll:.3g} nats a forget token after step {step} ({bound})", measured
        if options.kl_budget is not None and measured["kl"] > options.kl_budget:
            copy_values([*self.model.trained.values()], self.kept)
            kept = f"step {self.kept_step}" if self.kept_step >= 0 else "the start"
            found = f"kl {measured['kl']:.3g} after step {step} (train.kl_budget={options.kl_budget:g})"
            return f"{PUT_BACK}: {found}; put back to {kept}", measured
        self.kept, self.kept_step = self.copy_weights(), step
        return "", measured

    def nll(self, batch: Batch) -> Mean:
        return mean_nll(self.model.logits(batch), batch["labels"])

    def kl(self, batch: Batch) -> Mean:
        with self.model.frozen():
            before = self.model.logits(batch)
        return mean_kl(before, self.model.logits(batch), batch["labels"])

    def check_spike(self, topic: str, losses: Mapping[str, Tensor], total: float) -> str:
        """Why the retain loss of a step has run away, or "": it is many times its median over a topic's last steps."""
        times = self.options.retain_spike
        if times is None or "retain" not in losses:
            return ""
        if self.first_loss is None:
            self.first_loss = abs(total)  # to be exceeded too, as a retain loss begins at 0
        recent = self.recent.setdefault(topic, [])
        retain = float(losses["retain"])
        usual = median(recent) if len(recent) == RECENT else math.inf
        if retain > max(times * usual, self.first_loss):
            return f"the retain loss is {retain:.3g}, over {times:g} times its usual {usual:.3g},"
        recent.append(retain)
        del recent[:-RECENT]
        return ""
