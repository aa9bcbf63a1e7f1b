"""What fine-tuning brings back: curves read from reports of attacks, and drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any, NamedTuple

from srmu.report.format import draw_level, percent_cell
from srmu.report.html import (
    GREY,
    Beside,
    ColumnHead,
    Figure,
    Table,
    TableLine,
    label_marker,
    label_stroke,
    make_axis,
)

TEXTS = re.compile(r"(.*), n=(\d+)")  # settings of E7: a variant and its texts
STEPS = re.compile(r"(.*), (\d+) steps")  # of E19: a kind and its steps
WHOSE = {"": "unlearned model", "original": "original", "oracle": "oracle"}
CONTROLS = {"original": ("circle-open", "dot"), "oracle": ("diamond-open", "dash")}

Points = Sequence[tuple[int, float]]  # how much was learned, accuracy after it
Attacks = Sequence[Mapping[str, Any]]  # what `attack_run` gives, a run each


class RelearningCurve(NamedTuple):
    """Accuracy against what was learned; a click on the label, if it has one, hides it."""

    name: str
    points: Points
    look: int | str  # the number of a line's look, or the name of a control
    label: str = ""


def by_texts(found: Attacks) -> dict[str, Points]:
    """Of each variant of E7, a mean over runs: accuracy by the number of texts; 0: as it is."""
    points: dict[str, dict[int, list[float]]] = {}
    for attacks in found:
        plain = attacks["attacks"].get("forced_choice", {}).get("accuracy")
        learned = attacks["attacks"].get("benign_relearning", {})
        for variant, texts, value in matching_settings(learned, TEXTS):
            points.setdefault(variant, {}).setdefault(texts, []).append(value)
            if plain:
                points[variant].setdefault(0, []).append(plain["value"])
    return {variant: average_points(values) for variant, values in sorted(points.items())}


def by_steps(found: Attacks) -> dict[str, dict[str, Points]]:
    """Of each kind of E19, of the run ("") and its controls: accuracy by the number of steps."""
    points: dict[str, dict[str, dict[int, list[float]]]] = {}
    for attacks in found:
        learned = attacks["attacks"].get("relearning_steps", {})
        for who, one in {"": learned, **learned.get("controls", {})}.items():
            for kind, steps, value in matching_settings(one, STEPS):
                whose = points.setdefault(kind, {}).setdefault(who, {})
                whose.setdefault(steps, []).append(value)
    return {
        kind: {who: average_points(values) for who, values in whose.items()}
        for kind, whose in points.items()
    }


def matching_settings(
    one: Mapping[str, Any], form: re.Pattern[str]
) -> Iterator[tuple[str, int, float]]:
    """An attack's settings of that form, with the accuracy on the test half."""
    for setting, scores in one.get("settings", {}).items():
        if (match := form.fullmatch(setting)) and scores["test"] is not None:
            yield match[1], int(match[2]), scores["test"]


def average_points(values: Mapping[int, Sequence[float]]) -> Points:
    return [(at, fmean(values[at])) for at in sorted(values)]


def draw_by_texts(curves: Sequence[RelearningCurve], chance: float) -> Beside:
    """Accuracy by the number of texts learned again (E7)."""
    note = "Fine-tuning on a few harmless texts, which say nothing of what is asked for"
    note += ": of each method the variant that brings back most." if curves[0].label else "."
    return draw_curves("Relearning by texts", note, "texts", curves, chance)


def draw_by_steps(kind: str, curves: Sequence[RelearningCurve], chance: float) -> Beside:
    """Accuracy by the steps of one kind of relearning (E19)."""
    note = "Fine-tuning on other facts of the kind to be forgotten; none of them is asked for."
    if kind.startswith("neutral"):
        note = "Fine-tuning on harmless texts, which say nothing of what is asked for."
    return draw_curves(f"Relearning by steps: {kind}", note, "steps", curves, chance)


def draw_curves(
    title: str, note: str, unit: str, curves: Sequence[RelearningCurve], chance: float
) -> Beside:
    """The curves as a picture beside a table."""
    layout = draw_level(chance, "chance", across=True) | {
        "xaxis": make_axis(f"{unit} learned again" if unit == "texts" else unit, type="category"),
        "yaxis": make_axis("accuracy", range=[0, 1.04], tickformat=".0%"),
        "showlegend": not all(curve.label for curve in curves),
    }
    budgets = sorted({at for curve in curves for at, _ in curve.points})
    layout["xaxis"] |= {"categoryorder": "array", "categoryarray": [*map(str, budgets)]}
    words = "; ".join(
        f"{c.name} from {c.points[0][1]:.0%} to {c.points[-1][1]:.0%}" for c in curves
    )
    rows = [TableLine([c.name, *(percent_cell(dict(c.points).get(n)) for n in budgets)], c.label)
            for c in curves]  # fmt: skip
    heads = [ColumnHead(f"{n}", unit if n else "before") for n in budgets]
    first = "Method" if any(c.label for c in curves) else "Model" if unit == "steps" else "Variant"
    return Beside(
        title,
        Figure("", f"Accuracy by {unit}: {words}.", [curve_trace(c, unit) for c in curves], layout),
        Table("Accuracy after relearning, per cent", [first, *heads], rows, tall=len(rows) > 12),
        [note],
    )


def curve_trace(curve: RelearningCurve, unit: str) -> dict[str, Any]:
    """A curve as plotly draws it; controls are grey."""
    look: dict[str, Any] = {}
    if isinstance(curve.look, str):
        symbol, dash = CONTROLS[curve.look]
        look["line"] = {"color": GREY, "dash": dash, "width": 1.5}
        look["marker"] = {"color": GREY, "symbol": symbol, "size": 7}
    else:
        look["line"] = label_stroke(curve.look, width=2)
        look["marker"] = label_marker(curve.look, size=7)
    return look | {
        "x": [str(at) for at, _ in curve.points], "y": [value for _, value in curve.points],
        "mode": "lines+markers", "name": curve.name, "cliponaxis": False,
        "showlegend": not curve.label,
        "hovertemplate": f"<b>{escape(curve.name)}</b><br>%{{x}} {unit}: %{{y:.1%}}<extra></extra>",
    } | ({"meta": curve.label} if curve.label else {})  # fmt: skip
