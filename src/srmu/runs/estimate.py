"""What a run will load, hold, compute and take, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from srmu.engine import weights
from srmu.engine.activation_cache import Activations
from srmu.engine.loading import build_skeleton, needs_conversion, read_config, wanted_dtype
from srmu.engine.losses import mean_nll
from srmu.engine.model import Batch, EditableModel, Site
from srmu.engine.topic import Topic
from srmu.engine.train import check_precision
from srmu.methods import Edit, MultiSite, WeightWalk
from srmu.methods.base import Method
from srmu.methods.logits import LogitObjective
from srmu.runs import scale
from srmu.runs.config import Config
from srmu.runs.meter import (
    EVERYTHING,
    Meter,
    Work,
    blank_batch,
    free_bytes,
    frozen_pass,
    make_stepper,
    probe_machine,
    run_metered,
    site_output,
    standing_bytes,
    takes_whole_masks,
    work_of,
)


def estimate_run(
    config: Config, folder: Path, topics: Sequence[Topic], speeds: Work | None = None
) -> dict[str, Any]:
    """Tensors and bytes to read, memory by part, FLOPs, seconds and the size of the cache.

    `speeds` are the machine's where they are known; else they are measured.
    """
    method = config.method
    base = read_config(folder)
    read = {k: v for k, v in stored_bytes(folder).items() if is_read(k, method.depth)}
    dtype = dtype_of(config, folder, base)
    size = dtype.itemsize
    model = bare_model(base, dtype, method)
    site = site_of(config)
    trained = sum(p.numel() for p in model.trained.values())

    mean, most = (shapes_of(method, topics, largest=largest) for largest in (False, True))
    check_precision("the model", dtype, config.train.weights)
    whole = takes_whole_masks(model, site)
    batches = [[blank_batch(s, model.device, whole) for s in shapes] for shapes in (mean, most)]
    passes = [frozen_pass(model, batch, site) for batch in batches[0]]
    step = work_of(run_metered(make_stepper(model, batches[0], site, config.train.weights)))
    peak = run_metered(make_stepper(model, batches[1], site, config.train.weights)).peak
    scale = size / model.module.dtype.itemsize
    cache_bytes, counts = cache_plan(config, topics, model, size) if site else (0, [])
    if site is not None:
        each, total = work_of_run(config, step, passes, counts)
    else:
        each, total = work_of_whole(config, step, passes, topics)
        written = method.written_tokens * len(topics) / prod(mean[0])
        total = total + passes[0][0] * written + passes[0][1] * written

    mapped = config.device == "cpu" and not needs_conversion(folder, base, config.dtype)
    held = (
        sum(read.values()) if mapped else size * sum(p.numel() for p in model.module.parameters())
    )
    recent = 2 * size * base.hidden_size * sum(map(prod, most))
    parts = {
        "program": private_bytes() if config.device == "cpu" else 0,
        "weights": held,
        **standing_bytes(config, trained, size, mapped),
        "step": round(peak * scale),
        "cache": cache_bytes if config.cache == "memory" else recent,
    }
    if config.device == "cpu":
        once = sum(parts[name] for name in ("trained_copies", "masters", "optimiser"))
        total = total + Work(fresh=once)
    speeds = speeds or probe_machine(dtype, config.device, mean, base.hidden_size)
    free = free_bytes(config.device)
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
        "advice": advise_memory(parts, config) if needed > free else "",
        "cache_bytes": 0 if config.cache == "none" else cache_bytes,
        "flops_per_step": round(each.flops),
        "flops": round(total.flops),
        "matmul_flops_a_second": round(speeds.flops),
        "seconds_per_step": round(each.seconds(speeds), 4),
        "seconds": round(total.seconds(speeds), 2),
    }


def estimate_launches(
    config: Config, folder: Path, topics: Sequence[Topic], elsewhere: bool = False
) -> list[dict[str, Any]]:
    """What each process holds and computes, of one and of more, in each way that there is.

    As `scale.launches`, and whether it `fits` into the devices that are seen here. `elsewhere`: it
    is reckoned for GPUs, though none is here.
    """
    method, base = config.method, read_config(folder)
    dtype = dtype_of(config, folder, base)
    size = dtype.itemsize
    adapters = (0, method.lora_rank or 8) if isinstance(method, LogitObjective) else (0,)
    ways: list[scale.Variant] = []
    for rank in adapters:
        model = bare_model(
            base,
            dtype,
            replace(method, lora_rank=rank) if isinstance(method, LogitObjective) else method,
        )
        ways += ways_of(config, model, topics, rank, size)
    rows = scale.scale_launches(
        count_pieces(model, model.module.named_parameters()), ways, config.train.batch_size, size,
        mixed=size == 2 and config.train.weights == "fp32", gpu=elsewhere or config.device != "cpu",
        spreads=method.spreads,
    )  # fmt: skip
    free, devices = free_bytes(config.device), torch.cuda.device_count()
    for row in rows:
        taken, count = row["memory_per_rank"], row["processes"]
        if config.device == "cpu":  # all of them share it
            row["fits"] = taken * count <= free
        else:
            row["fits"] = taken <= free and count <= devices
    return rows


def ways_of(
    config: Config, model: EditableModel, topics: Sequence[Topic], rank: int, size: int
) -> list[scale.Variant]:
    """The ways to make a step, with adapters of a rank or without: with a cache or without, cut."""
    method = config.method
    site = site_of(config)
    shapes = shapes_of(method, topics, largest=True)
    whole = takes_whole_masks(model, site)
    batches = [blank_batch(s, model.device, whole) for s in shapes]
    passes = [frozen_pass(model, batch, site) for batch in batches]
    trained = count_pieces(model, model.trained.items())
    with model.adapted(rank, rank, 0) if rank else nullcontext():
        adapters = sum(p.numel() for p in model.trained.values()) if rank else 0
        step = work_of(run_metered(make_stepper(model, batches, site, config.train.weights)))
        activations = left_by_a_pass(model, batches, site)
    again = sum((prefix.flops + above.flops for prefix, above in passes), 0.0)
    recent = 2 * size * model.module.config.hidden_size * sum(map(prod, shapes))

    def way(caching: bool, sharded: bool) -> scale.Variant:
        flops = step.flops
        if site is not None and not caching:
            # as in work_of_run
            flops += passes[0][0].flops + sum(w.flops for w in passes[-1])
        elif site is None and any("original" in use for use in method.uses):
            flops += again
        kept = 0
        if caching:
            everything = cache_plan(config, topics, model, size)[0]
            kept = everything if config.cache == "memory" else recent
        scaled = round(activations * size / model.module.dtype.itemsize)
        return scale.Variant(rank, caching, sharded, trained, adapters, scaled, kept, round(flops))

    found = [way(True, False)] if site is not None and model.fixed else []
    if found:
        below = (sum(p.numel() for p in x.parameters()) for x in model.layers[: model.fixed])
        found.append(replace(found[0], offloaded=tuple(below)))
    found.append(way(False, False))
    if not rank and getattr(method, "stream", "resid_post") == "resid_post":
        found.append(way(False, True))
    return found


def left_by_a_pass(model: EditableModel, batches: Sequence[Batch], site: Site | None) -> int:
    """The most bytes of a pass with its losses, and of the way back from these to the output."""
    model.activations = Activations(EVERYTHING)
    with model.using({}):
        for batch in batches:
            site_output(model, batch, site)
    with Meter() as meter:
        outs = [site_output(model, batch, site) for batch in batches]
        losses = [
            mean_nll(out, batch["labels"]) if site is None else out.float().square().mean()
            for out, batch in zip(outs, batches, strict=True)
        ]
        torch.autograd.grad(torch.stack(losses).sum(), outs, retain_graph=True)
    return meter.peak


def site_of(config: Config) -> Site | None:
    """Where a step reads activations; None where it reads logits."""
    method = config.method
    return getattr(method, "site", None) or (Site(method.depth - 1) if method.depth else None)


def dtype_of(config: Config, folder: Path, base: Any) -> torch.dtype:
    """The dtype that the model is loaded in."""
    types = weights.stored_types(folder).values()
    stored_as = max((t for t in types if t.is_floating_point), key=lambda t: t.itemsize)
    return wanted_dtype(base, config.dtype) or stored_as


def bare_model(base: Any, dtype: torch.dtype, method: Method) -> EditableModel:
    """The model as deep as the method needs it, with no memory behind its tensors."""
    # Grouped products of experts exist in bf16 only there.
    experts = getattr(base, "_experts_implementation", None) or hasattr(base, "num_experts_per_tok")
    module = build_skeleton(base, torch.bfloat16 if experts else dtype)
    return EditableModel(module, method.trainable, method.depth)


def shapes_of(method: Method, topics: Sequence[Topic], *, largest: bool) -> list[tuple[int, int]]:
    """Rows and tokens of the batches that a step reads."""
    roles = ("forget", "retain") if method.reads_retain else ("forget",)
    first, *others = (mean_shape(topics, role, largest=largest) for role in roles)
    return [method.read_at_once(first), *others]


def count_pieces(model: EditableModel, named: Iterable[tuple[str, torch.Tensor]]) -> scale.Size:
    """How many numbers these tensors of a model have, by the pieces in which it is cut."""
    inside = {id(p): i for i, layer in enumerate(model.layers) for p in layer.parameters()}
    apart = {id(end.weight): i for i, end in enumerate(model.ends)}
    layers, cut, rest = [0] * len(model.layers), [0] * len(apart), 0
    for _, tensor in named:
        if id(tensor) in inside:
            layers[inside[id(tensor)]] += tensor.numel()
        elif id(tensor) in apart:
            cut[apart[id(tensor)]] += tensor.numel()
        else:
            rest += tensor.numel()
    return scale.Size(tuple(layers), tuple(cut), rest)


def work_of_run(
    config: Config,
    step: Work,
    passes: Sequence[tuple[Work, Work]],
    counts: Sequence[tuple[int, int, int]],
) -> tuple[Work, Work]:
    """The work of each step, and of all with what is measured and recorded once.

    `passes` are the frozen passes of a forget and a retain batch, `counts` those of `cache_plan`.
    """
    once = Work()
    for (prefix, rest), (recorded, frozen, measured) in zip(passes, counts, strict=True):
        if config.cache == "none":
            once = once + (prefix + rest) * measured
        else:
            once = once + prefix * recorded + rest * frozen
    if config.cache == "none":  # the fixed layers again at each step, and the retain targets
        step = step + passes[0][0] + passes[1][0] + passes[1][1]
    return step, step * steps_worth(config, 1) + once


def work_of_whole(
    config: Config, step: Work, passes: Sequence[tuple[Work, Work]], topics: Sequence[Topic]
) -> tuple[Work, Work]:
    """The work of each step, and of all, of a method that needs the whole model.

    The original's passes come again at each step; an edit takes a pass over its texts.
    """
    method = config.method
    if any("original" in use for use in method.uses):
        for prefix, rest in passes:
            step = step + prefix + rest
    if isinstance(method, Edit | WeightWalk):
        steps = max(len(topic.forget) for topic in topics)
        return step, step * (steps + getattr(method, "teacher_steps", 0) * len(topics))
    return step, step * steps_worth(config, len(topics))


def steps_worth(config: Config, topics: int) -> int:
    """How many plain steps cost as much as the run: those of adversaries and teachers are steps."""
    method = config.method
    each = 1 + getattr(method, "adversary_steps", 0)
    if isinstance(method, MultiSite):
        each = len(method.layers)
    before = getattr(method, "teacher_steps", 0) + getattr(method, "relearn_steps", 0)
    return config.train.max_steps * each + before * getattr(method, "rounds", 1) * topics


def explain_plan(plan: Mapping[str, Any]) -> list[str]:
    """The plan in lines for a person."""
    parts = [
        f"  {name.replace('_', ' '):16}{format_gb(n):>9}" for name, n in plan["memory"].items() if n
    ]
    mapped = plan["memory_mapped_from_the_file"]
    peak = (
        f"{format_gb(plan['memory_private'])} private, {format_gb(plan['memory']['weights'])} "
        "mapped from the files, which the system may drop and read again"
        if mapped
        else format_gb(plan["memory_peak"])
    )
    changes = ", ".join(plan["trainable"])
    tera = plan["flops_per_step"] / 1e12, plan["flops"] / 1e12
    lines = [
        f"run      {plan['run']}, {plan['steps']} steps on {plan['device']}",
        f"model    {plan['model']}: {plan['layers_loaded']} of {plan['layers']} layers, "
        f"{plan['tensors_read']} tensors, {format_gb(plan['bytes_read'])} to read of "
        f"{format_gb(plan['checkpoint_bytes'])} in {plan['shards']} shards",
        f"changes  {'all' if changes == '*' else changes}: {plan['trained_parameters']:,} numbers",
        f"memory   {peak}; {format_gb(plan['memory_free'])} are free",
        *parts,
        f"cache    {format_gb(plan['cache_bytes'])} of activations ({plan['config']['cache']})",
        f"work     {tera[0]:.3g} TFLOP a step, {tera[1]:.3g} in all",
        f"time     {plan['seconds_per_step']:.3g} s a step, "
        f"{format_duration(plan['seconds'])} in all, reading aside; a matrix product "
        f"here does {plan['matmul_flops_a_second'] / 1e9:.0f} GFLOP a second",
    ]
    if plan.get("ranks"):
        lines += what_fits(plan["ranks"])
    if plan["advice"]:
        lines.append(f"this does not fit into memory; try {plan['advice']}")
    return lines


def what_fits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each process holds, as a table: in a way of launching, by the number of processes."""
    lines = ["what fits: memory of each process, the device that holds it, work of its step"]
    for row in rows:
        count, tera = row["processes"], row["flops_per_rank_per_step"] / 1e12
        marks = {"sharded": "--shard", "offloaded": "--offload", "caching": "cached"}
        way = [mark for key, mark in marks.items() if row[key]]
        way += [f"LoRA {row['lora']}"] if row["lora"] else []
        device = f"{row['device_gb']} GB" if row["device_gb"] else "none"
        lines.append(
            f"  {count:>2} {'process  ' if count == 1 else 'processes'} {', '.join(way):17}"
            f"{format_gb(row['memory_per_rank']):>11}  {device:>6} {tera:>8.3g} TFLOP"
            f"  {'fits here' if row['fits'] else 'not here'}"
        )
    return lines


