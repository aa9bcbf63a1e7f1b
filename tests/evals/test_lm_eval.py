"""Scores against a loop written by hand, and what evaluation must leave alone."""

import json
import logging
import random
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.models import ARCHITECTURES, VOCABULARY, pico_module, word_tokenizer
from srmu.engine import likelihoods
from srmu.errors import SrmuError
from srmu.evals import lm_eval
from srmu.evals.lm_eval import evaluate
from srmu.evals.subject import Question

WORDS = ["<eos>", "<unk>", "gold", *(f"w{i}" for i in range(30)), "?"]
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@pytest.fixture
def model():
    return llama()


def llama(tied: bool = False) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.5,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config)


def questions(count: int, option_words: int = 1, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS[3:-1], k=length))

    return [
        {
            "question": f"{text(draw.randint(2, 12))} ?",
            "options": [text(draw.randint(1, option_words)) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(count)
    ]


def write_task(folder: Path, rows: list[dict], name: str = "quiz", extra: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines)
    (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=f"{name}.jsonl") + extra)
    return folder


def naive_accuracy(model, tokenizer, rows: list[dict]) -> float:
    """One option at a time, without padding."""
    right = 0
    for row in rows:
        scores = []
        for option in row["options"]:
            start = tokenizer.encode(row["question"])
            whole = tokenizer.encode(row["question"] + " " + option)
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logs[i - 1, whole[i]].item() for i in range(len(start), len(whole))))
        right += int(np.argmax(scores)) == row["answer"]
    return right / len(rows)


def count_rows(model) -> list[int]:
    """The number of sequences of each forward pass, as they happen."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def use_builtin(monkeypatch, folder: Path) -> None:
    """Stand-in for lm-eval's 14,000 tasks, which take seconds to list."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=folder)
    monkeypatch.setattr(lm_eval, "_builtin_tasks", lambda: manager)


# --- the numbers


def measured(found: dict[str, Any]) -> dict[str, Any]:
    """The only entry without what the record says of how it was asked."""
    ((name, entry),) = found.items()
    assert name == "quiz/acc"
    how = {"version", "prompt", "answers"}
    assert how <= set(entry)
    return {key: value for key, value in entry.items() if key not in how}


@pytest.mark.parametrize("option_words", [1, 3])
def test_matches_a_loop_at_every_batch_size(model, tokenizer, tmp_path, option_words, monkeypatch):
    rows = questions(60, option_words)
    tasks_dir = write_task(tmp_path / "tasks", rows)
    p = naive_accuracy(model, tokenizer, rows)
    assert 0.1 < p < 0.6
    for batch_size in (1, 7, 64):
        monkeypatch.setattr(lm_eval, "BATCH", batch_size)
        found = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir)
        entry = measured(found)
        assert entry == {"value": p, "stderr": pytest.approx(sqrt(p * (1 - p) / 59)), "n": 60}
        assert all(type(v) in (int, float) for v in entry.values())
        answers = found["quiz/acc"]["answers"]
        assert (len(answers), answers.count("1") / 60) == (60, p)


def test_one_word_options_share_a_forward(model, tokenizer, tmp_path):
    seen = count_rows(model)
    evaluate(model, tokenizer, ["quiz"], tasks_dir=write_task(tmp_path / "tasks", questions(20)))
    assert seen == [20]


def test_model_that_prefers_gold_is_always_right(model, tokenizer, tmp_path):
    rows = questions(10)
    for row in rows:
        row["options"][row["answer"]] = "gold"
    rig = torch.eye(len(WORDS))[WORDS.index("gold")] * 1000
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + rig)
    found = evaluate(model, tokenizer, ["quiz"], tasks_dir=write_task(tmp_path / "tasks", rows))
    assert measured(found) == {"value": 1.0, "stderr": 0.0, "n": 10}


def test_limit_takes_the_first_questions(model, tokenizer, tmp_path):
    rows = questions(30)
    tasks_dir = write_task(tmp_path / "tasks", rows)
    found = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir, limit=7)["quiz/acc"]
    assert (found["value"], found["n"]) == (naive_accuracy(model, tokenizer, rows[:7]), 7)
    one = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir, limit=1)
    assert measured(one).keys() == {"value", "n"}  # one question has no standard error


