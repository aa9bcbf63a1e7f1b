"""Intervals and tests where the truth is known."""

from functools import partial
from math import sqrt
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as exact_mcnemar
from statsmodels.stats.proportion import proportion_confint

from srmu.errors import SrmuError
from srmu.evals import statistics
from srmu.evals.statistics import (
    Draws,
    Estimate,
    accuracy_interval,
    area_under_curve,
    auc_bootstrap,
    average_seeds,
    bootstrap_estimate,
    draw_floors,
    estimate_accuracy,
    estimate_from,
    mcnemar_p,
    parse_answers,
    residual_table,
    worst_case,
)


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)


def estimate_seeds(tables, facts, seed: int = 0) -> Estimate:
    """An accuracy over seeds that each have answers to their own questions."""
    draws = Draws(seed)
    return draws.estimate(np.stack([draws.means(*pair)[:, 0] for pair in zip(tables, facts, strict=True)], axis=1))


def covered(tables, facts, truth: float) -> float:
    """How often the interval of these data sets holds the truth."""
    hits = 0
    for i, (table, names) in enumerate(zip(tables, facts, strict=True)):
        found = estimate_seeds(table, names, seed=i)
        hits += found.low <= truth <= found.high
    return hits / len(tables)


@pytest.mark.slow
def test_interval_covers_clustered_facts(fewer: None) -> None:
    """50 facts in four phrasings, right or wrong together; questions alone would claim too much."""
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(50), 4)
    data = [[np.repeat(rng.random(50) < 0.6, 4)] for _ in range(250)]
    by_fact = covered(data, [[names]] * 250, 0.6)
    by_question = covered(data, [[range(200)]] * 250, 0.6)
    assert 0.90 <= by_fact <= 0.99
    assert by_question < 0.80


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.06])
def test_interval_covers_seeds(fewer: None, shared: bool, spread: float) -> None:
    """Three seeds that differ, on the same questions or each on its own; never too narrow."""
    rng = np.random.default_rng(1)
    data, facts = [], []
    for _ in range(250):
        hard = rng.normal(0, 0.2, (1 if shared else 3, 60))
        known = rng.random((3, 60)) < 0.6 + rng.normal(0, spread, (3, 1)) + hard
        data.append(list(known))
        facts.append([[f"{s * (not shared)} {i}" for i in range(60)] for s in range(3)])
    assert 0.92 <= covered(data, facts, 0.6) <= 1


def test_draw_of_seeds_is_widened() -> None:
    """Where all that varies is the seed, the mean varies as sd(seeds, ddof=1) / sqrt(seeds)."""
    values = [0.2, 0.5, 0.65]
    draws = Draws(0)
    found = draws.over_seeds(np.tile(values, (1 + statistics.RESAMPLES, 1)))
    assert found[0] == pytest.approx(0.45)
    assert found[1:].std() == pytest.approx(np.std(values, ddof=1) / 3**0.5, rel=0.05)


def test_paired_differences_are_narrower() -> None:
    rng = np.random.default_rng(2)
    before = rng.random(200) < 0.7
    after = np.where(rng.random(200) < 0.1, ~before, before)
    names = list(range(200))
    pair = bootstrap_estimate(np.stack([before, after], 1), names, lambda m: m[..., 0] - m[..., 1])
    one, two = (estimate_accuracy(x, names) for x in (before, after))
    assert pair.value == pytest.approx(one.value - two.value)
    apart = np.hypot(one.high - one.low, two.high - two.low)
    assert pair.high - pair.low < 0.7 * apart


def test_interval_is_the_normal_one_of_many_facts() -> None:
    right = np.arange(1000) < 300
    found = estimate_accuracy(right, list(range(1000)))
    assert (found.value, found.n) == (0.3, 1000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.21 / 1000) ** 0.5, rel=0.08)
    assert estimate_accuracy(right, list(range(1000)), seed=1) != found
    assert estimate_accuracy(right, list(range(1000))) == found


