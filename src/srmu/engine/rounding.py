"""Rounding of weights to few levels, as quantised models store them."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from srmu.engine.distributed import is_sharded
from srmu.engine.model import EditableModel
from srmu.engine.sites import has_inputs_first
from srmu.errors import SrmuError

Matrix = Float[Tensor, "O I"]
PART = 2**20  # weights that are rounded at once


def view_matrices(weight: Tensor, turned: bool) -> Tensor:
    """A view of a weight as (experts, outputs, inputs); `turned`: its inputs come first."""
    weight = weight.mT if turned else weight
    return weight if weight.ndim == 3 else weight[None]


def split_rows(matrix: Matrix) -> tuple[Matrix, ...]:
    """Some rows at a time: a search for scales holds several numbers a weight."""
    return matrix.split(max(1, PART // matrix.shape[1]))


class Quantiser(NamedTuple):
    """Levels that weights are rounded to, times a scale and plus an offset that a block of them shares."""

    levels: Float[Tensor, " L"]
    block: int | None = None  # inputs that share a scale; None: all inputs of an output
    unit: float = 1.0  # level of the weight of largest magnitude; below 0: of its sign, too; 0: there is an offset
    half: bool = False  # scales are kept in float16
    together: int = 1  # blocks whose scales and offsets are whole numbers of a unit that they share

    def group_weights(self, matrix: Matrix) -> Float[Tensor, "O G S"]:
        """The weights that share a scale side by side; the last block is filled up with zeros."""
        size = self.block or matrix.shape[1]
        missing = -matrix.shape[1] % (size * self.together)
        return torch.nn.functional.pad(matrix, (0, missing)).reshape(len(matrix), -1, size)

    def scale_groups(self, weights: Float[Tensor, "O G S"]) -> tuple[Float[Tensor, "O G 1"], Float[Tensor, "O G 1"]]:
        """The scale and the offset of each block."""
        if self.together > 1:
            units, counts = self.find_units(weights)
            scale, less = (units * counts).reshape(2, len(weights), -1, 1)
            return scale, -less
        if not self.unit:
            low, high = weights.amin(dim=2, keepdim=True), weights.amax(dim=2, keepdim=True)
            return (high - low) / (len(self.levels) - 1), low
        largest = weights.gather(2, weights.abs().argmax(dim=2, keepdim=True))
        scale = (largest if self.unit < 0 else largest.abs()) / self.unit
        return scale, torch.zeros_like(scale)

    def find_units(self, weights: Float[Tensor, "O G S"]) -> tuple[Float[Tensor, "2 O B 1"], Float[Tensor, "2 O B T"]]:
        """The units of scales and of amounts taken off, and how many of them each block has."""
        return share_units(*fit_blocks(weights, len(self.levels) - 1), self.together)

    def nearest_levels(
        self, weights: Float[Tensor, "O G S"], scale: Float[Tensor, "O G 1"], offset: Float[Tensor, "O G 1"]
    ) -> Int[Tensor, "O G S"]:
        levels = self.levels.to(weights.device)
        ratio = (weights - offset) / scale.masked_fill(scale == 0, torch.inf)  # of a block without a scale: level 0
        return torch.bucketize(ratio.contiguous(), (levels[1:] + levels[:-1]) / 2)

    def round_weights(self, weights: Float[Tensor, "O G S"]) -> Float[Tensor, "O G S"]:
        scale, offset = self.scale_groups(weights)
        nearest = self.levels.to(weights.device)[self.nearest_levels(weights, scale, offset)]
        return nearest * (scale.half().float() if self.half else scale) + offset

    def round_matrix(self, matrix: Matrix) -> Matrix:
        parts = [self.round_weights(self.group_weights(rows)).flatten(1) for rows in split_rows(matrix)]
        return torch.cat(parts)[:, : matrix.shape[1]]


def fit_blocks(weights: Float[Tensor, "O G S"], last: int) -> tuple[Float[Tensor, "O G 1"], Float[Tensor, "O G 1"]]:
    """The scale and the amount taken off with which levels 0 to `last` are nearest to the weights of each block.

    It searches as llama.cpp's `make_qkx2_quants` does. The errors of large weights count more. For each of 21 scales it
    rounds, and fits a line through the weights over their levels; the next starts from the lowest point of the best.
    """
    care = weights.abs() + weights.square().mean(dim=2, keepdim=True).sqrt()
    low, high = weights.amin(dim=2, keepdim=True).clamp(max=0), weights.amax(dim=2, keepdim=True)
    scale, pull = (high - low) / last, care * weights
    all_care, all_pull = (part.sum(dim=2, keepdim=True) for part in (care, pull))

    def round_to(steps: float) -> Tensor:  # not finite where all weights are equal: they keep a scale of 0
        return ((weights - low) * (steps / (high - low))).round_().clamp_(0, last)

    # errors without that of levels that are all 0
    least = (care * (scale * round_to(last) + low - weights).square() - pull * weights).sum(dim=2, keepdim=True)
    for step in range(21):
        level = round_to(last - 1 + step / 10)
        heavy = care * level
        one, two = heavy.sum(dim=2, keepdim=True), heavy.mul_(level).sum(dim=2, keepdim=True)
        both = level.mul_(pull).sum(dim=2, keepdim=True)
        spread = all_care * two - one * one
        start = (two * all_pull - one * both) / spread
        slope = torch.where(start > 0, both / two, (all_care * both - all_pull * one) / spread)
        start = start.clamp(max=0)
        error = -slope * both - start * all_pull
        better = (spread > 0) & (error < least)
        least, scale, low = (torch.where(better, *pair) for pair in ((error, least), (slope, scale), (start, low)))
    return scale, -low


def share_units(
    scale: Float[Tensor, "O G 1"], less: Float[Tensor, "O G 1"], together: int, most: int = 63
) -> tuple[Float[Tensor, "2 O B 1"], Float[Tensor, "2 O B T"]]:
    """Scales and amounts taken off as whole numbers up to `most` of a unit in float16 that blocks share."""
    both = torch.stack([scale, less]).reshape(2, len(scale), -1, together)
    largest = both.amax(dim=3, keepdim=True)
    counts = (both * (most / largest)).nan_to_num(0).round().clamp(max=most)
    return (largest / most).half().float(), counts


def normal_levels() -> Float[Tensor, " 16"]:
    """The 16 levels of NF4: quantiles of the normal distribution, and 0 (QLoRA, arXiv 2305.14314, appendix E)."""
    # the mean of those that would leave half a step outside with 16 and with 15 levels
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    sides = [torch.special.ndtri(torch.linspace(outermost, 0.5, count, dtype=torch.float64)) for count in (8, 9)]
    levels = torch.cat([-sides[0], sides[1][:-1].flip(0)])  # both sides end at 0: it is kept once
    return (levels / levels.max()).float()


Kind = Literal["int8", "int4", "nf4", "q8_0", "q4_0", "q4_k", "torchao_int8", "torchao_int4"]
QUANTISERS: dict[str, Quantiser] = {
    "int8": Quantiser(torch.arange(-127.0, 128.0), None, 127),  # bitsandbytes' LLM.int8, of weights alone
    "int4": Quantiser(torch.arange(-7.0, 8.0), 128, 7),
    "nf4": Quantiser(normal_levels(), 64),  # bitsandbytes'
    "q8_0": Quantiser(torch.arange(-127.0, 128.0), 32, 127, half=True),  # llama.cpp's, as are the next two
    "q4_0": Quantiser(torch.arange(-8.0, 8.0), 32, -8, half=True),
    "q4_k": Quantiser(torch.arange(16.0), 32, 0, together=8),
    "torchao_int8": Quantiser(torch.arange(-128.0, 128.0), None, 127.5),  # weight-only, as is the next
    "torchao_int4": Quantiser(torch.arange(16.0), 128, 0),
}


def pack_q4_k(matrix: Matrix) -> UInt8[Tensor, "O _"]:
    """The matrix as bytes of a GGUF file in Q4_K, where 256 divides the inputs."""
    quantiser = QUANTISERS["q4_k"]
    weights = quantiser.group_weights(matrix)
    units, counts = quantiser.find_units(weights)
    scale, less = (units * counts).reshape(2, len(weights), -1, 1)
    levels = quantiser.nearest_levels(weights, scale, -less).reshape(*counts.shape[1:3], 4, 2, 32).byte()
    # six bits each: of the first four blocks whole, above them two bits of the last four, then the rest of these
    first, last = counts.byte().split(4, dim=3)
    heads, (tails, others) = first | (last >> 4 << 6), last & 15
    places = (levels[..., 0, :] | levels[..., 1, :] << 4).flatten(2)
    parts = [*units.half().view(torch.uint8).flatten(3), *heads, tails | others << 4, places]
    return torch.cat(parts, dim=2).flatten(1)


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
