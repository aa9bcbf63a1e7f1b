"""SRMU: selective representation misdirection for unlearning (arXiv 2512.16297)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from srmu.data import Topic
from srmu.errors import UserError
from srmu.importance import Fusion, Statistic, describe, importance, measure
from srmu.methods.base import Misdirection, State
from srmu.model import Batch, EditableModel

Direction = Literal[
    "signs", "plus", "minus", "uniform", "unit_uniform", "gaussian", "resampled", "zero"
]


@dataclass(frozen=True, kw_only=True)
class SRMU(Misdirection):
    """Sends forget activations to c_map * V * I_norm: signs V, importance map I_norm."""

    name: ClassVar[str] = "srmu"
    paper: ClassVar[str] = "arXiv 2512.16297"

    importance: Fusion = "ratio"
    statistic: Statistic = "abs_mean"
    map_mode: Literal["static", "per_batch", "ema"] = "static"
    ema_decay: float = 0.9
    direction: Direction = "signs"
    shared_direction: bool = False  # one V for all topics
    target_mode: Literal["absolute", "additive"] = "absolute"  # additive: eq. 1, absolute: eq. 5
    lam: float = 1.0  # lambda of the difference map
    eps: float = 1e-6  # of the ratio and product maps
    clip_quantile: float = 1.0  # cut the map's outliers before the maximum normalises it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("ema_decay", self.map_mode == "ema", "map_mode=ema")
        self.needs("lam", self.importance == "difference", "importance=difference")
        self.needs("eps", self.importance not in ("difference", "uniform"), "a ratio or product")
        for option in ("map_mode", "statistic", "clip_quantile"):
            self.needs(option, self.importance != "uniform", "a map that is not uniform")
        if not 0 < self.clip_quantile <= 1 or not 0 <= self.ema_decay < 1 or self.eps <= 0:
            raise UserError("method: 0 < clip_quantile <= 1, 0 <= ema_decay < 1 and eps > 0")

    def draw(self, width: int, generator: torch.Generator) -> Tensor:
        """V, the direction (D,)."""
        if self.direction in ("plus", "minus"):
            return torch.full((width,), 1.0 if self.direction == "plus" else -1.0)
        if self.direction == "zero":
            return torch.zeros(width)
        if self.direction == "gaussian":
            return torch.randn(width, generator=generator)
        if self.direction in ("uniform", "unit_uniform"):
            draw = torch.rand(width, generator=generator)
            return draw / draw.norm() if self.direction == "unit_uniform" else draw
        return torch.randint(2, (width,), generator=generator) * 2.0 - 1.0

    def fuse(self, v_f: Tensor, v_r: Tensor, order: Tensor) -> Tensor:
        """I_norm (D,) from the two statistics."""
        return importance(
            v_f, v_r, self.importance, order=order, lam=self.lam, eps=self.eps,
            clip_quantile=self.clip_quantile,
        )  # fmt: skip

    def setup(self, model: EditableModel, topic: Topic) -> State:
        v_f, norm = measure(self.frozen_hidden(model, topic.forget), self.statistic)
        v_r, _ = measure(self.frozen_hidden(model, topic.retain), self.statistic)
        generator = topic.generator("direction", self.shared_direction)
        direction = self.draw(len(v_f), generator).to(model.device)
        order = torch.randperm(len(v_f), generator=topic.generator("shuffled map")).to(v_f.device)
        map_ = self.fuse(v_f, v_r, order)
        state = self.state(direction * map_, norm, direction=direction, importance=map_)
        state.numbers["importance"] = describe(map_)
        state.memory = {"generator": generator, "order": order}
        return state

    def target(
        self, model: EditableModel, state: State, forget: Batch, retain: Batch, hidden: Tensor
    ) -> Tensor:
        if self.direction == "resampled" or self.map_mode != "static":
            self.move_target(model, state, forget, retain)
        target = state.tensors["target"]
        if self.target_mode == "additive":
            with model.frozen():
                return target + model.hidden(forget, self.site)
        return target

    def move_target(self, model: EditableModel, state: State, forget: Batch, retain: Batch) -> None:
        """Renew the target for this step, where the direction or the map is not fixed."""
        kept, memory = state.tensors, state.memory
        if self.direction == "resampled":
            draw = self.draw(len(kept["direction"]), memory["generator"])
            kept["direction"] = draw.to(model.device)
        if self.map_mode != "static":
            pairs = [self.frozen_hidden(model, [batch]) for batch in (forget, retain)]
            fresh = torch.stack([measure(pair, self.statistic)[0] for pair in pairs])  # (2, D)
            if self.map_mode == "ema":
                fresh = torch.lerp(fresh, memory.get("ema", fresh), self.ema_decay)
                memory["ema"] = fresh
            kept["importance"] = self.fuse(fresh[0], fresh[1], memory["order"])
        shape = kept["direction"] * kept["importance"]
        kept["target"] = self.scaled(shape, state.numbers["activation_norm"])
