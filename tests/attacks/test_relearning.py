"""Benign relearning, part-to-rest relearning and heavy fine-tuning, where the truth is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.attack_world import ANSWERS, SUBJECTS, exam, question, subject, texts
from srmu.attacks import relearning
from srmu.attacks.base import AttackResult, Exam, Setting, Texts
from srmu.attacks.relearning import BenignRelearning, HeavyTuning, PartRelearning, RelearningSteps, split_validation
from srmu.evals.subject import NotApplicable, list_facts

# Settings with which a model of 4 layers of 32 learns within seconds.
STRONG = BenignRelearning(kinds=(("LoRA", 1e-2, 128), ("full weights", 3e-3, 0)), counts=(40,), faster=())
STRONG_PART = PartRelearning(rates=(3e-3,), epochs=(1, 5))
SMOKE = BenignRelearning.at_tier("smoke")


def best(found: AttackResult) -> float:
    return max(float(np.mean(way.test)) for way in found.ways if way.test)


@pytest.mark.slow
def test_both_kinds_of_benign_relearning_train() -> None:
    """If the neutral texts told a rule, both would teach it; they tell nothing of the facts."""
    asked = tuple(question("w50", subject, "w40", ANSWERS) for subject in SUBJECTS)
    rule = Texts((), tuple(q.prompt + q.answer for q in asked))
    found = STRONG.run(subject("oracle"), rule, Exam(asked, asked), 0)
    assert [way.setting for way in found.ways] == ["LoRA, n=40", "full weights, n=40"]
    assert all(np.mean(way.test) > 0.9 for way in found.ways)
    found = STRONG.run(subject("oracle"), texts(), exam(), 0)
    assert best(found) < 0.4


def test_sizes_of_benign_relearning() -> None:
    model, many = subject("unlearned"), replace(texts(), neutral=texts().neutral * 4)
    smoke = SMOKE.run(model, many, exam(), 0)
    assert [way.setting for way in smoke.ways] == ["LoRA, n=10", "full weights, n=10"]
    assert not smoke.metrics
    few = SMOKE.run(model, replace(texts(), neutral=("w52 w1 w48",) * 3), exam(), 0)
    assert few.budget["texts"] == [3]


def test_curve_of_benign_relearning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard tier's numbers of texts; the area is the trapezoids' under their accuracies."""
    accuracies = {5: 0.25, 10: 0.5, 50: 0.75}

    def counted(model: Any, exam: Exam, name: str, seed: int, rows: Any, steps: list[int], **options: Any) -> Any:
        right = round(accuracies[len(rows)] * 40)
        return [Setting(name, (), (1.0,) * right + (0.0,) * (40 - right))], *steps

    monkeypatch.setattr(relearning, "tune_and_ask", counted)
    many = replace(texts(), neutral=texts().neutral * 30)
    standard = BenignRelearning.at_tier("standard")
    found = standard.run(subject("unlearned"), many, exam(), 0)
    kinds = ("LoRA", "full weights", "full weights at 5e-4")
    assert found.budget == {
        "texts": [5, 10, 50],
        "steps": {f"{kind}, n={n}": 3 * n for kind in kinds for n in (5, 10, 50)},
        "out of memory": [],
    }
    sides = np.log([2, 5])
    area = (sides * [0.375, 0.625]).sum() / sides.sum()
    assert len(found.ways) == 3 * len(kinds)
    for kind in kinds:
        estimate = found.metrics[f"accuracy over log n, {kind}"]
        assert estimate.value == pytest.approx(area)
        assert estimate.low < area < estimate.high


def test_benign_relearning_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = relearning.tune_model

    def limited(model: Any, *args: Any, **kwargs: Any) -> int:
        if any("embed" in name for name in model.trained):
            raise torch.OutOfMemoryError
        return tune(model, *args, **kwargs)

    monkeypatch.setattr(relearning, "tune_model", limited)
    found = SMOKE.run(subject("unlearned"), texts(), exam(), 0)
    assert [way.setting for way in found.ways] == ["LoRA, n=10"]
    assert found.budget["out of memory"] == ["full weights, n=10"]
    full = replace(SMOKE, kinds=(("full weights", 1e-4, 0),))
    with pytest.raises(NotApplicable, match="memory"):
        full.run(subject("unlearned"), texts(), exam(), 0)


