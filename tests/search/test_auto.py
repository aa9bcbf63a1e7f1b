"""One command from texts to an unlearned model: what it chooses, keeps, explains and refuses."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from helpers import attack_world as world
from helpers.models import Call, texts
from srmu import attacks
from srmu.attacks import suite
from srmu.data.digest import digest_texts
from srmu.errors import SrmuError
from srmu.evals.analyses import candidate_layers
from srmu.evals.results import read_metrics
from srmu.evals.subject import Subject, mark_answers
from srmu.methods import METHODS
from srmu.runs.plan import load_tokenizer
from srmu.runs.run import Run
from srmu.search import auto, objective, robust
from srmu.search.objective import MarkedAnswers, TextYardstick, Yardstick, hold_out, sort_entries

TRIALS = 3
NAMED = ("--forget", "forget.jsonl", "--retain", "neutral.jsonl")
TASKS = ("--tasks", "hazard", "--utility", "harmless", "--tasks-dir", "tasks")


def asked(place: Path, out: str = "auto", **given: Any) -> auto.AutoRequest:
    names = {"tasks": ("hazard",), "utility": ("harmless",), "tasks_dir": place / "tasks"}
    return auto.AutoRequest(
        **{
            "model": str(place / "model"),
            "forget": (str(place / "forget.jsonl"),),
            "retain": (str(place / "neutral.jsonl"),),
            "budget": 0.2,
            "trials": TRIALS,
            "out": place / out,
            **names,
        }
        | given
    )


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, and few attacks."""
    whole = auto.make_config

    def shortened(*arguments: Any) -> Any:
        *others, overrides = arguments
        return whole(*others, [*overrides, "train.max_steps=20"])

    monkeypatch.setattr(auto, "make_config", shortened)
    kept = {name: attacks.ATTACKS[name] for name in ("forced_choice", "utility")}
    monkeypatch.setattr(suite, "ATTACKS", kept)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny world with one finished search in `auto`, and a cache of its own."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SRMU_CACHE", str(folder / "cache"))
        quick(monkeypatch)
        world.write(folder)
        said: list[tuple[str, str]] = []
        auto.run_search(auto.prepare_job(asked(folder)), lambda *one: said.append(one))
        (folder / "said.json").write_text(json.dumps(said))
        yield folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run beside the tiny world, and are quick."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("SRMU_CACHE", str(place / "cache"))
    quick(monkeypatch)


def answer(place: Path, out: str = "auto") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / out / auto.FILE).read_text())
    return found


@pytest.mark.slow
def test_every_choice_is_explained(place: Path) -> None:
    found = answer(place)
    steps = [choice["step"] for choice in found["choices"]]
    assert [*dict.fromkeys(steps)] == [
        "measure", "entanglement", "layers", "search", "final", "attacks", "export",
    ]  # fmt: skip
    assert all(choice["sentence"].endswith(".") for choice in found["choices"])
    # the layers that the texts were read at are those of the scan, so that the two can be held against each other
    assert found["advised"] in [row["layer"] for row in found["scan"]["layers"]]
    said = [choice["sentence"] for choice in found["choices"] if choice["step"] == "layers"]
    assert said[1].startswith("The texts alone had pointed to ")
    assert ("the same layer" in said[1]) == (found["advised"] == found["scan"]["best"])
    told = json.loads((place / "said.json").read_text())
    assert told == [[choice["step"], choice["sentence"]] for choice in found["choices"]]
    assert str(place) not in json.dumps(found)


def test_the_choice_is_the_best_within_the_margin(place: Path) -> None:
    found = answer(place)
    limit = objective.MARGIN * found["budget"]
    tried = [found["defaults"], *found["trials"]]
    assert len(found["trials"]) == TRIALS
    (chosen,) = (one for one in tried if one["runs"] == [found["run"]])
    assert chosen["values"]["utility_loss"] <= limit
    for one in tried:
        if one["values"]["utility_loss"] <= limit:
            assert one["values"]["forgetting"] <= chosen["values"]["forgetting"]
    val = found["final"]["val"]
    for key, value in chosen["values"].items():
        assert val[key]["value"] == pytest.approx(value)
        assert val[key]["low"] <= value <= val[key]["high"]


def test_what_is_exported_is_the_chosen_run(place: Path) -> None:
    """And the test half is answered by it as the final result says."""
    found = answer(place)
    module = AutoModelForCausalLM.from_pretrained(place / "auto" / "model").eval()
    model = Subject(module, load_tokenizer(place / "model"))
    right = mark_answers(model, world.exam().test)
    share = sum(right) / len(right)
    assert found["final"]["test"]["parts"]["hazard"]["after"]["value"] == pytest.approx(share)


