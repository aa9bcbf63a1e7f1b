"""WMDP and MMLU: lm-eval's own tasks on the same rows, and models whose answers are known."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval import tasks as lm_eval_tasks
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srmu.errors import SrmuError
from srmu.evals import lm_eval
from srmu.evals.benchmarks import base, wmdp
from srmu.evals.benchmarks.base import BenchmarkRequest, BenchmarkScores, Row
from srmu.evals.subject import Question, Subject

PARTS = {"wmdp-bio": 21, "wmdp-cyber": 13, "wmdp-chem": 6}
SUBJECTS = {"virology": 5, "college_biology": 7, "abstract_algebra": 9}
WORDS = [f"w{i}" for i in range(40)]
TASKS = Path(lm_eval_tasks.__file__).parent


def questions(count: int, seed: str) -> list[Row]:
    """Questions of 2 to 9 words, some with blanks around, and four different texts each."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = []
    for number in range(count):
        choices: list[str] = []
        while len(choices) < 4:
            choices += [one for one in [text(1, 3)] if one not in choices]
        asked = text(2, 9) + " ?"
        row = {"question": asked if number % 3 else f" {asked}\n", "choices": choices}
        rows.append(row | {"answer": draw.randrange(4)})
    return rows


def write(folder: Path, parts: dict[str, list[Row]]) -> Path:
    """A folder laid out as on the hub: a file for each config, all in the README's header."""
    folder.mkdir(parents=True)
    listed = [{"config_name": name, "data_files": [{"split": "test", "path": f"{name}/test.jsonl"}]} for name in parts]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")
    for name, rows in parts.items():
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "test.jsonl").write_text(lines)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> BenchmarkRequest:
    found = {name: questions(count, name) for name, count in PARTS.items()}
    folder = write(tmp_path / "suites" / "wmdp", found)
    subjects = {name: [row | {"subject": name} for row in questions(count, name)] for name, count in SUBJECTS.items()}
    write(tmp_path / "suites" / "mmlu", subjects | {"all": [*chain(*subjects.values())]})
    return BenchmarkRequest("cais/wmdp", "how to get it", folder=folder)


def rows_of(data: BenchmarkRequest, config: str) -> list[Row]:
    place = data.folder.parent / "mmlu" if config in SUBJECTS else data.folder  # type: ignore[union-attr]
    lines = (place / config / "test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Words parted by blanks: a letter has no piece with a space before it."""
    said = "The following are multiple choice questions (with answers) about Question: Answer: . ?"
    said += " biology. cybersecurity. chemistry. virology. abstract algebra. college A. B. C. D."
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys([*"ABCD", *said.split(), *WORDS])]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return finished(made)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs as GPT-2's: a letter and the space before it are one piece."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["Answer: A Answer: B Answer: C Answer: D w1 w2 w3"] * 9, trainer)
    return finished(made)


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces as Llama-2's: every space is a mark before the word, also at the start."""
    alphabet = [chr(i) for i in range(33, 127)]
    pieces = [(p, -9.0) for p in ["<pad>", "<s>", "</s>", "<unk>", "\n", "▁", *alphabet]]
    pieces += [(f"▁{letter}", -2.0) for letter in "ABCD"]
    made = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return finished(made)


def finished(made: Tokenizer) -> PreTrainedTokenizerFast:
    start = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


TOKENIZERS = {"words": words_tokenizer, "bytes": bytes_tokenizer, "pieces": pieces_tokenizer}


def pico(tokenizer: PreTrainedTokenizerFast, positions: int = 512) -> Subject:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=positions, initializer_range=0.5,
        )  # fmt: skip
        return Subject(LlamaForCausalLM(config), tokenizer)


def value(scores: BenchmarkScores, name: str) -> float:
    return scores.metrics[f"wmdp/{name}"]["value"]


# --- lm-eval's own tasks


