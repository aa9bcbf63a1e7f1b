"""What a run will read, hold, compute and take, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from srmu.engine import weights
from srmu.engine.loading import build_skeleton, needs_conversion, read_config, wanted_dtype
from srmu.engine.model import EditableModel, Site
from srmu.engine.topic import Topic
from srmu.engine.train import check_precision
from srmu.methods import Edit, MultiSite, WeightWalk
from srmu.methods.base import Method
from srmu.methods.logits import LogitObjective
from srmu.runs import counting, memory
from srmu.runs.config import Config
from srmu.runs.memory import StepVariant, TensorSizes, TrainedModel
from srmu.runs.plan import RunPlan

HEADS = ("lm_head", "embed_out")  # which a model cut to its first layers lacks


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a model before its weights are read."""

    settings: Any  # its configuration
    dtype: torch.dtype  # that it is loaded in
    stored: Mapping[str, int]  # bytes of each tensor


def describe_checkpoint(config: Config, folder: Path) -> Checkpoint:
    """A model's tensors from the headers of its files; without files, from its configuration."""
    settings = read_config(folder)
    dtype = wanted_dtype(settings, config.dtype)
    if not weights.is_there(folder):
        dtype = dtype or torch.bfloat16
        skeleton = build_skeleton(settings).named_parameters()
        return Checkpoint(settings, dtype, {name: dtype.itemsize * tensor.numel() for name, tensor in skeleton})
    spans = {name: entry["data_offsets"] for name, entry in weights.stored_entries(folder).items()}
    types = [t for t in weights.stored_types(folder).values() if t.is_floating_point]
    dtype = dtype or max(types, key=lambda t: t.itemsize)
    return Checkpoint(settings, dtype, {name: end - start for name, (start, end) in spans.items()})


def estimate_run(plan: RunPlan, topics: Sequence[Topic], speed: float | None = None) -> dict[str, Any]:
    """Tensors and bytes to read, memory by part, FLOPs, seconds and the size of the cache.

    `speed` is the FLOPs a second that steps reach, where it is known; else it is measured.
    """
    config, folder, method, cpu = plan.config, plan.base, plan.config.method, plan.config.device == "cpu"
    # without files a run can be planned, but it stops when it loads the model
    here = weights.is_there(folder)
    shards = {*weights.list_shards(folder).values()} if here else set()
    layers = plan.settings.num_hidden_layers
    base = describe_checkpoint(config, folder)
    check_precision("the model", base.dtype, config.train.weights)
    read = [
        count
        for name, count in base.stored.items()
        if method.depth is None or ((weights.layer_number(name) or 0) < method.depth and not name.startswith(HEADS))
    ]
    model = bare_model(base, method)
    counts = count_run(config, base, model, topics)
    trained = sum(p.numel() for p in model.trained.values())
    # the weights can stay in the file, mapped into memory
    mapped = cpu and not (here and needs_conversion(folder, base.settings, config.dtype))
    parts = {"program": memory.private_bytes() if cpu else 0}
    parts |= memory.held_bytes(trained_model(config, base, model), counts.ways[0], 1, 1.0)
    if mapped:
        parts["weights"] = sum(read)
    if hasattr(method, "teacher_steps"):
        parts["teacher"] = trained * base.dtype.itemsize
    speed = speed or counting.measure_speed(base.settings, base.dtype, config.device, site_of(method), counts.shapes)
    free, total = memory.free_bytes(config.device), sum(parts.values())
    private = total - (parts["weights"] if mapped else 0)
    libraries = psutil.Process().memory_info().rss - memory.private_bytes()
    return {
        "id": config.id,
        "run": str(plan.folder),
        "model": config.model,
        "device": config.device,
        "layers": layers,
        "layers_loaded": layers if method.depth is None else method.depth,
        "trainable": list(method.trainable),
        "shards": len(shards),
        "checkpoint_bytes": sum(path.stat().st_size for path in shards),
        "steps": config.train.max_steps,
        "tensors_read": len(read),
        "bytes_read": sum(read),
        "trained_parameters": trained,
        "parameters_held": sum(p.numel() for p in model.module.parameters()),
        "memory": parts,
        "memory_mapped_from_the_file": mapped,
        "memory_peak": total + libraries,
        "memory_private": private,
        "memory_free": free,
        "cache_bytes": 0 if config.cache == "none" else counts.cache_bytes,
        "flops_per_step": counts.step,
        "flops": counts.total,
        "flops_a_second": round(speed),
        "seconds_per_step": round(counts.step / speed, 4),
        "seconds": round(counts.total / speed, 2),
    }


