"""SRMU: selective representation misdirection for unlearning (arXiv 2512.16297)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

import srmu.methods.importance as maps
from srmu.engine.distributed import sum_values
from srmu.methods.base import LARGE, TINY, Batch, Bounds, EditableModel, Needs, Part, State, Topic
from srmu.methods.misdirection import Misdirection

A_MAP = Needs("importance=ratio or difference or product or product_inverse or shuffled")
A_QUOTIENT = Needs("importance=ratio or product or product_inverse or shuffled")
DRAWN = Needs("direction=signs or uniform or unit_uniform or gaussian or resampled")


@dataclass(frozen=True, kw_only=True)
class SRMU(Misdirection):
    """Sends forget activations to c_map * V * I_norm: signs V, importance map I_norm."""

    name = "srmu"
    paper = "arXiv 2512.16297"
    measures = ("forget", "retain")

    importance: maps.Fusion = "ratio"
    statistic: Annotated[maps.Statistic, A_MAP] = "abs_mean"
    map_mode: Annotated[Literal["static", "per_batch", "ema"], A_MAP] = "static"
    ema_decay: Annotated[float, Bounds(0, 1 - TINY), Needs("map_mode=ema")] = 0.9
    direction: maps.Direction = "signs"
    shared_direction: Annotated[bool, DRAWN] = False  # one V for all topics
    target_mode: Literal["absolute", "additive"] = "absolute"  # additive: eq. 1, absolute: eq. 5
    lam: Annotated[float, Needs("importance=difference")] = 1.0  # lambda of the difference map
    eps: Annotated[float, Bounds(TINY, LARGE), A_QUOTIENT] = 1e-6  # of the ratio and product maps
    clip_quantile: Annotated[Part, A_MAP] = 1.0  # quantile that caps the map before it is normalised

    def fuse(self, v_f: Tensor, v_r: Tensor, order: Tensor) -> Tensor:
        """I_norm (D,) from the two statistics; `order` is the permutation of `shuffled`."""
        return maps.importance_map(v_f, v_r, self.importance, self.lam, self.eps, self.clip_quantile, order)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        sums = self.frozen_sums(model, topic.forget, keep=False)
        v_f, norm = maps.measure_features(sums, self.statistic)
        v_r, _ = maps.measure_features(self.frozen_sums(model, topic.retain), self.statistic)
        generator = topic.generator("direction", self.shared_direction)
        direction = maps.draw_direction(self.direction, len(v_f), generator).to(model.device)
        order = torch.randperm(len(v_f), generator=topic.generator("shuffled map")).to(v_f.device)
        map_ = self.fuse(v_f, v_r, order)
        # eq: SRMU eq. 4, T = c_map V I_norm
        state = self.state(direction * map_, norm, direction=direction, importance=map_)
        state.numbers["importance"] = maps.describe_importance(map_)
        state.memory = {"generator": generator, "order": order}
        return state

    def target(self, model: EditableModel, state: State, forget: Batch, retain: Batch, hidden: Tensor) -> Tensor:
        tensors, memory = state.tensors, state.memory
        if self.direction == "resampled":
            fresh = maps.draw_direction(self.direction, len(tensors["direction"]), memory["generator"])
            tensors["direction"] = fresh.to(model.device)
        if self.map_mode != "static":
            sums = [self.frozen_sums(model, [batch]) for batch in (forget, retain)]
            parts = [maps.measure_features(map(sum_values, one), self.statistic)[0] for one in sums]
            values = torch.stack(parts)  # (2, D)
            if self.map_mode == "ema":
                values = torch.lerp(values, memory.get("ema", values), self.ema_decay)
                memory["ema"] = values
            tensors["importance"] = self.fuse(values[0], values[1], memory["order"])
        if self.direction == "resampled" or self.map_mode != "static":
            shape = tensors["direction"] * tensors["importance"]
            tensors["target"] = self.scaled(shape, state.numbers["activation_norm"])
        if self.target_mode == "absolute":
            return tensors["target"]
        with model.frozen():
            return tensors["target"] + model.hidden(forget, self.site)
