"""The verbs that measure a model or a run, and change nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from srmu.cli import options, output
from srmu.engine.progress import show_progress, silence_libraries
from srmu.errors import SrmuError
from srmu.report.format import format_percent, format_with_error, print_table

verbs = typer.Typer()
GROUP = "Measure"


@verbs.command("eval", rich_help_panel=GROUP)
def eval_command(
    target: Annotated[str, Argument(metavar="MODEL_OR_RUN", help="Folder or hub id.")],
    tasks: Annotated[
        str,
        Option(
            help="lm-eval or local tasks, and tofu, muse, rwku, whp, wmdp (tofu/forget05), a,b; default: the run's own."
        ),
    ] = "",
    tasks_dir: options.TasksDir = None,
    limit: Annotated[int | None, Option(help="Only the first N questions.")] = None,
    data: Annotated[str, Option(help="Folder of a benchmark's data; default: hub.")] = "",
    revision: Annotated[str, Option(help="Commit of a benchmark's data set.")] = "",
    oracle: options.Oracle = "",
    template: Annotated[str, Option(help="How a benchmark asks, with {question}.")] = "",
    log: Annotated[Path | None, Option(help="Write its numbers, for a later --oracle.")] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure a model, or a run before and after, on tasks and benchmarks."""
    silence_libraries()
    from srmu.evals.benchmarks import BENCHMARKS, find_benchmark
    from srmu.evals.score import TITLES, benchmark_table, score_benchmark, score_model

    names = output.split_names(tasks)
    asked = [name for name in names if name.partition("/")[0] in BENCHMARKS]
    if not asked and (data or revision or oracle or template or log):
        raise SrmuError(
            f"--data, --revision, --oracle, --template and --log go with a benchmark: --tasks {', '.join(BENCHMARKS)}"
        )
    if log and len(asked) > 1:
        raise SrmuError(f"--log {log}: it holds one benchmark's numbers; name one in --tasks")
    scores: dict[str, dict[str, Any]] = {}  # before, after, oracle -> metric -> value, n, ...
    others = tuple(name for name in names if name not in asked)
    if others or not asked:
        scores = score_model(target, others, tasks_dir=tasks_dir, limit=limit, device=device, watch=show_progress)
        if not as_json:
            print_scores(scores, {"before": "before", "after": "after" if "before" in scores else "value"})
    for name in asked:
        told: dict[str, Any] = {"data": data, "revision": revision, "oracle": oracle, "template": template}
        measured = score_benchmark(target, name, **told, limit=limit, device=device, log=log, watch=show_progress)
        if not as_json:
            titles = TITLES if "before" in measured else TITLES | {"after": "model"}
            shown = {titles[when]: measured[when] for when in titles if when in measured}
            print_table(benchmark_table(find_benchmark(name)[0], shown))
            print_scores(measured, titles)
        scores = {when: scores.get(when, {}) | one for when, one in (scores | measured).items()}
    is_run = "before" in scores
    lines = [f"wrote {log}"] if log else []
    following: list[object] = ["unlearn", "--model", target, "--forget", "F", "--retain", "R"]
    if is_run:
        run = output.shorten_path(Path(target))
        lines.append(f"wrote the scores into {run}")
        following = ["report", run] if asked else ["export", run, "OUT"]
    elif log:
        following = ["eval", "RUN", "--tasks", asked[0], "--oracle", log]
    answer = scores if asked or is_run else scores["after"]
    output.print_result(answer, as_json, *lines, output.next_command(*following))


def print_scores(scores: dict[str, Any], titles: dict[str, str]) -> None:
    """Every metric with its standard error, a column a model."""
    print_table(
        [
            {"metric": metric}
            | {title: format_with_error(scores[when][metric]) for when, title in titles.items() if when in scores}
            | {"n": f"{after['n']:.0f}"}
            for metric, after in scores["after"].items()
            if all(metric in results for results in scores.values())
        ]
    )


