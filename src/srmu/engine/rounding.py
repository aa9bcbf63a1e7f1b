"""Rounding of weights to few levels, as quantised models store them."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from srmu.engine.distributed import is_sharded
from srmu.engine.model import EditableModel
from srmu.engine.sites import has_inputs_first
from srmu.errors import SrmuError

Matrix = Float[Tensor, "O I"]


def view_matrices(weight: Tensor, turned: bool) -> Tensor:
    """A view of a weight as (experts, outputs, inputs); `turned`: its inputs come first."""
    weight = weight.mT if turned else weight
    return weight if weight.ndim == 3 else weight[None]


class Quantiser(NamedTuple):
    """Levels that weights are rounded to, times a scale that a block of them shares."""

    levels: Float[Tensor, " L"]
    block: int | None = None  # inputs that share a scale; None: all inputs of an output
    unit: float = 1.0  # the level of the weight of largest magnitude; below 0: of its sign, too
    half: bool = False  # scales are kept in float16

    def group_weights(self, matrix: Matrix) -> Float[Tensor, "O G S"]:
        """The weights that share a scale side by side; the last block is filled up with zeros."""
        size = self.block or matrix.shape[1]
        return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size)).reshape(len(matrix), -1, size)

    def scale_groups(self, weights: Float[Tensor, "O G S"]) -> Float[Tensor, "O G 1"]:
        largest = weights.gather(2, weights.abs().argmax(dim=2, keepdim=True))
        scale = (largest if self.unit < 0 else largest.abs()) / self.unit
        return scale.masked_fill(scale == 0, 1)

    def nearest_levels(self, weights: Float[Tensor, "O G S"], scale: Float[Tensor, "O G 1"]) -> Int[Tensor, "O G S"]:
        levels = self.levels.to(weights.device)
        return torch.bucketize((weights / scale).contiguous(), (levels[1:] + levels[:-1]) / 2)

    def round_weights(self, weights: Float[Tensor, "O G S"]) -> Float[Tensor, "O G S"]:
        scale = self.scale_groups(weights)
        nearest = self.levels.to(weights.device)[self.nearest_levels(weights, scale)]
        return nearest * (scale.half().float() if self.half else scale)

    def round_matrix(self, matrix: Matrix) -> Matrix:
        return self.round_weights(self.group_weights(matrix)).flatten(1)[:, : matrix.shape[1]]


def normal_levels() -> Float[Tensor, " 16"]:
    """The 16 levels of NF4: quantiles of the normal distribution, and 0 (QLoRA, arXiv 2305.14314, appendix E)."""
    # the mean of those that would leave half a step outside with 16 and with 15 levels
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    sides = [torch.special.ndtri(torch.linspace(outermost, 0.5, count, dtype=torch.float64)) for count in (8, 9)]
    levels = torch.cat([-sides[0], sides[1][:-1].flip(0)])  # both sides end at 0: it is kept once
    return (levels / levels.max()).float()


Kind = Literal["int8", "int4", "nf4", "q8_0", "q4_0"]
QUANTISERS: dict[str, Quantiser] = {
    "int8": Quantiser(torch.arange(-127.0, 128.0), None, 127),
    "int4": Quantiser(torch.arange(-7.0, 8.0), 128, 7),
    "nf4": Quantiser(normal_levels(), 64),  # bitsandbytes'
    "q8_0": Quantiser(torch.arange(-127.0, 128.0), 32, 127, half=True),  # llama.cpp's, as is the next
    "q4_0": Quantiser(torch.arange(-8.0, 8.0), 32, -8, half=True),
}


class Rounder:
    """Rounds the matrices that a model trains, in place."""

    def __init__(self, model: EditableModel, kind: Kind) -> None:
        matrices = {name: p for name, p in model.trained.items() if p.ndim in (2, 3) and "lora_" not in name}
        if len(matrices) < len(model.trained):
            other = next(name for name in model.trained if name not in matrices)
            raise SrmuError(f"train.quantise_aware={kind} rounds whole matrices, and {other} is not one; leave it out")
        if any(map(is_sharded, matrices.values())):
            raise SrmuError(f"train.quantise_aware={kind} cannot be combined with shard")
        owners = {name: model.module.get_submodule(name.rpartition(".")[0]) for name in matrices}
        self.quantiser = QUANTISERS[kind]
        self.matrices = [(parameter, has_inputs_first(owners[name])) for name, parameter in matrices.items()]

    def round_trained(self) -> None:
        for parameter, turned in self.matrices:
            for matrix in view_matrices(parameter.data, turned):
                matrix.copy_(self.quantiser.round_matrix(matrix.float()))
