"""What attacks brought back: read from `results.json`, and the part of a page about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from srmu.evals.results import PLAIN, read_attacks
from srmu.evals.statistics import Array, Draws, Estimate, parse_answers, residual_table, worst_case
from srmu.report.figures import COLOURS, GREY, Figure, Series, draw_figure, label_look, make_look, mark_value
from srmu.report.format import format_value, name_words, write_words
from srmu.report.html import LABEL, Block, Section, Table
from srmu.report.results import RunGroup, read_config_tree, strip_paths

ACCURACY = "accuracy on the knowledge to forget"
PERCENT = {"range": [0, 1.04], "tickformat": ".0%"}
RELEARNING = {  # attacks that learn again: the unit that they count in, and settings with that count
    "benign_relearning": ("texts", re.compile(r"(.*), n=(\d+)")),
    "relearning_steps": ("steps", re.compile(r"(.*), (\d+) steps")),
}
HEADS = {"": "Unlearned\nunder attack", "original": "Original\ncontrol", "oracle": "Oracle\ncontrol"}
CONTROLS = {"original": ("circle-open", GREY, "dot"), "oracle": ("diamond", COLOURS[1], "dash")}


@dataclass(frozen=True)
class Recovery:
    """The attacks on an entry's runs; K* is the share of the knowledge that the best one finds."""

    tier: str
    chance: float
    worst: Estimate  # K*
    strongest: str
    attacks: Mapping[str, Mapping[str, Any]]  # id, accuracies by whose model, valid, strongest setting
    other: Sequence[Mapping[str, Any]]  # rows: numbers of attacks that ask no questions
    failed: Sequence[Mapping[str, str]]  # rows: attacks that came to nothing, and why
    not_tried: Sequence[str]
    curves: pd.DataFrame  # relearning: unit, kind, whose, count, accuracy


