"""Every method on the testbed at the same loss of utility, attacked: what stays suppressed.

    python benchmarks/results.py configs/methods-organism.yaml OUT [BUDGET] [TIER]

Takes the runs of `benchmarks/methods.py` in OUT (and makes them where they are missing). Of each
run's change of the weights it keeps the largest share with which accuracy on the validation
questions of neighbour and general knowledge falls by at most BUDGET (0.05) in the mean, attacks the
result with the attacks of TIER (standard), and writes OUT/results.md and OUT/results.json. What is
in OUT already is not done again.
"""

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from search import job_of, results_of, testbed
from srmu.attacks.suite import attack_run
from srmu.engine.files import write_json, write_whole
from srmu.engine.progress import show_progress, silence_libraries
from srmu.errors import SrmuError
from srmu.evals.matched import match_utility
from srmu.evals.parallel import run_all
from srmu.evals.results import load_results, read_attacks
from srmu.evals.statistics import Draws, parse_answers, residual_table, worst_case
from srmu.methods.reference import markdown_table
from srmu.reproduce.demo import TASKS
from srmu.runs.run import Run

UTILITY = ("organism_neighbour_val", "organism_general_val")


class Task(NamedTuple):
    """A run to be brought to the budget and attacked."""

    run: Path
    out: Path
    budget: float
    tier: str


def matched(task: Task) -> str:
    """Bring the run to the budget, attack it; its folder, or why there is none."""
    torch.set_num_threads(1)
    silence_libraries()
    try:
        match_utility(Run.open(task.run), task.out, task.budget, UTILITY)
        if read_attacks(task.out).get("tier") != task.tier:
            attack_run(Run.open(task.out), tier=task.tier)  # type: ignore[arg-type]
        return ""
    except SrmuError as error:
        return str(error)


def row(label: str, regime: str, reports: Sequence[dict[str, Any]], shares: Sequence[float]) -> Any:
    """One line of the table: estimates over facts and testbeds."""

    def mean(tables: Sequence[Any], facts: Sequence[Any], statistic: Any) -> Any:
        draws = Draws()
        values = [statistic(draws.means(t, f)) for t, f in zip(tables, facts, strict=True)]
        n = min(len(f) for f in facts)
        # what is added for the draw of seeds may lead out of what an accuracy can be
        return draws.estimate(np.stack(values, axis=1), n, clip=(0, 1))

    facts = [report["facts"] for report in reports]
    plain = [parse_answers(r["attacks"]["forced_choice"]["right"]) for r in reports]
    found = {"hazard": mean(plain, facts, lambda m: m[:, 0])}
    for task in reports[0]["utility"]:
        kept = [r["utility"][task] for r in reports]
        found[task.removeprefix("organism_")] = mean(
            [parse_answers(k["after"]) for k in kept], [k["facts"] for k in kept], lambda m: m[:, 0]
        )
    chance = reports[0]["chance"]
    found["K*"] = mean(
        [residual_table(r) for r in reports], facts, partial(worst_case, chance=chance)
    )
    names = sorted({name for r in reports for name in r["attacks"]})
    by_attack = {
        name: float(np.mean([r["attacks"][name]["accuracy"]["value"] for r in reports]))
        for name in names
        if all("accuracy" in r["attacks"].get(name, {}) for r in reports)
    }
    strongest = max(
        (n for n in by_attack if all(r["attacks"][n]["valid"] is not False for r in reports)),
        key=by_attack.__getitem__,
    )
    return {
        "label": label,
        "regime": regime,
        "share": float(np.mean(shares)),
        "estimates": {k: [v.value, v.low, v.high] for k, v in found.items()},
        "strongest": strongest,
        "by attack": by_attack,
    }


def shown(value: Sequence[float], percent: bool = True) -> str:
    scale, form = (100, "{:.1f}") if percent else (1, "{:.2f}")
    middle, low, high = (form.format(scale * v) for v in value)
    return f"{middle} ({low}\N{EN DASH}{high})"


def main(path: Path, out: Path, budget: float, tier: str) -> None:
    space = yaml.safe_load(path.read_text())
    for seed in space["testbeds"]:
        testbed(out, seed, oracle=True)
    cases = [
        (label, regime, seed, job_of(out, seed, regime, [*space["common"], *settings], TASKS))
        for label, settings in space["methods"].items()
        for regime, seed in product(space["regimes"], space["testbeds"])
    ]
    runs = results_of([case[-1] for case in cases])
    made = [(*case[:3], runs[case[3]]) for case in cases]
    if wrong := [run for *_, run in made if isinstance(run, str)]:
        raise SystemExit(wrong[0])
    tasks = {
        run: Task(Path(run), out / f"matched-{budget:g}" / Path(run).name, budget, tier)
        for *_, run in made
    }
    # one of each testbed first: its controls are kept for the others
    first = {seed: tasks[run] for *_, seed, run in reversed(made)}
    rest = [task for task in tasks.values() if task not in first.values()]
    said = [
        *run_all([*first.values()], show_progress, matched),
        *run_all(rest, show_progress, matched),
    ]
    if wrong := [why for why in said if why]:
        raise SystemExit(wrong[0])
    rows = []
    for label, regime in dict.fromkeys(case[:2] for case in made):
        folders = [tasks[run].out for one, group, _, run in made if (one, group) == (label, regime)]
        reports = [read_attacks(folder) for folder in folders]
        shares = [load_results(folder)["matched"]["share"] for folder in folders]
        rows.append(row(label, regime, reports, shares))
    metrics = [*rows[0]["estimates"]]
    lines = [
        [
            r["regime"], r["label"], f"{r['share']:.2f}",
            *(shown(r["estimates"][m], m != "K*") for m in metrics), r["strongest"],
        ]
        for r in rows
    ]  # fmt: skip
    text = "\n".join(
        markdown_table(["entangled", "method", "share", *metrics, "strongest attack"], lines)
    )
    attacks = [*dict.fromkeys(name for r in rows for name in r["by attack"])]
    cells = [
        [
            r["regime"],
            r["label"],
            *(f"{100 * r['by attack'].get(a, np.nan):.0f}".replace("nan", "") for a in attacks),
        ]
        for r in rows
    ]
    text += "\n\n" + "\n".join(markdown_table(["entangled", "method", *attacks], cells))
    write_whole(out / "results.md", text + "\n")
    write_json(out / "results.json", {"budget": budget, "tier": tier, "rows": rows})
    print(text)
    print(f"wrote {out / 'results.md'}, {out / 'results.json'}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        Path(given[0]),
        Path(given[1]),
        float(given[2]) if len(given) > 2 else 0.05,
        given[3] if len(given) > 3 else "standard",
    )
