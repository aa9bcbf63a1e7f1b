"""Estimates with intervals: bootstrap over facts and seeds, Wilson's, McNemar's test, AUC."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from operator import itemgetter
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srmu.errors import SrmuError

RESAMPLES = 2000
LEAST = 20  # facts that an interval needs
KNOWN = 0.01  # the least accuracy above chance that K* divides by

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]  # of means (..., A), one a column, to numbers (...)
FIRST_COLUMN: Statistic = itemgetter((..., 0))  # the statistic that is a single mean


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, from `n` questions or texts; no interval: `nan`."""

    value: float
    low: float = nan
    high: float = nan
    n: int = 0

    @property
    def has_interval(self) -> bool:
        return not (isnan(self.low) or isnan(self.high))

    def __str__(self) -> str:
        """A share in per cent with its interval; any other number as it is."""
        if not self.has_interval:
            return f"{self.value:.4g}"
        return f"{self.value:.1%} ({self.low:.1%}\N{EN DASH}{self.high:.1%})".replace("%", "")


def worst_case(means: Array, chance: float, floors: ArrayLike | None = None) -> Array:
    """K*, the share of knowledge that the best attack finds, of accuracies (..., 1 + A), the original's first.

    `floors` (..., A): the accuracy that each attack reaches on facts that were never known; else `chance`.
    """
    # a resample in which the original knows next to nothing must not divide by zero
    known = np.maximum(means[..., 0] - chance, KNOWN)
    floors = np.asarray(chance if floors is None else floors)
    # who knows a share k and gets a share f of the rest right answers k + (1 - k) f; of the original, f is chance
    shares = (means[..., 1:] - floors) * ((1 - chance) / np.maximum(1 - floors, KNOWN))
    # the best in each resample anew, on the questions it is measured on: if anything, K* is too high
    return shares.max(axis=-1) / known


def attack_share(attacks: Mapping[str, Any], one: Mapping[str, Any]) -> float:
    """The share of the knowledge that one attack of a report finds."""
    means = np.array([attacks["original"]["accuracy"]["value"], one["accuracy"]["value"]])
    return float(worst_case(means, attacks["chance"], one.get("floor")))


