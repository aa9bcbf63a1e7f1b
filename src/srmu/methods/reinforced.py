"""Methods that compare the original with a model strengthened on the forget texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from srmu.engine.losses import generic_logits
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.resume import Checkpoints
from srmu.engine.topic import Topic, interleave_batches
from srmu.engine.train import NOWHERE, Log, TrainOptions
from srmu.methods.base import COUNT, RATE, WEIGHT, MethodOutcome
from srmu.methods.logits import LogitObjective, strengthen_weights


@dataclass(frozen=True, kw_only=True)
class Reinforced(LogitObjective):
    """An objective whose labels are the original logits less what fine-tuning raised.

    With mode=logits nothing is learned: the result is the fine-tuned tensors, and both models
    answer together.
    """

    mode: Literal["soft", "argmax", "logits"] = "soft"  # logits: trains nothing, two models answer
    strength: float = 5.0  # factor of the rise of a logit that is subtracted
    teacher_steps: int = 40  # of fine-tuning on the forget texts
    teacher_learning_rate: float = 1e-5  # of that fine-tuning

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(strength=WEIGHT, teacher_steps=COUNT, teacher_learning_rate=RATE)

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
            texts = texts.with_tick(partial(tick, self.name))
            tuned = strengthen_weights(model, texts, self.teacher_steps, self.teacher_learning_rate)
            copy_values([model.trained[name] for name in tuned], [*tuned.values()])
        return MethodOutcome({}, "strengthened")

    def at_inference(self, module: nn.Module, write: Callable[[], None]) -> AbstractContextManager[Any]:
        if self.mode != "logits":
            return super().at_inference(module, write)
        return combine_logits(module, write, partial(generic_logits, strength=self.strength))


@contextmanager
def combine_logits(
    module: nn.Module, write: Callable[[], None], combine: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Run the block with a module whose logits are those before and after `write`, combined.

    It keeps no keys and values: one set of tensors would read those of the other.
    """
    places = dict(module.named_parameters())
    before = {name: place.detach().clone() for name, place in places.items()}
    write()
    before = {name: old for name, old in before.items() if not torch.equal(old, places[name])}
    after = {name: places[name].data for name in before}
    inner: Any = module.forward
    generate: Any = module.generate

    def put(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            places[name].data = tensor

    # Evals and `generate` choose what to pass by these names: positions, but no past.
    def forward(
        input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **options: Any
    ) -> Any:
        named = {"attention_mask": attention_mask, "position_ids": position_ids}
        options |= {name: value for name, value in named.items() if value is not None}
        options |= {"use_cache": False, "past_key_values": None}
        put(before)
        try:
            old = inner(input_ids, **options).logits
        finally:
            put(after)
        output = inner(input_ids, **options)
        output.logits = combine(old, output.logits).to(old.dtype)
        return output

    def uncached(*args: Any, **options: Any) -> Any:
        return generate(*args, **options | {"use_cache": False})

    with patch.object(module, "forward", forward), patch.object(module, "generate", uncached):
        yield
