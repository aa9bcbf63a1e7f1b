"""What the paper's own setting needs on this machine: texts and how to get them, memory, hours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srmu.errors import SrmuError
from srmu.reproduce.experiment import RunJob, find_preset
from srmu.runs.config import load_config
from srmu.runs.estimate import blank_topics, count_parameters, estimate_run, format_duration, format_gb, speed_elsewhere
from srmu.runs.plan import load_tokenizer, load_topics, plan_run

FAST = 100e12  # FLOPs a second that one may expect of a data-centre GPU in bfloat16


def estimate_needs(
    jobs: Mapping[str, RunJob], runs: Mapping[str, int], spec: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """What runs take: a job of each method, and how many runs of it are wanted.

    Where model or texts are not there, the model's published dimensions and texts of the lengths
    that the configs state take their place; nothing is fetched.
    """
    methods: dict[str, Any] = {}
    sources: dict[str, str] = {}
    folder, known = find_or_describe(name, spec)
    speed: float | None = None  # measured once
    for label, job in jobs.items():
        plan = plan_run(load_config(job.config, (*job.overrides, f"model={folder}")))
        config = plan.config
        texts = [source for topic in config.topics.values() for source in (*topic.forget, *topic.retain)]
        if all(source.path for source in texts) and (folder / "tokenizer.json").exists():
            topics = load_topics(config, load_tokenizer(folder))
        else:
            topics = blank_topics(plan, spec["documents"])
        for source in texts:
            if source.dataset:
                sources[source.dataset] = spec["sources"].get(source.dataset, "a data set of the hub")
            else:
                sources[Path(source.path or "").name] = "a file"
        if speed is None and not known:
            speed = speed_elsewhere(plan)
        found = estimate_run(plan, topics, speed)
        speed = found["flops_a_second"]
        methods[label] = found | {"runs": runs[label], "adapters": getattr(config.method, "lora_rank", 0)}
    parameters = count_parameters(folder)
    asked = spec["asked"].values()
    return {
        "model": {"name": name, "there": known, "bytes": 2 * parameters},
        "sources": sources | {k: v for k, v in spec["sources"].items() if "questions" in v},
        "methods": methods,
        "flops_a_second": speed or 0,
        "questions": sum(one["questions"] for one in asked),
        # of one run; the original's once more
        "evaluation_flops": 2 * parameters * sum(one["questions"] * one["tokens"] for one in asked),
    }


def find_or_describe(name: str, spec: Mapping[str, Any]) -> tuple[Path, bool]:
    """The model's folder and whether it is here; else one with its config.json alone."""
    if Path(name).is_dir():
        return Path(name), True
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder, True
    except Exception:  # not in the cache; the client raises many kinds
        pass
    if name != spec["name"]:
        raise SrmuError(
            f"model {name} is not here, and dimensions are known of {spec['name']} only: fetch it "
            f"with hf download {name}, or name its folder"
        )
    return find_preset(spec["shape"]).parent, False


def explain_needs(found: Mapping[str, Any]) -> list[str]:
    """What is needed, in lines for a person."""
    model, flops, methods = found["model"], found["evaluation_flops"], found["methods"]
    scoring = flops / found["flops_a_second"]
    there = "is here" if model["there"] else f"hf download {model['name']}"
    lines = [f"model   {model['name']}, {format_gb(model['bytes'])}: {there}"]
    lines += [f"data    {name}: {how}" for name, how in found["sources"].items()]
    runs, total, here = 0, flops, scoring
    for label, one in methods.items():
        runs += one["runs"]
        total += one["runs"] * (one["flops"] + flops)
        here += one["runs"] * (one["seconds"] + scoring)
        # adapters are counted as if all that they stand beside were trained
        most = "under " if one["adapters"] else ""
        lines.append(
            f"runs    {one['runs']} of {label}: {most}{format_gb(one['memory_private'])} of memory "
            f"beside {format_gb(one['bytes_read'])} of the model's files, "
            f"{most}{one['flops'] / 1e15:.3g} PFLOP, here {format_duration(one['seconds'])}"
        )
    lines += [
        f"scores  {found['questions']:,} questions a run: {flops / 1e15:.3g} PFLOP, here {format_duration(scoring)}",
        f"in all  {runs} runs, {total / 1e15:.3g} PFLOP: here {format_duration(here)}; "
        f"{format_duration(total / FAST)} where {FAST / 1e12:.0f} TFLOP a second are reached",
    ]
    if not model["there"]:
        lines.append("planned from the model's published dimensions: it is not here")
    return lines
