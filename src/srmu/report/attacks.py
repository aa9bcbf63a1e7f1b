"""What attacks brought back: read from `results.json`, and the part of a page about it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from srmu.evals.results import PLAIN, read_attacks
from srmu.evals.statistics import Array, Draws, Estimate, draw_floors, parse_answers, residual_table, worst_case
from srmu.report.figures import COLOURS, GREY, Figure, Row, Series, draw_figure, label_look, make_look, mark_value
from srmu.report.format import drop_empty, format_value, name_words, read_estimate, write_words
from srmu.report.html import LABEL, Block, Section, Table
from srmu.report.results import RunGroup, strip_paths
from srmu.runs.config import read_tree
from srmu.runs.prices import describe_prices, describe_search
from srmu.runs.record import CONFIG

ACCURACY = "accuracy on the knowledge to forget"
PERCENT = {"range": [0, 1.04], "tickformat": ".0%"}
RELEARNING = {  # attacks that learn again: the unit that they count in, settings with that count, and their one kind
    "benign_relearning": ("texts", re.compile(r"(.*), n=(\d+)"), ""),
    "relearning_steps": ("steps", re.compile(r"(.*), (\d+) steps"), ""),
    "tuned_relearning": ("steps", re.compile(r"(.*), (\d+) steps"), "the best training found"),
}
OWN = "Unlearned\nunder attack"
HEADS = {"": OWN, "original": "Original\ncontrol", "oracle": "Oracle\ncontrol"}
NEVER = {"unknown": "Never known\ncontrol"}  # of the original; where such facts were asked for
LEGEND = {"unknown": "never known"}
CONTROLS: dict[str, dict[str, Any]] = {
    "original": {"colour": GREY, "symbol": "circle-open", "dash": "dot"},
    "oracle": {"colour": COLOURS[1], "symbol": "diamond", "dash": "dash"},
    "unknown": {"colour": COLOURS[2], "symbol": "square-open", "dash": "dashdot"},
}


@dataclass(frozen=True)
class Recovery:
    """The attacks on an entry's runs; K* is the share of the knowledge that the best one finds."""

    tier: str
    chance: float
    unknown: int  # facts that the original never knew; 0: none were asked for
    worst: Estimate  # K*
    strongest: str
    attacks: Mapping[str, Row]  # rows of a table by the attack's name: accuracies, strongest setting
    invalid: Sequence[str]  # attacks by which the oracle, which never knew, recovers too
    other: Sequence[Row]  # numbers of attacks that ask no questions
    failed: Sequence[Row]  # attacks that came to nothing, and why
    not_tried: Sequence[str]
    curves: pd.DataFrame  # relearning: unit, kind, whose, count, accuracy
    prices: Sequence[str]  # of bringing the knowledge back, in words

    @property
    def tried(self) -> set[str]:
        """The attacks that found something, if only numbers, by name."""
        return {*self.attacks, *(str(row["Attack"]) for row in self.other)}


