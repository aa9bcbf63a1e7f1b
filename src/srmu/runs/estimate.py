"""What a run will read, hold, compute and take, before any weight is read."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from srmu.data.topics import explain_rows
from srmu.engine import weights
from srmu.engine.devices import free_bytes
from srmu.engine.files import format_gb
from srmu.engine.loading import build_skeleton, needs_conversion, read_config
from srmu.engine.model import EditableModel, Site
from srmu.engine.sites import count_mlp_inputs
from srmu.engine.stopping import CHECKED_BATCHES
from srmu.engine.topic import Topic
from srmu.engine.train import check_precision
from srmu.methods import Edit, MultiSite, RenameScrub, WeightWalk
from srmu.methods.base import Method
from srmu.methods.logits import LogitObjective
from srmu.runs import counting
from srmu.runs.config import Config
from srmu.runs.counting import StepVariant, TensorSizes
from srmu.runs.model_card import render_template
from srmu.runs.plan import RunPlan, load_tokenizer, load_topics, plan_run
from srmu.runs.reach import describe_reach, explain_reach

HEADS = ("lm_head", "embed_out")  # which a model cut to its first layers lacks
NARROW = 1024  # features of the product that is timed where the model is not here
DOCUMENTS = 1000  # of each topic, where the texts are not here


def plan_dry_run(config: Config) -> tuple[Config, dict[str, Any], list[str]]:
    """The resolved config, the plan, and the same in lines for a person.

    Where only config.json is here, its dimensions and the config's lengths take the place of weights and texts.
    """
    plan = plan_run(config)
    topics = load_topics(plan.config, load_tokenizer(plan.base)) if plan.here else blank_topics(plan)
    found = estimate_run(plan, topics, None if plan.here else speed_elsewhere(plan))
    found |= {"ranks": estimate_launches(plan, topics), "config": plan.config.to_dict()}
    if not plan.here:
        parameters = count_parameters(plan.base)
        found |= {"advice": "", "checkpoint_bytes": 2 * parameters}
        found["dimensions"] = {"parameters": parameters, "held": found["parameters_held"]}
    filters = {"gb": format_gb, "duration": format_duration}
    rows = [line for topic in topics for line in explain_rows(topic.name, topic.counts)]
    return plan.config, found, [*rows, *render_template("plan.txt", filters, **found).splitlines()]


def estimate_run(plan: RunPlan, topics: list[Topic], speed: float | None = None) -> dict[str, Any]:
    """Tensors and bytes to read, memory by part, FLOPs, seconds and the size of the cache.

    `speed` is the FLOPs a second that steps reach, where it is known; else it is measured.
    """
    config, method, cpu = plan.config, plan.config.method, plan.config.device == "cpu"
    # without files a run can be planned, but it stops when it loads the model
    shards = {*weights.list_shards(plan.base).values()} if plan.here else set()
    layers = plan.settings.num_hidden_layers
    check_precision("the model", plan.dtype, config.train.weights)
    read = [
        count
        for name, count in plan.stored.items()
        if method.depth is None or ((weights.layer_number(name) or 0) < method.depth and not name.startswith(HEADS))
    ]
    model = bare_model(plan)
    if plan.here:
        weights.list_candidates(plan.base, model.trained, model.list_aliases())
    ways, counted = count_run(plan, model, topics)
    trained = sum(p.numel() for p in model.trained.values())
    # the weights can stay in the file, mapped into memory
    mapped = cpu and not (plan.here and needs_conversion(plan.base, plan.settings, config.dtype))
    parts = {"program": counting.private_bytes() if cpu else 0} | counting.held_bytes(ways[0], 1, 1.0)
    if mapped:
        parts["weights"] = sum(read)
    if hasattr(method, "teacher_steps"):
        parts["teacher"] = trained * plan.dtype.itemsize
    shapes = batch_shapes(method, topics, largest=False)
    speed = speed or counting.measure_speed(plan.settings, plan.dtype, config.device, site_of(method), shapes)
    free, total = free_bytes(config.device), sum(parts.values())
    private = total - (parts["weights"] if mapped else 0)
    libraries = psutil.Process().memory_info().rss - counting.private_bytes()
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
        "reach": explain_reach(describe_reach(build_skeleton(plan.settings), model.trained)),
        "parameters_held": sum(p.numel() for p in model.module.parameters()),
        "memory": parts,
        "memory_mapped_from_the_file": mapped,
        "memory_peak": total + libraries,
        "memory_private": private,
        "memory_free": free,
        "advice": advise_memory(config, parts) if private > free else "",
        **counted,
        "flops_a_second": round(speed),
        "seconds_per_step": round(counted["flops_per_step"] / speed, 4),
        "seconds": round(counted["flops"] / speed, 2),
    }


def advise_memory(config: Config, parts: dict[str, int]) -> str:
    """What to change where a run does not fit, after the part that is largest."""
    train, method = config.train, config.method
    if parts["step"] >= parts["masters"] + parts["moments"] and train.batch_size > 1:
        return f"train.batch_size={train.batch_size // 2}, or a smaller max_length of the topics"
    if getattr(method, "lora_rank", 1) == 0:
        return "method.lora_rank=8: adapters in place of all tensors"
    if (window := getattr(method, "window", 1)) > 1:
        return f"method.window={window - 1}: fewer matrices are trained"
    if method.depth is not None and config.device != "cpu" and parts["weights"] >= parts["moments"]:
        return "--offload: the layers below those that change stay on the disk"
    if parts["masters"]:
        return "train.weights=bf16: no float32 copies, as the public code (it loses small updates)"
    return "a shorter max_length of the topics, or a machine with more memory"


def estimate_launches(plan: RunPlan, topics: list[Topic]) -> list[dict[str, Any]]:
    """What each process holds and computes, by their number and for each way to make a step.

    `fits` says whether the devices here hold it. Without weights the plan is for GPUs that are not here.
    """
    config, method, cpu = plan.config, plan.config.method, plan.config.device == "cpu"
    ways: list[StepVariant] = []
    for rank in (0, method.lora_rank or 8) if isinstance(method, LogitObjective) else (0,):
        if isinstance(method, LogitObjective):
            adapted = {"method": replace(method, lora_rank=rank)}
            plan = replace(plan, config=config.model_copy(update=adapted))
        ways += count_run(plan, bare_model(plan), topics, rank)[0]
    on_cpu = plan.here and cpu  # where layers on the disk are mapped into memory anyway
    ways = [replace(way, gpu=not on_cpu) for way in ways if not (on_cpu and way.offloaded)]
    rows = counting.plan_launches(ways, config.train.batch_size, method.spreads)
    free, devices = free_bytes(config.device), torch.accelerator.device_count()
    for row in rows:
        taken, count = row["memory_per_rank"], row["processes"]
        # the processes share a CPU's memory
        row["fits"] = taken * count <= free if cpu else taken <= free and count <= devices
    return rows


def site_of(method: Method) -> Site | None:
    """Where a step reads activations; None where it reads logits."""
    return getattr(method, "site", None) or (Site(method.depth - 1) if method.depth else None)


def bare_model(plan: RunPlan) -> EditableModel:
    """The model as deep as the method needs it, with no memory behind its tensors."""
    # Grouped products of experts exist in bf16 only there.
    settings, method = plan.settings, plan.config.method
    experts = getattr(settings, "_experts_implementation", None) or hasattr(settings, "num_experts_per_tok")
    module = build_skeleton(settings, torch.bfloat16 if experts else plan.dtype)
    return EditableModel(module, method.trainable, method.depth)


def describe_step(plan: RunPlan, model: EditableModel, **measured: Any) -> StepVariant:
    """How a model is held while it is trained, and what was measured of a step."""
    train = plan.config.train
    return StepVariant(
        size=count_pieces(model, model.module.parameters()),
        trained=count_pieces(model, model.trained.values()),
        itemsize=plan.dtype.itemsize,
        mixed=(plan.dtype.itemsize == 2 and train.weights == "fp32") or train.quantise_aware is not None,
        gpu=plan.config.device != "cpu",
        **measured,
    )


def count_run(
    plan: RunPlan, model: EditableModel, topics: list[Topic], rank: int = 0
) -> tuple[list[StepVariant], dict[str, int]]:
    """Count a step on a model without memory, with adapters of a rank or without.

    The ways to make a step: cached, with layers left on the disk, uncached, with `--shard`; and the FLOPs of a step as
    the config has it and of the whole run, with the bytes of all activations that are kept.
    """
    config, method, site = plan.config, plan.config.method, site_of(plan.config.method)
    size, caching = plan.dtype.itemsize, site is not None and config.cache != "none"
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
        once = round(sum(passes[0]) * getattr(method, "written_tokens", 0) * len(topics) / prod(mean[0]))
        cache_bytes = 0
    held = round(activations * size / model.module.dtype.itemsize)
    plain = describe_step(plan, model, lora=rank, adapters=adapters, activations=held, flops=step + again)
    ways = [plain]
    if site is not None and model.fixed:
        recent = 2 * size * model.module.config.hidden_size * sum(map(prod, most))
        kept = replace(plain, caching=True, flops=step, cache=cache_bytes if config.cache == "memory" else recent)
        below = (sum(p.numel() for p in layer.parameters()) for layer in model.layers[: model.fixed])
        ways = [kept, replace(kept, offloaded=tuple(below)), plain]
    if not rank and getattr(method, "stream", "resid_post") == "resid_post":
        ways.append(replace(plain, sharded=True))
    each = step if caching else step + again
    looks = (sum(len(getattr(topic, role)[:CHECKED_BATCHES]) for topic in topics) for role in ("forget", "retain"))
    # the effect is looked at before and after, from the same states below what changes
    effect = sum(count * (prefix + 2 * above) for count, (prefix, above) in zip(looks, passes, strict=False))
    total = each * equivalent_steps(config, topics) + once + effect
    cached = 0 if config.cache == "none" else cache_bytes
    return ways, {"cache_bytes": cached, "flops_per_step": each, "flops": total}


def batch_shapes(method: Method, topics: list[Topic], *, largest: bool) -> list[counting.Shape]:
    """Rows and tokens of the batches that a step reads: their mean, or the largest."""
    shapes = []
    for role in ("forget", "retain") if method.reads_retain else ("forget",):
        every = [tuple(b["input_ids"].shape) for topic in topics for b in getattr(topic, role)]
        rows = max(shape[0] for shape in every)
        mean = rows, max(1, round(sum(map(prod, every)) / len(every) / rows))
        shapes.append(max(every, key=prod) if largest else mean)
    if isinstance(method, RenameScrub):  # it reads its own texts, each under several names
        shapes[0] = shapes[0][0] * method.renamings + method.keep_rows, method.own_tokens
    return shapes


def count_pieces(model: EditableModel, tensors: Iterable[torch.Tensor]) -> TensorSizes:
    """How many numbers these tensors of a model have, by the pieces in which it is cut."""
    inside = {id(p): i for i, layer in enumerate(model.layers) for p in layer.parameters()}
    ends = {id(end.weight): i for i, end in enumerate(model.ends)}
    layers, cut, rest = [0] * len(model.layers), [0] * len(ends), 0
    for tensor in tensors:
        if id(tensor) in inside:
            layers[inside[id(tensor)]] += tensor.numel()
        elif id(tensor) in ends:
            cut[ends[id(tensor)]] += tensor.numel()
        else:
            rest += tensor.numel()
    return TensorSizes(tuple(layers), tuple(cut), rest)


def equivalent_steps(config: Config, topics: list[Topic]) -> int:
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


def plan_cache(config: Config, topics: list[Topic], model: EditableModel, size: int) -> tuple[int, list[list[int]]]:
    """Bytes of the cache, and batches of each role that are recorded, run frozen, and measured.

    Frozen passes over forget texts serve the statistics alone, and are kept only where the target is made from them.
    """
    method, settings = config.method, model.module.config
    width = wide = settings.hidden_size
    if getattr(method, "stream", "") == "mlp_post":
        wide = count_mlp_inputs(settings)
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


def speed_elsewhere(plan: RunPlan) -> float:
    """FLOPs a second of this machine, which is not the one that the run is planned for."""
    width = min(plan.settings.get_text_config().hidden_size, NARROW)
    return counting.measure_product(width, torch.bfloat16, plan.config.device)


def count_parameters(base: Path) -> int:
    """The numbers in a model, from its config.json."""
    return sum(p.numel() for p in build_skeleton(read_config(base)).parameters())


def blank_topics(plan: RunPlan, documents: dict[str, int] | None = None) -> list[Topic]:
    """Topics of the lengths that the config states, for texts that are not here.

    `documents` says how many texts a topic has. One batch stands for all: only its shape counts.
    """
    rows, cpu = plan.config.train.batch_size, torch.device("cpu")
    vocabulary = torch.arange(plan.settings.get_text_config().vocab_size)  # random anchors draw from it
    topics = []
    for name, topic in plan.config.topics.items():
        lengths = (topic.max_length, topic.retain_max_length or topic.max_length)
        count = -(-(documents or {}).get(name, DOCUMENTS) // rows)
        forget, retain = ([counting.blank_batch((rows, length), cpu, False)] * count for length in lengths)
        topics.append(Topic(name, forget, retain, vocabulary=vocabulary, options=topic.options))
    return topics


def format_duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.3g} s"