def estimate_recovery(entry: RunGroup) -> Recovery | None:
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
    results = {name: one for a in attacked.values() for name, one in a["attacks"].items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, one in results.items():
        if (name, "") in answers:
            valid = one.get("valid") is not False  # not where the oracle, which never knew, recovers too
            setting = one.get("chosen", "") if valid else f"invalid: the oracle recovers, too; {one.get('chosen', '')}"
            rows[name] = {"id": one["id"], "valid": valid, "setting": setting}
    for (name, who), columns in answers.items():
        if name in rows:
            rows[name][who] = draws.estimate_accuracy(np.stack(columns, axis=1), count)
    first = next(iter(attacked.values()))
    return Recovery(
        tier=first["tier"],
        chance=first["chance"],
        worst=draws.estimate(np.stack(worst, axis=1)),
        strongest=max((n for n, row in rows.items() if row["valid"]), key=lambda name: rows[name][""].value),
        attacks=rows,
        other=[line for name, one in results.items() if name not in rows for line in list_measures(name, one)],
        failed=[
            {"Attack": name_words(name), "Why": strip_paths(one["why"])}
            for name, one in results.items()
            if one["status"] != "done"
        ],
        not_tried=first["not_tried"],
        curves=relearning_curves([*attacked.values()]),
    )


def by_whose(attack: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """An attack on the run (""), and the same on each control."""
    return {"": attack, **attack.get("controls", {})}


def list_measures(name: str, attack: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of an attack that asks no questions, and the controls' beside them."""
    whose = {who: one.get("metrics", {}) for who, one in by_whose(attack).items()}
    return [
        {"Attack": name_words(name), "Measure": measure}
        | {head.split("\n")[0]: whose.get(who, {}).get(measure, {}).get("value") for who, head in HEADS.items()}
        for measure in attack.get("metrics", {})
    ]


def relearning_curves(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Accuracy by what was learned again, a mean over runs; no texts: before any attack."""
    lines = []
    for attacks in runs:
        plain = attacks["attacks"].get(PLAIN, {}).get("accuracy")
        for attack, (unit, form) in RELEARNING.items():
            for who, one in by_whose(attacks["attacks"].get(attack, {})).items():
                for setting, scores in one.get("settings", {}).items():
                    if (match := form.fullmatch(setting)) and scores["test"] is not None:
                        lines.append((unit, match[1], who, int(match[2]), scores["test"]))
                        if unit == "texts" and plain and not who:
                            lines.append((unit, match[1], who, 0, plain["value"]))
    keys = ["unit", "kind", "whose", "count"]
    return pd.DataFrame(lines, columns=[*keys, "accuracy"]).groupby(keys, sort=False, as_index=False).mean()


# ---- the part of the page


def attack_section(
    entries: Sequence[RunGroup], labels: Sequence[str], recoveries: Sequence[Recovery | None]
) -> Section | None:
    """Recovery by attack; None where no run was attacked."""
    pairs = [(entry, one) for entry, one in zip(entries, recoveries, strict=True) if one]
    if not pairs:
        return None
    notes = write_words(
        "attacks",
        tiers=[*dict.fromkeys(one.tier for _, one in pairs)],
        not_tried=[*dict.fromkeys(name_words(name) for _, one in pairs for name in one.not_tried)],
    )
    blocks = [Block([draw_shares(pairs, labels), draw_attacks(pairs, labels)])]
    if len(pairs) > 1:
        rows = [
            {LABEL: entry.label, "Method": entry.name} | {name_words(k): row[""] for k, row in recovery.attacks.items()}
            for entry, recovery in pairs
        ]
        heads = dict.fromkeys(head for row in rows for head in row)
        table = Table("Accuracy under attack, per cent", [dict.fromkeys(heads) | row for row in rows])
        blocks.append(Block(table=table))
    for entry, recovery in pairs:
        attacks = [
            {"Attack": f"{name_words(name)} ({row['id']})"}
            | {head: row.get(who) for who, head in HEADS.items()}
            | {"Strongest setting": row["setting"]}
            for name, row in sorted(recovery.attacks.items(), key=lambda item: -item[1][""].value)
        ]
        for title, rows in (
            ("Accuracy under attack, per cent", attacks),
            ("What else was measured", recovery.other),
            ("Attacks without a result", recovery.failed),
        ):
            fold = f"{title}: {entry.name}" if len(pairs) > 1 else ""
            if rows:
                table = Table(fold or title, rows, words=rows is recovery.failed, fold=fold, label=entry.label)
                blocks.append(Block(table=table))
    return Section("Recovery by attack", notes, [*blocks, *draw_relearning(pairs, labels)])


def draw_shares(pairs: Sequence[tuple[RunGroup, Recovery]], labels: Sequence[str]) -> Figure:
    """K* of each method, lowest first."""
    series = []
    for entry, one in sorted(pairs, key=lambda pair: pair[1].worst.value):
        row = {"K*": one.worst, "method": entry.name, "strongest attack": name_words(one.strongest)}
        look = label_look(labels.index(entry.label), size=10)
        series.append(Series(entry.name, [row], look, entry.label))
    title = "K*: the share of the knowledge that the best attack found"
    return draw_figure(title, series, "K*", "method", x_axis={"range": [-0.02, 1.04]})


def draw_attacks(pairs: Sequence[tuple[RunGroup, Recovery]], labels: Sequence[str]) -> Figure:
    """A mark for each method under each attack, pale where it is invalid; of a single one beside its controls."""
    series = []
    for entry, recovery in pairs:
        rows = {name_words(name): row for name, row in recovery.attacks.items()}
        marks = [{ACCURACY: row[""], "attack": name, "strongest setting": row["setting"]} for name, row in rows.items()]
        look = label_look(labels.index(entry.label), size=9)
        opacity = [1 if row["valid"] else 0.35 for row in rows.values()]
        look = {**look, "marker": {**look["marker"], "opacity": opacity}}
        series.append(Series(entry.name, marks, look, entry.label if len(labels) > 1 else ""))
        for who, (symbol, colour, _) in CONTROLS.items() if len(pairs) == 1 else ():
            marks = [{ACCURACY: row[who], "attack": name} for name, row in rows.items() if who in row]
            series += [Series(who, marks, make_look(colour, symbol, size=9))] if marks else []
    means: dict[str, list[float]] = {}
    for name, row in (item for _, recovery in pairs for item in recovery.attacks.items()):
        means.setdefault(name_words(name), []).append(row[""].value)
    order = {"categoryarray": sorted(means, key=lambda name: -fmean(means[name]))}
    figure = draw_figure("Accuracy under each attack", series, ACCURACY, "attack", x_axis=PERCENT, y_axis=order)
    mark_value(figure, "chance", x=pairs[0][1].chance)
    return figure


def draw_relearning(pairs: Sequence[tuple[RunGroup, Recovery]], labels: Sequence[str]) -> list[Block]:
    """Accuracy by the texts (E7) or the steps (E19) of relearning, a figure a kind."""
    frames = [one.curves.assign(name=entry.name, label=entry.label) for entry, one in pairs]
    curves = pd.concat(frames, ignore_index=True)
    is_own = curves["whose"] == ""
    curves["name"] = curves["name"].where(is_own, curves["whose"])
    # the controls of the first method that has them stand for all
    controls = curves[~is_own].drop_duplicates(["unit", "kind", "whose", "count"])
    keys = ["name", "label", "whose"]
    blocks = []
    for (unit, kind), drawn in pd.concat([curves[is_own], controls]).groupby(["unit", "kind"], sort=False):
        title = f"Relearning by {unit}: {kind}"
        values = drawn.pivot_table("accuracy", keys, "count", sort=False).sort_index(axis=1)
        series, rows = [], []
        for (name, label, who), curve in values.iterrows():
            look = label_look(labels.index(label), mode="lines+markers", size=7)
            if who:
                symbol, colour, dash = CONTROLS[who]
                look, label = make_look(colour, symbol, dash, "lines+markers", 7), ""
            marks = [{unit: str(count), "accuracy": value} for count, value in curve.dropna().items()]
            series.append(Series(name, marks, look, label if len(labels) > 1 else ""))
            cells = {f"{n}\n{unit if n else 'before'}": format_value(value, "%") for n, value in curve.items()}
            rows.append({LABEL: label, "Method": name, **cells})
        x_axis = {"title": f"{unit} learned again", "categoryarray": [*map(str, values)]}
        figure = draw_figure("", series, unit, "accuracy", x_axis=x_axis, y_axis=PERCENT, subject=title)
        mark_value(figure, "chance", y=pairs[0][1].chance)
        words = write_words("relearning", harmless=unit == "texts" or kind.startswith("neutral"))
        blocks.append(Block([figure], Table("Accuracy after relearning, per cent", rows), title, words))
    return blocks
