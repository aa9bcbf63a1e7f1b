"""SatImp: ascent weighted by saturation and by importance (Yang et al., arXiv 2505.11953)."""

from dataclasses import dataclass
from typing import Annotated

from srmu.engine import losses
from srmu.methods.base import Batch, Bounds, EditableModel, State, Terms
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class SatImp(Retaining):
    """Lowers the likelihood of forget texts' tokens that are neither forgotten already nor sure in any case."""

    name = "satimp"
    paper = "arXiv 2505.11953"
    uses = ("retain texts (retain)", "the original's logits (retain=kl)")

    beta1: Annotated[float, Bounds(1e-3, 1e3)] = 5.0  # power of p, small where a token is forgotten already
    beta2: Annotated[float, Bounds(0, 1e3)] = 1.0  # power of 1 - p, small where a token tells nothing; 0: WGA

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: SatImp, L = -mean p(y)^beta1 (1 - p(y))^beta2 nll(y), the weight a constant
        ascent = -losses.weighted_nll(model.logits(forget), forget["labels"], self.beta1, self.beta2)
        return Terms({"forget": ascent, **self.retain_loss(model, retain)}, {})
