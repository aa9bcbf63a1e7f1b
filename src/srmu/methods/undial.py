"""UNDIAL: self-distillation with the true token's logit lowered (Dong et al., arXiv 2402.10052)."""

from dataclasses import dataclass

from srmu.engine import losses
from srmu.methods.base import Batch, EditableModel, State, Terms, Weight
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class UNDIAL(Retaining):
    """Learns the original's own next-token distribution with the true token made less likely."""

    name = "undial"
    paper = "arXiv 2402.10052"
    uses = ("the original's logits", "retain texts (retain)")

    strength: Weight = 10.0  # subtracted from the true token's logit

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # Public ports index with the label -100, which lowers a wrong token, and count padding.
        token = forget["labels"][:, 1:].clamp(min=0).unsqueeze(-1)  # (B, S, 1)
        with model.frozen():
            before = model.logits(forget)[:, :-1].float()  # in float32, whatever the model
        # eq: UNDIAL, q = softmax(z0 - strength onehot(y)), L = mean CE(q, p)
        lowered = before.scatter_add(-1, token, before.new_full(token.shape, -self.strength))
        log_p = model.logits(forget)[:, :-1].float().log_softmax(-1)
        entropy = -(lowered.softmax(-1) * log_p).sum(-1)  # (B, S)
        loss = losses.masked_mean(entropy, losses.is_predicted(forget["labels"]))
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})
