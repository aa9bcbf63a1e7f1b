"""GradDiff: gradient ascent on forget texts beside descent on retain texts (arXiv 2203.12817)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from srmu.engine.batch import Batch
from srmu.engine.losses import mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.train import Terms
from srmu.methods.base import WEIGHT, State
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class GradDiff(Retaining):
    """Lowers the likelihood of forget texts and holds retain texts by likelihood or KL."""

    name: ClassVar[str] = "graddiff"
    paper: ClassVar[str] = "arXiv 2203.12817"
    endless: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("retain texts", "the original's logits (retain=kl)")

    retain: Literal["nll", "kl"] = "nll"
    gamma: float = 1.0  # weight of the ascent

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(gamma=WEIGHT)

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: GradDiff, L = -gamma nll(x_f) + alpha R(x_r), R = nll or KL(p0 || p)
        ascent = -self.gamma * mean_nll(model.logits(forget), forget["labels"])
        return Terms({"forget": ascent, **self.retain_loss(model, retain)}, {})