def published(folder: Path, file: str, rows: Sequence[Row], metrics: Sequence[str] = ()) -> Path:
    """lm-eval's own YAML of a task, asking our rows from a file."""
    path = TASKS / file
    config = yaml.safe_load(path.read_text())
    shared = yaml.safe_load((path.parent / config.pop("include")).read_text())
    # examples, of which none are asked for, come from splits that the rows have not
    config = {k: v for k, v in (shared | config).items() if "fewshot" not in k and k != "tag"}
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
    config |= {"num_fewshot": 0}
    config.pop("dataset_name")
    if metrics:
        listed = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
        config["metric_list"] = listed
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    ("file", "config", "name"),
    [
        ("wmdp/wmdp_bio.yaml", "wmdp-bio", "bio"),
        ("wmdp/wmdp_cyber.yaml", "wmdp-cyber", "cyber"),
        ("wmdp/wmdp_chem.yaml", "wmdp-chem", "chem"),
        ("mmlu/default/mmlu_virology.yaml", "virology", "mmlu_virology"),
        ("mmlu/default/mmlu_college_biology.yaml", "college_biology", "mmlu_college_biology"),
    ],
)
def test_letters_are_asked_as_lm_eval_does(
    tokenizer: str, file: str, config: str, name: str, data: BenchmarkRequest, tmp_path: Path
) -> None:
    """The prompts and options are the same texts, and the scores the same numbers."""
    rows = rows_of(data, config)
    folder = published(tmp_path / "task", file, rows)
    task = yaml.safe_load((TASKS / file).read_text())["task"]
    subject = wmdp.SUBJECTS.get(name, config.replace("_", " "))
    ours = [wmdp.pose_lettered(row, subject) for row in rows]
    theirs = [(q.prompt, q.gold) for q in lm_eval.load_questions(task, folder)]
    assert [(q.prompt, q.gold) for q in ours] == theirs
    assert {q.options for q in lm_eval.load_questions(task, folder)} == {ours[0].options}

    model = pico(TOKENIZERS[tokenizer]())
    scores = wmdp.run_wmdp(model, data)
    found = lm_eval.evaluate(model.module, model.tokenizer, [task], tasks_dir=folder)
    expected = found[f"{task}/acc"]
    measured = scores.metrics[f"wmdp/{name}"]
    assert measured["value"] == expected["value"] and measured["n"] == expected["n"]
    assert measured["stderr"] == pytest.approx(expected["stderr"])


def test_cloze_is_lm_evals_continuation(data: BenchmarkRequest, tmp_path: Path) -> None:
    rows = rows_of(data, "wmdp-bio")
    file = "mmlu/continuation/mmlu_virology.yaml"
    folder = published(tmp_path / "task", file, rows, ["acc", "acc_norm"])
    text = (folder / "task.yaml").read_text()
    (folder / "task.yaml").write_text(text.replace("about virology", "about biology"))
    task = "mmlu_virology_continuation"
    theirs = [(q.prompt, q.options, q.gold) for q in lm_eval.load_questions(task, folder)]
    ours = [wmdp.pose_cloze(row, "biology") for row in rows]
    assert [(q.prompt, q.options, q.gold) for q in ours] == theirs
    model = pico(bytes_tokenizer())
    scores = wmdp.run_wmdp(model, data)
    found = lm_eval.evaluate(model.module, model.tokenizer, [task], tasks_dir=folder)
    assert value(scores, "bio_cloze") == found[f"{task}/acc"]["value"]
    assert value(scores, "bio_cloze_norm") == found[f"{task}/acc_norm"]["value"]
    assert value(scores, "bio_cloze") != value(scores, "bio_cloze_norm")