def test_what_asks_for_the_same_facts_shares_draws() -> None:
    """Two seeds on the same questions are no more questions; on others they are."""
    rng = np.random.default_rng(3)
    right = rng.random(100) < 0.5
    assert estimate_seeds([right, right], [range(100)] * 2) == estimate_seeds([right], [range(100)])
    draws = Draws(0)
    one, same, other = (draws.means(right, names)[1:] for names in (
        range(100), range(100), range(100, 200)
    ))  # fmt: skip
    assert (one == same).all()
    assert abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 0.1
    phrasings = draws.means(np.repeat(right, 2), np.repeat(np.arange(100), 2).tolist())
    np.testing.assert_allclose(phrasings, draws.means(right, range(100)))


def test_means_are_those_of_drawn_questions() -> None:
    """Facts of unequal numbers of questions: what is drawn is the questions of whole facts."""
    rng = np.random.default_rng(4)
    names = rng.integers(25, size=80).tolist() + list(range(25))
    table = rng.random((105, 3))
    draws = Draws(5)
    found = draws.means(table, names)
    assert found.shape == (1 + statistics.RESAMPLES, 3)
    np.testing.assert_allclose(found[0], table.mean(axis=0))
    order = list(dict.fromkeys(names))
    times = draws.drawn[tuple(order)]
    assert (times[1:].sum(axis=1) == 25).all()
    for row in (1, 77):
        picked = [
            question for i, name in enumerate(names) for question in [table[i]] * int(times[row][order.index(name)])
        ]
        np.testing.assert_allclose(found[row], np.mean(picked, axis=0))


