"""A batch of texts as tokens, under a key of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from srmu.engine.activation_cache import digest_tensors


class Batch(dict[str, Tensor]):
    """Texts as tokens: `input_ids`, `attention_mask` and `labels`, (B, T) each.

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
