"""Sweeps: spaces, samplers, workers that die, and the verb from file to table."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from helpers import attack_world as world
from helpers.models import Answer
from helpers.sweep_worker import POINTS, join, objective
from srmu.engine.progress import ignore_progress
from srmu.errors import DivergedError, SrmuError
from srmu.evals.results import read_attacks, read_metrics
from srmu.runs.run import Run
from srmu.search import sweep
from srmu.search.queue import FILE, RETRIES, Study, list_points, open_study, queue_points, work_queue
from srmu.search.space import Dimension, PlaceSampler
from srmu.search.sweep import Sweep, read_sweep, sweep_rows

# --- what is searched


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ([8, 16, "ratio", None, True], (8, 16, "ratio", None, True)),
        ({"low": 1, "high": 170, "step": 40}, (1, 41, 81, 121, 161)),
        ({"low": 1, "high": 161, "step": 40}, (1, 41, 81, 121, 161)),
        ({"low": 3, "high": 5}, (3, 4, 5)),
        ({"low": 0.1, "high": 0.3, "step": 0.1}, (0.1, 0.2, 0.3)),
        ({"low": 0, "high": 1, "step": 0.25}, (0.0, 0.25, 0.5, 0.75, 1.0)),
    ],
)
def test_values_of_a_dimension(given: Any, values: tuple[Any, ...]) -> None:
    found = Dimension.model_validate(given).list_values()
    assert found == values
    assert [type(v) for v in found] == [type(v) for v in values]


@pytest.mark.parametrize(
    ("given", "kind", "low", "high"),
    [
        ({"low": 1, "high": 1000, "log": True}, int, 1, 1000),
        ({"low": "1e-5", "high": 1e-2, "log": True}, float, 1e-5, 1e-2),
        ({"low": 2, "high": 9, "step": 3}, int, 2, 8),
        ({"low": 0.1, "high": 0.7, "step": 0.2}, float, 0.1, 0.7),
    ],
)
def test_a_sampler_stays_in_a_range(given: Any, kind: type, low: float, high: float) -> None:
    one = Dimension.model_validate(given)
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    found = [one.suggest(study.ask(), "key", grid=False) for _ in range(100)]
    assert {type(v) for v in found} == {kind}
    assert low <= min(found) < max(found) <= high
    if one.step is not None:
        assert set(found) == {*one.list_values()}


# --- samplers


@pytest.fixture(autouse=True)
def short_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srmu.search.queue.LOCAL_HEARTBEAT", 1)


def study_of(folder: Path, count: int, sampler: Any, directions: Any = ("minimize",), **given: Any) -> Study:
    queue = given.pop("queue", [{}] * count)
    spec = given.pop("spec", {"a": 1})
    return open_study(folder / FILE, "study", spec=spec, directions=directions, sampler=sampler, queue=queue, **given)


def test_a_database_lies_where_its_path_says(tmp_path: Path) -> None:
    folder = tmp_path / r"C:\Users\Anna M\50% #1? {0} @ü"
    study_of(folder, 1, RandomSampler())
    assert [path.name for path in folder.iterdir()] == [FILE]


@pytest.mark.slow
def test_a_resumed_sampler_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """After more trials were asked for, after Ctrl-C in the middle of one, after kill -9."""

    def values(folder: Path, *counts: int, stop_at: int = -1, killed: bool = False) -> list[float]:
        folder.mkdir()

        def square(trial: optuna.Trial) -> float:
            if trial.number == stop_at:
                raise KeyboardInterrupt
            return trial.suggest_float("x", 0, 1) ** 2

        def make(place: int) -> TPESampler:
            return TPESampler(seed=place, n_startup_trials=3)

        for count in counts:
            study = study_of(folder, count, PlaceSampler(make))
            if killed and study.trials:
                queue_lost(study)
                study.ask()  # and is never heard of again
            with suppress(KeyboardInterrupt):
                work_queue(study, square, ignore_progress, in_turn=True)
        return [trial.params["x"] for trial in study.get_trials(states=(TrialState.COMPLETE,))]

    whole = values(tmp_path / "whole", 7)
    assert len(set(whole)) == 7
    assert values(tmp_path / "parts", 2, 7) == whole
    assert values(tmp_path / "stopped", 7, 7, stop_at=4) == whole
    assert values(tmp_path / "killed", 4, 7, killed=True) == whole


def test_the_front_of_nsga2_is_not_dominated(tmp_path: Path) -> None:
    def two(trial: optuna.Trial) -> tuple[float, float]:
        x, y = (trial.suggest_float(key, 0, 1) for key in "xy")
        return x, (1 - x) ** 2 + y

    sampler = PlaceSampler(lambda place: NSGAIISampler(population_size=4, seed=place))
    study = study_of(tmp_path, 16, sampler, ("minimize", "maximize"))
    work_queue(study, two, ignore_progress)
    points = {trial.number: trial.values for trial in study.trials}
    assert len(points) == 16

    def dominated(a: list[float]) -> bool:
        return any(b[0] <= a[0] and b[1] >= a[1] and b != a for b in points.values())

    front = {number for number, values in points.items() if not dominated(values)}
    assert {trial.number for trial in study.best_trials} == front
    generations = {
        value for trial in study.trials for key, value in trial.system_attrs.items() if key.endswith("generation")
    }
    assert len(generations) > 3  # it does breed


# --- workers


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "helpers" / "sweep_worker.py"
    study = join(str(tmp_path / FILE))

    def until_two(trial: optuna.Trial) -> float:
        if trial.number == 2:
            (tmp_path / "hold").touch()
            raise KeyboardInterrupt
        return trial.suggest_float("x", 0, POINTS)

    with pytest.raises(KeyboardInterrupt):
        work_queue(study, until_two, ignore_progress)
    worker = subprocess.Popen([sys.executable, str(script), str(tmp_path / FILE), str(tmp_path)])
    end = time.monotonic() + 120
    while not [*tmp_path.glob("started-*")] and time.monotonic() < end:
        assert worker.poll() is None
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    (tmp_path / "hold").unlink()
    assert len(study.get_trials(states=(TrialState.RUNNING,))) == 1
    work_queue(study, lambda trial: objective(tmp_path, trial), ignore_progress)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert sorted(trial.params["x"] for trial in complete) == list(range(POINTS))
    lost = study.get_trials(states=(TrialState.FAIL,))
    assert len(lost) == 2 and len(study.trials) == POINTS + 2  # the interrupted, the killed
    begun = Counter(path.name.split("-")[1] for path in tmp_path.glob("started-*"))
    assert sorted(begun.values()) == [1, 1, 2]  # points 0 and 1 were not begun again


@pytest.mark.slow
def test_a_worker_killed_before_its_first_sign_of_life_is_missed(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2, RandomSampler(), queue=[{"x": 0.0}, {"x": 1.0}])
    queue_lost(study)
    study.ask()
    work_queue(study, lambda trial: trial.suggest_float("x", 0, 1), ignore_progress)
    assert [t.state for t in study.trials] == [
        TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE,
    ]  # fmt: skip


@pytest.mark.slow
def test_many_workers_do_each_point_once(tmp_path: Path) -> None:
    """They join at once, the file is made by one of them, and no trial goes to two."""
    done: list[float] = []

    def note(trial: optuna.Trial) -> float:
        done.append(trial.suggest_float("x", 0, 20))
        return done[-1]

    def work(number: int) -> None:
        queue = [{"x": float(i)} for i in range(20)]
        work_queue(study_of(tmp_path, 20, RandomSampler(), queue=queue), note, ignore_progress)

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(work, range(4))]
    assert sorted(done) == [*range(20)]


def test_trials_in_turn_wait_for_each_other(tmp_path: Path) -> None:
    """So that each knows what all before it found, whoever ran them."""
    queue = [{"x": float(i)} for i in range(6)]
    running = Counter[str]()

    def alone(trial: optuna.Trial) -> float:
        running["now"] += 1
        assert running["now"] == 1
        time.sleep(0.02)
        running["now"] -= 1
        return trial.suggest_float("x", 0, 6)

    def work(number: int) -> None:
        study = study_of(tmp_path, 6, RandomSampler(), queue=queue)
        work_queue(study, alone, ignore_progress, in_turn=True)

    with ThreadPoolExecutor(2) as pool:
        [*pool.map(work, range(2))]


def test_a_trial_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    study = study_of(tmp_path, 1, RandomSampler(), queue=[{"x": 1.0}])
    for _ in range(RETRIES + 1):
        queue_lost(study)
        study.tell(study.ask().number, state=TrialState.FAIL)  # as of a worker without heartbeat
    work_queue(study, lambda trial: pytest.fail("it is tried again"), ignore_progress)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * (RETRIES + 1)


def queue_lost(study: Study) -> None:
    """What a worker does first: queue the points that nobody has."""
    queue_points(study, [point for point in list_points(study) if point.is_lost])


def test_two_that_fill_the_queue_do_nothing_twice(tmp_path: Path) -> None:
    study = study_of(tmp_path, 3, RandomSampler(), queue=[{"x": float(i)} for i in range(3)])
    for _ in range(2):  # as another worker may have done at the same moment
        queue_points(study, [*list_points(study)])
    done: list[float] = []

    def one(trial: optuna.Trial) -> float:
        done.append(trial.suggest_float("x", 0, 3))
        return done[-1]

    work_queue(study, one, ignore_progress)
    study.ask()  # and one that found the queue empty
    assert done == [0, 1, 2]
    assert [point.standing.number for point in list_points(study) if point.standing] == [0, 1, 2]


def test_a_worker_that_was_taken_for_dead_drops_its_trial(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2, RandomSampler(), queue=[{"x": float(i)} for i in range(2)])
    other = study_of(tmp_path, 2, RandomSampler(), queue=[{"x": float(i)} for i in range(2)])

    def slow(trial: optuna.Trial) -> float:
        if trial.number == 0:
            other.tell(0, state=TrialState.FAIL)
        return trial.suggest_float("x", 0, 2)

    work_queue(study, lambda trial: slow(trial) + 1, ignore_progress)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert sorted((t.params["x"], t.value) for t in complete) == [(0, 1), (1, 2)]
    assert len(study.trials) == 3


def test_trials_that_fail_and_diverge(tmp_path: Path) -> None:
    def one(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 9)
        if x == 0:
            raise SrmuError("no such thing")
        if x == 1:
            raise DivergedError("the loss is nan")
        return x

    ticks: list[str] = []
    study = study_of(tmp_path, 3, RandomSampler(), queue=[{"x": float(i)} for i in range(3)])
    work_queue(study, one, lambda label, total: nullcontext(ticks.append))
    assert [t.state for t in study.trials] == [
        TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE,
    ]  # fmt: skip
    assert [t.user_attrs.get("why") for t in study.trials] == [
        "no such thing", "the loss is nan", None,
    ]  # fmt: skip
    assert len(ticks) == 3 and ticks[-1] == "best 2 (trial 2)"


def test_a_mistake_in_all_trials_stops_and_can_be_mended(tmp_path: Path) -> None:
    def wrong(trial: optuna.Trial) -> float:
        raise SrmuError("the tasks are not there")

    study = study_of(tmp_path, 5, RandomSampler())
    with pytest.raises(SrmuError, match="the tasks are not there"):
        work_queue(study, wrong, ignore_progress)
    assert len(study.get_trials(states=(TrialState.WAITING,))) == 2
    work_queue(study, lambda trial: 1.0, ignore_progress)
    assert [t.state for t in study.trials[3:]] == [TrialState.COMPLETE] * 5


def test_another_study_of_that_name_is_refused(tmp_path: Path) -> None:
    study_of(tmp_path, 1, RandomSampler(), spec={"search.method.kappa": [8]})
    with pytest.raises(SrmuError, match=r"another search\.method\.kappa: \[8\], here \[16\]"):
        study_of(tmp_path, 1, RandomSampler(), spec={"search.method.kappa": [16]})


# --- sweep files


@pytest.fixture
def written(workplace: Path) -> Callable[..., Path]:
    """A sweep file on the pico model, with what is given changed."""
    paths = {"forget": "forget.jsonl", "retain": "retain.jsonl", "max_length": 16}
    config = {
        "model": "model", "method": {"name": "rmu", "layer": 2}, "topics": {"t": paths},
        "train": {"max_steps": 1, "learning_rate": 1e-2}, "eval": [],
    }  # fmt: skip
    (workplace / "run.yaml").write_text(yaml.safe_dump(config))

    def write(**changed: Any) -> Path:
        given = {
            "config": "run.yaml",
            "search": {"method.kappa": [8, 16], "method.alpha": [10, 100]},
            "objectives": {"task/acc": "minimize"},
        }
        path = workplace / "sweep.yaml"
        path.write_text(yaml.safe_dump(given | changed, sort_keys=False))
        return path

    return write


@pytest.fixture
def trivial(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Runs that take no time: the accuracy is kappa / 100 + seed / 1000. Gives what was run."""
    made: list[dict[str, float]] = []

    def unlearn(config: Any) -> Any:
        made.append({"kappa": config.method.kappa, "seed": config.seed})
        return SimpleNamespace(folder=Path(config.runs_dir) / str(len(made)), config=config)

    def of_run(plan: Sweep, run: Any) -> Any:
        value = run.config.method.kappa / 100 + run.config.seed / 1000
        return {"task/acc": {"value": value, "stderr": 0.01, "n": 50.0}}

    monkeypatch.setattr(sweep, "unlearn_config", unlearn)
    monkeypatch.setattr(sweep, "run_metrics", of_run)
    monkeypatch.setattr(sweep, "check_objectives", lambda *args: None)
    return made


