"""The ranges of pyproject.toml start at the set of `make test-lowest` and hold the set that CI runs."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import srmu

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = [*PROJECT["dependencies"], *(line for name in ("postgres", "sign", "real", "nf4") for line in EXTRAS[name])]
USED = [Requirement(line) for line in LINES]


def read_pins(name: str) -> dict[str, Version]:
    lines = (line.partition(";")[0] for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
    return {canonicalize_name(key): Version(pin) for key, _, pin in (line.partition("==") for line in lines)}


def test_ranges_start_at_the_lowest_set() -> None:
    pins = read_pins("constraints-lowest.txt")
    floors = {one.name: [Version(s.version) for s in one.specifier if s.operator == ">="] for one in USED}
    assert floors == {one.name: [pins[canonicalize_name(one.name)]] for one in USED}


def test_ranges_hold_the_set_that_ci_runs() -> None:
    pins = read_pins("constraints.txt")
    wanted = [*USED, *(Requirement(line) for line in EXTRAS["dev"] + EXTRAS["docs"] if not line.startswith("srmu"))]
    assert [one.name for one in wanted if not one.specifier.contains(pins[canonicalize_name(one.name)])] == []


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert srmu.__version__ == PROJECT["version"] == cited
