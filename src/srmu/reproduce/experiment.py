"""Method x regime x seed -> rows: every table of many runs is made here.

An `Experiment` says where runs are made, with which settings, and what is done to each. Its rows are planned
(`PlannedRow`), then `run_experiment` makes the runs that are missing, and gives each row with its runs (`MeasuredRow`).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from srmu.engine import progress
from srmu.engine.files import read_json, write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.weights import fingerprint_model, locate_model
from srmu.errors import DivergedError, SrmuError, first_line
from srmu.evals.results import read_metrics
from srmu.evals.score import score_model
from srmu.report.format import NOT_RUN
from srmu.runs.config import build_config, load_config
from srmu.runs.plan import plan_run
from srmu.runs.record import RECORD
from srmu.runs.run import Run, unlearn_config
from srmu.testbed.atlas import build_atlas
from srmu.testbed.build import build_testbed
from srmu.testbed.train import RECIPE
from srmu.testbed.world import create_closed

DIVERGED = "diverged"
# a testbed's config; that testbed's entanglement, and its name where it is not the regime's
REGIMES: dict[str, dict[str, Any]] = {"low": {"config": "low.yaml"}, "high": {"config": "high.yaml"}}


def find_preset(name: str) -> Path:
    """A file of `configs/`: in the package of a wheel, beside the sources of a checkout."""
    folders = [Path(__file__).parents[above] / "configs" for above in (1, 3)]
    return next(folder / name for folder in folders if (folder / name).is_file())


def read_preset(name: str) -> dict[str, Any]:
    return yaml.safe_load(find_preset(name).read_text(encoding="utf-8"))


def read_settings(name: str) -> dict[str, tuple[str, ...]]:
    """The settings of each method from a file that has them under `common` and `methods`."""
    preset = read_preset(name)
    return {label: (*preset["common"], *own) for label, own in preset["methods"].items()}


class PlannedRow(NamedTuple):
    """A row of a table or a point of a figure before its runs are made, one run a seed."""

    label: str
    method: str  # whose settings it takes
    regime: str
    extra: tuple[str, ...] = ()  # settings besides
    strength: tuple[str, str] | None = None  # a method whose run hands over its "coeff" or "kappa", seed by seed
    once: bool = False  # with the first seed alone, on the first testbed


class RunJob(NamedTuple):
    """A config file with overrides, and the tasks to score instead of the config's own."""

    config: Path
    overrides: tuple[str, ...]
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeasuredRow:
    """A row with its runs, which differ only in their seed."""

    label: str
    runs: tuple[Path, ...]
    questions: tuple[int, ...]  # that each run was asked: the same number, the same questions
    when: Literal["before", "after"] = "after"
    why: str = ""  # there are no runs
    missing: int = 0  # runs that are still to be made

    @property
    def is_whole(self) -> bool:
        """Whether it has all its runs: else it cannot be held against others run by run."""
        return not self.why and not self.missing


# ---- where runs are made


@dataclass(frozen=True)
class Testbeds:
    """Testbeds, each with a world, a model and directions of its own, as `folder` names them."""

    home: Path
    regimes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: REGIMES)
    folder: str = "testbed{seed}"
    world: str = "closed"
    oracle: bool = True
    model: str = ""  # that the atlas asks; "": the one that the registry has

    def locate(self, regime: str, seed: int) -> Path:
        name = self.regimes[regime].get("testbed", regime)
        return self.home.resolve() / self.folder.format(seed=seed, regime=name)

    def is_there(self, regime: str, seed: int) -> bool:
        return (self.locate(regime, seed) / "testbed.json").exists()

    def prepare(self, regime: str, seed: int, watch: Watch) -> None:
        """Build the testbed where it is missing, with what Who's Harry Potter calls anchors."""
        folder = self.locate(regime, seed)
        if not self.is_there(regime, seed):
            own = {key: value for key, value in self.regimes[regime].items() if key in ("entanglement", "region")}
            if self.world == "atlas":
                # the seeds of runs draw directions; unless the folder says so, all are on one testbed
                number = seed if "{seed}" in self.folder else 0
                build_atlas(folder, model=self.model, seed=number, watch=watch, **own)
            else:
                build_testbed(folder, seed=seed, oracle=self.oracle, world=self.world, watch=watch, **own)
        elif self.model:
            known = read_json(folder / "testbed.json")["model"]
            if known["fingerprint"] != fingerprint_model(locate_model(self.model)):
                raise SrmuError(f"{folder} was made with the model {known['path']}; name another --out")
        anchors = folder / "anchors.json"
        if self.world == "closed" and not anchors.exists():
            # for each thing about which facts are to be forgotten one of the same kind about which none are
            world = create_closed(read_json(folder / "testbed.json").get("seed", seed), RECIPE.size)
            hazard = sorted({fact.subject for fact in world.of_kind("hazard")})
            harmless = sorted({fact.subject for fact in world.of_kind("neighbour")} - {*hazard})
            write_json(anchors, dict(zip(hazard, cycle(harmless), strict=False)))

    def find_config(self, row: PlannedRow, seed: int) -> tuple[Path, tuple[str, ...]]:
        return self.locate(row.regime, seed) / self.regimes[row.regime]["config"], ()