def test_again_does_nothing(inside: None, call: Call, place: Path) -> None:
    before = answer(place)
    runs = {path: path.stat().st_mtime_ns for path in (place / "auto").rglob("*.json")}
    options = ("--budget", "20%", "--trials", TRIALS)
    got = call("auto", "model", *NAMED, *TASKS, *options)
    assert (got.code, answer(place)) == (0, before)
    assert "this was there already: auto" in got.out
    assert {path: path.stat().st_mtime_ns for path in (place / "auto").rglob("*.json")} == runs
    printed = call("auto", "model", *NAMED, *TASKS, *options, "--json")
    assert json.loads(printed.out) == before


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("stop_at", ["layers", "strengths"])
def test_killed_and_continued_it_chooses_the_same(place: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str) -> None:
    """No run is made twice, and the trials after the kill are what they would have been."""
    monkeypatch.setenv("SRMU_CACHE", str(place / "cache"))
    quick(monkeypatch)
    whole = answer(place)
    count = 0

    def killed(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 + (stop_at == "strengths") * len(whole["scan"]["layers"]):
            raise KeyboardInterrupt
        return try_config(*arguments)

    try_config = objective.try_config
    monkeypatch.setattr(objective, "try_config", killed)
    with pytest.raises(KeyboardInterrupt):
        auto.run_search(auto.prepare_job(asked(place, stop_at)))
    monkeypatch.setattr(objective, "try_config", try_config)
    again = auto.run_search(auto.prepare_job(asked(place, stop_at)))
    assert again["scan"] == whole["scan"]
    values = [(one["params"], one["values"]) for one in again["trials"]]
    assert values == [(one["params"], one["values"]) for one in whole["trials"]]
    assert again["final"]["test"] == whole["final"]["test"]


@pytest.mark.slow
def test_a_longer_search_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the trials that are there; what was exported before answered another question."""
    monkeypatch.setenv("SRMU_CACHE", str(place / "cache"))
    quick(monkeypatch)
    shutil.copytree(place / "auto", place / "longer")
    (place / "longer" / "model" / "old").touch()
    more = auto.run_search(auto.prepare_job(asked(place, "longer", trials=TRIALS + 1)))
    first = [one["params"] for one in answer(place)["trials"]]
    assert [one["params"] for one in more["trials"]][:TRIALS] == first
    assert len(more["trials"]) == TRIALS + 1
    assert not (place / "longer" / "model" / "old").exists()
    assert (place / "longer" / auto.MODEL).is_dir()


def test_nothing_within_the_budget(inside: None, call: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says so; the folder stays, nothing is exported."""
    shutil.copytree(place / "auto", place / "tight")
    shutil.rmtree(place / "tight" / "model")
    monkeypatch.setattr(objective, "NOISE", 2.0)
    got = call("auto", "model", *NAMED, *TASKS, "--budget", "20%", "--out", "tight", "--trials", TRIALS)
    assert got.code == 2
    last = got.err.strip().splitlines()[-1]
    assert last.startswith("srmu: None of 4 runs forgets anything")
    assert "Nothing is exported; allow more (--budget)" in last
    assert not (place / "tight" / "model").exists()
    assert answer(place, "tight")["run"] is None


def test_what_is_said_of_a_choice() -> None:
    def one(forgetting: float, loss: float) -> dict[str, Any]:
        return {"values": {"forgetting": forgetting, "utility_loss": loss}, "params": {"method.kappa": 4.0}}

    found = [one(0.01, 0.0), one(0.6, 0.03), one(0.5, 0.02), {"values": {}, "params": {}}]
    assert sort_entries(found) == [found[1], found[2]]  # the others forget no more than noise
    assert sort_entries([*found, one(0.6, 0.02)])[0] == one(0.6, 0.02)  # of equals
    job: Any = SimpleNamespace(limit=0.005, request=SimpleNamespace(budget=0.01))
    costly = [one(0.0, 0.0), one(0.6, 0.03), one(0.5, 0.02)]
    assert auto.choose_trial(job, costly) == (
        None, "No run forgets anything within the budget of 1.00% of utility; the nearest forgets 50% for 2.00%.",
    )  # fmt: skip
    none = "None of 1 runs forgets anything, whatever it costs."
    assert auto.choose_trial(job, [found[0], found[3]]) == (None, none)
    job.limit, job.request.budget = 0.025, 0.05
    chosen, said = auto.choose_trial(job, found)
    assert chosen == found[2]
    assert "Of 3 runs 2 lose at most 2.50% of utility" in said and "(0.5 of the budget," in said
    assert said.endswith("; of these this one forgets most, 50% for 2.00%: method.kappa=4.0.")
    job.limit = 0.01
    assert "within the whole budget this one" in auto.choose_trial(job, found)[1]
    assert objective.trial_worth(found[1]["values"], 0.01) == pytest.approx(0.2)
    assert objective.trial_worth(found[0]["values"], 0.01) == 0.01


def test_the_plan_comes_first_and_writes_nothing(inside: None, call: Call, place: Path) -> None:
    options = ("--out", "planned", "--dry-run", "--json")
    got = call("auto", "model", *NAMED, *TASKS, *options)
    assert (got.code, (place / "planned").exists()) == (0, False)
    plan = json.loads(got.out)
    assert plan["seconds"] == pytest.approx(sum(step["seconds"] for step in plan["steps"]))
    lines = "\n".join(auto.explain_search(plan))
    assert "2 runs of 20 steps" in lines
    assert "15 runs, about" in lines  # 12 trials, 2 layers, the defaults


@pytest.mark.slow
def test_without_tasks_texts_measure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out ones: none is trained on, no attack runs, and it says what that is worth."""
    monkeypatch.setenv("SRMU_CACHE", str(place / "cache"))
    quick(monkeypatch)
    job = auto.prepare_job(asked(place, "texts", tasks=(), trials=1, budget=0.9))
    held = job.yardstick.forget["forget_texts"]
    assert isinstance(held, TextYardstick)
    assert {len(half) for half in held.halves.values()} == {20}
    assert not {*held.halves["val"], *held.halves["test"]} & {*job.texts["forget"]}
    found = auto.run_search(job)
    record = json.loads((place / "texts" / found["run"] / "record.json").read_text())
    assert record["data"]["topic"]["forget"]["documents"] == len(job.texts["forget"])
    assert record["data"]["topic"]["forget"]["digest"] == digest_texts(job.texts["forget"])
    said = " ".join(choice["sentence"] for choice in found["choices"])
    assert "Texts alone say little" in said
    assert "None was run" in said
    read = found["final"]["test"]["parts"]["forget_texts"]
    assert read["after"]["value"] < read["before"]["value"]
    results = read_metrics(place / "texts" / found["run"])["after"]
    assert {"forget_texts_val/acc", "forget_texts/acc", "harmless/acc"} <= {*results}


@pytest.fixture(scope="module")
def robust_search(place: Path) -> tuple[dict[str, Any], list[str]]:
    """A search with rename_scrub, and what was said on the way."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SRMU_CACHE", str(place / "cache"))
        quick(monkeypatch)
        scrub = ["own_texts=60", "own_tokens=4", "prompt=2", "renamings=4"]
        whole = auto.make_config

        def small(*arguments: Any) -> Any:
            *others, overrides = arguments
            return whole(*others, [*overrides, *(f"method.{option}" for option in scrub)])

        monkeypatch.setattr(auto, "make_config", small)
        monkeypatch.setattr(robust, "STEPS", 40)
        monkeypatch.setattr(robust.RenameScrub, "learning_rate", 2e-3 * 200 / 14336)
        (place / "subjects.txt").write_text("\n".join(world.SUBJECTS))
        given = {"robust": True, "names": str(place / "subjects.txt"), "trials": 2, "budget": 0.5}
        said: list[str] = []
        job = auto.prepare_job(asked(place, "robust", **given))
        found = auto.run_search(job, lambda step, sentence: said.append(f"{step}: {sentence}"))
    return found, said


