"""The methods that compare the original with a model strengthened on the forget texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from srmu.engine.losses import generic_logits
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.resume import Checkpoints
from srmu.engine.topic import Topic, interleave_batches
from srmu.engine.train import NOWHERE, Log, TrainOptions
from srmu.methods.base import MethodOutcome
from srmu.methods.ensemble import combine_logits
from srmu.methods.logits import LogitObjective, strengthen_weights


@dataclass(frozen=True, kw_only=True)
class Reinforced(LogitObjective):
    """An objective whose labels are the original's logits less what fine-tuning raised in them.

    With mode=logits nothing is learnt: the fine-tuned tensors are what it leaves, and both models
    answer together.
    """

    mode: Literal["soft", "argmax", "logits"] = "soft"  # logits: learns nothing, two models answer
    strength: float = 5.0  # how often the rise of a logit is subtracted
    teacher_steps: int = 40  # of fine-tuning on the forget texts
    teacher_learning_rate: float = 1e-5  # of that fine-tuning

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(strength=(0, 1e6), teacher_steps=(1, 1e9), teacher_learning_rate=(1e-12, 1))

    def reads(self, topic: Topic) -> int:
        return self.teacher_steps

    @property
    def at_once(self) -> bool:
        return self.mode == "logits"

    @property
    def no_checkpoint(self) -> str:
        why = "is two models at inference; method.mode=soft distils it into one"
        return f"{self.name} with mode=logits {why}" if self.mode == "logits" else ""

    def apply(
        self,
        model: EditableModel,
        topics: Sequence[Topic],
        train: TrainOptions,
        log: Log,
        watch: Watch = ignore_progress,
        checkpoints: Checkpoints = NOWHERE,
    ) -> MethodOutcome:
        if self.mode != "logits":
            return super().apply(model, topics, train, log, watch, checkpoints)
        texts = replace(topics[0], forget=interleave_batches([topic.forget for topic in topics]))
        with self.editing(model, topics), watch("strengthening", self.teacher_steps) as tick:
            texts = texts.followed(partial(tick, self.name))
            tuned = strengthen_weights(model, texts, self.teacher_steps, self.teacher_learning_rate)
            copy_values([model.trained[name] for name in tuned], [*tuned.values()])
        return MethodOutcome({}, "strengthened")

    def at_inference(
        self, module: nn.Module, write: Callable[[], None]
    ) -> AbstractContextManager[Any]:
        if self.mode != "logits":
            return super().at_inference(module, write)
        return combine_logits(module, write, partial(generic_logits, strength=self.strength))
