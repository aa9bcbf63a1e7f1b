"""Rounds of unlearning and relearning: what comes back is suppressed again."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from srmu.methods.base import Batch, Count, EditableModel, Rate, State, Terms, Topic, Weight
from srmu.methods.logits import fine_tune
from srmu.methods.suppressing import TEACHER_RATE, Suppressing


@dataclass(frozen=True, kw_only=True)
class Iterated(Suppressing):
    """Suppresses, relearns the forget texts, and repeats; it ends by suppressing, which `train` configures."""

    name = "iterated"
    uses = ("retain texts", "the original activations")
    learning_rate = TEACHER_RATE
    scales = True

    rounds: Count = 2  # of suppressing and relearning, before the last suppressing
    relearn_steps: Count = 20  # of each round
    relearn_learning_rate: Rate = 1e-4
    hold: Weight = 1.0  # weight of KL(original || model) on retain texts while it relearns

    def editing(self, model: EditableModel, topics: Sequence[Topic]) -> AbstractContextManager[None]:
        return self.train_scope(model)

    def reads(self, topic: Topic) -> int:
        return self.rounds * super().reads(topic)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        for _ in range(self.rounds):
            self.suppress(model, topic)
            with model.only(self.trainable):
                fine_tune(model, topic, self.relearn_steps, self.relearn_learning_rate, self.hold)
        return self.suppression.setup(model, topic)

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: unlearn-relearn, (L_first steps, then nll(x_f) + hold KL(p0 || p)(x_r) steps) x rounds
        return self.suppression.loss(model, state, forget, retain, step)
