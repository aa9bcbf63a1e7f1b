"""GradDiff: gradient ascent on forget texts beside descent on retain texts (arXiv 2203.12817)."""

from dataclasses import dataclass
from typing import Literal

from srmu.engine import losses
from srmu.methods.base import Batch, EditableModel, State, Terms, Weight
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class GradDiff(Retaining):
    """Lowers the likelihood of forget texts and holds retain texts by likelihood or KL."""

    name = "graddiff"
    paper = "arXiv 2203.12817"
    endless = True
    uses = ("retain texts", "the original's logits (retain=kl)")

    retain: Literal["nll", "kl"] = "nll"
    gamma: Weight = 1.0  # weight of the ascent

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: GradDiff, L = -gamma nll(x_f) + alpha R(x_r), R = nll or KL(p0 || p)
        ascent = -self.gamma * losses.mean_nll(model.logits(forget), forget["labels"])
        return Terms({"forget": ascent, **self.retain_loss(model, retain)}, {})
