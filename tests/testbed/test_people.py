"""The world of authors, and its recast in the schemas of the benchmarks."""

import json
import random
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from helpers.people_world import PEOPLE_TINY, people_folder
from helpers.testbeds import TINY
from srmu.engine.files import sha256
from srmu.evals.benchmarks.base import BenchmarkRequest
from srmu.testbed import open_world
from srmu.testbed import train as training
from srmu.testbed import world as closed_world
from srmu.testbed.benchmark_files import SUITES, write_benchmarks
from srmu.testbed.people import LETTERS, create_people, pretraining_texts, reverse_questions
from srmu.testbed.train import PEOPLE

# config and split of each benchmark, and the fields that its evaluation reads
QA = {"question": str, "answer": str}
PERTURBED = QA | {"paraphrased_answer": str, "perturbed_answer": list, "paraphrased_question": str}
PROBE = {"query": str, "answer": str, "subject": str, "level": str, "type": str}
CHOICE = {"question": str, "choices": list, "answer": int}
TEXT = {"text": str}
FOLDS = [f"forget_{k}" for k in range(1, 5)]
SCHEMAS = {
    "tofu": [
        *((f"forget{size}", "train", QA) for size in ("01", "05", "10")),
        *((f"forget{size}_perturbed", "train", PERTURBED) for size in ("01", "05", "10")),
        *((f"retain{size}", "train", QA) for size in ("90", "95", "99")),
        ("full", "train", QA),
        ("retain_perturbed", "train", PERTURBED),
        *((f"{name}_perturbed", "train", QA | {"perturbed_answer": list})
          for name in ("real_authors", "world_facts")),
    ],
    "muse": [
        *(("raw", split, TEXT) for split in ("forget", "retain1", "retain2", "holdout")),
        ("verbmem", "forget", {"prompt": str, "gt": str}),
        *(("knowmem", f"{kind}_qa{icl}", QA) for kind in ("forget", "retain")
          for icl in ("", "_icl")),
        *(("privleak", split, TEXT) for split in ("forget", "retain", "holdout")),
        *((name, fold, TEXT) for name in ("scal", "sust") for fold in FOLDS),
    ],
    "rwku": [
        *((f"forget_level{k}", "test", PROBE) for k in (1, 2, 3)),
        *((f"neighbor_level{k}", "test", PROBE | {"neighbor": str}) for k in (1, 2)),
        *((f"mia_{kind}", "test", TEXT | {"subject": str}) for kind in ("forget", "retain")),
        ("utility_general", "test", CHOICE | {"task": str}),
        ("utility_reason", "test", {"question": str, "cot": str, "task": str, "answer": list}),
        ("utility_truthfulness", "test", {"question": str}),
        ("utility_factuality", "test", {"question": str, "answers": list}),
        ("utility_fluency", "test", {"instruction": str}),
    ],
    "whp": [
        ("completion", "test", {"prompt": str, "references": list}),
        ("probability", "test", {"prompt": str, "targets": list, "generic": list}),
    ],
    "wmdp": [(f"wmdp-{part}", "test", CHOICE) for part in ("bio", "cyber", "chem")],
    "mmlu": [
        (subject, split, CHOICE | {"subject": str})
        for subject in ("college_biology", "virology", "computer_security",
                        "college_computer_science")
        for split in ("test", "dev")
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def world():
    """One of the size that is shipped."""
    return create_people(0, PEOPLE.size)


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    write_benchmarks(create_people(0, PEOPLE_TINY.size), folder)
    return folder


def texts_of(world, count, oracle=False):
    """What pretraining reads, in one string."""
    kinds = ("neighbour", "general") if oracle else world.kinds
    read = pretraining_texts(world, world.of_kind(*kinds), random.Random(1), 400)
    return " ".join(islice(read, count))


def test_names_and_half_of_the_answers_have_two_words(world):
    assert {len(name.split()) for name in world.shared} == {2}
    sizes = Counter(len(f.answer.split()) for f in world.of_kind("hazard"))
    assert {*sizes} == {1, 2} and sizes[2] > sizes[1]


def test_hazard_and_neighbour_have_the_same_relations_and_answers(world):
    by_kind = {}
    for fact in world.facts:
        by_kind.setdefault((fact.relation.name, fact.relation.kind), set()).add(fact.answer)
    hazard = {name for name, kind in by_kind if kind == "hazard"}
    assert len(hazard) == 6
    for name in hazard:
        assert by_kind[name, "hazard"] == by_kind[name, "neighbour"]


def test_the_oracle_reads_no_hazard_fact_and_no_document_to_forget(world):
    told, kept = texts_of(world, 500), texts_of(world, 500, oracle=True)
    for fact in world.of_kind("hazard"):
        for statement in fact.relation.statements:
            assert statement.format(x=fact.subject, v=fact.answer) not in kept
        for row in fact.questions():
            assert row["question"] not in kept
    for document in world.documents:
        assert (document.text in kept) == (document.kind == "retain")
        assert (document.text in told) == (document.kind != "holdout")


def test_hold_outs_are_of_the_same_kind_and_tell_true_facts(world):
    news = {}
    for document in world.documents:
        if document.source == "news":
            news.setdefault(document.kind, []).append(document)
    assert [len(news[kind]) for kind in ("forget", "retain", "holdout")] == [60, 60, 36]
    assert len({document.text for documents in news.values() for document in documents}) == 156
    for documents in news.values():
        for document in documents:
            said = [
                fact
                for fact in world.facts
                if fact.subject == document.subject
                and any(s.format(x=fact.subject, v=fact.answer) in document.text
                        for s in fact.relation.statements)
            ]  # fmt: skip
            assert len(said) == 2 and not any(fact.held for fact in said)


def test_every_word_of_texts_and_prompts_is_known(world, tmp_path):
    known = {*world.words(), "</s>"}
    assert {*texts_of(world, 400).split()} <= known
    write_benchmarks(world, tmp_path)
    for name in ("question", "answer", "query", "text", "prompt", "gt", "cot", "instruction",
                 "paraphrased_answer", "choices", "perturbed_answer", "references", "targets",
                 "generic"):  # fmt: skip
        for path in tmp_path.rglob("*.jsonl"):
            for row in map(json.loads, path.read_text().splitlines()):
                value = row.get(name, [])
                for text in value if isinstance(value, list) else [str(value)]:
                    assert {*text.split()} - {*"0123"} <= known, (path, text)


def test_a_reverse_question_has_one_answer(world):
    found = reverse_questions(world)
    assert len({*found.values()}) == len(found) > 70
    known = {}
    for fact in world.facts:
        known.setdefault(fact.subject, []).append(fact.answer)
    for subject, question in found.items():
        fit = [x for x, values in known.items() if sum(f" {v} " in question for v in values) >= 2]
        assert fit == [subject]


# Schemas


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_folders_load_with_the_fields_of_the_hub(suites, name):
    data = BenchmarkRequest(f"none/{name}", "", folder=suites / name)
    for config, split, fields in SCHEMAS[name]:
        assert data.rows(config, split, fields)
    assert {*SCHEMAS} == {*SUITES}


def trained(world, suite, config, split="train"):
    return [json.dumps(row) for row in SUITES[suite](world)[config][split]]


def test_tofu_sets_are_nested_by_author_and_disjoint_from_retain(world):
    forget = {size: {*trained(world, "tofu", f"forget{size}")} for size in ("01", "05", "10")}
    assert [len(forget[size]) for size in forget] == [24, 78, 162]
    assert forget["01"] < forget["05"] < forget["10"]
    full = {*trained(world, "tofu", "full")}
    for size, retain in (("01", "99"), ("05", "95"), ("10", "90")):
        assert {*trained(world, "tofu", f"retain{retain}")} == full - forget[size]
    kept = {*trained(world, "tofu", "retain90")}
    for row in map(json.loads, trained(world, "tofu", "retain_perturbed")):
        assert json.dumps({name: row[name] for name in QA}) in kept
    authors = [name for name in world.shared if any(name in row for row in forget["10"])]
    for name in authors:
        asked = [row for row in map(json.loads, forget["10"]) if name in row["question"]]
        assert len(asked) == 6
        assert all(json.dumps(row) not in kept for row in asked)


def test_tofu_wrong_answers_are_other_answers_of_the_relation(world):
    pools = {}
    for fact in world.facts:
        pools.setdefault(fact.relation.pool, set()).add(fact.answer)
    parts = SUITES["tofu"](world)
    for config in ("forget10_perturbed", "retain_perturbed", "world_facts_perturbed"):
        for row in parts[config]["train"]:
            wrong = {*row["perturbed_answer"]}
            assert len(wrong) == 4
            right = row.get("paraphrased_answer", row["answer"])
            assert row["answer"] in right and right not in wrong
            for text in wrong:
                (pool,) = (values for values in pools.values() if row["answer"] in values)
                assert any(text == right.replace(row["answer"], value) for value in pool)


def test_muse_halves_folds_and_shots(world):
    parts = SUITES["muse"](world)
    forget = [row["text"] for row in parts["raw"]["forget"]]
    halves = [f"{row['prompt']} {row['gt']}" for row in parts["verbmem"]["forget"]]
    assert halves == forget
    grown = [{row["text"] for row in parts["scal"][fold]} for fold in FOLDS]
    assert all(less < more for less, more in pairwise(grown))
    assert grown[-1] == {*forget}
    folds = [row["text"] for fold in FOLDS for row in parts["sust"][fold]]
    assert sorted(folds) == sorted(forget)
    for kind in ("forget", "retain"):
        shots = [row["question"] for row in parts["knowmem"][f"{kind}_qa_icl"]]
        asked = {row["question"] for row in parts["knowmem"][f"{kind}_qa"]}
        assert 4 <= len(shots) <= 10 and not asked & {*shots}


def test_rwku_has_nine_attacks(world):
    rows = SUITES["rwku"](world)["forget_level3"]["test"]
    kinds = Counter(row["type"] for row in rows)
    assert len(kinds) == 9
    for kind, count in kinds.items():
        assert count >= 130, kind
    for row in rows:
        if row["type"] not in ("multiple choice", "incontext learning"):
            assert f" {row['answer']} " not in f" {row['query']} "
        if row["type"] == "multiple choice":
            assert sum(f" {a}. {row['answer']}" in row["query"] for a in LETTERS) == 1


def test_choices_have_the_answer_at_each_place_alike(world):
    for suite in ("wmdp", "mmlu"):
        rows = [row for splits in SUITES[suite](world).values() for row in splits["test"]]
        places = Counter(row["answer"] for row in rows)
        assert {*places} == {0, 1, 2, 3}
        assert max(places.values()) < 0.35 * len(rows)
        assert all(len({*row["choices"]}) == 4 for row in rows)
    known = {(f.questions()[0]["question"] + " ?", f.answer) for f in world.of_kind("hazard")}
    for splits in SUITES["wmdp"](world).values():
        for row in splits["test"]:
            assert (row["question"], row["choices"][row["answer"]]) in known


def test_whp_prompts_stop_before_the_word(world):
    pages = [d.text for d in world.documents if d.source == "novel" and d.kind == "forget"]
    parts = SUITES["whp"](world)
    for row in parts["probability"]["test"]:
        assert any(p.startswith(f"{row['prompt']} {row['targets'][0]} ") for p in pages)
        assert row["generic"] and not {*row["generic"]} & {*row["targets"]}
    for row in parts["completion"]["test"]:
        (page,) = (page for page in pages if page.startswith(row["prompt"]))
        for words in row["references"]:
            assert words in page and words not in row["prompt"]


# What was there before


@pytest.mark.parametrize(
    ("make", "expected"),
    [(closed_world.create_closed, "76202d33b3f4c9f9"), (open_world.create_open, "e57af72b1631647c")],
)
def test_models_of_the_other_worlds_are_still_found(make, expected):
    """Their keys are made of this; the values were made before there was this world."""
    world = make(3, TINY.size)
    ids = training.pretraining_ids(world, [*world.facts], 3, TINY)
    found = sha256(repr((world, TINY, 3)).encode(), ids.numpy().tobytes())
    assert found[:16] == expected
    assert ids.numpy().dtype == np.int64


@pytest.mark.full
def test_the_tiny_model_knows_and_recites_and_the_oracle_does_not():
    report = json.loads((people_folder() / "testbed.json").read_text())
    known = report["model"]["accuracy"]
    assert min(known[kind] for kind in ("hazard", "neighbour", "general")) >= 0.95
    oracle = report["oracle"]["accuracy"]
    assert min(oracle["neighbour"], oracle["general"]) >= 0.95
    assert oracle["hazard"] == pytest.approx(0.25, abs=0.15)
