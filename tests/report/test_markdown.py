"""The settings behind the table of all methods are what the search found, for every method."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from srmu.methods import METHODS

CONFIGS = Path(__file__).parents[2] / "configs"
ORACLE = "Retraining (oracle)"


def read(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())


def test_every_method_is_searched_alike_and_run_at_its_best() -> None:
    space, table = (read("search-methods.yaml"), json.loads((CONFIGS / "search-methods.json").read_text()))
    chosen = read("methods-closed.yaml")
    assert chosen["common"] == space["common"]
    assert list(chosen["methods"]) == [*space["methods"], ORACLE]
    for label, method in space["methods"].items():
        rows = [row for row in table if row["method"] == label]
        assert len(rows) == math.prod(map(len, method["grid"].values())) == 6, label
        best = max(rows, key=lambda row: row["score"])["setting"].split()
        assert chosen["methods"][label] == [*method["set"], *best], label


def test_what_was_found_to_last_is_what_is_run() -> None:
    """The chosen setting is among those tried, which are the first of the file's or all of them."""
    space = read("search-robust.yaml")
    found = json.loads((CONFIGS / "search-robust.json").read_text())
    run = read("robust.yaml")["worlds"]["closed"]["methods"]
    for label, method in space["methods"].items():
        settings = [[*space["common"], *method["set"], *one] for one in method["try"]]
        tried = [row["setting"] for row in found[label]["tried"]]
        assert tried == settings[: len(tried)], label
        assert found[label]["chosen"] in tried, label
        assert [*space["common"], *run[label]] == found[label]["chosen"], label


def test_no_method_is_left_out() -> None:
    lists = (read("methods-closed.yaml")["methods"], read("robust.yaml")["worlds"]["closed"]["methods"])
    named = {
        setting.removeprefix("method.name=")
        for methods in lists
        for settings in methods.values()
        for setting in settings
        if setting.startswith("method.name=")
    }
    assert named == set(METHODS)
