"""What attacks brought back, and the part of a page about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srmu.evals.results import read_attacks
from srmu.evals.statistics import (
    Array,
    Draws,
    Estimate,
    parse_answers,
    residual_table,
    worst_case,
)
from srmu.report.format import (
    capitalise,
    draw_level,
    draw_mark,
    error_bars,
    hover_text,
    name_words,
    number_cell,
    share_cell,
)
from srmu.report.html import (
    COLOURS,
    GREY,
    Beside,
    ColumnHead,
    Figure,
    Section,
    Table,
    TableLine,
    label_marker,
    make_axis,
    name_axis,
)
from srmu.report.relearning import (
    WHOSE,
    Points,
    RelearningCurve,
    by_steps,
    by_texts,
    draw_by_steps,
    draw_by_texts,
)
from srmu.report.results import RunGroup, read_config_tree, strip_paths

KNOWLEDGE = "accuracy on the knowledge to forget"


@dataclass(frozen=True)
class AttackedRow:
    """What an attack brought back: accuracies on the knowledge to forget, averaged over seeds."""

    id: str
    accuracy: Estimate
    controls: Mapping[str, Estimate]  # the same attack on the original model and on the oracle
    valid: bool  # not where the oracle, which never knew, recovers too
    chosen: str  # its strongest setting; of the last seed, where there are several


@dataclass(frozen=True)
class Recovery:
    """The attacks on an entry's runs; K* is the share of the knowledge that the best one finds."""

    seeds: int
    tier: str
    chance: float
    worst: Estimate
    strongest: str
    attacks: Mapping[str, AttackedRow]
    other: Sequence[tuple[str, str, Mapping[str, float]]]  # attack, measure, value by whose
    failed: Mapping[str, str]  # attacks that came to nothing, and why
    not_tried: Sequence[str]
    relearning: Mapping[str, Points]  # by texts, of each variant of E7
    steps: Mapping[str, Mapping[str, Points]]  # of each kind of E19, by whose model


def measure_recovery(entry: RunGroup) -> Recovery | None:
    """What the attacks on an entry's runs brought back; None where none was attacked."""
    found = {run: read_attacks(run) for run in entry.runs}
    found = {run: attacks for run, attacks in found.items() if attacks}
    if not found:
        return None
    draws = Draws()
    worst: list[Array] = []
    answers: dict[tuple[str, str], list[Array]] = {}  # of an attack on "" or on a control
    for run, attacks in found.items():
        model = read_config_tree(run)["model"]  # questions of one testbed are drawn alike for all
        facts = [(model, fact) for fact in attacks["facts"]]
        worst.append(worst_case(draws.means(residual_table(attacks), facts), attacks["chance"]))
        asked = {
            (name, who): parse_answers(kept["right"])
            for name, one in attacks["attacks"].items()
            for who, kept in {"": one, **one.get("controls", {})}.items()
            if kept.get("right")
        }
        means = draws.means(np.stack([*asked.values()], axis=1), facts)
        for key, column in zip(asked, means.T, strict=True):
            answers.setdefault(key, []).append(column)

    count = min(len({*attacks["facts"]}) for attacks in found.values())

    def averaged(values: Sequence[Array]) -> Estimate:
        return draws.estimate_accuracy(np.stack(values, axis=1), count)

    first = {name: one for a in found.values() for name, one in a["attacks"].items()}
    attacked = {
        name: AttackedRow(
            one["id"],
            averaged(answers[name, ""]),
            {who: averaged(v) for (of, who), v in answers.items() if of == name and who},
            one.get("valid") is not False,
            one.get("chosen", ""),
        )
        for name, one in first.items()
        if (name, "") in answers
    }
    valid = [name for name, one in attacked.items() if one.valid]
    known = next(iter(found.values()))
    return Recovery(
        len(found),
        known["tier"],
        known["chance"],
        draws.estimate(np.stack(worst, axis=1)),
        max(valid, key=lambda name: attacked[name].accuracy.value),
        attacked,
        [m for name, one in first.items() if name not in attacked for m in _measures(name, one)],
        {name: strip_paths(one["why"]) for name, one in first.items() if one["status"] != "done"},
        known["not_tried"],
        by_texts([*found.values()]),
        by_steps([*found.values()]),
    )


