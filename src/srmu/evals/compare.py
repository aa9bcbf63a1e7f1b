"""Compare methods at the same loss of utility, and say which differences are only noise."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from srmu.errors import SrmuError, suggest_word
from srmu.evals.results import PLAIN, Metrics, Row, read_attacks, read_metrics
from srmu.evals.settings import method_label, run_setting, setting_words
from srmu.evals.statistics import (
    LEAST,
    RESAMPLES,
    Array,
    Draws,
    Estimate,
    estimate_from,
    parse_answers,
    residual_table,
    worst_case,
)
from srmu.runs.run import Run

HAZARDS = ("organism_hazard", "wmdp", "forget_texts")  # how tasks on what is to go are named
Where = tuple[str, int]  # a run's model and seed: what is compared in pairs


@dataclass(frozen=True)
class ComparisonRow:
    """A method at the utility loss that all are compared at.

    Differences are to the first method's, below 0 where less knowledge is left; `verdict` is that
    of K* where both have it, else of the forget accuracy; "" for the first method itself.
    """

    method: str
    points: int  # settings of its strength
    seeds: int
    utility_loss: Estimate
    forget_accuracy: Estimate
    residual: Estimate | None  # K*, where all runs were attacked
    forget_difference: Estimate | None
    residual_difference: Estimate | None
    verdict: str
    note: str


@dataclass(frozen=True)
class RunNumbers:
    """A run's numbers as they are and in each resample of the questions: (1 + RESAMPLES,)."""

    run: Run
    where: Where
    tasks: tuple[tuple[str, ...], tuple[str, ...]]  # metrics of what is forgotten and of utility
    before: Array  # accuracy of the original model on what is to be forgotten
    forget: Array  # and of the unlearned one
    loss: Array  # mean drop of accuracy over the utility tasks
    residual: Array | None  # K*
    n: tuple[int, int]  # questions on what is to be forgotten, and on utility


@dataclass(frozen=True)
class MethodReading:
    """A method's numbers at the common utility loss, a column a seed: (1 + RESAMPLES, seeds)."""

    where: tuple[Where, ...]
    loss: Array
    forget: Array
    residual: Array | None
    reached: bool  # whether every seed's curve goes as far as the common utility loss
    rough: bool  # whether one is read between the original model and its first point
    n: tuple[int, int]


def compare_runs(
    runs: Sequence[Path], budget: float = 0.05, forget: Sequence[str] = (), utility: Sequence[str] = (), seed: int = 0
) -> list[ComparisonRow]:
    """One row a method, read where its strength curve loses `budget` of the utility accuracy.

    Runs that differ in `seed`, or in the testbed of one recipe, are repetitions of one point; runs
    that differ in numbers only (kappa, learning_rate, max_steps) are points of one curve, which
    starts at the original model: no loss, all knowledge, K* = 1. It is read between its points in
    a straight line, in each resample anew; a curve that ends before `budget` at its last point.

    `forget` and `utility` name metrics (organism_hazard/acc); default: those that the attacks
    asked, or without attacks what `choose_metrics` takes of what all runs were evaluated on. A run
    that was attacked with other questions is read from its evaluation, without K*.
    SrmuError for runs that cannot be held against each other.
    """
    if not 0 <= budget <= 1:
        raise SrmuError(f"utility loss {budget:g}: it is a share, from 0 to 1")
    if not runs:
        raise SrmuError("name the folders of one run or more")
    opened = [Run.open(folder) for folder in runs]
    draws = Draws(seed)
    attacks = {run.folder: read_attacks(run.folder) for run in opened}
    attacks = {folder: one for folder, one in attacks.items() if asks_for(one, forget, utility)}
    for report in attacks.values():  # what was attacked says what to look up elsewhere
        of_attacks = metrics_of(report)
        forget, utility = forget or of_attacks[0], utility or of_attacks[1]
    metrics = [read_metrics(run.folder) for run in opened]
    if not attacks and all(one["after"] for one in metrics):
        shared = [name for name in metrics[0]["after"] if all(name in both[w] for both in metrics for w in both)]
        forget, utility = choose_metrics(shared, forget, utility, opened[0].config.eval)
    check_attacks(opened, attacks)
    measured = [
        from_attacks(run, attacks[run.folder], draws)
        if run.folder in attacks
        else from_metrics(run, tuple(forget), tuple(utility), draws)
        for run in opened
    ]
    first = measured[0]
    for other in measured[1:]:
        if other.tasks != first.tasks:
            both = (", ".join(chain(*one.tasks)) for one in (first, other))
            raise SrmuError(
                f"{first.run.folder} and {other.run.folder} were measured on different tasks: " + " and ".join(both)
            )
    methods = by_method(measured)
    readings = [read_curves(points, budget) for _, points in methods]
    return [
        make_row(name, points, reading, readings[0], budget, draws)
        for (name, points), reading in zip(methods, readings, strict=True)
    ]


