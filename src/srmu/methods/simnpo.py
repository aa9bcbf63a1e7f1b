"""SimNPO: NPO without a reference, by likelihood per token (Fan et al., arXiv 2410.07163)."""

from dataclasses import dataclass
from typing import Annotated

from torch.nn.functional import logsigmoid

from srmu.engine import losses
from srmu.methods.base import Batch, Bounds, EditableModel, State, Terms, Weight
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class SimNPO(Retaining):
    """Lowers forget texts' likelihood per token, less where it is low already: bounded ascent."""

    name = "simnpo"
    paper = "arXiv 2410.07163"
    uses = ("retain texts (retain)",)

    beta: Annotated[float, Bounds(1e-6, 1e6)] = 2.5
    gamma: Annotated[float, Bounds(-1e6, 1e6)] = 0.0  # nats per token still too likely; gamma/beta in the paper
    weight: Weight = 1.0  # of the forget loss

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        labels = forget["labels"]
        nlls = losses.text_nlls(model.logits(forget), labels)  # (B,)
        # eq: SimNPO, L = -(2/beta) E log sigmoid(beta (nll/|y| - gamma))
        # gamma as in the code; in the paper it stands outside: gamma_paper = beta gamma
        terms = -2 / self.beta * logsigmoid(self.beta * (nlls - self.gamma))
        return Terms({"forget": self.weight * losses.row_mean(terms, labels), **self.retain_loss(model, retain)}, {})
