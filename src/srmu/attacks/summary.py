"""What attacks on a run came to: each beside its controls, the worst case K*, and what is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, guess_share
from srmu.engine import distributed
from srmu.errors import SrmuError
from srmu.evals import results, statistics
from srmu.evals.results import KEPT, PLAIN, number_facts, write_answers
from srmu.evals.statistics import bootstrap_estimate, estimate_accuracy
from srmu.evals.subject import Question, list_facts
from srmu.runs.prices import describe_prices, describe_search

Outcomes = Mapping[str, AttackResult]  # of an attack by whose model
Report = dict[str, Any]
Answers = Mapping[str, Sequence[float]]  # by whose model
ALIKE = ("tier", "seed", "chance", "tasks", "oracle", "facts", "unknown")  # decide what an attack can find
RECORDED = ("id", "status", "why", "accuracy", "recovery", "valid", "floor", "budget", "price", "seconds", "definition")


def summarise_attacks(
    chosen: Mapping[str, Attack], found: Mapping[str, Outcomes], exam: Exam, seed: int, unknown: Sequence[Question] = ()
) -> Report:
    """Every attack beside its controls, with right answers question by question."""
    plain = {}
    for who, result in found[PLAIN].items():
        if result.why:
            raise SrmuError(f"the questions cannot be asked of the {who} model: {result.status}: {result.why}")
        plain[who] = best_setting(result).test
    before, after = (
        {way.setting: write_answers(way.test) for way in found[KEPT][who].ways} for who in ("original", "unlearned")
    )
    facts = list_facts(exam.test)
    chance, never = guess_share(exam.test), list_facts(unknown)
    attacks = {name: judge_attack(one, found[name], plain, facts, chance, seed) for name, one in chosen.items()}
    if unknown:
        if (own := estimate_accuracy(plain["unknown"], never, seed=seed)).low > chance:
            raise SrmuError(f"unknown: the original answers {own.value:.1%} of these, which is more than guessing")
        for name, entry in attacks.items():
            if "unknown" in found[name] and not entry["why"]:
                control = describe_result(chosen[name], found[name]["unknown"], never, seed, entry.get("chosen"))
                entry["controls"]["unknown"] = control
                if "right" in entry:  # of a setting that only the run has nothing is known to be above chance
                    entry["floor"] = max(chance, control.get("accuracy", {"value": 0})["value"])
    return {
        "chance": chance,
        "facts": number_facts(facts),
        **({"unknown": number_facts(never)} if unknown else {}),
        "original": {key: attacks[PLAIN]["controls"]["original"][key] for key in ("right", "accuracy")},
        "p that nothing was forgotten": statistics.mcnemar_p(plain["original"], plain["unlearned"]),
        "utility": {
            task: {"facts": number_facts(list_facts(asked)), "before": before[task], "after": after[task]}
            for task, asked in exam.utility.items()
            if task in before and task in after
        },
        "attacks": attacks,
    }


def merge_report(folder: Path, report: Report, known: Sequence[str]) -> Report:
    """Add a report on some of the `known` attacks to a run's results, beside earlier ones on the same exam."""

    def exam_of(report: Report) -> list[Any]:  # alike where attacks can stand side by side
        answers = [control["right"] for control in report["attacks"][PLAIN]["controls"].values()]
        return [*(report.get(key) for key in ALIKE), report["original"], answers]

    with results.lock_results(folder):
        earlier = results.read_attacks(folder)
        both = report["attacks"]
        if earlier and exam_of(earlier) == exam_of(report):
            both = earlier["attacks"] | both
        report["attacks"] = attacks = {name: both[name] for name in known if name in both}
        report["not_tried"] = [name for name in known if name not in attacks]
        draws = statistics.Draws(report["seed"])
        means = draws.means(statistics.residual_table(report), report["facts"])
        shares = statistics.worst_case(means, report["chance"], statistics.draw_floors(report, draws))
        report["K*"] = asdict(statistics.estimate_from(shares, len(report["facts"])))
        counted = [name for name, entry in attacks.items() if "right" in entry and entry["valid"] is not False]
        report["K*"]["attack"] = max(counted, key=lambda name: statistics.attack_share(report, attacks[name]))
        if distributed.is_first():
            tried = {
                name: {key: entry[key] for key in RECORDED if key in entry}
                | {"metrics": {key: drop_unknown(one) for key, one in entry["metrics"].items()}}
                | {"controls": {who: c.get("accuracy") for who, c in entry.get("controls", {}).items()}}
                for name, entry in attacks.items()
            }
            record = {name: report[name] for name in ("tier", "seed", "chance", "tasks", "oracle", "not_tried", "K*")}
            rows, left = results.attack_rows(report)
            with results.keep_going(folder):
                results.merge_results(folder, rows, {"attacks": record | {"tried": tried}}, attacks=left)
    return report


def drop_unknown(estimate: Mapping[str, float]) -> dict[str, float]:
    """An estimate without the ends of an interval that it does not have: JSON has no nan."""
    return {key: number for key, number in estimate.items() if not isnan(number)}


