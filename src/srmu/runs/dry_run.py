"""The plan of `srmu unlearn --dry-run`, in numbers and in lines for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from srmu.engine import weights
from srmu.engine.loading import build_skeleton, read_config
from srmu.engine.topic import Topic
from srmu.runs.config import Config
from srmu.runs.counting import blank_batch, measure_product
from srmu.runs.estimate import estimate_launches, estimate_run
from srmu.runs.plan import load_tokenizer, load_topics, locate_base, plan_run

NARROW = 1024  # features of the product that is timed where the model is not here
DOCUMENTS = 1000  # of each topic, where the texts are not here


def plan_dry_run(config: Config) -> tuple[Config, dict[str, Any], list[str]]:
    """The resolved config, the plan, and the lines that tell it.

    Where only the model's config.json is here, its dimensions and texts of the lengths that the
    config states take the place of weights and texts.
    """
    base = locate_base(config)
    here = weights.is_there(base)
    planned = plan_run(config)
    config, plan = planned.config, planned.summarise()
    topics = load_topics(config, load_tokenizer(base)) if here else blank_topics(config)
    speed = None if here else speed_elsewhere(config, base)
    plan |= estimate_run(config, base, topics, speed)
    plan["ranks"] = estimate_launches(config, base, topics, elsewhere=not here)
    plan["config"] = config.to_dict()
    if here:
        return config, plan, explain_plan(plan)
    plan["advice"] = ""
    plan["checkpoint_bytes"] = plan["checkpoint_bytes"] or 2 * count_parameters(base)
    plan["dimensions"] = {"parameters": count_parameters(base), "held": plan["parameters_held"]}
    lines = explain_plan(plan)
    lines.append(
        "planned for GPUs, from the dimensions in config.json and from texts of the lengths in the "
        "config: no weights are here"
    )
    lines.append("model of {parameters:,} numbers, of which {held:,} are loaded".format(**plan["dimensions"]))
    return config, plan, lines


def speed_elsewhere(config: Config, base: Path) -> float:
    """FLOPs a second of this machine, which is not the one that the run is planned for."""
    width = min(read_config(base).get_text_config().hidden_size, NARROW)
    return measure_product(width, torch.bfloat16, config.device)


def count_parameters(base: Path) -> int:
    """The numbers in a model, from its config.json."""
    return sum(p.numel() for p in build_skeleton(read_config(base)).parameters())


def blank_topics(config: Config, documents: Mapping[str, int] | None = None) -> list[Topic]:
    """Topics of the lengths that the config states, for texts that are not here.

    `documents` says how many texts a topic has. One batch stands for all: only its shape counts.
    """
    rows, cpu = config.train.batch_size, torch.device("cpu")
    text = read_config(locate_base(config)).get_text_config()
    topics = []
    for name, topic in config.topics.items():
        lengths = (topic.max_length, topic.retain_max_length or topic.max_length)
        count = -(-(documents or {}).get(name, DOCUMENTS) // rows)
        forget, retain = ([blank_batch((rows, length), cpu, False)] * count for length in lengths)
        # random anchors draw from the vocabulary
        vocabulary = torch.arange(text.vocab_size)
        topics.append(Topic(name, forget, retain, vocabulary=vocabulary, options=topic.options))
    return topics


def explain_plan(plan: Mapping[str, Any]) -> list[str]:
    """The plan in lines for a person."""
    parts = [f"  {name.replace('_', ' '):16}{format_gb(n):>9}" for name, n in plan["memory"].items() if n]
    peak = format_gb(plan["memory_peak"])
    if plan["memory_mapped_from_the_file"]:
        peak = (
            f"{format_gb(plan['memory_private'])} private, {format_gb(plan['memory']['weights'])} "
            "mapped from the files, which the system may drop and read again"
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
        f"{format_duration(plan['seconds'])} in all, without reading; steps here reach "
        f"{plan['flops_a_second'] / 1e9:.0f} GFLOP a second",
    ]
    if plan.get("ranks"):
        lines += explain_launches(plan["ranks"])
    if plan["advice"]:
        lines.append(f"this does not fit into memory; try {plan['advice']}")
    return lines


def explain_launches(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each process holds, as a table: by the number of processes and the way to launch."""
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