@verbs.command("attack", rich_help_panel=GROUP)
def attack_command(
    run: Annotated[Path, Argument(help="A run's folder.")],
    tier: options.Tier = "smoke",
    attacks: Annotated[str, Option(help="Only these, a,b: names or E4, E7.")] = "",
    tasks: Annotated[str, Option(help="lm-eval tasks on the forget knowledge, a,b.")] = "",
    val: Annotated[str, Option(help="Tasks to choose settings on, or split.")] = "",
    utility: options.Utility = "",
    tasks_dir: options.TasksDir = None,
    neutral: Annotated[Path | None, Option(help="File of texts unrelated to the forget texts.")] = None,
    holdout: Annotated[Path | None, Option(help="File of similar texts that the model never saw.")] = None,
    oracle: options.Oracle = "",
    limit: Annotated[int, Option(help="Questions per task and half.")] = 400,
    seed: int = 0,
    device: options.Device = "auto",
    yes: Annotated[bool, Option("--yes", help="Do not ask before attacks that take hours.")] = False,
    as_json: options.Json = False,
) -> None:
    """Attack a run: what brings the knowledge back, beside the original and the oracle."""
    silence_libraries()
    from srmu.attacks import suite
    from srmu.attacks.summary import describe_attacks
    from srmu.evals.results import RESULTS
    from srmu.runs.run import Run

    def confirm(text: str) -> bool:
        if yes or not sys.stdin.isatty():
            return yes
        return typer.confirm(f"{text} Run it?", err=True)

    sources = suite.Sources(
        tasks=output.split_names(tasks),
        val=val,
        utility=output.split_names(utility),
        tasks_dir=str(tasks_dir or ""),
        neutral=str(neutral or ""),
        holdout=str(holdout or ""),
        oracle=oracle,
        limit=limit,
    )
    report = suite.attack_run(
        Run.open(run),
        tier=tier,
        names=output.split_names(attacks),
        sources=sources,
        seed=seed,
        device=device,
        confirm=confirm,
        watch=show_progress,
    )
    folder = output.shorten_path(run)
    lines = [
        *describe_attacks(report),
        f"wrote {folder / RESULTS}",
        output.next_command("compare", folder, "OTHER_RUN"),
    ]
    output.print_result(report, as_json, *lines, table=attack_table(report))


def attack_table(report: dict[str, Any]) -> list[dict[str, str]]:
    """The attacks as lines of a table, strongest first; accuracies in %."""

    def accuracy_of(entry: dict[str, Any]) -> float:
        return entry["accuracy"]["value"] if "accuracy" in entry else -1.0

    table = []
    for name, entry in sorted(report["attacks"].items(), key=lambda item: accuracy_of(item[1]), reverse=True):
        whose = {who: entry.get("controls", {}).get(who, {}).get("accuracy") for who in ("original", "oracle")}
        numbers = {"accuracy": entry.get("accuracy"), "recovered": entry.get("recovery"), **whose}
        setting = entry.get("chosen", "")
        if entry["why"]:
            setting = f"{entry['status']}: {entry['why']}"
        elif entry.get("valid") is False:
            setting = f"invalid: the oracle recovers, too; {setting}"
        cells = {head: format_percent(one) if one else "" for head, one in numbers.items()}
        table.append({"attack": f"{entry['id']} {name}", **cells, "setting": setting})
    return table


@verbs.command("compare", rich_help_panel=GROUP)
def compare_command(
    runs: Annotated[list[Path], Argument(help="Folders of runs, the first to compare to.")],
    budget: options.Budget = "5%",
    metrics: options.Metrics = "",
    utility_metrics: options.UtilityMetrics = "",
    as_json: options.Json = False,
) -> None:
    """Compare methods at the same loss of utility, and say which differences are noise."""
    from dataclasses import asdict

    from srmu.evals.compare import compare_runs
    from srmu.search.auto import parse_share

    share = parse_share(budget)
    rows = compare_runs(runs, share, output.split_names(metrics), output.split_names(utility_metrics))
    table = []
    for row in rows:
        measured = {
            "utility lost": row.utility_loss,
            "forget accuracy": row.forget_accuracy,
            "K*": row.residual,
            "K* less the first's": row.residual_difference,
        }
        cells = {head: "" if one is None else str(one) for head, one in measured.items()}
        verdict = ", ".join(filter(None, [row.verdict, row.note]))
        table.append({"method": row.method, "runs": f"{row.points} x {row.seeds}", **cells, "verdict": verdict})
    lines = [f"In %, with 95 % intervals, at {share:.1%} of utility lost; runs: strengths x seeds."]
    more = ["--tier", "standard"]
    if all(row.residual is None for row in rows):
        lines.append("no attack was run on all of these: accuracy alone says little")
        more = []
    lines.append(output.next_command("attack", output.shorten_path(runs[0]), *more))
    answer = {"budget": share, "rows": [asdict(row) for row in rows]}
    output.print_result(answer, as_json, *lines, table=table)
