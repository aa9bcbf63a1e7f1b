"""RMU with latent adversarial training (Sheshadri et al., arXiv 2407.15549)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from srmu.engine.losses import is_counted, mean_nll, token_mse
from srmu.engine.sites import edit_input
from srmu.methods.base import Batch, Count, EditableModel, Weight
from srmu.methods.misdirection import LEAST
from srmu.methods.rmu import RMU


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
