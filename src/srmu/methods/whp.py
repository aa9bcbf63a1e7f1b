"""WHP: Who's Harry Potter (Eldan and Russinovich, arXiv 2310.02238)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from srmu.engine.batch import Batch, move_batch
from srmu.engine.losses import generic_logits, is_predicted, masked_mean
from srmu.engine.model import EditableModel
from srmu.engine.topic import Topic
from srmu.engine.train import Terms
from srmu.methods.base import State
from srmu.methods.logits import strengthen_weights
from srmu.methods.reinforced import Reinforced
from srmu.methods.whp_terms import anchors_for, read_anchors, translate_batch


@dataclass(frozen=True, kw_only=True)
class WHP(Reinforced):
    """Learns what a model that never read the forget texts would say in their place."""

    name: ClassVar[str] = "whp"
    paper: ClassVar[str] = "arXiv 2310.02238"
    uses: ClassVar[tuple[str, ...]] = (
        "the original's logits",
        "a model strengthened on the forget texts",
        "generic terms for the topic's own (anchors)",
    )

    anchors: str | None = None  # a JSON file of {term: generic term}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("anchors", self.mode != "logits", "method.mode=soft or argmax")
        if self.anchors is not None:
            read_anchors(self.anchors)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        anchors = None if self.anchors is None else anchors_for(model.folder, self.anchors, topic)
        tuned = strengthen_weights(model, topic, self.teacher_steps, self.teacher_learning_rate)
        return State(memory={"strengthened": tuned, "anchors": anchors})

    def generic_target(self, model: EditableModel, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits without the topic at each position, and the positions to learn from."""
        usable = is_predicted(batch["labels"])
        with model.frozen():
            base = model.logits(batch).float()
            if state.memory["anchors"] is not None:
                translation = translate_batch(batch, state.memory["anchors"])
                base = translation.align_logits(model.logits(move_batch(translation.batch, model.device)).float(), base)
                usable = usable & translation.usable[:, :-1].to(model.device)
        with model.using(state.memory["strengthened"]):
            raised = model.logits(batch)
        # eq: WHP, v = v0 - strength relu(v+ - v0)
        # (of raw logits, as in the paper: a constant added to one of them would change v)
        return generic_logits(base, raised, self.strength)[:, :-1], usable

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        target, usable = self.generic_target(model, state, forget)
        log_p = model.logits(forget)[:, :-1].float().log_softmax(-1)
        # eq: WHP, L = mean CE(softmax(v), p), or CE(argmax v, p)
        if self.mode == "argmax":
            costs = -log_p.gather(-1, target.argmax(-1, keepdim=True)).squeeze(-1)
        else:
            costs = -(target.softmax(-1) * log_p).sum(-1)
        return Terms({"forget": masked_mean(costs, usable, least=1)}, {})
