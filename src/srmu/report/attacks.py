"""What attacks brought back: read from `results.json`, and the part of a page about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from srmu.evals.results import read_attacks
from srmu.evals.statistics import Array, Draws, Estimate, parse_answers, residual_table, worst_case
from srmu.report.figures import COLOURS, GREY, Look, Series, bar_look, draw_figure, label_look, make_look, mark_value
from srmu.report.format import capitalise, name_words
from srmu.report.html import Beside, Block, Section, Table, TableLine, percent_cell
from srmu.report.results import RunGroup, read_config_tree, strip_paths

ACCURACY = "accuracy on the knowledge to forget"
PERCENT = {"range": [0, 1.04], "tickformat": ".0%"}
TEXTS = re.compile(r"(.*), n=(\d+)")  # settings of E7: a variant and its texts
STEPS = re.compile(r"(.*), (\d+) steps")  # of E19: a kind and its steps
WHOSE = {"": "unlearned model", "original": "original", "oracle": "oracle"}
LINES: Any = {"mode": "lines+markers", "size": 7}
CONTROLS = {
    "original": make_look(GREY, "circle-open", "dot", **LINES),
    "oracle": make_look(GREY, "diamond-open", "dash", **LINES),
}

Points = Sequence[tuple[int, float]]  # how much was learned, accuracy after it
Attacks = Mapping[str, Any]  # what `attack_run` gives


class Curve(NamedTuple):
    """Accuracy against what was learned; a click on the label, if it has one, hides it."""

    name: str
    points: Points
    look: Look
    label: str = ""


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
    texts: Mapping[str, Points]  # relearning by texts, of each variant of E7
    steps: Mapping[str, Mapping[str, Points]]  # of each kind of E19, by whose model


def measure_recovery(entry: RunGroup) -> Recovery | None:
    """What the attacks on an entry's runs brought back; None where none was attacked."""
    files = {run: read_attacks(run) for run in entry.runs}
    attacked = {run: attacks for run, attacks in files.items() if attacks}
    if not attacked:
        return None
    draws = Draws()
    worst: list[Array] = []
    answers: dict[tuple[str, str], list[Array]] = {}  # of an attack on "" or on a control
    for run, attacks in attacked.items():
        model = read_config_tree(run)["model"]  # questions of one testbed are drawn alike for all
        facts = [(model, fact) for fact in attacks["facts"]]
        worst.append(worst_case(draws.means(residual_table(attacks), facts), attacks["chance"]))
        asked = {
            (name, who): parse_answers(one["right"])
            for name, attack in attacks["attacks"].items()
            for who, one in by_whose(attack).items()
            if one.get("right")
        }
        means = draws.means(np.stack([*asked.values()], axis=1), facts)
        for key, column in zip(asked, means.T, strict=True):
            answers.setdefault(key, []).append(column)

    count = min(len({*attacks["facts"]}) for attacks in attacked.values())

    def average(values: Sequence[Array]) -> Estimate:
        return draws.estimate_accuracy(np.stack(values, axis=1), count)

    results = {name: one for a in attacked.values() for name, one in a["attacks"].items()}
    rows = {
        name: AttackedRow(
            one["id"],
            average(answers[name, ""]),
            {who: average(v) for (of, who), v in answers.items() if of == name and who},
            one.get("valid") is not False,
            one.get("chosen", ""),
        )
        for name, one in results.items()
        if (name, "") in answers
    }
    valid = [name for name, row in rows.items() if row.valid]
    first = next(iter(attacked.values()))
    return Recovery(
        len(attacked),
        first["tier"],
        first["chance"],
        draws.estimate(np.stack(worst, axis=1)),
        max(valid, key=lambda name: rows[name].accuracy.value),
        rows,
        [one for name in results if name not in rows for one in list_measures(name, results[name])],
        {name: strip_paths(one["why"]) for name, one in results.items() if one["status"] != "done"},
        first["not_tried"],
        average_by_texts([*attacked.values()]),
        average_by_steps([*attacked.values()]),
    )


