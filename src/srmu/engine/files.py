"""Folders and files that are whole or absent, JSON, and the cache of results that can be made again."""

import glob
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from srmu.engine import distributed
from srmu.engine.progress import print_line
from srmu.errors import SrmuError, first_line, suggest_path

REQUIRED: Any = object()
SHOWN = 80  # characters of a name that an error repeats: a text given for a file is longer
warn_once = cache(print_line)
# Copied unchanged with a model, as is what has no suffix (LICENSE); no other kind, which may be the same weights again.
CARRIED = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".md", ".py", ".bpe", ".vocab", ".v1", ".v2", ".v3", "")
EXPORTED = "srmu-record.json"  # the record beside an export
OWN_CODE = "srmu_own_"  # how modules of the user's own files begin


def cache_dir() -> Path:
    """The folder of results that can be computed again: `SRMU_CACHE`, else `~/.cache/srmu`."""
    try:
        return require_utf8(Path(os.environ.get("SRMU_CACHE") or Path.home() / ".cache" / "srmu"))
    except RuntimeError:
        raise SrmuError("there is no home folder here; set SRMU_CACHE to a folder") from None


def require_utf8(path: Path) -> Path:
    """The path; SrmuError where safetensors could open no file there."""
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise SrmuError(f"{ascii(str(path.resolve()))[1:-1]}: the name is not UTF-8; rename it") from None
    except RuntimeError:
        raise SrmuError(f"{path} is a link that leads to itself") from None
    return path


def tidy_path(path: Path) -> Path:
    """The path without `..`, where that is the same place: behind a link it may be another."""
    plain = Path(os.path.normpath(path))
    return plain if plain.resolve() == path.resolve() else path


def find_paths(name: str, folder: Path = Path()) -> list[Path]:
    """The file or folder of that very name, else those that match it as a pattern; none where nothing does."""
    try:
        path = folder / Path(name).expanduser()
        if path.exists():
            return [path]
        base = next(parent for parent in path.parents if parent.exists())  # whose own signs are no pattern
        found = glob.glob(str(path.relative_to(base)), root_dir=base, recursive=True)  # noqa: PTH207
    except (OSError, RuntimeError, ValueError) as error:
        raise SrmuError(
            f"{name[:SHOWN]}: no such file ({getattr(error, 'strerror', '') or first_line(error)})"
        ) from None
    return sorted(base / one for one in found)


