"""What a search tries: the values of each key, and who chooses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from typing import Annotated, Any, Self

import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from srmu.engine.loading import read_config
from srmu.engine.weights import locate_model
from srmu.runs.config import Config
from srmu.search.queue import ANSWERED, has_failed

RANDOM = 6  # trials before the sampler learns from them


def parse_number(value: Any) -> Any:
    """A number or None; to YAML 1e-5, which has no dot, is a word."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError("a number")
    return value


class Dimension(BaseModel):
    """The values of a key of the config: choices, or the numbers of a range, both ends included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    choices: tuple[Any, ...] = ()
    low: Annotated[Any, BeforeValidator(parse_number)] = None
    high: Annotated[Any, BeforeValidator(parse_number)] = None
    step: Annotated[Any, BeforeValidator(parse_number)] = None
    log: bool = False

    @model_validator(mode="before")
    @classmethod
    def read_choices(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return given
        if isinstance(given, list):
            if not given or not all(isinstance(v, str | int | float | None) for v in given):
                raise ValueError("a list of numbers or words, like [8, 16, 32]")
            if len(set(map(repr, given))) == len(given):
                return {"choices": given}
            raise ValueError(f"no choice twice: {given}")
        raise ValueError("[choices] or {low: 1, high: 100, log: true}")

    @model_validator(mode="after")
    def settle_range(self) -> Self:
        """A range of whole numbers has steps of 1; any ends at its last step, so that no sampler has to guess it."""
        if self.choices:
            return self
        low, high, step = self.low, self.high, self.step
        if low is None or high is None or low >= high:
            raise ValueError("low below high, both given")
        if step is not None and step <= 0:
            raise ValueError("a step above 0")
        if self.log and (step is not None or low <= 0):
            raise ValueError("low above 0 and no step, with log")
        kind = float if any(isinstance(v, float) for v in (low, high, step)) else int
        if kind is int and step is None and not self.log:
            step = 1
        settled = self.model_copy(update={"low": kind(low), "high": kind(high), "step": step})
        return settled if step is None else settled.model_copy(update={"high": settled.list_values()[-1]})

    @property
    def samples(self) -> tuple[Any, ...]:
        """A few values, to check that the key takes them."""
        return self.choices or (self.low, self.high)

    @property
    def written(self) -> Any:
        return [*self.choices] or self.model_dump(exclude_defaults=True)

    def list_values(self) -> tuple[Any, ...]:
        """Every value; none of a range without steps."""
        if self.choices or self.step is None:
            return self.choices
        # decimal: 0.1 + 0.2 is 0.3
        low, high, step = (Decimal(str(v)) for v in (self.low, self.high, self.step))
        return tuple(type(self.low)(low + i * step) for i in range(int((high - low) // step) + 1))

    def suggest(self, trial: optuna.Trial, key: str, grid: bool) -> Any:
        if grid or self.choices:
            return trial.suggest_categorical(key, self.list_values())
        if isinstance(self.low, int):
            return trial.suggest_int(key, self.low, self.high, step=self.step or 1, log=self.log)
        value = trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)
        return value if self.step is None else float(f"{value:.12g}")


class PlaceSampler(BaseSampler):
    """A sampler that `make` makes anew for each trial by how many came before: a stopped search goes on the same."""

    inner: BaseSampler  # of the trial at hand

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self.make = make

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        place = sum(t.state in (*ANSWERED, TrialState.RUNNING) or has_failed(t) for t in earlier)
        self.inner = self.make(place)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Any:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return self.inner.sample_independent(study, trial, name, distribution)


# ---- the space of an automatic search


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with values of dotted keys of its method and its training."""
    changed = {}
    for part in ("method", "train"):
        given = {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(part)}
        changed[part] = replace(getattr(config, part), **given)
    return config.model_copy(update=changed)


def round_value(value: float) -> float:
    """Three digits, which is as far as a person wants to read."""
    return float(f"{value:.3g}")


def find_rate(config: Config) -> float:
    """The default learning rate of the config's method for its model."""
    return config.method.choose_rate(read_config(locate_model(config.model, config.revision)))


def start_strength(config: Config) -> dict[str, Any]:
    """Where a search begins, and what layers are scanned with: a moderate strength."""
    return {
        "method.kappa": 4.0,
        "method.alpha": 300.0,
        "method.anchors": "random",  # on most testbeds less was forgotten without them at the same cost
        "train.learning_rate": round_value(4 * find_rate(config)),
    }


def suggest_strength(config: Config, trial: optuna.Trial) -> dict[str, Any]:
    """Values for a trial, within what was worth trying on the testbeds."""
    rate = find_rate(config)
    ranges = {"method.kappa": (1.5, 16), "method.alpha": (50, 2000), "train.learning_rate": (rate, 8 * rate)}
    return {key: round_value(trial.suggest_float(key, low, high, log=True)) for key, (low, high) in ranges.items()}


def make_sampler(config: Config, seed: int) -> PlaceSampler:
    """TPE, which begins with the moderate strength."""

    def make(place: int) -> BaseSampler:
        sampler = TPESampler(seed=1000 * seed + place, n_startup_trials=RANDOM)
        return sampler if place else PartialFixedSampler(start_strength(config), sampler)

    return PlaceSampler(make)