def list_counted(attacks: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The attacks of a report that count for K*: those that asked the questions and are not invalid."""
    tried = [one for one in attacks["attacks"].values() if one["status"] == "done" and one.get("right")]
    return [one for one in tried if one.get("valid") is not False]


def residual_table(attacks: Mapping[str, Any]) -> Array:
    """The right answers that `worst_case` takes the means of, from a report of attacks: (questions, 1 + A)."""
    counted = [attacks["original"], *list_counted(attacks)]
    return np.stack([parse_answers(one["right"]) for one in counted], axis=1)


def draw_floors(attacks: Mapping[str, Any], draws: "Draws", testbed: Hashable = "") -> Array | None:
    """The floors that `worst_case` takes, as they are and in each resample: (1 + RESAMPLES, A).

    The accuracy on facts that the original never knew, under the same attack on the original, and chance at least.
    None where none were asked for.
    """
    if "unknown" not in attacks:
        return None
    facts = attacks["unknown"]
    controls = [one.get("controls", {}).get("unknown", {}) for one in list_counted(attacks)]
    # not asked: nothing is known to be above chance
    table = np.stack([parse_answers(one.get("right", [0] * len(facts))) for one in controls], axis=1)
    # named apart from the questions' own facts, which have the same numbers, and are drawn for themselves
    means = draws.means(table, [(testbed, "unknown", fact) for fact in facts])
    return np.maximum(means, attacks["chance"])


def parse_answers(right: str | Sequence[float]) -> Array:
    """Right answers as numbers, from a list of them or from a text with a digit for each."""
    return np.array([float(value) for value in right])


class Draws:
    """Questions drawn again and again, as a bootstrap does: whole facts, whose phrasings are right or wrong alike."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.drawn: dict[tuple[Hashable, ...], Array] = {}  # of the same facts once, so that differences are paired

    def weights(self, facts: Sequence[Hashable], what: str = "facts") -> Array:
        """How often each fact counts, as they are and in each resample: (1 + RESAMPLES, facts)."""
        key, count = tuple(facts), len(facts)
        if key not in self.drawn:
            if count < LEAST:
                raise SrmuError(f"{count} {what} are too few for an interval: it needs {LEAST} or more")
            times = self.rng.multinomial(count, [1 / count] * count, size=RESAMPLES)
            self.drawn[key] = np.vstack([np.ones(count), times])
        return self.drawn[key]

    def means(self, table: ArrayLike, facts: Sequence[Hashable]) -> Array:
        """Column means of (questions, columns) as they are, then of each resample: (1 + RESAMPLES, columns)."""
        numbers = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
        weights = self.weights([*numbers])
        fact = [numbers[name] for name in facts]
        sums = np.zeros((len(numbers), np.size(table) // len(facts)))
        np.add.at(sums, fact, np.asarray(table, dtype=float).reshape(len(facts), -1))
        return weights @ sums / (weights @ np.bincount(fact))[:, None]

    def over_seeds(self, values: Array) -> Array:
        """The mean over seeds in each row, (1 + RESAMPLES, seeds) to (1 + RESAMPLES,); seeds are drawn too.

        Drawn from S values, a mean of S varies by sqrt((S - 1) / S) too little (18 % for three seeds), so what the draw
        adds is widened by the inverse. Coverage of three seeds in simulation: 0.97-1.00 where seeds differ little,
        0.88-0.92 where they differ by 0.15 in accuracy.
        """
        seeds = values.shape[1]
        mean = values.mean(axis=1)
        if seeds > 1:
            picked = self.rng.integers(seeds, size=(RESAMPLES, seeds))
            moved = np.take_along_axis(values[1:], picked, axis=1).mean(axis=1) - mean[1:]
            mean[1:] += moved * (seeds / (seeds - 1)) ** 0.5
        return mean

    def estimate(self, values: Array, n: int = 0, clip: tuple[float, float] = (-inf, inf)) -> Estimate:
        """The mean over seeds of (1 + RESAMPLES, seeds), kept within `clip`."""
        return estimate_from(self.over_seeds(values).clip(*clip), n)

    def estimate_accuracy(self, values: Array, facts: int, n: int = 0) -> Estimate:
        """The same for accuracies; at 0 and 1, where no resample differs, with Wilson's interval."""
        found = self.estimate(values, n)
        return found if found.low < found.high else Estimate(found.value, *accuracy_interval([found.value], facts), n)


def estimate_from(values: Array, n: int) -> Estimate:
    """The first number, with the interval that the others, its resamples, span."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high), n)


def bootstrap_estimate(
    table: ArrayLike, facts: Sequence[Hashable], statistic: Statistic = FIRST_COLUMN, *, seed: int = 0
) -> Estimate:
    """A statistic of column means of (questions, columns), with its paired bootstrap interval over `facts`."""
    return estimate_from(statistic(Draws(seed).means(table, facts)), len(facts))


def estimate_accuracy(right: ArrayLike, facts: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    draws = Draws(seed)
    return draws.estimate_accuracy(draws.means(right, facts), len(set(facts)), len(facts))


def accuracy_interval(accuracies: Sequence[float], n: int) -> tuple[float, float]:
    """95 % interval for an accuracy, given each seed's accuracy on the same `n` questions, within [0, 1].

    Wilson's at the mean with `n` questions (seeds share them, so do not multiply them), each side widened in quadrature
    by 1.96 sd(seeds) / sqrt(seeds).
    """
    from statsmodels.stats.proportion import proportion_confint

    mean, seeds = float(np.mean(accuracies)), len(accuracies)
    low, high = proportion_confint(mean * n, n, alpha=0.05, method="wilson")
    spread = 1.96 * np.std(accuracies, ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    low, high = mean - np.hypot(mean - low, spread), mean + np.hypot(high - mean, spread)
    return max(0.0, float(low)), min(1.0, float(high))


def average_seeds(seeds: Sequence[Mapping[str, Mapping[str, Any]]], metrics: Sequence[str]) -> Estimate | None:
    """The mean of some metrics, then over the seeds (metrics by name) that have them all; None where none has."""
    whole = [[seed[m] for m in metrics] for seed in seeds if all(m in seed for m in metrics)]
    if not whole:
        return None
    values = [fmean(entry["value"] for entry in entries) for entries in whole]
    counts = [entry.get("n") or 0 for entry in whole[0]]
    if not all(counts) or not all(0 <= value <= 1 for value in values):
        return Estimate(fmean(values))  # only a share of a known number of questions has an interval
    # with so many questions one accuracy varies as much as the mean of several
    n = round(len(counts) ** 2 / sum(1 / count for count in counts))
    return Estimate(fmean(values), *accuracy_interval(values, n), n)


def mcnemar_p(before: ArrayLike, after: ArrayLike) -> float:
    """Exact p that the same questions are answered as well after as before: too small where some share a fact."""
    from scipy.stats import binomtest

    one, two = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    lost, won = int((one & ~two).sum()), int((~one & two).sum())
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def area_under_curve(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive scores higher than a negative; a tie counts a half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic / (np.size(positive) * np.size(negative)))


def auc_bootstrap(
    positive: ArrayLike, negative: ArrayLike, statistic: Statistic = FIRST_COLUMN, *, seed: int = 0
) -> Estimate:
    """A statistic of the AUCs of columns (texts, columns), with its interval: texts are drawn within each set."""
    ones, others = (np.atleast_2d(np.asarray(x, dtype=float).T) for x in (positive, negative))  # (columns, texts)
    draws = Draws(seed)
    first = draws.weights([("positive", i) for i in range(ones.shape[1])], "texts")
    second = draws.weights([("negative", i) for i in range(others.shape[1])], "texts")
    columns = []
    for one, other in zip(ones, others, strict=True):
        wins = (one[:, None] > other) + 0.5 * (one[:, None] == other)
        columns.append(((first @ wins) * second).sum(axis=1) / wins.size)
    return estimate_from(statistic(np.stack(columns, axis=-1)), ones.shape[1] + others.shape[1])
