"""E10: rounding the weights, which can undo a change smaller than the steps (arXiv 2410.16454)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, ask_changed, find_matrices, view_matrices
from srmu.evals.statistics import Estimate
from srmu.evals.subject import Subject


class Quantiser(NamedTuple):
    """Levels between -1 and 1, and how many inputs share a scale: their largest magnitude."""

    levels: Float[Tensor, " L"]
    block: int | None = None  # None: all inputs of an output


def normal_levels() -> Float[Tensor, " 16"]:
    """The 16 levels of NF4: quantiles of the normal distribution, 0 among them.

    QLoRA, arXiv 2305.14314, section 3 and appendix E: the outermost quantile is the mean of those
    that would leave half a step outside with 16 and with 15 levels.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    sides = [torch.special.ndtri(torch.linspace(outermost, 0.5, count, dtype=torch.float64)) for count in (8, 9)]
    levels = torch.cat([-sides[0], sides[1][:-1].flip(0)])  # both sides end at 0: it is kept once
    return (levels / levels.max()).float()


@dataclass(frozen=True, kw_only=True)
class Quantisation(Attack):
    """All linear matrices of the layers rounded to the nearest level, in float.

    Metrics, where the original is known: of the weights that unlearning changed, the share that
    rounding puts into the original's bucket; counted, so that it has no interval.
    """

    id = "E10"
    name = "quantisation"
    tier = "smoke"

    quantisers: Mapping[str, Quantiser] = field(
        default_factory=lambda: {
            "int8 a channel": Quantiser(torch.arange(-127, 128) / 127),
            "int4 in groups of 128": Quantiser(torch.arange(-7, 8) / 7, 128),
            "NF4 in blocks of 64": Quantiser(normal_levels(), 64),
        }
    )

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        ways = tuple(
            ask_changed(model, exam, name, partial(quantise_matrix, quantiser=quantiser))
            for name, quantiser in self.quantisers.items()
        )
        metrics = {}
        for name, quantiser in self.quantisers.items():
            changed, same = count_undone(model, quantiser)
            if changed:
                share = same / changed
                metrics[f"in the original's bucket, {name}"] = Estimate(share, share, share, changed)
        return AttackResult(ways, metrics)


def group_weights(matrix: Float[Tensor, "O I"], quantiser: Quantiser) -> Float[Tensor, "O G S"]:
    """The weights that share a scale side by side; the last block is filled up with zeros."""
    size = quantiser.block or matrix.shape[1]
    filled = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
    return filled.reshape(len(matrix), -1, size)


def group_scales(weights: Float[Tensor, "O G S"]) -> Float[Tensor, "O G 1"]:
    largest = weights.abs().amax(dim=2, keepdim=True)
    return largest.masked_fill(largest == 0, 1)


def nearest_levels(
    weights: Float[Tensor, "O G S"], scale: Float[Tensor, "O G 1"], quantiser: Quantiser
) -> Int[Tensor, "O G S"]:
    """The number of the level nearest to each weight."""
    levels = quantiser.levels.to(weights.device)
    return torch.bucketize((weights / scale).contiguous(), (levels[1:] + levels[:-1]) / 2)


def quantise_matrix(matrix: Float[Tensor, "O I"], quantiser: Quantiser) -> Float[Tensor, "O I"]:
    """The matrix after quantising and back."""
    weights = group_weights(matrix, quantiser)
    scale = group_scales(weights)
    values = quantiser.levels.to(matrix.device)[nearest_levels(weights, scale, quantiser)] * scale
    return values.flatten(1)[:, : matrix.shape[1]]


def count_undone(model: Subject, quantiser: Quantiser) -> tuple[int, int]:
    """How many weights of the linear matrices differ from the original's; how many of them fall,
    once they are rounded, into the bucket of the original's.

    The rounded values themselves are hardly ever equal: one changed weight moves a block's scale.
    """
    turned = find_matrices(model.module)
    parameters = dict(model.module.named_parameters())
    changed = same = 0
    for name in turned.keys() & model.original.keys():
        now, then = (view_matrices(weight, turned[name]) for weight in (parameters[name].data, model.original[name]))
        for one, other in zip(now, then, strict=True):
            before = group_weights(other.float(), quantiser)
            differ = group_weights(one.float(), quantiser) != before
            after = group_weights(quantise_matrix(one.float(), quantiser), quantiser)
            scale = group_scales(before)
            alike = nearest_levels(after, scale, quantiser) == nearest_levels(before, scale, quantiser)
            changed += int(differ.sum())
            same += int((differ & alike).sum())
    return changed, same
