"""What a search tries: the values of each key, and samplers that many workers can share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from srmu.errors import SrmuError, suggest_word


@dataclass(frozen=True)
class Dimension:
    """What a key of the config is tried with: choices, or the numbers of a range."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False

    @property
    def samples(self) -> tuple[Any, ...]:
        """Values that show whether the key takes such ones."""
        return self.choices or (self.low, self.high)

    @property
    def written(self) -> Any:
        if self.choices:
            return list(self.choices)
        shape = {"log": True} if self.log else {} if self.step is None else {"step": self.step}
        return {"low": self.low, "high": self.high, **shape}

    def all(self) -> tuple[Any, ...]:
        """Every value, both ends included; SrmuError where a range has no steps."""
        if self.choices:
            return self.choices
        if self.log or self.step is None:
            raise SrmuError(
                f"search.{self.key}: a grid needs a list or a step; "
                "sampler=tpe takes a range without"
            )
        # decimal: 0.1 + 0.2 is 0.3
        low, high, step = (Decimal(str(v)) for v in (self.low, self.high, self.step))
        kind = type(self.low)
        return tuple(kind(low + i * step) for i in range(int((high - low) // step) + 1))

    def suggest(self, trial: optuna.Trial, grid: bool) -> Any:
        """The trial's value."""
        if grid or self.choices:
            return trial.suggest_categorical(self.key, self.all())
        if isinstance(self.low, int):
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.key, self.low, int(self.high), step=step, log=self.log)
        value = trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)
        return value if self.step is None else float(f"{value:.12g}")


def make_dimension(key: str, given: Any) -> Dimension:
    """A key of the search space; SrmuError where it is none."""
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
        raise SrmuError(
            f"{where}.{unknown[0]} is not an option{suggest_word(str(unknown[0]), known)}"
        )
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
    found = Dimension(key, (), low, high, step, bool(log))
    if step is not None:  # the last value, so that no sampler has to guess
        found = Dimension(key, (), low, found.all()[-1], step)
    return found


def parse_number(where: str, value: Any) -> Any:
    """A number or None; YAML takes 1e-5, which has no dot, for a word."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise SrmuError(f"{where}={value}: expected a number")


class Seeded(BaseSampler):
    """A sampler whose choice depends on the trial's number and on what was found before.

    Of two workers with one seed both would try the same values, and a resumed one those again.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self.make, self.seed = make, seed
        self.inner = make(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.inner = self.make(self.seed * 100_003 + trial.number)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Any:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return self.inner.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.inner.after_trial(study, trial, state, values)
