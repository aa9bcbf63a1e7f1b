"""What each process of a run holds, by arithmetic; what is free here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

DEVICES = (24, 48, 80, 141)  # GB of the common GPUs
PROCESSES = (1, 2, 4, 8)
MORE = (16, 64)  # where a part of 8 is more than `LARGE` holds
LARGE = 80e9
STANDING = ("originals", "last_good", "masters", "moments")  # held from the first step to the last
KEPT_PIECES = 4  # on the CPU: what stays with a process of pieces it gathered and freed, measured


@dataclass(frozen=True)
class TensorSizes:
    """How many numbers a model has, by the pieces in which `--shard` cuts it."""

    layers: tuple[int, ...]
    ends: tuple[int, ...]  # embeddings and head, where they are apart: cut as the layers are
    rest: int  # the last norm, tied ends: whole in each process

    @property
    def total(self) -> int:
        return sum(self.layers) + sum(self.ends) + self.rest

    def part(self, processes: int) -> int:
        return -(-(sum(self.layers) + sum(self.ends)) // processes) + self.rest


@dataclass(frozen=True)
class StepVariant:
    """A way to make a step, measured on a whole batch in one process."""

    trained: TensorSizes  # with adapters: what they stand beside
    lora: int = 0  # the rank of adapters; 0: the tensors themselves are trained
    adapters: int = 0  # numbers of theirs
    activations: int = 0  # bytes that a pass leaves for its gradient
    flops: int = 0
    caching: bool = False
    cache: int = 0  # bytes of activations kept from step to step
    sharded: bool = False
    offloaded: tuple[int, ...] = ()  # numbers of the layers left on the disk, which come one by one


@dataclass(frozen=True)
class TrainedModel:
    """A model as it is held while it is trained."""

    size: TensorSizes
    itemsize: int  # bytes of a number
    mixed: bool  # float32 masters of smaller numbers are trained
    gpu: bool


def held_bytes(model: TrainedModel, way: StepVariant, processes: int, share: float) -> dict[str, int]:
    """Bytes that each of so many processes holds, by what they are for.

    Each process reads `share` of a batch.
    """
    size, itemsize, gpu = model.size, model.itemsize, model.gpu
    cut = processes if way.sharded else 1
    beside = way.trained.part(cut)
    # adapters are float32 themselves
    trained, each = (way.adapters, 4) if way.lora else (beside, itemsize)
    mixed = model.mixed and not way.lora
    exact = 4 if mixed else each
    # While a piece runs it is there whole, beside what arrives of it; then its gradient is, and is
    # summed in float32.
    gathered, largest = 0, max(*way.trained.layers, *way.trained.ends, 0)
    if way.sharded:
        gathered = itemsize * (2 * max(*size.layers, *size.ends) + largest) + 4 * largest
        if not gpu:  # gloo sums in a copy of its own
            gathered += 4 * largest + KEPT_PIECES * itemsize * max(*size.layers, *size.ends)
    backward = gathered + max(way.activations * share, trained * each)
    # On a GPU AdamW works on all tensors at once, and makes one more copy of them. On the CPU it
    # takes one by one, and the C library keeps what a pass has freed: gradients come beside it.
    update = exact * (2 * trained if gpu else trained + (0 if way.lora else largest // cut))
    step = max(backward, update) if gpu else backward + update
    there = size.part(cut) - sum(way.offloaded) + max(way.offloaded, default=0)
    return {
        "weights": there * itemsize,
        "originals": beside * itemsize,
        "last_good": trained * each,
        "masters": trained * 4 if mixed else 0,
        "moments": 2 * trained * exact,
        "step": round(step),
        "cache": round(way.cache * share),
    }


def plan_launches(model: TrainedModel, ways: list[StepVariant], rows: int, spreads: bool) -> list[dict[str, Any]]:
    """What each process holds and computes: by their number, for each way to make a step.

    A batch has `rows` texts; without `spreads` the method runs in one process only.
    """
    launches: list[dict[str, Any]] = []
    for processes in (*PROCESSES, *MORE) if spreads else (1,):
        last = [row["memory_per_rank"] for row in launches if row["processes"] == PROCESSES[-1]]
        if processes in MORE and min(last) <= LARGE:
            break
        share = -(-rows // processes) / rows
        for way in ways:
            if way.sharded if processes == 1 else way.offloaded:
                continue
            parts = held_bytes(model, way, processes, share)
            memory = sum(parts.values())
            launches.append(
                {
                    "processes": processes,
                    "sharded": way.sharded,
                    "caching": way.caching,
                    "lora": way.lora,
                    "offloaded": bool(way.offloaded),
                    "memory_per_rank": memory,
                    "device_gb": next((n for n in DEVICES if memory <= n * 1e9), None),
                    "flops_per_rank_per_step": round(way.flops * share),
                    "parts": parts,
                }
            )
    return launches


def free_bytes(device: str) -> int:
    """Memory of the device that nothing holds."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def private_bytes() -> int:
    """The memory of this process that no file lies behind."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)
