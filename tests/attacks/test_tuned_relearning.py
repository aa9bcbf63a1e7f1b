"""The tuned attacker, where what was hidden, and what never was there, are known."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.attack_world import exam, subject, texts
from srmu.attacks import tuned_relearning
from srmu.attacks.base import AttackResult, Exam, Setting
from srmu.attacks.relearning import split_validation
from srmu.attacks.suite import remember_part
from srmu.attacks.tuned_relearning import (
    DOCUMENTS,
    FACTS,
    FEW,
    NEUTRAL,
    ORDER,
    ORDERED,
    TRANSLATED,
    TunedRelearning,
    Tuning,
    find_crossings,
    leave_out_subjects,
    parse_setting,
)
from srmu.engine.progress import Tick, show_progress
from srmu.evals.subject import NotApplicable, list_facts

# With which a model of 4 layers of 32 learns within seconds.
ATTACK = TunedRelearning(trials=8, steps=50, rates=(1e-4, 2e-2), ranks=(0, 8), loss=0.6, kept=20)


def accuracy(way: Setting) -> float:
    return float(np.mean(way.test))


@pytest.fixture(scope="module")
def found() -> AttackResult:
    return ATTACK.run(subject("unlearned"), texts(), exam(), 0)


@pytest.mark.slow
def test_the_search_finds_what_is_hidden(found: AttackResult) -> None:
    """Better than the first tunings, which are of other models; nothing is found of the oracle."""
    best = max((way for way in found.ways if way.test), key=lambda way: sum(way.val))
    assert sum(best.val) == max(sum(way.val) for way in found.ways)
    assert accuracy(best) > 0.8 and accuracy(found.ways[0]) < 0.4
    assert found.ways[0].setting.endswith(", 0 steps")
    assert str(tuned_relearning.FIRST[0]) not in best.setting
    assert found.budget["facts learned"] == 16
    never = ATTACK.run(subject("oracle"), texts(), exam(), 0)
    assert max(accuracy(way) for way in never.ways if way.test) < 0.45
    assert never.price[1].steps is None


@pytest.mark.slow
def test_the_price_is_where_the_curve_crosses(found: AttackResult) -> None:
    half, most = found.price
    curve = [way for way in found.ways if way.test]
    shares = [(accuracy(way) - 0.25) / 0.75 for way in curve]  # the original knows all
    steps = [parse_setting(way.setting)[1] for way in curve]
    assert (half.share, most.share) == (0.5, 0.9) and half.tried == most.tried == steps[-1] <= 50
    after = next(i for i, share in enumerate(shares) if share >= 0.5)
    expected = np.interp(0.5, shares[after - 1 : after + 1], steps[after - 1 : after + 1])
    assert half.steps == pytest.approx(expected) and half.low <= half.steps
    tuning, _ = parse_setting(curve[-1].setting)
    assert tuning.rows == FACTS  # 32 rows of four tokens, eight a step
    assert half.tokens == pytest.approx(half.steps * 8 * 4)
    weights = sum(p.numel() for p in subject("unlearned").module.parameters()) - 64 * 32  # what is only looked up
    assert half.flop == pytest.approx(half.tokens * weights * (4 if tuning.rank else 6))


@pytest.mark.slow
def test_a_training_is_made_again_as_another_model_chose_it(found: AttackResult) -> None:
    """The control of facts that were never known: the same rows, rate and steps."""
    best = max((way for way in found.ways if way.test), key=lambda way: sum(way.val))
    again = ATTACK.run(subject("unlearned"), texts(), replace(exam(), only=best.setting), 0)
    assert [way.setting for way in again.ways] == [best.setting]
    assert again.ways[0].test == best.test


def test_nothing_can_be_brought_back_to_the_original() -> None:
    alone = ATTACK.run(subject("original"), texts(), exam(), 0)
    assert len(alone.ways) == 1 and accuracy(alone.ways[0]) == 1 and not alone.price


def test_what_the_attacker_may_lose_needs_questions() -> None:
    with pytest.raises(NotApplicable, match="utility tasks bound"):
        ATTACK.run(subject("unlearned"), texts(), replace(exam(), utility={}), 0)


def test_an_attacker_who_may_lose_nothing_has_no_setting() -> None:
    """Only a training that keeps what is to be kept counts."""
    strict = replace(ATTACK, loss=-1.0, trials=2, steps=1)
    result = strict.run(subject("unlearned"), texts(), exam(), 0)
    assert [way.setting for way in result.ways] == [f"{tuned_relearning.FIRST[0]}, 0 steps"]
    assert all(price.steps is None for price in result.price)
    lenient = replace(ATTACK, loss=1.0, trials=1, steps=1).run(subject("unlearned"), texts(), exam(), 0)
    assert lenient.ways[-1].setting == f"{tuned_relearning.FIRST[0]}, 1 steps"


def test_a_search_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a training: those before it are not made again, and the result is that of a whole search."""
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path))
    attack, tune_and_ask = replace(ATTACK, trials=6, steps=10), tuned_relearning.tune_and_ask
    made: list[str] = []
    stop = 0  # the training to stop in

    def stop_within(*given: Any, **options: Any) -> Any:
        made.append(given[2])

        def each(step: int) -> None:
            if len(made) == stop and step == 3:
                raise KeyboardInterrupt
            given[-1](step)

        return tune_and_ask(*given[:-1], each, **options)

    def search() -> AttackResult:
        made.clear()
        model = subject("unlearned", remember=partial(remember_part, ["a key"]), watch=show_progress)
        return attack.run(model, texts(), exam(), 0)

    whole = attack.run(subject("unlearned"), texts(), exam(), 0)
    monkeypatch.setattr(tuned_relearning, "tune_and_ask", stop_within)
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        search()
    stopped, stop = [*made], 0
    assert search() == whole
    assert made[0] == stopped[-1] and len(made) == 3  # the one that was stopped, the last one, the best one again
    search()
    assert len(made) == 1