def judge_attack(
    one: Attack, outcomes: Outcomes, plain: Answers, facts: Sequence[str], chance: float, seed: int
) -> dict[str, Any]:
    """All that a report says of an attack on the exam, beside the models as they answer without it."""
    asked = {who: result for who, result in outcomes.items() if who != "unknown"}
    by_whose = {who: describe_result(one, result, facts, seed) for who, result in asked.items()}
    entry = {"id": one.id, "tier": one.tier} | by_whose.pop("unlearned")
    if entry["why"]:
        return entry
    entry |= {"budget": {**vars(one), **outcomes["unlearned"].budget}, "controls": by_whose}
    if prices := outcomes["unlearned"].price:
        entry["price"] = [asdict(price) for price in prices]
    if "right" in entry:
        entry["recovery"] = measure_recovery(plain, best_setting(outcomes["unlearned"]).test, facts, seed)
        entry["valid"] = None
        if "right" in by_whose.get("oracle", {}):
            # invalid: the oracle, which never knew, is above chance, and above itself without the attack
            table = np.stack([plain["oracle"], best_setting(outcomes["oracle"]).test], axis=1)
            gain = bootstrap_estimate(table, facts, lambda m: m[..., 1] - m[..., 0], seed=seed)
            entry["valid"] = by_whose["oracle"]["accuracy"]["low"] <= chance or gain.low <= 0
    return entry


def describe_result(
    one: Attack, result: AttackResult, facts: Sequence[str], seed: int, chosen: str | None = None
) -> dict[str, Any]:
    """Its metrics; where its answers are to the exam, its settings, and the `chosen` or else the best of them."""
    metrics = {key: asdict(value) for key, value in result.metrics.items()}
    entry: dict[str, Any] = {"status": result.status, "why": result.why, "metrics": metrics}
    if result.ways and one.name != KEPT:
        ways = [way for way in result.ways if way.test and way.setting == chosen]
        best = best_setting(result) if chosen is None else next(iter(ways), None)
        entry["settings"] = {
            way.setting: {half: float(np.mean(r)) if r else None for half, r in (("val", way.val), ("test", way.test))}
            for way in result.ways
        }
        if best:
            entry |= {"chosen": best.setting, "right": write_answers(best.test)}
            entry["accuracy"] = asdict(estimate_accuracy(best.test, facts, seed=seed))
    return entry


def measure_recovery(plain: Answers, right: Sequence[float], facts: Sequence[str], seed: int) -> dict[str, Any] | None:
    """R = (Aa - Au) / (A0 - Au); none where what was forgotten is under two standard errors."""
    table = np.stack([plain["original"], plain["unlearned"], right], axis=1)
    gap = bootstrap_estimate(table, facts, lambda m: m[..., 0] - m[..., 1], seed=seed)
    if gap.value <= 0 or gap.value < (gap.high - gap.low) / 1.96:
        return None
    least = statistics.KNOWN  # in some resample nothing was forgotten
    recovered = bootstrap_estimate(
        table, facts, lambda m: (m[..., 2] - m[..., 1]) / np.maximum(m[..., 0] - m[..., 1], least), seed=seed
    )
    return asdict(recovered)


def best_setting(result: AttackResult) -> Setting:
    """The setting that answers most of the validation half, the first of equals; of those with a test half."""
    return max((way for way in result.ways if way.test), key=lambda way: float(np.mean(way.val)) if way.val else -1.0)


def describe_attacks(report: Mapping[str, Any]) -> list[str]:
    """What to take from a report, in words."""
    worst, original, attacks = report["K*"], report["original"]["accuracy"], report["attacks"]
    chosen, plain = attacks[worst["attack"]]["chosen"], attacks[PLAIN]["accuracy"]["value"]
    lines = [
        f"of {worst['n']} questions {original['value']:.1%} were answered before and {plain:.1%} after; "
        f"guessing answers {report['chance']:.1%}",
        f"K* = {worst['value']:.2f} (95 % interval {worst['low']:.2f} to {worst['high']:.2f}): the "
        f"share of the original knowledge that {worst['attack']} ({chosen}) found",
    ]
    if original["low"] <= report["chance"]:
        lines.append("the original does no better than guessing on these: K* says nothing here")
    if "unknown" in report:
        lines.append(f"no oracle: {describe_floor(report)}")
    elif not report["oracle"]:
        lines.append("no oracle: whether an attack finds what was never known is not checked")
    lines += [line for one in attacks.values() for line in describe_prices(one.get("price", ()))]
    lines += describe_search(attacks)
    if report["not_tried"]:
        lines.append(f"not tried: {', '.join(report['not_tried'])}")
    return [*lines, "what no attack found may still be there"]


def describe_floor(report: Mapping[str, Any]) -> str:
    """Above what K* is counted, where there are facts that the original never knew."""
    attack, count = report["attacks"][report["K*"]["attack"]], len({*report["unknown"]})
    control = attack["controls"].get("unknown", {})
    if "accuracy" not in control:
        why = control.get("why") or "its setting is of the run alone"
        return f"K* is counted above guessing, as the attack cannot be made on facts that were never known: {why}"
    words = f"K* is counted above what the attack does to {count} facts that the original never knew"
    less = ", no more than guessing" if attack["floor"] <= report["chance"] else ""
    return f"{words}: there it reaches {control['accuracy']['value']:.1%}{less}"