def format_gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def format_duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.3g} s"


def private_bytes() -> int:
    """The memory of this process that no file lies behind."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each tensor of a checkpoint."""
    offsets = {name: e["data_offsets"] for name, e in weights.stored_entries(folder).items()}
    return {name: high - low for name, (low, high) in offsets.items()}


def is_read(name: str, depth: int | None) -> bool:
    """Whether a model of `depth` layers, which has no head, reads the tensor."""
    layer = weights.layer_number(name)
    if depth is None:
        return True
    return layer < depth if layer is not None else not name.startswith(("lm_head", "embed_out"))


def mean_shape(topics: Sequence[Topic], role: str, *, largest: bool) -> tuple[int, int]:
    """Rows and tokens of the batches of a role: the mean of their number, or the largest."""
    shapes = [tuple(b["input_ids"].shape) for topic in topics for b in getattr(topic, role)]
    if largest:
        return max(shapes, key=prod)
    rows = max(s[0] for s in shapes)
    return rows, max(1, round(sum(map(prod, shapes)) / len(shapes) / rows))


def cache_plan(
    config: Config, topics: Sequence[Topic], model: EditableModel, size: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """Bytes of the cache, and batches of each role that are recorded, run frozen, and measured.

    Frozen passes over forget texts serve the statistics alone, and are not kept, unless the target
    is made from them.
    """
    method = config.method
    settings = model.module.config
    width = settings.hidden_size
    inside = getattr(method, "stream", "") == "mlp_post"
    wide = getattr(settings, "intermediate_size", None) or 4 * width
    additive = getattr(method, "target_mode", "") == "additive"
    total, counts = 0, [(0, 0, 0), (0, 0, 0)]
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
            passes = used if i == 1 or additive else list(measured)
            old = counts[i]
            counts[i] = old[0] + len(used), old[1] + len(passes), old[2] + len(measured)
            prefix = sum(b["input_ids"].numel() for b in used) * width if model.fixed else 0
            kept = passes if i == 1 else batches if additive else []
            target = sum(b["input_ids"].numel() for b in kept) * (wide if inside else width)
            total += (prefix + target) * size
    return total, counts


def advise_memory(parts: Mapping[str, int], config: Config) -> str:
    """What to change where a run does not fit, after the part that is largest."""
    train, method = config.train, config.method
    if parts["step"] >= parts["masters"] + parts["optimiser"] and train.batch_size > 1:
        return f"train.batch_size={train.batch_size // 2}, or a smaller max_length of the topics"
    if getattr(method, "lora_rank", 1) == 0:
        return "method.lora_rank=8: adapters in place of all tensors"
    if (window := getattr(method, "window", 1)) > 1:
        return f"method.window={window - 1}: fewer matrices are trained"
    if train.weights == "fp32":
        return "train.weights=bf16: no float32 copies, as the public code (it loses small updates)"
    return "a machine with more memory"