def make_row(
    name: str,
    points: Sequence[dict[Where, RunNumbers]],
    reading: MethodReading,
    base: MethodReading,
    budget: float,
    draws: Draws,
) -> ComparisonRow:
    """A method's line of the table; `base` is the first method's reading."""
    forget = estimate_difference(reading.forget, base.forget, reading, base, draws)
    left = estimate_difference(reading.residual, base.residual, reading, base, draws)
    telling = left or forget
    known, asked = reading.n
    return ComparisonRow(
        method=name,
        points=len(points),
        seeds=len(reading.where),
        # drawn first: a sequence of draws of seeds is part of the numbers
        residual=None if reading.residual is None else draws.estimate(reading.residual, known),
        utility_loss=draws.estimate(reading.loss, asked, clip=(0, inf)),
        forget_accuracy=draws.estimate(reading.forget, known, clip=(0, 1)),
        forget_difference=forget,
        residual_difference=left,
        verdict=noise_verdict(telling) if telling else "",
        note=note_row(reading, points, budget),
    )


def metrics_of(attacks: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What attacks asked, as the names of metrics: on what is forgotten, and on utility."""
    return (
        tuple(f"{task}/acc" for task in attacks["tasks"]["test"]),
        tuple(f"{task}/acc" for task in attacks["tasks"]["utility"]),
    )


def choose_metrics(
    known: Sequence[str], forget: Sequence[str], utility: Sequence[str], tasks: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The metrics of what should be forgotten and of what should stay, where names tell them apart.

    The accuracies of tasks on what is to go are forgotten; of the others those on `tasks`, which
    the runs were to be evaluated on, stay. SrmuError where names leave it open.
    """
    whole = [name for name in known if re.search(r"(?<!_val)(?<!_held)/acc$", name)]
    forget = forget or [name for name in whole if name.startswith(HAZARDS)]
    rest = [name for name in whole if name not in forget]
    utility = utility or [name for name in rest if name.removesuffix("/acc") in tasks] or rest
    if not (forget and utility):
        raise SrmuError(
            "--metrics, --utility-metrics: name the metrics that should fall and those that should stay, a,b; "
            f"there are {', '.join(known) or 'none that all runs have'}"
        )
    return list(forget), list(utility)


def asks_for(report: Mapping[str, Any], forget: Sequence[str], utility: Sequence[str]) -> bool:
    """Whether a run was attacked, with questions that give the metrics asked for, if any are."""
    if not report:
        return False
    named = zip((tuple(forget), tuple(utility)), metrics_of(report), strict=True)
    return all(not names or names == asked for names, asked in named)


def check_attacks(runs: Sequence[Run], attacks: Mapping[Path, dict[str, Any]]) -> None:
    """SrmuError where K* of two runs does not mean the same."""
    attacked = [(run, attacks[run.folder]) for run in runs if run.folder in attacks]
    for run, entry in attacked[1:]:
        first, known = attacked[0]
        for key in ("tier", "chance"):
            if entry[key] != known[key]:
                raise SrmuError(
                    f"{first.folder} and {run.folder} were attacked with {key} {known[key]} and "
                    f"{entry[key]}; attack all alike"
                )
        for other, same in attacked:
            alike = all(entry[key] == same[key] for key in ("seed", "facts"))
            if other.config.model == run.config.model and not alike:
                raise SrmuError(
                    f"{other.folder} and {run.folder} were attacked with other questions; "
                    "attack all with the same --seed and --limit"
                )


def from_attacks(run: Run, attacks: Mapping[str, Any], draws: Draws) -> RunNumbers:
    """A run's numbers from its answers question by question."""
    model = run.config.model
    plain = attacks["attacks"][PLAIN]
    if not attacks["utility"]:
        raise SrmuError(f"{run.folder} was attacked without --utility tasks: attack it with them")

    def means(table: Array, asked: str, facts: Sequence[Hashable]) -> Array:
        return draws.means(table, [(model, asked, fact) for fact in facts])

    table = np.column_stack([residual_table(attacks), parse_answers(plain["right"])])
    right = means(table, "forget", attacks["facts"])
    drops = []
    for task, kept in attacks["utility"].items():
        both = np.stack([parse_answers(kept["before"]), parse_answers(kept["after"])], axis=1)
        before, after = means(both, task, kept["facts"]).T
        drops.append(before - after)
    return RunNumbers(
        run,
        (model, run.config.seed),
        metrics_of(attacks),
        right[:, 0],
        right[:, -1],
        np.mean(drops, axis=0),
        worst_case(right[:, :-1], attacks["chance"]),
        (len(table), sum(len(kept["facts"]) for kept in attacks["utility"].values())),
    )


def from_metrics(run: Run, forget: tuple[str, ...], utility: tuple[str, ...], draws: Draws) -> RunNumbers:
    """A run's numbers from what was evaluated alone."""
    model, metrics = run.config.model, read_metrics(run.folder)
    after, before = metrics["after"], metrics["before"]
    if not after or not before:
        raise SrmuError(f"{run.folder} has no results; run `srmu eval {run.folder}` first")
    for name in (*forget, *utility):
        if name not in after or name not in before:
            raise SrmuError(
                f"{run.folder} has no result {name}{suggest_word(name, after)}; another task is "
                f"measured by `srmu eval {run.folder} --tasks TASK`"
            )
        if not after[name].get("n"):
            raise SrmuError(f"{name} is no accuracy over a number of questions; name another")

    def drawn(results: Metrics, names: Sequence[str], which: Hashable) -> Array:
        values = [resample_row(results[n], draws, (model, n), (model, n, which)) for n in names]
        return np.mean(values, axis=0)

    this = run_setting(run.config)
    return RunNumbers(
        run,
        (model, run.config.seed),
        (forget, utility),
        drawn(before, forget, "before"),
        drawn(after, forget, this),
        drawn(before, utility, "before") - drawn(after, utility, this),
        None,
        (sum(int(after[n]["n"]) for n in forget), sum(int(after[n]["n"]) for n in utility)),
    )


def resample_row(row: Row, draws: Draws, exam: Hashable, key: Hashable) -> Array:
    """An accuracy as it is, and in each resample of its questions: (1 + RESAMPLES,).

    From the answers question by question where they are known: the same `exam` draws the same
    questions, so that differences are paired. Else it is taken as normal about its value, the same
    for the same `key`; the rows of a difference then err independently, so that it comes out too
    wide.
    """
    facts = row.get("facts") or range(len(row.get("answers", ())))
    if len({*facts}) >= LEAST:
        return draws.means(parse_answers(row["answers"]), [(exam, fact) for fact in facts])[:, 0]
    value, n = row["value"], row["n"]
    # two more right and two more wrong answers (Agresti and Coull): at 0 and 1 there is doubt too
    p = (value * n + 2) / (n + 4)
    rng = np.random.default_rng(crc32(repr(key).encode()))
    moved = value + rng.standard_normal(RESAMPLES) * (p * (1 - p) / (n + 4)) ** 0.5
    return np.concatenate([[value], moved.clip(0, 1)])


def by_method(measured: Sequence[RunNumbers]) -> list[tuple[str, list[dict[Where, RunNumbers]]]]:
    """Each method with its points, each point's runs by where they were made."""
    methods: dict[Hashable, dict[Hashable, dict[Where, RunNumbers]]] = {}
    kinds: dict[Hashable, dict[str, Any]] = {}
    for one in measured:
        kind = setting_words(one.run.config)
        kinds[tuple(kind.items())] = kind
        points = methods.setdefault(tuple(kind.items()), {})
        point = points.setdefault(run_setting(one.run.config), {})
        if one.where in point:
            raise SrmuError(f"{point[one.where].run.folder} and {one.run.folder} are the same run")
        point[one.where] = one
    return [(method_label(kinds[key], kinds.values()), [*points.values()]) for key, points in methods.items()]


def read_curves(points: Sequence[dict[Where, RunNumbers]], budget: float) -> MethodReading:
    """A method's numbers at a utility loss, along the curve of each of its seeds."""
    places = tuple(dict.fromkeys(place for point in points for place in point))
    curves = [[point[place] for point in points if place in point] for place in places]
    readings = [read_along(curve, budget) for curve in curves]
    loss, forget, left = (np.stack(values, axis=1) for values in zip(*readings, strict=True))
    runs = [one for curve in curves for one in curve]
    return MethodReading(
        places,
        loss,
        forget,
        left if all(one.residual is not None for one in runs) else None,
        all(max(one.loss[0] for one in curve) >= budget for curve in curves),
        any(min(one.loss[0] for one in curve) > budget for curve in curves),
        min(one.n for one in runs),
    )


def read_along(curve: Sequence[RunNumbers], budget: float) -> tuple[Array, Array, Array]:
    """Utility loss, forget accuracy and K* where a curve loses `budget`, or at its end."""
    none = np.zeros_like(curve[0].loss)
    # a gain of utility is no loss: else a method that costs nothing would come before no method
    losses = [none, *(one.loss.clip(min=0) for one in curve)]
    forgets = [curve[0].before, *(one.forget for one in curve)]
    lefts = [none + 1, *(none + np.nan if one.residual is None else one.residual for one in curve)]
    loss, forget, left = (np.stack(values, axis=1) for values in (losses, forgets, lefts))
    # by loss; of points that cost the same the one that forgets most comes last
    order = np.lexsort((-forget, loss), axis=-1)
    last = (loss <= budget).sum(axis=1, keepdims=True) - 1
    low, high = (np.take_along_axis(order, at, axis=1) for at in (last, np.minimum(last + 1, len(curve))))
    start, stop = (np.take_along_axis(loss, at, axis=1) for at in (low, high))
    share = (budget - start) / np.where(stop > start, stop - start, np.inf)

    def between(values: Array) -> Array:
        one, other = (np.take_along_axis(values, at, axis=1) for at in (low, high))
        return (one + share * (other - one))[:, 0]

    return between(loss), between(forget), between(left)


def estimate_difference(
    mine: Array | None, theirs: Array | None, one: MethodReading, base: MethodReading, draws: Draws
) -> Estimate | None:
    """How a number differs from the first method's, in pairs of seeds where both have them."""
    if mine is None or theirs is None or one is base:
        return None
    if both := [place for place in one.where if place in base.where]:
        own, other = ([read.where.index(place) for place in both] for read in (one, base))
        change = draws.over_seeds(mine[:, own] - theirs[:, other])
    else:
        change = draws.over_seeds(mine) - draws.over_seeds(theirs)
    return estimate_from(change, min(one.n[0], base.n[0]))


def noise_verdict(change: Estimate) -> str:
    """Whether a difference from another method's knowledge that is left is more than noise."""
    if change.low <= 0 <= change.high:
        return "noise"
    return "better" if change.high < 0 else "worse"


def note_row(reading: MethodReading, points: Sequence[dict[Where, RunNumbers]], budget: float) -> str:
    """What to know about a row."""
    notes = []
    if not reading.reached:
        notes.append(f"its strongest setting, where that loses less than {budget:.1%}")
    if reading.rough:
        notes.append("read between the original model and its weakest setting: add weaker ones")
    if any(set(point) != set(reading.where) for point in points):
        notes.append("not every seed has every setting")
    attacked = [one.residual is not None for point in points for one in point.values()]
    if any(attacked) and not all(attacked):
        notes.append("no K*: not all of its runs were attacked")
    return "; ".join(notes)
