"""What a model writes on, before a run and after, and how much it repeats itself there."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import attack_world as world
from helpers.models import pico_module, pieces, save_pico, word_tokenizer
from srmu.data.rows import join_counted
from srmu.engine.generate import continue_greedily
from srmu.evals import continuations
from srmu.evals.continuations import ask_model, cut_openings, measure_repetition, read_prompts, repeated_share
from srmu.evals.results import RESULTS, load_results
from srmu.evals.score import score_model
from srmu.runs.config import make_config
from srmu.runs.run import Run, open_target, unlearn_config

KINDS = ("repetition/forget", "repetition/neutral")


def parrot() -> Any:
    """A model that writes the first word of its vocabulary again and again."""
    module = pico_module()
    with torch.no_grad():
        module.model.norm.weight.zero_()
    return module


# --- the measure


def count_repeated(ids: Sequence[int]) -> float:
    """Each sequence of four against all before it."""
    grams = [[*ids[i : i + 4]] for i in range(len(ids) - 3)]
    again = sum(any(grams[i] == grams[k] for k in range(i)) for i in range(len(grams)))
    return again / len(grams) if grams else 0.0


@given(st.lists(st.integers(0, 2), max_size=40))
def test_the_share_is_that_of_a_plain_loop(ids: list[int]) -> None:
    assert repeated_share(ids) == pytest.approx(count_repeated(ids))


def test_shares_of_planted_texts() -> None:
    assert repeated_share([7] * 32) == 28 / 29
    assert repeated_share([*range(32)]) == repeated_share([]) == repeated_share([1, 1, 1]) == 0
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_a_model_that_says_one_word_repeats_itself(tmp_path: Path) -> None:
    prompts = {"forget": [[1, 9, 8, 7], [1, 5]], "neutral": [[6]]}
    found = measure_repetition(parrot(), word_tokenizer(), prompts, "parrot")
    assert {kind: (one["value"], one["n"]) for kind, one in found.items()} == {
        KINDS[0]: (28 / 29, 2),
        KINDS[1]: (28 / 29, 1),
    }
    module = pico_module()
    plain = measure_repetition(module, word_tokenizer(), prompts, "pico")
    expected = [repeated_share(row) for row in continue_greedily(module, word_tokenizer(), [[1, 9, 8, 7], [1, 5]], 32)]
    assert plain[KINDS[0]]["value"] == pytest.approx(sum(expected) / 2)


def test_a_model_that_writes_nothing_repeats_nothing() -> None:
    tokenizer = word_tokenizer(eos_token="<pad>")  # the parrot's word ends a text
    assert measure_repetition(parrot(), tokenizer, {"forget": [[1, 9]]}, "mute")[KINDS[0]]["value"] == 0


# --- the prompts


def test_openings_are_the_first_halves_of_texts_from_all_over_a_set() -> None:
    tokenizer = word_tokenizer()
    rows = [f"w{i % 60} w{i // 60} w1 w2" for i in range(1000)]
    found = cut_openings(rows, tokenizer, 2048)
    halves = [tokenizer(text)["input_ids"][:3] for text in rows]
    places = [halves.index(row) for row in found]
    assert len(found) == 16 and places == sorted({*places}) and places[0] < 100 and places[-1] > 900
    assert cut_openings(rows[:3], tokenizer, 2048) == halves[:3]
    assert cut_openings(["w1 w2", "w1 w2 w3", "w1 w3"], tokenizer, 2048) == [[1, 5]]  # the same is asked once
    long = " ".join(["w7"] * 500)
    assert [len(row) for row in cut_openings([long], tokenizer, 2048)] == [32]
    assert [len(row) for row in cut_openings([long], tokenizer, 9)] == [5]
    assert cut_openings([], tokenizer, 2048) == cut_openings(["w1"], tokenizer, 2048) == []


def test_openings_of_templates_and_of_tokenizers_without_a_first_token() -> None:
    text = join_counted([("w1 " * 80, False), ("w2", True)])
    assert [len(row) for row in cut_openings([text], word_tokenizer(), 2048)] == [32]
    tokenizer = pieces(["ab ab cd"])
    ids = tokenizer("ab cd ef gh")["input_ids"]
    assert cut_openings(["ab cd ef gh"], tokenizer, 2048) == [ids[: (len(ids) + 1) // 2]]


# --- of a run


@pytest.fixture
def made(workplace: Path) -> Path:
    """The workplace with a task of the model's; the folder of a run that is strong enough to show."""
    (workplace / "tasks").mkdir()
    (workplace / "tasks" / "quiz.yaml").write_text(world.TASK.format(name="quiz"))
    row = {"question": "w1 w2", "choices": ["w3", "w4"], "gold": 0}
    (workplace / "tasks" / "quiz.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    return make_run(workplace).folder


def make_run(folder: Path, method: str = "graddiff", **given: Any) -> Run:
    retain = folder / "retain.jsonl" if method == "graddiff" else []
    options = [f"runs_dir={folder / 'runs'}", "eval=[quiz]", "train.max_steps=4", "train.learning_rate=0.01"]
    options += [f"{key}={value}" for key, value in given.items()]
    return unlearn_config(make_config(str(folder / "model"), folder / "forget.jsonl", retain, method, options))


def test_the_scores_of_a_run_say_how_much_it_repeats_itself(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, opened = score_model(made), open_target(made)
    prompts = read_prompts(opened)
    for when, module in opened.states():
        rows = prompts["forget"] + prompts["neutral"]
        room = min(32, 64 - max(map(len, rows)))
        shares = [*map(repeated_share, continue_greedily(module, opened.tokenizer, rows, room))]
        for kind, part in zip(KINDS, (shares[: len(prompts["forget"])], shares[len(prompts["forget"]) :]), strict=True):
            assert scores[when][kind]["value"] == pytest.approx(sum(part) / len(part))
            assert scores[when][kind]["n"] == len(part)
    assert scores["before"] != scores["after"]
    rows = [row for row in load_results(made)["rows"] if row["task"] == "repetition"]
    assert [(row["metric"], row["when"]) for row in rows] == [*product(("forget", "neutral"), ("after", "before"))]
    assert not any(word in (made / RESULTS).read_text() for word in ("w1 ", "w2 "))  # numbers alone
    assert Run.open(made).record["results"] == scores
    monkeypatch.setattr(continuations, "continue_greedily", lambda *given: pytest.fail("it was written again"))
    assert score_model(made) == scores
    model = made.parents[1] / "model"  # which has no texts
    assert score_model(model, ["quiz"])["after"].keys() == {"quiz/acc"}


def test_a_run_without_retain_texts_is_given_fixed_ones(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(continuations.NEUTRAL.read_text().splitlines()) == 16
    run = make_run(made.parents[1], "ga", **{"train.forget_ceiling": 9.0})
    assert {*score_model(run)["after"]} == {"quiz/acc", KINDS[0]}  # this tokenizer knows none of their words
    (made / "neutral.txt").write_text("w1 w2 w3\nw4 w5 w6\n")
    monkeypatch.setattr(continuations, "NEUTRAL", made / "neutral.txt")
    assert score_model(run)["after"][KINDS[1]]["n"] == 2


def test_scores_outlive_the_texts_of_a_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made.parents[1] / "forget.jsonl").unlink()
    assert score_model(made)["after"].keys() == {"quiz/acc"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("repetition is not measured: ") and "forget.jsonl: no such file" in line


# --- answers to prompts


def test_answers_are_those_of_each_model_alone(made: Path) -> None:
    tokenizer, prompts = word_tokenizer(), ["w1 w2", "w9", "w30 w31 w32 w33"]
    found = ask_model(str(made), prompts, 6)
    assert [one["prompt"] for one in found] == prompts and {*found[0]} == {"prompt", "before", "after"}
    for when, module in open_target(made).states():
        for one in found:
            (row,) = continue_greedily(module, tokenizer, [tokenizer(one["prompt"])["input_ids"]], 6)
            assert one[when] == tokenizer.decode(row)
    assert any(one["before"] != one["after"] for one in found)
    (alone,) = ask_model(str(made.parents[1] / "model"), prompts[:1], 6)
    assert alone == {"prompt": "w1 w2", "after": found[0]["before"]}


def test_a_run_of_two_models_is_asked(made: Path) -> None:
    steps = {"method.mode": "logits", "method.teacher_steps": 4, "method.teacher_learning_rate": 0.05}
    run = make_run(made.parents[1], "whp", **steps)
    (answer,) = ask_model(str(run.folder), ["w1 w2"], 12)
    assert answer["before"] == ask_model(str(made), ["w1 w2"], 12)[0]["before"]
    opened, tokenizer = open_target(run.folder), word_tokenizer()
    with opened.after() as module:
        ids = tokenizer("w1 w2")["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer["after"] == tokenizer.decode(ids[3:])


def test_a_long_prompt_leaves_less_room(workplace: Path) -> None:
    prompt = " ".join(["w5"] * 60)
    (answer,) = ask_model(str(workplace / "model"), [prompt], 48)
    assert 1 <= len(answer["after"].split()) <= 3


def test_the_chat_template_is_used_when_asked_for(workplace: Path) -> None:
    folder = save_pico(workplace / "chatty")
    template = "{% for m in messages %}w7 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w8{% endif %}"
    word_tokenizer(chat_template=template).save_pretrained(folder)
    plain, chat = (ask_model(str(folder), ["w1"], 5, chat=chat)[0]["after"] for chat in (False, True))
    module, tokenizer = pico_module(), word_tokenizer()
    for text, answer in (("w1", plain), ("w7 w1 w8", chat)):
        ids = tokenizer(text, add_special_tokens=text == "w1")["input_ids"]
        assert answer == tokenizer.decode(continue_greedily(module, tokenizer, [ids], 5)[0])
