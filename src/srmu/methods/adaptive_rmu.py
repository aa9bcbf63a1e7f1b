"""Adaptive RMU: RMU whose strength follows the activation norm (arXiv 2408.06223)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from torch import Tensor

from srmu.engine.distributed import sum_values
from srmu.engine.losses import token_mean
from srmu.methods.base import Batch, EditableModel, Needs, State
from srmu.methods.rmu import RMU


@dataclass(frozen=True, kw_only=True)
class AdaptiveRMU(RMU):
    """Sends forget activations to scale * ||h(x_f)|| * coeff * u, or kappa * ||h(x_f)|| * u.

    What a run records as its norms is what was measured last: of the first batch, or of the last one.
    """

    name = "adaptive_rmu"
    paper = "arXiv 2408.06223"

    scale: Annotated[float | None, Needs("method.coeff")] = None  # None: 5, as in the public code
    norm_source: Literal["frozen", "updated"] = "frozen"  # the public code takes updated
    norm_when: Literal["first_batch", "per_batch", "per_sample", "per_token"] = "first_batch"  # as in the public code

    @property
    def factor(self) -> float:
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
        if self.norm_when == "first_batch" and state.memory.get("measured"):
            return state.tensors["target"]
        if self.norm_source == "frozen":
            with model.frozen():
                hidden = model.hidden(forget, self.site)
        direction, mask = state.tensors["direction"], self.measured_tokens(forget)
        norms = hidden.float().norm(dim=-1)  # (B, T)
        part = token_mean(norms, mask)
        mean = float(sum_values(part.share(sum_values(part.count))))
        state.memory["measured"] = True
        state.tensors["target"] = target = self.factor * mean * direction
        state.numbers |= {"coeff": self.factor * mean, "target_norm": self.factor * mean, "activation_norm": mean}
        if self.norm_when == "per_token":
            # eq: Adaptive RMU, T = beta |h(x_f)| u
            return self.factor * norms[..., None] * direction
        if self.norm_when == "per_sample":
            means = (norms * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            return self.factor * means[:, None, None] * direction
        return target
