"""The record of a run: what was done to which model, with a digest of everything it names."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import metadata_load
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor
from yaml import YAMLError

from srmu.engine import weights
from srmu.engine.cache import cached
from srmu.engine.files import read_json, sha256, write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError

RECORD = "record.json"
DELTA = "delta.safetensors"
STATE = "state.safetensors"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
RESULTS_LOCK = ".results.lock"  # there while the results are written
SCHEMA = 1  # raised when a field changes its meaning
LIMITS = (
    "Suppressed, not shown to be absent: other attacks, or more of the same, may recover more.",
    "Nothing is said of copies, quantised or earlier versions, or models trained from this one.",
    "Test again after any fine-tuning, merging, quantisation or change of the system prompt.",
)
PACKAGES = ("srmu", "torch", "transformers", "safetensors", "tokenizers", "numpy", "lm-eval")


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Purpose(Block):
    """Why the run was made, in the operator's words; never the texts."""

    reason: str = ""
    target: str = ""  # what is to be forgotten, described
    operator: str = ""
    ticket: str = ""
    reviewer: str = ""
    choice: str = ""  # why this layer and this strength
    not_covered: list[str] = []  # models that this run does not change


class Tool(Block):
    name: str
    version: str
    commit: str | None  # of a checkout; a release has none


class File(Block):
    bytes: int
    sha256: str
    header: str = ""  # of a safetensors file: SHA-256 of what precedes the tensors
    tensors: dict[str, str] = {}  # and of each tensor's bytes


class Base(Block):
    """The model before the run."""

    id: str
    revision: str | None
    licence: str | None
    dtype: str
    tokenizer: str  # SHA-256 over the tokenizer's files
    files: dict[str, File]


class Changed(Block):
    """One tensor that the run changed."""

    shape: list[int]
    dtype: str
    before: str  # SHA-256 of its bytes
    after: str
    relative_norm: float = Field(ge=0)  # |after - before| / |before|, Frobenius
    share_changed: float = Field(ge=0, le=1)  # of its elements


class Change(Block):
    tensors: dict[str, Changed]
    others: int  # tensors of the base that are not in the delta
    others_identical: bool  # an export takes their bytes from the base; `srmu verify` compares them


class TextSet(Block):
    """A set of texts: its size, and a digest that says nothing without the operator's key."""

    documents: int
    too_short: int
    bad_rows: int
    tokens: int
    digest: str
    key: str = ""  # names that key


class Environment(Block):
    python: str
    platform: str
    processor: str
    gpu: str | None
    threads: int
    deterministic: bool  # torch.use_deterministic_algorithms
    packages: dict[str, str]


class Processes(Block):
    count: int = 1
    sharded: bool = False  # over which the weights were cut


class Reproduction(Block):
    command: str
    config: dict[str, Any]
    expected: dict[str, str]  # SHA-256 of the delta
    rerun: dict[str, Any] | None = None  # what the last re-run found


class Record(Block):
    """A run's `record.json`; `seal` is the SHA-256 of all else as canonical JSON."""

    model_config = ConfigDict(json_schema_extra={"$schema": "https://json-schema.org/draft/2020-12/schema"})

    schema_version: Literal[1]
    id: str
    tool: Tool
    started: str
    finished: str
    purpose: Purpose
    method: str
    paper: str
    model: str
    base: Base
    data: dict[str, dict[Literal["forget", "retain"], TextSet]]
    overlap: dict[str, float]  # of forget with retain, by topic: share of the forget set's words
    topics: dict[str, dict[str, Any]]  # what each topic's direction and map are like
    seconds: float
    steps: int
    resumed_at: int
    checkpoint_failed: str
    stop_reason: str
    diverged: bool
    weights: str
    flops: float | None  # of the training steps; None where they were not counted
    memory: dict[Literal["before", "peak"], int]
    activations: dict[str, Any]
    changed: list[str]
    change: Change
    results: dict[Literal["before", "after"], dict[str, dict[str, Any]]] = {}
    attacks: dict[str, Any] = {}
    environment: Environment
    processes: Processes = Processes()
    reproduction: Reproduction
    limits: list[str]
    files: dict[str, str]  # SHA-256 of what lies beside the record
    exported: dict[str, str] = {}  # in an export: of what is neither the base's nor the delta's
    seal: str


