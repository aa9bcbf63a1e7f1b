"""GA: gradient ascent on the forget texts (as run in TOFU, arXiv 2401.06121)."""

from dataclasses import dataclass
from typing import ClassVar

from srmu.engine.batch import Batch
from srmu.engine.losses import mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.train import Terms
from srmu.methods.base import State
from srmu.methods.logits import LogitObjective


@dataclass(frozen=True, kw_only=True)
class GA(LogitObjective):
    """Lowers the likelihood of forget texts without end; a stop rule ends it."""

    name: ClassVar[str] = "ga"
    paper: ClassVar[str] = "arXiv 2401.06121"
    spreads: ClassVar[bool] = True
    endless: ClassVar[bool] = True

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: GA, L = -mean nll(x_f)
        return Terms({"forget": -mean_nll(model.logits(forget), forget["labels"])}, {})