@pytest.mark.slow
def test_robust_swaps_names(place: Path, robust_search: Any) -> None:
    """Each trial keeps with another weight; the layer has no part in it."""
    found, said = robust_search
    assert [trial["params"]["method.keep"] for trial in found["trials"]] == [2.0, 4.0]
    assert "scan" not in found
    assert Run.open(place / "robust" / found["run"]).config.method.name == "rename_scrub"
    assert "names: The 40 names of the file are swapped" in " ".join(said)
    assert (place / "robust" / auto.MODEL / "config.json").exists()


def test_robust_prints_k_with_its_floor(robust_search: Any) -> None:
    found, said = robust_search
    told = " ".join(line for line in said if line.startswith("attacks"))
    assert f"Suppressed, with K* = {found['final']['K*']['value']:.2f}" in told
    assert found["final"]["floor"]["of"] == "20 invented facts"
    assert "The floor is" in told and "It does not protect against" in told
    assert not any(word in told.lower() for word in ("erased", "certified"))


def test_the_oracle_is_the_floor_where_there_is_one() -> None:
    control = {"oracle": {"accuracy": {"value": 0.34}}}
    report = {
        "chance": 0.25, "original": {"accuracy": {"value": 1.0}}, "oracle": True,
        "attacks": {"one": {"controls": control}, "two": {"controls": {}}},
    }  # fmt: skip
    found = robust.measure_floor(None, None, report, ())  # type: ignore[arg-type]
    assert found == {"of": "an oracle (trained without these facts)", "share": pytest.approx(0.12)}


