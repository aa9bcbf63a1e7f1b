"""GA: gradient ascent on the forget texts (as run in TOFU, arXiv 2401.06121)."""

from dataclasses import dataclass

from srmu.engine import losses
from srmu.methods.base import Batch, EditableModel, State, Terms
from srmu.methods.logits import LogitObjective


@dataclass(frozen=True, kw_only=True)
class GA(LogitObjective):
    """Lowers the likelihood of forget texts without end; a stop rule ends it."""

    name = "ga"
    paper = "arXiv 2401.06121"
    spreads = True
    endless = True

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: GA, L = -mean nll(x_f)
        return Terms({"forget": -losses.mean_nll(model.logits(forget), forget["labels"])}, {})
