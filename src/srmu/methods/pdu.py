"""PDU: flat logits on forget texts under a limit on retain texts (Entesari et al., arXiv 2506.05314)."""

from dataclasses import dataclass

import torch

from srmu.engine import losses
from srmu.engine.topic import move_batch
from srmu.methods.base import Batch, EditableModel, State, Terms, Topic, Weight
from srmu.methods.logits import LogitObjective


@dataclass(frozen=True, kw_only=True)
class PDU(LogitObjective):
    """Flattens the logits of forget texts; what retain texts weigh follows their cost, which has a limit."""

    name = "pdu"
    paper = "arXiv 2506.05314"
    uses = ("retain texts",)

    slack: Weight = 0.1  # share by which a retain token may cost more than by the original
    alpha: Weight = 50.0  # weight of the retain loss at the start: flattening has large values
    rate: Weight = 1.0  # by which that weight changes in a step, times the nats above or below the limit

    def reads(self, topic: Topic) -> int:
        return len(topic.retain)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        with model.frozen():
            batches = (move_batch(batch, model.device) for batch in topic.retain)
            cost = losses.average_means([losses.mean_nll(model.logits(batch), batch["labels"]) for batch in batches])
        # eq: PDU, epsilon = (1 + slack) nll0(x_r)
        return State(numbers={"limit": (1 + self.slack) * cost}, memory={"alpha": self.alpha})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        logits = model.logits(forget)[:, :-1].float()
        margins = logits.amax(-1) - logits.mean(-1)  # (B, S)
        flatness = losses.masked_mean(margins.square(), losses.is_predicted(forget["labels"]))
        cost = losses.mean_nll(model.logits(retain), retain["labels"])
        weight = state.memory["alpha"]
        # eq: PDU, L = mean (max z - mean z)^2 + lambda nll(x_r), then lambda += rate (nll(x_r) - epsilon), at least 0
        over = float(cost.value.detach()) - state.numbers["limit"]
        state.memory["alpha"] = max(0.0, weight + self.rate * over)
        return Terms({"forget": flatness, "retain": weight * cost}, {"alpha": torch.tensor(weight)})
