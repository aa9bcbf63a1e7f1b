"""RMU, and the methods that change its strength, its retain target or what it reads."""

from dataclasses import dataclass

from srmu.methods.base import EditableModel, State, Topic
from srmu.methods.importance import draw_direction, measure_features
from srmu.methods.misdirection import Misdirection


@dataclass(frozen=True, kw_only=True)
class RMU(Misdirection):
    """Sends forget activations to c * u, u a random unit vector with entries >= 0."""

    name = "rmu"
    paper = "arXiv 2403.03218"

    def setup(self, model: EditableModel, topic: Topic) -> State:
        mean, norm = measure_features(self.frozen_sums(model, topic.forget, keep=False))
        # eq: RMU, T = c u, u = r / |r|, r ~ U[0,1)^D
        u = draw_direction("unit_uniform", len(mean), topic.generator("direction")).to(model.device)
        return self.state(u, norm, direction=u)
