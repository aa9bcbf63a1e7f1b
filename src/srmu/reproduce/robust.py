"""What stays gone, and what it costs: methods at one loss of utility under attack, two worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from srmu.attacks.measures import Utility, measure_texts
from srmu.attacks.suite import TIERS, Sources, attack_run, select_attacks
from srmu.attacks.summary import CONTROLS
from srmu.data import sources
from srmu.engine.files import require_place
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError, suggest_word
from srmu.evals.matched import match_utility
from srmu.evals.results import load_results, merge_results, read_attacks
from srmu.evals.score import score_model
from srmu.evals.subject import Subject
from srmu.reproduce import experiment
from srmu.reproduce.experiment import Experiment, MeasuredRow, PlannedRow, RunJob, Testbeds
from srmu.runs.config import build_config
from srmu.runs.run import Run, open_target


@dataclass(frozen=True)
class Frontier:
    """What is asked for: the table `kind` of configs/robust.yaml, an experiment for each world."""

    out: Path
    kind: str
    tier: str
    budget: float
    seeds: tuple[int, ...]
    regimes: tuple[str, ...]
    experiments: Mapping[str, Experiment]  # by world
    places: Mapping[str, Testbeds]  # of the worlds
    spec: Mapping[str, Any]  # the content of configs/robust.yaml

    def rows(self, world: str) -> list[PlannedRow]:
        labels = self.experiments[world].settings
        return [PlannedRow(k, k, regime) for regime, k in product(self.regimes, labels)]


def plan_frontier(
    kind: str,
    out: Path,
    *,
    world: str = "both",
    regimes: Sequence[str] = (),
    seeds: Sequence[str] = (),
    methods: Sequence[str] = (),
    tier: str = "",
    overrides: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
) -> Frontier:
    """What is asked for, with the defaults of configs/robust.yaml; SrmuError for what is not."""
    spec = spec or experiment.read_preset("robust.yaml")
    table, tier = spec["tables"][kind], tier or spec["tier"]
    worlds = [name for name, one in spec["worlds"].items() if one.get(table["of"])] if world == "both" else [world]
    regimes = regimes or table["regimes"]
    check_option("--world", worlds, [*spec["worlds"], "both"])
    check_option("--regimes", regimes, spec["regimes"])
    check_option("--tier", [tier], TIERS)
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise SrmuError(f"--seeds {wrong[0]}: name the seeds of the testbeds, 1,2,3")
    numbers = tuple(dict.fromkeys(map(int, seeds))) or tuple(table.get("seeds", spec["seeds"]))
    build_config({"model": "m", "method": "srmu", "topics": {"organism": {"forget": "forget.jsonl"}}}, overrides)
    require_place(out)
    settings = {one: choose_settings(kind, one, spec) for one in worlds}
    check_option("--methods", methods, [label for each in settings.values() for label in each])
    budget = table.get("budget", spec["budget"])
    names = tuple(table.get("attacks", ()))
    experiments, places = {}, {}
    for one in worlds:
        chosen = {k: v for k, v in settings[one].items() if not methods or k in methods}
        tasks = [metric.split("/")[0] for each in spec["worlds"][one]["columns"].values() for metric in each]
        attacked = Attacked(
            home=(out / one).resolve(),
            budget=budget,
            judged=tuple(spec["judged"]),
            asked=tuple(spec["worlds"][one]["attacked"].values()),
            texts=tuple(spec["texts"].items()),
            tier=tier,
            names=names,
            folder=f"{tier}-{kind}" if names else tier,
        )
        places[one] = Testbeds(out / one, spec["regimes"], "testbed{seed}-{regime}", one)
        experiments[one] = Experiment(
            out / one, places[one], chosen, numbers, tuple(dict.fromkeys(tasks)), attacked, tuple(overrides)
        )
    return Frontier(out, kind, tier, budget, numbers, tuple(regimes), experiments, places, spec)


def choose_settings(kind: str, world: str, spec: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What each label of a world is run with."""
    own = spec["worlds"][world]
    if kind == "methods":
        if "all_methods" not in own:
            raise SrmuError(f"--world {world}: methods runs on the closed world alone")
        return experiment.read_settings(own["all_methods"])
    methods = {label: (*own["common"], *each) for label, each in own["methods"].items()}
    if kind == "robust":
        return methods
    base = spec["ablated"]
    ablated = (*methods[base], *own.get("ablated", ()))
    return {base: ablated} | {k: (*ablated, *change) for k, change in own["ablations"].items()}


def check_option(option: str, names: Sequence[str], known: Sequence[str] | Mapping[str, Any]) -> None:
    if wrong := [name for name in names if name not in known]:
        raise SrmuError(f"{option} {wrong[0]} does not exist{suggest_word(wrong[0], list(known))}")


# ---- the runs


