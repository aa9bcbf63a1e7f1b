"""The verbs that measure a model or a run, and change nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from srmu.cli.output import Json, print_result, shorten_path, split_names
from srmu.engine.progress import show_progress, silence_libraries
from srmu.errors import SrmuError
from srmu.report.format import format_percent, format_with_error, print_table

if TYPE_CHECKING:
    from srmu.evals.benchmarks.score import BenchmarkOptions
    from srmu.evals.figures import Analysis

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(name="eval")
def eval_command(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="Folder or hub id.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, a,b; default: the run's own.")] = "",
    limit: Annotated[int | None, typer.Option(help="Only the first N questions.")] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder of local YAML tasks.")] = None,
    suite: Annotated[
        str, typer.Option(help="A benchmark instead: tofu, muse, rwku, whp, wmdp; tofu/forget05.")
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            help="Folder of the suite's data; default: suites/ beside the model, or the hub."
        ),
    ] = "",
    revision: Annotated[str, typer.Option(help="Commit of the suite's data set.")] = "",
    oracle: Annotated[
        str,
        typer.Option(help="For a suite: a model that never saw the forget set, its log, or none."),
    ] = "",
    template: Annotated[
        str, typer.Option(help="How a suite asks, with {question}; default: the chat template.")
    ] = "",
    log: Annotated[
        Path | None, typer.Option(help="Write the suite's numbers here, for a later --oracle.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model, or a run before and after, on tasks or on a benchmark."""
    silence_libraries()
    if suite:
        if tasks or tasks_dir:
            raise SrmuError("--suite and --tasks are measured one at a time")
        from srmu.evals.benchmarks.score import BenchmarkOptions

        way = BenchmarkOptions(suite, data, revision, template, oracle, limit, device)
        eval_benchmark(target, way, log, as_json)
        return
    if data or revision or oracle or template or log:
        raise SrmuError("--data, --revision, --oracle, --template and --log go with --suite")
    from srmu.evals.score import score_model

    scores = score_model(
        target,
        split_names(tasks),
        tasks_dir=tasks_dir,
        limit=limit,
        device=device,
        watch=show_progress,
    )
    if as_json:
        print_result(scores if "before" in scores else scores["after"], True)
        return
    rows = []
    for metric, after in scores["after"].items():
        row = {"metric": metric}
        for when, results in scores.items():
            row[when if "before" in scores else "value"] = format_with_error(results[metric])
        rows.append(row | {"n": f"{after['n']:.0f}"})
    print_table(rows)
    if "before" in scores:
        print_result(
            {}, False, f"wrote {Path(target) / 'results.json'}", f"next: srmu export {target} OUT"
        )
    else:
        print_result({}, False, f"next: srmu unlearn --model {target} --forget F --retain R")


def eval_benchmark(target: str, way: BenchmarkOptions, log: Path | None, as_json: bool) -> None:
    """Measure on a suite, and show the table of its paper and everything else."""
    from srmu.evals import benchmarks
    from srmu.evals.benchmarks.score import TITLES, benchmark_table, score_benchmark
    from srmu.evals.results import RESULTS

    scores = score_benchmark(target, way, log=log, watch=show_progress)
    if as_json:
        print_result(scores, True)
        return
    titles = TITLES if "before" in scores else TITLES | {"after": "model"}
    shown = {title: scores[when] for when, title in titles.items() if when in scores}
    print_table(benchmark_table(benchmarks.find_benchmark(way.name)[0], shown))
    print_table(
        [
            {"metric": metric, "n": f"{entry['n']:.0f}"}
            | {title: format_with_error(found[metric]) for title, found in shown.items()}
            for metric, entry in scores["after"].items()
            if all(metric in found for found in shown.values())
        ]
    )
    lines = [f"wrote {log}"] if log else []
    if "before" in scores:
        print_result(
            {},
            False,
            *lines,
            f"wrote {shorten_path(Path(target) / RESULTS)}",
            f"next: srmu report {target}",
        )
    else:
        then = f"srmu eval RUN --suite {way.name} --oracle {log}"
        again = f"srmu unlearn --model {target} --forget F --retain R"
        print_result({}, False, *lines, f"next: {then if log else again}")


