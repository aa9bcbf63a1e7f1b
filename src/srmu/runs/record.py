"""The record of a run: what was done to which model, with a digest of everything it names."""

import hashlib
import json
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from torch import Tensor
from yaml import YAMLError

from srmu.engine import weights
from srmu.engine.activation_cache import flat_bytes
from srmu.engine.converted import read_source
from srmu.engine.devices import name_gpu
from srmu.engine.files import cached, read_json, sha256, write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError, first_line

RECORD = "record.json"
DELTA = "delta.safetensors"
STATE = "state.safetensors"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
RESULTS_LOCK = ".results.lock"  # there while the results are written
SCHEMA = 1  # raised when a field changes its meaning
RECORD_SCHEMA: dict[str, Any] = read_json(Path(__file__).with_name("record.schema.json"))
CHECKER = validator_for(RECORD_SCHEMA)(RECORD_SCHEMA)  # made once: to check the schema itself takes most of the time
LIMITS = (
    "Not shown to be absent: other attacks, or more of the same, may recover more than was found.",
    "Nothing is said of copies, quantised or earlier versions, or models trained from this one.",
    "Test again after any fine-tuning, merging, quantisation or change of the system prompt.",
)
PACKAGES = ("srmu", "torch", "transformers", "safetensors", "tokenizers", "numpy", "lm-eval")


def compute_seal(record: dict[str, Any]) -> str:
    """The SHA-256 of a record without its seal, as canonical JSON."""
    rest = {key: value for key, value in record.items() if key != "seal"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def seal_record(record: dict[str, Any]) -> dict[str, Any]:
    """Check a record against its schema, and add its seal."""
    plain: dict[str, Any] = json.loads(json.dumps({**record, "seal": ""}))
    if fault := best_match(CHECKER.iter_errors(plain)):
        raise fault
    return plain | {"seal": compute_seal(plain)}


def read_record(path: Path) -> dict[str, Any]:
    """Read a record; SrmuError if the file is not a record, or was edited."""
    record: dict[str, Any] = read_json(path)
    if error := best_match(CHECKER.iter_errors(record)):
        fault = f"{error.json_path.removeprefix('$.')}: {first_line(error)}"
        raise SrmuError(f"{path} is not a record of this version ({fault}); make the run again")
    if record["seal"] != compute_seal(record):
        raise SrmuError(f"{path} was edited after it was written: its seal does not fit")
    return record


def extend_record(folder: Path, files: list[str], **blocks: Any) -> None:
    """Add measurements to a run's record, with the digests of the files that hold them."""
    record = read_record(folder / RECORD)
    digests = {name: sha256(folder / name) for name in files}
    extended = seal_record(record | blocks | {"files": record["files"] | digests})
    if extended != record:
        write_json(folder / RECORD, extended)


def digest_folder(folder: Path, watch: Watch = ignore_progress) -> dict[str, dict[str, Any]]:
    """Size and digests of every file of a checkpoint, by name; kept in the cache folder until size or time change."""
    names = weights.list_carried(folder)
    stats = {name: (folder / name).stat() for name in names}
    marks = [(str(folder.resolve()), n, stat.st_size, stat.st_mtime_ns, stat.st_ino) for n, stat in stats.items()]

    def digest_files() -> dict[str, dict[str, Any]]:
        files = {}
        with watch("hashing the base model", len(names)) as tick:
            for name in names:
                files[name] = digest_file(folder / name)
                tick(name)
        return files

    return dict(cached("hashes", marks, digest_files))


def list_foreign_files(folder: Path, record: dict[str, Any], watch: Watch = ignore_progress) -> list[str]:
    """The files of a model's folder that are not those of a record's base model."""
    known = record["base"]["files"]
    return [
        n for n, file in digest_folder(folder, watch).items() if n in known and file["sha256"] != known[n]["sha256"]
    ]


def digest_file(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256, and those of each tensor in a safetensors file; in one pass."""
    entries, start = weights.read_header(path) if path.suffix == ".safetensors" else ({}, 0)
    places = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    ends = [("", start), *((name, start + high) for _, high, name in places)]
    size, whole = path.stat().st_size, hashlib.sha256()
    parts = {name: hashlib.sha256() for name, _ in ends}  # "": the header
    with path.open("rb") as file:
        for name, end in [*ends, ("", size)]:  # tensors leave no gaps
            while block := file.read(min(end - file.tell(), 1 << 22)):
                whole.update(block)
                parts[name].update(block)
    digests = {name: code.hexdigest() for name, code in parts.items()}
    header = digests.pop("")
    return {"bytes": size, "sha256": whole.hexdigest(), "header": header if entries else "", "tensors": digests}


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
        **read_source(folder),
    }


def describe_change(folder: Path, delta: Path) -> dict[str, Any]:
    """Each tensor of a delta, compared with the base's."""
    where = weights.list_shards(folder)
    names = weights.read_header(delta)[0] if delta.exists() else {}
    read = weights.stored_tensor
    tensors = {name: compare_tensor(read(where[name], name), read(delta, name)) for name in names}
    return {"tensors": tensors, "others": len(where) - len(tensors), "others_identical": True}


def compare_tensor(before: Tensor, after: Tensor) -> dict[str, Any]:
    size = float(before.float().norm())
    moved = float((after.float() - before.float()).norm())
    return {
        "shape": list(before.shape),
        "dtype": str(before.dtype).removeprefix("torch."),
        "before": sha256(flat_bytes(before)),
        "after": sha256(flat_bytes(after)),
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
        "gpu": name_gpu(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "packages": {name: version(name) for name in PACKAGES},
    }