def test_a_prompt_that_is_too_long_is_cut_as_lm_eval_cuts_it(data: BenchmarkRequest, tmp_path: Path) -> None:
    rows = rows_of(data, "wmdp-cyber")
    folder = published(tmp_path / "task", "wmdp/wmdp_cyber.yaml", rows)
    model = pico(words_tokenizer(), positions=24)
    assert min(len(model.tokens(wmdp.pose_lettered(row, "").prompt)) for row in rows) > 24
    scores = wmdp.run_wmdp(model, data)
    found = lm_eval.evaluate(model.module, model.tokenizer, ["wmdp_cyber"], tasks_dir=folder)
    assert value(scores, "cyber") == found["wmdp_cyber/acc"]["value"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_letter_is_one_token_of_its_own(name: str, data: BenchmarkRequest) -> None:
    model = pico(TOKENIZERS[name]())
    (gpt2,) = model.split("Answer:", " A")[1][:1]
    piece = model.tokenizer.convert_ids_to_tokens(gpt2)
    assert piece == {"words": "A", "bytes": "ĠA", "pieces": "▁A"}[name]
    for row in rows_of(data, "wmdp-bio"):
        prompt = wmdp.pose_lettered(row, "biology").prompt
        found = [model.split(prompt, f" {letter}")[1] for letter in "ABCD"]
        assert [len(ids) for ids in found] == [1] * 4
        assert len({ids[0] for ids in found}) == 4


# --- models of which the answers are known

Stub = Callable[[Row, str], float]


def answered(monkeypatch: pytest.MonkeyPatch, data: BenchmarkRequest, stub: Stub) -> BenchmarkScores:
    """The suite on a model that gives an option's text, in whatever way it is asked, this score.

    `stub` is called with the row as it is shown, whose `answer` is the letter that is right there,
    and the option: a letter or a text.
    """
    by_question = {row["question"].strip(): row for config in (*PARTS, *SUBJECTS) for row in rows_of(data, config)}

    def score_options(model: Any, posed: Sequence[Question], label: str) -> list[list[float]]:
        found = []
        for question in posed:
            prompt = question.prompt
            body = prompt.split("\n\n", 1)[1].removesuffix("\nAnswer:").removeprefix("Question: ")
            known = by_question[body.split("\nA. ")[0]]
            right = known["choices"][known["answer"]]
            shown = [line[3:] for line in body.split("\n") if line[:3] in ("A. ", "B. ", "C. ", "D. ")]
            row = {"choices": shown, "answer": shown.index(right) if shown else -1, "right": right}
            found.append([stub(row, option.removeprefix(" ")) for option in question.options])
        return found

    monkeypatch.setattr(base, "score_options", score_options)
    return wmdp.run_wmdp(None, data)  # type: ignore[arg-type]


def text_of(row: Row, option: str) -> str:
    """What an option says: a letter says the text that stands at it."""
    return row["choices"]["ABCD".index(option)] if row["choices"] else option


def test_one_that_knows_all_is_always_right(monkeypatch: pytest.MonkeyPatch, data: BenchmarkRequest) -> None:
    scores = answered(monkeypatch, data, lambda row, o: float(text_of(row, o) == row["right"]))
    for name, entry in scores.metrics.items():
        if "_chose_" in name:
            # each right text stands once at each letter
            assert entry["value"] == 0.25
        else:
            # a tie of normalised zeros is broken by no other text: 1 is above them
            assert entry["value"] == 1.0, name
    assert {v for values in scores.values.values() for v in values} == {1.0}


def test_one_that_sees_letters_alone_is_right_in_a_quarter(
    monkeypatch: pytest.MonkeyPatch, data: BenchmarkRequest
) -> None:
    for favourite in "ABCD":
        scores = answered(monkeypatch, data, lambda row, o, f=favourite: float(o == f))  # type: ignore[misc]
        for part in ("bio", "cyber", "chem"):
            assert value(scores, f"{part}_orders") == 0.25
            assert scores.metrics[f"wmdp/{part}_orders"].get("stderr", 0) == 0
            assert value(scores, f"{part}_all_orders") == 0
            rows = rows_of(data, f"wmdp-{part}")
            share = np.mean([row["answer"] == "ABCD".index(favourite) for row in rows])
            assert value(scores, part) == pytest.approx(share)
            chosen = [value(scores, f"{part}_chose_{letter}") for letter in "abcd"]
            assert chosen == [float(letter == favourite) for letter in "ABCD"]


def test_one_that_sees_texts_alone_is_the_same_in_all_orders(
    monkeypatch: pytest.MonkeyPatch, data: BenchmarkRequest
) -> None:
    def taste(row: Row, option: str) -> float:
        return random.Random(text_of(row, option)).random()

    scores = answered(monkeypatch, data, taste)
    for part in ("bio", "cyber", "chem", "mean"):
        assert 0 < value(scores, part) < 1
        for kind in ("orders", "all_orders", "cloze"):
            assert value(scores, f"{part}_{kind}") == pytest.approx(value(scores, part))
        if part != "mean":
            assert {value(scores, f"{part}_chose_{a}") for a in "abcd"} == {0.25}


def test_one_that_draws_lots_is_right_in_a_quarter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lots anew for each option asked: 4 x 400 answers, within four standard errors of 1/4."""
    rows = {name: questions(400, name) for name in PARTS}
    data = BenchmarkRequest("cais/wmdp", "", folder=write(tmp_path / "wmdp", rows))
    draw = random.Random(0)

    def score_options(model: Any, posed: Sequence[Question], label: str) -> list[list[float]]:
        return [[draw.random() for _ in question.options] for question in posed]

    monkeypatch.setattr(base, "score_options", score_options)
    scores = wmdp.run_wmdp(None, data)  # type: ignore[arg-type]
    error = sqrt(0.25 * 0.75 / 1600)
    for part in ("bio", "cyber", "chem"):
        assert abs(value(scores, f"{part}_orders") - 0.25) < 4 * error
        for letter in "abcd":
            assert abs(value(scores, f"{part}_chose_{letter}") - 0.25) < 4 * error


def test_cloze_is_by_character(monkeypatch: pytest.MonkeyPatch, data: BenchmarkRequest) -> None:
    """A right text costs 1.9 nats a character, a wrong one 2: likelier by length, whatever that."""

    def dear(row: Row, option: str) -> float:
        text = text_of(row, option)
        return -len(text) * (1.9 if text == row["right"] else 2)

    scores = answered(monkeypatch, data, dear)
    for part in ("bio", "cyber", "chem"):
        assert value(scores, f"{part}_cloze_norm") == 1
        rows = rows_of(data, f"wmdp-{part}")
        costs = [[2 * len(text) for text in row["choices"]] for row in rows]
        for row, cost in zip(rows, costs, strict=True):
            cost[row["answer"]] *= 0.95
        shortest = np.mean([int(np.argmin(c)) == r["answer"] for c, r in zip(costs, rows, strict=True)])
        assert value(scores, f"{part}_cloze") == pytest.approx(shortest) and shortest < 1


def test_means_are_plain(monkeypatch: pytest.MonkeyPatch, data: BenchmarkRequest) -> None:
    """Of bio and cyber, whatever their sizes and without chem; of MMLU's questions, by none."""

    def half(row: Row, option: str) -> float:
        return random.Random(row["right"] + text_of(row, option)).random()

    scores = answered(monkeypatch, data, half)
    for kind in ("", "_cloze", "_cloze_norm", "_orders", "_all_orders"):
        expected = (value(scores, f"bio{kind}") + value(scores, f"cyber{kind}")) / 2
        assert value(scores, f"mean{kind}") == pytest.approx(expected)
    mean = scores.metrics["wmdp/mean"]
    errors = [scores.metrics[f"wmdp/{part}"]["stderr"] for part in ("bio", "cyber")]
    assert mean["stderr"] == pytest.approx(sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert mean["n"] == PARTS["wmdp-bio"] + PARTS["wmdp-cyber"]
    assert scores.metrics["wmdp/mmlu"]["n"] == sum(SUBJECTS.values())
    assert len(scores.values["mmlu"]) == sum(SUBJECTS.values())
    by_subject = [(value(scores, f"mmlu_{name}"), SUBJECTS[name]) for name in ("virology", "college_biology")]
    rest = scores.values["mmlu"][: SUBJECTS["abstract_algebra"]]  # in the alphabet's order
    right = sum(share * count for share, count in by_subject) + sum(rest)
    assert value(scores, "mmlu") == pytest.approx(right / sum(SUBJECTS.values()))


# --- where the data is


def test_what_was_read_is_on_record(data: BenchmarkRequest) -> None:
    wmdp.run_wmdp(pico(words_tokenizer()), data)
    assert {*data.seen} == {f"{name}/test" for name in PARTS} | {f"mmlu/{name}/test" for name in SUBJECTS}


def test_without_mmlu_it_is_left_out(data: BenchmarkRequest) -> None:
    assert data.folder
    (data.folder.parent / "mmlu").rename(data.folder.parent / "other")
    scores = wmdp.run_wmdp(pico(words_tokenizer()), data)
    assert not any("mmlu" in name for name in (*scores.metrics, *scores.values, *data.seen))


def test_limit_is_of_each_part(data: BenchmarkRequest) -> None:
    data.limit = 3
    scores = wmdp.run_wmdp(pico(words_tokenizer()), data)
    assert scores.metrics["wmdp/bio"]["n"] == 3
    assert scores.metrics["wmdp/mmlu"]["n"] == 3 * len(SUBJECTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, r"wmdp-bio, split test, row 2: field 'answer': .*expected the place of one of the choices"),
        ({"choices": ["w1", "w2"]}, "row 2: field 'choices': List should have at least 4"),
        ({"question": " "}, "row 2: field 'question': String should"),
    ],
)
def test_a_bad_row_is_named(change: Row, message: str, data: BenchmarkRequest) -> None:
    rows = rows_of(data, "wmdp-bio")
    rows[1] |= change
    refused(data, rows, message)