@dataclass(frozen=True)
class OneModel:
    """One model and its corpora: seeds draw other directions and another order."""

    name: str
    spec: Mapping[str, Any]  # its presets, regimes and sources, as in configs/reproduce.yaml

    def find_config(self, row: PlannedRow, seed: int) -> tuple[Path, tuple[str, ...]]:
        preset = find_preset(self.spec["methods"][row.method]["config"])
        return preset, (f"model={self.name}", *self.spec["regimes"][row.regime])


# ---- what is done to each run


class Scored:
    """What is done to a run: it is made and scored."""

    def find_result(self, job: RunJob) -> Path | None:
        """The folder with all numbers of a job's run; None where some are missing.

        DivergedError where the run diverged, SrmuError for settings that cannot work.
        """
        folder = locate_run(job)
        done = {metric.split("/")[0] for metric in read_metrics(folder)["after"]}
        return folder if (folder / RECORD).exists() and {*job.tasks} <= done else None

    def measure_run(self, job: RunJob, watch: Watch = ignore_progress) -> Path:
        """Do what is missing; the folder with all numbers."""
        config = load_config(job.config, job.overrides)
        run = unlearn_config(config, watch=watch)
        score_model(run, job.tasks, device=config.device, watch=watch)
        return run.folder


def locate_run(job: RunJob) -> Path:
    """The folder of a job's run, there or not; DivergedError where the run diverged."""
    folder = plan_run(load_config(job.config, job.overrides)).folder
    if (folder / RECORD).exists() and Run(folder).record["diverged"]:
        raise DivergedError(f"{folder} holds this run, which diverged")
    return folder


# ---- the runs

Outcome = Path | str  # the folder of a run, or why there is none


@dataclass(frozen=True)
class Experiment:
    """Labelled settings x regimes x seeds, one run each; runs go into `out`/runs."""

    out: Path
    place: Testbeds | OneModel
    settings: Mapping[str, Sequence[str]]  # {testbed} stands for the folder of the testbed
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    measurement: Scored = field(default_factory=Scored)
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.place, Testbeds):  # overrides of no method must show before a testbed is built
            config = {"model": "model", "method": "srmu", "topics": {"topic": {"forget": "forget.jsonl"}}}
            build_config(config, self.overrides)

    def plan_job(self, row: PlannedRow, seed: int) -> RunJob:
        """A run's config with its overrides; later ones win."""
        config, own = self.place.find_config(row, seed)
        settings = (s.replace("{testbed}", str(config.parent)) for s in self.settings[row.method])
        common = (f"seed={seed}", f"runs_dir={(self.out / 'runs').resolve()}", *own)
        options = (*settings, *common, *self.overrides, *row.extra)
        if isinstance(self.place, Testbeds) and not load_config(config, options).method.reads_retain:
            # the same run in each regime
            config, options = config.with_name("low.yaml"), (*options, "topics.topic.retain=[]")
        return RunJob(config, options, self.tasks)


def run_experiment(
    experiment: Experiment, rows: Iterable[PlannedRow], watch: Watch = ignore_progress, *, make: bool = True
) -> dict[PlannedRow, MeasuredRow]:
    """Make the runs of the rows that are missing, each different one once; without `make`, only look for them.

    A run that diverges or fails costs its own row only, which says why. On one model a failure is raised: what the next
    run would need hours for may fail in the same way.
    """
    rows = [*dict.fromkeys(rows)]
    if make and isinstance(experiment.place, Testbeds):
        for regime, seed in product(dict.fromkeys(row.regime for row in rows), experiment.seeds):
            experiment.place.prepare(regime, seed, watch)
    # what hands its strength to others comes first
    sources = [PlannedRow(row.strength[0], row.strength[0], row.regime) for row in rows if row.strength]
    strong = run_experiment(experiment, sources, watch, make=make) if sources else {}
    found = {
        (row, seed): find_measured_run(experiment, row, seed, strong)
        for row in rows
        for seed in list_seeds(experiment, row)
    }
    missing = [*dict.fromkeys(run for run in found.values() if isinstance(run, RunJob))]
    made = make_runs(experiment, missing, watch) if make and missing else {}
    measured = {}
    for row in rows:
        runs = {seed: found[row, seed] for seed in list_seeds(experiment, row)}
        outcomes = {k: made.get(run, NOT_RUN) if isinstance(run, RunJob) else run for k, run in runs.items()}
        measured[row] = collect_row(experiment, row, outcomes)
    return measured


def list_seeds(experiment: Experiment, row: PlannedRow) -> tuple[int, ...]:
    """The seeds of a row's runs."""
    return experiment.seeds[:1] if row.once else experiment.seeds


