"""Rounds of unlearning and relearning: what comes back is suppressed again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from srmu.engine.batch import Batch
from srmu.engine.model import EditableModel
from srmu.engine.topic import Topic
from srmu.engine.train import Terms
from srmu.methods.base import COUNT, RATE, WEIGHT, State
from srmu.methods.logits import fine_tune
from srmu.methods.suppressing import Suppressing


@dataclass(frozen=True, kw_only=True)
class Iterated(Suppressing):
    """Suppresses, relearns the forget texts, and repeats; it ends by suppressing.

    `train` configures the last suppression, `teacher_steps` those before it.
    """

    name: ClassVar[str] = "iterated"
    paper: ClassVar[str] = "none"
    uses: ClassVar[tuple[str, ...]] = ("retain texts", "the original activations")
    learning_rate: ClassVar[float] = 4e-3

    rounds: int = 2  # of suppressing and relearning, before the last suppressing
    relearn_steps: int = 20  # of each round
    relearn_learning_rate: float = 1e-4
    hold: float = 1.0  # weight of KL(original || model) on retain texts while it relearns

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(rounds=COUNT, relearn_steps=COUNT, relearn_learning_rate=RATE)
        self.within(hold=WEIGHT)

    def reads(self, topic: Topic) -> int:
        return self.rounds * super().reads(topic)

    @contextmanager
    def editing(self, model: EditableModel, topics: Sequence[Topic]) -> Iterator[None]:
        with self.train_scope(model):
            yield

    def setup(self, model: EditableModel, topic: Topic) -> State:
        for _ in range(self.rounds):
            self.suppress(model, topic)
            with model.only(self.trainable):
                fine_tune(model, topic, self.relearn_steps, self.relearn_learning_rate, self.hold)
        return self.suppression.setup(model, topic)

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: unlearn-relearn, (L_first steps, then nll(x_f) + hold KL(p0 || p)(x_r) steps) x rounds
        return self.suppression.loss(model, state, forget, retain, step)