def test_group_gives_itself_and_its_tasks(model, tokenizer, tmp_path, monkeypatch):
    parts = {"part_a": questions(10), "part_b": questions(30, seed=1)}
    for name, rows in parts.items():
        write_task(tmp_path / "builtin", rows, name)
        file = tmp_path / "builtin" / f"{name}.jsonl"
        (tmp_path / "builtin" / f"{name}.yaml").write_text(YAML.format(name=name, file=file))
    (tmp_path / "builtin" / "all.yaml").write_text(
        "group: all\ntask: [part_a, part_b]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    use_builtin(monkeypatch, tmp_path / "builtin")
    found = evaluate(model, tokenizer, ["all", "part_a"])  # lm-eval alone refuses the overlap
    a, b = (naive_accuracy(model, tokenizer, rows) for rows in parts.values())
    assert {key: entry["n"] for key, entry in found.items()} == {"all/acc": 40, "part_a/acc": 10, "part_b/acc": 30}
    assert found["all/acc"]["value"] == pytest.approx((10 * a + 30 * b) / 40)
    assert (found["part_a/acc"]["value"], found["part_b/acc"]["value"]) == (a, b)
    assert found["all/acc"]["stderr"] > 0


def test_questions_about_one_fact_have_its_number(model, tokenizer, tmp_path):
    rows = [row | {"fact": f"about {i // 2}"} for i, row in enumerate(questions(6))]
    found = evaluate(model, tokenizer, ["quiz"], tasks_dir=write_task(tmp_path / "tasks", rows))
    assert found["quiz/acc"]["facts"] == [0, 0, 1, 1, 2, 2]


# --- what is left alone


def test_every_state_is_left_as_it_was(tokenizer, tmp_path, capfd, caplog, recwarn):
    model = llama(tied=True)
    model.train()
    model.model.layers[0].eval()
    # an edit that only the output head has, which tying again would undo
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    rows = questions(40)
    tasks_dir = write_task(tmp_path / "tasks", rows)
    expected = naive_accuracy(model, tokenizer, rows)

    def state() -> list:
        return [
            random.getstate(),
            str(np.random.get_state()),
            torch.get_rng_state().tolist(),
            [module.training for module in model.modules()],
            [id(parameter) for parameter in model.parameters()],
            [hash(tuple(p.flatten().tolist())) for p in model.parameters()],
            (tokenizer.pad_token, len(tokenizer), tokenizer.padding_side),
            logging.root.manager.disable,
            model.__dict__.keys(),
        ]

    before = state()
    found = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir)
    assert state() == before
    assert found["quiz/acc"]["value"] == expected
    with pytest.raises(SrmuError):
        evaluate(model, tokenizer, ["quiz", "broken"], tasks_dir=write_task(tasks_dir, [], "broken"))
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert not caplog.records
    assert not (tmp_path / "datasets").exists()
    assert not (tmp_path / "cache").exists()


def test_progress_counts_options(model, tokenizer, tmp_path):
    shown: list[str] = []

    @contextmanager
    def watch(label: str, total: int):
        shown.append(f"{label} {total}")
        yield lambda text: shown.append("tick")

    tasks_dir = write_task(tmp_path / "tasks", questions(5))
    evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir, watch=watch)
    assert shown == ["quiz 20"] + ["tick"] * 20


def test_changed_questions_are_noticed(model, tokenizer, tmp_path):
    rows = questions(40)
    for answer in range(4):
        same_length = [row | {"answer": answer} for row in rows]
        tasks_dir = write_task(tmp_path / "tasks", same_length)
        found = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir)
        assert found["quiz/acc"]["value"] == naive_accuracy(model, tokenizer, same_length)


# --- kept results


