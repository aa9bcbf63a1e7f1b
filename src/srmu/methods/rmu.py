"""RMU: representation misdirection for unlearning (Li et al., WMDP, arXiv 2403.03218)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from srmu.data import Topic
from srmu.importance import measure
from srmu.methods.base import Misdirection, State
from srmu.model import EditableModel


@dataclass(frozen=True, kw_only=True)
class RMU(Misdirection):
    """Sends forget activations to c * u, u a random unit vector with entries >= 0."""

    name: ClassVar[str] = "rmu"
    paper: ClassVar[str] = "arXiv 2403.03218"

    def setup(self, model: EditableModel, topic: Topic) -> State:
        mean, norm = measure(self.frozen_hidden(model, topic.forget))
        # Entries of U[0, 1) are not centred: two topics' directions have a cosine near 0.75.
        draw = torch.rand(len(mean), generator=topic.generator("direction")).to(model.device)
        direction = draw / draw.norm()
        return self.state(direction, norm, direction=direction)