def estimate_launches(
    config: Config, folder: Path, topics: Sequence[Topic], elsewhere: bool = False
) -> list[dict[str, Any]]:
    """What each process holds and computes, by their number and for each way to make a step.

    `fits` says whether the devices here hold it. `elsewhere`: the plan is for GPUs that are not
    here.
    """
    method, cpu = config.method, config.device == "cpu"
    base = describe_checkpoint(config, folder)
    ranks = (0, method.lora_rank or 8) if isinstance(method, LogitObjective) else (0,)
    ways: list[StepVariant] = []
    for rank in ranks:
        model = bare_model(base, replace(method, lora_rank=rank) if isinstance(method, LogitObjective) else method)
        ways += count_run(config, base, model, topics, rank).ways
    held = replace(trained_model(config, base, model), gpu=elsewhere or not cpu)
    rows = memory.plan_launches(held, ways, config.train.batch_size, method.spreads)
    free, devices = memory.free_bytes(config.device), torch.cuda.device_count()
    for row in rows:
        taken, count = row["memory_per_rank"], row["processes"]
        # the processes share a CPU's memory
        row["fits"] = taken * count <= free if cpu else taken <= free and count <= devices
    return rows


def trained_model(config: Config, base: Checkpoint, model: EditableModel) -> TrainedModel:
    """How the model is held while it is trained."""
    pieces = count_pieces(model, model.module.named_parameters())
    mixed = base.dtype.itemsize == 2 and config.train.weights == "fp32"
    return TrainedModel(pieces, base.dtype.itemsize, mixed, gpu=config.device != "cpu")


def site_of(method: Method) -> Site | None:
    """Where a step reads activations; None where it reads logits."""
    return getattr(method, "site", None) or (Site(method.depth - 1) if method.depth else None)


def bare_model(base: Checkpoint, method: Method) -> EditableModel:
    """The model as deep as the method needs it, with no memory behind its tensors."""
    # Grouped products of experts exist in bf16 only there.
    experts = getattr(base.settings, "_experts_implementation", None) or hasattr(base.settings, "num_experts_per_tok")
    module = build_skeleton(base.settings, torch.bfloat16 if experts else base.dtype)
    return EditableModel(module, method.trainable, method.depth)


@dataclass(frozen=True)
class RunCounts:
    """The work of a run in FLOPs, and the bytes of its activations."""

    shapes: list[counting.Shape]  # of the batches that a step reads
    step: int  # FLOPs of a step as the config has it
    total: int  # of the whole run
    cache_bytes: int  # of all activations that are kept
    ways: list[StepVariant]  # to make a step: cached, with layers left on the disk, uncached, with `--shard`


def count_run(
    config: Config, base: Checkpoint, model: EditableModel, topics: Sequence[Topic], rank: int = 0
) -> RunCounts:
    """Count a step on a model without memory, with adapters of a rank or without."""
    method, site = config.method, site_of(config.method)
    size, caching = base.dtype.itemsize, site is not None and config.cache != "none"
    whole = counting.takes_whole_masks(model, site)
    mean, most = (batch_shapes(method, topics, largest=largest) for largest in (False, True))
    usual, largest = ([counting.blank_batch(s, model.device, whole) for s in x] for x in (mean, most))
    passes = [counting.count_frozen_pass(model, batch, site) for batch in usual]
    with model.adapted(rank, rank, 0) if rank else nullcontext():
        adapters = sum(p.numel() for p in model.trained.values()) if rank else 0
        step, _ = counting.count_step(model, usual, site)
        _, activations = counting.count_step(model, largest, site)
    # `again`: what a step also costs where nothing is cached, or the original answers at each step
    if site is not None:
        again = passes[0][0] + (sum(passes[-1]) if len(passes) > 1 else 0)
        cache_bytes, counts = plan_cache(config, topics, model, size)
        once = sum(
            prefix * recorded + above * frozen if caching else (prefix + above) * measured
            for (prefix, above), (recorded, frozen, measured) in zip(passes, counts, strict=False)
        )
    else:
        again = sum(map(sum, passes)) if any("original" in use for use in method.uses) else 0
        once = round(sum(passes[0]) * method.written_tokens * len(topics) / prod(mean[0]))
        cache_bytes = 0
    plain = StepVariant(
        trained=count_pieces(model, model.trained.items()),
        lora=rank,
        adapters=adapters,
        activations=round(activations * size / model.module.dtype.itemsize),
        flops=step + again,
    )
    ways = [plain]
    if site is not None and model.fixed:
        recent = 2 * size * model.module.config.hidden_size * sum(map(prod, most))
        kept = replace(plain, caching=True, flops=step, cache=cache_bytes if config.cache == "memory" else recent)
        below = (sum(p.numel() for p in layer.parameters()) for layer in model.layers[: model.fixed])
        ways = [kept, replace(kept, offloaded=tuple(below)), plain]
    if not rank and getattr(method, "stream", "resid_post") == "resid_post":
        ways.append(replace(plain, sharded=True))
    each = step if caching else step + again
    return RunCounts(mean, each, each * equivalent_steps(config, topics) + once, cache_bytes, ways)