def test_kept_results_are_used_until_something_changes(model, tokenizer, tmp_path):
    seen = count_rows(model)
    rows = questions(10)
    tasks_dir = write_task(tmp_path / "tasks", rows)
    write_task(tasks_dir, questions(10, seed=1), "other")

    def runs(fingerprint: str | None = "a", **options) -> tuple[bool, dict]:
        seen.clear()
        options = {"tasks_dir": tasks_dir} | options
        found = evaluate(model, tokenizer, ["quiz"], fingerprint=fingerprint, **options)
        return bool(seen), found

    ran, first = runs()
    assert ran
    assert runs() == (False, first)
    assert runs(tasks_dir=tasks_dir.rename(tmp_path / "moved")) == (False, first)
    tasks_dir = tmp_path / "moved"
    write_task(tasks_dir, questions(10, seed=2), "other")
    assert runs() == (False, first)
    assert runs(fingerprint=None)[0]
    assert runs(fingerprint="b")[0]
    assert runs(limit=5)[0]
    assert runs(limit=6)[0]
    write_task(tasks_dir, rows, extra="description: 'w1 w2 '\n")
    assert runs()[0]
    write_task(tasks_dir, questions(10, seed=3))
    assert runs()[0]
    write_task(tasks_dir, rows)
    assert runs() == (False, first)


def test_a_local_folder_of_data_decides_the_score(model, tokenizer, tmp_path):
    """Not only what `data_files` names: a data set may be a folder, whose answers change."""
    rows = [row | {"answer": 0} for row in questions(20)]
    tasks_dir = write_task(tmp_path / "tasks", rows)
    (tasks_dir / "data").mkdir()
    data = tasks_dir / "quiz.jsonl"
    for path, kwargs in (("data", ""), (str(tasks_dir / "data"), ""), ("json", "dataset_kwargs: {data_dir: data}\n")):
        text = YAML.format(name="quiz", file="x").replace("dataset_path: json", f"dataset_path: {path}")
        lines = [line for line in text.splitlines() if "dataset_kwargs" not in line]
        (tasks_dir / "quiz.yaml").write_text("\n".join(lines) + f"\n{kwargs}")
        for answer in (1, 2):
            changed = [row | {"answer": answer} for row in rows]
            lines = "".join(json.dumps(row) + "\n" for row in changed)
            (tasks_dir / "data" / "test.jsonl").write_text(lines)
            found = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir, fingerprint=path)
            assert found["quiz/acc"]["value"] == naive_accuracy(model, tokenizer, changed)
    assert data.is_file()


# --- what a folder of tasks may hold


@pytest.mark.parametrize("folder", ["tasks", "tasks[1]", "what? *", "été ✓"])
def test_a_folder_of_tasks_and_its_files_may_have_any_name(model, tokenizer, tmp_path, folder):
    rows, name = questions(5), "a[1].jsonl"
    tasks_dir = write_task(tmp_path / folder, rows)
    write_task(tmp_path / "tasks1", questions(7, seed=1))
    (tasks_dir / "quiz.jsonl").rename(tasks_dir / name)
    write_task(tasks_dir, questions(9, seed=1), "a1")  # which the name matches as a pattern
    replaced("quiz.yaml", "quiz.jsonl", f'"{name}"')(tasks_dir)
    found = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir)
    assert found["quiz/acc"]["n"] == 5
    assert found["quiz/acc"]["value"] == naive_accuracy(model, tokenizer, rows)


def test_a_pattern_of_data_files(model, tokenizer, tmp_path):
    tasks_dir = write_task(tmp_path / "tasks", questions(5))
    write_task(tasks_dir, questions(3), "quiz2")
    replaced("quiz.yaml", "quiz.jsonl", '"quiz*.jsonl"')(tasks_dir)
    assert evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir)["quiz/acc"]["n"] == 8


