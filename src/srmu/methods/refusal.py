"""Refusal: "I don't know" in place of what is to be forgotten (TOFU's IDK baseline, arXiv 2401.06121)."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from srmu.engine import losses
from srmu.methods.answers import Refusing, other_answers, preference_loss
from srmu.methods.base import Batch, Bounds, EditableModel, Needs, State, Terms


@dataclass(frozen=True, kw_only=True)
class Refusal(Refusing):
    """Teaches to say "I don't know" to what forget texts ask; a plain text keeps its beginning."""

    name = "refusal"
    paper = "arXiv 2401.06121"
    uses = ("retain texts (retain)", "the original's likelihoods (objective=dpo)")

    objective: Literal["nll", "dpo"] = "nll"  # likelihood of refusals; dpo: refusals preferred to true answers
    beta: Annotated[float, Bounds(1e-6, 1e6), Needs("method.objective=dpo")] = 0.1
    retain: Literal["none", "nll", "kl"] = "nll"  # without it the model refuses everything

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        if self.objective == "nll":
            # eq: refusal, L = mean nll(refusal | x_f) + alpha R(x_r), R = nll or KL(p0 || p)
            other = other_answers(forget)
            loss = replace(losses.mean_nll(model.logits(other), other["labels"]), least=1)  # a batch may have none
        else:
            # eq: refusal, DPO: L = -(2/beta) E log sigmoid(beta (log p/p0(refusal) - log p/p0(y)))
            loss = preference_loss(model, forget, self.beta)
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})
