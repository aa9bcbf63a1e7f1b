"""What attacks on a run came to: each beside its controls, the worst case K*, and what is kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from srmu.attacks.base import Attack, AttackResult, Exam, Setting
from srmu.engine import distributed
from srmu.errors import SrmuError
from srmu.evals import results
from srmu.evals.results import KEPT, PLAIN, number_facts, write_answers
from srmu.evals.statistics import (
    KNOWN,
    Array,
    Estimate,
    bootstrap_estimate,
    estimate_accuracy,
    mcnemar_p,
    residual_table,
    worst_case,
)
from srmu.evals.subject import list_facts

Outcomes = Mapping[str, AttackResult | str]  # of an attack by whose model; why there is no result
Report = dict[str, Any]
CONTROLS = ("original", "oracle")
ALIKE = ("tier", "seed", "chance", "tasks", "oracle", "facts")  # decide what an attack can find
RECORDED = ("id", "status", "why", "accuracy", "recovery", "valid", "budget", "seconds", "definition")


def summarise_attacks(chosen: Mapping[str, Attack], found: Mapping[str, Outcomes], exam: Exam, seed: int) -> Report:
    """Every attack beside its controls, with right answers question by question."""
    plain, kept = {}, {}
    for who, result in found[PLAIN].items():
        if isinstance(result, str):
            raise SrmuError(f"the questions cannot be asked of the {who} model: {result}")
        plain[who] = best_setting(result).test
    for who, result in found[KEPT].items():
        if isinstance(result, AttackResult):
            kept[who] = {way.setting: write_answers(way.test) for way in result.ways}
    names = list_facts(exam.test)
    chance = float(np.mean([1 / len(q.options) for q in exam.test]))
    judge = Judge(names, chance, seed, plain)
    return {
        "chance": chance,
        "facts": number_facts(names),
        "original": {
            "right": write_answers(plain["original"]),
            "accuracy": asdict(estimate_accuracy(plain["original"], names, seed=seed)),
        },
        "p that nothing was forgotten": mcnemar_p(plain["original"], plain["unlearned"]),
        "utility": {
            task: {
                "facts": number_facts(list_facts(questions)),
                "before": kept["original"][task],
                "after": kept["unlearned"][task],
            }
            for task, questions in exam.utility.items()
            if {"original", "unlearned"} <= kept.keys()
        },
        "attacks": {name: judge.judge_attack(one, found[name]) for name, one in chosen.items()},
    }


def merge_report(folder: Path, report: Report, known: Sequence[str]) -> Report:
    """Add a report to a run's results; earlier attacks under the same conditions stay.

    `known` are all attacks there are. What is there then is returned, with K*.
    """
    with results.lock_results(folder):
        earlier = results.read_attacks(folder)
        if earlier and exam_of(earlier) == exam_of(report):
            both = earlier["attacks"] | report["attacks"]
            report["attacks"] = {name: both[name] for name in known if name in both}
        report["not_tried"] = [name for name in known if name not in report["attacks"]]
        report["K*"] = find_worst_case(report)
        if distributed.is_first():
            rows, left = results.attack_rows(report)
            results.merge_results(folder, rows, {"attacks": record_attacks(report)}, attacks=left)
    return report


def exam_of(report: Report) -> list[Any]:
    """What two reports have in common whose attacks can stand side by side."""
    answers = [control["right"] for control in report["attacks"][PLAIN]["controls"].values()]
    return [*(report[key] for key in ALIKE), report["original"], answers]


def find_worst_case(report: Report) -> dict[str, Any]:
    """K* with its interval, and the attack that finds most of those that count."""
    statistic = partial(worst_case, chance=report["chance"])
    worst = bootstrap_estimate([residual_table(report)], [report["facts"]], statistic, seed=report["seed"])
    counted = {
        name: entry["accuracy"]["value"]
        for name, entry in report["attacks"].items()
        if "right" in entry and entry["valid"] is not False
    }
    return asdict(worst) | {"attack": max(counted, key=counted.__getitem__)}


def record_attacks(report: Report) -> dict[str, Any]:
    """What the audit record says of the attacks: each one's outcome beside its controls, and K*."""
    tried = {
        name: {key: entry[key] for key in RECORDED if key in entry}
        | {"controls": {who: c.get("accuracy") for who, c in entry.get("controls", {}).items()}}
        for name, entry in report["attacks"].items()
    }
    names = ("tier", "seed", "chance", "tasks", "oracle", "not_tried", "K*")
    return {name: report[name] for name in names} | {"tried": tried}


