"""What a run will load, hold and compute, before any weight is read."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from srmu import weights
from srmu.config import Config
from srmu.data import Topic
from srmu.model import ROLES

ITEM = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}  # bytes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROBE_SECONDS = 0.3


def estimate(config: Config, folder: Path, topics: Sequence[Topic]) -> dict[str, Any]:
    """Tensors and bytes to read, memory, FLOPs and time of a run.

    Memory leaves activations out; time takes the speed of a short matrix product here for that of
    the whole run, so both are lower bounds.
    """
    method = config.method
    shapes, item = tensor_shapes(folder, method.depth)
    matrices = {n: prod(s) for n, s in shapes.items() if len(s) > 1 and layer_of(n) is not None}
    updated = chosen(shapes, method.trainable)
    trained = sum(prod(shapes[name]) for name in updated)
    first = min((layer_of(name) or 0 for name in updated), default=0)
    above = sum(size for name, size in matrices.items() if (layer_of(name) or 0) > first)

    forget, retain = (
        sum(b["input_ids"].numel() for topic in topics for b in getattr(topic, role))
        / sum(len(getattr(topic, role)) for topic in topics)
        for role in ("forget", "retain")
    )  # tokens of a batch, padding included
    forward = 2 * sum(matrices.values())  # FLOPs a token; attention scores are left out
    backward = 2 * (trained + above)  # gradients of the weights, and of what lies above the first
    flops = forward * (forget + 2 * retain) + backward * (forget + retain)

    read = sum(prod(shape) * item[name] for name, shape in shapes.items())
    kind = DTYPES.get(config.dtype, torch.bfloat16 if 2 in item.values() else torch.float32)
    size = kind.itemsize
    masters = 4 if size == 2 and config.train.weights == "fp32" else 0
    adam = 8 if masters or size == 4 else 2 * size
    # Beside the weights: the originals, the last good state, gradients, masters, two moments.
    memory = sum(map(prod, shapes.values())) * size + trained * (3 * size + masters + adam)
    return {
        "tensors_read": len(shapes),
        "bytes_read": read,
        "trained_parameters": trained,
        "memory_bytes_without_activations": memory,
        "flops_per_step": round(flops),
        "seconds_at_least": round(config.train.max_steps * flops / speed(kind, config.device), 1),
    }


def tensor_shapes(
    folder: Path, depth: int | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shape and bytes an element of each tensor that a model of `depth` layers touches."""
    shapes, item = {}, {}
    for path in sorted(set(weights.shards(folder).values())):
        for name, entry in weights.header(path)[0].items():
            layer = layer_of(name)
            deep = depth is not None and (
                layer >= depth if layer is not None else name.startswith(("lm_head", "embed_out"))
            )
            if name != "__metadata__" and not deep:
                shapes[name] = tuple(entry["shape"])
                item[name] = ITEM.get(entry["dtype"], 4)
    return shapes, item


def chosen(shapes: Mapping[str, Any], trainable: Sequence[str]) -> list[str]:
    """The tensors that roles by layer and glob patterns select, by their checkpoint names."""
    names: list[str] = []
    for pattern in trainable:
        layer, _, role = pattern.partition(".")
        if layer.isdigit() and role in ROLES:
            ends = tuple(f".{layer}.{name}" for name in ROLES[role])
            names += [name for name in shapes if f".{name}".endswith(ends)]
        else:
            names += fnmatch.filter(shapes, pattern)
    return names


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, by the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def speed(dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of a matrix product here."""
    n = 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    a @ a  # the first product sets things up
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < PROBE_SECONDS:
        (a @ a)[0, 0].item()  # waits for the device
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - start)
