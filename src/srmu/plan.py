"""What a run will load, hold, compute and take, before any weight is read.

The model is built without memory behind its tensors, and one step is run on it under a meter: the
numbers come from the operations of the very code that will run, on any architecture.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig

from srmu import weights
from srmu.cache import Activations
from srmu.config import Config
from srmu.data import Topic
from srmu.loading import converts, read_config, skeleton
from srmu.losses import token_mse
from srmu.methods import RMU
from srmu.model import Batch, EditableModel, Site
from srmu.train import TrainOptions, fit

PROBE_SECONDS = 2.0
EVERYTHING = 1 << 62  # bytes
FAR = 32 << 20  # bytes of an operation's tensors that no processor's cache holds


class Meter(TorchDispatchMode):
    """Counts the operations that run in its block: FLOPs, bytes moved by the others, memory."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.near = self.far = self.operations = self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        packet = func._overloadpacket
        aliases = [value.alias_info for value in func._schema.returns]
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.aten._grouped_mm:  # experts; torch has no count for it
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif not any(alias is not None and not alias.is_write for alias in aliases):  # no view
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            moved = sum(x.numel() * x.element_size() for x in tensors)
            if moved > FAR:
                self.far += moved
            else:
                self.near += moved
        if not any(aliases):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.held -= size


@dataclass
class Work:
    """FLOPs, bytes moved and operations of a piece of work, and seconds from a machine's speeds.

    Bytes are `near` where an operation's tensors fit into the processor's cache, else `far`.
    """

    flops: float = 0
    near: float = 0
    far: float = 0
    operations: float = 0

    def __add__(self, other: Work) -> Work:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Work:
        return Work(*(value * times for value in vars(self).values()))

    def seconds(self, speeds: Work) -> float:
        pairs = zip(vars(self).values(), vars(speeds).values(), strict=True)
        return sum(amount / speed for amount, speed in pairs)


def estimate(config: Config, folder: Path, topics: Sequence[Topic]) -> dict[str, Any]:
    """Tensors and bytes to read, memory by part, FLOPs, seconds and the size of the cache."""
    method = config.method
    base = read_config(folder)
    read = {k: v for k, v in stored(folder).items() if touched(k, method.depth)}
    asked = None if config.dtype == "auto" else getattr(torch, config.dtype)
    dtype = asked or max(
        (t for t in weights.stored_types(folder).values() if t.is_floating_point),
        key=lambda t: t.itemsize,
    )
    size = dtype.itemsize
    # Grouped products of experts exist in bf16 only where there is no memory behind tensors.
    experts = getattr(base, "_experts_implementation", None) or hasattr(base, "num_experts_per_tok")
    counted = torch.bfloat16 if experts else dtype
    model = EditableModel(skeleton(base, counted), method.trainable, method.depth)
    site = getattr(method, "site", None) or (Site(method.depth - 1) if method.depth else None)
    trained = sum(p.numel() for p in model.trained.values())
    masters = 4 * trained if size == 2 and config.train.weights == "fp32" else 0

    mean = [shape(topics, role, largest=False) for role in ("forget", "retain")]
    most = [shape(topics, role, largest=True) for role in ("forget", "retain")]
    forget, retain = (frozen_pass(model, one, site) for one in mean)
    step = work(metered(stepper(model, mean, site, config.train.weights)))
    peak = metered(stepper(model, most, site, config.train.weights)).peak
    scale = size / counted.itemsize
    cache_bytes, first = cache_plan(config, topics, model, size)
    build = Work()
    for (prefix, rest), (recorded, whole) in zip((forget, retain), first, strict=True):
        build = build + prefix * recorded + rest * whole
    each = step
    if config.cache == "none":
        each = step + forget[0] + retain[0] + retain[1]
        build = (forget[0] + forget[1]) * first[0][1]
    total = each * config.train.max_steps + build

    width = base.hidden_size
    recent = sum(prod(one) for one in most) * width * size * 2
    tensors = sum(p.numel() for p in model.module.parameters())
    mapped = config.device == "cpu" and not converts(folder, base, config.dtype)
    parts = {
        "program": private_bytes() if config.device == "cpu" else 0,
        "weights": round(sum(read.values()) if mapped else tensors * size),
        "trained_copies": (2 if mapped else 3) * trained * size,
        "masters": masters,
        "optimiser": 2 * trained * (4 if masters or size == 4 else size),
        "step": round(peak * scale),
        "cache": cache_bytes if config.cache == "memory" else recent,
    }
    speeds = probe(dtype, config.device, mean, width)
    free = (
        torch.cuda.mem_get_info(config.device)[0]
        if config.device.startswith("cuda")
        else psutil.virtual_memory().available
    )
    needed = sum(parts.values()) - (parts["weights"] if mapped else 0)
    libraries = psutil.Process().memory_info().rss - private_bytes()
    return {
        "tensors_read": len(read),
        "bytes_read": sum(read.values()),
        "trained_parameters": trained,
        "memory": parts,
        "memory_mapped_from_the_file": mapped,
        "memory_peak": sum(parts.values()) + libraries,
        "memory_private": needed,
        "memory_free": free,
        "advice": advice(parts, config) if needed > free else "",
        "cache_bytes": 0 if config.cache == "none" else cache_bytes,
        "flops_per_step": round(each.flops),
        "flops": round(total.flops),
        "matmul_flops_a_second": round(speeds.flops),
        "seconds_per_step": round(each.seconds(speeds), 4),
        "seconds": round(total.seconds(speeds), 2),
    }


