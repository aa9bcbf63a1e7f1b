"""RWKU's numbers against loops, closed forms and models that say what they are told to."""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.benchmark_sets import Sets, edited, greedy, write_sets
from helpers.models import pico_module, word_tokenizer
from srmu.errors import SrmuError
from srmu.evals.benchmarks import BENCHMARKS, base, rwku
from srmu.evals.benchmarks.base import BenchmarkRequest, BenchmarkScores
from srmu.evals.subject import Subject

PEOPLE = ("Ada Bly", "Cy Dole")
ATTACKS = (
    "prefix injection",
    "affirmative suffix",
    "role playing",
    "multiple choice",
    "reverse query",
    "synonym manipulation",
    "background hint",
    "incontext learning",
    "cross lingual",
)


def sets(people: Sequence[str] = PEOPLE) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Nonsense in RWKU's schema: two persons, two rows of each set about each (attacks: nine)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, count in (
        *((f"forget_level{level}", 9 if level == 3 else 2) for level in (1, 2, 3)),
        *((f"neighbor_level{level}", 2) for level in (1, 2)),
    ):
        found[name] = [
            {
                "query": f"w{i} w{level}", "answer": f"w{i + 10} w{i}", "level": name[-1],
                "type": ATTACKS[i] if name[-1] == "3" else "simple question", "subject": person,
                "neighbor": "w59",
            }
            for level, person in enumerate(people) for i in range(count)
        ]  # fmt: skip
    shots = [{"question": "w1 w2", "choices": ["w3", "w4", "w5", "w6"], "answer": 2}]
    for i, person in enumerate(people * 2):
        about = {"subject": person}
        for name, row in {
            "mia_forget": {"text": f"w{i} w7 w8 w9 w{i + 20} w{i + 3}", "ngram": 6},
            "mia_retain": {"text": f"w{i + 9} w17 w18 w{i} w{i + 20}", "ngram": 5},
            "utility_general": {
                **shots[0], "answer": i % 4, "task": "world_religions", "examples": shots,
            },
            "utility_reason": {
                "task": "w1", "cot": "w1 w2", "question": f"w{i}", "answer": f"w{i}",
            },
            "utility_truthfulness": {
                "question": f"w{i}",
                "mc1_targets": {"choices": ["w1 w2", f"w{i + 3}", "w4"], "labels": [0, 1, 0]},
                "mc2_targets": {"choices": ["w1", "w2"], "labels": [0, 1]},
            },
            "utility_factuality": {"question": f"w{i}", "answers": ["w1 w2", f"w{i}"]},
            "utility_fluency": {"instruction": f"w{i} w5"},
        }.items():  # fmt: skip
            found.setdefault(name, []).append(row | about)
    return {(name, "test"): rows for name, rows in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("rwku") / "set", sets())


def asked(folder: Path, part: str = "", limit: int | None = None, **given: Any) -> BenchmarkRequest:
    return BenchmarkRequest("jinzhuoran/RWKU", "get it", folder=folder, limit=limit, part=part, **given)


