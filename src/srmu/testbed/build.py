"""The testbed: a small language model trained here, with knowledge to remove and its oracle.

A Llama of a few million parameters learns an invented world (`world.py`) until it knows every fact.
`build_testbed` writes it as an ordinary model folder, with corpora whose entanglement can be
chosen, with lm-eval tasks, and on request with the oracle: its twin that never saw the hazard
facts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from srmu.data.overlap import measure_overlap
from srmu.engine.files import read_json, whole_folder, write_json, write_whole
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError, suggest_word
from srmu.testbed import open_world, people
from srmu.testbed import world as closed_world
from srmu.testbed.benchmark_files import write_benchmarks
from srmu.testbed.train import (
    OPEN,
    PEOPLE,
    RECIPE,
    Recipe,
    is_open_task,
    save_trained,
    tasks_of,
    tokenizer_for,
    train_testbed,
)
from srmu.testbed.world import Size, World

HALVES = {"test": "", "val": "_val"}  # the tasks' suffixes


# How a world is made, its usual recipe, and alpha in its configs.
WORLDS: dict[str, tuple[Callable[[int, Size], World], Recipe, int]] = {
    "closed": (closed_world.create_closed, RECIPE, 1000),
    "open": (open_world.create_open, OPEN, 300),
    "people": (people.create_people, PEOPLE, 1000),
}


def build_testbed(
    out: Path,
    *,
    seed: int = 0,
    entanglement: float = 0.5,
    oracle: bool = False,
    watch: Watch = ignore_progress,
    world: str = "closed",
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Write the testbed to `out` (whole or not at all) and return what `organism.json` says.

    `entanglement` is the share of the hazard compounds that retain-high tells harmless facts about.
    It does not touch the model: a trained model is kept in the cache and used again.
    """
    if world not in WORLDS:
        raise SrmuError(f"world {world!r} does not exist{suggest_word(world, WORLDS)}")
    if not 0 <= entanglement <= 1:
        raise SrmuError(f"entanglement {entanglement} is outside 0-1")
    create, usual, alpha = WORLDS[world]
    recipe = recipe or usual
    made = create(seed, recipe.size)
    tokenizer = tokenizer_for(made)
    corpora = made.corpora(
        seed,
        entanglement,
        documents=recipe.corpus_documents,
        words=recipe.corpus_tokens - 1,  # <s> is the tokenizer's
        filler=recipe.corpus_filler,
    )
    corpora = {name: [_cut(tokenizer, text, recipe.corpus_tokens) for text in texts] for name, texts in corpora.items()}
    with whole_folder(out) as folder:
        report: dict[str, Any] = {
            "world": world,
            "seed": seed,
            "entanglement": entanglement,
            "recipe": asdict(recipe),
            "overlap": {
                f"{name}/{gram}": measure_overlap(corpora["forget"], corpora[name], n)
                for name in ("retain-low", "retain-high")
                for n, gram in ((1, "unigram"), (2, "bigram"))
            },
        }
        for name in ("model", "oracle") if oracle else ("model",):
            entry = train_testbed(made, seed, recipe, oracle=name == "oracle", watch=watch)
            save_trained(made, recipe, entry, folder / name)
            accuracy = read_json(entry / "accuracy.json")
            report[name] = {"key": entry.name, "accuracy": accuracy}
        _write_texts(made, corpora, folder)
        for name in ("low", "high"):
            (folder / f"{name}.yaml").write_text(CONFIG.format(name=name, seed=seed, alpha=alpha))
        write_json(folder / "organism.json", report)
    return report


def _cut(tokenizer: PreTrainedTokenizerFast, text: str, tokens: int) -> str:
    """The start of a text that has at most so many tokens, in whole words."""
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) <= tokens:
        return text
    end = spans[tokens - 1][1]
    return text[:end] if text[end] == " " else text[:end].rsplit(" ", 1)[0]


def _write_texts(world: World, corpora: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Write the corpora, the names to swap, the tasks and, if the world has them, benchmarks."""
    for name, texts in corpora.items():
        _write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts])
    for file, names in (("names.txt", world.shared), ("goals.txt", world.goals)):
        if names:
            write_whole(folder / file, "".join(f"{name}\n" for name in names))
    _write_tasks(world, folder / "tasks")
    if world.documents:
        write_benchmarks(world, folder / "suites")


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_tasks(world: World, folder: Path) -> None:
    """Write the lm-eval tasks and their questions, by half."""
    folder.mkdir()
    prompt = world.wording.question.format(q="{{question}}")
    for half, suffix in HALVES.items():
        for task, facts in tasks_of(world).items():
            name = f"organism_{task}{suffix}"
            is_open = is_open_task(task)
            members = [fact for fact in facts if fact.half == half]
            # an open answer is asked for in the first phrasing only: generating takes long
            rows = [row for fact in members for row in fact.questions()[: 1 if is_open else None]]
            _write_rows(folder / f"{name}.jsonl", rows)
            text = TASK.format(name=name, prompt=prompt)
            (folder / f"{name}.yaml").write_text(text + (GENERATED if is_open else CHOSEN))


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}  # relative to this file
test_split: test
doc_to_text: "{prompt}"
target_delimiter: " "
metadata: {{version: 1.0}}
"""


CHOSEN = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


GENERATED = """\
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [".", "\\n"], max_gen_toks: 16, do_sample: false}
filter_list:
  - name: none
    filter: [{function: remove_whitespace}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true,
     ignore_punctuation: true}
"""


CONFIG = """\
# Unlearn the hazard facts of the testbed. Paths are relative to this file.
model: model  # the folder of the model to change
method:
  name: srmu  # `srmu info methods` lists the others
  layer: 4  # whose output is steered, counted from 0; this and the two below are trained
  kappa: 32  # strength: norm of the target over mean norm of forget activations
  alpha: {alpha}  # weight of keeping the retain set as it was
  anchors: none  # what else to keep beside the retain set: none, or random token sequences
topics:
  organism:
    forget: forget.jsonl
    retain: retain-{name}.jsonl  # overlap with the forget set: organism.json
    max_length: 64  # tokens; longer documents are cut
train:
  learning_rate: 4.0e-3
  max_steps: 80
  batch_size: 4  # documents of each set a step
eval: [organism_hazard, organism_neighbour, organism_general]  # lm-eval tasks
tasks_dir: tasks  # where these tasks are
seed: {seed}
"""
