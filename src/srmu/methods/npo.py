"""NPO: negative preference optimisation (Zhang et al., arXiv 2404.05868)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from srmu.engine.batch import Batch
from srmu.engine.losses import row_mean, token_nll
from srmu.engine.model import EditableModel
from srmu.engine.train import Terms
from srmu.methods.base import State
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class NPO(Retaining):
    """Lowers the likelihood of forget texts, ever more gently as it falls: bounded ascent."""

    name: ClassVar[str] = "npo"
    paper: ClassVar[str] = "arXiv 2404.05868"
    uses: ClassVar[tuple[str, ...]] = ("the original's likelihoods", "retain texts (retain)")

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(beta=(1e-6, float("inf")))

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def nll() -> Tensor:  # of each text, summed over its tokens (B,)
            return token_nll(model.logits(forget), forget["labels"]).sum(dim=1)

        with model.frozen():
            before = nll()
        # eq: NPO, L = -(2/beta) E log sigmoid(-beta log(p/p0)), log(p/p0) = nll0 - nll
        # (public ports took raw logits for log-probabilities, or means for the sums)
        terms = -2 / self.beta * F.logsigmoid(self.beta * (nll() - before))
        loss = row_mean(terms, forget["labels"])
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})
