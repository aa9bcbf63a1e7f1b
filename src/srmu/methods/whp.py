"""WHP: Who's Harry Potter (Eldan and Russinovich, arXiv 2310.02238)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from srmu.engine.losses import generic_logits, is_predicted, masked_mean
from srmu.engine.model import copy_values
from srmu.engine.topic import interleave_batches, move_batch
from srmu.methods.base import Batch, Count, EditableModel, MethodOutcome, Rate, Session, State, Terms, Topic, Weight
from srmu.methods.logits import LogitObjective, strengthen_weights
from srmu.methods.two_models import combine_logits
from srmu.methods.whp_terms import anchors_for, read_anchors, translate_batch


@dataclass(frozen=True, kw_only=True)
class WHP(LogitObjective):
    """Learns what a model that never read the forget texts would say in their place."""

    name = "whp"
    paper = "arXiv 2310.02238"
    uses = ("the original's logits", "a model strengthened on the forget texts", "generic terms for its own (anchors)")

    mode: Literal["soft", "argmax", "logits"] = "soft"  # logits: trains nothing, two models answer
    strength: Weight = 5.0  # factor of the rise of a logit that is subtracted
    teacher_steps: Count = 40  # of fine-tuning on the forget texts
    teacher_learning_rate: Rate = 1e-5  # of that fine-tuning
    anchors: str | None = None  # a JSON file of {term: generic term}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("anchors", not self.at_once, "method.mode=soft or argmax")
        if self.anchors is not None:
            read_anchors(self.anchors)

    def reads(self, topic: Topic) -> int:
        return self.teacher_steps

    @property
    def at_once(self) -> bool:
        return self.mode == "logits"

    @property
    def no_checkpoint(self) -> str:
        why = "whp with mode=logits is two models at inference; method.mode=soft distils it into one"
        return why if self.at_once else ""

    def change(self, model: EditableModel, topics: Sequence[Topic], session: Session) -> MethodOutcome:
        if not self.at_once:
            return super().change(model, topics, session)
        texts = replace(topics[0], forget=interleave_batches([topic.forget for topic in topics]))
        with self.editing(model, topics), session.watch("strengthening", self.teacher_steps) as tick:
            texts = texts.with_tick(partial(tick, self.name))
            tuned = strengthen_weights(model, texts, self.teacher_steps, self.teacher_learning_rate)
            copy_values([model.trained[name] for name in tuned], [*tuned.values()])
        return MethodOutcome({}, "strengthened")

    def at_inference(self, module: nn.Module, write: Callable[[], None]) -> AbstractContextManager[Any]:
        if not self.at_once:
            return super().at_inference(module, write)
        return combine_logits(module, write, partial(generic_logits, strength=self.strength))

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
