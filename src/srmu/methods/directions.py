"""Random directions V or u: where in activation space forget texts are sent."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Direction = Literal["signs", "plus", "minus", "uniform", "unit_uniform", "gaussian", "resampled", "zero"]


def draw_direction(kind: Direction, width: int, generator: torch.Generator) -> Float[Tensor, " D"]:
    """A direction of `width` features; `resampled` is `signs`, drawn again each step."""
    if kind in ("plus", "minus"):
        return torch.full((width,), 1.0 if kind == "plus" else -1.0)
    if kind == "zero":
        return torch.zeros(width)
    if kind == "gaussian":
        return torch.randn(width, generator=generator)
    if kind in ("uniform", "unit_uniform"):
        # Entries of U[0, 1) are not centred: RMU's directions for two topics have cosine 0.75.
        values = torch.rand(width, generator=generator)
        return values / values.norm() if kind == "unit_uniform" else values
    return torch.randint(2, (width,), generator=generator) * 2.0 - 1.0
