"""Misdirection at several layers at once."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from srmu.engine.train import divide_means
from srmu.methods.base import Batch, Count, EditableModel, Needs, Objective, Share, State, Terms, Topic, Weight
from srmu.methods.rmu import RMU
from srmu.methods.srmu import SRMU


@dataclass(frozen=True, kw_only=True)
class MultiSite(Objective):
    """Drives forget activations at several layers to a target each; retain activations stay."""

    name = "multi_site"
    level = "representation"
    scales = True
    uses = ("retain texts", "the original activations")

    target: Literal["srmu", "rmu"] = "srmu"  # the method whose targets are used
    layers: tuple[int, ...] = ()  # (): three, evenly spread, including the last
    window: Count = 3  # number of layers to update up to each
    kappa: Weight = 32.0  # norm of each target over mean norm of forget activations there
    alpha: Weight = 1200.0  # weight of the retain loss
    anchors: Literal["none", "random"] = "none"  # random: rows of random tokens to retain
    anchor_share: Annotated[Share, Needs("anchors=random")] = 0.5  # of each retain batch

    def part(self, layer: int) -> SRMU | RMU:
        """The method at one of the layers."""
        cls = SRMU if self.target == "srmu" else RMU
        window = max(1, min(self.window, layer + 1))
        return cls(layer=layer, window=window, kappa=self.kappa, alpha=self.alpha)

    @property
    def depth(self) -> int | None:
        return max(self.layers) + 1 if self.layers else None

    @property
    def trainable(self) -> tuple[str, ...]:
        named = {name for layer in self.layers for name in self.part(layer).trainable}
        return tuple(sorted(named)) or ("*.mlp_down",)

    def resolved(self, config: Any) -> Self:
        count = config.num_hidden_layers
        spread = {max(0, round(count * part / 3) - 1) for part in (1, 2, 3)}
        method = replace(self, layers=self.layers or tuple(sorted(spread)))
        for layer in method.layers:
            method.part(layer).resolved(config)
        return method

    def prepared(self, topic: Topic) -> Topic:
        return topic.add_anchors(self.anchor_share) if self.anchors == "random" else topic

    def reads(self, topic: Topic) -> int:
        return sum(self.part(layer).reads(topic) for layer in self.layers)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        parts = {layer: self.part(layer).setup(model, topic) for layer in self.layers}
        tensors = {f"{i}/{key}": t for i, part in parts.items() for key, t in part.tensors.items()}
        return State(tensors, {str(i): p.numbers for i, p in parts.items()}, {"parts": parts})

    def measure_effect(self, model: EditableModel, topic: Topic, state: State) -> dict[str, float]:
        parts = state.memory["parts"].items()
        rows = [self.part(layer).measure_effect(model, topic, part) for layer, part in parts]
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def average(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {key: torch.stack([row[key] for row in rows]).mean() for key in rows[0]}

        parts = state.memory["parts"].items()
        terms = [self.part(layer).loss(model, part, forget, retain, step) for layer, part in parts]
        # eq: multi-site, L = mean over layers of SRMU eq. 5
        logged = average([divide_means(each.logged, shared=False) for each in terms])
        return Terms(average([each.loss_values for each in terms]), logged)
