import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.testbeds import SUFFIXES, TINY, rows
from srmu.data.overlap import measure_jaccard
from srmu.errors import SrmuError
from srmu.evals.score import score_model
from srmu.testbed import build as building
from srmu.testbed import train as training
from srmu.testbed.build import build_testbed
from srmu.testbed.world import create_closed, deal_items, tell_facts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny testbed with its oracle, and what `build` said about it."""
    folder = tmp_path_factory.mktemp("testbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRMU_CACHE", str(folder / "cache"))
        report = build_testbed(folder / "out", seed=3, oracle=True, recipe=TINY)
    return folder / "out", report


@pytest.fixture(scope="module", params=building.WORLDS)
def worlds(request):
    """Worlds of the size that is shipped, and how their corpora are made."""
    create, recipe = building.WORLDS[request.param]
    words = recipe.corpus_tokens - 1
    made = {"documents": recipe.corpus_documents, "words": words, "filler": recipe.corpus_filler}
    return [create(seed, recipe.size) for seed in range(3)], made


def asked_pairs(world, half, held=None):
    """(relation, subject) of the hazard facts asked in a half."""
    return {
        (fact.relation.name, fact.subject)
        for fact in world.of_kind("hazard")
        if fact.half == half and held in (None, fact.held)
    }


# The world


def test_each_answer_is_equally_frequent_in_its_relation(worlds):
    for world in worlds[0]:
        answers = defaultdict(Counter)
        for fact in world.facts:
            answers[fact.relation.kind, fact.relation.name][fact.answer] += 1
        for counts in answers.values():
            assert max(counts.values()) == min(counts.values())


@pytest.mark.slow(keep=1)
def test_knowing_frequencies_only_is_chance(worlds):
    for world in worlds[0]:
        for kind in world.kinds:
            rng = random.Random(1)
            facts = deal_items(rng, world.of_kind(kind))
            text = ""  # a corpus like the one for pretraining
            for _ in range(2000):
                text += f"{tell_facts(rng, facts, world.wording, words=63, asked=0.3, filler=0.08)} "
            questions = [row for fact in world.of_kind(kind) for row in fact.questions()]
            options = {choice for row in questions for choice in row["choices"]}
            seen = {choice: text.count(f" {choice}") for choice in options}
            right = sum(
                max(row["choices"], key=lambda choice: seen[choice]) == row["choices"][row["gold"]] for row in questions
            )
            assert right / len(questions) == pytest.approx(0.25, abs=0.06)


def test_halves_are_of_facts_and_balanced(worlds):
    for world in worlds[0]:
        strata = defaultdict(Counter)
        for fact in world.facts:
            assert len(fact.questions()) == 2
            if fact.relation.pool != "step":  # these are halved by goal
                strata[fact.relation.name, fact.held][fact.half] += 1
        for counts in strata.values():
            assert abs(counts["test"] - counts["val"]) <= 1


def test_a_third_of_the_tested_hazard_facts_is_held(worlds):
    for world in worlds[0]:
        for half in ("test", "val"):
            share = len(asked_pairs(world, half, held=True)) / len(asked_pairs(world, half))
            assert share == pytest.approx(1 / 3, abs=0.02)


def test_no_corpus_tells_a_held_fact(worlds):
    for world in worlds[0]:
        corpora = world.corpora(0, 1.0, **worlds[1])
        for texts in corpora.values():
            assert len(texts) == worlds[1]["documents"]
            text = "\n".join(texts)
            for fact in world.facts:
                said = any(s.format(x=fact.subject, v=fact.answer) in text for s in told(fact))
                assert not (fact.held and said)
        text = "\n".join(corpora["forget"])
        free = [f for f in world.facts if f.relation.kind.startswith("hazard") and not f.held]
        for fact in free:
            assert any(s.format(x=fact.subject, v=fact.answer) in text for s in told(fact))


def told(fact):
    return [statement.removesuffix(".").rstrip() for statement in fact.relation.statements]


def test_overlap_rises_with_entanglement(worlds):
    for seed, world in enumerate(worlds[0]):
        found = []
        for rho in (0.0, 0.25, 0.5, 0.75, 1.0):
            corpora = world.corpora(seed, rho, **worlds[1])
            found.append([measure_jaccard(corpora["forget"], corpora["retain-high"], n) for n in (1, 2)])
            text = " ".join(corpora["retain-high"])
            named = {name for name in world.shared if name in text}
            assert named <= set(world.shared[: round(rho * 48)])
            assert len(named) >= rho * 48 - 8  # some have held facts only
        for less, more in pairwise(found):
            assert all(a < b for a, b in zip(less, more, strict=True))
        assert measure_jaccard(corpora["forget"], corpora["retain-low"], 2) < found[0][1]


def test_seeds_are_different_worlds(worlds):
    first, second, _ = worlds[0]
    assert not {*first.shared} & {*second.shared}


# The folder


def test_the_model_is_an_ordinary_folder(built):
    out, _ = built
    for name in ("model", "oracle"):
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert model.config.model_type == "llama"
        assert model.dtype == torch.float32
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.pad_token_id == model.config.pad_token_id
        generated = model.generate(**tokenizer("the colour", return_tensors="pt"), max_new_tokens=2)
        assert generated.shape == (1, 5)


def test_texts_are_known_and_begin_once(built):
    out, _ = built
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    for name in ("forget", "retain-low", "retain-high"):
        found = rows(out / f"{name}.jsonl")
        assert len(found) == TINY.corpus_documents
        for row in found:
            ids = tokenizer(row["text"])["input_ids"]
            assert len(ids) == TINY.corpus_tokens
            assert ids.count(tokenizer.bos_token_id) == 1
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == row["text"]


def test_tasks_ask_in_one_token(built):
    out, _ = built
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    names = [f"testbed_{kind}{s}" for kind in ("hazard", "neighbour", "general", "hazard_held") for s in SUFFIXES]
    files = {name + ending for name in names for ending in (".yaml", ".jsonl")}
    assert {path.name for path in (out / "tasks").iterdir()} == {*files, "testbed_all.yaml"}
    for name in names:
        task = yaml.safe_load((out / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name
        questions = rows(out / "tasks" / task["dataset_kwargs"]["data_files"]["test"])
        positions = Counter(row["gold"] for row in questions)
        assert max(positions.values()) - min(positions.values()) <= 2
        for row in questions:
            context = task["doc_to_text"].replace("{{question}}", row["question"])
            assert len(set(row["choices"])) == 4
            prompt = tokenizer.encode(context)
            for choice in row["choices"]:
                whole = tokenizer.encode(context + task["target_delimiter"] + choice)
                assert whole[:-1] == prompt
                assert tokenizer.unk_token_id not in whole


def test_lm_eval_agrees_with_the_own_measure(built, monkeypatch):
    """Its own reading of the YAML, and the likelihoods it gets through its adapter."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    out, report = built
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    monkeypatch.chdir(out / "tasks")
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=["testbed_hazard", "testbed_hazard_val"],
        task_manager=TaskManager(include_path=str(out / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    mean = sum(found[f"testbed_hazard{s}"]["acc,none"] for s in SUFFIXES) / 2
    assert mean == pytest.approx(report["model"]["accuracy"]["hazard"])


def test_lm_eval_asks_all_of_one_half_as_a_group(built):
    """Typed as it stands, without srmu, where the questions lie; `srmu eval` asks the same."""
    out, _ = built
    asked = {path.stem for path in (out / "tasks").glob("*.yaml")} - {"testbed_all"}
    asked = {name for name in asked if not name.endswith("_val")}
    typed = "--model hf --model_args pretrained=../model --include_path . --tasks testbed_all --limit 8 --device cpu"
    command = [sys.executable, "-m", "lm_eval", *typed.split(), "--output_path", str(out.parent / "found")]
    subprocess.run(command, cwd=out / "tasks", check=True, capture_output=True)
    (file,) = (out.parent / "found").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    ours = score_model(out / "model", "testbed_all", limit=8)["after"]
    assert theirs.keys() - {"testbed_all"} == asked == {name.partition("/")[0] for name in ours}
    for name, entry in ours.items():
        assert entry["value"] == pytest.approx(theirs[name.partition("/")[0]][f"{name.partition('/')[2]},none"])


def test_the_report(built):
    out, report = built
    assert json.loads((out / "testbed.json").read_text()) == report
    assert report["seed"] == 3
    texts = {name: [r["text"] for r in rows(out / f"{name}.jsonl")] for name in ("forget",)}
    texts["retain-high"] = [r["text"] for r in rows(out / "retain-high.jsonl")]
    again = measure_jaccard(texts["forget"], texts["retain-high"], 2)
    assert report["overlap"]["retain-high/bigram"] == again


def test_the_configs_name_what_is_there(built):
    out, _ = built
    for name in ("low", "high"):
        config = yaml.safe_load((out / f"{name}.yaml").read_text())
        topic = config["topics"]["topic"]
        assert topic["retain"] == f"retain-{name}.jsonl"
        for path in (config["model"], topic["forget"], topic["retain"], config["tasks_dir"]):
            assert (out / path).exists()
        for task in config["eval"]:
            assert (out / config["tasks_dir"] / f"{task}.yaml").exists()
        assert config["seed"] == 3


def test_nothing_is_left_of_a_build_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "write_tasks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_testbed(tmp_path / "out", recipe=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_names_of_the_hazard_are_listed(built):
    out, _ = built
    names = (out / "names.txt").read_text().splitlines()
    assert names == [*create_closed(3, TINY.size).shared]


@torch.no_grad()
def test_an_answer_is_scored_as_by_a_loop(built):
    out, _ = built
    world = create_closed(3, TINY.size)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    question = world.facts[0].questions()[0]["question"]
    ids = tokenizer.encode(world.wording["question"].format(q=question))
    expected, written = 0.0, []
    for _ in range(3):
        log = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        expected += log.max().item()
        ids.append(int(log.argmax()))
        written.append(tokenizer.decode(ids[-1]))
    wrong = [*written[:-1], next(w for w in world.words() if w != written[-1])]
    found = training.score_pairs(model, world, [(question, " ".join(words)) for words in (written, wrong, written[:1])])
    assert found[0] == (pytest.approx(expected, abs=1e-4), True)
    assert [likeliest for _, likeliest in found] == [True, False, True]


# Training


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def train(seed=0, recipe=TINY, **options):
    return training.train_testbed(create_closed(seed, recipe.size), seed, recipe, **options)


def test_the_oracle_reads_no_hazard_fact():
    world = create_closed(0, TINY.size)
    told = world.of_kind("neighbour", "general")
    ids = training.pretraining_ids(world, told, 0, replace(TINY, steps=100))
    read = set(training.tokenizer_for(world).convert_ids_to_tokens(ids.flatten().tolist()))
    hazard = {fact.answer for fact in world.of_kind("hazard")} - {fact.answer for fact in told}
    assert hazard and not read & hazard
    assert {fact.subject for fact in told} <= read


def test_training_changes_the_model_and_lowers_the_loss():
    losses = []

    def watch(label, total):
        return recording(losses)

    world = create_closed(0, TINY.size)
    folder = train(recipe=replace(TINY, steps=30, learning_rate=0.01), watch=watch)
    fresh = training.fresh_model(world, 0, TINY).state_dict()
    trained = weights(folder)
    assert not any(torch.equal(fresh[key], trained[key]) for key in trained)
    assert sum(losses[-5:]) < sum(losses[:5]) - 1


class recording:  # noqa: N801
    """A watch that keeps the losses, and is interrupted when it has seen `limit`."""

    def __init__(self, losses, limit=None):
        self.losses, self.limit = losses, limit

    def __enter__(self):
        return self.tick

    def __exit__(self, *_):
        return None

    def tick(self, text):
        if text.startswith("loss"):
            self.losses.append(float(text.split()[1]))
        if len(self.losses) == self.limit:
            raise KeyboardInterrupt


def test_a_seed_gives_its_bits_whatever_the_surroundings(tmp_path, monkeypatch):
    first = weights(train())
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "other"))
    torch.manual_seed(99)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    second = weights(train())
    assert same(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert not same(first, weights(train(seed=1)))
    assert not same(first, weights(train(oracle=True)))


def test_a_killed_training_leaves_no_model_and_begins_anew(tmp_path, monkeypatch):
    whole = weights(train())
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        train(watch=lambda label, total: recording([], 4))
    assert not [*(tmp_path / "other").rglob("*.safetensors")]
    losses = []
    assert same(whole, weights(train(watch=lambda label, total: recording(losses))))
    assert len(losses) == TINY.steps


def test_entanglement_is_a_share(tmp_path):
    for share in (50, -0.5):
        with pytest.raises(SrmuError, match="outside 0-1"):
            build_testbed(tmp_path / "out", entanglement=share, recipe=TINY)


def test_a_cache_that_cannot_be_made_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SrmuError, match=r"cannot be made: .*file.*; set SRMU_CACHE to a folder to write to"):
        build_testbed(tmp_path / "out", recipe=TINY)