def require_free(path: Path) -> None:
    """Refuse an output folder that is not empty, so that nothing is overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        kind = "is not empty" if path.is_dir() else "is a file"
        raise SrmuError(f"output folder {path} {kind}; name a new folder or remove it first")
    require_place(path)


def require_place(path: Path) -> None:
    """Refuse a folder that cannot be created."""
    require_utf8(path)
    parent = next(p for p in path.resolve().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SrmuError(f"folder {path} cannot be made: {parent} is not a folder to write to")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` and rename it to `path` only if the block succeeds."""
    require_free(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            flush_path(file)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def end_lock(lock: BaseFileLock) -> None:
    """Release a lock and leave no file of it.

    The file goes first: who waits sees that it has no name, and makes it anew. Windows removes no file that is open;
    there the release does it.
    """
    if lock.lock_counter == 1:  # the same process may have locked it twice
        with suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()


def flush_path(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk."""
    if os.name == "nt":  # Windows opens no folder, and flushes no file that is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(path: Path, size: int) -> None:
    """SrmuError if `size` bytes plus a tenth do not fit on the disk of a path."""
    place = next(p for p in [path.resolve(), *path.resolve().parents] if p.exists())
    free = shutil.disk_usage(place).free
    if free < (needed := 1.1 * size):
        needs = f"{path} needs {format_gb(needed)}, {format_gb(needed - free)} more than are free there"
        raise SrmuError(f"{needs}; free some, or name another disk")


def format_gb(count: float) -> str:
    return (
        f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count:.0f} bytes"
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old text or the new one, never a part."""
    stays = path.exists() and not path.is_file()  # a device or a pipe, such as /dev/null, is written into
    target = path if stays else path.with_name(f".{path.name}.{os.getpid()}")
    try:
        target.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on Windows
        if not stays:
            flush_path(target)
            target.replace(path)
    finally:
        if not stays:
            target.unlink(missing_ok=True)


def write_output(path: Path, text: str) -> None:
    """Write a file that a person named, with the folders above it; SrmuError where it cannot be."""
    if path.is_dir():
        raise SrmuError(f"{path} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise SrmuError(f"{path} cannot be written: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    write_whole(path, format_json(value))


def read_json(path: Path, default: Any = REQUIRED) -> Any:
    """The value of a JSON file, or the list of those in JSON lines; `default`, or SrmuError, if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        if default is REQUIRED:
            raise SrmuError(f"{path}: no such file{suggest_path(path)}") from None
        return default
    except (OSError, ValueError, RecursionError) as error:
        raise SrmuError(f"{path} is damaged ({first_line(error)}); make it again") from None


def format_json(value: Any) -> str:
    """Sorted, indented JSON: the same text for the same value."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def sha256(*parts: bytes | memoryview | Path) -> str:
    """Hex digest of the concatenation of byte strings and file contents."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") if isinstance(part, Path) else io.BytesIO(part) as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def import_from_file(what: str, name: str) -> Any:
    """The object that `path/to/file.py:attribute` names, to be `what`; None if the file has no such attribute."""
    path, _, attribute = name.rpartition(":")
    unique = f"{OWN_CODE}{Path(path).stem}_{sha256(path.encode())[:8]}"  # so that it hides no other module
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise SrmuError(f"{what} {name}: no such file{suggest_path(Path(path))}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code
        raise SrmuError(f"{what} {name}: {type(error).__name__}: {error}") from error
    return getattr(module, attribute, None)


def carry_files(source: Path, folder: Path) -> None:
    """Copy what lies beside a model's weights and is not in `folder` yet: tokenizer, templates, processor, licence."""
    for file in (*source.iterdir(), *source.glob("additional_chat_templates/*")):
        target = folder / file.relative_to(source)
        wanted = file.is_file() and file.suffix in CARRIED and not file.name.startswith((".", EXPORTED))
        stale = "safetensors" in file.name or file.name == "hf_quant_config.json"  # which speak of other weights
        if wanted and not stale and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file.resolve(), target)


def cached(kind: str, key: Any, make: Callable[[], Any], *, together: bool = False) -> Any:
    """The JSON value that `make` returns, or that it returned before for the same `key`, which decides it.

    With `together` all processes make it, and the first one reads and writes; without, each is on its own.
    """
    value = find_cached(kind, key)
    if together:
        value = distributed.agree_on(value)
    if value is None:
        value = json.loads(format_json(make()))  # as the next caller will read it
        if not together or distributed.is_first():
            keep_cached(kind, key, value)
    return value


def find_cached(kind: str, key: Any) -> Any:
    """A value that was kept; None if there is none, or its file is damaged."""
    try:
        entry = read_json(cache_file(kind, key))
        return entry["value"] if entry["sha256"] == sha256(format_json(entry["value"]).encode()) else None
    except (SrmuError, KeyError, TypeError):
        return None


def keep_cached(kind: str, key: Any, value: Any) -> None:
    """Keep a JSON value; where the cache folder cannot be used, say so once and go on."""
    path = cache_file(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"sha256": sha256(format_json(value).encode()), "value": value})
    except OSError as error:
        warn_once(f"results are not kept in {cache_dir()}: {error.strerror}; going on without")


def cache_file(kind: str, key: Any) -> Path:
    return cache_dir() / kind / f"{sha256(json.dumps(key, sort_keys=True).encode())}.json"
