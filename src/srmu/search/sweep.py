"""A sweep: one config file run with many settings, and which of them are best.

A trial is a setting. It is run once with each seed, and its objectives are the means. Runs lie in
the sweep's folder, named by what decides them, and share the activations of their fixed layers.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import optuna
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from srmu.attacks.base import Tier
from srmu.attacks.suite import Sources, attack_run, fill_sources, load_exam, select_attacks
from srmu.engine.files import require_place, write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError, suggest_word
from srmu.evals.score import score_model
from srmu.evals.settings import run_setting
from srmu.runs.config import Config, explain_error, load_config, put_override, read_tree
from srmu.runs.plan import locate_base, plan_run
from srmu.runs.run import Run, unlearn_config
from srmu.search import queue
from srmu.search.queue import Study, list_points, open_study, trial_entry, work_queue
from srmu.search.space import PlaceSampler, make_dimension

FILE = "sweep.json"
ATTACK = "attack."
ENOUGH = 8  # complete trials to tell which key matters


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttackOptions(Strict):
    """How each run is attacked, where an objective is what an attack finds."""

    tier: Tier = "smoke"
    names: list[str] = []  # only these
    tasks: list[str] = []  # as `srmu attack --tasks`: the testbed has its own
    val: str = ""
    limit: int = Field(default=400, ge=1)


class Sweep(Strict):
    """A sweep file."""

    config: str
    set: list[str] = []  # key=value, for all trials
    search: dict[str, Any]
    sampler: Literal["grid", "tpe", "nsga2"] = "grid"
    trials: int | None = Field(default=None, ge=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    objectives: dict[str, Literal["minimize", "maximize"]] = Field(min_length=1)
    attack: AttackOptions = AttackOptions()
    prune: bool = False
    seed: int = 0  # of the sampler
    name: str = ""
    out: str = ""
    heartbeat: int = Field(default=60, ge=1)  # seconds between a worker's signs of life


class Plan:
    """A sweep file whose keys, values and objectives have been checked."""

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        tree = read_tree(path)
        for override in overrides:
            put_override(tree, override)
        try:
            self.sweep = sweep = Sweep.model_validate(tree)
        except ValidationError as error:
            inner = error.errors()[0]["loc"][:1] == ("attack",)
            schema = AttackOptions if inner else Sweep
            raise SrmuError(f"{path}: {explain_error(error, '', schema)}") from None
        home = path.resolve().parent
        self.config = place_path(home, sweep.config)
        self.name = sweep.name or path.stem
        self.out = place_path(home, sweep.out or f"sweeps/{self.name}")
        self.space = [make_dimension(key, given) for key, given in sweep.search.items()]
        if not self.space:
            raise SrmuError(f"{path}: search: name at least one key, like method.kappa: [8, 16]")
        self.queue = self.points()
        for metric in sweep.objectives:
            if metric.startswith(ATTACK):
                require_attack(metric, sweep.attack)
        if sweep.prune and (len(sweep.objectives) > 1 or len(sweep.seeds) < 2):
            raise SrmuError("prune: needs one objective, and two seeds or more to stop between")
        if len({*sweep.seeds}) < len(sweep.seeds):
            raise SrmuError(f"seeds: one is there twice: {sweep.seeds}")
        self.first = self.check_keys()
        require_place(self.out / FILE)

    def points(self) -> list[dict[str, Any]]:
        """The trials: each point of the grid, or as many empty ones as are asked for."""
        if self.sweep.sampler == "grid":
            if self.sweep.trials is not None:
                raise SrmuError("trials: a grid has as many as its points; leave it out")
            values = product(*(one.list_values() for one in self.space))
            keys = [one.key for one in self.space]
            return [dict(zip(keys, point, strict=True)) for point in values]
        if self.sweep.trials is None:
            raise SrmuError(f"trials: say how many sampler={self.sweep.sampler} is to try")
        return [{}] * self.sweep.trials

    def config_of(self, params: Mapping[str, Any], seed: int) -> Config:
        own = [f"seed={seed}", f"runs_dir={self.out / 'runs'}"]
        return load_config(self.config, [*self.overrides(params), *own])

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """What to type after the config file for a trial's runs."""
        return [*self.sweep.set, *(f"{key}={yaml_line(value)}" for key, value in params.items())]

    def check_keys(self) -> Config:
        """The first config of the space; SrmuError where it does not take a key or a value."""
        first = {one.key: one.samples[0] for one in self.space}
        for one in self.space:
            if one.key in ("seed", "runs_dir"):
                raise SrmuError(f"search.{one.key}: list seeds under seeds:, runs go to out:")
            for value in one.samples:
                try:
                    plan_run(self.config_of(first | {one.key: value}, self.sweep.seeds[0]))
                except SrmuError as error:
                    # what is wrong without the space is not the space's fault
                    plan_run(load_config(self.config, self.sweep.set))
                    raise SrmuError(f"search.{one.key}: {error}") from None
        return self.config_of(first, self.sweep.seeds[0])

    @property
    def tasks(self) -> list[str]:
        """What runs are scored on: only the tasks of the objectives.

        Nobody looks at what a report will rest on while settings are chosen.
        """
        scored = [metric for metric in self.sweep.objectives if not metric.startswith(ATTACK)]
        return [*dict.fromkeys(metric.split("/")[0] for metric in scored)]

    def check_objectives(self, watch: Watch = ignore_progress) -> None:
        """SrmuError for an objective that no trial would produce; scores the original model.

        Its scores are kept, and each run's scoring needs them.
        """
        scored = [metric for metric in self.sweep.objectives if not metric.startswith(ATTACK)]
        config, base = self.first, locate_base(self.first)
        if scored:
            folder = config.tasks_dir
            metrics = score_model(str(base), self.tasks, tasks_dir=folder, watch=watch)["after"]
            for metric in scored:
                if metric not in metrics:
                    hint = suggest_word(metric, metrics)
                    raise SrmuError(f"objective {metric!r} is not measured{hint}")
        if len(scored) < len(self.sweep.objectives):
            load_exam(fill_sources(self.sources, config, base), config, 0)

    @property
    def sources(self) -> Sources:
        options = self.sweep.attack
        return Sources(tasks=tuple(options.tasks), val=options.val, limit=options.limit)

    @property
    def spec(self) -> dict[str, Any]:
        """What a study is made for, the same wherever its files lie."""
        sweep = self.sweep
        config = load_config(self.config, sweep.set)
        return {
            "search": {one.key: one.written for one in self.space},
            # in order: a study keeps its values so
            "objectives": [f"{metric}: {way}" for metric, way in sweep.objectives.items()],
            "sampler": sweep.sampler,
            "seeds": sweep.seeds,
            "seed": sweep.seed,
            "prune": sweep.prune,
            "attack": sweep.attack.model_dump(),
            "config": dict(run_setting(config)),
        }

    def sampler(self) -> BaseSampler:
        seed = 100_003 * self.sweep.seed
        if self.sweep.sampler == "tpe":
            return PlaceSampler(lambda place: TPESampler(seed=seed + place))
        if self.sweep.sampler == "nsga2":
            # ten generations, whatever the number of trials
            size = max(4, min(50, len(self.queue) // 10))
            return PlaceSampler(lambda place: NSGAIISampler(population_size=size, seed=seed + place))
        return RandomSampler()  # every value is in the queue


def place_path(home: Path, path: str) -> Path:
    """A path that a sweep file in the folder `home` names."""
    try:
        return (home / Path(path).expanduser()).resolve()
    except RuntimeError:
        raise SrmuError(f"{path}: there is no such user") from None


def require_attack(metric: str, options: AttackOptions) -> None:
    """SrmuError where an objective names an attack that would not be run."""
    name = metric.removeprefix(ATTACK)
    chosen = ["K*", *select_attacks(options.tier, options.names)]
    if name not in chosen:
        raise SrmuError(f"objective {metric!r}: no such attack is run{suggest_word(name, chosen)}")


def yaml_line(value: Any) -> str:
    """A value as one would type it: YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def run_sweep(plan: Plan, storage: str = "", watch: Watch = ignore_progress) -> dict[str, Any]:
    """Run a sweep, or what is left of it, with any other workers; what `sweep.json` says."""
    plan.check_objectives(watch)
    study = open_study(
        storage or plan.out / queue.FILE,
        plan.name,
        spec=plan.spec,
        directions=[*plan.sweep.objectives.values()],
        sampler=plan.sampler(),
        pruner=optuna.pruners.MedianPruner() if plan.sweep.prune else None,
        queue=plan.queue,
        heartbeat=plan.sweep.heartbeat,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([*plan.sweep.objectives])  # for optuna-dashboard
    plan.out.mkdir(parents=True, exist_ok=True)

    def write(final: bool = False) -> dict[str, Any]:
        report = sweep_report(plan, study, final)
        write_json(plan.out / FILE, report)
        return report

    try:
        work_queue(study, partial(measure_trial, plan), watch, write)
    except KeyboardInterrupt:
        write()
        raise
    return write(final=True)


def measure_trial(plan: Plan, trial: optuna.Trial) -> list[float]:
    """The objectives of a trial: the means over its seeds."""
    params = {one.key: one.suggest(trial, plan.sweep.sampler == "grid") for one in plan.space}
    objectives = [*plan.sweep.objectives]
    replicates: dict[str, list[float]] = {metric: [] for metric in objectives}
    errors: dict[str, list[float | None]] = {metric: [] for metric in objectives}
    values, folders = dict.fromkeys(objectives, 0.0), []
    started = time.monotonic()
    for number, seed in enumerate(plan.sweep.seeds, 1):
        run = unlearn_config(plan.config_of(params, seed))
        results = run_metrics(plan, run)
        for metric in objectives:
            replicates[metric].append(results[metric]["value"])
            errors[metric].append(results[metric].get("stderr"))
            values[metric] = fmean(replicates[metric])
        folders.append(str(run.folder.relative_to(plan.out)))
        measured = {
            "params": params, "values": values, "replicates": replicates, "errors": errors,
            "n": {metric: int(results[metric]["n"]) for metric in objectives}, "runs": folders,
            "seconds": round(time.monotonic() - started, 3),
        }  # fmt: skip
        trial.set_user_attr("measured", measured)
        if plan.sweep.prune and number < len(plan.sweep.seeds):
            trial.report(values[objectives[0]], number - 1)
            if trial.should_prune():
                trial.set_user_attr("why", f"worse than the median after {number} seeds")
                raise optuna.TrialPruned
    return [*values.values()]


def run_metrics(plan: Plan, run: Run) -> dict[str, dict[str, float]]:
    """What the objectives need of a run, scored and attacked where that was not done before."""
    objectives = plan.sweep.objectives
    metrics: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    if plan.tasks:
        metrics |= score_model(run, plan.tasks)["after"]
    if any(metric.startswith(ATTACK) for metric in objectives):
        options = plan.sweep.attack
        report = attack_run(run, tier=options.tier, names=options.names, sources=plan.sources)
        metrics[f"{ATTACK}K*"] = error_entry(report["K*"])
        for name, entry in report["attacks"].items():
            reasons[ATTACK + name] = entry["why"]
            if "accuracy" in entry:
                metrics[ATTACK + name] = error_entry(entry["accuracy"])
    for metric in objectives:
        if metric not in metrics:
            why = reasons.get(metric) or "there is no such number"
            raise SrmuError(f"objective {metric!r} was not measured: {why}")
    return metrics


def error_entry(entry: Mapping[str, float]) -> dict[str, float]:
    """A value with its interval as one with its standard error."""
    error = (entry["high"] - entry["low"]) / (2 * 1.96)
    return {"value": entry["value"], "stderr": error, "n": entry["n"]}


def sweep_report(plan: Plan, study: Study, final: bool = False) -> dict[str, Any]:
    """What `sweep.json` says: each trial once, the best of them, and which keys matter."""
    trials = [sweep_entry(point.standing) for point in list_points(study) if point.standing]
    complete = [trial for trial in trials if trial["state"] == "complete"]
    return {
        "kind": "sweep",
        "name": plan.name,
        "sampler": plan.sweep.sampler,
        "seeds": plan.sweep.seeds,
        "objectives": dict(plan.sweep.objectives),
        "space": {one.key: one.written for one in plan.space},
        "trials": trials,
        "front": [trial.number for trial in study.best_trials] if complete else [],
        "importance": key_importance(study) if final and len(complete) >= ENOUGH else {},
    }


def sweep_entry(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as `sweep.json` has it."""
    measured = trial.user_attrs.get("measured", {})
    parts = {part: measured.get(part, {}) for part in ("replicates", "errors", "n")}
    return trial_entry(trial) | parts


def key_importance(study: Study) -> dict[str, float]:
    """The share of each key in what the objectives differ by (fANOVA); none where they do not."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = []
    for i in range(len(study.directions)):

        def value(trial: FrozenTrial, i: int = i) -> float:
            return float(trial.values[i])

        if len(set(map(value, complete))) > 1:
            parts = evaluator.evaluate(study, target=value)
            shares.append({key: part / sum(parts.values()) for key, part in parts.items()})
    return {key: fmean(share[key] for share in shares) for key in (shares[0] if shares else ())}


def best_trials(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials to look at: the front, or of one objective the best five; the best of it first."""
    (metric, direction), *others = report["objectives"].items()
    chosen = [
        trial
        for trial in report["trials"]
        if trial["state"] == "complete" and (not others or trial["number"] in report["front"])
    ]
    sign = 1 if direction == "minimize" else -1
    chosen.sort(key=lambda trial: sign * trial["values"][metric])
    return chosen if others else chosen[:5]


def sweep_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of a sweep."""
    return [
        {"trial": str(trial["number"])}
        | {key: yaml_line(value) for key, value in trial["params"].items()}
        | {metric: format_seeds(trial["replicates"][metric]) for metric in report["objectives"]}
        for trial in best_trials(report)
    ]


def format_seeds(values: Sequence[float]) -> str:
    """`0.312 (0.290-0.330)`: the mean, and the lowest and highest where there are several."""
    spread = f" ({min(values):.3f}\N{EN DASH}{max(values):.3f})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def describe_sweep(report: Mapping[str, Any]) -> list[str]:
    """What to know beside the table."""
    lines, trials = [], report["trials"]
    if len(report["seeds"]) > 1:
        lines.append(f"means over {len(report['seeds'])} seeds, with the lowest and the highest")
    for state in ("pruned", "failed"):
        if some := [trial for trial in trials if trial["state"] == state]:
            count = f"{len(some)} of {len(trials)} trials {state}"
            lines.append(f"{count}; trial {some[0]['number']}: {some[0]['why']}")
    if shares := sorted(report["importance"].items(), key=lambda item: -item[1]):
        listed = ", ".join(f"{key} {share:.0%}" for key, share in shares)
        lines.append(f"what the objectives differ by (fANOVA): {listed}")
    return lines
