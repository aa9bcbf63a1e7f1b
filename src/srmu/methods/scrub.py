"""SCRUB: a student that leaves its teacher on forget texts only (arXiv 2302.09880)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from srmu.engine import losses
from srmu.errors import SrmuError
from srmu.methods.base import Batch, Bounds, Count, EditableModel, State, Terms, Topic, Weight
from srmu.methods.logits import LogitObjective, kl_drift


@dataclass(frozen=True, kw_only=True)
class SCRUB(LogitObjective):
    """Takes steps away from the original on forget texts, between steps that hold retain texts."""

    name = "scrub"
    paper = "arXiv 2302.09880"
    spreads = True
    endless = True
    uses = ("retain texts", "the original's logits")

    ascent_steps: Count = 30  # turns away per topic: one after each of its first turns on retain texts
    turns: Literal["steps", "epochs"] = "steps"  # what a turn is; in the public code a pass over the texts
    alpha: Weight = 0.5  # weight of KL(original || model) on retain texts
    gamma: Weight = 1.0  # weight of their likelihood
    temperature: Annotated[float, Bounds(1e-3, 1e3)] = 1.0  # of both distributions of the KL; public code: 2 or 4

    def setup(self, model: EditableModel, topic: Topic) -> State:
        if self.gamma == 0 and not model.delta():
            why = "at the start KL has no gradient, and nothing else would move the model"
            raise SrmuError(f"method.gamma=0: {why}; give gamma a value above 0")
        lengths = [1, 1] if self.turns == "steps" else [len(topic.retain), len(topic.forget)]
        return State(memory={"step": 0, "lengths": lengths})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # Steps count by topic: with two topics, one would get all odd steps.
        held, away = state.memory["lengths"]
        turn, place = divmod(state.memory["step"], held + away)
        state.memory["step"] += 1
        # Not the ascent first, as in public code, which has dropout: at KL's minimum Adam steps along rounding noise.
        if place >= held and turn < self.ascent_steps:
            # eq: SCRUB, max: L = -T^2 KL(p0 || p)(x_f)
            return Terms({"forget": -kl_drift(model, forget, temperature=self.temperature)}, {})
        # eq: SCRUB, min: L = alpha T^2 KL(p0 || p)(x_r) + gamma nll(x_r)
        logits = model.logits(retain)
        kl = kl_drift(model, retain, logits, self.temperature)
        nll = losses.mean_nll(logits, retain["labels"])
        return Terms({"retain": self.alpha * kl, "retain_nll": self.gamma * nll}, {})