def test_includes_groups_and_tags(model, tokenizer, tmp_path, monkeypatch):
    """As lm-eval --include_path takes them; a file that is not asked for may hold code, and copies are passed over."""
    use_builtin(monkeypatch, write_task(tmp_path / "builtin", questions(1), "other"))
    # where a group names what is not beside it, a run lists lm-eval's own folder again
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "builtin" / "manager.py"))
    tasks_dir = write_task(tmp_path / "tasks", questions(5))
    base = (tasks_dir / "quiz.yaml").read_text().replace("task: quiz\n", "")
    (tasks_dir / "quiz.yaml").unlink()
    (tasks_dir / "more").mkdir()
    (tasks_dir / "_base").write_text(base)
    (tasks_dir / "more" / "_again.yaml").write_text("include: ../_base\ntag: [easy]\n")
    for name in ("one", "two"):
        (tasks_dir / "more" / f"{name}.yaml").write_text(f"include: _again.yaml\ntask: {name}\n")
    (tasks_dir / "code.yaml").write_text("task: code\ndoc_to_text: !function utils.text\n")
    (tasks_dir / ".ipynb_checkpoints").mkdir()
    (tasks_dir / ".ipynb_checkpoints" / "one-checkpoint.yaml").write_text("task: one\n")
    inline = {"task": "three", **yaml.safe_load(base)}
    group = {"group": "all", "task": ["one", {"group": "inner", "task": ["two", inline]}]}
    metric = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (tasks_dir / "all.yaml").write_text(json.dumps(group | {"aggregate_metric_list": metric}))

    def ask(name: str) -> dict:
        found = evaluate(model, tokenizer, [name], tasks_dir=tasks_dir, fingerprint="a")
        return {key: entry["n"] for key, entry in found.items()}

    assert ask("one") == {"one/acc": 5}
    assert ask("easy") == {"one/acc": 5, "two/acc": 5}
    found = ask("all")
    assert {"one/acc", "two/acc", "all/acc"} <= set(found)
    assert sorted(found.values())[-1] == 15
    write_task(tasks_dir, questions(4))
    (tasks_dir / "quiz.yaml").unlink()
    assert max(ask("all").values()) == 12 and ask("easy") == {"one/acc": 4, "two/acc": 4}
    with pytest.raises(SrmuError, match=r"code\.yaml: !function utils\.text is code, which srmu does not run"):
        ask("code")


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"quiz/acc": {"n": 3}}', '{"a": {"value": NaN}}'])
def test_damaged_file_is_made_again(model, tokenizer, tmp_path, damage):
    tasks_dir = write_task(tmp_path / "tasks", questions(5))
    first = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir, fingerprint="a")
    (kept,) = (tmp_path / "cache" / "evals").iterdir()
    whole = kept.read_text()
    kept.write_text(damage)
    assert evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir, fingerprint="a") == first
    assert kept.read_text() == whole


# --- errors

GOOD = questions(1)[0]


def replaced(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "quiz.jsonl").unlink(), r"'quiz': its data file .*quiz\.jsonl does not exist"),
        (lambda d: (d / "quiz.jsonl").write_text('{"question": '), "'quiz' cannot be loaded: .*Error"),
        (lambda d: write_task(d, [GOOD, GOOD | {"answer": 4}]), "question 2: answer 4 is none of"),
        (replaced("quiz.jsonl", '"question"', '"prompt"'), "'quiz' cannot be loaded: .*question"),
        (replaced("quiz.yaml", "answer", "!function code.answer"), r"quiz\.yaml: !function code\.answer is code"),
        (replaced("quiz.yaml", "acc", "accuracy"), "'quiz' gives no finite number"),
        (replaced("quiz.yaml", "test_split: test", "test_split: dev"), "'quiz' cannot be loaded"),
        (replaced("quiz.yaml", "version: 1.0", "version: ["), r"task file .*quiz\.yaml: "),
        (lambda d: write_task(d / "more", questions(1)), r"task file .*quiz\.yaml: another file also has"),
        (
            replaced("quiz.yaml", "{data_files: {test: quiz.jsonl}}", "json"),
            r"quiz\.yaml: dataset_kwargs: expected keys",
        ),
        (replaced("quiz.yaml", "{test: quiz.jsonl}", "[3]"), "'quiz': its data file 3 does not exist"),
        (replaced("quiz.yaml", "task: quiz", "task: quiz\ninclude: quiz.yaml"), r"quiz\.yaml: it includes itself"),
        (replaced("quiz.yaml", "json\n", "org/unknown\n"), "'quiz' cannot be loaded: .*org/unknown"),
    ],
)
def test_broken_task_is_one_line(model, tokenizer, tmp_path, change, message):
    tasks_dir = write_task(tmp_path / "tasks", questions(5))
    change(tasks_dir)
    with pytest.raises(SrmuError, match=message) as caught:
        evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir)
    assert "\n" not in str(caught.value)