def test_a_grid_is_the_product_and_seeds_are_replicates(written: Any, trivial: list[dict[str, float]]) -> None:
    found = sweep.run_sweep(read_sweep(written(seeds=[0, 2])))
    assert [one["params"] for one in found["trials"]] == [
        {"method.kappa": kappa, "method.alpha": alpha} for kappa in (8, 16) for alpha in (10, 100)
    ]
    assert len(trivial) == 8
    first = found["trials"][0]
    assert first["replicates"] == {"task/acc": [0.08, 0.082]}
    assert first["values"] == {"task/acc": fmean([0.08, 0.082])}
    assert (first["errors"], first["n"]) == ({"task/acc": [0.01, 0.01]}, {"task/acc": 50})
    assert first["runs"] == ["runs/1", "runs/2"]
    assert sweep_rows(found)[0]["task/acc"] == "0.081 (0.080\N{EN DASH}0.082)"


def test_what_matters(written: Any, trivial: list[dict[str, float]]) -> None:
    space = {"method.kappa": [1, 2, 3, 4], "method.alpha": [10, 100]}
    found = sweep.run_sweep(read_sweep(written(search=space)))
    assert found["importance"]["method.kappa"] > 0.95
    assert sum(found["importance"].values()) == pytest.approx(1)


def test_nothing_matters_where_all_is_equal(
    written: Any, trivial: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "run_metrics", lambda *args: {"task/acc": {"value": 0.25, "stderr": 0.1, "n": 50}})
    found = sweep.run_sweep(read_sweep(written(search={"method.alpha": [*range(1, 9)]})))
    assert found["importance"] == {}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("kind", ["tpe", "nsga2"])
