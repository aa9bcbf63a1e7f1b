"""Many runs as one experiment: each made once, failures kept with a reason, stopped ones go on."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from srmu.engine.progress import ignore_progress
from srmu.errors import DivergedError
from srmu.reproduce import experiment as experiments
from srmu.reproduce.experiment import (
    DIVERGED,
    NOT_RUN,
    Experiment,
    OneModel,
    PlannedRow,
    RunJob,
    Scored,
    Testbeds,
    run_experiment,
)

SETTINGS = {
    "SRMU": ["method.name=srmu"],
    "GA": ["method.name=ga"],
    "Far": ["method.name=rmu", "method.coeff=null", "method.kappa=1000"],
    "Broken": ["method.name=rmu", "method.coeff=null", "method.kappa=1"],
    "Misspelt": ["method.name=rmu", "method.kapa=1"],
}


@dataclass(frozen=True)
class Written(Scored):
    """Instead of a run a file named after its seed, in a folder named after its other settings."""

    out: Path = Path()

    def folder(self, job: RunJob) -> Path:
        named = [o for o in job.overrides if o.startswith(("method", "topics"))]
        return self.out / job.config.parent.name / job.config.stem / ",".join(named)

    def find_result(self, job: RunJob) -> Path | None:
        return self.folder(job) if self.folder(job).exists() else None

    def measure_run(self, job: RunJob, watch: Any = ignore_progress) -> Path:
        with watch("steps", 1):
            pass
        if "method.kappa=1000" in job.overrides:
            raise DivergedError("too strong")
        if "method.kappa=1" in job.overrides:
            raise ZeroDivisionError("a fault")
        self.folder(job).mkdir(parents=True)
        return self.folder(job)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[RunJob]:
    """The jobs that were made, one after the other in this process."""
    jobs: list[RunJob] = []

    def run_all(given: Any, watch: Any, *, function: Any) -> list[Any]:
        jobs.extend(given)
        return [function(job) for job in given]

    monkeypatch.setattr(experiments, "run_all", run_all)
    return jobs


def plan(tmp_path: Path, *labels: str, seeds: tuple[int, ...] = (0, 1)) -> Experiment:
    for seed in range(2):
        folder = tmp_path / "out" / f"testbed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "testbed.json").write_text("{}")
        for name in ("low", "high"):
            topics = f"{{topic: {{forget: f.jsonl, retain: {name}.jsonl}}}}"
            (folder / f"{name}.yaml").write_text(f"model: model\ntopics: {topics}\n")
    settings = {label: SETTINGS[label] for label in labels}
    out = tmp_path / "out"
    return Experiment(out, Testbeds(out), settings, seeds, (), Written(out=tmp_path / "made"))


def plan_rows(experiment: Experiment) -> list[PlannedRow]:
    return [PlannedRow(k, k, regime) for k in experiment.settings for regime in ("low", "high")]


def test_each_different_run_is_made_once(tmp_path: Path, made: list[RunJob]) -> None:
    experiment = plan(tmp_path, "SRMU", "GA")
    rows = plan_rows(experiment)
    measured = run_experiment(experiment, [*rows, *rows])
    assert [*measured] == rows
    assert all(len(row.runs) == 2 and row.questions == (0, 1) for row in measured.values())
    # GA reads no retain texts: one run a testbed serves both regimes
    runs = {(row.label, plan.regime): row.runs for plan, row in measured.items()}
    assert runs["GA", "low"] == runs["GA", "high"]
    assert runs["SRMU", "low"] != runs["SRMU", "high"]
    assert len(made) == len({*made}) == 6
    # each testbed's first run comes before the others
    assert [job.config.parent.name for job in made[:2]] == ["testbed0", "testbed1"]


def test_what_is_there_is_not_made_again(tmp_path: Path, made: list[RunJob]) -> None:
    first = plan(tmp_path, "SRMU", seeds=(0,))
    run_experiment(first, plan_rows(first))
    experiment = plan(tmp_path, "SRMU")
    rows = plan_rows(experiment)
    assert {row.label for row in run_experiment(experiment, rows, make=False).values()} == {"SRMU (1 of 2)"}
    before = len(made)
    measured = run_experiment(experiment, rows)
    assert [job.config.parent.name for job in made[before:]] == ["testbed1"] * 2
    assert run_experiment(experiment, rows) == measured == run_experiment(experiment, rows, make=False)
    assert len(made) == before + 2


def test_a_failure_costs_its_own_row(tmp_path: Path, made: list[RunJob]) -> None:
    experiment = plan(tmp_path, *SETTINGS)
    rows = [PlannedRow(label, label, "low") for label in SETTINGS]
    why = {row.label: row.why for row in run_experiment(experiment, rows).values()}
    assert why["SRMU"] == why["GA"] == ""
    assert why["Far"] == f"{DIVERGED} in 2 of 2 runs"
    assert why["Broken"] == "failed: ZeroDivisionError: a fault in 2 of 2 runs"
    assert why["Misspelt"].startswith("failed: method.kapa is not an option")
    assert len(made) == 8  # what cannot be planned is not tried


def test_nothing_there_is_not_run(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, Testbeds(tmp_path), SETTINGS, (0,), ())
    (row,) = run_experiment(experiment, [PlannedRow("SRMU", "SRMU", "low")], make=False).values()
    assert (row.why, row.runs) == (NOT_RUN, ())


def test_on_one_model_a_failure_is_raised(tmp_path: Path) -> None:
    """What the next run would need hours for may fail in the same way."""
    spec = {"methods": {k: {"config": "wmdp-zephyr-rmu.yaml"} for k in SETTINGS}, "regimes": {"low": []}}
    experiment = Experiment(tmp_path, OneModel("owner/model", spec), SETTINGS, (0,), (), Written(out=tmp_path / "made"))
    done, far = (PlannedRow(label, label, "low") for label in ("SRMU", "Far"))
    labels: list[str] = []

    def watch(label: str, total: int) -> Any:
        labels.append(label)
        return nullcontext()

    measured = run_experiment(experiment, [done, far], watch)
    assert labels == ["run 1 of 2: steps", "run 2 of 2: steps"]
    assert measured[far].why == f"{DIVERGED} in 1 of 1 runs" and not measured[done].why
    with pytest.raises(ZeroDivisionError):
        run_experiment(experiment, [PlannedRow("Broken", "Broken", "low")])


def test_strength_is_not_taken_from_what_failed(tmp_path: Path, made: list[RunJob]) -> None:
    experiment = plan(tmp_path, "SRMU", "Far")
    row = PlannedRow("like", "SRMU", "low", ("method.importance=uniform",), ("Far", "coeff"))
    (found,) = run_experiment(experiment, [row]).values()
    assert not found.runs
    assert "Far diverged in 2 of 2 runs: other runs take their strength from it" in found.why
