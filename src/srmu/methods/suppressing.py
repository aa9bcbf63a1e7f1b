"""Methods that harden or repeat the suppression of another method, or suppress at several layers."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch

from srmu.engine.train import TrainOptions, fit_model
from srmu.methods.base import Count, EditableModel, Needs, Objective, Rate, Share, State, Topic, Weight, scale_rate
from srmu.methods.graddiff import GradDiff
from srmu.methods.rmu import RMU
from srmu.methods.srmu import SRMU

TEACHER_RATE = 4e-3 * 640 / 14336  # what suits down-projections, by a search on the testbed
STEERS = Needs("first=srmu or rmu")


@dataclass(frozen=True, kw_only=True)
class Suppressing(Objective):
    """An objective that trains all weights after some steps of a first method, which a killed run takes again."""

    first: Literal["srmu", "rmu", "graddiff"] = "srmu"  # graddiff: with KL on retain texts
    layer: int | None = None  # of srmu and rmu
    kappa: Annotated[Weight, STEERS] = 16.0
    alpha: Weight = 100.0  # weight of the first method's retain loss
    gamma: Annotated[Weight, Needs("first=graddiff")] = 10.0  # weight of graddiff's ascent
    anchors: Literal["none", "random"] = "none"  # random: rows of random tokens to retain
    anchor_share: Annotated[Share, Needs("anchors=random")] = 0.5  # of each retain batch
    scope: Annotated[Literal["window", "all"], STEERS] = "window"  # tensors of the first method: its own, or all
    teacher_steps: Count = 80  # of the first method
    teacher_learning_rate: Rate | None = None  # of the first method; null: 4e-3 on the testbed, scaled by width

    @property
    def suppression(self) -> Objective:
        if self.first == "graddiff":
            return GradDiff(retain="kl", alpha=self.alpha, gamma=self.gamma)
        cls = SRMU if self.first == "srmu" else RMU
        return cls(layer=self.layer, kappa=self.kappa, alpha=self.alpha)

    def resolved(self, config: Any) -> Self:
        first = self.suppression.resolved(config)
        rate = scale_rate(TEACHER_RATE, config) if first.scales and self.scope == "window" else first.learning_rate
        return replace(
            self, layer=getattr(first, "layer", None), teacher_learning_rate=self.teacher_learning_rate or rate
        )

    def prepared(self, topic: Topic) -> Topic:
        return topic.add_anchors(self.anchor_share) if self.anchors == "random" else topic

    def reads(self, topic: Topic) -> int:
        return self.suppression.reads(topic) + 2 * self.teacher_steps

    def train_scope(self, model: EditableModel) -> AbstractContextManager[None]:
        """Train the tensors that the first method trains."""
        return model.only(self.suppression.trainable if self.scope == "window" else ("*",))

    def suppress(self, model: EditableModel, topic: Topic) -> State:
        """Take the steps of the first method from the present weights; returns its state."""
        first = self.suppression
        state = first.setup(model, topic)
        part = Suppressing.prepared(self, topic), partial(first.loss, model, state)
        options = TrainOptions(learning_rate=self.teacher_learning_rate, max_steps=self.teacher_steps)
        with self.train_scope(model):
            fit_model(model, [part], options, lambda *step: None, endless=first.endless)
        return state


def perturb_weights(model: EditableModel, generator: torch.Generator, noise: float, beta: float = 1.0) -> None:
    """Shrink all weights into noise that is `beta` times the size of fresh weights."""
    std = getattr(model.module.config, "initializer_range", 0.02)
    for parameter in model.trained.values():
        if parameter.ndim > 1:  # weights of norms start at 1, not at random
            fresh = std * torch.randn(parameter.shape, generator=generator)
            # eq: UNDO, theta = (1 - a) theta_T + a b N, N ~ fresh weights
            change = noise * beta * fresh.to(model.device)
            parameter.data.copy_((1 - noise) * parameter.data.float() + change)