@verbs.command()
def attack_command(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    tier: Annotated[
        Literal["smoke", "standard", "deep"], typer.Option(help="How much is tried.")
    ] = "smoke",
    attacks: Annotated[str, typer.Option(help="Only these, a,b: names or E4, E7.")] = "",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks on the forget knowledge, a,b.")] = "",
    val: Annotated[
        str, typer.Option(help="Tasks to choose settings on, or split; default: TASK_val.")
    ] = "",
    utility: Annotated[str, typer.Option(help="Tasks on what to keep; default: the run's.")] = "",
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder of local YAML tasks.")] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="File of texts far from the forget knowledge.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option(help="File of texts like the forget set, never seen.")
    ] = None,
    oracle: Annotated[
        str, typer.Option(help="A model that never saw the forget knowledge, as a control.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="Questions of each task and half.")] = 400,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before what takes hours.")] = False,
    as_json: Json = False,
) -> None:
    """Attack a run: what brings the knowledge back, beside the original and the oracle."""
    silence_libraries()
    from srmu.attacks import suite as robustness
    from srmu.attacks.summary import describe_attacks
    from srmu.evals.results import RESULTS
    from srmu.runs.run import Run

    def confirm(text: str) -> bool:
        if yes or not sys.stdin.isatty():
            return yes
        return typer.confirm(f"{text} Run it?", err=True)

    given = robustness.Sources(
        tasks=split_names(tasks),
        val=val,
        utility=split_names(utility),
        tasks_dir=str(tasks_dir or ""),
        neutral=str(neutral or ""),
        holdout=str(holdout or ""),
        oracle=oracle,
        limit=limit,
    )
    report = robustness.attack_run(
        Run.open(run),
        tier=tier,
        names=split_names(attacks),
        sources=given,
        seed=seed,
        device=device,
        confirm=confirm,
        watch=show_progress,
    )
    if not as_json:
        print_table(attack_rows(report))
    lines = [*describe_attacks(report), f"wrote {shorten_path(run / RESULTS)}"]
    lines.append(f"next: srmu compare {shorten_path(run)} OTHER_RUN")
    print_result(report, as_json, *lines)


@verbs.command()
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, the first to compare to.")],
    budget: Annotated[
        float, typer.Option(min=0, max=1, help="Loss of utility at which to compare, 0 to 1.")
    ] = 0.05,
    forget: Annotated[
        str, typer.Option(help="Metrics that should fall, where no attack ran.")
    ] = "",
    utility: Annotated[str, typer.Option(help="Metrics that should stay.")] = "",
    as_json: Json = False,
) -> None:
    """Compare methods at the same loss of utility, and say which differences are noise."""
    from dataclasses import asdict

    from srmu.evals.compare import compare_runs as compared

    found = compared(runs, budget, split_names(forget), split_names(utility))
    if as_json:
        print_result({"budget": budget, "rows": [asdict(row) for row in found]}, True)
        return
    table = []
    for row in found:
        measured = [row.utility_loss, row.forget_accuracy, row.residual, row.residual_difference]
        texts = ["" if one is None else format_percent(asdict(one)) for one in measured]
        names = ("utility lost", "forget accuracy", "K*", "K* less the first's")
        first = {"method": row.method, "runs": f"{row.points} x {row.seeds}"}
        table.append(
            first
            | dict(zip(names, texts, strict=True))
            | {"verdict": ", ".join(filter(None, [row.verdict, row.note]))}
        )
    print_table(table)
    lines = [
        f"In %, with 95 % intervals, at {budget:.1%} of utility lost; runs: strengths x seeds."
    ]
    if all(row.residual is None for row in found):
        lines.append("no attack was run on all of these: accuracy alone says little")
        lines.append(f"next: srmu attack {shorten_path(runs[0])}")
    else:
        lines.append(f"next: srmu attack {shorten_path(runs[0])} --tier standard")
    print_result({}, False, *lines)


@verbs.command()
def entanglement_command(
    forget: Annotated[list[str], typer.Option(help="Texts to forget (file, glob).")],
    retain: Annotated[list[str], typer.Option(help="Texts to keep.")],
    model: Annotated[str, typer.Option(help="Folder or hub id: compares activations too.")] = "",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, a,b: are they in the texts?")] = "",
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder of local YAML tasks.")] = None,
    definition: Annotated[
        Literal["pair_containment", "pair_multiset", "corpus_jaccard"],
        typer.Option(help="Which overlap of n-grams."),
    ] = "pair_containment",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    out: Annotated[Path, typer.Option(help="The page with the pictures.")] = Path(
        "entanglement.html"
    ),
    as_json: Json = False,
) -> None:
    """How entangled two sets of texts are, before anything is trained; and what to do about it."""
    silence_libraries()
    from srmu.data.sources import Source, read_texts
    from srmu.evals.analyses import open_model
    from srmu.evals.lm_eval import load_questions
    from srmu.evals.separability import measure_entanglement as measured

    goes, stays = (read_texts([Source(path=p) for p in paths]) for paths in (forget, retain))
    asked = [
        (prompt, options[gold], str(row.get("subject", "")))
        for task in split_names(tasks)
        for prompt, options, gold, row in load_questions(task, tasks_dir)
    ]
    opened = open_model(model, device) if model else None
    found = measured(
        goes,
        stays,
        asked,
        (opened[0].module, opened[1]) if opened else None,
        overlap={"definition": definition},
        watch=show_progress,
    )
    finish_analysis(found, out, as_json, "next: srmu unlearn --model M --forget F --retain R")