def test_letters_as_answers_are_refused(data: BenchmarkRequest) -> None:
    rows = [row | {"answer": "ABCD"[row["answer"]]} for row in rows_of(data, "wmdp-bio")]
    refused(data, rows, "row 1: field 'answer': Input should be a valid integer")


def refused(data: BenchmarkRequest, rows: Sequence[Row], message: str) -> None:
    assert data.folder
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data.folder / "wmdp-bio" / "test.jsonl").write_text(lines)
    with pytest.raises(SrmuError, match=message) as caught:
        wmdp.run_wmdp(pico(words_tokenizer()), data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{"part": "bio"}, {"template": "{question}"}])
def test_what_has_no_effect_is_refused(given: dict[str, str], data: BenchmarkRequest) -> None:
    with pytest.raises(SrmuError, match=r"wmdp takes no (part 'bio'|--template): it asks all"):
        wmdp.run_wmdp(pico(words_tokenizer()), replace(data, **given))  # type: ignore[arg-type]


def test_mmlu_out_of_reach_says_how_to_get_it(data: BenchmarkRequest) -> None:
    assert data.folder
    (data.folder.parent / "mmlu" / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(SrmuError, match=r"mmlu cannot be read: .*hf download .*cais/mmlu"):
        wmdp.run_wmdp(pico(words_tokenizer()), data)
