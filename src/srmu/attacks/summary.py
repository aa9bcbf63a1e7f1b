"""What attacks on a run came to: each beside its controls, the worst case K*, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srmu.attacks.base import AttackResult, Exam, Setting, Tier
from srmu.data.overlap import measure_contamination
from srmu.engine import distributed
from srmu.errors import SrmuError
from srmu.evals.results import (
    KEPT,
    PLAIN,
    attack_rows,
    lock_results,
    merge_results,
    number_facts,
    read_attacks,
    write_answers,
)
from srmu.evals.statistics import (
    KNOWN,
    Estimate,
    bootstrap_estimate,
    estimate_accuracy,
    mcnemar_p,
    parse_answers,
    residual_table,
    worst_case,
)
from srmu.evals.subject import list_facts
from srmu.runs.run import Run

if TYPE_CHECKING:
    from srmu.attacks import Attack
    from srmu.attacks.suite import Sources

Outcomes = Mapping[str, AttackResult | str]  # of an attack by whose model; why there is no result
CONTROLS = ("original", "oracle")
ALIKE = ("tier", "seed", "chance", "tasks", "oracle", "facts")  # decide what an attack can find
RECORDED = ("id", "status", "why", "accuracy", "recovery", "valid", "budget", "seconds",
            "definition")  # fmt: skip


def summarise_attacks(
    run: Run,
    chosen: Mapping[str, Attack],
    found: Mapping[str, Outcomes],
    exam: Exam,
    tier: Tier,
    seed: int,
    sources: Sources,
) -> dict[str, Any]:
    """Every attack beside its controls, with right answers question by question."""
    names = list_facts(exam.test)
    for who, result in found[PLAIN].items():
        if isinstance(result, str):
            raise SrmuError(f"the questions cannot be asked of the {who} model: {result}")
    before, after = (best_setting(found[PLAIN][who]).test for who in ("original", "unlearned"))
    chance = float(np.mean([1 / len(q.options) for q in exam.test]))
    judge = Judge(names, chance, seed, before, after, found[PLAIN].get("oracle"))
    kept = {
        task: {
            "facts": number_facts(list_facts(asked)),
            "before": write_answers(answers_under(found[KEPT]["original"], task)),
            "after": write_answers(answers_under(found[KEPT]["unlearned"], task)),
        }
        for task, asked in exam.utility.items()
        if not any(isinstance(found[KEPT][who], str) for who in ("original", "unlearned"))
    }
    return {
        "run": run.config.id,
        "method": run.config.method.name,
        "tier": tier,
        "seed": seed,
        "chance": chance,
        "tasks": {"test": list(sources.tasks), "val": sources.val, "utility": [*exam.utility]},
        "oracle": bool(sources.oracle),
        "facts": number_facts(names),
        "original": {"right": write_answers(before), "accuracy": asdict(estimate_accuracy(before, names, seed=seed))},
        "p that nothing was forgotten": mcnemar_p(before, after),
        "utility": kept,
        "attacks": {name: judge.judge_attack(one, found[name]) for name, one in chosen.items()},
    }


def merge_report(
    folder: Path, report: dict[str, Any], known: Sequence[str], leakage: Mapping[str, Any]
) -> dict[str, Any]:
    """Add a report to a run's results; earlier attacks under the same conditions stay.

    `known` are all attacks there are. What is there then is returned, with K*.
    """
    with lock_results(folder):
        earlier = read_attacks(folder)
        if earlier and exam_of(earlier) == exam_of(report):
            both = earlier["attacks"] | report["attacks"]
            report["attacks"] = {name: both[name] for name in known if name in both}
        report["not_tried"] = [name for name in known if name not in report["attacks"]]
        report["K*"] = find_worst_case(report)
        if distributed.is_first():
            rows, left = attack_rows(report)
            record = {"attacks": record_attacks(report) | dict(leakage)}
            merge_results(folder, rows, record, attacks=left)
    return report


def exam_of(report: Mapping[str, Any]) -> list[Any]:
    """What two reports have in common whose attacks can stand side by side."""
    controls = report["attacks"][PLAIN]["controls"].values()
    answers = [control["right"] for control in controls]
    return [*(report[key] for key in ALIKE), report["original"], answers]


def find_worst_case(report: Mapping[str, Any]) -> dict[str, Any]:
    """K* with its interval, and the attack that finds most of those that count."""
    statistic = partial(worst_case, chance=report["chance"])
    table = residual_table(report)
    worst = bootstrap_estimate([table], [report["facts"]], statistic, seed=report["seed"])
    counted = {
        name: entry["accuracy"]["value"]
        for name, entry in report["attacks"].items()
        if "right" in entry and entry["valid"] is not False
    }
    return asdict(worst) | {"attack": max(counted, key=counted.__getitem__)}


def record_attacks(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the audit record says of the attacks: each one's outcome beside its controls, and K*."""
    tried = {
        name: {key: entry[key] for key in RECORDED if key in entry}
        | {"controls": {who: c.get("accuracy") for who, c in entry.get("controls", {}).items()}}
        for name, entry in report["attacks"].items()
    }
    names = ("tier", "seed", "chance", "tasks", "oracle", "not_tried", "K*")
    return {name: report[name] for name in names} | {"tried": tried}