@dataclass(frozen=True)
class Judge:
    """Holds an attack's results against the model without attack, the original and the oracle."""

    names: Sequence[str]
    chance: float
    seed: int
    plain: Mapping[str, Sequence[float]]  # right answers without attack, by whose model

    def judge_attack(self, one: Attack, outcomes: Outcomes) -> dict[str, Any]:
        """All that a report says of an attack."""
        entry: dict[str, Any] = {"id": one.id, "tier": one.tier, "status": "done", "why": ""}
        result = outcomes["unlearned"]
        if isinstance(result, str):
            entry["status"], _, entry["why"] = result.partition(": ")
            return entry
        entry |= self.describe_result(one, result) | {"budget": dict(result.budget)}
        controls = {who: self.describe_result(one, outcomes[who]) for who in CONTROLS if who in outcomes}
        entry["controls"] = controls
        if "right" in entry:
            entry["recovery"] = self.measure_recovery(best_setting(result).test)
            entry["valid"] = None
            if "right" in controls.get("oracle", {}):
                # invalid: the oracle, which never knew, is above chance, and above itself without the attack
                table = np.stack([self.plain["oracle"], best_setting(outcomes["oracle"]).test], axis=1)
                gain = self.estimate(table, lambda m: m[..., 1] - m[..., 0])
                entry["valid"] = not (controls["oracle"]["accuracy"]["low"] > self.chance and gain.low > 0)
        return entry

    def describe_result(self, one: Attack, result: AttackResult | str) -> dict[str, Any]:
        """Its metrics; where its answers are to the exam, its settings and the best of them."""
        if isinstance(result, str):
            return {"why": result}
        entry: dict[str, Any] = {}
        if result.ways and one.recovers:
            best = best_setting(result)
            entry["settings"] = {
                way.setting: {
                    half: float(np.mean(right)) if right else None
                    for half, right in (("val", way.val), ("test", way.test))
                }
                for way in result.ways
            }
            entry |= {"chosen": best.setting, "right": write_answers(best.test)}
            entry["accuracy"] = asdict(estimate_accuracy(best.test, self.names, seed=self.seed))
        return entry | {"metrics": {key: asdict(value) for key, value in result.metrics.items()}}

    def measure_recovery(self, right: Sequence[float]) -> dict[str, Any] | None:
        """R = (Aa - Au) / (A0 - Au); none where what was forgotten is under two standard errors."""
        table = np.stack([self.plain["original"], self.plain["unlearned"], right], axis=1)
        gap = self.estimate(table, lambda m: m[..., 0] - m[..., 1])
        if gap.value <= 0 or gap.value < (gap.high - gap.low) / 1.96:
            return None
        # in some resample nothing is forgotten
        share = self.estimate(table, lambda m: (m[..., 2] - m[..., 1]) / np.maximum(m[..., 0] - m[..., 1], KNOWN))
        return asdict(share)

    def estimate(self, table: Array, statistic: Callable[[Array], Array]) -> Estimate:
        return bootstrap_estimate([table], [self.names], statistic, seed=self.seed)


def best_setting(result: AttackResult | str) -> Setting:
    """The setting that answers most of the validation half; the first of equals.

    An attack may have asked the test half under its best setting only.
    """
    assert isinstance(result, AttackResult)
    return max((way for way in result.ways if way.test), key=lambda way: float(np.mean(way.val)) if way.val else -1.0)


def describe_attacks(report: Mapping[str, Any]) -> list[str]:
    """What to take from a report, in words."""
    worst = report["K*"]
    chosen = report["attacks"][worst["attack"]]["chosen"]
    original = report["original"]["accuracy"]
    plain = report["attacks"][PLAIN]["accuracy"]["value"]
    lines = [
        f"of {worst['n']} questions {original['value']:.1%} were answered before and {plain:.1%} after; "
        f"guessing answers {report['chance']:.1%}",
        f"K* = {worst['value']:.2f} (95 % interval {worst['low']:.2f} to {worst['high']:.2f}): the "
        f"share of the original knowledge that {worst['attack']} ({chosen}) found",
    ]
    if original["low"] <= report["chance"]:
        lines.append("the original does no better than guessing on these: K* says nothing here")
    if not report["oracle"]:
        lines.append("no oracle: whether an attack finds what was never known is not checked")
    if report["not_tried"]:
        lines.append(f"not tried: {', '.join(report['not_tried'])}")
    return [*lines, "what no attack found may still be there"]