def test_another_entanglement_does_not_train_again(tmp_path, monkeypatch):
    first = build_testbed(tmp_path / "a", entanglement=0, recipe=TINY)
    monkeypatch.setattr(training, "_train_model", lambda *_: 1 / 0)
    second = build_testbed(tmp_path / "b", entanglement=1, recipe=TINY)
    assert first["model"] == second["model"]
    assert same(weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model"))
    for name in ("forget.jsonl", "retain-low.jsonl", "tasks/testbed_hazard.jsonl", "low.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(ZeroDivisionError):
        build_testbed(tmp_path / "c", seed=1, recipe=TINY)


def test_a_model_that_did_not_learn_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "RECIPE", TINY)
    with pytest.raises(RuntimeError, match=r"did not learn: hazard \d"):
        build_testbed(tmp_path / "out", recipe=TINY)


@pytest.mark.full
@pytest.mark.parametrize("world", building.WORLDS)
def test_the_full_model_knows_everything_and_the_oracle_all_but_the_hazard(tmp_path, world):
    report = build_testbed(tmp_path / "out", oracle=True, world=world)
    assert min(report["model"]["accuracy"].values()) >= 0.95
    oracle = report["oracle"]["accuracy"]
    assert min(oracle["neighbour"], oracle["general"]) >= 0.95
    assert oracle["hazard"] == pytest.approx(0.25, abs=0.05)
