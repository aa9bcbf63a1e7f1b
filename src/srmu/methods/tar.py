"""TAR, to first order: an adversary in the loop (Tamirisa et al., arXiv 2408.00761)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from srmu.engine.losses import is_predicted, masked_mean, token_entropy
from srmu.engine.model import EditableModel, copy_values
from srmu.methods.base import Batch, Count, Rate, State, Terms, Topic, Weight
from srmu.methods.logits import fine_tune, kl_drift
from srmu.methods.suppressing import Suppressing


@dataclass(frozen=True, kw_only=True)
class TAR(Suppressing):
    """Suppresses, then continues on every other forget batch from where an adversary has learned those between."""

    name = "tar"
    paper = "arXiv 2408.00761"
    uses = ("retain texts", "the original's logits")
    learning_rate = 1e-4

    tamper: Literal["entropy", "first"] = "entropy"  # first: the first method's forget loss
    strength: Weight = 1.0  # weight of that loss
    hold: Weight = 10.0  # weight of KL(original || model) on retain texts
    adversary_steps: Count = 4  # of its fine-tuning, which each step starts anew
    adversary_learning_rate: Rate = 1e-4  # of that fine-tuning

    def prepared(self, topic: Topic) -> Topic:
        return replace(super().prepared(topic), forget=topic.forget[::2])

    def setup(self, model: EditableModel, topic: Topic) -> State:
        state = self.suppress(model, topic)
        learned = list(topic.forget[1::2]) or list(topic.forget)
        return State(state.tensors, state.numbers, {"first": state, "learned": learned, "turn": 0})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        memory, weights = state.memory, [*model.trained.values()]
        start = [weight.detach().clone() for weight in weights]
        learned, begin = memory["learned"], memory["turn"] * self.adversary_steps
        memory["turn"] += 1
        batches = [learned[(begin + i) % len(learned)] for i in range(self.adversary_steps)]
        fine_tune(model, Topic("adversary", batches, []), self.adversary_steps, self.adversary_learning_rate)
        if self.tamper == "first":
            cost = self.suppression.loss(model, memory["first"], forget, forget, step).loss_values["forget"]
        else:
            cost = -masked_mean(token_entropy(model.logits(forget)), is_predicted(forget["labels"])).value
        slopes = torch.autograd.grad(self.strength * cost, weights, allow_unused=True, materialize_grads=True)
        copy_values(weights, start)
        # eq: TAR, to first order: the gradient of L(adv(theta)) is taken for that at theta
        pairs = zip(weights, slopes, strict=True)
        line = torch.stack([(weight.float() * slope.float()).sum() for weight, slope in pairs]).sum()
        held = self.hold * kl_drift(model, retain)
        return Terms({"forget": self.strength * cost.detach() + line - line.detach(), "retain": held}, {})