def test_unknown_task_names_the_nearest(model, tokenizer, tmp_path, monkeypatch):
    use_builtin(monkeypatch, write_task(tmp_path / "builtin", questions(1), "mmlu_virology"))
    tasks_dir = write_task(tmp_path / "tasks", questions(5), "testbed_hazard")
    seen = count_rows(model)
    for asked, meant in [("testbed_hazrd", "testbed_hazard"), ("mmlu_virolgy", "mmlu_virology")]:
        message = f"'{asked}' does not exist, did you mean {meant}.*testbed_hazard.*lm-eval ls"
        with pytest.raises(SrmuError, match=message):
            evaluate(model, tokenizer, ["testbed_hazard", asked], tasks_dir=tasks_dir)
    with pytest.raises(SrmuError, match=r"'xyz' does not exist; looked in the tasks folder \(none there\)"):
        evaluate(model, tokenizer, ["xyz"])
    assert not seen  # found out before anything ran


def test_unreachable_dataset_is_named(model, tokenizer, tmp_path, monkeypatch):
    folder = write_task(tmp_path / "builtin", questions(1))
    replaced("quiz.yaml", "json\n", "cais/wmdp\n")(folder)
    use_builtin(monkeypatch, folder)
    with pytest.raises(SrmuError, match=r"'quiz' cannot be loaded: .*cais/wmdp") as caught:
        evaluate(model, tokenizer, ["quiz"])
    assert "\n" not in str(caught.value)


def test_nan_is_an_error_and_not_an_accuracy(model, tokenizer, tmp_path):
    model.model.norm.weight.data.fill_(float("nan"))
    tasks_dir = write_task(tmp_path / "tasks", questions(5))
    with pytest.raises(SrmuError, match="'quiz': the model's output is not a number"):
        evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir, fingerprint="a")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(model, tokenizer, limit):
    with pytest.raises(SrmuError, match="expected 1 or more"):
        evaluate(model, tokenizer, ["quiz"], limit=limit)


# --- lm-eval's own numbers, at less cost


def asked(groups: int, longest: int = 3, start: int = 0, seed: int = 0) -> list[tuple]:
    """Requests as lm-eval makes them: (texts, tokens before, tokens of the answer).

    Contexts of 1 to 12 tokens after `start` tokens that all have in common; each has four answers
    of one token and four of up to `longest`.
    """
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return draw.choices(range(4, VOCABULARY), k=draw.randint(low, high))

    preamble, found = tokens(start, start), []
    for _ in range(groups):
        before = preamble + tokens(1, 12)
        answers = [tokens(1, 1) for _ in range(4)] + [tokens(1, longest) for _ in range(4)]
        found += [(("", str(answer)), before, answer) for answer in answers]
    return draw.sample(found, len(found))


def harness(module, batch_size: int = 64):
    from lm_eval.models.huggingface import HFLM

    return HFLM(module, tokenizer=word_tokenizer(), batch_size=batch_size)


def ours(lm, requests: list[tuple]) -> list[tuple]:
    pairs = [(before, answer) for _, before, answer in requests]
    return likelihoods.score_answers(lm.model, pairs, lm.max_length, batch_size=lm.batch_size)


def same(found: list[tuple], expected: list[tuple]) -> None:
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loglikelihoods_are_lm_evals(name, start):
    module = pico_module(name)
    lm, requests = harness(module), asked(8, start=start)
    with torch.no_grad():
        likeliest = module(torch.tensor([requests[0][1]])).logits[0, -1].argmax().item()
    requests.append((("", "likeliest"), requests[0][1], [likeliest]))
    seen = count_rows(module)
    found = ours(lm, requests)
    assert start == 0 or 1 in seen  # the start that all share is read once
    same(found, type(lm)._loglikelihood_tokens(lm, requests, disable_tqdm=True))
    assert found[-1][1]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 0.5, "sliding_window": 4}),
        ("mistral", {"sliding_window": 4}),
        ("llama", {"max_position_embeddings": 20}),  # long inputs lose their first tokens
    ],
)
def test_softcap_window_and_truncation(monkeypatch, name, changes, batch_size):
    cls, sizes = ARCHITECTURES[name]
    monkeypatch.setitem(ARCHITECTURES, name, (cls, sizes | changes))
    module = pico_module(name)
    for start in (0, 18):
        lm, requests = harness(module, batch_size), asked(8, 9, start)
        expected = type(lm)._loglikelihood_tokens(lm, requests, disable_tqdm=True)
        same(ours(lm, requests), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rolling_windows_are_lm_evals(name):
    from lm_eval.api.instance import Instance

    lm = harness(pico_module(name), 4)
    texts = [" ".join(f"w{i}" for i in random.Random(n).choices(range(60), k=n)) for n in (3, 70, 150)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    from srmu.evals.harness import Harness

    found = Harness(lm.model, word_tokenizer(), 4).loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, rel=1e-5)


def test_only_positions_that_predict_an_answer_meet_the_vocabulary(model, tokenizer, tmp_path):
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, args, logits: shapes.append(logits.shape[:2]))
    evaluate(model, tokenizer, ["quiz"], tasks_dir=write_task(tmp_path / "tasks", questions(20)))
    assert shapes == [(1, 20)]