def test_samplers_choose_what_is_left(written: Any, trivial: list[dict[str, float]], kind: str) -> None:
    space = {"method.kappa": {"low": 1, "high": 64, "log": True}}
    path = written(search=space, sampler=kind, trials=12)
    sweep.run_sweep(read_sweep(path))
    found = sweep.run_sweep(read_sweep(path, ["trials=14"]))  # two more of the same study
    assert [one["state"] for one in found["trials"]] == ["complete"] * 14 and len(trivial) == 14
    best = min(found["trials"], key=lambda one: one["values"]["task/acc"])
    assert found["trials"][found["front"][0]]["values"] == best["values"]
    assert sum(found["importance"].values()) == pytest.approx(1)


@pytest.mark.parametrize(("name", "trials"), [("sweep-grid", 18), ("sweep-tpe", 40), ("sweep-nsga2", 60)])
def test_the_sweeps_that_come_with_srmu(written: Any, name: str, trials: int) -> None:
    run = written().with_name("run.yaml")
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    given = [f"config={run}", "set=[method.name=srmu]", f"out={run.parent / 'out'}"]
    ready = read_sweep(path, given)
    assert len(ready.list_points()) == trials and len(ready.objectives) > 1


def test_an_override_replaces_a_key_of_the_space(written: Any, trivial: list[dict[str, float]]) -> None:
    """The keys of a space have dots of their own."""
    given = ["search.method.kappa=[8]", "search.train.max_steps={low: 1, high: 2}"]
    found = sweep.run_sweep(read_sweep(written(), given))
    assert found["space"] == {
        "method.kappa": [8], "method.alpha": [10, 100], "train.max_steps": {"low": 1, "high": 2, "step": 1},
    }  # fmt: skip
    assert {run["kappa"] for run in trivial} == {8} and len(trivial) == 4


