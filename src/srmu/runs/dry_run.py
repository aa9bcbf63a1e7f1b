"""The plan of `srmu unlearn --dry-run`, in numbers and in lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from srmu.engine import weights
from srmu.engine.loading import build_skeleton, read_config
from srmu.engine.topic import Topic
from srmu.runs.config import Config
from srmu.runs.counting import blank_batch, measure_product
from srmu.runs.estimate import estimate_launches, estimate_run
from srmu.runs.model_card import render_template
from srmu.runs.plan import load_tokenizer, load_topics, locate_base, plan_run

NARROW = 1024  # features of the product that is timed where the model is not here
DOCUMENTS = 1000  # of each topic, where the texts are not here


def plan_dry_run(config: Config) -> tuple[Config, dict[str, Any], list[str]]:
    """The resolved config, the plan, and the lines that tell it.

    Where only the model's config.json is here, its dimensions and texts of the lengths that the
    config states take the place of weights and texts.
    """
    planned = plan_run(config)
    config, base = planned.config, planned.base
    here = weights.is_there(base)
    topics = load_topics(config, load_tokenizer(base)) if here else blank_topics(config)
    speed = None if here else speed_elsewhere(config, base)
    plan = estimate_run(planned, topics, speed)
    plan["ranks"] = estimate_launches(config, base, topics, elsewhere=not here)
    plan["config"] = config.to_dict()
    if not here:
        parameters = count_parameters(base)
        plan["checkpoint_bytes"] = plan["checkpoint_bytes"] or 2 * parameters
        plan["dimensions"] = {"parameters": parameters, "held": plan["parameters_held"]}
    return config, plan, render_template("plan.txt", FILTERS, **plan).splitlines()


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


def format_gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def format_duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.3g} s"


FILTERS = {"gb": format_gb, "duration": format_duration}