def estimate_recovery(entry: RunGroup) -> Recovery | None:
    """What the attacks on an entry's runs brought back; None where none was attacked."""
    attacked = {run: attacks for run in entry.runs if (attacks := read_attacks(run))}
    if not attacked:
        return None
    draws = Draws()
    worst: list[Array] = []
    answers: dict[tuple[str, str], list[Array]] = {}  # of an attack on "" or on a control
    for run, attacks in attacked.items():
        model = read_tree(run / CONFIG)["model"]  # questions of one testbed are drawn alike for all
        facts = [(model, fact) for fact in attacks["facts"]]
        means = draws.means(residual_table(attacks), facts)
        worst.append(worst_case(means, attacks["chance"], draw_floors(attacks, draws, model)))
        for key, column in resample_answers(attacks, draws, model).items():
            answers.setdefault(key, []).append(column)
    first, *_ = attacked.values()
    facts_of = {kind: [len({*a[kind]}) for a in attacked.values() if kind in a] for kind in ("facts", "unknown")}
    count = {kind: min(counts, default=0) for kind, counts in facts_of.items()}
    accuracies = {
        (name, who): draws.estimate_accuracy(np.stack(each, axis=1), count["unknown" if who == "unknown" else "facts"])
        for (name, who), each in answers.items()
    }
    heads = HEADS | (NEVER if count["unknown"] else {})
    rows, shares, invalid, other, failed = {}, {}, [], [], []
    for name, one in {name: one for a in attacked.values() for name, one in a["attacks"].items()}.items():
        words, setting = name_words(name), one.get("chosen", "")
        if one["status"] != "done":
            failed.append({"Attack": words, "Why": strip_paths(one["why"])})
        if (name, "") not in accuracies:
            for measure in one.get("metrics", {}):
                whose = {who: it.get("metrics", {}).get(measure, {}).get("value") for who, it in by_whose(one).items()}
                numbers = {head.split("\n")[0]: whose.get(who) for who, head in heads.items()}
                other.append({"Attack": words, "Measure": measure, **numbers})
            continue
        if one.get("valid") is False:
            invalid.append(words)
            setting = f"invalid: the oracle recovers, too; {setting}"
        numbers = {head: accuracies.get((name, who)) for who, head in heads.items()}
        rows[words] = {"Attack": f"{words} ({one['id']})", **numbers, "Strongest setting": setting}
        floors = [e["floor"] for a in attacked.values() if "floor" in (e := a["attacks"].get(name, {}))]
        reached = np.array([1.0, accuracies[name, ""].value])
        shares[words] = float(worst_case(reached, first["chance"], fmean(floors) if floors else None))
    return Recovery(
        tier=first["tier"],
        chance=first["chance"],
        unknown=count["unknown"],
        worst=draws.estimate(np.stack(worst, axis=1)),
        strongest=max((name for name in rows if name not in invalid), key=lambda name: shares[name]),
        attacks=rows,
        invalid=invalid,
        other=other,
        failed=failed,
        not_tried=[*map(name_words, first["not_tried"])],
        curves=relearning_curves([*attacked.values()]),
        prices=[
            *list_prices(attacked),
            *dict.fromkeys(line for a in attacked.values() for line in describe_search(a["attacks"])),
        ],
    )


