"""Questions as other people's tasks have them: without a prompt, or with several right options."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from helpers import attack_world as world
from helpers.models import pico_module, word_tokenizer
from srmu.attacks import ATTACKS
from srmu.attacks.base import Exam
from srmu.attacks.learned_prompts import GCG, SoftPrompt
from srmu.attacks.suite import Sources, attack_run
from srmu.evals.lm_eval import load_questions
from srmu.evals.subject import Question, Subject, option_scores
from srmu.runs.run import Run

READING = (
    "forced_choice", "format_shift", "extraction", "entangled_queries", "logit_lens",
    "linear_probe", "direction_ablation", "prompts", "leak", "utility", "part_relearning",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return world.unlearned(world.write(tmp_path))


def write_task(folder: Path, rows: list[dict[str, Any]], **settings: str) -> None:
    lines = world.TASK.format(name="other").splitlines()
    kept = [line for line in lines if line.partition(":")[0] not in settings]
    kept += [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    (folder / "other.yaml").write_text("\n".join(kept))
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))


def attack(run: Run) -> dict[str, Any]:
    sources = Sources(("other",), "split", tasks_dir=str(run.folder.parents[1] / "tasks"))
    names = ("format_shift", "logit_lens")
    return attack_run(run, names=names, sources=sources)["attacks"]


@pytest.mark.slow
def test_a_task_without_prompts(run: Run) -> None:
    """BLiMP's kind: which of two sentences is likelier."""
    folder = run.folder.parents[1] / "tasks"
    rows = [{"good": f"w50 {s} {a}", "bad": f"w50 {s} w9"} for s, (a, _) in world.facts().items()]
    write_task(
        folder, rows, doc_to_text="", doc_to_choice="{{[good, bad]}}", doc_to_target="0",
        target_delimiter="",
    )  # fmt: skip
    (question, *_) = load_questions("other", folder)
    assert (question.prompt, question.options, question.gold) == ("", (rows[0]["good"], rows[0]["bad"]), 0)
    entries = attack(run)
    assert {entry["status"] for entry in entries.values()} == {"done"}
    assert entries["forced_choice"]["controls"]["original"]["accuracy"]["value"] > 0.9


def test_the_first_of_several_right_options_is_asked_for(run: Run) -> None:
    folder = run.folder.parents[1] / "tasks"
    rows = [
        {"question": f"w50 {s}", "choices": ["w9", a, "w48", "w10"], "golds": [1, 2]}
        for s, (a, _) in world.facts().items()
    ]
    write_task(folder, rows, doc_to_target="golds")
    for question, row in zip(load_questions("other", folder), rows, strict=True):
        assert question.options == (" w9", f" {row['choices'][1]}", " w10")
        assert question.gold == 1
    entries = attack(run)
    assert {entry["status"] for entry in entries.values()} == {"done"}
    assert entries["forced_choice"]["controls"]["original"]["accuracy"]["value"] > 0.9


def sentences(ids: range) -> tuple[Question, ...]:
    return tuple(Question("", (f"w{i} w1 w2", f"w{i} w2 w1"), 0, f"f{i}") for i in ids)


def plain_tokenizer() -> Any:
    """One that puts nothing before a text, and has no token to pad with."""
    tokenizer = word_tokenizer(pad_token=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    return tokenizer


def test_every_attack_takes_questions_without_tokens() -> None:
    model = Subject(pico_module(), plain_tokenizer(), oracle=world.subject("oracle"))
    assert model.tokens("") == [1]
    assert model.split("", "w1 w2") == ([1], model.tokens("w1 w2"))
    exam = Exam(sentences(range(20, 40)), sentences(range(20)), {"kept": sentences(range(40, 60))})
    attacks = [ATTACKS[name]() for name in READING]
    attacks += [GCG(steps=1, candidates=4, length=2), SoftPrompt(length=2, steps=2)]
    for one in attacks:
        result = one.run(model, world.texts(), exam, 0)
        assert result.ways or result.metrics, one.name


def test_a_sentence_is_scored_from_the_token_that_begins_texts() -> None:
    """As with a tokenizer that puts that token first by itself."""
    asked = sentences(range(6))
    plain, usual = (
        option_scores(Subject(pico_module(), tokenizer), asked) for tokenizer in (plain_tokenizer(), word_tokenizer())
    )
    assert plain == usual