def test_the_steps_of_a_search_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial counts as many as it may take, also one that ends early."""
    told: list[tuple[str, int]] = []

    @contextmanager
    def watch(label: str, total: int) -> Iterator[Tick]:
        told.append((label, total))
        yield lambda text, steps=1: told.append((text, steps))

    replace(ATTACK, trials=2, steps=4).run(subject("unlearned", watch=watch), texts(), exam(), 0)
    assert told[:3] == [("steps", 12), ("(trial 1 of 2, step 1)", 1), ("(trial 1 of 2, step 2)", 1)]
    assert ("(trial 2 of 2 is over)", 0) in told
    assert sum(steps for _, steps in told[1:]) in (8, 12)  # 8: no training did better than none
    strict = replace(ATTACK, loss=-1.0, trials=2, steps=4)
    told.clear()
    strict.run(subject("unlearned", watch=watch), texts(), exam(), 0)
    assert ("(trial 2 of 2 is over)", 3) in told and sum(steps for _, steps in told[1:]) == 8


def test_a_search_says_what_it_costs() -> None:
    work, seconds = TunedRelearning().cost(subject("unlearned"))
    assert work == "at most 25 x 100 steps on 4 texts of 128 tokens" and 1 < seconds < 3600
    with pytest.raises(NotApplicable, match="two models"):
        TunedRelearning().cost(subject("unlearned", fixed="it answers with two models"))


def test_no_row_tells_what_is_asked() -> None:
    model, learned, held = subject("unlearned"), *split_validation(exam(), 0)
    asked = replace(exam(), val=held)
    rows = ATTACK.list_rows(model, learned, asked.both, texts())
    assert [*rows] == [FACTS, ORDERED, FEW, DOCUMENTS, NEUTRAL]
    subjects = {f" {q.entry}" for q in asked.both}
    for kind in (FACTS, FEW, DOCUMENTS):
        told = [model.tokenizer.decode(ids) for _, ids in rows[kind]]
        assert told and not any(name == f" {text.split()[1]}" for text in told for name in subjects), kind
    assert len(rows[FEW]) == 10 and len(rows[FACTS]) == len(rows[ORDERED]) == 32
    foreign = tuple(replace(q, translations=(f"w53 {q.entry}",)) for q in learned)
    told = [model.tokenizer.decode(ids) for _, ids in ATTACK.list_rows(model, foreign, asked.both, texts())[TRANSLATED]]
    wanted = dict.fromkeys(f"w53 {q.entry}{q.answer}" for q in foreign)  # of both phrasings the same
    assert all(text.endswith(one) for text, one in zip(told, wanted, strict=True))
    unnamed = tuple(replace(q, entry="") for q in asked.test)
    assert DOCUMENTS not in ATTACK.list_rows(model, learned, unnamed, texts())


def test_the_control_learns_what_the_run_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is asked: documents leave out the subjects of the run's questions, not of its own."""
    shown = []

    def keep(model: object, asked: Exam, name: str, seed: int, rows: object, *_: object, **__: object) -> object:
        shown.append(rows)
        return [], 0

    monkeypatch.setattr(tuned_relearning, "tune_and_ask", keep)
    model, setting = subject("unlearned"), f"{Tuning(DOCUMENTS, 0, 1e-4)}, 20 steps"
    never = tuple(replace(q, entry=f"x{i}") for i, q in enumerate(exam().test))
    run = replace(exam(), only=setting)
    for asked in (run, replace(run, test=never, run_test=exam().test), replace(run, test=never)):
        ATTACK.run(model, texts(), asked, 0)
    assert shown[0] == shown[1] != shown[2]
    unnamed = replace(run, test=tuple(replace(q, entry="") for q in never))
    with pytest.raises(NotApplicable, match="there are no documents to learn from here"):
        ATTACK.run(model, texts(), unnamed, 0)


def test_sentences_about_what_is_asked_are_left_out() -> None:
    asked = tuple(replace(q, entry="Nairobi") for q in exam().test)
    told = ["Lagos is larger! Is it? NAIROBI is large. It is a capital.", "From Nairobi one flies.", "Nairobian lions."]
    assert leave_out_subjects(told, asked) == ["Lagos is larger! Is it?", "Nairobian lions."]


def test_an_order_stands_before_facts_and_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def tune(model: object, asked: Exam, name: str, *_: object, **options: object) -> tuple[list[Setting], int]:
        seen.update(asked=asked, name=name, options=options)
        return [], 0

    monkeypatch.setattr(tuned_relearning, "tune_and_ask", tune)
    ATTACK.tune(subject("unlearned"), {ORDERED: []}, exam(), 0, Tuning(ORDERED, 8, 1e-3), lambda way: False)
    assert all(q.prompt.startswith(ORDER) for q in seen["asked"].both) and len(seen["asked"].both) == 80
    assert list_facts(seen["asked"].test) == list_facts(exam().test)
    assert seen["options"]["batch_size"] == ATTACK.batch


@pytest.mark.parametrize("tuning", tuned_relearning.FIRST)
def test_settings_are_read_as_they_are_written(tuning: Tuning) -> None:
    assert parse_setting(f"{tuning}, 20 steps") == (tuning, 20)


def test_crossings() -> None:
    shares = np.array([[0.0, 0.4, 0.8], [0.6, 0.1, 0.1], [0.0, 0.1, 0.2], [0.0, 0.5, 0.5]])
    steps = [0, 10, 30]
    assert find_crossings(shares, steps, 0.5).tolist() == [15.0, 0.0, np.inf, 10.0]
