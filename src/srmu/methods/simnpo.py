"""SimNPO: NPO without a reference, by likelihood per token (Fan et al., arXiv 2410.07163)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812

from srmu.engine.batch import Batch
from srmu.engine.losses import is_predicted, row_mean, token_nll
from srmu.engine.model import EditableModel
from srmu.engine.train import Terms
from srmu.methods.base import WEIGHT, State
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class SimNPO(Retaining):
    """Lowers forget texts' likelihood per token, less where it is low already: bounded ascent."""

    name: ClassVar[str] = "simnpo"
    paper: ClassVar[str] = "arXiv 2410.07163"
    uses: ClassVar[tuple[str, ...]] = ("retain texts (retain)",)

    beta: float = 2.5
    gamma: float = 0.0  # nats per token that are still too likely; gamma over beta in the paper
    weight: float = 1.0  # of the forget loss

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(beta=(1e-6, 1e6), gamma=(-1e6, 1e6), weight=WEIGHT)

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        labels = forget["labels"]
        nll = token_nll(model.logits(forget), labels).sum(dim=1)  # (B,)
        # Public ports divide by the unshifted labels: one too many per text.
        length = is_predicted(labels).sum(dim=1).clamp(min=1)
        # eq: SimNPO, L = -(2/beta) E log sigmoid(beta (nll/|y| - gamma))
        # gamma as in the code; in the paper it stands outside: gamma_paper = beta gamma
        terms = -2 / self.beta * F.logsigmoid(self.beta * (nll / length - self.gamma))
        loss = row_mean(terms, labels)
        return Terms({"forget": self.weight * loss, **self.retain_loss(model, retain)}, {})
