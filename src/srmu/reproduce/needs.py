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
from srmu.runs.plan import plan_run

FAST = 100e12  # FLOPs a second that one may expect of a data-centre GPU in bfloat16


def estimate_needs(plan: Experiment, place: OneModel, rows: Sequence[PlannedRow]) -> tuple[dict[str, Any], list[str]]:
    """What the rows' runs take, in numbers and in lines for a person; nothing is fetched.

    Texts have the lengths that the configs state; a model that is not here has its published dimensions.
    """
    spec, folder = place.spec, find_model(place.name, place.spec)
    gb, duration = estimate.format_gb, estimate.format_duration
    size, asked = estimate.count_parameters(folder), spec["asked"].values()
    scoring = 2 * size * sum(one["questions"] * one["tokens"] for one in asked)  # FLOPs for one model
    counts, methods, lines = Counter(row.method for row in rows), dict[str, Any](), list[str]()
    speed: Any = None  # FLOPs a second, measured once
    for method, regime in {row.method: row.regime for row in rows}.items():
        job = plan.plan_job(PlannedRow(method, method, regime), 0)
        planned = plan_run(load_config(job.config, (*job.overrides, f"model={folder}")))
        if speed is None and not planned.here:
            speed = estimate.speed_elsewhere(planned)
        found = estimate.estimate_run(planned, estimate.blank_topics(planned, spec["documents"]), speed)
        speed, runs = found["flops_a_second"], counts[method] * len(plan.seeds)
        methods[method] = found | {"runs": runs}
        # adapters are counted as if all that they stand beside were trained
        most = "at most " if getattr(planned.config.method, "lora_rank", 0) else ""
        memory = f"{most}{gb(found['memory_private'])} of memory beside {gb(found['bytes_read'])} of the model's files"
        work = f"{found['flops'] / 1e15:.3g} PFLOP, here {duration(found['seconds'])}"
        lines.append(f"runs    {runs} of {method}: {memory}, {work}")
    questions, runs = sum(one["questions"] for one in asked), sum(one["runs"] for one in methods.values())
    total = sum(one["runs"] * one["flops"] for one in methods.values()) + (runs + 1) * scoring  # and the original
    source = "is here" if planned.here else f"hf download {place.name} (planned from its published dimensions)"
    lines = [
        f"model   {place.name}, {gb(2 * size)}: {source}",
        *(f"data    {name}: {how}" for name, how in spec["sources"].items()),
        *lines,
        f"scores  {questions:,} questions a run: {scoring / 1e15:.3g} PFLOP, here {duration(scoring / speed)}",
        f"in all  {runs} runs, {total / 1e15:.3g} PFLOP: here {duration(total / speed)}; "
        f"{duration(total / FAST)} where {FAST / 1e12:.0f} TFLOP a second are reached",
    ]
    needs = {
        "model": {"name": place.name, "there": planned.here, "bytes": 2 * size},
        "sources": spec["sources"],
        "methods": methods,
        "flops_a_second": speed,
        "questions": questions,
        "evaluation_flops": scoring,
    }
    return needs, lines


def find_model(name: str, spec: Mapping[str, Any]) -> Path:
    """The model's folder; where it is not here, one with its config.json alone."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    with suppress(Exception):  # not in the cache; the client raises many kinds
        folder = Path(snapshot_download(name, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    if name != spec["name"]:
        raise SrmuError(
            f"model {name} is not here, and dimensions are known of {spec['name']} only: fetch it "
            f"with hf download {name}, or name its folder"
        )
    return find_preset(spec["shape"]).parent
