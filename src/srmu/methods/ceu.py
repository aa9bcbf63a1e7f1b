"""CE-U: cross entropy to the model's own distribution without the true token (Yang, arXiv 2503.01224)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srmu.engine import losses
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.methods.base import Amount, Batch, EditableModel, State, Terms, Topic
from srmu.methods.logits import Retaining


@dataclass(frozen=True, kw_only=True)
class CEU(Retaining):
    """Learns what the model itself would say if the true token were impossible, anew in each step."""

    name = "ceu"
    paper = "arXiv 2503.01224"
    uses = ("retain texts (retain)", "the original's logits (retain=kl)")

    skip: Amount = 0  # predicted tokens at the start of each text or answer that are left out; in public code 1

    def taught(self, labels: Tensor) -> Tensor:
        """The predicted tokens that are learnt, (B, S)."""
        mask = losses.is_predicted(labels)
        return mask & (mask.cumsum(dim=1) > self.skip)

    def check(self, topics: Sequence[Topic], train: TrainOptions) -> None:
        super().check(topics, train)
        for topic in topics:
            if not any(self.taught(batch["labels"]).any() for batch in topic.forget):
                raise SrmuError(
                    f"method.skip={self.skip} leaves no token of topic {topic.name}'s forget texts; lower it"
                )

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        token = forget["labels"][:, 1:].clamp(min=0).unsqueeze(-1)  # (B, S, 1)
        logits = model.logits(forget)[:, :-1].float()
        # eq: CE-U, q = softmax(z with z(y) = -inf), a constant; L = mean CE(q, softmax(z))
        target = logits.detach().scatter(-1, token, -torch.inf).softmax(-1)
        entropy = -(target * logits.log_softmax(-1)).sum(-1)  # (B, S)
        loss = losses.masked_mean(entropy, self.taught(forget["labels"]), least=1)  # a batch may have none left
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})