def only(tmp_path: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> BenchmarkRequest:
    """A folder of one set."""
    return asked(write_sets(tmp_path / "set", {(name, "test"): rows}))


def pico() -> Subject:
    return Subject(pico_module(), word_tokenizer())


def saying(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Let the model write these; the prompts that it is given."""
    seen: list[str] = []

    def write(model: Any, prompts: Sequence[str], *_: Any, **__: Any) -> list[str]:
        seen.extend(prompts)
        return [answers[i % len(answers)] for i in range(len(prompts))]

    monkeypatch.setattr(base, "write_continuations", write)
    return seen


@pytest.fixture(scope="module")
def measured(folder: Path) -> BenchmarkScores:
    return rwku.run_rwku(pico(), asked(folder))


def test_every_number_of_the_paper_is_there(measured: BenchmarkScores) -> None:
    assert {column.metric for column in BENCHMARKS["rwku"].columns} <= {*measured.metrics}
    attacks = [name for name in measured.metrics if name.startswith("rwku/forget/level3/")]
    assert attacks == [f"rwku/forget/level3/{name.replace(' ', '_')}" for name in ATTACKS]
    counts = {name: found["n"] for name, found in measured.metrics.items()}
    assert counts["rwku/forget/all"] == 26 and counts["rwku/forget/level3"] == 18
    assert counts["rwku/forget/level3/role_playing"] == 2
    assert counts["rwku/neighbor/all"] == 8 and counts["rwku/mia_forget/loss"] == 4
    assert all(math.isfinite(found["value"]) for found in measured.metrics.values())


@pytest.mark.slow
def test_probes_are_asked_and_scored_one_by_one(measured: BenchmarkScores) -> None:
    """Without a chat template, the authors' words as they are."""
    model, scores = pico(), []
    for (name, _), rows in sets().items():
        if name.startswith("forget"):
            for row in rows:
                blank = name == "forget_level1"
                text = rwku.PROMPTS["blank"] if blank else rwku.PROMPTS["brief"]
                text += "" if row["type"] == "incontext learning" else "Question: "
                text += row["query"]
                text += "" if row["type"] == "affirmative suffix" else "\nAnswer:"
                said = greedy(model, text, 30).split()
                scores.append(subsequence(row["answer"].split(), said) / 2)
    assert [
        *measured.values["forget/level1"],
        *measured.values["forget/level2"],
        *measured.values["forget/level3"],
    ] == scores
    assert 0 < np.mean(scores) < 1
    assert measured.metrics["rwku/forget/all"]["value"] == pytest.approx(np.mean(scores))


def subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """How long the longest common subsequence is."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i in range(len(one)):
        for j, word in enumerate(other):
            same = table[i][j] + 1 if one[i] == word else 0
            table[i + 1][j + 1] = max(same, table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_membership_is_that_of_a_loop(measured: BenchmarkScores) -> None:
    model = pico()
    for about in ("mia_forget", "mia_retain"):
        for i, row in enumerate(sets()[about, "test"]):
            ids = model.tokens(row["text"])
            with torch.no_grad():
                logs = model.module(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            logp = logs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            mu = (logs.exp() * logs).sum(-1)
            sigma = ((logs.exp() * logs**2).sum(-1) - mu**2).sqrt()
            count = max(1, int(0.2 * len(logp)))
            assert count == 1
            expected = {
                "loss": -logp.mean(),
                "zlib": -logp.mean() / len(zlib.compress(row["text"].encode())),
                "mink": -logp.min(),
                "minkpp": -((logp - mu) / sigma).min(),
            }
            for name, value in expected.items():
                found = measured.values[f"{about}/{name}"][i]
                assert found == pytest.approx(float(value), rel=1e-4), name


def test_zlib_falls_with_what_does_not_compress(tmp_path: Path) -> None:
    """The same loss on more bytes is less: a uniform model."""
    model = pico()
    model.module.lm_head.weight.data.zero_()
    rows = [{"text": " ".join(["w1"] * 30)}, {"text": " ".join(f"w{i}" for i in range(30))}]
    found = rwku.score_membership(model, only(tmp_path, "mia_forget", rows), "mia_forget")
    assert found["loss"] == pytest.approx([math.log(64)] * 2)
    assert found["zlib"][0] > found["zlib"][1] > 0
    assert found["mink"] == pytest.approx([math.log(64)] * 2)


def test_letters_and_choices_by_a_loop(measured: BenchmarkScores) -> None:
    model, right, true = pico(), [], []
    for row in sets()["utility_general", "test"]:
        listed = "w1 w2\nA. w3\nB. w4\nC. w5\nD. w6"
        prompt = rwku.PROMPTS["exam"].format("world religions") + f"Question: {listed}\nAnswer: C\n\n"
        prompt += f"{rwku.PROMPTS['follow']}Question: {listed} Answer:"
        logs = [scored(model, prompt, f" {letter}") for letter in "ABCD"]
        right.append(float(logs.index(max(logs)) == row["answer"]))
    assert measured.values["general"] == right
    (primer,) = rwku.prime_questions(["w9"])
    assert primer.startswith("Q: What is human") and primer.count("\nA: ") == 6
    assert primer.endswith("Barcelona, Spain.\n\nQ: w9")
    for row in sets()["utility_truthfulness", "test"]:
        prompt = f"{rwku.prime_questions([row['question']])[0]} A:"
        logs = [scored(model, prompt, f" {text}") for text in row["mc1_targets"]["choices"]]
        true.append(float(logs[1] > max(logs[0], logs[2])))
    assert measured.values["truthfulness"] == true


def scored(model: Subject, prompt: str, answer: str) -> float:
    before, ids = model.tokens(prompt), model.tokens(prompt + answer)
    cut = max(0, len(ids) - 1 - model.max_length)
    with torch.no_grad():
        logs = model.module(torch.tensor([ids[cut:]])).logits[0].log_softmax(-1)
    return sum(float(logs[i - cut - 1, ids[i]]) for i in range(len(before), len(ids)))


@pytest.mark.parametrize(("gold", "expected"), [(0, 1.0), (1, 0.0)])
def test_choices_of_a_model_that_finds_all_alike(tmp_path: Path, gold: int, expected: float) -> None:
    """The first letter is taken; MC1 wants the true choice strictly likelier."""
    model = pico()
    model.module.lm_head.weight.data.zero_()
    (row, *_) = sets()["utility_general", "test"]
    rows = [{**row, "answer": gold}]
    assert rwku.measure_mmlu(model, only(tmp_path / "a", "utility_general", rows)) == [expected]
    labels = [int(i == gold) for i in range(2)]
    rows = [{"question": "w1", "mc1_targets": {"choices": ["w1", "w2"], "labels": labels}}]
    assert rwku.measure_truthfulqa(model, only(tmp_path / "b", "utility_truthfulness", rows)) == [0]
    shorter = [{"question": "w1", "mc1_targets": {"choices": ["w1 w2", "w3"], "labels": [0, 1]}}]
    asked_for = only(tmp_path / "c", "utility_truthfulness", shorter)
    assert rwku.measure_truthfulqa(model, asked_for) == [1]  # sums, so fewer tokens are likelier


def test_reasons_facts_and_free_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to w0, w1, w2 and w3 in turn."""
    said = ("so the answer is w0. So the answer is w9.", "the W1!", "The answer is w2", "")
    seen = saying(monkeypatch, *said)
    assert rwku.measure_bbh(pico(), asked(folder)) == [1, 1, 0, 0]
    assert seen[2] == f"w1 w2\n\n{rwku.PROMPTS['reason']}\nQ: w2 A:"
    seen = saying(monkeypatch, "w0", "The w1 w2 w3.", "w9", "")
    assert rwku.measure_triviaqa(pico(), asked(folder)) == [1, pytest.approx(0.8), 0, 0]
    assert seen[0] == f"{rwku.PROMPTS['trivia']}Q: w0\nA:"
    seen = saying(monkeypatch, "a b a b a", "a", "", "a b c d")
    pairs, triples = 1.0, math.log2(3) - 2 / 3  # 2 of each; 2 and 1
    assert rwku.measure_fluency(pico(), asked(folder)) == pytest.approx(
        [(2 / 3 * pairs + 4 / 3 * triples) / 2, 0, 0, (2 / 3 * math.log2(3) + 4 / 3) / 2]
    )
    assert seen[0] == "Instruction: w0 w5\n"


def test_entropy_of_a_text_without_repeats() -> None:
    """All n-grams differ: log2 of their number."""
    text = " ".join(f"w{i}" for i in range(50))
    assert rwku.measure_entropy(text) == pytest.approx(math.log2(49) / 3 + 2 * math.log2(48) / 3)
    assert rwku.measure_entropy("no, no.") == pytest.approx(math.log2(3) / 3 + 2 / 3)


def test_an_answer_that_is_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, "the answer is (B).")
    rows = [{"question": "q", "cot": "c", "answer": ["A", "b"]}]
    assert rwku.measure_bbh(pico(), only(tmp_path / "a", "utility_reason", rows)) == [1]
    rows = [{"question": "q", "cot": "c", "answer": "ab"}]  # not one of its characters
    assert rwku.measure_bbh(pico(), only(tmp_path / "b", "utility_reason", rows)) == [0]


def test_words_and_conclusions() -> None:
    assert rwku.normalise_words("The (big) Apple, an a-b") == ["big", "apple", "ab"]
    assert rwku.find_conclusion("First. So the answer is 4 x. Then the answer is 5.") == "4 x"
    assert rwku.find_conclusion(" all of it ") == "all of it"
    assert rwku.find_conclusion("  ") == "NOANSWER"
    assert rwku.score_f1("", "the") == 1  # nothing against nothing
    assert rwku.score_f1("w1 w1", "w1") == pytest.approx(2 / 3)


def test_recall_in_any_script() -> None:
    truths = ["Maine", "Portland, Maine", "Лев Толстой", "東京", "U.S.A."]
    assert rwku.score_recall(truths, truths) == [1] * 5
    assert rwku.score_recall(["It is Maine. Yes"], ["Maine"]) == [1]
    assert rwku.score_recall(["maine"], ["Maine"]) == [0]
    assert rwku.score_recall(["Толстой", ""], ["Лев Толстой", "a"]) == [0.5, 0]


def test_answers_end_with_the_line_and_empty_ones_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def write(model: Any, prompts: Sequence[str], new: int, **given: Any) -> list[str]:
        kept.append((new, given["stops"]))
        return ["", "w11 x", "x"] + [""] * (len(prompts) - 3)

    monkeypatch.setattr(base, "write_continuations", write)
    found = rwku.measure_probes(pico(), asked(folder), "neighbor", (1, 2))
    assert kept == [(30, ("\n",))]
    assert found["empty"] == [1, 0, 0, 1, 1, 1, 1, 1]
    assert found["all"] == [0, 0.5, 0, 0, 0, 0, 0, 0] == found["level1"] + found["level2"]


def test_a_chat_template_and_a_template(folder: Path) -> None:
    model = pico()
    chat = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}"
    model.tokenizer.chat_template = chat + "{% if add_generation_prompt %}<bot>\n{% endif %}"
    for row, level, expected in (
        ("simple", 1, f"<user>{rwku.PROMPTS['blank']}Question: q\n</user><bot>\nAnswer:"),
        ("simple", 2, f"<user>{rwku.PROMPTS['brief']}Question: q\n</user><bot>\nAnswer:"),
        ("role playing", 3, f"<user>{rwku.PROMPTS['brief']}Question: q\n</user><bot>\nAnswer:"),
        ("incontext learning", 3, f"<user>{rwku.PROMPTS['brief']}q\n</user><bot>\nAnswer:"),
        ("affirmative suffix", 3, f"<user>{rwku.PROMPTS['brief']}Question: q</user><bot>\n"),
    ):
        made = rwku.pose_probe({"query": "q", "type": row}, level)
        assert rwku.pose_question(model, asked(folder), "q", *made) == expected
        own = asked(folder, template="ask {question} now")
        assert rwku.pose_question(model, own, "q", *made) == "ask q now"