def test_a_run_config_is_no_sweep_file(written: Any, call: Any) -> None:
    path = written().with_name("run.yaml")
    assert_refused(call("sweep", path), "run.yaml is no sweep file", "config: run.yaml", f"srmu unlearn {path}")


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"search": {"method.kapa": [1]}}, ["search.method.kapa", "kappa"]),
    "bad value": ({"search": {"method.layer": [2, 99]}}, ["search.method.layer", "99"]),
    "log range in a grid": (
        {"search": {"method.kappa": {"low": 1, "high": 9, "log": True}}},
        ["search.method.kappa", "sampler=tpe"],
    ),
    "no search": ({"search": {}}, ["search: name"]),
    "a number": ({"search": {"method.kappa": 8}}, ["[choices]"]),
    "empty list": ({"search": {"method.kappa": []}}, ["[8, 16, 32]"]),
    "twice": ({"search": {"method.kappa": [8, 8]}}, ["twice"]),
    "misspelt range": ({"search": {"method.kappa": {"lo": 1, "high": 2}}}, ["lo", "low?"]),
    "high below low": ({"search": {"method.kappa": {"low": 3, "high": 2}}}, ["low below high"]),
    "words": ({"search": {"method.kappa": {"low": "a", "high": 2}}}, ["expected a number"]),
    "log from 0": (
        {"search": {"method.kappa": {"low": 0, "high": 2, "log": True}}, "sampler": "tpe"},
        ["above 0"],
    ),
    "no steps": (
        {"search": {"method.kappa": {"low": 0.5, "high": 2.0}}}, ["a list or a step"],
    ),
    "seed searched": ({"search": {"seed": [1]}}, ["seeds:"]),
    "grid with trials": ({"trials": 3}, ["trials", "leave it out"]),
    "tpe without trials": ({"sampler": "tpe"}, ["say how many"]),
    "unknown sampler": ({"sampler": "cmaes"}, ["sampler=cmaes", "'grid'"]),
    "unknown option": ({"objective": {}}, ["objective is not an option", "objectives?"]),
    "no objectives": ({"objectives": {}}, ["objectives"]),
    "direction": ({"objectives": {"task/acc": "up"}}, ["up", "minimize"]),
    "unknown attack": ({"objectives": {"attack.gcg2": "minimize"}}, ["attack.gcg2"]),
    "attack of another tier": ({"objectives": {"attack.gcg": "minimize"}}, ["attack.gcg"]),
    "attack option": ({"attack": {"teir": "smoke"}}, ["teir", "tier?"]),
    "unknown task": ({"objectives": {"nope/acc": "minimize"}}, ["nope", "does not exist"]),
    "seeds twice": ({"seeds": [1, 1]}, ["twice"]),
    "unknown user": ({"out": "~nobody-of-that-name/x"}, ["no such user"]),
    "no config": ({"config": "none.yaml"}, ["none.yaml", "no such file"]),
    "broken set": ({"set": ["method.kappa"]}, ["key=value"]),
}  # fmt: skip


