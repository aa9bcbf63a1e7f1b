"""Progress where there is no terminal: log lines on standard error, none on standard output."""

import pytest

from srmu.engine import progress


def test_log_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.show_progress("srmu", 4) as tick:
        for text in ("a", "b", "", "last [bold] one"):
            tick(text)
    out, err = capsys.readouterr()
    # After 11 s for two of four steps, 11 s are left; the last step always shows.
    assert err.splitlines() == ["srmu 2/4 b 11 s left", "srmu 4/4 last [bold] one 0 s left"]
    assert out == ""


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.ignore_progress("srmu", 1) as tick:
        tick("text")
    assert capsys.readouterr() == ("", "")
