"""E10 and E11: rounding, pruning and noise, which may undo a small change of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, choose_setting
from srmu.engine.rounding import QUANTISERS, Matrix, Quantiser, split_rows, view_matrices
from srmu.engine.sites import decoder_blocks, has_inputs_first, is_turned
from srmu.evals.statistics import Estimate
from srmu.evals.subject import Question, Subject, mark_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_matrices(module: PreTrainedModel) -> dict[str, bool]:
    """The linear matrices of the decoder layers, by name, stacked experts too: whether inputs come first."""
    layers = decoder_blocks(module)
    prefix = next(name for name, part in module.named_modules() if part is layers)
    turned = {}
    for name, part in layers.named_modules(prefix=prefix):
        for key, parameter in part.named_parameters(recurse=False):
            matrix = parameter.ndim == 2 and (isinstance(part, nn.Linear) or is_turned(part))
            if matrix or (parameter.ndim == 3 and not isinstance(part, nn.Conv1d)):
                turned[f"{name}.{key}"] = has_inputs_first(part)
    return turned


def mark_changed(model: Subject, change: Callable[[Tensor], Tensor], asked: Sequence[Question]) -> Sequence[float]:
    """`mark_answers` when each linear matrix is what `change` makes of it: (outputs, inputs), float32."""
    turned = find_matrices(model.module)
    with model.editable(*turned) as edited:
        for name, parameter in edited.trained.items():
            for matrix in view_matrices(parameter.data, turned[name]):
                matrix.copy_(change(matrix.float()))
        return mark_answers(model, asked)


class Quantisation(Attack, id="E10", name="quantisation", tier="smoke"):
    """All linear matrices of the layers rounded to the nearest level, in float."""

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        settings = {name: partial(mark_changed, model, one.round_matrix) for name, one in QUANTISERS.items()}
        metrics = {}
        for name, quantiser in QUANTISERS.items():
            changed, same = count_undone(model, quantiser)
            if changed:
                share = same / changed
                metrics[f"in the original's bucket, {name}"] = Estimate(share, share, share, changed)
        return AttackResult(choose_setting(exam, settings), metrics)


def count_undone(model: Subject, quantiser: Quantiser) -> tuple[int, int]:
    """How many weights differ from the original's, and how many of them round into its bucket."""
    turned = find_matrices(model.module)
    changed = same = 0
    for name in turned.keys() & model.original.keys():
        weights = model.module.get_parameter(name).data, model.original[name]
        for pair in zip(*(view_matrices(weight, turned[name]) for weight in weights), strict=True):
            for one, other in zip(*(split_rows(matrix.float()) for matrix in pair), strict=True):
                now, before = quantiser.group_weights(one), quantiser.group_weights(other)
                scales = quantiser.scale_groups(before)  # the original's: one changed weight moves those of its block
                after = quantiser.nearest_levels(quantiser.round_weights(now), *scales)
                differ = now != before
                changed += int(differ.sum())
                same += int((differ & (after == quantiser.nearest_levels(before, *scales))).sum())
    return changed, same


class Noise(Attack, id="E11", name="noise", tier="standard"):
    """All linear matrices of the layers; an answer under noise is right as often as over seeds."""

    pruned: tuple[float, ...] = (0.1, 0.3, 0.5)  # share of a matrix
    noise: tuple[float, ...] = (0.01, 0.02, 0.05)  # standard deviation over a row's RMS
    seeds: int = 3

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        changes = {f"{share:.0%} pruned": partial(prune_matrix, share=share) for share in self.pruned}
        settings = {name: partial(mark_changed, model, change) for name, change in changes.items()}

        def ask_noisy(share: float, asked: Sequence[Question]) -> Sequence[float]:
            right = []
            for i in range(self.seeds):
                generator = torch.Generator(model.device).manual_seed(self.seeds * seed + i)
                right.append(mark_changed(model, partial(add_noise, share=share, generator=generator), asked))
            return np.mean(right, axis=0).tolist()

        settings |= {f"noise of {share:.0%}": partial(ask_noisy, share) for share in self.noise}
        return AttackResult(choose_setting(exam, settings))


def prune_matrix(matrix: Matrix, share: float) -> Matrix:
    """The matrix with a share of its weights, those nearest to 0, set to 0."""
    flat = matrix.flatten()
    nearest = flat.abs().argsort(stable=True)[: round(share * flat.numel())]
    return flat.index_fill(0, nearest, 0).reshape(matrix.shape)


def add_noise(matrix: Matrix, share: float, generator: torch.Generator) -> Matrix:
    rms = matrix.square().mean(dim=1, keepdim=True).sqrt()
    return matrix + share * rms * torch.randn(matrix.shape, generator=generator, device=matrix.device)