def assert_refused(answer: Answer, *says: str) -> None:
    assert (answer.code, answer.out) == (2, ""), answer
    lines = [line for line in answer.err.splitlines() if not line.endswith(" s left")]
    assert len(lines) == 1 and lines[0].startswith("srmu: "), answer.err
    for part in says:
        assert part in lines[0]


@pytest.mark.parametrize("case", BAD)
def test_bad_sweep_files(written: Any, call: Any, monkeypatch: Any, case: str) -> None:
    changed, says = BAD[case]
    path = written(**changed)
    monkeypatch.chdir(path.parent)
    lm_eval = SimpleNamespace(task_index={}, all_tasks=[])  # its own takes seconds to read
    monkeypatch.setattr("srmu.evals.lm_eval._builtin_tasks", lambda: lm_eval)
    assert_refused(call("sweep", path.name), *says)
    assert not (path.parent / "sweeps").exists()


def test_bad_storages(written: Any, trivial: Any, call: Any) -> None:
    path = written()
    for storage, says in (
        ("postgresql://me:s3cret@127.0.0.1:1/x", "me:***@127.0.0.1:1/x cannot be used"),
        ("postgresql://me@127.0.0.1:1/x?password=s3cret", "cannot be used"),
        ("mysql://me:s3cret@host/x", "--storage: expected postgresql://"),
        ("postgresql://me:s3cret@host:1a/x", "expected postgresql://"),
        ("study.db", "expected postgresql://"),
    ):
        answer = call("sweep", path, "--storage", storage)
        assert_refused(answer, says)
        assert "s3cret" not in answer.err and "--storage" in answer.err
    assert not (path.parent / "sweeps").exists()