def measure_leakage(exam: Exam, own: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The share of the questions that the forget and the retain texts give away."""
    asked = [(q.prompt, q.answer, q.entry) for q in exam.test]
    shares = {role: measure_contamination(asked, texts)["either"] if texts else 0.0 for role, texts in own.items()}
    return {"given_away": shares}


@dataclass(frozen=True)
class Judge:
    """Holds an attack's results against the model without attack, the original and the oracle."""

    names: Sequence[str]
    chance: float
    seed: int
    before: Sequence[float]
    after: Sequence[float]
    oracle: AttackResult | str | None

    def judge_attack(self, one: Attack, results: Outcomes) -> dict[str, Any]:
        """All that a report says of an attack."""
        result = results.get("unlearned")
        if not isinstance(result, AttackResult):
            status, _, why = (result or "failed: not run").partition(": ")
            return {"id": one.id, "tier": one.tier, "status": status, "why": why}
        entry: dict[str, Any] = {"id": one.id, "tier": one.tier, "status": "done", "why": ""}
        entry |= self.describe_result(one, result)
        entry["budget"] = dict(result.budget)
        controls = {who: results[who] for who in CONTROLS if who in results}
        entry["controls"] = {
            who: self.describe_result(one, other) if isinstance(other, AttackResult) else {"why": other}
            for who, other in controls.items()
        }
        if "right" in entry:
            entry["recovery"] = self.measure_recovery(best_setting(result).test)
            entry["valid"] = self.check_validity(entry["controls"].get("oracle"))
        return entry

    def describe_result(self, one: Attack, result: AttackResult) -> dict[str, Any]:
        """Its metrics; where its answers are to the exam, its settings and the best of them."""
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
            entry["chosen"] = best.setting
            entry["right"] = write_answers(best.test)
            entry["accuracy"] = asdict(estimate_accuracy(best.test, self.names, seed=self.seed))
        return entry | {"metrics": {key: asdict(value) for key, value in result.metrics.items()}}

    def measure_recovery(self, right: Sequence[float]) -> dict[str, Any] | None:
        """R = (Aa - Au) / (A0 - Au); none where what was forgotten is under two standard errors."""
        table = np.stack([self.before, self.after, right], axis=1)
        gap = self.estimate(table, lambda m: m[..., 0] - m[..., 1])
        if gap.value <= 0 or gap.value < 2 * (gap.high - gap.low) / (2 * 1.96):
            return None

        def share(means: Any) -> Any:
            forgotten = np.maximum(means[..., 0] - means[..., 1], KNOWN)  # in some resample 0
            return (means[..., 2] - means[..., 1]) / forgotten

        return asdict(self.estimate(table, share))

    def check_validity(self, control: Mapping[str, Any] | None) -> bool | None:
        """Whether the oracle, which never knew, still answers at chance under the attack.

        Invalid: it is above chance, and above itself without the attack. None without an oracle.
        """
        if control is None or "right" not in control or not isinstance(self.oracle, AttackResult):
            return None
        table = np.stack([best_setting(self.oracle).test, parse_answers(control["right"])], axis=1)
        gain = self.estimate(table, lambda m: m[..., 1] - m[..., 0])
        return not (control["accuracy"]["low"] > self.chance and gain.low > 0)

    def estimate(self, table: Any, statistic: Any) -> Estimate:
        return bootstrap_estimate([table], [self.names], statistic, seed=self.seed)


def describe_attacks(report: Mapping[str, Any]) -> list[str]:
    """What to take from a report, in words."""
    worst = report["K*"]
    entry = report["attacks"][worst["attack"]]
    original = report["original"]["accuracy"]["value"]
    plain = report["attacks"][PLAIN]["accuracy"]["value"]
    lines = [
        f"of {worst['n']} questions {original:.1%} were answered before and {plain:.1%} after; "
        f"guessing answers {report['chance']:.1%}",
        f"K* = {worst['value']:.2f} (95 % interval {worst['low']:.2f} to {worst['high']:.2f}): the "
        f"share of the original knowledge that {worst['attack']} ({entry['chosen']}) found",
    ]
    if report["original"]["accuracy"]["low"] <= report["chance"]:
        lines.append("the original does no better than guessing on these: K* says nothing here")
    if not report["oracle"]:
        lines.append("no oracle: whether an attack finds what was never known is not checked")
    if report["not_tried"]:
        lines.append(f"not tried: {', '.join(report['not_tried'])}")
    lines.append("what no attack found may still be there")
    return lines


def best_setting(result: AttackResult | str) -> Setting:
    """The setting that answers most of the validation half; the first of equals.

    An attack may have asked the test half under its best setting only.
    """
    assert isinstance(result, AttackResult)
    return max((way for way in result.ways if way.test), key=lambda way: float(np.mean(way.val)) if way.val else -1.0)


def answers_under(result: AttackResult | str, setting: str) -> tuple[float, ...]:
    assert isinstance(result, AttackResult)
    return next(way.test for way in result.ways if way.setting == setting)
