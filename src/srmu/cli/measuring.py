"""The verbs that measure a model or a run, and change nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from srmu.cli import options
from srmu.cli.output import next_command, print_result, shorten_path, split_names
from srmu.engine.progress import show_progress, silence_libraries
from srmu.errors import SrmuError
from srmu.report.format import format_percent, format_with_error, print_table

if TYPE_CHECKING:
    from srmu.evals.benchmarks.score import BenchmarkOptions

verbs = typer.Typer()
GROUP = "Measure"

Scores = dict[str, dict[str, dict[str, float]]]  # before, after, oracle -> metric -> value, n, ...


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
    from srmu.evals.benchmarks import BENCHMARKS
    from srmu.evals.benchmarks.score import BenchmarkOptions
    from srmu.evals.score import score_model

    names = split_names(tasks)
    asked = [name for name in names if name.partition("/")[0] in BENCHMARKS]
    if not asked and (data or revision or oracle or template or log):
        raise SrmuError(
            f"--data, --revision, --oracle, --template and --log go with a benchmark: --tasks {', '.join(BENCHMARKS)}"
        )
    if log and len(asked) > 1:
        raise SrmuError(f"--log {log}: it holds one benchmark's numbers; name one in --tasks")
    scores: Scores = {}
    others = tuple(name for name in names if name not in asked)
    if others or not asked:
        scores = score_model(target, others, tasks_dir=tasks_dir, limit=limit, device=device, watch=show_progress)
        if not as_json:
            print_scores(scores)
    for name in asked:
        request = BenchmarkOptions(name, data, revision, template, oracle, limit, device)
        for when, results in show_benchmark(target, request, log, as_json).items():
            scores[when] = scores.get(when, {}) | results
    if as_json:
        print_result(scores if asked or "before" in scores else scores["after"], True)
    else:
        print_result({}, False, *describe_scores(target, "before" in scores, asked, log))


def print_scores(scores: Scores) -> None:
    """The table of scores on tasks; of a run before and after."""
    rows = []
    for metric, after in scores["after"].items():
        row = {"metric": metric}
        for when, results in scores.items():
            row[when if "before" in scores else "value"] = format_with_error(results[metric])
        rows.append(row | {"n": f"{after['n']:.0f}"})
    print_table(rows)


def show_benchmark(target: str, request: BenchmarkOptions, log: Path | None, as_json: bool) -> Scores:
    """Measure on one benchmark; for a person the table of its paper, then everything else."""
    from srmu.evals.benchmarks import find_benchmark
    from srmu.evals.benchmarks.score import TITLES, benchmark_table, score_benchmark

    scores = score_benchmark(target, request, log=log, watch=show_progress)
    if as_json:
        return scores
    titles = TITLES if "before" in scores else TITLES | {"after": "model"}
    shown = {title: scores[when] for when, title in titles.items() if when in scores}
    print_table(benchmark_table(find_benchmark(request.name)[0], shown))
    print_table(
        [
            {"metric": metric, "n": f"{entry['n']:.0f}"}
            | {title: format_with_error(results[metric]) for title, results in shown.items()}
            for metric, entry in scores["after"].items()
            if all(metric in results for results in shown.values())
        ]
    )
    return scores


def describe_scores(target: str, is_run: bool, benchmarks: list[str], log: Path | None) -> list[str]:
    """Where the scores were written, and what to type next."""
    lines = [f"wrote {log}"] if log else []
    following: list[object]
    if is_run:
        run = shorten_path(Path(target))
        lines.append(f"wrote the scores into {run}")
        following = ["report", run] if benchmarks else ["export", run, "OUT"]
    elif log:
        following = ["eval", "RUN", "--tasks", benchmarks[0], "--oracle", log]
    else:
        following = ["unlearn", "--model", target, "--forget", "F", "--retain", "R"]
    return [*lines, next_command(*following)]


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
        tasks=split_names(tasks),
        val=val,
        utility=split_names(utility),
        tasks_dir=str(tasks_dir or ""),
        neutral=str(neutral or ""),
        holdout=str(holdout or ""),
        oracle=oracle,
        limit=limit,
    )
    report = suite.attack_run(
        Run.open(run),
        tier=tier,
        names=split_names(attacks),
        sources=sources,
        seed=seed,
        device=device,
        confirm=confirm,
        watch=show_progress,
    )
    if not as_json:
        print_table(attack_table(report))
    folder = shorten_path(run)
    lines = [*describe_attacks(report), f"wrote {folder / RESULTS}"]
    print_result(report, as_json, *lines, next_command("compare", folder, "OTHER_RUN"))


def attack_table(report: dict[str, Any]) -> list[dict[str, str]]:
    """The attacks as lines of a table, strongest first; accuracies in %."""

    def percent(entry: dict[str, float] | None) -> str:
        return format_percent(entry) if entry else ""

    def accuracy_of(entry: dict[str, Any]) -> float:
        return entry["accuracy"]["value"] if "accuracy" in entry else -1.0

    table = []
    attacks = report["attacks"].items()
    for name, entry in sorted(attacks, key=lambda item: accuracy_of(item[1]), reverse=True):
        controls = entry.get("controls", {})
        chosen = entry.get("chosen", "")
        note = f"{entry['status']}: {entry['why']}" if entry["why"] else chosen
        if entry.get("valid") is False:
            note = f"invalid: the oracle recovers, too; {chosen}"
        row = {
            "attack": f"{entry['id']} {name}",
            "accuracy": percent(entry.get("accuracy")),
            "recovered": percent(entry.get("recovery")),
        }
        for who in ("original", "oracle"):
            row[who] = percent(controls.get(who, {}).get("accuracy"))
        table.append(row | {"setting": note})
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
    rows = compare_runs(runs, share, split_names(metrics), split_names(utility_metrics))
    if as_json:
        print_result({"budget": share, "rows": [asdict(row) for row in rows]}, True)
        return
    table = []
    for row in rows:
        measured = [row.utility_loss, row.forget_accuracy, row.residual, row.residual_difference]
        texts = ["" if one is None else format_percent(asdict(one)) for one in measured]
        names = ("utility lost", "forget accuracy", "K*", "K* less the first's")
        table.append(
            {"method": row.method, "runs": f"{row.points} x {row.seeds}"}
            | dict(zip(names, texts, strict=True))
            | {"verdict": ", ".join(filter(None, [row.verdict, row.note]))}
        )
    print_table(table)
    lines = [f"In %, with 95 % intervals, at {share:.1%} of utility lost; runs: strengths x seeds."]
    more = ["--tier", "standard"]
    if all(row.residual is None for row in rows):
        lines.append("no attack was run on all of these: accuracy alone says little")
        more = []
    print_result({}, False, *lines, next_command("attack", shorten_path(runs[0]), *more))
