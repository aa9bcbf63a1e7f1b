"""The suite of attacks: controls, the worst case, what is kept, and what cannot be attacked."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import new_class
from typing import Any

import pytest

from helpers import attack_world as world
from helpers import processes
from helpers.models import write_jsonl
from srmu.attacks import ATTACKS, suite
from srmu.attacks.base import Attack, AttackResult, Exam, Setting, ask_exam, choose_setting
from srmu.attacks.suite import Sources, attack_run, load_exam, select_attacks
from srmu.attacks.summary import describe_attacks, measure_recovery
from srmu.engine.progress import Tick
from srmu.errors import SrmuError
from srmu.evals.results import RESULTS, load_results, read_attacks
from srmu.evals.score import score_model
from srmu.evals.subject import NotApplicable, Subject, mark_answers, option_scores
from srmu.report.attacks import attack_table
from srmu.runs.model_card import summarise_record
from srmu.runs.prices import describe_prices, describe_search
from srmu.runs.run import Run, unlearn_config


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return world.write(tmp_path)


@pytest.fixture
def run(place: Path) -> Run:
    return world.unlearned(place)


def sources(place: Path, **given: Any) -> Sources:
    return Sources(
        **{
            "tasks": ("hazard",),
            "neutral": str(place / "neutral.jsonl"),
            "holdout": str(place / "holdout.jsonl"),
            "oracle": str(place / "oracle"),
        }
        | given
    )


def test_a_shortened_search_is_said() -> None:
    """What a small budget did not find is no strength of the model."""
    usual = {"tuned_relearning": {"budget": {"trials": 24, "steps": 100}}}
    few = {"tuned_relearning": {"budget": {"trials": 3, "steps": 10}}}
    assert describe_search({}) == describe_search(usual) == []
    assert describe_search(few) == [
        "tuned_relearning tried 3 trainings of at most 10 steps, where 24 of 100 are usual: it may find more"
    ]
    assert describe_search({"tuned_relearning": {"budget": {"trials": 48, "steps": 10}}})


def test_membership_is_in_the_record_and_on_its_page(run: Run, place: Path) -> None:
    attack_run(run, names=("membership",), sources=sources(place), device="cpu")
    kept = Run.open(run.folder).record["attacks"]["tried"]["membership"]["metrics"]
    page = summarise_record(Run.open(run.folder).record)
    for measure, one in kept.items():
        assert f"| membership | {measure} | {one['value']:.3f} ({one['low']:.3f}-{one['high']:.3f}) |" in page
    assert "Membership: how well a score tells the forget texts" in page


def attack_of(name: str, function: Callable[..., AttackResult], **more: Any) -> type[Attack]:
    """An attack that is one function."""
    body = {"run": lambda self, *args: function(*args)} | more
    return new_class(name, (Attack,), {"id": "E40", "name": name, "tier": "smoke"}, lambda space: space.update(body))


def only(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """The suite with these attacks beside the questions as they are and the utility."""
    kept = {name: ATTACKS[name] for name in ("forced_choice", "utility")}
    kept |= {name: attack_of(name, function) for name, function in functions.items()}
    monkeypatch.setattr(suite, "ATTACKS", kept)


def oracle_says(value: float) -> Callable[..., AttackResult]:
    """An attack after which every model answers a share of the questions, whatever it knows."""

    def all_alike(model: Subject, texts: Any, exam: Exam, seed: int) -> AttackResult:
        def half(asked: Any) -> tuple[float, ...]:
            return tuple(float(i < value * len(asked)) for i in range(len(asked)))

        return AttackResult((Setting("alike", half(exam.val), half(exam.test)),))

    return all_alike


def undone(model: Subject, texts: Any, exam: Exam, seed: int) -> AttackResult:
    """Brings everything back, by cheating; on the original it says nothing."""
    with model.as_original():
        return AttackResult((ask_exam(model, exam, "the original's weights"),))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_is_named_by_its_folder(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    only(monkeypatch)
    report = attack_run(kind(run.folder), names="forced_choice", sources=sources(place, oracle=""))
    assert "forced_choice" in report["attacks"]
    assert read_attacks(run.folder) == report


@pytest.mark.slow
def test_what_is_written(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    report = attack_run(run, sources=sources(place))
    assert read_attacks(run.folder) == report
    told = Run.open(run.folder).record["attacks"]
    assert told["K*"] == report["K*"]
    assert len(told["tried"]["forced_choice"]["definition"]) == 64
    plain = report["attacks"]["forced_choice"]
    assert plain["accuracy"]["value"] == score_model(run, ["hazard"])["after"]["hazard/acc"]["value"]
    assert plain["controls"]["original"]["accuracy"]["value"] == 1
    assert plain["valid"] is True
    assert plain["recovery"]["value"] == 0
    expected = (plain["accuracy"]["value"] - 0.25) / 0.75
    assert report["K*"]["value"] == pytest.approx(expected)
    assert report["K*"]["low"] <= report["K*"]["value"] <= report["K*"]["high"]
    assert report["facts"] == [i // 2 for i in range(40)]
    kept = report["utility"]["harmless"]
    assert kept["before"] == "1" * 40
    assert len(kept["after"]) == 40
    assert report["p that nothing was forgotten"] < 0.05
    assert "KL of neutral text" in report["attacks"]["utility"]["metrics"]
    assert "KL of neutral text" not in report["attacks"]["utility"]["controls"]["original"]
    # no text: neither a question nor an answer
    text = (run.folder / RESULTS).read_text()
    assert not any(q.prompt in text or f'"{q.answer.strip()}"' in text for q in world.exam().test)
    assert any("K* = " in line for line in describe_attacks(report))
    assert {row["attack"] for row in attack_table(report)} == {"E0 forced_choice", "E18 utility"}


@pytest.mark.slow
def test_the_strongest_valid_attack_decides(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers for the oracle, too, does not count; neither does the utility."""
    only(monkeypatch, undone=undone, alike=oracle_says(0.9), harmless=oracle_says(0.2))
    report = attack_run(run, sources=sources(place))
    assert report["attacks"]["alike"]["valid"] is False
    assert report["attacks"]["harmless"]["valid"] is True
    assert report["attacks"]["undone"]["controls"]["original"]["status"] == "does not apply"
    # of the oracle, as of the run, the original's weights are another model's
    assert report["attacks"]["undone"]["valid"] is False
    assert report["K*"]["attack"] == "forced_choice"
    report = attack_run(run, sources=sources(place, oracle=""))
    assert report["attacks"]["undone"]["valid"] is None
    assert report["attacks"]["undone"]["recovery"]["value"] == 1
    assert report["attacks"]["undone"]["chosen"] == "the original's weights"
    assert report["K*"] == {"value": 1, "low": 1, "high": 1, "n": 40, "attack": "undone"}
    assert any("no oracle" in line for line in describe_attacks(report))


