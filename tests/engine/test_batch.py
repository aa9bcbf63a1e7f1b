"""A batch's key: made once, and the same wherever the batch is."""

import torch

from helpers.models import topic
from srmu.engine import topic as module
from srmu.engine.topic import Batch, move_batch


def test_a_key_names_tokens_and_mask_but_not_labels() -> None:
    batch = topic().forget[0]
    other = batch.replace(labels=batch["labels"].new_full(batch["labels"].shape, -100))
    assert batch.key == other.key == Batch(batch).key
    assert batch.key != batch.replace(input_ids=batch["input_ids"] + 1).key
    assert batch.key != batch.cut(slice(None, 1)).key


def test_tokens_are_hashed_once(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    batch, count = Batch(topic().forget[0]), 0
    digest = module.digest_tensors

    def counted(*tensors: torch.Tensor) -> str:
        nonlocal count
        count += 1
        return digest(*tensors)

    monkeypatch.setattr(module, "digest_tensors", counted)
    keys = {move_batch(batch, torch.device("cpu")).key for _ in range(3)}
    assert keys == {batch.key} and count == 1
    assert move_batch({}, "cpu") == {}