def explain(plan: Mapping[str, Any]) -> list[str]:
    """The plan in lines for a person."""
    parts = [f"  {name.replace('_', ' '):16}{gb(n):>9}" for name, n in plan["memory"].items() if n]
    mapped = plan["memory_mapped_from_the_file"]
    peak = (
        f"{gb(plan['memory_private'])} private, {gb(plan['memory']['weights'])} mapped from the "
        "files, which the system may drop and read again"
        if mapped
        else gb(plan["memory_peak"])
    )
    tera = plan["flops_per_step"] / 1e12, plan["flops"] / 1e12
    lines = [
        f"run      {plan['run']}, {plan['steps']} steps on {plan['device']}",
        f"model    {plan['model']}: {plan['layers_loaded']} of {plan['layers']} layers, "
        f"{plan['tensors_read']} tensors, {gb(plan['bytes_read'])} to read of "
        f"{gb(plan['checkpoint_bytes'])} in {plan['shards']} shards",
        f"changes  {', '.join(plan['trainable'])}: {plan['trained_parameters']:,} numbers",
        f"memory   {peak}; {gb(plan['memory_free'])} are free",
        *parts,
        f"cache    {gb(plan['cache_bytes'])} of activations ({plan['config']['cache']})",
        f"work     {tera[0]:.3g} TFLOP a step, {tera[1]:.3g} in all",
        f"time     {plan['seconds_per_step']:.3g} s a step, {duration(plan['seconds'])} in all, "
        f"reading aside; a matrix product here does {plan['matmul_flops_a_second'] / 1e9:.0f} "
        "GFLOP a second",
    ]
    if plan["advice"]:
        lines.append(f"this does not fit into memory; try {plan['advice']}")
    return lines


def gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.3g} s"


def private_bytes() -> int:
    """The memory of this process that no file lies behind."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def stored(folder: Path) -> dict[str, int]:
    """Bytes of each tensor of a checkpoint."""
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for path in sorted(set(weights.shards(folder).values()))
        for name, entry in weights.header(path)[0].items()
    }


def touched(name: str, depth: int | None) -> bool:
    """Whether a model of `depth` layers, which has no head, reads the tensor."""
    layer = weights.layer_of(name)
    if depth is None:
        return True
    return layer < depth if layer is not None else not name.startswith(("lm_head", "embed_out"))


def shape(topics: Sequence[Topic], role: str, *, largest: bool) -> tuple[int, int]:
    """Rows and tokens of the batches of a role: the mean of their number, or the largest."""
    shapes = [tuple(b["input_ids"].shape) for topic in topics for b in getattr(topic, role)]
    if largest:
        return max(shapes, key=prod)
    rows = max(s[0] for s in shapes)
    return rows, max(1, round(sum(map(prod, shapes)) / len(shapes) / rows))


def blank(shape: tuple[int, int], device: torch.device) -> Batch:
    """A batch of zeros. Its mask is of the kind that transformers takes as it is."""
    rows, tokens = shape
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=device)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def output(model: EditableModel, batch: Batch, site: Site | None) -> Tensor:
    return model.hidden(batch, site) if site is not None else model.logits(batch)


def frozen_pass(
    model: EditableModel, shape: tuple[int, int], site: Site | None
) -> tuple[Work, Work]:
    """The work of the original model's pass: of the fixed layers, and of those above them."""
    batch = blank(shape, model.device)
    with model.using({}):
        model.activations = Activations(EVERYTHING)
        whole, above = (work(metered(lambda: output(model, batch, site))) for _ in range(2))
    return whole + above * -1, above


