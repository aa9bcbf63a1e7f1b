"""The page of all methods is what the code says, and the index leads to every equation."""

import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest

from srmu.cli import main
from srmu.methods import METHODS, Misdirection, reference
from srmu.methods.base import Level

ROOT = Path(__file__).parents[2]


def printed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["srmu", "info", "methods", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    answer = capsys.readouterr()
    assert not stop.value.code, answer.err
    return answer.out


def test_the_page_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    assert page == printed(["--markdown"], monkeypatch, capsys), "srmu info methods --markdown > docs/reference.md"


def test_every_method_is_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed([], monkeypatch, capsys)
    told = json.loads(printed(["--json"], monkeypatch, capsys))
    assert list(told) == list(METHODS)
    for name, cls in METHODS.items():
        assert re.search(rf"^\s*{name}\s+{re.escape(cls.paper)}\s", shown, flags=re.MULTILINE)
        assert told[name]["level"] in get_args(Level)
        assert told[name]["trains"]
        assert told[name]["about"].endswith(".")
        for option, default in told[name]["options"].items():
            value = getattr(cls(), option)
            assert default == (list(value) if isinstance(value, tuple) else value)


def test_one_method_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(["npo"], monkeypatch, capsys)
    assert "beta: 0.1" in shown
    assert "retain: none  # one of none, nll, kl" in shown
    assert "srmu (" not in shown


def test_every_option_that_is_a_choice_says_which() -> None:
    text = reference.list_options(METHODS["srmu"])["importance"][1]
    assert text.startswith("one of ratio, difference, product")


def test_every_method_has_an_equation() -> None:
    """And each file that the index names holds the comment, in the place that it names."""
    found = list(reference.find_equations())
    places = {place.split(".")[0] for *_, place in found}
    shared = {"repselect", "retrain"}  # retrain has none; the others' are found below
    for name, cls in METHODS.items():
        assert cls.__name__ in places or issubclass(cls, Misdirection) or name in shared, name
    for text, file, place in found:
        source = (reference.PACKAGE / file).read_text()
        assert f"# eq: {text}" in source
        assert re.search(rf"(def|class) {place.rpartition('.')[2]}\b", source), (file, place)
    papers = " ".join(text for text, _, _ in found)
    for paper in ("SRMU eq. 2", "SRMU eq. 3", "SRMU eq. 4", "SRMU eq. 5", "DEPN", "RepSelect"):
        assert paper in papers
