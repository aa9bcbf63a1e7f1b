"""No sockets, one thread, a cache folder for each test; models come from `helpers.models`."""

import gc
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.models import Answer, Call, save_pico, texts, write_jsonl
from srmu.engine.progress import silence_libraries

silence_libraries()  # the command line does so before they are loaded, which is too late here
# workers that tests start in processes of their own import the helpers, too
HERE = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))


@pytest.fixture(autouse=True, scope="session")
def processor() -> Iterator[None]:
    """One that computes in bfloat16: the dtype that a model is loaded in is not to depend on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srmu.engine.loading.computes_bf16", lambda: True)
        yield


@pytest.fixture(autouse=True, scope="module")
def settled() -> None:
    """What is held when a module of tests begins is not looked through again: each run collects garbage, and the
    libraries and thousands of tests are none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No sockets, and a cache folder of the test's own."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a test opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a pico model, forget.jsonl and retain.jsonl."""
    save_pico(tmp_path / "model")
    write_jsonl(tmp_path / "forget.jsonl", texts(10, 1, range(30)))
    write_jsonl(tmp_path / "retain.jsonl", texts(7, 2, range(20, 60)))
    return tmp_path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Call:
    """`srmu ...` in the working folder, in this process."""
    from srmu.cli import main

    def run(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["srmu", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main()
        assert isinstance(stop.value.code, int)
        return Answer(stop.value.code, *capfd.readouterr())

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`slow(keep=n)`: the first n cases of a test with many are fast all the same."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("slow")
        if mark is None or "keep" not in mark.kwargs:
            continue
        name = f"{item.path}::{getattr(item, 'originalname', item.name)}"
        seen[name] += 1
        if seen[name] <= mark.kwargs["keep"]:
            item.own_markers = [own for own in item.own_markers if own.name != "slow"]
