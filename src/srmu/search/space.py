"""What a search tries: the values of each key, and who chooses them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from srmu.engine.loading import read_config
from srmu.errors import SrmuError, suggest_word
from srmu.runs.config import Config
from srmu.runs.plan import locate_base
from srmu.search.queue import is_ended

RANDOM = 6  # trials before the sampler learns from them
WIDTH = 14336  # inputs of a down-projection of the 7B models that papers give rates for


@dataclass(frozen=True)
class Dimension:
    """The values of a key of the config: choices, or the numbers of a range."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False

    @property
    def samples(self) -> tuple[Any, ...]:
        """A few values, to check that the key takes them."""
        return self.choices or (self.low, self.high)

    @property
    def written(self) -> Any:
        if self.choices:
            return list(self.choices)
        shape = {"log": True} if self.log else {} if self.step is None else {"step": self.step}
        return {"low": self.low, "high": self.high, **shape}

    def list_values(self) -> tuple[Any, ...]:
        """Every value, both ends included; SrmuError where a range has no steps."""
        if self.choices:
            return self.choices
        if self.log or self.step is None:
            raise SrmuError(f"search.{self.key}: a grid needs a list or a step; sampler=tpe takes a range without")
        # decimal: 0.1 + 0.2 is 0.3
        low, high, step = (Decimal(str(v)) for v in (self.low, self.high, self.step))
        kind = type(self.low)
        return tuple(kind(low + i * step) for i in range(int((high - low) // step) + 1))

    def suggest(self, trial: optuna.Trial, grid: bool) -> Any:
        """The trial's value."""
        if grid or self.choices:
            return trial.suggest_categorical(self.key, self.list_values())
        if isinstance(self.low, int):
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.key, self.low, int(self.high), step=step, log=self.log)
        value = trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)
        return value if self.step is None else float(f"{value:.12g}")


def make_dimension(key: str, given: Any) -> Dimension:
    """A key of the search space; SrmuError for what is neither choices nor a range."""
    where = f"search.{key}"
    if isinstance(given, list):
        if not given or not all(isinstance(v, str | int | float | None) for v in given):
            raise SrmuError(f"{where}: expected a list of numbers or words, like [8, 16, 32]")
        if len(set(map(repr, given))) < len(given):
            raise SrmuError(f"{where}: a choice is there twice: {given}")
        return Dimension(key, tuple(given))
    if not isinstance(given, dict):
        raise SrmuError(f"{where}={given}: expected [choices] or {{low: 1, high: 100, log: true}}")
    known = ("low", "high", "step", "log")
    if unknown := [name for name in given if name not in known]:
        raise SrmuError(f"{where}.{unknown[0]} is not an option{suggest_word(str(unknown[0]), known)}")
    values = {name: parse_number(f"{where}.{name}", given.get(name)) for name in known[:3]}
    low, high, step = values.values()
    log = given.get("log", False)
    if low is None or high is None or low >= high:
        raise SrmuError(f"{where}: expected low below high, both given")
    if log and (step is not None or low <= 0):
        raise SrmuError(f"{where}: with log low is above 0 and there is no step")
    if step is not None and step <= 0:
        raise SrmuError(f"{where}.step={step}: expected a number above 0")
    if any(isinstance(v, float) for v in (low, high, step)):
        low, high, step = float(low), float(high), None if step is None else float(step)
    elif step is None and not log:
        step = 1
    dimension = Dimension(key, (), low, high, step, bool(log))
    if step is not None:  # the range ends at its last value, so that no sampler has to guess it
        return replace(dimension, high=dimension.list_values()[-1])
    return dimension


def parse_number(where: str, value: Any) -> Any:
    """A number or None; to YAML 1e-5, which has no dot, is a word."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise SrmuError(f"{where}={value}: expected a number")


class PlaceSampler(BaseSampler):
    """A sampler whose choice depends only on how many trials came before, and what they found.

    `make` makes the sampler of a place: the number of earlier trials that ended or are running. So
    a stopped search goes on as if it had not stopped, and two workers try different values.
    """

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self.make = make
        self.inner = make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        place = sum(is_ended(t) or t.state == TrialState.RUNNING for t in earlier)
        self.inner = self.make(place)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Any:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return self.inner.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.inner.after_trial(study, trial, state, values)


# ---- the space of an automatic search


def config_value(config: Config, key: str) -> Any:
    """The value of a dotted key of a config's method or training; None where it has no such key."""
    part, _, name = key.partition(".")
    return getattr(getattr(config, part), name, None)


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
    """The method's learning rate, which is meant for models of a `width`, at this model's width.

    A step of Adam changes every weight alike, and what a matrix puts out then changes with the
    number of its inputs: narrow models need larger steps.
    """
    settings = read_config(locate_base(config))
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


def suggest_strength(config: Config, trial: optuna.Trial) -> dict[str, Any]:
    """Values for a trial, within what was worth trying on the testbeds."""
    rate = scale_rate(config)
    ranges = {"method.kappa": (1.5, 16), "method.alpha": (50, 2000), "train.learning_rate": (rate, 8 * rate)}
    return {key: round_value(trial.suggest_float(key, low, high, log=True)) for key, (low, high) in ranges.items()}


def strength_sampler(config: Config, seed: int) -> PlaceSampler:
    """TPE that begins with the moderate strength."""

    def make(place: int) -> BaseSampler:
        sampler = TPESampler(seed=1000 * seed + place, n_startup_trials=RANDOM)
        if place:
            return sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return PartialFixedSampler(start_strength(config), sampler)

    return PlaceSampler(make)