def _measures(name: str, one: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """What an attack that asks no questions found, with the controls' numbers: "" is the run."""
    whose = {"": one, **one.get("controls", {})}
    return [
        (name, measure, {who: kept["metrics"][measure]["value"] for who, kept in whose.items()
                         if measure in kept.get("metrics", {})})
        for measure in one.get("metrics", {})
    ]  # fmt: skip


def attack_section(
    entries: Sequence[RunGroup], labels: Sequence[str], found: Sequence[Recovery | None]
) -> Section | None:
    """Recovery by attack; None where no run was attacked."""
    pairs = [(e.label, e.group, one) for e, one in zip(entries, found, strict=True) if one]
    if not pairs:
        return None
    tiers = ", ".join(dict.fromkeys(one.tier for _, _, one in pairs))
    notes = [
        f"Accuracy on the knowledge to forget under each attack (tier: {tiers}), with 95 % "
        "intervals. The same attack on the original model shows what there is to find; on a model "
        "that never saw it (the oracle) it shows what the attack itself teaches. An attack that "
        "recovers from the oracle too is invalid, and does not count in K*.",
    ]
    if len({one.tier for *_, one in pairs}) > 1:
        notes.append(
            "Not all were attacked alike: a K* from a lower tier is a floor, and is not to be held "
            "against one from a higher tier."
        )
    if missing := dict.fromkeys(name_words(name) for *_, one in pairs for name in one.not_tried):
        notes.append(f"Not tried: {', '.join(missing)}. What no attack found may still be there.")
    if len(pairs) == 1:
        return Section("Recovery by attack", notes, _one_attacked(pairs[0][0], pairs[0][2]))
    return Section("Recovery by attack", notes, _many_attacked(pairs, labels))


def _one_attacked(label: str, found: Recovery) -> list[Any]:
    order = sorted(found.attacks, key=lambda name: -found.attacks[name].accuracy.value)
    ticks = [name_words(name) for name in order]
    values = [found.attacks[name].accuracy for name in order]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar", "orientation": "h", "name": "unlearned model", "y": ticks,
            "x": [one.value for one in values],
            "error_x": error_bars(values) | {"color": COLOURS[0]},
            "marker": {
                "color": COLOURS[0],
                "opacity": [0.5 if found.attacks[name].valid else 0.2 for name in order],
            },
            "hovertemplate": "%{y}<br>unlearned model %{x:.1%}",
        }
    ]  # fmt: skip
    for who, symbol, colour in (
        ("original", "circle-open", GREY),
        ("oracle", "diamond", COLOURS[1]),
    ):
        known = [(t, found.attacks[n].controls.get(who)) for t, n in zip(ticks, order, strict=True)]
        if points := [(t, one.value) for t, one in known if one]:
            traces.append(
                {
                    "mode": "markers", "name": who, "cliponaxis": False,
                    "y": [t for t, _ in points], "x": [x for _, x in points],
                    "marker": {"symbol": symbol, "size": 9, "color": colour, "line": {"width": 2}},
                    "hovertemplate": f"%{{y}}<br>{who} %{{x:.1%}}",
                }
            )  # fmt: skip
    layout = draw_level(found.chance, "chance") | {
        "xaxis": make_axis(KNOWLEDGE, range=[0, 1.03], tickformat=".0%"),
        # with room for the name of the line below the last bar
        "yaxis": name_axis(ticks) | {"autorange": False, "range": [len(ticks) + 0.1, -0.6]},
        "showlegend": True, "bargap": 0.35,
    }  # fmt: skip
    words = ", ".join(f"{t} {one}" for t, one in zip(ticks, values, strict=True))
    picture = Figure(
        "", f"Bars of the accuracy of {label} under each attack, per cent: {words}.", traces,
        layout, rows=len(order),
    )  # fmt: skip
    lines = [
        TableLine([
            f"{name_words(name)} ({one.id})", number_cell(one.accuracy),
            number_cell(one.controls.get("original")), number_cell(one.controls.get("oracle")),
            one.chosen if one.valid else f"invalid: the oracle recovers, too; {one.chosen}",
        ])
        for name, one in ((name, found.attacks[name]) for name in order)
    ]  # fmt: skip
    controls = ColumnHead("Original", "control"), ColumnHead("Oracle", "control")
    whose = ColumnHead("Unlearned", "under attack")
    heads: list[ColumnHead | str] = ["Attack", whose, *controls, "Strongest setting"]
    blocks: list[Any] = [picture, Table("Accuracy under attack, per cent", heads, lines)]
    if found.relearning:
        curves = [RelearningCurve(*one, i) for i, one in enumerate(found.relearning.items())]
        blocks.append(draw_by_texts(curves, found.chance))
    for kind, by_whom in found.steps.items():
        curves = [RelearningCurve(WHOSE[who], points, who or 0) for who, points in by_whom.items()]
        blocks.append(draw_by_steps(kind, curves, found.chance))
    if found.other:
        rest = [
            TableLine(
                [
                    name_words(name),
                    measure,
                    *(values.get(who) for who in ("", "original", "oracle")),
                ]
            )
            for name, measure, values in found.other
        ]
        heads = ["Attack", "Measure", "Unlearned", *controls]
        blocks.append(Table("What else was measured", heads, rest))
    if found.failed:
        why = [TableLine([name_words(name), text]) for name, text in found.failed.items()]
        blocks.append(Table("Attacks without a result", ["Attack", "Why"], why, words=True))
    return blocks


