"""A sweep: one config file run with many settings, and what they are good for.

A trial is a setting; it is run once with each seed, its objectives are the means. Runs lie in the
sweep's folder, named by what decides them, and share the activations of their fixed layers.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import optuna
import torch
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
from srmu.runs.run import Run, base_of, plan_run, unlearn
from srmu.search.queue import Study, open_study, standing_trials, work_queue
from srmu.search.space import Seeded, make_dimension

FILE = "sweep.json"
ATTACK = "attack."
ENOUGH = 8  # complete trials to tell which key matters
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


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
    heartbeat: int = Field(default=60, ge=1)  # seconds, where the storage is a server


class Plan:
    """A sweep that can work: its files found, its keys and objectives checked."""

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
            values = product(*(one.all() for one in self.space))
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
        """The first config of the space; SrmuError where a key or a value is not one of its."""
        first = {one.key: one.samples[0] for one in self.space}
        for one in self.space:
            if one.key in ("seed", "runs_dir"):
                raise SrmuError(f"search.{one.key}: list seeds under seeds:, runs go to out:")
            for value in one.samples:
                try:
                    plan_run(self.config_of(first | {one.key: value}, self.sweep.seeds[0]))
                except SrmuError as error:
                    at = f"search.{one.key}"
                    # what is wrong without the space is not the space's fault
                    plan_run(load_config(self.config, self.sweep.set))
                    raise SrmuError(f"{at}: {error}") from None
        return self.config_of(first, self.sweep.seeds[0])

    @property
    def tasks(self) -> list[str]:
        """What runs are scored on: the tasks of the objectives alone.

        What a report is to rest on later is not looked at while settings are chosen.
        """
        scored = [metric for metric in self.sweep.objectives if not metric.startswith(ATTACK)]
        return [*dict.fromkeys(metric.split("/")[0] for metric in scored)]

    def check_objectives(self, watch: Watch = ignore_progress) -> None:
        """SrmuError for an objective that no trial would produce; scores the original model.

        Its scores are kept, and each run's scoring needs them.
        """
        wanted = [metric for metric in self.sweep.objectives if not metric.startswith(ATTACK)]
        config = self.first
        if wanted:
            base = str(base_of(config))
            found = score_model(base, self.tasks, tasks_dir=config.tasks_dir, watch=watch)
            for metric in wanted:
                if metric not in found["after"]:
                    hint = suggest_word(metric, found["after"])
                    raise SrmuError(f"objective {metric!r} is not measured{hint}")
        if len(wanted) < len(self.sweep.objectives):
            load_exam(fill_sources(self.sources, config, base_of(config)), config, 0)

    @property
    def sources(self) -> Sources:
        given = self.sweep.attack
        return Sources(tasks=tuple(given.tasks), val=given.val, limit=given.limit)

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
        if self.sweep.sampler == "grid":
            return RandomSampler()  # every value is in the queue
        kinds: dict[str, Callable[[int], BaseSampler]] = {
            "tpe": lambda seed: TPESampler(seed=seed),
            # ten generations, whatever the number of trials
            "nsga2": lambda seed: NSGAIISampler(
                population_size=max(4, min(50, len(self.queue) // 10)), seed=seed
            ),
        }
        return Seeded(kinds[self.sweep.sampler], self.sweep.seed)


def place_path(home: Path, path: str) -> Path:
    """A path that a sweep file in the folder `home` names."""
    try:
        return (home / Path(path).expanduser()).resolve()
    except RuntimeError:
        raise SrmuError(f"{path}: there is no such user") from None


def require_attack(metric: str, given: AttackOptions) -> None:
    """SrmuError where an objective names an attack that would not be run."""
    name = metric.removeprefix(ATTACK)
    chosen = ["K*", *select_attacks(given.tier, given.names)]
    if name not in chosen:
        raise SrmuError(f"objective {metric!r}: no such attack is run{suggest_word(name, chosen)}")


def yaml_line(value: Any) -> str:
    """A value as one would type it: YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def run_sweep(ready: Plan, storage: str = "", watch: Watch = ignore_progress) -> dict[str, Any]:
    """Run a sweep, or what is left of it, with any other workers; what `sweep.json` says."""
    ready.check_objectives(watch)
    study = open_study(
        storage or ready.out / "study.log",
        ready.name,
        spec=ready.spec,
        directions=[*ready.sweep.objectives.values()],
        sampler=ready.sampler(),
        pruner=optuna.pruners.MedianPruner() if ready.sweep.prune else None,
        queue=ready.queue,
        heartbeat=ready.sweep.heartbeat,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([*ready.sweep.objectives])  # for optuna-dashboard
    ready.out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        write_json(ready.out / FILE, sweep_report(ready, study))

    write()
    try:
        work_queue(study, partial(measure_trial, ready), watch, write)
    except KeyboardInterrupt:
        write()
        raise
    found = sweep_report(ready, study, final=True)
    write_json(ready.out / FILE, found)
    return found


def measure_trial(ready: Plan, trial: optuna.Trial) -> list[float]:
    """The objectives of a trial: the means over its seeds."""
    grid = ready.sweep.sampler == "grid"
    params = {one.key: one.suggest(trial, grid) for one in ready.space}
    objectives = [*ready.sweep.objectives]
    kept: dict[str, Any] = {
        "params": params,
        "runs": [],
        "seconds": 0.0,
        **{part: {metric: [] for metric in objectives} for part in ("replicates", "errors")},
        "n": {},
    }
    started = time.monotonic()
    for number, seed in enumerate(ready.sweep.seeds):
        try:
            run = unlearn(ready.config_of(params, seed))
            results = run_metrics(ready, run)
        except torch.OutOfMemoryError as error:
            raise SrmuError(f"out of memory: {str(error).splitlines()[0]}") from None
        for metric in objectives:
            entry = results[metric]
            kept["replicates"][metric].append(entry["value"])
            kept["errors"][metric].append(entry.get("stderr"))
            kept["n"][metric] = int(entry["n"])
        kept["runs"].append(str(run.folder.relative_to(ready.out)))
        kept["seconds"] = round(time.monotonic() - started, 3)
        trial.set_user_attr("measured", kept)
        if ready.sweep.prune and number + 1 < len(ready.sweep.seeds):
            trial.report(fmean(kept["replicates"][objectives[0]]), number)
            if trial.should_prune():
                trial.set_user_attr("why", f"worse than the median after {number + 1} seeds")
                raise optuna.TrialPruned
    return [fmean(kept["replicates"][metric]) for metric in objectives]


def run_metrics(ready: Plan, run: Run) -> dict[str, dict[str, float]]:
    """What the objectives need of a run, scored and attacked where that was not done before."""
    objectives = ready.sweep.objectives
    found: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    if ready.tasks:
        found |= score_model(run, ready.tasks)["after"]
    if any(metric.startswith(ATTACK) for metric in objectives):
        given = ready.sweep.attack
        made = attack_run(run, tier=given.tier, names=given.names, sources=ready.sources)
        found[f"{ATTACK}K*"] = error_entry(made["K*"])
        for name, entry in made["attacks"].items():
            reasons[ATTACK + name] = entry["why"]
            if "accuracy" in entry:
                found[ATTACK + name] = error_entry(entry["accuracy"])
    for metric in objectives:
        if metric not in found:
            why = reasons.get(metric) or "there is no such number"
            raise SrmuError(f"objective {metric!r} was not measured: {why}")
    return found


def error_entry(entry: Mapping[str, float]) -> dict[str, float]:
    """A value with its interval as one with its standard error."""
    return {
        "value": entry["value"],
        "stderr": (entry["high"] - entry["low"]) / (2 * 1.96),
        "n": entry["n"],
    }


def sweep_report(ready: Plan, study: Study, final: bool = False) -> dict[str, Any]:
    """What `sweep.json` says: each trial once, the best of them, and which keys matter."""
    trials = [sweep_entry(ready, trial) for trial in standing_trials(study) if trial is not None]
    complete = [one for one in trials if one["state"] == "complete"]
    return {
        "kind": "sweep",
        "name": ready.name,
        "sampler": ready.sweep.sampler,
        "seeds": ready.sweep.seeds,
        "objectives": dict(ready.sweep.objectives),
        "space": {one.key: one.written for one in ready.space},
        "trials": trials,
        "front": [trial.number for trial in study.best_trials] if complete else [],
        "importance": key_importance(study) if final and len(complete) >= ENOUGH else {},
    }


def sweep_entry(ready: Plan, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as `sweep.json` has it."""
    kept = trial.user_attrs.get("measured", {})
    replicates = {k: v for k, v in kept.get("replicates", {}).items() if v}
    why = trial.user_attrs.get("why", "")
    if trial.state == TrialState.FAIL and not why:
        why = "its worker died"
    return {
        "number": trial.number,
        "state": STATES[trial.state],
        "params": kept.get("params") or trial.params or trial.system_attrs.get("fixed_params", {}),
        "values": {metric: fmean(values) for metric, values in replicates.items()},
        "replicates": replicates,
        "errors": {metric: kept["errors"][metric] for metric in replicates},
        "n": kept.get("n", {}),
        "runs": kept.get("runs", []),
        "seconds": kept.get("seconds", 0.0),
        "why": why,
    }


def key_importance(study: Study) -> dict[str, float]:
    """The share of each key in what the objectives differ by (fANOVA); none where they do not."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = []
    for objective in range(len(study.directions)):
        value = partial(objective_value, objective)
        if len(set(map(value, complete))) > 1:
            shares = evaluator.evaluate(study, target=value)
            total = sum(shares.values())
            found.append({key: share / total for key, share in shares.items()})
    return {key: fmean(shares[key] for shares in found) for key in (found[0] if found else ())}


def objective_value(objective: int, trial: FrozenTrial) -> float:
    return float(trial.values[objective])


def best_trials(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials to look at: the front, or of one objective the best five; the best of it first."""
    (metric, direction), *more = found["objectives"].items()
    chosen = [
        one
        for one in found["trials"]
        if one["state"] == "complete" and (not more or one["number"] in found["front"])
    ]
    sign = 1 if direction == "minimize" else -1
    chosen.sort(key=lambda one: sign * one["values"][metric])
    return chosen if more else chosen[:5]


def sweep_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of a sweep."""
    return [
        {"trial": str(one["number"])}
        | {key: yaml_line(value) for key, value in one["params"].items()}
        | {metric: format_seeds(one["replicates"][metric]) for metric in found["objectives"]}
        for one in best_trials(found)
    ]


def format_seeds(values: Sequence[float]) -> str:
    """`0.312 (0.290-0.330)`: the mean, and the lowest and highest where there are several."""
    spread = f" ({min(values):.3f}\N{EN DASH}{max(values):.3f})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def describe_sweep(found: Mapping[str, Any]) -> list[str]:
    """What to know beside the table."""
    lines = []
    if len(found["seeds"]) > 1:
        lines.append(f"means over {len(found['seeds'])} seeds, with the lowest and the highest")
    for state in ("pruned", "failed"):
        if some := [one for one in found["trials"] if one["state"] == state]:
            count = f"{len(some)} of {len(found['trials'])} trials {state}"
            lines.append(f"{count}; trial {some[0]['number']}: {some[0]['why']}")
    shares = sorted(found["importance"].items(), key=lambda item: -item[1])
    if shares:
        listed = ", ".join(f"{key} {share:.0%}" for key, share in shares)
        lines.append(f"what the objectives differ by (fANOVA): {listed}")
    return lines
