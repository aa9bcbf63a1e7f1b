"""Results that can be made again, kept in the cache folder by what decides them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from srmu.engine import distributed
from srmu.engine.files import cache_dir, format_json, read_json, sha256, write_json
from srmu.engine.progress import print_line
from srmu.errors import SrmuError

warn_once = cache(print_line)


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
