"""What models write after the same words, before unlearning and after, side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from srmu.engine.progress import Watch
from srmu.evals.continuations import NEUTRAL, ask_model
from srmu.evals.subject import pick_evenly
from srmu.report.html import Block, Section, Table
from srmu.report.results import RunGroup
from srmu.runs.plan import read_topic_texts
from srmu.runs.run import Run

Samples = Literal["neutral", "forget"]
Answers = Sequence[Mapping[str, str]]  # a "prompt", what a model wrote "before" and "after"
PROMPTS = 6  # of each kind
OPENING = 8  # words of a forget text that a model goes on from; at most half of it
WRITTEN = 24  # tokens


def sample_section(entries: Sequence[RunGroup], samples: Samples, watch: Watch) -> Section:
    """What the first run of each entry writes after harmless openings; with `forget`, after its forget texts', too."""
    prompts = [*pick_evenly(NEUTRAL.read_text(encoding="utf-8").splitlines(), PROMPTS)]
    notes = [f"Harmless openings, and the likeliest {WRITTEN} tokens after each."]
    if samples == "forget":
        texts = read_topic_texts(Run.open(entries[0].runs[0]).config)["forget"]
        prompts = [*map(cut_opening, pick_evenly(texts, PROMPTS)), *prompts]
        notes = [f"First openings of forget texts, then harmless ones, and the likeliest {WRITTEN} tokens after each."]

    def ask(folder: Path) -> Answers:  # not kept: prompts are in the answers
        return ask_model(str(folder), prompts, WRITTEN, watch=watch)

    return answer_section({entry.name: entry.runs[0] for entry in entries}, ask, notes)


def cut_opening(text: str) -> str:
    words = str(text).split()
    return " ".join(words[: min(OPENING, (len(words) + 1) // 2)])


def answer_section(runs: Mapping[str, Path], ask: Callable[[Path], Answers], notes: Sequence[str]) -> Section:
    """A table of what the original and each run, by its label, write, as `ask` has it of a run's folder."""
    rows: list[dict[str, str]] = []
    for label, folder in runs.items():
        said = ask(folder)
        rows = rows or [{"prompt": row["prompt"], "original": shorten_answer(row["before"])} for row in said]
        rows = [line | {label: shorten_answer(row["after"])} for line, row in zip(rows, said, strict=True)]
    table = Table("What each model writes after the same words", rows, words=True)
    return Section("In their own words", notes, [Block(table=table)])


def shorten_answer(text: str) -> str:
    return text.strip().split("\n")[0].strip() or "(nothing)"
