"""RMU, and the methods that change its strength, its retain target or what it reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from srmu.engine.distributed import sum_values
from srmu.engine.losses import is_counted, mean_nll, token_mean, token_mse
from srmu.engine.sites import edit_input
from srmu.methods.base import Batch, Count, EditableModel, State, Topic, Weight
from srmu.methods.importance import draw_direction, measure_features
from srmu.methods.misdirection import Misdirection

LEAST = 1e-30  # avoids a division by 0


@dataclass(frozen=True, kw_only=True)
class RMU(Misdirection):
    """Sends forget activations to c * u, u a random unit vector with entries >= 0."""

    name = "rmu"
    paper = "arXiv 2403.03218"

    def setup(self, model: EditableModel, topic: Topic) -> State:
        mean, norm = measure_features(self.frozen_sums(model, topic.forget, keep=False))
        # eq: RMU, T = c u, u = r / |r|, r ~ U[0,1)^D
        u = draw_direction("unit_uniform", len(mean), topic.generator("direction")).to(model.device)
        return self.state(u, norm, direction=u)


@dataclass(frozen=True, kw_only=True)
class AdaptiveRMU(RMU):
    """Sends forget activations to scale * ||h(x_f)|| * coeff * u, or kappa * ||h(x_f)|| * u."""

    name = "adaptive_rmu"
    paper = "arXiv 2408.06223"

    scale: float | None = None  # None: 5, as in the public code; only with coeff
    norm_source: Literal["frozen", "updated"] = "frozen"  # the public code takes updated
    norm_when: Literal["first_batch", "per_batch", "per_sample", "per_token"] = "first_batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("scale", self.coeff is not None, "method.coeff; kappa takes its place")

    @property
    def factor(self) -> float:
        """The norm of the target over the measured norm."""
        if self.coeff is not None:
            return (5.0 if self.scale is None else self.scale) * self.coeff
        return super().factor

    def with_options(self, options: Mapping[str, Any]) -> Self:
        bare = replace(self, scale=None) if "kappa" in options else self
        return super(AdaptiveRMU, bare).with_options(options)

    def scaled(self, shape: Tensor, norm: float) -> Tensor:
        """The target along a unit vector, for activations of norm `norm`."""
        return self.factor * norm * shape

    def target(self, model: EditableModel, state: State, forget: Batch, retain: Batch, hidden: Tensor) -> Tensor:
        direction = state.tensors["direction"]
        if self.norm_when == "first_batch" and "first_norm" in state.memory:
            return self.factor * state.memory["first_norm"] * direction
        if self.norm_source == "frozen":
            with model.frozen():
                hidden = model.hidden(forget, self.site)
        norms = hidden.float().norm(dim=-1)  # (B, T)
        if self.norm_when == "per_token":
            # eq: Adaptive RMU, T = beta |h(x_f)| u
            return self.factor * norms[..., None] * direction
        mask = self.measured_tokens(forget)
        if self.norm_when == "per_sample":
            means = (norms * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            return self.factor * means[:, None, None] * direction
        part = token_mean(norms, mask)
        mean = float(sum_values(part.share(sum_values(part.count))))
        if self.norm_when == "first_batch":  # as the public code does
            state.memory["first_norm"] = mean
        state.tensors["target"] = self.factor * mean * direction
        return state.tensors["target"]


@dataclass(frozen=True, kw_only=True)
class RNA(RMU):
    """RMU that holds retain activations to noisy copies, so that forget words in them do less."""

    name = "rna"
    paper = "arXiv 2501.19202"
    spreads = False  # each step draws for a whole batch
    measures = ("forget", "retain")

    # The paper uses absolute units, which differ in meaning between models and layers.
    noise: Weight = 0.1  # standard deviation, over the root mean square of h0's retain features

    def setup(self, model: EditableModel, topic: Topic) -> State:
        state = super().setup(model, topic)
        sizes, _ = measure_features(self.frozen_sums(model, topic.retain), "rms")  # of each feature
        state.numbers["noise"] = self.noise * float(sizes.square().mean().sqrt())
        state.memory["noise"] = topic.generator("retain noise")
        return state

    def retain_target(self, state: State, anchor: Tensor) -> Tensor:
        draw = torch.randn(anchor.shape, generator=state.memory["noise"])
        # eq: RNA, h0(x_r) + delta, delta ~ N(0, nu I), drawn anew in each step
        return anchor.float() + state.numbers["noise"] * draw.to(anchor.device)


@dataclass(frozen=True, kw_only=True)
class RMULAT(RMU):
    """RMU under a perturbation of what the updated layers read, sought anew in each step."""

    name = "rmu_lat"
    paper = "arXiv 2407.15549"
    spreads = False  # each step draws for a whole batch

    adversary: Literal["activations", "likelihood"] = "activations"  # seeks the original's, or that of forget texts
    budget: Weight = 0.5  # norm of the perturbation over that of its input, token by token
    adversary_steps: Count = 4  # of projected gradient descent

    @property
    def depth(self) -> int | None:
        return super().depth if self.adversary == "activations" else None

    def forget_hidden(self, model: EditableModel, forget: Batch) -> Tensor:
        layer = model.layers[self.updated[0]]
        mask = is_counted(forget["labels"])
        with model.frozen():
            before = model.hidden(forget, self.site, keep=False)
        with shift_inputs(layer, None) as seen, torch.no_grad():
            model.hidden(forget, self.site)
        radius = self.budget * seen[0].float().norm(dim=-1, keepdim=True)
        shift = torch.zeros_like(seen[0], dtype=torch.float32)
        for _ in range(self.adversary_steps):
            with shift_inputs(layer, shift.requires_grad_()):
                if self.adversary == "activations":
                    cost = token_mse(model.hidden(forget, self.site), before, mask).value
                else:
                    cost = mean_nll(model.logits(forget), forget["labels"]).value
            (slope,) = torch.autograd.grad(cost, shift)
            # eq: LAT, d <- P(d - s g / |g|), P onto |d| <= budget |h|, token by token
            slope = slope / slope.norm(dim=-1, keepdim=True).clamp(min=LEAST)
            shift = shift.detach() - 2.5 / self.adversary_steps * radius * slope
            shift = shift * (radius / shift.norm(dim=-1, keepdim=True).clamp(min=LEAST)).clamp(max=1)
        with shift_inputs(layer, shift):
            return model.hidden(forget, self.site)


@contextmanager
def shift_inputs(layer: Any, shift: Tensor | None) -> Iterator[list[Tensor]]:
    """Add a shift to what a layer reads; yields a list that gets the unshifted input."""
    seen: list[Tensor] = []

    def add(hidden: Tensor) -> Tensor | None:
        seen[:] = [hidden.detach()]
        return None if shift is None else hidden.float() + shift

    with edit_input(layer, add):
        yield seen
