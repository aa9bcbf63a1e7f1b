"""What the paper's own setting needs on this machine: texts and how to get them, memory, hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from srmu.errors import SrmuError
from srmu.reproduce.experiment import Experiment, OneModel, PlannedRow, find_preset
from srmu.runs import estimate
from srmu.runs.config import load_config
from srmu.runs.plan import load_tokenizer, load_topics, plan_run

FAST = 100e12  # FLOPs a second that one may expect of a data-centre GPU in bfloat16


def estimate_needs(plan: Experiment, place: OneModel, rows: Sequence[PlannedRow]) -> tuple[dict[str, Any], list[str]]:
    """What the rows' runs take, in numbers and in lines for a person.

    Where model or texts are not there, the model's published dimensions and texts of the lengths
    that the configs state take their place; nothing is fetched.
    """
    spec, sources, methods = place.spec, dict[str, str](), dict[str, Any]()
    folder, known = find_or_describe(place.name, spec)
    speed: float | None = None  # measured once
    counts = Counter(row.method for row in rows)
    for method, row in {row.method: row for row in rows}.items():
        job = plan.plan_job(PlannedRow("", method, row.regime), 0)
        planned = plan_run(load_config(job.config, (*job.overrides, f"model={folder}")))
        config = planned.config
        texts = [source for topic in config.topics.values() for source in (*topic.forget, *topic.retain)]
        if all(source.path for source in texts) and (folder / "tokenizer.json").exists():
            topics = load_topics(config, load_tokenizer(folder))
        else:
            topics = estimate.blank_topics(planned, spec["documents"])
        for source in texts:
            if source.dataset:
                sources[source.dataset] = spec["sources"].get(source.dataset, "a data set of the hub")
            else:
                sources[Path(source.path or "").name] = "a file"
        if speed is None and not known:
            speed = estimate.speed_elsewhere(planned)
        found = estimate.estimate_run(planned, topics, speed)
        speed = found["flops_a_second"]
        methods[method] = found | {
            "runs": counts[method] * len(plan.seeds),
            "adapters": getattr(config.method, "lora_rank", 0),
        }
    size, asked = estimate.count_parameters(folder), spec["asked"].values()
    needs = {
        "model": {"name": place.name, "there": known, "bytes": 2 * size},
        "sources": sources | {k: v for k, v in spec["sources"].items() if "questions" in v},
        "methods": methods,
        "flops_a_second": speed or 0,
        "questions": sum(one["questions"] for one in asked),
        # of one run; the original's once more
        "evaluation_flops": 2 * size * sum(one["questions"] * one["tokens"] for one in asked),
    }
    return needs, explain_needs(needs)


def explain_needs(needs: Mapping[str, Any]) -> list[str]:
    """What is needed, in lines for a person."""
    model, flops, speed = needs["model"], needs["evaluation_flops"], needs["flops_a_second"]
    gb, duration, methods = estimate.format_gb, estimate.format_duration, needs["methods"]
    runs = sum(one["runs"] for one in methods.values())
    total = sum(one["runs"] * one["flops"] for one in methods.values()) + (runs + 1) * flops
    lines = [f"model   {model['name']}, {gb(model['bytes'])}: "]
    lines[0] += "is here" if model["there"] else f"hf download {model['name']} (planned from its published dimensions)"
    lines += [f"data    {name}: {how}" for name, how in needs["sources"].items()]
    lines += [
        # with adapters at most: they are counted as if all that they stand beside were trained
        f"runs    {one['runs']} of {label}: {'at most ' * (one['adapters'] > 0)}{gb(one['memory_private'])} of memory "
        f"beside {gb(one['bytes_read'])} of the model's files, {one['flops'] / 1e15:.3g} PFLOP, "
        f"here {duration(one['seconds'])}"
        for label, one in methods.items()
    ]
    scored = f"scores  {needs['questions']:,} questions a run: {flops / 1e15:.3g} PFLOP, here {duration(flops / speed)}"
    whole = f"in all  {runs} runs, {total / 1e15:.3g} PFLOP: here {duration(total / speed)}; "
    return [*lines, scored, f"{whole}{duration(total / FAST)} where {FAST / 1e12:.0f} TFLOP a second are reached"]


def find_or_describe(name: str, spec: Mapping[str, Any]) -> tuple[Path, bool]:
    """The model's folder and whether it is here; else one with its config.json alone."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name), True
    with suppress(Exception):  # not in the cache; the client raises many kinds
        folder = Path(snapshot_download(name, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder, True
    if name != spec["name"]:
        raise SrmuError(
            f"model {name} is not here, and dimensions are known of {spec['name']} only: fetch it "
            f"with hf download {name}, or name its folder"
        )
    return find_preset(spec["shape"]).parent, False