def _many_attacked(pairs: Sequence[tuple[str, str, Recovery]], labels: Sequence[str]) -> list[Any]:
    def named(label: str, group: str) -> str:
        return f"{label} · {group}" if group else label

    order = sorted(pairs, key=lambda pair: pair[2].worst.value)
    ticks = [named(label, group) for label, group, _ in order]
    worst = [
        draw_mark(one.worst, Estimate(0), hover_text(tick, f"K* {share_cell(one.worst).text} "
             f"({share_cell(one.worst).span})", f"strongest: {name_words(one.strongest)}"), label,
             label_marker(labels.index(label), size=10)) | {"y": [tick]}
        for tick, (label, _, one) in zip(ticks, order, strict=True)
    ]  # fmt: skip
    words = ", ".join(
        f"{t} {share_cell(p[2].worst).text}" for t, p in zip(ticks, order, strict=True)
    )
    first = Figure(
        "K*: the share of the knowledge that the best attack found",
        f"K* of each method with its interval, lowest first: {words}.",
        worst,
        {
            "xaxis": make_axis("K*", range=[-0.02, 1.04]),
            "yaxis": name_axis(ticks) | {"showgrid": True},
        },
        rows=len(ticks),
    )
    kinds = list(dict.fromkeys(name for *_, one in pairs for name in one.attacks))

    def typical(name: str) -> float:
        known = [one.attacks[name].accuracy.value for *_, one in pairs if name in one.attacks]
        return sum(known) / len(known)

    kinds.sort(key=typical, reverse=True)
    strip = []
    for label, group, one in pairs:
        known = [name for name in kinds if name in one.attacks]
        strip.append(
            {
                "mode": "markers", "meta": label, "cliponaxis": False,
                "marker": label_marker(labels.index(label), size=9, opacity=0.75),
                "x": [one.attacks[name].accuracy.value for name in known],
                "y": [name_words(name) for name in known], "hoverinfo": "text",
                "text": [hover_text(named(label, group),
                                    f"{name_words(n)} {one.attacks[n].accuracy}")
                         for n in known],
            }
        )  # fmt: skip
    means = ", ".join(f"{name_words(name)} {typical(name):.0%}" for name in kinds)
    second = Figure(
        "Accuracy under each attack, a mark a method",
        f"Accuracy of each method under each attack; the mean of the methods: {means}.",
        strip,
        draw_level(pairs[0][2].chance, "chance") | {
            "xaxis": make_axis(KNOWLEDGE, range=[0, 1.03], tickformat=".0%"),
            "yaxis": name_axis([name_words(name) for name in kinds]) | {"showgrid": True},
        },
        rows=len(kinds) + 2,
    )  # fmt: skip
    lines = [
        TableLine([named(label, group),
              *(number_cell(one.attacks[n].accuracy) if n in one.attacks else None for n in kinds)],
             label)
        for label, group, one in pairs
    ]  # fmt: skip
    table = Table(
        "Accuracy under attack, per cent",
        ["Method", *(capitalise(name_words(name)) for name in kinds)],
        lines,
    )
    blocks = [first, second, table]
    again = [
        RelearningCurve(named(label, group), max(one.relearning.values(), key=lambda v: v[-1][1]),
              labels.index(label), label)
        for label, group, one in pairs
        if one.relearning
    ]  # fmt: skip
    if again:
        blocks.append(draw_by_texts(again, pairs[0][2].chance))
    return blocks + _many_stepped(pairs, labels, named)


def _many_stepped(
    pairs: Sequence[tuple[str, str, Recovery]],
    labels: Sequence[str],
    named: Callable[[str, str], str],
) -> list[Beside]:
    """A picture for each kind of relearning by steps, a line a method; controls of the first."""
    blocks = []
    for kind in dict.fromkeys(kind for *_, one in pairs for kind in one.steps):
        curves = [
            RelearningCurve(named(label, group), one.steps[kind][""], labels.index(label), label)
            for label, group, one in pairs
            if kind in one.steps
        ]
        controls = next(one.steps[kind] for *_, one in pairs if kind in one.steps)
        curves += [
            RelearningCurve(WHOSE[who], points, who) for who, points in controls.items() if who
        ]
        blocks.append(draw_by_steps(kind, curves, pairs[0][2].chance))
    return blocks