def test_one_person(folder: Path, measured: BenchmarkScores) -> None:
    """The rows about each, and no other; a limit counts these."""
    each = [rwku.run_rwku(pico(), asked(folder, person)) for person in PEOPLE]
    for name, found in measured.metrics.items():
        values = [one.metrics[name]["value"] for one in each]
        assert found["value"] == pytest.approx(np.mean(values)), name
        assert found["n"] == sum(one.metrics[name]["n"] for one in each)
    few = rwku.read_people(asked(folder, PEOPLE[1], limit=1), "forget_level3", {})
    assert [(row["subject"], row["type"]) for row in few] == [(PEOPLE[1], ATTACKS[0])]


def test_a_person_that_is_not_there(folder: Path) -> None:
    with pytest.raises(SrmuError) as error:
        rwku.run_rwku(pico(), asked(folder, "Ada Blye"))
    place = f"{folder}, config forget_level1, split test: nothing about 'Ada Blye'"
    assert str(error.value) == f"{place}; did you mean Ada Bly?"


@pytest.mark.parametrize(
    ("config", "changed", "said"),
    [
        ("forget_level2", {"query": None}, "'query': Input should be a valid string"),
        ("forget_level3", {"type": " "}, "'type': String should have at least 1 character"),
        ("mia_retain", {"text": ""}, "'text': String should have at least 1 character"),
        ("utility_general", {"answer": 4}, "'answer': Value error, expected the place of one of"),
        ("utility_general", {"examples": None}, "'examples': Input should be a valid list"),
        ("utility_general", {"task": 5}, "'task': Input should be a valid string"),
        ("utility_reason", {"answer": 5}, "'answer': Input should be a valid string"),
        ("utility_reason", {"answer": []}, "'answer': Input should be a valid string"),
        ("utility_truthfulness", {"mc1_targets": "w1"}, "'mc1_targets': Input should be a valid dict"),
        (
            "utility_truthfulness",
            {"mc1_targets": {"choices": ["w1", "w2"], "labels": [1, 1]}},
            "'mc1_targets': Value error, expected choices with labels",
        ),
        ("utility_factuality", {"answers": "w1"}, "'answers': Input should be a valid list"),
    ],
)
def test_bad_fields(tmp_path: Path, config: str, changed: dict[str, Any], said: str) -> None:
    rows = [{**row, **changed} for row in sets()[config, "test"]]
    where = only(tmp_path, config, rows)
    measure = {
        "forget_level2": lambda *given: rwku.measure_probes(*given, "forget", (2,)),
        "forget_level3": lambda *given: rwku.measure_probes(*given, "forget", (3,)),
        "mia_retain": lambda *given: rwku.score_membership(*given, "mia_retain"),
    }.get(config) or rwku.UTILITY[config.removeprefix("utility_")]
    with pytest.raises(SrmuError) as error:
        measure(pico(), where)
    assert f"config {config}, split test, row 1: field {said}" in str(error.value)


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    tables: Sets = {key: rows for key, rows in sets().items() if "fluency" not in key[0]}
    with pytest.raises(SrmuError, match=r"config utility_fluency, split test cannot be read"):
        rwku.run_rwku(pico(), asked(write_sets(tmp_path / "set", tables), limit=1))


