"""What numbers are worth: bootstrap intervals over facts and seeds, McNemar's test, an AUC."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srmu.errors import UserError

RESAMPLES = 2000
LEAST = 20  # facts that an interval needs

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]  # of means (..., A), one a column, to numbers (...)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, from `n` questions or texts."""

    value: float
    low: float
    high: float
    n: int

    def __sub__(self, other: float) -> Estimate:
        return Estimate(self.value - other, self.low - other, self.high - other, self.n)


def column(values: Array) -> Array:
    """The statistic that is a single mean."""
    return values[..., 0]


def bootstrap(
    tables: Sequence[ArrayLike],
    facts: Sequence[Sequence[Hashable]],
    statistic: Statistic = column,
    *,
    seed: int = 0,
) -> Estimate:
    """A statistic of column means, averaged over seeds, with its paired bootstrap interval.

    `tables` holds an array (questions, columns) for each seed, what is compared side by side in its
    columns; `facts` names what each question asks for. Whole facts are drawn, because phrasings of
    one fact are right or wrong together; seeds are drawn too, and seeds that ask the same
    questions get the same draw. UserError where there are fewer than 20 facts.
    """
    arrays = [
        np.asarray(table, dtype=float).reshape(len(names), -1)
        for table, names in zip(tables, facts, strict=True)
    ]
    rng = np.random.default_rng(seed)
    draws: dict[Any, Array] = {}
    resampled = []
    for array, names in zip(arrays, facts, strict=True):
        key = tuple(names)
        if key not in draws:
            draws[key] = _weights(key, rng)
        weights = draws[key]  # (resamples, questions)
        resampled.append(statistic(weights @ array / weights.sum(axis=1, keepdims=True)))
    picked = rng.integers(len(arrays), size=(RESAMPLES, len(arrays)))
    values = np.stack(resampled)[picked, np.arange(RESAMPLES)[:, None]].mean(axis=1)
    low, high = np.quantile(values, (0.025, 0.975))
    value = float(np.mean([statistic(array.mean(axis=0)) for array in arrays]))
    return Estimate(value, float(low), float(high), min(len(names) for names in facts))


def _weights(facts: Sequence[Hashable], rng: np.random.Generator) -> Array:
    """How often each question is drawn in each resample, (resamples, questions)."""
    numbers = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
    if len(numbers) < LEAST:
        raise UserError(
            f"{len(numbers)} facts are too few for an interval: it needs {LEAST} or more questions "
            "about different facts"
        )
    drawn = rng.multinomial(len(numbers), [1 / len(numbers)] * len(numbers), size=RESAMPLES)
    return drawn[:, [numbers[fact] for fact in facts]].astype(float)


def accuracy(right: ArrayLike, facts: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """A share of right answers with its interval.

    The bootstrap's, or Wilson's with a question a fact where that has no width: at 0 and 1.
    """
    from statsmodels.stats.proportion import proportion_confint

    found = bootstrap([right], [facts], seed=seed)
    if found.low < found.high:
        return found
    count = len(set(facts))
    low, high = proportion_confint(found.value * count, count, method="wilson")
    return Estimate(found.value, max(0.0, float(low)), min(1.0, float(high)), found.n)


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Exact p-value that the same questions are answered as well after as before."""
    from scipy.stats import binomtest

    one, two = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    lost, won = int((one & ~two).sum()), int((~one & two).sum())
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive scores higher than a negative; a tie counts a half."""
    from scipy.stats import mannwhitneyu

    ones, others = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    return float(mannwhitneyu(ones, others).statistic / (ones.size * others.size))
