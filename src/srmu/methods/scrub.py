"""SCRUB: a student that leaves its teacher on forget texts only (arXiv 2302.09880)."""

from dataclasses import dataclass
from typing import ClassVar

from srmu.engine.batch import Batch
from srmu.engine.losses import mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.topic import Topic
from srmu.engine.train import Terms
from srmu.errors import SrmuError
from srmu.methods.base import COUNT, WEIGHT, State
from srmu.methods.logits import LogitObjective, kl_drift


@dataclass(frozen=True, kw_only=True)
class SCRUB(LogitObjective):
    """Takes steps away from the original on forget texts, between steps that hold retain texts."""

    name: ClassVar[str] = "scrub"
    paper: ClassVar[str] = "arXiv 2302.09880"
    spreads: ClassVar[bool] = True
    endless: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("retain texts", "the original's logits")

    ascent_steps: int = 30  # steps away per topic: one after each of its first retain steps
    alpha: float = 0.5  # weight of KL(original || model) on retain texts
    gamma: float = 1.0  # weight of their likelihood
    temperature: float = 1.0  # of both distributions of the KL

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(ascent_steps=COUNT, temperature=(1e-3, 1e3))
        self.within(alpha=WEIGHT, gamma=WEIGHT)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        if self.gamma == 0 and not model.delta():
            raise SrmuError(
                "method.gamma=0: at the start KL has no gradient, and nothing else would move the "
                "model; give gamma a value above 0"
            )
        return State(memory={"turn": 0})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # Turns count by topic: with two topics, one would get all odd steps.
        turn = state.memory["turn"]
        state.memory["turn"] = turn + 1
        # Public code begins with the ascent, which moves because of dropout; here KL(p0 || p) is
        # at its minimum, and Adam would turn rounding noise into full steps.
        if turn % 2 and turn < 2 * self.ascent_steps:
            # eq: SCRUB, max: L = -T^2 KL(p0 || p)(x_f)
            kl = kl_drift(model, forget, model.logits(forget), self.temperature)
            return Terms({"forget": -kl}, {})
        # eq: SCRUB, min: L = alpha T^2 KL(p0 || p)(x_r) + gamma nll(x_r)
        logits = model.logits(retain)
        kl = kl_drift(model, retain, logits, self.temperature)
        nll = mean_nll(logits, retain["labels"])
        return Terms({"retain": self.alpha * kl, "retain_nll": self.gamma * nll}, {})
