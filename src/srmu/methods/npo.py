"""NPO: negative preference optimisation (Zhang et al., arXiv 2404.05868)."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from torch.nn.functional import logsigmoid

from srmu.engine import losses
from srmu.methods.base import Batch, Bounds, EditableModel, State, Terms
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class NPO(Retaining):
    """Lowers the likelihood of forget texts, ever more gently as it falls: bounded ascent."""

    name = "npo"
    paper = "arXiv 2404.05868"
    uses = ("the original's likelihoods", "retain texts (retain)")

    beta: Annotated[float, Bounds(1e-6, float("inf"))] = 0.1

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def nll() -> Tensor:  # of each text, summed over its tokens (B,)
            return losses.token_nll(model.logits(forget), forget["labels"]).sum(dim=1)

        with model.frozen():
            before = nll()
        # eq: NPO, L = -(2/beta) E log sigmoid(-beta log(p/p0)), log(p/p0) = nll0 - nll
        # (public ports took raw logits for log-probabilities, or means for the sums)
        terms = -2 / self.beta * logsigmoid(self.beta * (nll() - before))
        return Terms({"forget": losses.row_mean(terms, forget["labels"]), **self.retain_loss(model, retain)}, {})
