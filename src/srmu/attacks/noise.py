"""E11: pruning and noise, which may break a fragile suppression before they break the model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts, ask_changed
from srmu.evals.subject import Subject

Matrix = Float[Tensor, "O I"]


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """All linear matrices of the layers; an answer under noise is right as often as over seeds."""

    id = "E11"
    name = "noise"
    tier = "standard"

    pruned: tuple[float, ...] = (0.1, 0.3, 0.5)  # share of a matrix
    noise: tuple[float, ...] = (0.01, 0.02, 0.05)  # standard deviation over a row's RMS
    seeds: int = 3

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        ways = [
            ask_changed(model, exam, f"{share:.0%} pruned", partial(prune_matrix, share=share)) for share in self.pruned
        ]
        for share in self.noise:
            setting = f"noise of {share:.0%}"
            tries = [
                ask_changed(model, exam, setting, make_disturbance(model, share, self.seeds * seed + i))
                for i in range(self.seeds)
            ]
            val, test = (
                tuple(np.mean(rows, axis=0).tolist())
                for rows in ([way.val for way in tries], [way.test for way in tries])
            )
            ways.append(Setting(setting, val, test))
        return AttackResult(tuple(ways), budget={"seeds of noise": self.seeds})


def prune_matrix(matrix: Matrix, share: float) -> Matrix:
    """The matrix with a share of its weights, those nearest to 0, set to 0."""
    flat = matrix.flatten()
    nearest = flat.abs().argsort(stable=True)[: round(share * flat.numel())]
    return flat.index_fill(0, nearest, 0).reshape(matrix.shape)


def make_disturbance(model: Subject, share: float, seed: int) -> Callable[[Matrix], Matrix]:
    """A function that adds Gaussian noise to one matrix after the other."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def disturb(matrix: Matrix) -> Matrix:
        rms = matrix.square().mean(dim=1, keepdim=True).sqrt()
        draw = torch.randn(matrix.shape, generator=generator, device=matrix.device)
        return matrix + share * rms * draw

    return disturb