@pytest.mark.slow
def test_a_second_call_adds_to_the_first(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K* is over all attacks on the same questions; on others they begin anew."""
    only(monkeypatch, weak=oracle_says(0.4), strong=oracle_says(0.6))
    given = sources(place, oracle="")
    scores = score_model(run, ["hazard"])
    assert attack_run(run, names=["strong"], sources=given)["not_tried"] == ["weak"]
    report = attack_run(run, names=["weak"], sources=given)
    assert [*report["attacks"]] == ["forced_choice", "utility", "weak", "strong"]
    assert report["K*"]["attack"] == "strong" and report["not_tried"] == []
    record = Run.open(run.folder).record
    assert {*record["attacks"]["tried"]} == {*report["attacks"]} and record["results"] == scores
    assert "hazard/acc" not in score_model(run, ["harmless"])["after"]
    assert read_attacks(run.folder) == report
    assert {row["task"] for row in load_results(run.folder)["rows"]} == {"hazard", "harmless", "repetition"}
    report = attack_run(run, names=["weak"], sources=given, seed=1)
    assert [*report["attacks"]] == ["forced_choice", "utility", "weak"]


@pytest.mark.slow
def test_what_was_found_is_kept(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is attacked; other weights, texts or seeds are attacked anew."""
    calls = []

    def counted(model: Subject, texts: Any, exam: Exam, seed: int) -> AttackResult:
        calls.append(model)
        return AttackResult((ask_exam(model, exam, "plain"),))

    only(monkeypatch, counted=counted)
    first = attack_run(run, sources=sources(place))
    assert len(calls) == 3
    again = attack_run(run, sources=sources(place))
    assert len(calls) == 3
    for report in (first, again):
        for entry in report["attacks"].values():
            del entry["seconds"]
    assert again == first
    other = unlearn_config(run.config.model_copy(update={"seed": 1}))
    attack_run(other, sources=sources(place))  # the controls are the same
    assert len(calls) == 4
    attack_run(run, sources=sources(place, holdout=""))
    assert len(calls) == 7
    attack_run(run, sources=sources(place), seed=1)
    assert len(calls) == 10


@pytest.mark.slow
def test_one_that_cannot_run_does_not_stop_the_rest(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> AttackResult:
        raise NotApplicable("there is nothing to attack")

    def fails(*args: Any) -> AttackResult:
        raise SrmuError("too few questions")

    only(monkeypatch, refuses=refuses, fails=fails, last=oracle_says(0.2))
    report = attack_run(run, sources=sources(place))
    states = {name: (entry["status"], entry["why"]) for name, entry in report["attacks"].items()}
    assert states["refuses"] == ("does not apply", "there is nothing to attack")
    assert states["fails"] == ("failed", "too few questions")
    assert states["last"] == ("done", "")
    assert any("does not apply: there is nothing" in row["setting"] for row in attack_table(report))


@pytest.mark.slow
def test_an_error_of_the_cache_is_no_failed_attack(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise SrmuError("there is no home folder here")

    only(monkeypatch)
    monkeypatch.setattr(suite.files, "keep_cached", refuse)
    with pytest.raises(SrmuError, match=r"^there is no home folder here$"):
        attack_run(run, sources=sources(place))
    assert not (run.folder / RESULTS).exists()


def test_an_id_chooses_all_that_have_it() -> None:
    assert [*suite.select_attacks("smoke", ["e12"])] == ["forced_choice", "prompts", "gcg", "utility"]
    assert [*suite.select_attacks("smoke", ["leak"])] == ["forced_choice", "leak", "utility"]


def test_the_test_half_is_asked_under_the_best_setting_alone() -> None:
    asked: list[tuple[str, bool]] = []

    def marker(name: str, share: float) -> Any:
        def mark(questions: Any) -> list[float]:
            asked.append((name, questions is halves.val))
            return [float(i < share * len(questions)) for i in range(len(questions))]

        return mark

    halves = world.exam()
    settings = {name: marker(name, share) for name, share in (("low", 0.2), ("high", 0.6), ("high too", 0.6))}
    ways = choose_setting(halves, settings)
    assert [way.setting for way in ways if way.test] == ["high"]
    assert all(len(way.val) == len(halves.val) for way in ways)
    assert asked == [("low", True), ("high", True), ("high too", True), ("high", False)]
    asked.clear()
    (way,) = choose_setting(replace(halves, only="low"), settings)
    assert asked == [("low", False)]
    assert len(way.test) == len(halves.test) and not way.val
    with pytest.raises(NotApplicable, match="does not exist on the original"):
        choose_setting(replace(halves, only="another"), settings)


@pytest.mark.slow
def test_the_setting_is_chosen_on_the_validation_half(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(model: Subject, texts: Any, exam: Exam, seed: int) -> AttackResult:
        none, every = (0.0,) * 40, (1.0,) * 40
        return AttackResult((Setting("better on test", none, every), Setting("better on val", every, none)))

    only(monkeypatch, two=two)
    entry = attack_run(run, sources=sources(place))["attacks"]["two"]
    assert (entry["chosen"], entry["accuracy"]["value"]) == ("better on val", 0)
    assert entry["settings"]["better on test"] == {"val": 0, "test": 1}


@pytest.mark.slow
def test_what_takes_hours_is_asked_about(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    for name, seconds in (("long", 36_000), ("short", 3_599)):
        one = attack_of(name, oracle_says(0.2), cost=lambda self, model, seconds=seconds: ("2 steps", seconds))
        monkeypatch.setitem(suite.ATTACKS, name, one)
    asked = []

    def no(text: str) -> bool:
        asked.append(text)
        return False

    report = attack_run(run, sources=sources(place), confirm=no)
    assert asked == ["long takes 2 steps: 10.0 hours on this machine for each model."]
    assert "long" not in report["attacks"] and "short" in report["attacks"]
    assert report["not_tried"] == ["long"]
    assert "long" in attack_run(run, sources=sources(place))["attacks"]


@pytest.mark.slow
def test_two_models_at_inference_are_attacked_together(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who's Harry Potter's logits: its two models answer, and its weights are not attacked."""
    settings = {"mode": "logits", "strength": 30, "teacher_steps": 6, "teacher_learning_rate": 3e-3}
    given = {f"method.{key}": value for key, value in settings.items()}
    run = world.unlearned(place, "whp", **given)
    said = []

    def listen(model: Subject, texts: Any, exam: Exam, seed: int) -> AttackResult:
        said.append(option_scores(model, exam.test))
        return AttackResult()

    kept = ATTACKS | {"listen": attack_of("listen", listen)}
    del kept["benign_relearning"]  # the slowest
    monkeypatch.setattr(suite, "ATTACKS", kept)
    report = attack_run(run, tier="standard", sources=sources(place, oracle=""))["attacks"]
    assert len(said) == 2
    assert said[0] != said[1]
    weights = ("quantisation", "noise", "part_relearning", "direction_ablation", "linear_probe")
    for name in (*weights, "relearning_steps"):
        assert report[name]["status"] == "does not apply"
        assert "two models" in report[name]["why"]
    read = ("forced_choice", "format_shift", "extraction", "entangled_queries", "logit_lens", "leak")
    for name in (*read, "prompts", "membership", "utility"):
        assert report[name]["status"] == "done", report[name]["why"]


def test_nothing_forgotten_is_no_recovery() -> None:
    """A share of nothing: no number, and no warning."""
    names, every = [str(i) for i in range(40)], (1.0,) * 40
    half = (1.0,) * 20 + (0.0,) * 20

    def recover(after: tuple[float, ...], right: tuple[float, ...]) -> Any:
        return measure_recovery({"original": every, "unlearned": after}, right, names, 0)

    assert recover(every, every) is None
    some = (1.0,) * 38 + (0.0,) * 2  # within two standard errors of nothing
    assert recover(some, some) is None
    assert recover(half, (1.0,) * 30 + half[30:])["value"] == 0.5


@pytest.mark.slow
def test_halves(place: Path) -> None:
    def exam(**given: Any) -> Exam:
        given = {"tasks_dir": str(place / "tasks"), "utility": ("harmless",)} | given
        return load_exam(sources(place, **given), 0)

    given = exam(val="hazard_val")
    known = world.exam()
    plain = [replace(q, paraphrases=()) for q in known.test]
    assert [replace(q, paraphrases=()) for q in given.test] == plain
    assert given.test == known.test
    assert given.val == known.val
    both = exam(tasks=("hazard", "hazard_val"), val="split")
    assert not {q.fact for q in both.val} & {q.fact for q in both.test}
    assert len(both.val) == len(both.test) == 40
    with pytest.raises(SrmuError, match="tasks ask for 10 facts, too few for an interval: 20"):
        exam(val="split")
    assert len(exam(val="hazard_val", limit=39).test) == 39
    with pytest.raises(SrmuError, match="20 facts are asked for in both halves"):
        exam(val="hazard")
    with pytest.raises(SrmuError, match="no validation half: task 'nothing' does not exist"):
        exam(val="nothing")


@pytest.mark.slow
def test_bad_input(run: Run, place: Path) -> None:
    for given, message in (
        ({"names": ["logit_lense"]}, "attack 'logit_lense' does not exist; did you mean logit_lens"),
        ({"tier": "smok"}, "tier 'smok' does not exist; choose one of smoke, standard, deep"),
        ({"sources": sources(place, tasks=())}, "tasks: name those of lm-eval"),
        ({"sources": sources(place, tasks=("harmless",))}, "no validation half"),
        ({"sources": sources(place, neutral=str(place / "no.jsonl"))}, "no such file"),
        ({"sources": sources(place, oracle=str(place / "tasks"))}, "config.json"),
    ):
        with pytest.raises(SrmuError, match=message):
            attack_run(run, **{"sources": sources(place)} | given)  # type: ignore[arg-type]
    assert not (run.folder / RESULTS).exists()
    few = sources(place, limit=8)
    with pytest.raises(SrmuError, match=r"ask for [4-8] facts under limit 8, too few"):
        attack_run(run, sources=few)


def test_a_testbed_is_known(run: Run, place: Path) -> None:
    (place / "testbed.json").write_text("{}")
    write_jsonl(place / "retain-low.jsonl", list(world.texts().neutral))
    filled = suite.fill_sources(Sources(), run.config, place / "model")
    assert filled.tasks == ("testbed_hazard",)
    assert filled.val == "testbed_hazard_val"
    assert filled.neutral == str(place / "retain-low.jsonl")
    assert filled.holdout == str(place / "holdout.jsonl")
    assert filled.oracle == str(place / "oracle")


def test_a_subject_is_as_before() -> None:
    subject = world.subject("unlearned")
    names = {name: p.detach().clone() for name, p in subject.module.named_parameters()}
    right = mark_answers(subject, world.exam().test)
    with pytest.raises(ZeroDivisionError), subject.editable("*") as model:
        for parameter in model.trained.values():
            parameter.data.zero_()
        assert mark_answers(subject, world.exam().test) != right
        raise ZeroDivisionError
    with subject.as_original():
        assert sum(mark_answers(subject, world.exam().test)) == 40
    assert mark_answers(subject, world.exam().test) == right
    for name, parameter in subject.module.named_parameters():
        assert parameter.equal(names[name])
        assert parameter.requires_grad is False or parameter.grad is None
    whole = world.subject("unlearned", fixed="it answers with two models")
    for enter in (whole.as_original, lambda: whole.editable("*")):
        with pytest.raises(NotApplicable, match="two models"), enter():
            pass


@pytest.mark.slow
def test_a_killed_suite_ends_with_the_same_report(run: Run, place: Path) -> None:
    """What was found before the kill is not looked for again."""
    words = ["-m", "srmu", "attack", str(run.folder), "--tasks", "hazard"]
    process = processes.start(*words, "--neutral", str(place / "neutral.jsonl"))
    while process.poll() is None and len([*(place / "cache" / "attacks").glob("*.json")]) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run.folder / RESULTS).exists()
    kept = {p: p.stat().st_mtime_ns for p in (place / "cache" / "attacks").glob("*.json")}
    given = Sources(tasks=("hazard",), neutral=str(place / "neutral.jsonl"))
    resumed = attack_run(run, sources=given)
    assert all(path.stat().st_mtime_ns == times for path, times in kept.items())
    shutil.rmtree(place / "cache" / "attacks")
    whole = attack_run(Run.open(run.folder), sources=given)
    for report in (resumed, whole):
        for entry in report["attacks"].values():
            del entry["seconds"]
    assert resumed == whole


@pytest.mark.slow
def test_the_tuned_attacker_has_a_price(run: Run, place: Path) -> None:
    """A search of two trials, whose budget, settings and price are kept; the card and a second call know them."""
    report = attack_run(run, names=["E20"], search={"trials": 2, "steps": 5}, sources=sources(place))
    entry = report["attacks"]["tuned_relearning"]
    assert entry["status"] == "done" and (entry["budget"]["trials"], entry["budget"]["steps"]) == (2, 5)
    assert [price["share"] for price in entry["price"]] == [0.5, 0.9] and entry["price"][0]["tried"] in (0, 1, 2, 5)
    assert read_attacks(run.folder) == json.loads(json.dumps(report))  # lists for tuples
    assert Run.open(run.folder).record["attacks"]["tried"]["tuned_relearning"]["price"] == entry["price"]
    assert any("of the knowledge" in line for line in describe_attacks(report))
    assert entry["controls"]["original"]["settings"].keys() == {"facts, LoRA 8, 0.0005, 0 steps"}
    assert set(entry["controls"]["oracle"]["settings"]) > {"facts, LoRA 8, 0.0005, 0 steps"}


@pytest.mark.slow
def test_a_long_attack_keeps_its_parts_and_tells_its_steps(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    made, told, stops = [], [], ["once"]

    def find(model: Subject, *_: Any) -> AttackResult:
        for part in (1, 2):
            model.remember(part, lambda part=part: made.append(part) or [part])
            with model.watch("steps", 4) as tick:
                tick(f"(part {part})")
            if stops:
                raise KeyboardInterrupt(stops.pop())
        return AttackResult()

    @contextmanager
    def watch(label: str, total: int) -> Iterator[Tick]:
        yield lambda text, steps=1: told.append((text, steps))

    monkeypatch.setitem(suite.ATTACKS, "long", attack_of("long", find))
    with pytest.raises(KeyboardInterrupt):
        attack_run(run, sources=sources(place))
    assert made == [1]
    attack_run(run, sources=sources(place), watch=watch)
    assert made == [1, 2] * 3  # of each model its own
    assert any(text.startswith("long, original: steps 1/4 (part 1)") and not steps for text, steps in told)


def test_a_search_goes_with_the_tuned_attacker() -> None:
    with pytest.raises(SrmuError, match="trials and steps: options of tuned_relearning; name that attack"):
        select_attacks("smoke", [], {"trials": 3, "steps": 5})
    assert select_attacks("smoke", ["E20"], {"trials": 3})["tuned_relearning"].trials == 3
    for key in ("trials", "steps"):
        with pytest.raises(SrmuError, match=f"^{key} 0: tuned_relearning can try nothing with that; give 1 or more$"):
            select_attacks("smoke", ["E20"], {key: 0})


def test_prices_in_words() -> None:
    price = {"share": 0.5, "steps": 12.4, "low": 8.0, "high": None, "tried": 100, "tokens": 1984.0, "flop": 1.6e12}
    never = price | {"share": 0.9, "steps": None}
    assert describe_prices([never | {"tried": 0}]) == [
        "90% of the knowledge did not come back: no training that was tried did better than none"
    ]
    assert "after 1 step (95" in describe_prices([price | {"steps": 0.3}])[0]
    assert describe_prices([price, never, price | {"steps": 0.0}]) == [
        "50% of the knowledge is back after 12 steps (95 % interval 8 to more than 100): "
        "1,984 tokens, 1.6e+12 FLOPs, 6.7e-05 GPU-minutes",
        "90% of the knowledge did not come back in the 100 steps of the best training found",
        "50% of the knowledge is there without any training",
    ]
