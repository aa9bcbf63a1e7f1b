"""The map of a testbed of real places: what the model knew of them before, and what it lost."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from srmu.engine.files import read_json
from srmu.evals.results import read_metrics
from srmu.evals.statistics import parse_answers
from srmu.report.figures import COLOURS, Figure, Row
from srmu.report.format import name_words, write_words
from srmu.report.html import LABEL, Block, Section, Table
from srmu.report.results import RunGroup
from srmu.runs.config import read_tree
from srmu.runs.record import CONFIG
from srmu.testbed.ground import EAST, NORTH, SOUTH, WEST

TASKS = {"testbed_hazard": True, "testbed_neighbour": False}  # whether its facts are to be forgotten
STATES = {  # a dot's colour, shape and size
    "to forget": (COLOURS[1], "circle-open", 6),
    "to keep": (COLOURS[0], "circle", 6),
    "forgotten, as asked": (COLOURS[1], "diamond", 6.5),
    "lost as a side effect": (COLOURS[5], "x", 10.5),
    "still right": (COLOURS[0], "circle", 6),
}
LARGER = 1.5  # times, dots of what is to be forgotten


class PlacedFact(NamedTuple):
    """A fact about a place that the original model answered in all phrasings; `kept`: so does the model after."""

    hazard: bool
    place: tuple[float, float]  # latitude, longitude
    words: str
    kept: bool


@dataclass(frozen=True)
class FactMap:
    """What the first run of an entry left of the facts about places."""

    entry: RunGroup
    region: str  # whose facts were to be forgotten
    ground: Path
    facts: tuple[PlacedFact, ...]

    @property
    def known(self) -> tuple[int, int]:
        """How many facts were known before: of those to be forgotten, and of the others."""
        hazard = sum(fact.hazard for fact in self.facts)
        return hazard, len(self.facts) - hazard

    @property
    def lost(self) -> tuple[int, int]:
        """How many of them are not known after."""
        gone = [fact.hazard for fact in self.facts if not fact.kept]
        return sum(gone), len(gone) - sum(gone)


def read_maps(entries: Sequence[RunGroup]) -> list[FactMap]:
    """The maps of the entries whose testbed has places, and that were measured on them."""
    return [found for entry in entries if (found := read_map(entry)) and found.facts]


def read_map(entry: RunGroup) -> FactMap | None:
    """The map of an entry's first run; None where its testbed has no places."""
    run = entry.runs[0]
    tasks = run / (read_tree(run / CONFIG).get("tasks_dir") or "tasks")
    about, ground = read_json(tasks.parent / "testbed.json", {}), tasks.parent / "ground.png"
    if about.get("world") != "atlas" or not ground.is_file():
        return None
    measured = read_metrics(run)
    known: list[PlacedFact] = []
    for task, hazard in TASKS.items():
        answers = [measured[when].get(f"{task}/acc", {}).get("answers", "") for when in ("before", "after")]
        phrasings: dict[str, list[tuple[dict[str, Any], float, float]]] = {}
        asked = read_json(tasks / f"{task}.jsonl", [])
        for row, before, after in zip(asked, *map(parse_answers, answers), strict=False):  # a limit takes the first
            if "place" in row:
                phrasings.setdefault(row["fact"], []).append((row, before, after))
        for fact, several in phrasings.items():
            if all(before == 1 for _, before, _ in several):
                row = several[0][0]
                words = f"{name_words(fact)}: {row['choices'][row['gold']]}"
                known.append(PlacedFact(hazard, tuple(row["place"]), words, all(after == 1 for *_, after in several)))
    return FactMap(entry, about["region"], ground, tuple(known))


def map_section(maps: Sequence[FactMap]) -> Section:
    """The world before and after each method, and the counts of all."""
    blocks: list[Block] = []
    rows: list[Row] = []
    drawn = []
    for one in maps:
        before = [(fact.hazard, fact.place) for fact in one.facts]
        if before not in drawn:  # entries of one testbed share it
            drawn.append(before)
            blocks.append(draw_world(one, write_words("map_before", map=one)[0], before=True))
        blocks.append(draw_world(one, write_words("map_after", map=one)[0]))
        heads = (f"{one.region}\nforgotten, as asked", "Elsewhere\nlost as a side effect")
        counts = {
            head: f"{lost} ({100 * lost / known:.1f} % of {known})" if known else None
            for head, known, lost in zip(heads, one.known, one.lost, strict=True)
        }
        rows.append({LABEL: one.entry.label, "Method": one.entry.name, **counts})
    several = any(len(one.entry.runs) > 1 for one in maps)
    blocks.append(Block(table=Table("Facts lost, of those known before", rows)))
    return Section("The map", write_words("map_notes", several=several), blocks)


def draw_world(one: FactMap, title: str, *, before: bool = False) -> Block:
    """The world with a dot for each fact, on the ground of all cities."""
    facts = sorted(one.facts, key=lambda fact: not (fact.hazard or fact.kept))  # damage on top, else as they come
    states = [
        ("to forget" if fact.hazard else "to keep") if before
        else "still right" if fact.kept
        else "forgotten, as asked" if fact.hazard
        else "lost as a side effect"
        for fact in facts
    ]  # fmt: skip
    shown = [state for state in STATES if state in states]
    dots = draw_dots(states, [fact.hazard for fact in facts])
    dots.update(
        y=[fact.place[0] for fact in facts], x=[fact.place[1] for fact in facts], showlegend=False, cliponaxis=False,
        customdata=[[escape(fact.words), state] for fact, state in zip(facts, states, strict=True)],
        hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<extra></extra>",
    )  # fmt: skip
    plot = go.Figure([dots, *(draw_dots([state], [False]).update(x=[None], y=[None], name=state) for state in shown)])
    axis = {"visible": False, "constrain": "domain"}
    image = {
        "source": f"data:image/png;base64,{b64encode(one.ground.read_bytes()).decode()}", "layer": "below",
        "xref": "x", "x": WEST, "sizex": EAST - WEST, "yref": "y", "y": NORTH, "sizey": NORTH - SOUTH,
        "sizing": "stretch",
    }  # fmt: skip
    plot.update_layout(
        template=None, images=[image], showlegend=True, legend={"itemsizing": "constant"},
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        xaxis=axis | {"range": [WEST, EAST]},
        yaxis=axis | {"range": [SOUTH, NORTH], "scaleanchor": "x", "constraintoward": "top"},
    )  # fmt: skip
    counts = "; ".join(f"{state}: {states.count(state)}" for state in shown)
    words = f"Map of the world, a dot for each fact about a place. {title}. {counts}."
    labels = [] if before else [one.entry.label]
    return Block([Figure("", words, plot, shape=(EAST - WEST) / (NORTH - SOUTH))], title=title, labels=labels)


def draw_dots(states: Sequence[str], hazard: Sequence[bool]) -> go.Scatter:
    """Dots of plotly without places, with the looks of their states; those of hazard facts are larger."""
    colours, symbols, sizes = zip(*(STATES[state] for state in states), strict=True)
    rings = [symbol.endswith("-open") for symbol in symbols]
    marker = {
        "color": colours, "symbol": symbols, "opacity": 1,
        "size": [size * (LARGER if large else 1) for size, large in zip(sizes, hazard, strict=True)],
        "line": {"color": [c if ring else "#fff" for c, ring in zip(colours, rings, strict=True)],
                 "width": [2 if ring else 1 for ring in rings]},
    }  # fmt: skip
    return go.Scatter(mode="markers", marker=marker)