def stepper(
    model: EditableModel, shapes: Sequence[tuple[int, int]], site: Site | None, kind: str
) -> Callable[[], None]:
    """A function that does a step, where the fixed layers' activations are there."""
    batches = [blank(one, model.device) for one in shapes]
    model.activations = Activations(EVERYTHING)
    with model.using({}):
        for batch in batches:
            output(model, batch, site)
    values = list(model.trained.values())
    own = [kind == "bf16" or value.dtype == torch.float32 for value in values]
    masters = [
        value if is_own else torch.nn.Parameter(value.detach().float())
        for value, is_own in zip(values, own, strict=True)
    ]
    optimiser = torch.optim.AdamW(masters)

    def step() -> None:
        losses = []
        for batch in batches:
            hidden = output(model, batch, site)
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            losses.append(token_mse(hidden, hidden.new_zeros(hidden.shape[-1]), mask))
        torch.stack(losses).sum().backward()
        del losses, hidden
        for master, value in zip(masters, values, strict=True):
            if master is not value and value.grad is not None:
                master.grad, value.grad = value.grad.float(), None
        optimiser.step()
        optimiser.zero_grad()

    step()  # makes the optimiser's moments, which are counted apart
    return step


def metered(action: Callable[[], object]) -> Meter:
    with Meter() as meter:
        action()
    return meter


def work(meter: Meter) -> Work:
    return Work(meter.flops, meter.near, meter.far, meter.operations)


def cache_plan(
    config: Config, topics: Sequence[Topic], model: EditableModel, size: int
) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of the cache, and how many batches of each role are recorded, and run frozen.

    Frozen passes over forget texts serve the statistics alone, and are not kept.
    """
    method = config.method
    measures = getattr(method, "measures", ())
    width = model.module.config.hidden_size
    total, counts = 0, [(0, 0), (0, 0)]
    for number, topic in enumerate(topics):
        steps = len(range(number, config.train.max_steps, len(topics)))
        for i, role in enumerate(("forget", "retain")):
            batches = getattr(topic, role)
            measured = method.map_batches if role in measures else 0
            used = batches[: max(steps, measured)]
            whole = batches[:measured] if i == 0 else used
            counts[i] = counts[i][0] + len(used), counts[i][1] + len(whole)
            prefix = sum(b["input_ids"].numel() for b in used) if model.fixed else 0
            target = sum(b["input_ids"].numel() for b in used) if i == 1 else 0
            total += (prefix + target) * width * size
    return total, counts


def probe(dtype: torch.dtype, device: str, shapes: Sequence[tuple[int, int]], width: int) -> Work:
    """This machine's FLOPs, bytes and small operations a second, in about two seconds.

    The last is measured in steps of a narrow model on batches of the run's own shapes: it holds
    what Python, the loop and attention over few features take beside the large products.
    """
    rows = max(16, min(prod(shapes[0]), 4096))
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(4 * width, width, device=device).to(dtype)
    small = torch.randn(FAR // 128, device=device)
    large = torch.randn(FAR // 2, device=device)
    flops = 2 * rows * width * 4 * width / timed(lambda: a @ b.T, 0.4)
    near = 12 * small.numel() / timed(lambda: small * small, 0.1)
    far = 12 * large.numel() / timed(lambda: large * large, 0.2)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        vocab_size=16,
    )  # fmt: skip
    tiny = AutoModelForCausalLM.from_config(config).to(device)
    rmu = RMU(layer=1, window=2, coeff=1.0)
    model = EditableModel(tiny, rmu.trainable, rmu.depth)
    operations = metered(stepper(model, shapes, rmu.site, "fp32")).operations
    forget, retain = (blank(one, model.device) for one in shapes)
    for batch in (forget, retain):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    state = rmu.setup(model, topic := Topic("probe", [forget], [retain]))
    loss = partial(rmu.loss, model, state)

    def step() -> None:
        fit(model, [(topic, loss)], TrainOptions(max_steps=1), lambda step, values: None)

    return Work(flops, near, far, operations / timed(step, 0.3))


def timed(action: Any, share: float) -> float:
    """Median seconds of an action, repeated for a share of the probe's time."""
    times: list[float] = []
    end = time.perf_counter() + share * PROBE_SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        if isinstance(out := action(), Tensor):
            out.reshape(-1)[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def advice(parts: Mapping[str, int], config: Config) -> str:
    """What to change where a run does not fit, after the part that is largest."""
    train, method = config.train, config.method
    if parts["step"] >= parts["masters"] + parts["optimiser"] and train.batch_size > 1:
        return f"train.batch_size={train.batch_size // 2}, or a smaller max_length of the topics"
    if getattr(method, "window", 1) > 1:
        return f"method.window={method.window - 1}: fewer matrices are trained"
    if train.weights == "fp32":
        return "train.weights=bf16: no float32 copies, as the public code (it loses small updates)"
    return "a machine with more memory"