def test_a_recurrent_model_is_left_to_lm_eval(tokenizer, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(vocab_size=len(WORDS), **sizes)).eval()
    rows = questions(5, 2)
    tasks_dir = write_task(tmp_path / "tasks", rows)
    found = evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir)["quiz/acc"]
    assert found["value"] == naive_accuracy(model, tokenizer, rows)


def test_option_without_a_token_is_refused(model, tokenizer, tmp_path):
    rows = [GOOD, GOOD | {"options": ["w1", "", "w2", "w3"]}]
    tasks_dir = write_task(tmp_path / "tasks", rows)
    with pytest.raises(SrmuError, match=r"an answer cannot be scored: 0 tokens after"):
        evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks_dir)


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(model, tokenizer, tmp_path):
    bare = deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(SrmuError, match="neither a bos_token nor an eos_token"):
        evaluate(model, bare, ["quiz"], tasks_dir=write_task(tmp_path / "tasks", [GOOD]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_plan_is_the_cheapest_cut(rows, most, setup):
    order = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
    tails = {row: 1 + sum(row) % len(row) for row in order}

    def cost(batch: list[tuple[int, ...]], shared: int) -> int:
        tokens = len(batch) * (max(map(len, batch)) - shared)
        return tokens + (shared + 2 * setup if shared else setup)

    def fits(batch: list[tuple[int, ...]], shared: int) -> bool:
        starts = {row[:shared] for row in batch}
        return len(starts) == 1 and all(shared <= len(row) - tails[row] for row in batch)

    cheapest = [0]
    for end in range(1, len(order) + 1):
        batches = [(at, order[at:end]) for at in range(max(0, end - most), end)]
        cheapest.append(
            min(
                cheapest[at] + cost(batch, shared)
                for at, batch in batches
                for shared in range(7)
                if fits(batch, shared)
            )
        )
    plan = likelihoods.plan_batches(tails, most, setup)
    assert [row for batch, _ in reversed(plan) for row in batch] == order
    assert all(len(batch) <= most and fits(batch, shared) for batch, shared in plan)
    assert sum(cost(batch, shared) for batch, shared in plan) == cheapest[-1]


# --- questions


def test_questions_are_what_the_harness_asks(tmp_path):
    """A task as MMLU's: the options in the prompt, letters as answers."""
    rows = [{"question": f"w{i} ?", "options": [f"w{i + j}" for j in range(4)], "answer": i % 4} for i in range(6)]
    folder = write_task(tmp_path / "tasks", rows)
    listed = "\\n".join(f"{x}. {{{{options[{i}]}}}}" for i, x in enumerate("ABCD"))
    config = (folder / "quiz.yaml").read_text()
    config = config.replace('"{{question}}"', f'"{{{{question}}}}\\n{listed}\\nAnswer:"')
    config = config.replace('"{{options}}"', "[A, B, C, D]")
    (folder / "quiz.yaml").write_text("description: 'Choose. '\n" + config)
    found = lm_eval.load_questions("quiz", folder)
    prompt = "Choose. w1 ?\nA. w1\nB. w2\nC. w3\nD. w4\nAnswer:"
    assert found[1] == Question(prompt, (" A", " B", " C", " D"), 1, "quiz 1")
    assert [question.gold for question in found] == [row["answer"] for row in rows]
    with pytest.raises(SrmuError, match="task 'quizz' does not exist, did you mean quiz"):
        lm_eval.load_questions("quizz", folder)
    text = (folder / "quiz.yaml").read_text().replace("multiple_choice", "generate_until")
    (folder / "quiz.yaml").write_text(text)
    with pytest.raises(SrmuError, match="not made of questions with options"):
        lm_eval.load_questions("quiz", folder)