@verbs.command()
def names_command(
    forget: Annotated[list[str], typer.Option(help="Texts to forget (file, glob).")],
    retain: Annotated[list[str] | None, typer.Option(help="Texts to keep.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .txt file to write them to.")] = None,
    as_json: Json = False,
) -> None:
    """List what look like names in forget texts, for a review: rename_scrub swaps them."""
    from srmu.data.names import find_names
    from srmu.data.sources import Source, read_texts
    from srmu.engine.files import require_free, write_whole

    if out is not None:
        if out.suffix != ".txt":
            raise SrmuError(f"--out {out}: expected a .txt file")
        require_free(out)
    texts = [read_texts([Source(path=path) for path in paths]) for paths in (forget, retain or [])]
    found = find_names(*texts)
    counts = {name: sum(name in text for text in texts[0]) for name in found}
    if not as_json:
        print_table([{"name": name, "texts": str(count)} for name, count in counts.items()])
    lines = [f"{len(found)} look like names: strike what is none, and add what is missing"]
    if out is None:
        lines.append("next: the same with --out names.txt, and edit that file")
    else:
        write_whole(out, "".join(f"{name}\n" for name in found))
        lines += [
            f"wrote {out}",
            f"next: srmu unlearn ... method.name=rename_scrub method.names={out}",
        ]
    print_result({"names": counts}, as_json, *lines)


@verbs.command()
def analyse_command(
    name: Annotated[
        Literal["confidence", "alignment", "sensitivity", "layers"],
        typer.Argument(help="Which analysis of arXiv 2408.06223."),
    ],
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or a model.")],
    forget: Annotated[list[str] | None, typer.Option(help="Texts to forget; of a model.")] = None,
    retain: Annotated[list[str] | None, typer.Option(help="Texts to keep; of a model.")] = None,
    tokens: Annotated[
        Literal["predicted", "generated"], typer.Option(help="confidence: of which tokens.")
    ] = "predicted",
    tasks: Annotated[str, typer.Option(help="layers: the metrics that should fall, a,b.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="The page; default: NAME.html.")] = None,
    as_json: Json = False,
) -> None:
    """Look inside: token confidence, alignment with the direction, noise sensitivity, layers."""
    silence_libraries()
    from srmu.data.sources import Source, read_texts
    from srmu.evals import analyses
    from srmu.evals.layer_sweep import sweep_layers
    from srmu.evals.score import score_model
    from srmu.runs.run import find_run

    run = find_run(target)
    if name in ("alignment", "layers") and run is None:
        raise SrmuError(
            f"analyse {name} needs a run, which {target} is not: srmu unlearn makes one"
        )
    if name == "layers":
        assert run is not None
        metrics = split_names(tasks)
        if not metrics:
            raise SrmuError("--tasks: name the metrics that should fall, such as wmdp_bio/acc")
        found = sweep_layers(run.config, score_model, metrics, watch=show_progress)
    elif name == "alignment":
        assert run is not None
        found = analyses.measure_alignment(
            run, *analyses.open_model(target, device), watch=show_progress
        )
    else:
        given = {"forget": forget, "retain": retain}
        texts = {k: read_texts([Source(path=p) for p in v]) for k, v in given.items() if v}
        texts = texts or (analyses.read_topic_texts(run) if run else {})
        texts = {key: rows for key, rows in texts.items() if rows}
        if not texts:
            raise SrmuError(f"name texts to read {target} on: --forget F, --retain R, or both")
        model = analyses.open_model(target, device)
        if name == "confidence":
            found = analyses.measure_confidence(*model, texts, tokens=tokens, watch=show_progress)
        else:
            found = analyses.measure_sensitivity(*model, texts, watch=show_progress)
    finish_analysis(found, out or Path(f"{name}.html"), as_json, "")


def finish_analysis(found: Analysis, out: Path, as_json: bool, following: str) -> None:
    """Write an analysis' page and say what it found."""
    from srmu.report.analyses import write_analysis

    write_analysis(found, out)
    lines = [*found.sentences, f"wrote {out}", following or f"next: open {out} in a browser"]
    print_result(
        {"numbers": found.numbers, "sentences": found.sentences, "page": str(out)}, as_json, *lines
    )


def attack_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """The attacks as lines of a table, strongest first; accuracies in %."""

    def shown(entry: dict[str, float] | None) -> str:
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
        table.append(
            {
                "attack": f"{entry['id']} {name}",
                "accuracy": shown(entry.get("accuracy")),
                "recovered": shown(entry.get("recovery")),
                **{
                    who: shown(controls.get(who, {}).get("accuracy"))
                    for who in ("original", "oracle")
                },
                "setting": note,
            }
        )
    return table