def batch_shapes(method: Method, topics: Sequence[Topic], *, largest: bool) -> list[counting.Shape]:
    """Rows and tokens of the batches that a step reads: their mean, or the largest."""
    shapes = []
    for role in ("forget", "retain") if method.reads_retain else ("forget",):
        every = [tuple(b["input_ids"].shape) for topic in topics for b in getattr(topic, role)]
        rows = max(shape[0] for shape in every)
        mean = rows, max(1, round(sum(map(prod, every)) / len(every) / rows))
        shapes.append(max(every, key=prod) if largest else mean)
    return [method.read_at_once(shapes[0]), *shapes[1:]]


def count_pieces(model: EditableModel, named: Iterable[tuple[str, torch.Tensor]]) -> TensorSizes:
    """How many numbers these tensors of a model have, by the pieces in which it is cut."""
    inside = {id(p): i for i, layer in enumerate(model.layers) for p in layer.parameters()}
    ends = {id(end.weight): i for i, end in enumerate(model.ends)}
    layers, cut, rest = [0] * len(model.layers), [0] * len(ends), 0
    for _, tensor in named:
        if id(tensor) in inside:
            layers[inside[id(tensor)]] += tensor.numel()
        elif id(tensor) in ends:
            cut[ends[id(tensor)]] += tensor.numel()
        else:
            rest += tensor.numel()
    return TensorSizes(tuple(layers), tuple(cut), rest)


def equivalent_steps(config: Config, topics: Sequence[Topic]) -> int:
    """How many plain steps cost as much as the run: adversaries and teachers take steps, too."""
    method = config.method
    teachers = getattr(method, "teacher_steps", 0)
    if isinstance(method, Edit | WeightWalk):  # a pass over its texts
        return max(len(topic.forget) for topic in topics) + teachers * len(topics)
    each = 1 + getattr(method, "adversary_steps", 0)
    if isinstance(method, MultiSite):
        each = len(method.layers)
    before = (teachers + getattr(method, "relearn_steps", 0)) * getattr(method, "rounds", 1)
    # a method of activations sets each topic up from its own state, once
    return config.train.max_steps * each + before * (1 if method.depth else len(topics))


def plan_cache(config: Config, topics: Sequence[Topic], model: EditableModel, size: int) -> tuple[int, list[list[int]]]:
    """Bytes of the cache, and batches of each role that are recorded, run frozen, and measured.

    Frozen passes over forget texts serve the statistics alone, and are not kept, unless the target
    is made from them.
    """
    method, settings = config.method, model.module.config
    width = wide = settings.hidden_size
    if getattr(method, "stream", "") == "mlp_post":
        wide = getattr(settings, "intermediate_size", None) or 4 * width
    additive = getattr(method, "target_mode", "") == "additive"
    numbers, counts = 0, np.zeros((2, 3), int)
    for number, topic in enumerate(topics):
        steps = len(range(number, config.train.max_steps, len(topics)))
        prepared = method.prepared(topic) if hasattr(method, "prepared") else topic
        for i, role in enumerate(("forget", "retain")):
            raw, batches = getattr(topic, role), getattr(prepared, role)[:steps]
            reads = role in getattr(method, "measures", ())
            measured = raw[: getattr(method, "map_batches", 0)] if reads else []
            # A batch that is measured as it is, and then used, is recorded once.
            others = [] if raw is getattr(prepared, role) else batches
            used = [*raw[: max(len(measured), 0 if others else len(batches))], *others]
            passes = used if role == "retain" or additive else measured
            kept = batches if role == "forget" and additive else used if role == "retain" else []
            counts[i] += len(used), len(passes), len(measured)
            if model.fixed:
                numbers += width * sum(b["input_ids"].numel() for b in used)
            numbers += wide * sum(b["input_ids"].numel() for b in kept)
    return numbers * size, counts.tolist()