@dataclass(frozen=True)
class Part:
    """A world in a regime, with its rows."""

    frontier: Frontier
    world: str
    regime: str
    rows: Sequence[MeasuredRow]

    @property
    def title(self) -> str:
        spec = self.frontier.spec
        return f"{spec['worlds'][self.world]['title']}, {spec['regimes'][self.regime]['title']}"

    @property
    def columns(self) -> dict[str, list[str]]:
        return self.frontier.spec["worlds"][self.world]["columns"]

    @property
    def kept(self) -> list[str]:
        """Metrics of what is to be kept."""
        return [metric for name in self.frontier.spec["kept"] for metric in self.columns[name]]

    def locate_testbed(self, seed: int) -> Path:
        return self.frontier.places[self.world].locate(self.regime, seed)


def measure_frontier(frontier: Frontier, watch: Watch = ignore_progress, *, make: bool = True) -> list[Part]:
    """The rows of each world and regime; makes what is missing, or without `make` runs nothing."""
    parts = []
    for world, one in frontier.experiments.items():
        measured = experiment.run_experiment(one, frontier.rows(world), watch, make=make)
        for regime in frontier.regimes:
            rows = [row for planned, row in measured.items() if planned.regime == regime]
            parts.append(Part(frontier, world, regime, rows))
    return parts


def frontier_needs(frontier: Frontier) -> tuple[dict[str, int], str]:
    """What is to be built and run, in numbers and in a line."""
    states: list[experiment.Outcome] = []
    beds: dict[Path, bool] = {}
    for world, one in frontier.experiments.items():
        jobs = experiment.plan_jobs(one, frontier.rows(world))
        outcomes = experiment.find_outcomes(one, jobs)
        states += [outcomes[job] for job in jobs.values()]
        for part in product(frontier.regimes, frontier.seeds):
            beds[frontier.places[world].locate(*part)] = frontier.places[world].is_there(*part)
    counts = {"testbeds": [*beds.values()].count(False), "runs": states.count(experiment.NOT_RUN)}
    return counts, (
        f"{counts['testbeds']} testbeds to build, some minutes each where none was built before, "
        f"and {counts['runs']} of {len(states)} runs to make, a minute or more each with attacks "
        f"of tier {frontier.tier}; nothing is fetched"
    )


@dataclass(frozen=True)
class Attacked(experiment.Scored):
    """A run is made, brought to one loss of utility, scored and attacked, beside its controls.

    Numbers are of the largest share of the run's change that costs at most `budget` of the mean
    accuracy on `judged`; they lie in a folder beside the runs.
    """

    home: Path = Path()
    budget: float = 0
    judged: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()  # tasks that ask for what is to go
    texts: tuple[tuple[str, str], ...] = ()  # kinds of text, and their files in the testbed
    tier: str = "standard"
    names: tuple[str, ...] = ()  # these attacks alone; (): all of the tier
    folder: str = "standard"

    def locate_result(self, run: Path) -> Path:
        return self.home / f"matched-{self.budget:g}-{self.folder}" / run.name

    def find_result(self, job: RunJob) -> Path | None:
        """The folder, if it is complete: every attack of the tier included."""
        out = self.locate_result(experiment.locate_run(job))
        folders = (out, *(locate_control(self.home, job.config.parent, who) for who in CONTROLS))
        wanted = {*select_attacks(self.tier, self.names)}  # type: ignore[arg-type]
        tried = wanted <= {*read_attacks(out).get("attacks", ())}
        return out if tried and all("texts" in load_results(each) for each in folders) else None

    def measure_run(self, job: RunJob, watch: Watch = ignore_progress) -> Path:
        whole = Run.open(super().measure_run(job, watch))
        out = self.locate_result(whole.folder)
        match_utility(whole, out, self.budget, self.judged)
        run = Run.open(out)
        score_model(run, job.tasks)
        opened = open_target(run, "cpu")
        with opened.after() as module:
            self.read_texts(Subject(module, opened.tokenizer), out, job)
        for who, folder in (("original", run.base), ("oracle", run.base.parent / "oracle")):
            control = locate_control(self.home, job.config.parent, who)
            if "texts" not in load_results(control):
                control.mkdir(parents=True, exist_ok=True)
                score_model(folder, job.tasks, tasks_dir=run.config.tasks_dir, out=control)
                opened = open_target(folder, "cpu")
                self.read_texts(Subject(opened.module, opened.tokenizer), control, job)
        asked = Sources(tasks=self.asked, limit=10_000)
        attack_run(run, tier=self.tier, names=self.names, sources=asked)  # type: ignore[arg-type]
        return out

    def read_texts(self, subject: Subject, out: Path, job: RunJob) -> None:
        """Keep what a token of each kind of text costs a model, in nats."""
        nats = {}
        for kind, name in self.texts:
            texts = sources.read_texts([sources.Source(path=str(job.config.parent / name))])
            tokens = [subject.tokens(text)[: Utility.length] for text in texts[: Utility.count]]
            nats[kind] = measure_texts(subject, tokens, 0)["nats a neutral token"].value
        merge_results(out, texts=nats)


def locate_control(home: Path, testbed: Path, who: str) -> Path:
    """Where the numbers of a testbed's original or oracle are."""
    return home / "controls" / testbed.name / who