def test_a_model_that_is_not_a_number(folder: Path) -> None:
    module = pico_module()
    module.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(SrmuError, match=r"rwku mia forget: .* not a number \(NaN\)"):
        rwku.score_membership(Subject(module, word_tokenizer()), asked(folder), "mia_forget")


def test_texts_of_no_token(tmp_path: Path) -> None:
    model = pico()
    model._known = lambda text: (1,)
    with pytest.raises(SrmuError, match="no text has two tokens"):
        rwku.score_membership(model, only(tmp_path, "mia_forget", [{"text": "w1"}]), "mia_forget")


def test_an_unlearned_model_may_be_silent(folder: Path) -> None:
    module = pico_module()
    module.lm_head.bias = torch.nn.Parameter(torch.eye(64)[2] * 1e4)
    found = rwku.run_rwku(edited(module), asked(folder, limit=1)).metrics
    for name in ("forget/empty", "neighbor/empty"):
        assert found[f"rwku/{name}"]["value"] == 1
    for name in ("forget/all", "neighbor/all", "reason", "factuality", "fluency"):
        assert found[f"rwku/{name}"]["value"] == 0


def test_the_same_again(folder: Path) -> None:
    given = asked(folder, limit=1)
    assert rwku.run_rwku(pico(), given) == rwku.run_rwku(pico(), given)
    assert len(given.seen) == 12
