"""NPO: negative preference optimisation (Zhang et al., arXiv 2404.05868)."""

from dataclasses import dataclass
from typing import Annotated

from torch.nn.functional import logsigmoid

from srmu.engine import losses
from srmu.methods.base import Batch, Bounds, EditableModel, State, Terms
from srmu.methods.logits import Retaining, log_ratios


@dataclass(frozen=True, kw_only=True)
class NPO(Retaining):
    """Lowers the likelihood of forget texts, ever more gently as it falls: bounded ascent."""

    name = "npo"
    paper = "arXiv 2404.05868"
    uses = ("the original's likelihoods", "retain texts (retain)")

    beta: Annotated[float, Bounds(1e-6, float("inf"))] = 0.1

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: NPO, L = -(2/beta) E log sigmoid(-beta log(p/p0))
        # (public ports took raw logits for log-probabilities, or means for the sums)
        terms = -2 / self.beta * logsigmoid(-self.beta * log_ratios(model, forget))
        return Terms({"forget": losses.row_mean(terms, forget["labels"]), **self.retain_loss(model, retain)}, {})