def compute_seal(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a record without its seal, as canonical JSON."""
    rest = {key: value for key, value in record.items() if key != "seal"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def seal_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Check a record against its schema, and add its seal."""
    checked = Record.model_validate({**record, "seal": ""}).model_dump(mode="json")
    return checked | {"seal": compute_seal(checked)}


def read_record(path: Path) -> dict[str, Any]:
    """Read a record; SrmuError if the file is not a record, or was edited."""
    record: dict[str, Any] = read_json(path)
    try:
        Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        fault = ".".join(map(str, first["loc"])) + ": " + first["msg"]
        raise SrmuError(f"{path} is no record of this version ({fault}); make the run again") from None
    if record["seal"] != compute_seal(record):
        raise SrmuError(f"{path} was edited after it was written: its seal does not fit")
    return record


def extend_record(folder: Path, files: Sequence[str], **blocks: Any) -> None:
    """Add measurements to a run's record, with the digests of the files that hold them."""
    record = read_record(folder / RECORD)
    digests = {name: sha256(folder / name) for name in files}
    extended = seal_record(record | blocks | {"files": record["files"] | digests})
    if extended != record:
        write_json(folder / RECORD, extended)


def digest_folder(folder: Path, watch: Watch = ignore_progress) -> dict[str, dict[str, Any]]:
    """Size and digests of every file of a checkpoint, by name.

    They are kept in the cache folder while size and time of change stay the same.
    """
    names = weights.list_carried(folder)
    stats = [(folder / name).stat() for name in names]
    marks = [
        (str(folder.resolve()), name, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        for name, stat in zip(names, stats, strict=True)
    ]

    def digest_files() -> dict[str, dict[str, Any]]:
        files = {}
        with watch("hashing the base model", len(names)) as tick:
            for name in names:
                files[name] = digest_file(folder / name)
                tick(name)
        return files

    return dict(cached("hashes", marks, digest_files))


def digest_file(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256, and those of each tensor in a safetensors file."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return {"bytes": size, "sha256": sha256(path), "header": "", "tensors": {}}
    entries, start = weights.read_header(path)
    data = np.memmap(path, np.uint8, "r").data  # each tensor is read from the disk once
    whole = hashlib.sha256(data[:start])
    header, tensors = whole.hexdigest(), {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        low, high = entry["data_offsets"]  # tensors leave no gaps
        whole.update(data[start + low : start + high])
        tensors[name] = hashlib.sha256(data[start + low : start + high]).hexdigest()
    return {"bytes": size, "sha256": whole.hexdigest(), "header": header if tensors else "", "tensors": tensors}


def describe_base(model: str, revision: str | None, folder: Path, watch: Watch) -> dict[str, Any]:
    files = digest_folder(folder, watch)
    words = [n for n in files if "token" in n or n.startswith(("vocab", "merges", "spiece"))]
    types = {str(t).removeprefix("torch.") for t in weights.stored_types(folder).values()}
    facts = {}
    with suppress(OSError, ValueError, YAMLError):  # no model card, or none that can be read
        facts = metadata_load(folder / "README.md") or {}
    licence = facts.get("license") or read_json(folder / "config.json").get("license")
    return {
        "id": model,
        # the folder of a hub snapshot is named by its commit
        "revision": revision or (folder.name if folder.parent.name == "snapshots" else None),
        "licence": str(licence) if licence else None,
        "dtype": ", ".join(sorted(types)),
        "tokenizer": sha256(*(files[name]["sha256"].encode() for name in sorted(words))),
        "files": files,
    }


def describe_change(folder: Path, delta: Path) -> dict[str, Any]:
    """Each tensor of a delta, compared with the base's."""
    where = weights.list_shards(folder)
    tensors = {}
    if delta.exists():
        with safe_open(delta, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                before = weights.stored_tensor(where[name], name)
                tensors[name] = compare_tensor(before, file.get_tensor(name))
    others = len(where) - len(tensors)
    return {"tensors": tensors, "others": others, "others_identical": True}


def compare_tensor(before: Tensor, after: Tensor) -> dict[str, Any]:
    size = float(before.float().norm())
    moved = float((after.float() - before.float()).norm())
    return {
        "shape": list(before.shape),
        "dtype": str(before.dtype).removeprefix("torch."),
        "before": sha256(weights.raw_bytes(before)),
        "after": sha256(weights.raw_bytes(after)),
        "relative_norm": moved / size if size else float(moved > 0),
        "share_changed": float((after != before).float().mean()),
    }


def describe_tool() -> dict[str, Any]:
    """This program's version, and its commit if it runs from a checkout."""
    home, commit = Path(__file__).parents[3], ""
    if (home / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(home), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return {"name": "srmu", "version": version("srmu"), "commit": commit or None}


def describe_environment() -> dict[str, Any]:
    """What the bits of a result may depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "packages": {name: version(name) for name in PACKAGES},
    }


if __name__ == "__main__":  # python -m srmu.runs.record > src/srmu/runs/record.schema.json
    print(json.dumps(Record.model_json_schema(), indent=2))
