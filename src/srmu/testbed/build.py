"""The testbed: a small Llama that learned every fact of an invented world, and all that unlearning it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from srmu.data.overlap import measure_jaccard
from srmu.engine.files import read_json, whole_folder, write_json, write_whole
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError, suggest_word
from srmu.testbed import train
from srmu.testbed.benchmark_files import write_benchmarks, write_rows
from srmu.testbed.open_world import create_open
from srmu.testbed.people import create_people
from srmu.testbed.world import HALVES, World, create_closed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How a world is made, and its usual recipe.
WORLDS = {
    "closed": (create_closed, train.RECIPE),
    "open": (create_open, train.OPEN),
    "people": (create_people, train.PEOPLE),
}


def build_testbed(
    out: Path,
    *,
    seed: int = 0,
    entanglement: float = 0.5,
    oracle: bool = False,
    watch: Watch = ignore_progress,
    world: str = "closed",
    recipe: train.Recipe | None = None,
) -> dict[str, Any]:
    """Write the testbed to `out` (whole or not at all) and return what `testbed.json` says.

    `entanglement` is the share of the hazard compounds that retain-high tells harmless facts about; the `oracle` is the
    model's twin that never saw the hazard facts.
    """
    if world not in WORLDS:
        raise SrmuError(f"world {world!r} does not exist{suggest_word(world, [*WORLDS, 'atlas'])}")
    require_share(entanglement)
    create, usual = WORLDS[world]
    recipe = recipe or usual
    made = create(seed, recipe.size)
    tokenizer = train.tokenizer_for(made)
    words, filler = recipe.corpus_tokens - 1, recipe.corpus_filler  # <s> is the tokenizer's
    corpora = made.corpora(seed, entanglement, documents=recipe.corpus_documents, words=words, filler=filler)
    corpora = {name: [cut_text(tokenizer, text, recipe.corpus_tokens) for text in corpora[name]] for name in corpora}
    with whole_folder(out) as folder:
        report: dict[str, Any] = {"world": world, "seed": seed, "entanglement": entanglement, "recipe": asdict(recipe)}
        report["overlap"] = measure_overlap(corpora)
        for name in ("model", "oracle") if oracle else ("model",):
            entry = train.train_testbed(made, seed, recipe, oracle=name == "oracle", watch=watch)
            train.save_trained(made, recipe, entry, folder / name)
            report[name] = {"key": entry.name, "accuracy": read_json(entry / "accuracy.json")}
        for name, texts in corpora.items():
            write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        write_whole(folder / "names.txt", "".join(f"{name}\n" for name in made.shared))
        if made.goals:
            write_whole(folder / "goals.txt", "".join(f"{goal}\n" for goal in made.goals))
        write_tasks(made, folder / "tasks")
        write_group(folder / "tasks")
        if made.documents:
            write_benchmarks(made, folder / "suites")
        for name in ("low", "high"):
            config = fill_template("config", name=name, seed=seed, alpha=made.wording["alpha"])
            write_whole(folder / f"{name}.yaml", config)
        write_json(folder / "testbed.json", report)
    return report


def require_share(entanglement: float) -> None:
    if not 0 <= entanglement <= 1:
        raise SrmuError(f"entanglement {entanglement} is outside 0-1")


def measure_overlap(corpora: Mapping[str, list[str]]) -> dict[str, float]:
    """The share of n-gram types that the forget corpus has in common with each retain corpus."""
    return {
        f"{name}/{gram}": measure_jaccard(corpora["forget"], corpora[name], n)
        for name in ("retain-low", "retain-high")
        for n, gram in ((1, "unigram"), (2, "bigram"))
        if name in corpora
    }


def cut_text(tokenizer: PreTrainedTokenizerFast, text: str, tokens: int) -> str:
    """The start of a text that has at most so many tokens, in whole words."""
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) <= tokens:
        return text
    end = spans[tokens - 1][1]
    return text[:end] if text[end] == " " else text[:end].rsplit(" ", 1)[0]


def write_tasks(world: World, folder: Path) -> None:
    """Write the lm-eval tasks and their questions, by half."""
    folder.mkdir()
    prompt = world.wording["question"].format(q="{{question}}")
    for half in HALVES:
        for task, facts in train.tasks_of(world).items():
            name = f"testbed_{task}{'_val' if half == 'val' else ''}"
            is_open = task.endswith("_open")
            # an open answer is asked for in the first phrasing only: generating takes long
            asked = [fact.questions()[: 1 if is_open else None] for fact in facts if fact.half == half]
            if not asked:
                continue
            write_rows(folder / f"{name}.jsonl", [row for rows in asked for row in rows])
            text = fill_template("task_open" if is_open else "task", name=name, prompt=prompt)
            write_whole(folder / f"{name}.yaml", text)


def write_group(folder: Path) -> None:
    """Write the group of a folder's tasks, but for those of the half that settings are chosen on."""
    names = sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.endswith("_val"))
    write_whole(folder / "testbed_all.yaml", fill_template("group", tasks=", ".join(names)))


def fill_template(template: str, **values: Any) -> str:
    """The text of a file in `templates/` with these values."""
    path = Path(__file__).parent / "templates" / f"{template}.yaml"
    return Template(path.read_text(encoding="utf-8")).substitute(values)
