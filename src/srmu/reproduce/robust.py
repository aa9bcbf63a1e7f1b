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
    spec: Mapping[str, Any]  # the content of configs/robust.yaml


@dataclass(frozen=True)
class Part:
    """A world in a regime, with its rows."""

    frontier: Frontier
    world: str
    regime: str
    rows: Sequence[MeasuredRow]
    columns: Mapping[str, Sequence[str]]  # metrics
    kept: Sequence[str]  # metrics of what is to be kept
    testbeds: Mapping[int, Path]  # by seed
    title: str


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
    numbers = tuple(dict.fromkeys(map(int, seeds))) or tuple(table.get("seeds", spec["seeds"]))
    build_config({"model": "m", "method": "srmu", "topics": {"organism": {"forget": "forget.jsonl"}}}, overrides)
    require_place(out)
    settings = {one: choose_settings(kind, one, spec) for one in worlds}
    check_option("--methods", methods, [label for each in settings.values() for label in each])
    budget = table.get("budget", spec["budget"])
    names = tuple(table.get("attacks", ()))
    experiments = {}
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
        place = Testbeds(out / one, spec["regimes"], "testbed{seed}-{regime}", one)
        experiments[one] = Experiment(
            out / one, place, chosen, numbers, tuple(dict.fromkeys(tasks)), attacked, tuple(overrides)
        )
    return Frontier(out, kind, tier, budget, numbers, tuple(regimes), experiments, spec)


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


def measure_frontier(frontier: Frontier, watch: Watch = ignore_progress, *, make: bool = True) -> list[Part]:
    """The rows of each world and regime; makes what is missing, or without `make` runs nothing."""
    spec, parts = frontier.spec, []
    for world, one in frontier.experiments.items():
        assert isinstance(one.place, Testbeds)
        planned = [PlannedRow(label, label, regime) for regime, label in product(frontier.regimes, one.settings)]
        measured = experiment.run_experiment(one, planned, watch, make=make)
        own = spec["worlds"][world]
        kept = [metric for name in spec["kept"] for metric in own["columns"][name]]
        for regime in frontier.regimes:
            rows = [measured[plan] for plan in planned if plan.regime == regime]
            beds = {seed: one.place.locate(regime, seed) for seed in frontier.seeds}
            title = f"{own['title']}, {spec['regimes'][regime]['title']}"
            parts.append(Part(frontier, world, regime, rows, own["columns"], kept, beds, title))
    return parts


def frontier_needs(frontier: Frontier) -> tuple[dict[str, int], str]:
    """What is to be built and run, in numbers and in a line."""
    parts = measure_frontier(frontier, make=False)
    rows = [row for part in parts for row in part.rows]
    beds = {folder for part in parts for folder in part.testbeds.values()}
    built, missing = sum((folder / "organism.json").exists() for folder in beds), sum(row.missing for row in rows)
    return {"testbeds": len(beds) - built, "runs": missing}, (
        f"{len(beds) - built} testbeds to build, some minutes each where none was built before, "
        f"and {missing} of {len(rows) * len(frontier.seeds)} runs to make, a minute or more each with attacks "
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
