"""RNA: random noise augmentation of RMU's retain target (Huu-Tien et al., arXiv 2501.19202)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from srmu.methods.base import EditableModel, State, Topic, Weight
from srmu.methods.importance import measure_features
from srmu.methods.rmu import RMU


@dataclass(frozen=True, kw_only=True)
class RNA(RMU):
    """RMU that holds retain activations to noisy copies, so that forget words in them do less."""

    name = "rna"
    paper = "arXiv 2501.19202"
    spreads = False  # each step draws for a whole batch
    measures = ("forget", "retain")

    # The paper uses absolute units, which differ in meaning between models and layers.
    noise: Weight = 0.1  # standard deviation, over the root mean square of h0's retain features

    def setup(self, model: EditableModel, topic: Topic) -> State:
        state = super().setup(model, topic)
        sizes, _ = measure_features(self.frozen_sums(model, topic.retain), "rms")  # of each feature
        state.numbers["noise"] = self.noise * float(sizes.square().mean().sqrt())
        state.memory["noise"] = topic.generator("retain noise")
        return state

    def retain_target(self, state: State, anchor: Tensor) -> Tensor:
        draw = torch.randn(anchor.shape, generator=state.memory["noise"])
        # eq: RNA, h0(x_r) + delta, delta ~ N(0, nu I), drawn anew in each step
        return anchor.float() + state.numbers["noise"] * draw.to(anchor.device)