@pytest.mark.parametrize("right", [0, 1])
def test_accuracy_at_the_ends_is_wilsons(right: int) -> None:
    """A question a fact, however many phrasings."""
    found = estimate_accuracy([right] * 60, [i // 2 for i in range(60)])
    low, high = proportion_confint(30 * right, 30, method="wilson")
    assert found.value == right
    assert (found.low, found.high) == pytest.approx((low, high))
    assert 0 <= found.low < found.high <= 1


def test_too_few_facts() -> None:
    with pytest.raises(SrmuError, match=r"^19 facts are too few for an interval.*20.*$"):
        bootstrap_estimate([1.0] * 38, [i // 2 for i in range(38)])
    with pytest.raises(SrmuError, match=r"^19 texts are too few.*$"):
        auc_bootstrap(range(19), range(30))
    bootstrap_estimate([1.0] * 20, range(20))


def test_mcnemar_is_exact() -> None:
    rng = np.random.default_rng(6)
    before, after = rng.random(80) < 0.8, rng.random(80) < 0.6
    table = [[(before & after).sum(), (before & ~after).sum()],
             [(~before & after).sum(), (~before & ~after).sum()]]  # fmt: skip
    assert mcnemar_p(before, after) == pytest.approx(exact_mcnemar(table, exact=True).pvalue)
    assert mcnemar_p([1] * 6, [0] * 6) == pytest.approx(2 / 2**6)
    assert mcnemar_p(before, before) == 1


def test_auc_is_that_of_a_double_loop() -> None:
    rng = np.random.default_rng(7)
    ones, others = rng.integers(6, size=31), rng.integers(5, size=23)
    wins = [(a > b) + 0.5 * (a == b) for a in ones for b in others]
    assert area_under_curve(ones, others) == pytest.approx(np.mean(wins))
    found = auc_bootstrap(ones, others)
    assert found.value == pytest.approx(np.mean(wins))
    assert found.low < found.value < found.high and found.n == 54
    assert area_under_curve(ones, ones) == auc_bootstrap(ones, ones).value == 0.5
    same = auc_bootstrap(np.stack([ones, ones], 1), np.stack([others, others], 1),
                         lambda a: a[..., 0] - a[..., 1])  # fmt: skip
    assert same == Estimate(0, 0, 0, 54)


def test_auc_interval_covers(fewer: None) -> None:
    """Scores of normals one apart: the AUC is Phi(1 / sqrt 2)."""
    rng, truth, hits = np.random.default_rng(8), 0.7602, 0
    for i in range(250):
        found = auc_bootstrap(rng.normal(1, 1, 60), rng.normal(0, 1, 50), seed=i)
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / 250 <= 0.99


def test_worst_case() -> None:
    """By hand; the best attack is picked in each row anew."""
    means = np.array([[0.85, 0.25, 0.55, 0.4], [0.65, 0.25, 0.35, 0.45], [0.25, 0.2, 0.2, 0.2]])
    found = worst_case(means, 0.25)
    assert found[:2] == pytest.approx([0.5, 0.5])
    assert np.isfinite(found).all()


def test_residual_leaves_out_what_says_nothing() -> None:
    attacks = {
        "original": {"right": "1111"},
        "attacks": {
            "forced_choice": {"status": "done", "right": "0001", "valid": None},
            "logit_lens": {"status": "done", "right": [1, 0.5, 0, 1], "valid": True},
            "soft_prompt": {"status": "done", "right": "1111", "valid": False},
            "membership": {"status": "done", "metrics": {}},
            "paraphrases": {"status": "does not apply", "why": "there are none"},
        },
    }
    columns = residual_table(attacks)
    assert columns.T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [1, 0.5, 0, 1]]
    assert worst_case(columns.mean(axis=0), 0.25) == pytest.approx((0.625 - 0.25) / 0.75)
    found = bootstrap_estimate(np.tile(columns, (10, 1)), range(40), partial(worst_case, chance=0.25))
    assert found.value == pytest.approx(0.5) and found.low < 0.5 < found.high
    assert parse_answers("01").tolist() == parse_answers([0, 1]).tolist() == [0, 1]


# --- K* above what was never known


def attacked(right: str | list[float], never: str, valid: bool | None = None) -> dict[str, Any]:
    """An attack, with its answers about facts that were never known."""
    return {"status": "done", "right": right, "valid": valid, "controls": {"unknown": {"right": never}}}


def floored(unknown: list[int], **attacks: Any) -> dict[str, Any]:
    """A report on 40 facts that the original knows, and on some that it never knew."""
    return {
        "chance": 0.25, "facts": [*range(40)], "unknown": unknown,
        "original": {"right": "1" * 40}, "attacks": attacks,
    }  # fmt: skip


def measure_worst(report: dict[str, Any]) -> Estimate:
    draws = Draws()
    means = draws.means(residual_table(report), report["facts"])
    return estimate_from(worst_case(means, report["chance"], draw_floors(report, draws)), 40)


def test_each_attack_is_scored_above_its_floor() -> None:
    """By hand: 0.9 above 0.8 is less than 0.7 above chance; under 0.9 it is the best again."""
    means = np.array([[1, 0.7, 0.9], [1, 0.4, 0.9], [1, 0.4, 0.5]])
    floors = np.array([[0.25, 0.8], [0.25, 0.8], [0.25, 0.6]])
    assert worst_case(means, 0.25, floors) == pytest.approx([0.6, 0.5, 0.2])
    # an original that knows 60 % and guesses the rest: all of it is found, however the attack guesses
    guessed = np.array([0.25, 0.5, 0.9])
    whole = np.stack([np.full(3, 0.7), 0.6 + 0.4 * guessed], axis=1)
    assert worst_case(whole, 0.25, guessed[:, None]) == pytest.approx([1, 1, 1])
    # nothing divides by zero where an attack teaches all
    assert np.isfinite(worst_case(np.ones(2), 0.25, np.ones(1)))


def test_a_floor_at_chance_changes_no_bit() -> None:
    rng = np.random.default_rng(0)
    for chance in (0.25, 0.2, 1 / 3, 0.1):
        means = rng.random((500, 4))
        plain = (means[:, 1:].max(axis=1) - chance) / np.maximum(means[:, 0] - chance, 0.01)
        assert worst_case(means, chance).tolist() == plain.tolist()
        assert worst_case(means, chance, np.full((500, 3), chance)).tolist() == plain.tolist()


def test_the_interval_draws_the_floor_too() -> None:
    """The attack is right on 0.7 in every resample, so that only the floor varies: binomial, half of 40."""
    report = floored([*range(40)], one=attacked([0.7] * 40, "01" * 20))
    found = measure_worst(report)
    assert found.value == pytest.approx(0.4)  # 0.2 above 0.5
    assert found.low == pytest.approx((0.7 - 0.65) / 0.35, abs=0.04)  # 26 of 40, its 97.5 % quantile
    assert found.high == pytest.approx((0.7 - 0.35) / 0.65, abs=0.04)
    # phrasings of one fact are drawn together: 20 facts vary more than 40
    pairs = floored([i // 2 for i in range(40)], one=attacked([0.7] * 40, "0011" * 10))
    assert measure_worst(pairs).high - measure_worst(pairs).low > 1.2 * (found.high - found.low)
    constant = measure_worst(floored([*range(40)], one=attacked([0.7] * 40, "0" * 40)))
    assert constant.low == pytest.approx(constant.high) == pytest.approx(0.6)  # chance, in every resample


def test_known_and_unknown_facts_are_drawn_apart() -> None:
    """Both are numbered from 0: drawn alike, an attack that does the same to both would have no interval."""
    found = measure_worst(floored([*range(40)], one=attacked("01" * 20, "01" * 20)))
    assert found.value == 0 and found.low < -0.2 and found.high > 0.2


def test_floors_go_with_the_attacks_that_count() -> None:
    """No answers: guessing; under chance: guessing; an invalid attack has no column."""
    attacks = {
        "plain": attacked("1" * 40, "0" * 20),
        "none": {"status": "done", "right": "1" * 40, "controls": {"unknown": {"why": "no"}}},
        "left_out": attacked("1" * 40, "1" * 20, valid=False),
        "taught": attacked("1" * 40, "1" * 15 + "0" * 5),
    }
    report = floored([*range(20)], **attacks)
    floors = draw_floors(report, Draws())
    assert floors is not None and floors[0].tolist() == [0.25, 0.25, 0.75]
    assert (floors[:, :2] == 0.25).all() and floors[:, 2].std() > 0.05
    del report["unknown"]
    assert draw_floors(report, Draws()) is None


# --- the interval of an accuracy without its answers


def wilson(p: float, n: int) -> tuple[float, float]:
    z = 1.959964
    centre, half = p + z**2 / (2 * n), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def test_interval_of_one_seed_is_wilsons():
    assert accuracy_interval([0.3], 200) == pytest.approx(wilson(0.3, 200), abs=1e-6)
    assert accuracy_interval([0.3, 0.3, 0.3], 200) == pytest.approx(wilson(0.3, 200), abs=1e-6)


def test_seeds_widen_the_interval():
    low, high = wilson(0.3, 200)
    wide = 1.96 * 0.1 / sqrt(3)
    expected = 0.3 - sqrt((0.3 - low) ** 2 + wide**2), 0.3 + sqrt((high - 0.3) ** 2 + wide**2)
    assert accuracy_interval([0.2, 0.3, 0.4], 200) == pytest.approx(expected, abs=1e-6)


def test_interval_stays_between_nought_and_one():
    assert accuracy_interval([0.0], 10)[0] == 0.0
    assert accuracy_interval([1.0], 10)[1] == 1.0
    assert accuracy_interval([0.0, 1.0], 10) == (0.0, 1.0)


def test_all_right_is_in_doubt_however_it_is_averaged() -> None:
    """A report's mean over seeds and a run's own accuracy have the same interval."""
    one = estimate_accuracy([1] * 96, range(96))
    assert (one.value, one.high, one.n) == (1, pytest.approx(1), 96)
    assert one.low == pytest.approx(wilson(1.0, 96)[0], abs=1e-6)
    draws = Draws()
    columns = [draws.means(np.ones(96), range(96))[:, 0] for _ in range(3)]
    several = draws.estimate_accuracy(np.stack(columns, axis=1), 96, 96)
    assert several == one


def test_metrics_are_averaged_then_seeds() -> None:
    """Seeds that lack a metric are left out; what is no share has no interval."""
    seeds = [
        {"a": {"value": 0.8, "n": 100}, "b": {"value": 0.6, "n": 300}, "ppl": {"value": 9, "n": 1}},
        {"a": {"value": 0.9, "n": 100}},
    ]
    assert average_seeds(seeds, ["c"]) is None
    both = average_seeds(seeds, ["a", "b"])
    assert both is not None and both.value == pytest.approx(0.7)
    assert both.n == 300  # 4 / (1 / 100 + 1 / 300)
    assert (both.low, both.high) == pytest.approx(wilson(0.7, 300), abs=1e-6)
    mean = average_seeds(seeds, ["a"])
    assert mean is not None and mean.value == pytest.approx(0.85)
    assert (mean.low, mean.high) == accuracy_interval([0.8, 0.9], 100)
    other = average_seeds(seeds, ["ppl"])
    assert other is not None and not other.has_interval and str(other) == "9"
