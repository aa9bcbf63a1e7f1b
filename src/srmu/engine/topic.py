"""A topic: what to forget and what to retain beside it, as batches of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, cycle, repeat, zip_longest
from typing import Any, Literal

import torch
from torch import Tensor

from srmu.engine.activation_cache import digest_tensors
from srmu.engine.losses import is_counted
from srmu.errors import SrmuError

Padding = Literal["mask", "count"]


class Batch(dict[str, Tensor]):
    """Texts as tokens: `input_ids`, `attention_mask` and `labels`, (B, T) each: `batch["labels"]`.

    Losses skip labels of -100. A batch is never changed in place: what a model computes from it is kept under its key.
    """

    @cached_property
    def key(self) -> str:
        """A digest of all that activations depend on: the tokens and their mask."""
        return digest_tensors(self["input_ids"], self["attention_mask"])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch({name: change(tensor) for name, tensor in self.items()})

    def cut(self, rows: Any = slice(None), tokens: Any = slice(None)) -> Batch:
        """Some rows and columns of the batch."""
        return self.map(lambda tensor: tensor[rows][:, tokens])

    def replace(self, **tensors: Tensor) -> Batch:
        return Batch({**self, **tensors})


def move_batch(batch: Mapping[str, Tensor], device: torch.device | str) -> Batch:
    """The batch on a device, under the same key."""
    moved = Batch({name: tensor.to(device) for name, tensor in batch.items()})
    if batch and isinstance(batch, Batch):
        moved.key = batch.key
    return moved


@dataclass(frozen=True)
class Topic:
    """One thing to forget and what to retain beside it, as batches of tokens.

    `vocabulary` holds the ids of ordinary tokens. `options` replace those of the method. `counts` describes
    the texts without quoting them. `own` holds texts that the original model wrote, which are never saved.
    """

    name: str
    forget: Sequence[Batch]
    retain: Sequence[Batch]
    seed: int = 0
    vocabulary: Tensor = field(default_factory=lambda: torch.arange(0))
    options: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    own: Sequence[Sequence[int]] = ()
    tick: Callable[[], None] = lambda: None  # reports a unit of progress; see `with_tick`

    def pairs(self) -> Iterator[tuple[Batch, Batch]]:
        """Endless (forget, retain) batches in order; the shorter set starts again, an empty one gives empty batches."""
        forget, retain = (repeat(batches or [Batch()]) for batches in (self.forget, self.retain))
        return zip(chain.from_iterable(forget), chain.from_iterable(retain), strict=False)

    def split(self) -> Topic:
        """This topic's forget texts as prompts with answers: only answers keep their labels.

        Texts of a chat template stay as they are. A plain text is cut at a random place between a quarter and three
        quarters of its ordinary tokens, with at least one token on either side.
        """
        generator = self.generator("split")

        def cut(batch: Batch) -> Batch:
            labels = batch["labels"].clone()
            words = torch.isin(batch["input_ids"], self.vocabulary)
            given = words & batch["attention_mask"].bool() & ~is_counted(labels)
            for row, marks, question in zip(labels, is_counted(labels) & words, given, strict=True):
                places = marks.nonzero()[:, 0]
                share = 0.25 + 0.5 * float(torch.rand((), generator=generator))
                if not question.any():
                    first = min(max(1, round(share * len(places))), len(places) - 1)
                    row[: places[first]] = -100
            return batch.replace(labels=labels)

        return replace(self, forget=[cut(batch) for batch in self.forget])

    def with_tick(self, tick: Callable[[], None]) -> Topic:
        """This topic, calling `tick` after each use of one of its batches."""
        forget, retain = FollowedBatches(self.forget, tick), FollowedBatches(self.retain, tick)
        return replace(self, forget=forget, retain=retain, tick=tick)

    def generator(self, purpose: str, shared: bool = False) -> torch.Generator:
        """A random generator for one purpose, the same in every run; if `shared`, also for all topics."""
        return torch.Generator().manual_seed(self.number(purpose, shared))

    def number(self, purpose: str, shared: bool = False) -> int:
        key = f"{self.seed}/{purpose}/{'' if shared else self.name}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1

    def add_anchors(self, share: float) -> Topic:
        """This topic with a share of each retain batch replaced, once, by random tokens or by its `own` texts."""
        generator = self.generator("anchors")
        texts = cycle(self.own)
        largest = max(len(batch["input_ids"]) for batch in self.retain)
        if round(share * largest) == 0:
            raise SrmuError(f"anchor_share={share:g} of a retain batch of {largest} is less than one row; raise it")

        def mix(batch: Batch) -> Batch:
            ids, mask, labels = (batch[k].clone() for k in ("input_ids", "attention_mask", "labels"))
            start = len(ids) - round(share * len(ids))
            if self.own:
                ids[start:], mask[start:], labels[start:] = 0, 0, -100
                for row in range(start, len(ids)):
                    text = torch.tensor(next(texts)[: ids.shape[1]])
                    ids[row, : len(text)], mask[row, : len(text)], labels[row, : len(text)] = text, 1, text
            elif start < len(ids):
                draw = torch.randint(len(self.vocabulary), ids[start:].shape, generator=generator)
                drawn = self.vocabulary[draw]
                first = ids[start:, 0]  # a leading <s> stays
                drawn[:, 0] = torch.where(torch.isin(first, self.vocabulary), drawn[:, 0], first)
                ids[start:], mask[start:], labels[start:] = drawn, 1, drawn
            return Batch(input_ids=ids, attention_mask=mask, labels=labels)

        return replace(self, retain=[mix(batch) for batch in self.retain])


class FollowedBatches(list[Batch]):
    """Batches that call `tick` after a loop has used each of them."""

    def __init__(self, batches: Sequence[Batch], tick: Callable[[], None]) -> None:
        super().__init__(batches)
        self.tick = tick

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return FollowedBatches(part, self.tick) if isinstance(key, slice) else part

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield batch
            self.tick()


def interleave_batches(parts: Sequence[Sequence[Batch]]) -> list[Batch]:
    """The first batch of each part, then the second of each, and so on."""
    return [batch for row in zip_longest(*parts) for batch in row if batch is not None]
