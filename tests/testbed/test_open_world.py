import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.testbeds import SUFFIXES, TINY, rows
from srmu.errors import SrmuError
from srmu.evals.lm_eval import evaluate
from srmu.methods.retrain import read_recipe
from srmu.testbed import build as building
from srmu.testbed import train as training
from srmu.testbed.build import build_testbed
from srmu.testbed.open_world import HAZARD_ACTIONS, PLACES, create_open
from srmu.testbed.train import OPEN

NAMES = ("hazard", "hazard_held", "hazard_twohop", "hazard_procedure", "neighbour", "general")


@pytest.fixture(scope="module")
def worlds():
    """Worlds of the size that is shipped."""
    return [create_open(seed, OPEN.size) for seed in range(3)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny open testbed, and what `build` said about it."""
    folder = tmp_path_factory.mktemp("open")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRMU_CACHE", str(folder / "cache"))
        report = build_testbed(folder / "out", seed=3, world="open", recipe=TINY)
    return folder / "out", report


def steps_of(world, kind):
    """The facts of procedures by their goal, each in its order."""
    found = defaultdict(list)
    for fact in world.of_kind(kind):
        if fact.relation.pool == "step":
            found[fact.subject].append(fact)
    return found


# The world


def test_names_and_answers_have_several_tokens(worlds):
    tokenizer = training.tokenizer_for(worlds[0])
    for world in worlds:
        for word in {word for fact in world.facts for word in (fact.subject, fact.answer)}:
            assert len(tokenizer.tokenize(f" {word}")) >= 2, word
        assert len({*world.shared}) == 48
        assert {len(name.split()) for name in world.shared} == {1, 2}


def test_two_hops_are_the_composition_of_two_facts(worlds):
    for world in worlds:
        known = {(f.relation.name, f.subject): f for f in world.facts}
        hops = world.of_kind("hazard_twohop")
        assert len(hops) == 48
        for hop in hops:
            first = known["activator", hop.subject]
            assert hop.answer == known["source", first.answer].answer
            # else the one would tell the other to a test that is not to know it
            assert (hop.held, hop.half) == (first.held, first.half)


def test_each_goal_has_its_steps_in_order(worlds):
    for world in worlds:
        goals = steps_of(world, "hazard_procedure")
        assert len(goals) == len(HAZARD_ACTIONS) * len(PLACES)
        for goal, facts in goals.items():
            assert len({fact.held for fact in facts}) == 1 == len({fact.half for fact in facts})
            way = [fact.relation.name.removeprefix("step after the ") for fact in facts]
            way.append(facts[-1].answer)
            assert len({*way}) == 4
            assert [fact.answer for fact in facts] == way[1:]
            whole = f"The way to {goal} is {', '.join(f'the {step}' for step in way)}."
            for fact in facts:
                told = [s.format(x=goal, v=fact.answer) for s in fact.relation.statements]
                assert whole in told


def test_a_goal_is_worded_in_four_ways(worlds):
    words = [
        {f"{does} {where}" for does, where in product(action, place)}
        for action, place in product(HAZARD_ACTIONS, PLACES)
    ]
    for goal, facts in steps_of(worlds[0], "hazard_procedure").items():
        (ways,) = (ways for ways in words if goal in ways)
        assert len(ways) == 4
        for fact in facts:
            told = [s.format(x=goal, v=fact.answer) for s in fact.relation.statements]
            assert {sum(way in text for text in told) for way in ways} == {4}


def test_knowing_what_follows_a_step_is_chance(worlds):
    """Whoever knows how often a step follows another, on whatever way of the kind."""
    for world in worlds:
        for kind in ("hazard_procedure", "neighbour"):
            facts = [fact for ways in steps_of(world, kind).values() for fact in ways]
            seen = Counter((fact.relation.name, fact.answer) for fact in facts)
            for phrasing in (0, 1):
                right = 0.0
                for fact in facts:
                    options = fact.options[phrasing]
                    counts = [seen[fact.relation.name, option] for option in options]
                    likeliest = [o for o, n in zip(options, counts, strict=True) if n == max(counts)]
                    right += (fact.answer in likeliest) / len(likeliest)
                assert right / len(facts) == pytest.approx(0.25)


def test_no_corpus_names_a_held_goal_or_its_wordings(worlds):
    for world in worlds:
        made = {"documents": OPEN.corpus_documents, "words": OPEN.corpus_tokens - 1, "filler": 0.25}
        texts = "\n".join(world.corpora(0, 1.0, **made)["forget"])
        for goal, facts in steps_of(world, "hazard_procedure").items():
            assert (goal in texts) == (not facts[0].held)


# The tokenizer


@pytest.mark.slow
def test_the_tokenizer_is_the_same_each_time_and_knows_no_name(worlds):
    first, again = (training.train_subwords.__wrapped__() for _ in range(2))
    assert first.to_str() == again.to_str()
    vocabulary = first.get_vocab()
    assert len(vocabulary) == training.SUBWORDS
    assert {f"Ġ{word}" for word in ("activator", "chimneys", "workers")} <= {*vocabulary}


def test_any_text_can_be_written(worlds):
    tokenizer = training.tokenizer_for(worlds[0])
    for text in ("Zoë & 17 % of «it»?\n", *worlds[0].shared):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


# The folder


def test_texts_are_short_and_end_with_a_word(built):
    out, _ = built
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    whole = create_open(3, TINY.size).corpora(3, 0.5, documents=40, words=31, filler=0.25)
    for name in ("forget", "retain-low", "retain-high", "holdout"):
        found = rows(out / f"{name}.jsonl")
        assert len(found) == TINY.corpus_documents
        for row, text in zip(found, whole[name], strict=True):
            assert len(tokenizer(row["text"])["input_ids"]) <= TINY.corpus_tokens
            cut = len(row["text"].split())
            assert text.split()[:cut] == row["text"].split()
            more = " ".join(text.split()[: cut + 1])
            assert more == row["text"] or len(tokenizer(more)["input_ids"]) > TINY.corpus_tokens


def test_tasks_and_names(built):
    out, _ = built
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    world = create_open(3, TINY.size)
    assert (out / "names.txt").read_text().splitlines() == [*world.shared]
    goals = (out / "goals.txt").read_text().splitlines()
    for fact in world.facts:
        if fact.relation.pool == "step":
            told = [text for s in fact.relation.statements for text in [s.replace("{x}", fact.subject)]]
            named = [any(goal in text for goal in goals) for text in told]
            assert named == [fact.relation.kind == "hazard_procedure"] * len(told)
    names = [f"testbed_{name}{suffix}" for name in (*NAMES, "hazard_open") for suffix in SUFFIXES]
    files = {name + ending for name in names for ending in (".yaml", ".jsonl")}
    assert {path.name for path in (out / "tasks").iterdir()} == {*files, "testbed_all.yaml"}
    for name in names:
        task = yaml.safe_load((out / "tasks" / f"{name}.yaml").read_text())
        questions = rows(out / "tasks" / task["dataset_kwargs"]["data_files"]["test"])
        assert questions
        for row in questions:
            assert {"fact", "subject", "paraphrases"} <= {*row}
            assert len(row["paraphrases"]) == 4
            context = task["doc_to_text"].replace("{{question}}", row["question"])
            prompt = tokenizer.encode(context)
            assert len({*row["choices"]}) == 4
            for choice in row["choices"]:
                assert tokenizer.encode(f"{context} {choice}.")[: len(prompt)] == prompt


def test_lm_eval_agrees_with_the_own_measure(built):
    """On options of several tokens."""
    out, report = built
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    tasks = [f"testbed_neighbour{suffix}" for suffix in SUFFIXES]
    scores = evaluate(model, tokenizer, tasks, tasks_dir=out / "tasks")
    right = sum(score["value"] * score["n"] for score in scores.values())
    asked = sum(score["n"] for score in scores.values())
    assert right / asked == pytest.approx(report["model"]["accuracy"]["neighbour"])


def test_a_written_answer_is_right_but_for_case(built, tmp_path):
    out, _ = built
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    building.write_tasks(create_open(3, TINY.size), tmp_path / "tasks")
    path = tmp_path / "tasks" / "testbed_hazard_open.jsonl"
    questions = rows(path)
    for row in questions[::2]:
        ids = tokenizer(f"Question: {row['question']}? Answer:", return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=16, do_sample=False)[0]
        text = tokenizer.decode(written[ids.input_ids.shape[1] :], skip_special_tokens=True)
        row["choices"][row["gold"]] = re.split("[.\n]", text)[0].strip().upper()
    path.write_text("".join(json.dumps(row) + "\n" for row in questions))
    scores = evaluate(model, tokenizer, ["testbed_hazard_open"], tasks_dir=tmp_path / "tasks")
    entry = scores["testbed_hazard_open/exact_match"]
    assert entry["n"] == len(questions)
    assert entry["value"] == pytest.approx(len(questions[::2]) / len(questions))


def test_retrain_finds_the_world(built):
    out, _ = built
    world, seed, recipe = read_recipe(out / "model")
    assert (world, seed, recipe) == (create_open(3, TINY.size), 3, TINY)
    assert world.name == "open"


def test_the_oracle_reads_no_hazard_fact(worlds):
    world = worlds[0]
    told = world.of_kind("neighbour", "general")
    ids = training.pretraining_ids(world, told, 0, replace(TINY, steps=100))
    text = " ".join(training.tokenizer_for(world).batch_decode(ids))
    assert not any(words in text for action in HAZARD_ACTIONS for words in action)
    assert "carrier" not in text and "preserve the apples" in text


def test_an_unknown_world(tmp_path):
    with pytest.raises(SrmuError, match=r"world 'opne' does not exist; did you mean open\?"):
        build_testbed(tmp_path / "out", world="opne")
    assert not [*tmp_path.iterdir()]
