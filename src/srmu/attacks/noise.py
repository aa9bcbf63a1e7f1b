"""E11: pruning and noise, which may break a fragile suppression before they break the model."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier, ask_changed
from srmu.evals.subject import Subject

PRUNED = (0.1, 0.3, 0.5)  # share of a matrix
NOISE = (0.01, 0.02, 0.05)  # standard deviation, as a share of the row's root mean square
SEEDS = 3

Matrix = Float[Tensor, "O I"]


def noise(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> AttackResult:
    """All linear matrices of the layers; an answer under noise is right as often as over seeds."""
    ways = [
        ask_changed(model, exam, f"{share:.0%} pruned", partial(prune_matrix, share=share))
        for share in PRUNED
    ]
    for share in NOISE:
        setting = f"noise of {share:.0%}"
        tries = [
            ask_changed(model, exam, setting, make_disturbance(model, share, SEEDS * seed + i))
            for i in range(SEEDS)
        ]
        val, test = (
            tuple(np.mean(rows, axis=0).tolist())
            for rows in ([way.val for way in tries], [way.test for way in tries])
        )
        ways.append(Setting(setting, val, test))
    return AttackResult(tuple(ways), budget={"seeds of noise": SEEDS})


def prune_matrix(matrix: Matrix, share: float) -> Matrix:
    """The matrix with a share of its weights, those nearest to 0, set to 0."""
    flat = matrix.flatten()
    nearest = flat.abs().argsort(stable=True)[: round(share * flat.numel())]
    return flat.index_fill(0, nearest, 0).reshape(matrix.shape)


def make_disturbance(model: Subject, share: float, seed: int) -> Callable[[Matrix], Matrix]:
    """A function that adds Gaussian noise to one matrix after the other."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def disturbed(matrix: Matrix) -> Matrix:
        rms = matrix.square().mean(dim=1, keepdim=True).sqrt()
        draw = torch.randn(matrix.shape, generator=generator, device=matrix.device)
        return matrix + share * rms * draw

    return disturbed