def test_unknown_facts_are_the_floor_where_there_is_no_oracle() -> None:
    report = {
        "chance": 0.25, "original": {"accuracy": {"value": 1.0}}, "oracle": False, "unknown": [0, 0, 1, 1],
        "attacks": {"one": {"floor": 0.25}, "two": {"floor": 0.4}, "three": {}},
    }  # fmt: skip
    found = robust.measure_floor(None, None, report, ())  # type: ignore[arg-type]
    assert found["share"] == pytest.approx(0.2) and found["of"].startswith("2 facts that the original never knew")


def test_invented_facts_are_about_nobody() -> None:
    exam = world.exam()
    asked_for = robust.invent_questions(exam, world.SUBJECTS[:30], seed=1)
    known = {*world.SUBJECTS}
    for before, after in ((exam.test, asked_for.test), (exam.val, asked_for.val)):
        named = [q for q in before if q.entry in world.SUBJECTS[:30]]
        assert len(after) == len(named) > 0
        for old, new in zip(named, after, strict=True):
            words = {*new.prompt.split(), *" ".join(new.paraphrases).split()}
            assert not words & known and new.options == old.options
            assert new.fact != old.fact
    golds = {q.gold for q in asked_for.test}
    assert len(golds) == 4


def test_held_out_by_content() -> None:
    """The order of a file and what is said twice change nothing."""
    rows = texts(90, 3)
    kept, halves = hold_out("forget", rows)
    again, same = hold_out("forget", [*reversed(rows), rows[0]])
    assert halves == same
    assert {*kept} == {*again}
    assert not {*halves["val"]} & {*halves["test"]}
    with pytest.raises(SrmuError, match="30 different forget texts are too few"):
        hold_out("forget", texts(30, 3))


def test_outcome_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """(A0 - Au) / (A0 - chance), and the mean fall of what is to be kept."""
    part: Any = type("Part", (), {"chance": 0.25})  # of four options
    yardstick = Yardstick({"gone": part}, {"a": part, "b": part})

    def outcome(gone_before: int) -> dict[str, float]:
        """Of so many right answers in twenty, before and after."""
        right = {"gone": (gone_before, 8), "a": (20, 18), "b": (16, 18)}
        taken = [
            {name: MarkedAnswers([i < pair[when] for i in range(20)], range(20)) for name, pair in right.items()}
            for when in (0, 1)
        ]
        monkeypatch.setattr(Yardstick, "take", lambda *arguments: taken)
        return yardstick.outcome(None)  # type: ignore[arg-type]

    assert outcome(17)["forgetting"] == pytest.approx(0.45 / 0.60)
    assert outcome(17)["utility_loss"] == pytest.approx((0.1 - 0.1) / 2)
    with pytest.raises(SrmuError, match="it knows nothing of this"):
        outcome(5)


def test_layers_of_a_deep_model_are_spread() -> None:
    shape: Any = type("Shape", (), {"num_hidden_layers": 32})
    method = METHODS["srmu"]()
    found = candidate_layers(method, shape, 8)  # type: ignore[arg-type]
    assert (found[0], found[-1], len(found)) == (6, 24, 8)
    assert candidate_layers(method, shape) == [*range(2, 32)]  # type: ignore[arg-type]
    shape.num_hidden_layers = 2
    with pytest.raises(SrmuError, match="too few for method"):
        candidate_layers(method, shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--budget": "5"}, "--budget 5: expected a share"),
        ({"--budget": "abc"}, "--budget abc: expected a share"),
        ({"model": "nowhere"}, "nowhere"),
        ({"--forget": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"--retain": "forget.jsonl"}, "forget and retain hold the same texts"),
        ({"--tasks-dir": "nowhere"}, "'nowhere' does not exist"),
        ({"--method": "npo"}, "--method npo has no layer to find"),
        ({"--method": "smru"}, "did you mean srmu?"),
        ({"--out": "tasks"}, "output folder"),
        ({"--names": "names.txt"}, "--names has no effect without --robust"),
        ({"--goals": "goals.txt"}, "--goals has no effect without --robust"),
    ],
)
def test_bad_input_is_one_line(inside: None, call: Call, place: Path, changed: dict[str, str], message: str) -> None:
    names = dict(zip(NAMED[::2], NAMED[1::2], strict=True))
    names |= dict(zip(TASKS[::2], TASKS[1::2], strict=True)) | {"--out": "bad"} | changed
    model = names.pop("model", "model")
    got = call("auto", model, *(part for pair in names.items() for part in pair))
    assert got.code == 2
    lines = [line for line in got.err.strip().splitlines() if line.startswith("srmu: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in got.err
    assert not (place / "bad").exists()
