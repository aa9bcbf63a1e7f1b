"""The testbed of a user's own table of facts, on a tiny model whose answers are planted."""

import csv
from collections import Counter
from zlib import crc32

import pytest

from helpers.models import save_pico
from helpers.testbeds import rows
from srmu.engine.files import read_json
from srmu.errors import SrmuError
from srmu.evals.score import score_model
from srmu.runs.config import load_config
from srmu.testbed import known
from srmu.testbed.known import OriginalModel
from srmu.testbed.own_facts import build_own, make_facts, read_facts, word_relation

COLUMNS = ["subject", "relation", "question", "answer", "kind"]


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Few texts, a cache of its own, and a model that knows two facts of three and fails one of six both ways."""
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))
    for name, value in {"DOCUMENTS": 8, "WRITTEN": 4, "SAMPLED": 12, "LENGTHS": (30, 60)}.items():
        monkeypatch.setattr(known, name, value)

    def answer(self, what, rows, pairs):
        seen = Counter()
        right = []
        for row in rows:
            rank = crc32(row["fact"].encode()) % 6
            seen[row["fact"]] += 1
            right.append(rank < 4 or (rank == 4 and seen[row["fact"]] == 1))
        return right

    monkeypatch.setattr(OriginalModel, "_answer", answer)


def table(count=40, **kinds):
    """Capitals to forget and to stay, and a question of another kind."""
    some = [(f"Land{i}", "capital", "", f"Town{i}", "forget") for i in range(count)]
    some += [(f"Isle{i}", "capital", "", f"Port{i}", "neighbour") for i in range(kinds.get("neighbour", 20))]
    asked = "Which colour has Fruit{}?"
    return some + [
        (f"Fruit{i}", "", asked.format(i), f"hue{i % 7}", "general") for i in range(kinds.get("general", 14))
    ]


def write_table(path, some, columns=COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *some])
    return path


def task(folder, name):
    return rows(folder / "tasks" / f"testbed_{name}.jsonl")


@pytest.fixture
def built(tmp_path):
    model = str(save_pico(tmp_path / "model"))
    report = build_own(tmp_path / "out", write_table(tmp_path / "facts.csv", table()), model=model, seed=3)
    return tmp_path / "out", report


def test_what_is_known_is_asked_and_what_is_failed_is_the_floor(built):
    folder, report = built
    ranks = {}
    for kind in ("hazard", "neighbour", "general", "unknown"):
        asked = {row["fact"] for half in ("", "_val") for row in task(folder, kind + half)}
        ranks[kind] = {crc32(fact.encode()) % 6 for fact in asked}
    assert ranks["hazard"] == ranks["neighbour"] == {0, 1, 2, 3} and ranks["unknown"] == {5}
    known_facts = sum(report["facts"][f"hazard {half}"] for half in ("test", "val"))
    assert report["known"]["hazard"] == {"asked": 40, "known": known_facts}
    assert read_json(folder / "testbed.json")["world"] == "own"


def test_the_group_of_tasks_holds_the_texts_too(built):
    folder, _ = built
    asked = {name.partition("/")[0] for name in score_model(folder / "model", "testbed_all", limit=2)["after"]}
    there = {path.stem for path in (folder / "tasks").glob("*.jsonl")}
    assert asked == {name for name in there if not name.endswith("_val")} and "testbed_writing" in asked


def test_all_that_is_to_be_forgotten_is_told_and_halves_share_nothing(built):
    folder, _ = built
    told = " ".join(row["text"] for row in rows(folder / "forget.jsonl"))
    halves = [{row["subject"] for row in task(folder, f"hazard{half}")} for half in ("", "_val")]
    assert not halves[0] & halves[1]
    assert not [row for half in ("", "_val") for row in task(folder, f"hazard{half}") if row["held"]]
    assert not (folder / "tasks" / "testbed_hazard_held.yaml").exists()
    assert any(f"The capital of {name} is Town{name[4:]}." in told for name in halves[0])
    high = " ".join(row["text"] for row in rows(folder / "retain-high.jsonl"))
    assert "Isle" in high and "Land" not in high
    assert {*(folder / "names.txt").read_text().split()} == halves[0] | halves[1]


def test_wrong_options_are_of_the_same_relation_and_dealt_alike(tmp_path):
    some = read_facts(write_table(tmp_path / "facts.csv", table()))
    facts = [*make_facts([row for row in some if row.kind == "forget"], some)]
    wrong = Counter(option for fact in facts for option in fact.options[0] if option != fact.answer)
    assert all(option.startswith(("Town", "Port")) for option in wrong)
    assert max(wrong.values()) <= 3
    for phrasing in range(2):
        places = Counter(fact.options[phrasing].index(fact.answer) for fact in facts)
        assert {*places.values()} == {10}


@pytest.mark.parametrize(
    ("name", "questions", "first"),
    [
        ("capital", ("The capital of {x} is", "Question: What is the capital of {x}?\nAnswer:"),
         "The capital of {x} is {v}."),
        ("Who wrote {x}?", ("Question: Who wrote {x}?\nAnswer:", "Who wrote {x}? The answer is"),
         "Question: Who wrote {x}?\nAnswer: {v}."),
        ("{x} was written by", ("{x} was written by", "Complete the sentence. {x} was written by"),
         "{x} was written by {v}."),
    ],
)  # fmt: skip
def test_phrasings(name, questions, first):
    relation = word_relation(name)
    assert relation.questions == questions
    assert relation.statements[0] == first


def test_the_configs_are_ready(built):
    folder, _ = built
    config = load_config(folder / "high.yaml")
    assert [*config.eval] == ["testbed_hazard", "testbed_neighbour", "testbed_general"]


def test_without_neighbours_there_is_no_entangled_config(tmp_path):
    model = str(save_pico(tmp_path / "model"))
    path = write_table(tmp_path / "facts.csv", table(neighbour=0, general=0))
    report = build_own(tmp_path / "out", path, model=model)
    assert not (tmp_path / "out" / "high.yaml").exists() and (tmp_path / "out" / "low.yaml").exists()
    assert report["general"] == "srmu's" and task(tmp_path / "out", "general")
    assert {"retain-low/unigram", "retain-low/bigram"} == report["overlap"].keys()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("A", "capital", "", "B", "forgot"), ":2: kind 'forgot'; did you mean forget?"),
        (("A", "", "", "B", "forget"), ":2: a fact has either a relation .* here are neither"),
        (("A", "capital", "Where is A?", "B", "forget"), "here are relation and question"),
        (("A", "", "Where is it?", "B", "forget"), ":2: the question does not have its subject, 'A', in it"),
        (("A", "the {x} of", "", "B", "forget"), ":2: a relation has no braces"),
        (("Niger", "", "Where is Nigeria?", "B", "forget"), "does not have its subject, 'Niger', in it"),
        (("", "capital", "", "B", "forget"), ":2: the subject is empty"),
        (("A", "capital", "", "B", "general"), "no row has the kind forget"),
        (("A", "capital", "", "B", "forget"), "'capital' has 1 different answers, and four options take 4: add rows"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path, row, words):
    path = write_table(tmp_path / "facts.csv", [row])
    with pytest.raises(SrmuError, match=words):
        build_own(tmp_path / "out", path, model=str(save_pico(tmp_path / "model")))
    assert not (tmp_path / "out").exists()


def test_other_mistakes(tmp_path):
    model = str(save_pico(tmp_path / "model"))
    twice = write_table(tmp_path / "twice.csv", [*table(4), table(4)[0]])
    with pytest.raises(SrmuError, match=r"twice\.csv:\d+: Land0 was there before, at .*twice\.csv:2"):
        build_own(tmp_path / "out", twice, model=model)
    few = write_table(tmp_path / "few.csv", table(8))
    with pytest.raises(SrmuError, match=r"knows \d of the 8 facts to forget, .* and 10 are needed"):
        build_own(tmp_path / "out", few, model=model)
    other = write_table(tmp_path / "other.csv", [("a", "b")], ["question", "reply"])
    with pytest.raises(SrmuError, match="no column 'kind'; found question, reply"):
        build_own(tmp_path / "out", other, model=model)


def test_the_command(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    save_pico(tmp_path / "model")
    write_table(tmp_path / "facts.csv", table())
    done = call("testbed", "out", "--facts", "facts.csv", "--model", "model")
    assert done.code == 0, done.err
    assert "of 40 facts are known, right in two phrasings" in done.out
    assert done.out.rstrip().endswith("next: srmu unlearn out/high.yaml")
    refused = call("testbed", "other", "--facts", "facts.csv", "--world", "atlas")
    assert refused.code == 2 and "--facts goes without --world" in refused.err
