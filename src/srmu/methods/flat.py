"""FLAT: refusals far from true answers by an f-divergence, from forget texts alone (Wang et al., arXiv 2410.11143)."""

from dataclasses import dataclass, replace
from math import log
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from srmu.engine import losses
from srmu.methods.answers import Refusing, other_answers
from srmu.methods.base import Batch, EditableModel, State, Terms

LOG2 = log(2)


@dataclass(frozen=True, kw_only=True)
class FLAT(Refusing):
    """Moves likelihood from true answers to refusals, by their f-divergence; needs nothing but forget texts."""

    name = "flat"
    paper = "arXiv 2410.11143"
    uses = ("retain texts (retain)", "the original's logits (retain=kl)")

    divergence: Literal["total_variation", "kl", "jensen_shannon", "pearson"] = "total_variation"

    def judge(self, chances: Tensor) -> tuple[Tensor, Tensor]:
        """g*(P), which refusals are to raise, and f*(g*(P)), which true answers are to lower."""
        if self.divergence == "total_variation":
            return chances.tanh() / 2, chances.tanh() / 2
        if self.divergence == "kl":
            return chances, (chances - 1).exp()
        if self.divergence == "jensen_shannon":
            return LOG2 + logsigmoid(chances), -LOG2 - logsigmoid(-chances)
        return chances, chances**2 / 4 + chances

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        other = other_answers(forget)
        refused, true = (losses.text_chances(model.logits(batch), batch["labels"]) for batch in (other, forget))
        # eq: FLAT, L = E [f*(g*(P(y))) - g*(P(refusal))], P(y) = mean_i p(y_i | x, y_<i)
        terms = self.judge(true)[1] - self.judge(refused)[0]
        loss = replace(losses.row_mean(terms, other["labels"]), least=1)  # a batch may have none
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})