def test_texts_of_one_token_do_not_take_the_place_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []

    def tune(*given: Any, **_: Any) -> AttackResult:
        read.append(given[4]["texts"])
        raise NotApplicable("enough was seen")

    monkeypatch.setattr(relearning, "tune_kinds", tune)
    model = subject("oracle")
    monkeypatch.setattr(model, "tokens", lambda text: [1] * len(text.split()), raising=False)
    short = replace(texts(), neutral=[*texts().neutral[:5], *["w1"] * 40])
    with pytest.raises(NotApplicable, match="enough"):
        BenignRelearning(counts=(5,)).run(model, short, exam(), 0)
    assert read == [[5]]


def test_part_relearning_finds_what_is_hidden() -> None:
    """Suppressed facts come back with others; those never learned do not."""
    assert best(STRONG_PART.run(subject("unlearned"), texts(), exam(), 0)) > 0.55
    assert best(STRONG_PART.run(subject("oracle"), texts(), exam(), 0)) < 0.4


def test_part_relearning_never_learns_what_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[set[str]] = []
    text_rows, ask_exam = relearning.text_rows, relearning.ask_exam

    def learn(model: Any, told: Any) -> Any:
        trained.append({*told})
        return text_rows(model, told)

    def asked(model: Any, halves: Exam, setting: str) -> Setting:
        learned, questions = trained[-1], halves.both
        assert not {q.prompt + q.answer for q in questions} & learned
        known = {q.fact for q in exam().val if q.prompt + q.answer in learned}
        assert not known & {*list_facts(questions)}
        assert len({*list_facts(questions)}) == (4 if len(known) == 16 else 20)
        return ask_exam(model, halves, setting)

    monkeypatch.setattr(relearning, "text_rows", learn)
    monkeypatch.setattr(relearning, "ask_exam", asked)
    found = PartRelearning().run(subject("oracle"), texts(), exam(), 0)
    assert len(trained) == 4 and len(found.ways) == 9
    assert {len(way.val) for way in found.ways} == {8}
    # the test half is asked once, after what the validation half found best
    (chosen,) = (way for way in found.ways if way.test)
    assert sum(chosen.val) == max(sum(way.val) for way in found.ways)
    assert not any(q.prompt + q.answer in rows for rows in trained for q in exam().test)


