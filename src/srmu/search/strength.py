"""How a search finds a layer and a strength: runs held against a limit of utility to lose."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from srmu.engine.loading import read_config
from srmu.engine.progress import Watch
from srmu.evals.layer_sweep import sweep_layers
from srmu.runs.config import Config
from srmu.runs.run import base_of, unlearn
from srmu.search.objective import Yardstick
from srmu.search.queue import open_study, work_queue

LAYERS = 8  # that a scan tries at most
RANDOM = 6  # trials before the sampler learns from them
MARGIN = 0.5  # of the budget that trials may lose: the best of many flatters itself
NOISE = 0.05  # forgetting below it is none
WIDTH = 14336  # inputs of a down-projection of the 7B models that papers give rates for
KEYS = (
    "method.layer", "method.kappa", "method.alpha", "method.anchors", "method.hold", "method.keep",
    "method.retain", "method.noise", "train.learning_rate",
)  # fmt: skip
Entry = dict[str, Any]  # a trial, as `auto.json` has it


@dataclass(frozen=True)
class Bench:
    """What all runs of a search share."""

    config: Config
    yardstick: Yardstick
    out: Path
    limit: float  # of the utility loss on the half to choose on
    seed: int
    spec: Mapping[str, Any]  # of the study: what its trials have in common


def try_config(bench: Bench, config: Config) -> Entry:
    """A run, made where it is missing, and what it does on the half to choose on."""
    run = unlearn(config)
    outcome = bench.yardstick.outcome(bench.yardstick.score(run))
    return {
        "state": "complete",
        "params": {
            key: config_value(run.config, key) for key in KEYS if has_option(run.config, key)
        },
        "values": outcome._asdict(),
        "runs": [str(run.folder.relative_to(bench.out.resolve()))],
        "seconds": run.record["seconds"],
        "why": "",
    }


def config_value(config: Config, key: str) -> Any:
    part, _, name = key.partition(".")
    return getattr(getattr(config, part), name)


def has_option(config: Config, key: str) -> bool:
    part, _, name = key.partition(".")
    return hasattr(getattr(config, part), name)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with values of dotted keys of its method and its training."""
    parts: dict[str, dict[str, Any]] = {"method": {}, "train": {}}
    for key, value in values.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    changed = {part: replace(getattr(config, part), **given) for part, given in parts.items()}
    return config.model_copy(update=changed)


def round_value(value: float) -> float:
    """Three digits, which is as far as a person wants to read."""
    return float(f"{value:.3g}")


def scale_rate(config: Config, width: int = WIDTH) -> float:
    """The method's learning rate, which is one for models of a `width`, at this model's width.

    A step of Adam changes every weight alike, and what a matrix puts out then changes with the
    number of its inputs: narrow models need larger steps.
    """
    settings = read_config(base_of(config))
    inputs = getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size
    return type(config.method).learning_rate * width / inputs


def start_strength(config: Config) -> dict[str, Any]:
    """Where a search begins, and what layers are scanned with: a moderate strength.

    Random anchors stay: on most testbeds less was forgotten without them at the same cost.
    """
    return {
        "method.kappa": 4.0,
        "method.alpha": 300.0,
        "method.anchors": "random",
        "train.learning_rate": round_value(4 * scale_rate(config)),
    }


def suggest_values(trial: optuna.Trial, config: Config) -> dict[str, Any]:
    """Values for a trial, within what was worth trying on the testbeds."""
    slow = scale_rate(config)

    def number(key: str, low: float, high: float) -> float:
        return round_value(trial.suggest_float(key, low, high, log=True))

    return {
        "method.kappa": number("method.kappa", 1.5, 16),
        "method.alpha": number("method.alpha", 50, 2000),
        "train.learning_rate": number("train.learning_rate", slow, 8 * slow),
    }


def scan_layers(bench: Bench, watch: Watch) -> tuple[Config, dict[str, Any]]:
    """The config at the layer that forgets most for what it costs, and what each layer did."""
    yardstick = bench.yardstick
    config = with_values(bench.config, start_strength(bench.config))
    falling = [yardstick.metrics("val")[name] for name in yardstick.forget]
    rows = []
    found = sweep_layers(config, yardstick.score, falling, at_most=LAYERS, watch=watch)
    for row in found.numbers["layers"]:
        if "diverged" in row:
            continue
        scores = {
            when: {metric: {"value": value} for metric, value in row[when].items()}
            for when in ("before", "after")
        }
        rows.append({"layer": row["layer"], **yardstick.outcome(scores)._asdict()})

    layer = max(rows, key=lambda row: trial_worth(row, bench.limit))["layer"]
    return with_values(config, {"method.layer": layer}), {"layers": rows, "best": layer}


def try_all(bench: Bench, config: Config, trials: int, watch: Watch) -> list[Entry]:
    """The trials of a search at the config's layer, those of an earlier one among them.

    The values of each depend on the trials before it and on the seed alone, so that a search that
    was killed goes on to the same end.
    """

    def objective(trial: optuna.Trial) -> float:
        place = sum(map(is_ended, study.get_trials(deepcopy=False)))
        sampler = TPESampler(seed=1000 * bench.seed + place, n_startup_trials=RANDOM)
        study.sampler = sampler if place else start_sampler(config, sampler)
        found = try_config(bench, with_values(config, suggest_values(trial, config)))
        trial.set_user_attr("found", found)
        return trial_worth(found["values"], bench.limit)

    study = open_study(
        bench.out / "study.journal",
        f"layer {config_value(config, 'method.layer')} within {bench.limit:g}",
        spec=bench.spec,
        directions=["maximize"],
        sampler=TPESampler(),
        queue=[{}] * trials,
    )
    work_queue(study, objective, watch)
    done = [trial for trial in study.get_trials(deepcopy=False) if is_ended(trial)]
    return [trial_entry(trial, number) for number, trial in enumerate(done)]


def start_sampler(config: Config, sampler: BaseSampler) -> BaseSampler:
    """The sampler, with its values fixed to those that a search begins with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return PartialFixedSampler(start_strength(config), sampler)


def is_ended(trial: FrozenTrial) -> bool:
    """Whether a trial came to an end of its own."""
    finished = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return finished or (trial.state == TrialState.FAIL and "why" in trial.user_attrs)


def trial_entry(trial: FrozenTrial, number: int) -> Entry:
    why = trial.user_attrs.get("why", "")
    empty = {"params": trial.params, "values": {}, "runs": [], "seconds": 0.0, "why": why}
    state = "failed" if why else "complete"
    return empty | trial.user_attrs.get("found", {}) | {"number": number, "state": state}


def trial_worth(values: Mapping[str, float], limit: float) -> float:
    """What a search maximises: forgetting, beyond the limit in proportion less.

    As if half the change cost half as much and did half: what costs twice the limit counts half.
    """
    return values["forgetting"] * limit / max(values["utility_loss"], limit)


def has_forgotten(found: Entry) -> bool:
    return bool(found["values"]) and found["values"]["forgetting"] >= NOISE


def best_entry(found: Sequence[Entry], limit: float) -> Entry | None:
    """Of the trials within the limit the one that forgets most; of equals, that which costs less.

    None where none forgets more than noise.
    """
    within = [one for one in found if has_forgotten(one) and one["values"]["utility_loss"] <= limit]
    return max(
        within,
        key=lambda one: (one["values"]["forgetting"], -one["values"]["utility_loss"]),
        default=None,
    )


def nearest_entry(found: Sequence[Entry]) -> Entry | None:
    """The trial that forgets at the least cost."""
    return min(
        filter(has_forgotten, found), key=lambda one: one["values"]["utility_loss"], default=None
    )
