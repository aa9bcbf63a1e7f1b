"""WGA: gradient ascent with each token weighted by its likelihood (Wang et al., arXiv 2502.19301)."""

from dataclasses import dataclass
from typing import Annotated

from srmu.engine import losses
from srmu.methods.base import Batch, Bounds, EditableModel, State, Terms
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class WGA(Retaining):
    """Lowers the likelihood of forget texts, each token less the less likely it is already: bounded ascent."""

    name = "wga"
    paper = "arXiv 2502.19301"
    uses = ("retain texts (retain)", "the original's logits (retain=kl)")

    beta: Annotated[float, Bounds(1e-3, 1e3)] = 1.0  # power of a token's likelihood; near 0: GA

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: WGA, L = -mean p(y)^beta nll(y), the weight p(y)^beta a constant
        ascent = -losses.weighted_nll(model.logits(forget), forget["labels"], self.beta)
        return Terms({"forget": ascent, **self.retain_loss(model, retain)}, {})