def by_whose(attack: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """An attack on the run (""), and the same on each control."""
    return {"": attack, **attack.get("controls", {})}


def list_measures(name: str, attack: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """The numbers of an attack that asks no questions, and the controls' beside them."""
    return [
        (name, measure, {who: one["metrics"][measure]["value"]
                         for who, one in by_whose(attack).items()
                         if measure in one.get("metrics", {})})
        for measure in attack.get("metrics", {})
    ]  # fmt: skip


def average_by_texts(runs: Sequence[Attacks]) -> dict[str, Points]:
    """For each variant of E7, a mean over runs: accuracy by the number of texts; 0: before."""
    points: dict[str, dict[int, list[float]]] = {}
    for attacks in runs:
        plain = attacks["attacks"].get("forced_choice", {}).get("accuracy")
        attack = attacks["attacks"].get("benign_relearning", {})
        for variant, texts, value in match_settings(attack, TEXTS):
            points.setdefault(variant, {}).setdefault(texts, []).append(value)
            if plain:
                points[variant].setdefault(0, []).append(plain["value"])
    return {variant: average_points(values) for variant, values in sorted(points.items())}


def average_by_steps(runs: Sequence[Attacks]) -> dict[str, dict[str, Points]]:
    """For each kind of E19, of the run ("") and its controls: accuracy by the number of steps."""
    points: dict[str, dict[str, dict[int, list[float]]]] = {}
    for attacks in runs:
        for who, one in by_whose(attacks["attacks"].get("relearning_steps", {})).items():
            for kind, steps, value in match_settings(one, STEPS):
                whose = points.setdefault(kind, {}).setdefault(who, {})
                whose.setdefault(steps, []).append(value)
    return {kind: {who: average_points(values) for who, values in whose.items()} for kind, whose in points.items()}


def match_settings(attack: Mapping[str, Any], form: re.Pattern[str]) -> Iterator[tuple[str, int, float]]:
    """An attack's settings of that form, with the accuracy on the test half."""
    for setting, scores in attack.get("settings", {}).items():
        if (match := form.fullmatch(setting)) and scores["test"] is not None:
            yield match[1], int(match[2]), scores["test"]


def average_points(values: Mapping[int, Sequence[float]]) -> Points:
    return [(at, fmean(values[at])) for at in sorted(values)]


# ---- the part of the page


def attack_section(
    entries: Sequence[RunGroup], labels: Sequence[str], recoveries: Sequence[Recovery | None]
) -> Section | None:
    """Recovery by attack; None where no run was attacked."""
    pairs = [(entry, one) for entry, one in zip(entries, recoveries, strict=True) if one]
    if not pairs:
        return None
    tiers = dict.fromkeys(one.tier for _, one in pairs)
    notes = [
        f"Accuracy on the knowledge to forget under each attack (tier: {', '.join(tiers)}), with "
        "95 % intervals. The same attack on the original model shows what there is to find; on a "
        "model that never saw it (the oracle) it shows what the attack itself teaches. An attack "
        "that recovers from the oracle too is invalid, and does not count in K*."
    ]
    if len(tiers) > 1:
        notes.append(
            "Not all were attacked alike: a K* from a lower tier is a floor, and is not to be held "
            "against one from a higher tier."
        )
    if missing := dict.fromkeys(name_words(name) for _, one in pairs for name in one.not_tried):
        notes.append(f"Not tried: {', '.join(missing)}. What no attack found may still be there.")
    blocks = show_one(*pairs[0]) if len(pairs) == 1 else show_many(pairs, labels)
    return Section("Recovery by attack", notes, blocks)


def show_one(entry: RunGroup, recovery: Recovery) -> list[Block]:
    """The attacks on one method: bars, the controls, and curves of relearning."""
    rows = sorted(recovery.attacks.items(), key=lambda item: -item[1].accuracy.value)
    bars = bar_look(0, [0.5 if row.valid else 0.2 for _, row in rows])
    looks = {"original": make_look(GREY, "circle-open", size=9), "oracle": make_look(COLOURS[1], "diamond", size=9)}
    marks = [{"attack": name_words(name), ACCURACY: row.accuracy} for name, row in rows]
    series = [Series(WHOSE[""], marks, bars)]
    for who, look in looks.items():
        marks = [{"attack": name_words(name), ACCURACY: row.controls[who].value}
                 for name, row in rows if who in row.controls]  # fmt: skip
        series += [Series(who, marks, look)] if marks else []
    # with room for the name of the line below the last bar
    y_axis = {"autorange": False, "range": [len(rows) + 0.1, -0.6]}
    figure = draw_figure(
        "", series, ACCURACY, "attack", x_axis=PERCENT, y_axis=y_axis, legend=True,
        subject=entry.label,
    )  # fmt: skip
    mark_value(figure, "chance", x=recovery.chance)
    controls = ["Original\ncontrol", "Oracle\ncontrol"]
    heads = ["Attack", "Unlearned\nunder attack", *controls, "Strongest setting"]
    lines = []
    for name, row in rows:
        chosen = row.chosen if row.valid else f"invalid: the oracle recovers, too; {row.chosen}"
        numbers = [row.accuracy, *map(row.controls.get, looks)]
        lines.append(TableLine([f"{name_words(name)} ({row.id})", *numbers, chosen]))
    blocks: list[Block] = [figure, Table("Accuracy under attack, per cent", heads, lines)]
    curves = [Curve(name, points, label_look(i, **LINES))
              for i, (name, points) in enumerate(recovery.texts.items())]  # fmt: skip
    if curves:
        blocks.append(draw_relearning("texts", "", curves, recovery.chance))
    for kind, whose in recovery.steps.items():
        own = {"": label_look(0, **LINES), **CONTROLS}
        curves = [Curve(WHOSE[who], points, own[who]) for who, points in whose.items()]
        blocks.append(draw_relearning("steps", kind, curves, recovery.chance))
    if recovery.other:
        rest = [TableLine([name_words(name), measure, *map(values.get, WHOSE)])
                for name, measure, values in recovery.other]  # fmt: skip
        heads = ["Attack", "Measure", "Unlearned", *controls]
        blocks.append(Table("What else was measured", heads, rest))
    if recovery.failed:
        why = [TableLine([name_words(name), text]) for name, text in recovery.failed.items()]
        blocks.append(Table("Attacks without a result", ["Attack", "Why"], why, words=True))
    return blocks


def show_many(pairs: Sequence[tuple[RunGroup, Recovery]], labels: Sequence[str]) -> list[Block]:
    """The attacks on several methods: K*, a mark a method, and curves of relearning."""
    chance = pairs[0][1].chance
    means: dict[str, list[float]] = {}
    for _, recovery in pairs:
        for attack, row in recovery.attacks.items():
            means.setdefault(attack, []).append(row.accuracy.value)
    attacks = sorted(means, key=lambda attack: -fmean(means[attack]))
    shares, strips, lines, by_texts = [], [], [], []
    by_steps: dict[str, list[Curve]] = {}
    for entry, recovery in pairs:
        name, label = " · ".join(filter(None, [entry.label, entry.group])), entry.label
        i = labels.index(label)
        share = {"K*": recovery.worst, "method": name}
        share["strongest attack"] = name_words(recovery.strongest)
        shares.append(Series(name, [share], label_look(i, size=10), label))
        numbers = {attack: row.accuracy for attack, row in recovery.attacks.items()}
        marks = [
            {ACCURACY: one.value, "attack": name_words(attack), "per cent": one} for attack, one in numbers.items()
        ]
        strips.append(Series(name, marks, label_look(i, size=9), label))
        lines.append(TableLine([name, *map(numbers.get, attacks)], label))
        look = label_look(i, **LINES)
        if recovery.texts:
            best = max(recovery.texts.values(), key=lambda points: points[-1][1])
            by_texts.append(Curve(name, best, look, label))
        for kind, whose in recovery.steps.items():
            by_steps.setdefault(kind, []).append(Curve(name, whose[""], look, label))
    shares.sort(key=lambda one: one.rows[0]["K*"].value)
    title = "K*: the share of the knowledge that the best attack found"
    first = draw_figure(title, shares, "K*", "method", x_axis={"range": [-0.02, 1.04]})
    second = draw_figure(
        "Accuracy under each attack, a mark a method", strips, ACCURACY, "attack",
        x_axis=PERCENT, y_axis={"categoryarray": [*map(name_words, attacks)]},
    )  # fmt: skip
    mark_value(second, "chance", x=chance)
    heads = ["Method", *(capitalise(name_words(attack)) for attack in attacks)]
    blocks: list[Block] = [first, second, Table("Accuracy under attack, per cent", heads, lines)]
    if by_texts:
        blocks.append(draw_relearning("texts", "", by_texts, chance))
    for kind, curves in by_steps.items():
        whose = next(one.steps[kind] for _, one in pairs if kind in one.steps)
        curves += [Curve(WHOSE[who], whose[who], CONTROLS[who]) for who in whose if who]
        blocks.append(draw_relearning("steps", kind, curves, chance))
    return blocks


def draw_relearning(unit: str, kind: str, curves: Sequence[Curve], chance: float) -> Beside:
    """Accuracy by the texts (E7) or by the steps (E19, of one kind) of relearning."""
    note = "Fine-tuning on harmless texts, which say nothing of what is asked for."
    if unit == "texts" and curves[0].label:
        note += " Of each method the variant that brings back most."
    elif unit == "steps" and not kind.startswith("neutral"):
        note = "Fine-tuning on other facts of the kind to be forgotten; none of them is asked for."
    title = f"Relearning by {unit}" + (f": {kind}" if kind else "")
    budgets = sorted({at for curve in curves for at, _ in curve.points})
    series = [
        Series(one.name, [{unit: str(at), "accuracy": value} for at, value in one.points],
               one.look, one.label)
        for one in curves
    ]  # fmt: skip
    figure = draw_figure(
        "", series, unit, "accuracy", y_axis=PERCENT, subject=title,
        x_axis={"title": f"{unit} learned again", "categoryarray": [*map(str, budgets)]},
        legend=not all(one.label for one in curves),
    )  # fmt: skip
    mark_value(figure, "chance", y=chance)
    lines = [
        TableLine([one.name, *(percent_cell(dict(one.points).get(at)) for at in budgets)], one.label) for one in curves
    ]
    first = "Method" if curves[0].label else "Variant" if unit == "texts" else "Model"
    heads = [first, *(f"{at}\n{unit if at else 'before'}" for at in budgets)]
    table = Table("Accuracy after relearning, per cent", heads, lines)
    return Beside(title, figure, table, [note])
