"""A sweep: one config file run with many settings, and which of them are best.

A trial is a setting. It is run once with each seed, and its objectives are the means. Runs lie in the sweep's folder,
named by what decides them, and share the activations of their fixed layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from itertools import product
from operator import getitem
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

import optuna
import yaml
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from srmu.attacks.base import Tier
from srmu.attacks.suite import Sources, attack_run, fill_sources, load_exam, select_attacks
from srmu.engine.files import require_place, write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.weights import locate_model
from srmu.errors import SrmuError, suggest_word
from srmu.evals.score import score_model
from srmu.runs.config import Config, explain_error, load_config, put_override, read_tree
from srmu.runs.plan import plan_run
from srmu.runs.run import Run, unlearn_config
from srmu.runs.setting import run_setting
from srmu.search import queue
from srmu.search.space import Dimension, PlaceSampler

FILE = "sweep.json"
ATTACK = "attack."
ENOUGH = 8  # complete trials to tell which key matters


class AttackOptions(BaseModel):
    """How each run is attacked, where an objective is what an attack finds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tier: Tier = "smoke"
    names: list[str] = []  # only these
    tasks: list[str] = []  # as `srmu attack --tasks`: the testbed has its own
    limit: int = Field(default=400, ge=1)


class Sweep(BaseModel):
    """A sweep file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Path
    set: list[str] = []  # key=value, for all trials
    search: dict[str, Dimension]
    sampler: Literal["grid", "tpe", "nsga2"] = "grid"
    trials: int | None = Field(default=None, ge=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    objectives: dict[str, Literal["minimize", "maximize"]] = Field(min_length=1)
    attack: AttackOptions = AttackOptions()
    seed: int = 0  # of the sampler
    name: str  # of the study
    out: Path

    @model_validator(mode="after")
    def check_options(self) -> Self:
        """SrmuError for options that do not go together."""
        if not self.search:
            raise SrmuError("search: name at least one key, like method.kappa: [8, 16]")
        if self.sampler == "grid":
            if self.trials is not None:
                raise SrmuError("trials: a grid has as many as its points; leave it out")
            if endless := [key for key, one in self.search.items() if not one.list_values()]:
                raise SrmuError(f"search.{endless[0]}: a grid needs a list or a step; sampler=tpe takes any range")
        elif self.trials is None:
            raise SrmuError(f"trials: say how many sampler={self.sampler} is to try")
        for name in [metric.removeprefix(ATTACK) for metric in self.objectives if metric.startswith(ATTACK)]:
            chosen = ["K*", *select_attacks(self.attack.tier, self.attack.names)]
            if name not in chosen:
                raise SrmuError(f"objective {ATTACK + name!r}: no such attack is run{suggest_word(name, chosen)}")
        if len({*self.seeds}) < len(self.seeds):
            raise SrmuError(f"seeds: {self.seeds} names one twice; name each once")
        return self

    def list_points(self) -> list[dict[str, Any]]:
        """The trials: each point of the grid, or as many empty ones as are asked for."""
        if self.sampler != "grid":
            return [{}] * (self.trials or 0)
        values = product(*(one.list_values() for one in self.search.values()))
        return [dict(zip(self.search, point, strict=True)) for point in values]

    def list_overrides(self, params: Mapping[str, Any]) -> list[str]:
        """What to type after the config file for a trial's runs."""
        return [*self.set, *(f"{key}={yaml_line(value)}" for key, value in params.items())]

    def config_of(self, params: Mapping[str, Any], seed: int) -> Config:
        own = [f"seed={seed}", f"runs_dir={self.out / 'runs'}"]
        return load_config(self.config, [*self.list_overrides(params), *own])

    @property
    def tasks(self) -> list[str]:
        """What runs are scored on: nobody looks at what a report will rest on while settings are chosen."""
        return [*dict.fromkeys(name.split("/")[0] for name in self.objectives if not name.startswith(ATTACK))]

    @property
    def sources(self) -> Sources:
        return Sources(tasks=tuple(self.attack.tasks), limit=self.attack.limit)

    @property
    def spec(self) -> dict[str, Any]:
        """What a study is made for, the same wherever its files lie."""
        return {
            **{f"search.{key}": one.written for key, one in self.search.items()},
            # in order: a study keeps its values so
            "objectives": [f"{metric}: {way}" for metric, way in self.objectives.items()],
            **self.model_dump(include={"sampler", "seeds", "seed", "attack"}),
            **{f"config.{key}": value for key, value in run_setting(load_config(self.config, self.set))},
        }

    def make_sampler(self) -> BaseSampler:
        seed = 100_003 * self.seed
        if self.sampler == "tpe":
            return PlaceSampler(lambda place: TPESampler(seed=seed + place))
        if self.sampler == "nsga2":
            # ten generations, whatever the number of trials
            size = max(4, min(50, (self.trials or 0) // 10))
            return PlaceSampler(lambda place: NSGAIISampler(population_size=size, seed=seed + place))
        return RandomSampler()  # every value is in the queue


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """A sweep file with its paths made absolute, whose keys and values its config takes."""
    tree = read_tree(path)
    if not {"config", "search"} & tree.keys():
        raise SrmuError(
            f"{path} is no sweep file: a sweep file names a run config (config: run.yaml), what to try in it "
            f"(search: {{method.kappa: [8, 16]}}) and objectives; to run this one, type: srmu unlearn {path}"
        )
    for override in overrides:
        name = override.partition("=")[0]
        if name.startswith("search.") and isinstance(tree.setdefault("search", {}), dict):
            # keys of the space have dots of their own
            given: dict[str, Any] = {}
            put_override(given, override)
            tree["search"][name.removeprefix("search.")] = reduce(getitem, name.split("."), given)
        else:
            put_override(tree, override)
    tree["name"] = tree.get("name") or path.stem
    tree["out"] = tree.get("out") or f"sweeps/{tree['name']}"
    try:
        sweep = Sweep.model_validate(tree)
        home = path.resolve().parent
        named = {key: (home / getattr(sweep, key).expanduser()).resolve() for key in ("config", "out")}
    except ValidationError as error:
        part = next(iter(error.errors()[0]["loc"]), "")
        schema = {"attack": AttackOptions, "search": Dimension}.get(str(part), Sweep)
        raise SrmuError(f"{path}: {explain_error(error, '', schema)}") from None
    except RuntimeError:
        raise SrmuError(f"{path}: config or out: there is no such user") from None
    sweep = sweep.model_copy(update=named)
    check_keys(sweep)
    require_place(sweep.out / FILE)
    return sweep


def check_keys(sweep: Sweep) -> None:
    """SrmuError where the config does not take a key of the space, or one of its values."""
    first = {key: one.samples[0] for key, one in sweep.search.items()}
    for key, one in sweep.search.items():
        if key in ("seed", "runs_dir"):
            raise SrmuError(f"search.{key}: list seeds under seeds:, and name the folder of the runs under out:")
        for value in one.samples:
            try:
                plan_run(sweep.config_of(first | {key: value}, sweep.seeds[0]))
            except SrmuError as error:
                # what is wrong without the space is not the space's fault
                plan_run(load_config(sweep.config, sweep.set))
                raise SrmuError(f"search.{key}: {error}") from None


def check_objectives(sweep: Sweep, watch: Watch = ignore_progress) -> None:
    """SrmuError for an objective that no trial would produce; keeps the original's scores, which all trials need."""
    config = load_config(sweep.config, sweep.set)
    base = locate_model(config.model, config.revision)
    metrics = score_model(base, sweep.tasks, tasks_dir=config.tasks_dir, watch=watch)["after"] if sweep.tasks else {}
    attacked = [metric for metric in sweep.objectives if metric.startswith(ATTACK)]
    for metric in sweep.objectives:
        if metric not in (*metrics, *attacked):
            raise SrmuError(f"objective {metric!r} is not measured{suggest_word(metric, metrics)}")
    if attacked:
        load_exam(fill_sources(sweep.sources, config, base), 0)


def yaml_line(value: Any) -> str:
    """A value as one would type it: YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def run_sweep(sweep: Sweep, storage: str = "", watch: Watch = ignore_progress) -> dict[str, Any]:
    """Run a sweep, or what is left of it, with any other workers; what `sweep.json` says."""
    if storage:
        queue.locate_database(storage)  # a mistake in it must show before the original model is scored
    check_objectives(sweep, watch)
    study = queue.open_study(
        storage or sweep.out / queue.FILE,
        sweep.name,
        spec=sweep.spec,
        directions=[*sweep.objectives.values()],
        sampler=sweep.make_sampler(),
        queue=sweep.list_points(),
    )
    study.set_metric_names([*sweep.objectives])  # for optuna-dashboard
    sweep.out.mkdir(parents=True, exist_ok=True)
    write = partial(write_sweep, sweep, study)
    queue.work_queue(study, partial(measure_trial, sweep), watch, write)
    return write(final=True)


def measure_trial(sweep: Sweep, trial: optuna.Trial) -> list[float]:
    """The objectives of a trial: the means over its seeds."""
    params = {key: one.suggest(trial, key, sweep.sampler == "grid") for key, one in sweep.search.items()}
    runs = [unlearn_config(sweep.config_of(params, seed)) for seed in sweep.seeds]
    results = [run_metrics(sweep, run) for run in runs]
    replicates = {metric: [result[metric]["value"] for result in results] for metric in sweep.objectives}
    means = {metric: fmean(values) for metric, values in replicates.items()}
    measured = {
        "params": params,
        "values": means,
        "replicates": replicates,
        "errors": {metric: [result[metric].get("stderr") for result in results] for metric in sweep.objectives},
        "n": {metric: int(results[-1][metric]["n"]) for metric in sweep.objectives},
        "runs": [run.folder.relative_to(sweep.out).as_posix() for run in runs],
    }
    trial.set_user_attr("measured", measured)
    return [*means.values()]


def run_metrics(sweep: Sweep, run: Run) -> dict[str, dict[str, float]]:
    """What the objectives need of a run, scored and attacked where that was not done before."""
    metrics: dict[str, dict[str, float]] = score_model(run, sweep.tasks)["after"] if sweep.tasks else {}
    attacks: dict[str, Any] = {}
    if any(metric.startswith(ATTACK) for metric in sweep.objectives):
        report = attack_run(run, tier=sweep.attack.tier, names=sweep.attack.names, sources=sweep.sources)
        attacks = report["attacks"] | {"K*": {"accuracy": report["K*"]}}
        for name, attack in attacks.items():
            if found := attack.get("accuracy"):
                error = (found["high"] - found["low"]) / (2 * 1.96)
                metrics[ATTACK + name] = {"value": found["value"], "stderr": error, "n": found["n"]}
    for metric in sweep.objectives:
        if metric not in metrics:
            why = attacks.get(metric.removeprefix(ATTACK), {}).get("why") or "there is no such number"
            raise SrmuError(f"objective {metric!r} was not measured: {why}")
    return metrics


def write_sweep(sweep: Sweep, study: queue.Study, final: bool = False) -> dict[str, Any]:
    """Write `sweep.json`: each trial once, the best of them and, at the end, which keys matter."""
    report = {
        **sweep.model_dump(include={"name", "sampler", "seeds", "objectives"}),
        "space": {key: one.written for key, one in sweep.search.items()},
        "trials": queue.list_trials(study),
        "front": [trial.number for trial in study.best_trials],
        "importance": key_importance(study) if final else {},
    }
    write_json(sweep.out / FILE, report)
    return report


def key_importance(study: queue.Study) -> dict[str, float]:
    """The share of each key in what the objectives differ by (fANOVA); none where they do not, or trials are few."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    evaluator = FanovaImportanceEvaluator(seed=0)

    def share_keys(number: int) -> dict[str, float]:
        return get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[number])

    numbers = range(len(study.directions)) if len(complete) >= ENOUGH else ()
    shares = [share_keys(i) for i in numbers if len({trial.values[i] for trial in complete}) > 1]
    return {key: fmean(share[key] for share in shares) for key in (shares[0] if shares else ())}


def best_trials(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials to look at: the front, or of one objective the best five; the best of it first."""
    (metric, direction), *others = report["objectives"].items()
    complete = [trial for trial in report["trials"] if trial["state"] == "complete"]
    complete.sort(key=lambda trial: trial["values"][metric] * (1 if direction == "minimize" else -1))
    return [trial for trial in complete if trial["number"] in report["front"]] if others else complete[:5]


def sweep_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of a sweep: means, with the lowest and highest in `0.312 (0.290-0.330)`."""
    rows = []
    for trial in best_trials(report):
        row = {"trial": str(trial["number"])} | {key: yaml_line(value) for key, value in trial["params"].items()}
        for metric in report["objectives"]:
            seeds = trial["replicates"][metric]
            spread = f" ({min(seeds):.3f}\N{EN DASH}{max(seeds):.3f})" if len(seeds) > 1 else ""
            row[metric] = f"{fmean(seeds):.3f}{spread}"
        rows.append(row)
    return rows


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
