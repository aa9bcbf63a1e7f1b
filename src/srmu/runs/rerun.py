"""Make a run again from its record, and say what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srmu.engine.files import write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.runs import record as audit
from srmu.runs.config import build_config
from srmu.runs.plan import plan_run
from srmu.runs.run import Run, run_plan


def rerun_record(
    path: Path, overrides: Sequence[str] = (), watch: Watch = ignore_progress
) -> tuple[Run, dict[str, Any]]:
    """Make the run of a record again, in `again/` beside it, and compare the two.

    The comparison (`same`; if not, how data and environments differ) is written into the record.
    SrmuError where the base model is not that of the record. `overrides` may change what does not
    decide the result, such as `runs_dir`.
    """
    record = audit.read_record(path)
    again = f"runs_dir={path.resolve().parent.parent / 'again'}"
    plan = plan_run(build_config(record["reproduction"]["config"], [again, *overrides]))
    for name, file in audit.digest_folder(plan.base, watch).items():
        if file["sha256"] != record["base"]["files"].get(name, {}).get("sha256"):
            raise SrmuError(f"{plan.base} is not the base model of {path}: its {name} differs; nothing was run")
    if plan.folder.resolve() == path.resolve().parent:
        raise SrmuError("runs_dir: name another folder than the record's own")
    run = run_plan(plan, watch=watch)
    outcome = compare_records(record, run.record)
    rerun = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **outcome}
    reproduction = record["reproduction"] | {"rerun": rerun}
    write_json(path, audit.seal_record(record | {"reproduction": reproduction}))
    return run, outcome


def compare_records(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Whether two records have the same delta; if not, what else differs."""
    if first["reproduction"]["expected"] == other["reproduction"]["expected"]:
        return {"same": True, "tensors": [], "differences": []}
    now = other["change"]["tensors"]
    tensors = [n for n, old in first["change"]["tensors"].items() if now.get(n, {}).get("after") != old["after"]]
    differences = list_differences("", first["environment"], other["environment"])
    differences += list_differences("data.", first["data"], other["data"])
    return {"same": False, "tensors": tensors, "differences": differences}


def list_differences(prefix: str, one: Any, other: Any) -> list[str]:
    """Each leaf that differs between two trees, like `torch: 2.13.0 then, 2.14.0 now`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys([*one, *other])
        return [text for key in keys for text in list_differences(f"{prefix}{key}.", one.get(key), other.get(key))]
    return [] if one == other else [f"{prefix.rstrip('.')}: {one} then, {other} now"]