def list_prices(attacked: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """What it takes to bring knowledge back, in words: of several runs, each with its name."""
    return [
        f"{run.name}: {line}" if len(attacked) > 1 else line
        for run, report in attacked.items()
        for one in report["attacks"].values()
        for line in describe_prices(one.get("price", ()))
    ]


def resample_answers(attacks: Mapping[str, Any], draws: Draws, model: str) -> dict[tuple[str, str], Array]:
    """The accuracy of each attack on "" or on a control, as it is and in each resample of the facts asked for."""
    found: dict[tuple[str, str], Array] = {}
    for unknown in (False, True):
        asked = {
            (name, who): parse_answers(one["right"])
            for name, attack in attacks["attacks"].items()
            for who, one in by_whose(attack).items()
            if one.get("right") and (who == "unknown") == unknown
        }
        numbers = attacks["unknown" if unknown else "facts"] if asked else []
        facts = [(model, "unknown", number) if unknown else (model, number) for number in numbers]
        if asked:
            found |= dict(zip(asked, draws.means(np.stack([*asked.values()], axis=1), facts).T, strict=True))
    return found


def by_whose(attack: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """An attack on the run (""), and the same on each control."""
    return {"": attack, **attack.get("controls", {})}


def relearning_curves(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Accuracy by what was learned again, a mean over runs; no texts: before any attack."""
    lines = []
    for attacks in runs:
        plain = attacks["attacks"].get(PLAIN, {}).get("accuracy")
        for attack, (unit, form, kind) in RELEARNING.items():
            for who, one in by_whose(attacks["attacks"].get(attack, {})).items():
                for setting, scores in one.get("settings", {}).items():
                    if (match := form.fullmatch(setting)) and scores["test"] is not None:
                        lines.append((unit, kind or match[1], who, int(match[2]), scores["test"]))
                        if unit == "texts" and plain and not who:
                            lines.append((unit, match[1], who, 0, plain["value"]))
    keys = ["unit", "kind", "whose", "count"]
    return pd.DataFrame(lines, columns=[*keys, "accuracy"]).groupby(keys, sort=False, as_index=False).mean()


# ---- the part of the page


def attack_section(
    entries: Sequence[RunGroup], labels: Sequence[str], recoveries: Sequence[Recovery | None]
) -> Section:
    """Recovery by attack of the entries that were attacked."""
    pairs = [(entry, one) for entry, one in zip(entries, recoveries, strict=True) if one]
    if not pairs:
        return Section("Recovery by attack", [], [])
    notes = write_words(
        "attacks",
        tiers=[*dict.fromkeys(one.tier for _, one in pairs)],
        # of one alone the page's headline says it
        not_tried=[*dict.fromkeys(n for _, one in pairs for n in one.not_tried)] if len(entries) > 1 else (),
        unknown=[*dict.fromkeys(one.unknown for _, one in pairs if one.unknown)],
    )
    means = pd.Series({(e.name, k): row[OWN].value for e, one in pairs for k, row in one.attacks.items()})
    names = [*means.groupby(level=1).mean().sort_values(ascending=False, kind="stable").index]
    blocks = [Block([draw_shares(pairs, labels), draw_attacks(pairs, labels, names)])]
    if len(pairs) > 1:
        found = [
            {LABEL: entry.label, "Method": entry.name} | {name: one.attacks.get(name, {}).get(OWN) for name in names}
            for entry, one in pairs
        ]
        blocks.append(Block(table=Table("Accuracy under attack, per cent", found)))
    for entry, one in pairs:
        for title, rows in (
            ("Accuracy under attack, per cent", [one.attacks[name] for name in names if name in one.attacks]),
            ("What else was measured", one.other),
            ("What it takes to bring it back", [{"Price": line} for line in one.prices]),
            ("Attacks without a result", one.failed),
        ):
            fold = f"{title}: {entry.name}" if len(pairs) > 1 else ""
            if rows:
                words = rows is one.failed or "Price" in rows[0]
                blocks.append(
                    Block(table=Table(fold or title, drop_empty(rows), words=words, fold=fold, label=entry.label))
                )
    return Section("Recovery by attack", notes, [*blocks, *draw_relearning(pairs, labels)])


def draw_shares(pairs: Sequence[tuple[RunGroup, Recovery]], labels: Sequence[str]) -> Figure:
    """K* of each method, lowest first."""
    series = []
    for entry, one in sorted(pairs, key=lambda pair: pair[1].worst.value):
        row = {"K*": one.worst, "method": entry.name, "strongest attack": one.strongest}
        look = label_look(labels.index(entry.label), size=10)
        series.append(Series(entry.name, [row], look, entry.label))
    title = "K*: the share of the knowledge that the best attack found"
    return draw_figure(title, series, "K*", "method", x_axis={"range": [-0.02, 1.04]})


def draw_attacks(pairs: Sequence[tuple[RunGroup, Recovery]], labels: Sequence[str], names: Sequence[str]) -> Figure:
    """A mark for each method under each attack, pale where it is invalid; of a single one beside its controls."""
    series = []
    for entry, one in pairs:
        marks = [
            {ACCURACY: row[OWN], "attack": name, "strongest setting": row["Strongest setting"]}
            for name, row in one.attacks.items()
        ]
        look = label_look(labels.index(entry.label), size=9)
        opacity = [0.35 if name in one.invalid else 1 for name in one.attacks]
        look = {**look, "marker": {**look["marker"], "opacity": opacity}}
        series.append(Series(entry.name, marks, look, entry.label if len(labels) > 1 else ""))
        for who, look in CONTROLS.items() if len(pairs) == 1 else ():
            head = (HEADS | NEVER)[who]
            known = {name: row[head] for name, row in one.attacks.items() if row.get(head)}
            marks = [{ACCURACY: value, "attack": name} for name, value in known.items()]
            series += [Series(LEGEND.get(who, who), marks, make_look(**look, size=9))] if marks else []
    title, order = "Accuracy under each attack", {"categoryarray": names}
    figure = draw_figure(title, series, ACCURACY, "attack", x_axis={**PERCENT, "title": "accuracy"}, y_axis=order)
    mark_value(figure, "chance", x=pairs[0][1].chance)
    figure.plot.update_annotations(y=1, yanchor="top")  # the lowest rows lie near chance
    return figure


def draw_relearning(pairs: Sequence[tuple[RunGroup, Recovery]], labels: Sequence[str]) -> list[Block]:
    """Accuracy by the texts (E7) or the steps (E19) of relearning, a figure a kind."""
    frames = [one.curves.assign(name=entry.name, label=entry.label) for entry, one in pairs]
    curves = pd.concat(frames, ignore_index=True)
    is_own = curves["whose"] == ""
    curves["name"] = curves["name"].where(is_own, curves["whose"].replace(LEGEND))
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
                look, label = make_look(**CONTROLS[who], mode="lines+markers", size=7), ""
            marks = [{unit: str(count), "accuracy": value} for count, value in curve.dropna().items()]
            series.append(Series(name, marks, look, label if len(labels) > 1 else ""))
            known = {n: format_value(value, "%") for n, value in curve.dropna().items()}
            cells = {f"{n}\n{unit if n else 'before'}": known.get(n) for n in values}
            rows.append({LABEL: label, "Method": name, **cells})
        x_axis = {"title": f"{unit} learned again", "categoryarray": [*map(str, values)]}
        figure = draw_figure("", series, unit, "accuracy", x_axis=x_axis, y_axis=PERCENT, subject=title)
        mark_value(figure, "chance", y=pairs[0][1].chance)
        words = write_words("relearning", harmless=unit == "texts" or kind.startswith("neutral"))
        blocks.append(Block([figure], Table("Accuracy after relearning, per cent", rows), title, words))
    return blocks


def attack_table(report: dict[str, Any]) -> list[dict[str, str]]:
    """The attacks as lines of a table, strongest first; accuracies in %."""
    table = []
    attacks = report["attacks"]
    heads = {"original": "original", "oracle": "oracle"} | ({"unknown": "never known"} if "unknown" in report else {})
    for name in sorted(attacks, key=lambda name: -attacks[name].get("accuracy", {"value": -1})["value"]):
        entry = attacks[name]
        controls = entry.get("controls", {})
        whose = {head: controls.get(who, {}).get("accuracy") for who, head in heads.items()}
        numbers = {"accuracy": entry.get("accuracy"), "recovered": entry.get("recovery"), **whose}
        setting = entry.get("chosen") or describe_metrics(entry)
        if entry["why"]:
            setting = f"{entry['status']}: {entry['why']}"
        elif entry.get("valid") is False:
            setting = f"invalid: the oracle recovers, too; {setting}"
        cells = {head: str(read_estimate(one)) if one else "" for head, one in numbers.items()}
        table.append({"attack": f"{entry['id']} {name}", **cells, "setting": setting})
    return drop_empty(table)


def describe_metrics(entry: Mapping[str, Any]) -> str:
    """The first number of an attack that answers no questions, or the accuracies on what should stay, and before."""
    metrics, before = entry["metrics"], entry.get("controls", {}).get("original", {}).get("metrics", {})
    names = [name for name in metrics if name.startswith("accuracy")] or [*metrics][:1]
    told = {name: f", original {before[name]['value']:.3g}" if name in before else "" for name in names}
    return "; ".join(f"{name} {metrics[name]['value']:.3g}{other}" for name, other in told.items())