def test_a_missing_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise ImportError("psycopg")

    monkeypatch.setattr("srmu.search.queue.QueueStorage", missing)
    with pytest.raises(SrmuError, match=r"pip install 'srmu\[postgres\]'"):
        join("postgresql://me@host/x")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("hello\nworld\n")
    with pytest.raises(SrmuError, match=r"study\.db cannot be used: file is not a database"):
        study_of(tmp_path, 1, RandomSampler())


@pytest.mark.slow
def test_a_sweep_from_file_to_table(tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = {
        "model": "model", "method": {"name": "rmu", "layer": 2},
        "topics": {"t": {"forget": "forget.jsonl", "retain": "neutral.jsonl", "max_length": 8}},
        "train": {"max_steps": 4, "learning_rate": 3e-3}, "eval": ["harmless"],
        "tasks_dir": "tasks",
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(config))
    given = {
        "config": "run.yaml",
        "search": {"method.kappa": [4, 32], "method.alpha": [1, 100]},
        "objectives": {
            "hazard_val/acc": "minimize", "harmless/acc": "maximize", "attack.K*": "minimize",
        },
        "attack": {"names": ["logit_lens"], "tasks": ["hazard"], "limit": 40},
        "out": "found",
    }  # fmt: skip
    Path("sweep.yaml").write_text(yaml.safe_dump(given))
    answer = call("sweep", "sweep.yaml")
    assert answer.code == 0, answer.err
    assert "wrote found/sweep.json" in answer.out and "srmu unlearn run.yaml" in answer.out
    assert "trials 4/4" in answer.err and "on the front" in answer.err
    found = json.loads(Path("found/sweep.json").read_text())
    assert [one["state"] for one in found["trials"]] == ["complete"] * 4
    hits = 0
    for one in found["trials"]:
        run = Run.open(Path("found", *one["runs"]))
        results = read_metrics(run.folder)["after"]
        assert one["values"]["hazard_val/acc"] == results["hazard_val/acc"]["value"]
        attacked = read_attacks(run.folder)
        assert one["values"]["attack.K*"] == attacked["K*"]["value"]
        hits += run.record["activations"]["found"] > 0
    assert hits == 3  # all but the first found the activations of the fixed layers
    assert not any(str(tmp_path) in path.read_text() for path in (Path("found/sweep.json"),))

    before = {path: path.stat().st_mtime_ns for path in Path("found/runs").rglob("*")}
    again = call("sweep", "sweep.yaml", "--json")
    assert json.loads(again.out) == found
    assert before == {path: path.stat().st_mtime_ns for path in Path("found/runs").rglob("*")}

    assert_refused(
        call("sweep", "sweep.yaml", "objectives={attack.K*: minimize, hazard_val/acc: minimize}"),
        "exists with another objectives",
    )
    assert_refused(
        call("sweep", "sweep.yaml", "set=[train.max_steps=3]"),
        "exists with another config.train.max_steps: 4, here 3", "another name or",
    )  # fmt: skip
    assert_refused(
        call("sweep", "sweep.yaml", "objectives={hazard_val/accuracy: minimize}", "out=other"),
        "objective 'hazard_val/accuracy' is not measured", "hazard_val/acc?",
    )  # fmt: skip
    assert not Path("other").exists()
    shutil.rmtree("found/runs")  # the study remembers, whatever becomes of the runs
    assert call("sweep", "sweep.yaml").code == 0


def test_ctrl_c_says_how_to_go_on(
    written: Any, trivial: list[dict[str, float]], call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written()
    measure = sweep.run_metrics

    def interrupted(plan: Sweep, run: Any) -> Any:
        if len(trivial) == 2:
            raise KeyboardInterrupt
        return measure(plan, run)

    monkeypatch.setattr(sweep, "run_metrics", interrupted)
    answer = call("sweep", path)
    assert answer.code == 130 and "the same command goes on" in answer.err
    kept = json.loads((path.parent / "sweeps" / "sweep" / "sweep.json").read_text())
    assert Counter(one["state"] for one in kept["trials"]) == {"complete": 1, "waiting": 3}
    monkeypatch.setattr(sweep, "run_metrics", measure)
    assert call("sweep", path).code == 0
    assert len(trivial) == 5  # the one in hand again, the finished one not
