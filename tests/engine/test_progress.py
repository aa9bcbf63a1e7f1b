"""Progress on standard error: a changing line where a person watches, log lines elsewhere."""

import io
import sys
from types import ModuleType

import pytest
from rich.console import Console

from srmu.engine import progress


def test_log_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.show_progress("srmu", 4) as tick:
        for text in ("a", "b", "", "last [bold] one"):
            tick(text)
    out, err = capsys.readouterr()
    # After 11 s for two of four steps, 11 s are left; the last step always shows.
    assert err.splitlines() == ["srmu 2/4 b 11 s left", "srmu 4/4 last [bold] one 0 s left"]
    assert out == ""


def enter_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process look like the kernel of a notebook."""
    shell = type("ZMQInteractiveShell", (), {})()
    module = ModuleType("IPython")
    module.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)


def test_one_line_changes_in_a_notebook(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    enter_notebook(monkeypatch)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a kernel does
    clock = iter([0.0, 0.05, 1.0, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.show_progress("srmu", 3) as tick:
        for text in ("too soon", "a longer text", "end"):
            tick(text)
    out, err = capsys.readouterr()
    first, last = "srmu 2/3 a longer text 0 s left", "srmu 3/3 end 0 s left"
    assert err == f"\r{first}\r{last.ljust(len(first))}\n"
    assert out == ""


def test_library_functions_show_progress_where_a_person_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress.choose_progress() is progress.ignore_progress
    with monkeypatch.context() as patch:
        enter_notebook(patch)
        assert progress.choose_progress() is progress.show_progress
    monkeypatch.setattr(progress, "stderr", Console(force_terminal=True, file=io.StringIO()))
    assert progress.choose_progress() is progress.show_progress
    with progress.show_progress("a sweep", 2):  # what is done inside of it shows nothing
        assert progress.choose_progress() is progress.ignore_progress
    assert progress.choose_progress() is progress.show_progress
    monkeypatch.setattr(progress.multiprocessing, "parent_process", lambda: "a parent")
    assert progress.choose_progress() is progress.ignore_progress


def test_a_long_step_tells_its_own_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a step of something else, whose count waits and whose time left is not said."""
    clock = iter([0.0, 1.0, 20.0, 20.0, 40.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.show_progress("attacking", 2) as tick:
        with progress.nest_progress(tick, "a search")("steps", 100) as tick_within:
            tick_within("(trial 1 of 4, step 1)", 0)
            tick_within("(trial 1 of 4, step 20)", 20)
        tick("a search")
    assert capsys.readouterr().err.splitlines() == [
        "attacking 0/2 a search: steps 0/100 (trial 1 of 4, step 1)",
        "attacking 0/2 a search: steps 20/100 (trial 1 of 4, step 20) 156 s left",
        "attacking 1/2 a search 50 s left",
    ]


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.ignore_progress("srmu", 1) as tick:
        tick("text")
    assert capsys.readouterr() == ("", "")
