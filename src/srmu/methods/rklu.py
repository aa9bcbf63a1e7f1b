"""RKLU: reverse KL to a teacher without the forget texts' part (ACL 2025.naacl-long.60)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from srmu.engine import losses
from srmu.methods.base import Batch, Count, EditableModel, Rate, State, Terms, Topic, Weight
from srmu.methods.logits import Retaining, strengthen_weights


@dataclass(frozen=True, kw_only=True)
class RKLU(Retaining):
    """Learns the original's logits without what fine-tuning on forget texts raises in them."""

    name = "rklu"
    paper = "ACL 2025.naacl-long.60"
    uses = ("the original's logits", "a model strengthened on the forget texts", "retain texts (retain)")

    strength: Weight = 5.0  # factor of the rise of a logit that is subtracted
    teacher_steps: Count = 40  # of fine-tuning on the forget texts
    teacher_learning_rate: Rate = 1e-5
    # Adding a constant to raw logits changes no distribution, but it changes their rise.
    logits: Literal["log_softmax", "raw"] = "log_softmax"
    select: Literal["none", "label_rise"] = "none"  # only tokens that fine-tuning made likelier

    def reads(self, topic: Topic) -> int:
        return self.teacher_steps

    def setup(self, model: EditableModel, topic: Topic) -> State:
        tuned = strengthen_weights(model, topic, self.teacher_steps, self.teacher_learning_rate)
        return State(memory={"strengthened": tuned})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def logits() -> Tensor:
            z = model.logits(forget).float()
            return z.log_softmax(-1) if self.logits == "log_softmax" else z

        with model.frozen():
            base = logits()
        with model.using(state.memory["strengthened"]):
            raised = logits()
        mask = losses.is_predicted(forget["labels"])
        if self.select == "label_rise":
            token = forget["labels"][:, 1:].clamp(min=0).unsqueeze(-1)  # (B, S, 1)
            mask = mask & ((raised - base)[:, :-1].gather(-1, token).squeeze(-1) > 0)
        # eq: RKLU, L = mean KL(p || softmax(z0 - strength relu(z+ - z0)))
        kl = losses.token_kl(model.logits(forget), losses.generic_logits(base, raised, self.strength))
        loss = losses.masked_mean(kl, mask, least=1)  # a batch may have none that rise
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})
