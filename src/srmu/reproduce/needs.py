"""What the paper's own setting needs on this machine: texts and how to get them, memory, hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import MistralConfig

from srmu.engine.topic import Topic
from srmu.errors import SrmuError
from srmu.evals.parallel import RunJob
from srmu.runs.config import Config, load_config
from srmu.runs.dry_run import blank_topics, count_parameters, format_duration, format_gb, speed_elsewhere
from srmu.runs.estimate import estimate_run
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
    speed: float | None = None  # measured once
    with find_or_describe(name, spec) as (folder, known):
        for label, job in jobs.items():
            config = load_config(job.config, (*job.overrides, f"model={folder}"))
            config = plan_run(config).config
            topics = load_or_blank_topics(config, folder, spec)
            if speed is None and not known:
                speed = speed_elsewhere(config, folder)
            found = estimate_run(config, folder, topics, speed)
            speed = found["flops_a_second"]
            adapters = getattr(config.method, "lora_rank", 0)
            methods[label] = found | {"runs": runs[label], "adapters": adapters}
            sources |= sources_of(config, spec)
        parameters = count_parameters(folder)
    asked = spec["asked"]
    tokens = sum(one["questions"] * one["tokens"] for one in asked.values())
    return {
        "model": {"name": name, "there": known, "bytes": 2 * parameters},
        "sources": sources | {k: v for k, v in spec["sources"].items() if "questions" in v},
        "methods": methods,
        "flops_a_second": speed or 0,
        "questions": sum(one["questions"] for one in asked.values()),
        "evaluation_flops": 2 * parameters * tokens,  # of one run; the original's once more
    }


@contextmanager
def find_or_describe(name: str, spec: Mapping[str, Any]) -> Iterator[tuple[Path, bool]]:
    """The model's folder where it is here, else one with a config.json of its dimensions alone."""
    if Path(name).is_dir():
        yield Path(name), True
        return
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        complete = any(folder.glob("*.safetensors"))
    except Exception:  # not in the cache; the client raises many kinds
        complete = False
    if complete:
        yield folder, True
        return
    if name != spec["name"]:
        raise SrmuError(
            f"model {name} is not here, and dimensions are known of {spec['name']} only: fetch it "
            f"with hf download {name}, or name its folder"
        )
    with TemporaryDirectory() as scratch:
        shape: dict[str, Any] = dict(spec["shape"])
        named: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "dtype": "bfloat16"}
        MistralConfig(**shape, **named).save_pretrained(scratch)
        yield Path(scratch), False


def load_or_blank_topics(config: Config, folder: Path, spec: Mapping[str, Any]) -> list[Topic]:
    """The config's texts where all of them are files, else batches of the lengths it states."""
    parts = [s for topic in config.topics.values() for s in (*topic.forget, *topic.retain)]
    if all(source.path for source in parts) and (folder / "tokenizer.json").exists():
        return load_topics(config, load_tokenizer(folder))
    return blank_topics(config, spec["documents"])


def sources_of(config: Config, spec: Mapping[str, Any]) -> dict[str, str]:
    """Where the texts come from, and how to get those that are not files."""
    found = {}
    for topic in config.topics.values():
        for source in (*topic.forget, *topic.retain):
            if source.dataset:
                found[source.dataset] = spec["sources"].get(source.dataset, "a data set of the hub")
            else:
                found[Path(source.path or "").name] = "a file"
    return found


def explain_needs(found: Mapping[str, Any]) -> list[str]:
    """What is needed, in lines for a person."""
    model, flops, methods = found["model"], found["evaluation_flops"], found["methods"]
    scoring = flops / found["flops_a_second"]
    runs = sum(one["runs"] for one in methods.values())
    there = "is here" if model["there"] else f"hf download {model['name']}"
    lines = [f"model   {model['name']}, {format_gb(model['bytes'])}: {there}"]
    lines += [f"data    {name}: {how}" for name, how in found["sources"].items()]
    for label, one in methods.items():
        # adapters are counted as if all that they stand beside were trained
        most = "under " if one["adapters"] else ""
        lines.append(
            f"runs    {one['runs']} of {label}: {most}{format_gb(one['memory_private'])} of memory "
            f"beside {format_gb(one['bytes_read'])} of the model's files, "
            f"{most}{one['flops'] / 1e15:.3g} PFLOP, here {format_duration(one['seconds'])}"
        )
    lines.append(
        f"scores  {found['questions']:,} questions a run: {flops / 1e15:.3g} PFLOP, here {format_duration(scoring)}"
    )
    total = sum(one["runs"] * (one["flops"] + flops) for one in methods.values()) + flops
    here = sum(one["runs"] * (one["seconds"] + scoring) for one in methods.values()) + scoring
    lines.append(
        f"in all  {runs} runs, {total / 1e15:.3g} PFLOP: here {format_duration(here)}; "
        f"{format_duration(total / FAST)} where {FAST / 1e12:.0f} TFLOP a second are reached"
    )
    if not model["there"]:
        lines.append("planned from the model's published dimensions: it is not here")
    return lines