def find_measured_run(
    experiment: Experiment, row: PlannedRow, seed: int, strong: Mapping[PlannedRow, MeasuredRow]
) -> Outcome | RunJob:
    """What is there of a run, or the job that makes it; `strong` has the rows that hand over their strength."""
    if isinstance(experiment.place, Testbeds) and not experiment.place.is_there(row.regime, seed):
        return NOT_RUN
    try:
        if row.strength:
            method, key = row.strength
            source = strong[PlannedRow(method, method, row.regime)]
            if source.missing:
                return NOT_RUN
            row = row._replace(extra=(*row.extra, *take_strength(source, experiment.seeds.index(seed), key)))
        job = experiment.plan_job(row, seed)
        return experiment.measurement.find_result(job) or job
    except DivergedError:
        return DIVERGED
    except SrmuError as error:
        return f"failed: {error}"


def take_strength(source: MeasuredRow, number: int, key: str) -> tuple[str, ...]:
    """The overrides that give a run the coeff or the kappa of another method's run."""
    if source.why:
        raise SrmuError(f"{source.label} {source.why}: other runs take their strength from it")
    run = Run.open(source.runs[number])
    value = getattr(run.config.method, key)
    if value is not None:
        other = "kappa" if key == "coeff" else "coeff"
        return (f"method.{other}=null", f"method.{key}={value!r}")
    return tuple(f"topics.{k}.{key}={v[key]!r}" for k, v in run.record["topics"].items())


def run_all(jobs: Sequence[RunJob], watch: Watch, *, function: Callable[[RunJob], Outcome]) -> list[Outcome]:
    """Do the jobs in as many processes as there are processors; what came of each, in order."""
    # on Linux, those that this process may use
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cpus, len(jobs), *[61] * (os.name == "nt"))  # Windows cannot wait for more
    outcomes = []
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        watch("unlearning and measuring", len(jobs)) as tick,
    ):
        for outcome in pool.map(function, jobs):  # Ctrl-C drops those that have not begun
            outcomes.append(outcome)
            tick("")
    return outcomes


def make_runs(experiment: Experiment, jobs: Sequence[RunJob], watch: Watch) -> dict[RunJob, Outcome]:
    """Several at once on testbeds; on one model one after the other, as each fills the machine."""
    if isinstance(experiment.place, Testbeds):
        # the first of each testbed before the others: what it keeps of the original serves them
        first = {job.config.parent: job for job in reversed(jobs)}
        order = [*dict.fromkeys([*reversed(first.values()), *jobs])]
        attempt = partial(attempt_run, experiment.measurement)
        return dict(zip(order, run_all(order, watch, function=attempt), strict=True))
    outcomes: dict[RunJob, Outcome] = {}
    for number, job in enumerate(jobs, 1):
        try:
            outcomes[job] = experiment.measurement.measure_run(job, count_runs(watch, number, len(jobs)))
        except DivergedError:
            outcomes[job] = DIVERGED
    return outcomes


def count_runs(watch: Watch, number: int, count: int) -> Watch:
    """Progress of one of several runs, whose number its labels say."""
    return lambda label, total: watch(f"run {number} of {count}: {label}", total)


def attempt_run(measurement: Scored, job: RunJob) -> Outcome:
    """The folder of a run with all its numbers, or why there is none."""
    # Threads that wait for each other spin: one in each of several processes is faster.
    torch.set_num_threads(1)
    progress.silence_libraries()
    try:
        return measurement.measure_run(job)
    except DivergedError:
        return DIVERGED
    except SrmuError as error:
        return f"failed: {error}"
    except Exception as error:  # a fault of one method must not cost the rows of the others
        return f"failed: {type(error).__name__}: {first_line(error)}"


def collect_row(experiment: Experiment, row: PlannedRow, outcomes: Mapping[int, Outcome]) -> MeasuredRow:
    """A row with its folders, by seed; while some are missing the label says how many are there."""
    done = {seed: outcome for seed, outcome in outcomes.items() if outcome != NOT_RUN}
    wrong = [outcome for outcome in done.values() if isinstance(outcome, str)]
    missing = len(outcomes) - len(done)
    if wrong or not done:
        why = f"{wrong[0]} in {len(wrong)} of {len(done)} runs" if wrong else NOT_RUN
        return MeasuredRow(row.label, (), (), why=why.replace(f"{experiment.out.resolve()}/", ""), missing=missing)
    label = f"{row.label} ({len(done)} of {len(outcomes)})" if missing else row.label
    # each testbed has its own questions
    own = isinstance(experiment.place, Testbeds) and "{seed}" in experiment.place.folder
    asked = tuple(seed if own else 0 for seed in done)
    return MeasuredRow(label, tuple(map(Path, done.values())), asked, missing=missing)


def say_nothing_run(out: Path, command: str) -> str:
    """What to tell somebody who wants to see runs where there are none."""
    return f"nothing was run in {out} yet; this runs it, and with --dry-run says what it takes: {command}"
