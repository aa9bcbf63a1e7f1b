"""Activations that training cannot change, computed once and kept in memory or on disk.

They are the output of the last layer below the trained ones, and the original model's activations at the site. The
name of an entry holds a digest of its tokens, the name of its folder all else that could change it.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from srmu.engine.devices import free_bytes, name_gpu
from srmu.engine.files import cache_dir, read_json, sha256, write_json
from srmu.errors import SrmuError

Output = Tensor | tuple[Any, ...]  # what a decoder layer returns: of several values the first is kept, None for others

FEW = 6  # entries of one step: prefix, target and sums of a forget and a retain batch
LIMIT_GB = 20.0  # for all activations together, unless SRMU_CACHE_LIMIT is set
SPARE = 1 << 30  # bytes to leave free on the disk


def digest_tensors(*tensors: Tensor) -> str:
    """SHA-256 of the shapes and values of tensors."""
    code = hashlib.sha256()
    for tensor in tensors:
        code.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        if not tensor.is_meta:  # a plan runs without values
            code.update(flat_bytes(tensor))
    return code.hexdigest()


def check_code(tensor: Tensor) -> str:
    """CRC-32 of a tensor's shape and values: it finds damage, at twice the speed of SHA-256."""
    return str(zlib.crc32(flat_bytes(tensor), zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())))


def flat_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(eq=False)
class Activations:
    """Activations of earlier batches in memory: `room` bytes, and the newest few more; with a folder, on disk too.

    What fits into memory stays there: batches come round in order, so the oldest is needed next. In the folder, which
    processes may share, each entry is a file. If it cannot be written, `say` is told once. A damaged file is removed.
    """

    room: int = 0
    folder: Path = Path()  # the default: none
    limit: int = 0  # bytes on disk, of all folders together
    device: torch.device | str = "cpu"
    say: Callable[[str], None] = print
    held: dict[str, Output] = field(default_factory=dict)
    recent: dict[str, Output] = field(default_factory=dict)
    hits: int = 0
    allowed: int = 0  # bytes to write before the bytes of all folders are counted again

    def __post_init__(self) -> None:
        self.kept = "disk" if self.folder.name else "memory" if self.room else "none"  # where entries go

    def find(self, name: str) -> Output | None:
        value = self.held.get(name, self.recent.get(name))
        if value is None and self.folder.name and (value := self._load(name)) is not None:
            self._remember(name, value)
        self.hits += value is not None
        return value

    def keep(self, name: str, value: Output) -> None:
        self._remember(name, value)
        if self.kept == "disk" and not self.path(name).exists():
            try:
                self._save(name, value)
            except OSError as error:
                self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Write no more files."""
        self.kept = "none"
        self.say(f"activations are not kept in {self.folder}: {error.strerror or error}; going on without")

    def _remember(self, name: str, value: Output) -> None:
        if name in self.held or name in self.recent:
            return
        size = (value[0] if isinstance(value, tuple) else value).nbytes
        if size <= self.room:
            self.room -= size
            self.held[name] = value
        else:
            self.recent[name] = value
            if len(self.recent) > FEW:
                del self.recent[next(iter(self.recent))]

    def path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '-')}.safetensors"

    def _save(self, name: str, value: Output) -> None:
        kind, tensor = (f"tuple{len(value)}", value[0]) if isinstance(value, tuple) else ("tensor", value)
        data = save({kind: tensor.detach().cpu().contiguous()}, {"crc32": check_code(tensor)})
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # another process may have cleared it
        if len(data) > self.allowed:  # rarely, as to count looks at every file; others may have written meanwhile
            room = self.limit - len(data)
            held = shrink_cache(room, self.folder) if room >= 0 else self.limit
            if held > room:
                raise OSError(f"SRMU_CACHE_LIMIT of {self.limit / 1e9:g} GB is reached")
            self.allowed = max(len(data), min(self.limit - held, self.limit // 16))
        if shutil.disk_usage(self.folder).free < len(data) + SPARE:
            raise OSError("the disk is full")
        temporary = self.folder / f".{os.getpid()}"
        temporary.write_bytes(data)
        temporary.replace(self.path(name))
        self.allowed -= len(data)

    def _load(self, name: str) -> Output | None:
        try:
            with safe_open(self.path(name), "pt") as file:
                (kind,) = file.keys()
                tensor = file.get_tensor(kind)  # mapped: pages of the file itself until somebody writes to them
                if file.metadata()["crc32"] != check_code(tensor):
                    raise ValueError
            tensor = tensor.to(self.device)
            return tensor if kind == "tensor" else (tensor, *[None] * (int(kind.removeprefix("tuple")) - 1))
        except Exception:  # missing, or damaged in some way
            with suppress(OSError):
                self.path(name).unlink()
            return None


def open_activations(
    mode: str, key: dict[str, Any], device: torch.device, say: Callable[[str], None] = print
) -> Activations:
    """The store of a run's activations; `key` holds all that could change them but tokens, versions and hardware."""
    room = free_bytes(device) // 4
    if mode != "disk":
        return Activations(room if mode == "memory" else 0)
    gpu = device.type != "cpu"
    about = {
        **key,
        "device": name_gpu(device) if gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "versions": [version(name) for name in ("srmu", "torch", "transformers")],
    }
    folder = cache_home() / sha256(json.dumps(about, sort_keys=True).encode())[:16]
    store = Activations(room if gpu else 0, folder, limit_bytes(), device, say)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(folder / "about.json", about)  # its time is that of the last use
    except OSError as error:
        store.give_up(error)
    return store


def limit_bytes() -> int:
    """The most bytes that all activations together may take."""
    with suppress(ValueError, OverflowError):
        if (limit := int(float(os.environ.get("SRMU_CACHE_LIMIT") or LIMIT_GB) * 1e9)) >= 0:
            return limit
    raise SrmuError("SRMU_CACHE_LIMIT is a number of gigabytes, for example 50")


def processor_name() -> str:
    """The processor; the last bits of a matrix product depend on its kind."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", about.read_text(), re.MULTILINE) if about.exists() else None
    return f"{found[1] if found else platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def cache_home() -> Path:
    return cache_dir() / "activations"


def list_activations() -> list[dict[str, Any]]:
    """The folders of activations: `folder`, `bytes`, `used`, ...; the one used last comes last."""
    entries = []
    for folder in cache_home().glob("*/"):
        about = folder / "about.json"
        with suppress(OSError):  # another process may be removing it
            used = (about if about.exists() else folder).stat().st_mtime
            entries.append({"folder": folder, "bytes": folder_bytes(folder), "used": used})
            with suppress(ValueError, TypeError):  # SrmuError is a ValueError
                entries[-1] = {**read_json(about), **entries[-1]}
    return sorted(entries, key=itemgetter("used"))


def shrink_cache(limit: int, spare: Path | None = None) -> int:
    """Remove the folders used longest ago until `limit` bytes are left; returns the bytes left."""
    entries = list_activations()
    total = sum(entry["bytes"] for entry in entries)
    for entry in entries:
        if total > limit and entry["folder"] != spare:
            shutil.rmtree(entry["folder"], ignore_errors=True)
            total -= entry["bytes"]
    return total


def clear_cache(names: Iterable[str]) -> int:
    """Remove parts of the cache folder; returns the bytes freed."""
    freed = 0
    for folder in (cache_dir() / name for name in names):
        freed += folder_bytes(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return freed


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
