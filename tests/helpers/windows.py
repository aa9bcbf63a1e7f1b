"""The rules of Windows that Linux does not have: open files stay where they are, and some names cannot be."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import UnixFileLock

FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def list_held() -> Iterator[str]:
    """The files that this process holds open or mapped."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            yield str(link.readlink())
    for line in Path("/proc/self/maps").read_text().splitlines():
        yield line[line.find("/") :] if "/" in line else ""


def follow_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are open or mapped cannot be removed, renamed or replaced, nor the folders that hold them renamed."""

    def guarded(name: str) -> Any:
        real = getattr(os, name)

        def change(*paths: Any, **options: Any) -> Any:
            # of a tree that is removed, the folder is known by its handle
            above = f"/proc/self/fd/{options['dir_fd']}" if options.get("dir_fd") is not None else ""
            places = [os.path.realpath(Path(above) / path) for path in paths]
            for held in list_held():
                if not Path(held).is_dir() and any(held == one or held.startswith(f"{one}/") for one in places):
                    raise PermissionError(13, "The process cannot access the file", held)
            return real(*paths, **options)

        return change

    for name in ("unlink", "remove", "rename", "replace"):
        monkeypatch.setattr(os, name, guarded(name))
    release = UnixFileLock._release

    def release_lock(lock: UnixFileLock) -> None:  # as that for Windows does
        release(lock)
        Path(lock.lock_file).unlink(missing_ok=True)

    monkeypatch.setattr(UnixFileLock, "_release", release_lock)