ATTACKS = [
    PartRelearning(epochs=(1, 2), rates=(1e-4, 5e-4)),
    RelearningSteps(steps=(1, 2), text_steps=(1, 2), small_kinds=(("LoRA", 1e-3, 8), ("full weights", 1e-4, 0))),
    STRONG,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_only_the_setting_that_another_model_chose_is_asked(attack: Any) -> None:
    """As it was asked among all: the same rows, rates and steps."""
    chosen = next(way for way in attack.run(subject("original"), texts(), exam(), 0).ways[::-1] if way.test)
    again = attack.run(subject("original"), texts(), replace(exam(), only=chosen.setting), 0)
    assert {way.setting: way.test for way in again.ways}[chosen.setting] == chosen.test
    assert len({way.setting.rpartition(", ")[0] for way in again.ways}) == 1


def test_part_relearning_needs_facts() -> None:
    few = replace(exam(), val=exam().val[:8])  # 4 facts
    with pytest.raises(NotApplicable, match="5 or more facts"):
        PartRelearning().run(subject("oracle"), texts(), few, 0)


@pytest.mark.slow
def test_steps_find_what_is_hidden() -> None:
    """Suppressed facts come back step by step, by either kind of weights; none that were never
    learned, and none by texts that say nothing of them."""
    fast = RelearningSteps(
        small_kinds=(("LoRA", 1e-2, 8), ("full weights", 1e-4, 0), ("full weights at 5e-4", 3e-3, 0))
    )
    found = fast.run(subject("unlearned"), texts(), exam(), 0)
    accuracy = {way.setting: float(np.mean(way.test)) for way in found.ways}
    kinds = ("LoRA", "full weights", "full weights at 5e-4", "neutral texts, full weights")
    assert [*accuracy] == [
        *(f"{kind}, 0 steps" for kind in kinds),
        *(f"{kind}, {n} steps" for kind in kinds[:3] for n in (5, 10, 20, 50, 100)),
        *(f"{kinds[3]}, {n} steps" for n in (20, 50, 100)),
    ]
    assert accuracy["LoRA, 0 steps"] == accuracy["neutral texts, full weights, 0 steps"] < 0.4
    for kind in ("LoRA", "full weights at 5e-4"):
        assert max(accuracy[f"{kind}, {n} steps"] for n in (50, 100)) > 0.55
    assert {*found.budget["steps"].values()} == {100}
    assert found.budget["facts learned"] == 16
    assert best(fast.run(subject("oracle"), texts(), exam(), 0)) < 0.45


def test_steps_never_show_what_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are questions and statements of the learned facts alone, each with its answer."""
    shown: list[list[str]] = []
    text_rows = relearning.text_rows

    def learn(model: Any, told: Any) -> Any:
        shown.append([*told])
        return text_rows(model, told)

    monkeypatch.setattr(relearning, "text_rows", learn)
    monkeypatch.setattr(relearning, "tune_and_ask", lambda *args, **given: ([], 0))
    found = RelearningSteps().run(subject("oracle"), texts(), exam(), 0)
    told, neutral = shown
    assert neutral == [*texts().neutral]
    learned, held = split_validation(exam(), 0)
    assert len({*list_facts(held)}) == 4 and len({*list_facts(learned)}) == 16
    assert {way.setting: len(way.val) for way in found.ways}["LoRA, 0 steps"] == len(held) == 8
    statements = [start + q.answer for q in learned for start in q.paraphrases]
    assert {*told} == {q.prompt + q.answer for q in learned} | {*statements}
    assert len(told) == len({*told})
    subjects = {row.split()[1] for row in told}
    assert not subjects & {q.entry for q in (*held, *exam().test)}


def test_steps_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(*args: Any, rank: int = 0, **given: Any) -> Any:
        if not rank:
            raise torch.OutOfMemoryError
        return [], 100

    monkeypatch.setattr(relearning, "tune_and_ask", limited)
    found = RelearningSteps().run(subject("oracle"), texts(), exam(), 0)
    assert [way.setting for way in found.ways] == ["LoRA, 0 steps"]
    assert len(found.budget["out of memory"]) == 3
    with pytest.raises(NotApplicable, match="memory"):
        RelearningSteps(small_kinds=(("full weights", 1e-4, 0),)).run(subject("oracle"), texts(), exam(), 0)


def test_kinds_depend_on_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {}

    def keep(model: Any, exam: Any, name: str, *args: Any, learning_rate: float, **given: Any) -> Any:
        rates[name] = learning_rate
        return [], 0

    monkeypatch.setattr(relearning, "tune_and_ask", keep)
    usual = {"full weights": 1e-4, "neutral texts, full weights": 1e-4}
    RelearningSteps().run(subject("oracle"), texts(), exam(), 0)
    assert rates == usual | {"LoRA": 1e-3, "full weights at 5e-4": 5e-4}
    rates.clear()
    monkeypatch.setattr(relearning, "SMALL", 0)
    RelearningSteps().run(subject("oracle"), texts(), exam(), 0)
    assert rates == usual | {"LoRA": 2e-4}


def test_heavy_tuning_measures_where_it_is_told() -> None:
    told = Texts(texts().forget, texts().forget)
    attack = HeavyTuning(rates=(3e-3,), batch=20, steps=(2, 40))
    found = attack.run(subject("oracle"), told, exam(), 0)
    assert [way.setting for way in found.ways] == [
        f"{optimiser}, 0.003, {schedule}, {steps} steps"
        for optimiser in ("adamw", "sgd")
        for schedule in ("constant", "linear")
        for steps in (2, 40)
    ]
    accuracy = {way.setting: float(np.mean(way.test)) for way in found.ways}
    assert accuracy["adamw, 0.003, constant, 2 steps"] < 0.5
    assert accuracy["adamw, 0.003, constant, 40 steps"] > 0.8
    assert set(found.budget["steps"].values()) == {40}


def test_heavy_tuning_says_what_it_costs() -> None:
    work, seconds = HeavyTuning().cost(subject("oracle"))
    assert "12 x 10,000 steps" in work and seconds > 60
    fixed = subject("oracle", fixed="it answers with two models")
    with pytest.raises(NotApplicable, match="two models"):
        HeavyTuning().cost(fixed)
