"""The verbs that look at results and check them, and those that make many runs: pages, digests, testbeds, tables."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from srmu.cli import options, output
from srmu.engine.progress import show_progress
from srmu.errors import SrmuError

verbs = typer.Typer()
SHOW, STUDY = "Show and check", "Study"  # groups of verbs
ASKED_FOR = ("reason", "target", "operator", "ticket", "reviewer", "sign_off")  # of a record's purpose, in a summary
GO_ON = "finished runs are kept: the same command goes on, and --show prints the tables"


@verbs.command("report", rich_help_panel=SHOW)
def report_command(
    paths: Annotated[
        list[Path],
        Argument(
            metavar="PATH...",
            help="Folders of runs, or of one sweep, auto search or reproduction; files of open-unlearning.",
        ),
    ],
    out: Annotated[Path, Option("--out", "-o", help="Where to write the page.")] = Path("report.html"),
    metrics: options.Metrics = "",
    utility_metrics: options.UtilityMetrics = "",
    budget: options.Budget = "",
    samples: Annotated[
        Literal["neutral", "forget"] | None,
        Option(
            show_choices=False,
            help="Also show what the models write: after harmless words (neutral), or after forget texts too (forget).",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Make one page that opens offline from runs, a sweep, an auto search or a reproduction."""
    from srmu.report.build import write_report

    forget, utility = output.split_names(metrics), output.split_names(utility_metrics)
    share = output.parse_share(budget) if budget else None
    page = write_report(paths, out, forget=forget, utility=utility, budget=share, samples=samples, watch=show_progress)
    size = page.stat().st_size
    wrote = f"wrote {output.shorten_path(page)} ({size / 1e6:.1f} MB)"
    output.print_result({"page": str(page), "bytes": size}, as_json, wrote, output.open_in_browser(page))


@verbs.command("verify", rich_help_panel=SHOW)
def verify_command(
    folder: Annotated[Path, Argument(metavar="RUN_OR_EXPORT", help="A run or an export.")],
    settings: Annotated[list[str] | None, Argument(metavar="key=value", help="--rerun: runs_dir or device.")] = None,
    rerun: Annotated[bool, Option("--rerun", help="Make the run again and compare the two.")] = False,
    key: Annotated[Path | None, Option(help="Check the signature with this public Ed25519 key (PEM).")] = None,
    sign: Annotated[Path | None, Option(help="Sign with this private Ed25519 key (PEM).")] = None,
    summary: Annotated[Path | None, Option(help="Write the record to this file, as one page.")] = None,
    as_json: options.Json = False,
) -> None:
    """Check every digest of a run or an export, and of its base model, against the record."""
    from srmu.engine.files import write_output
    from srmu.runs import verify as checks
    from srmu.runs.model_card import summarise_record
    from srmu.runs.record import read_record

    if settings and not rerun:
        raise SrmuError(f"{settings[0]}: overrides go with --rerun, which makes the run again")
    if summary and summary.resolve().is_relative_to(folder.resolve()):
        raise SrmuError(
            f"--summary {summary} lies in {folder}, which must stay as it is recorded; name a place elsewhere"
        )
    if summary and summary.is_dir():
        raise SrmuError(f"--summary {summary} is a folder; name a file, such as {summary / 'summary.md'}")
    answer = checks.verify_folder(folder, key, show_progress)
    signed = ", signed" if key else ""
    lines = [f"as recorded: {answer['files']} files, {answer['tensors']} tensors of record {answer['record']}{signed}"]
    record = checks.find_record(folder)
    following, code = output.next_command("verify", output.shorten_path(folder), "--rerun"), 0
    if rerun:
        run, outcome = checks.rerun_record(record, settings or [], show_progress)
        again = output.shorten_path(run.folder)
        if outcome["same"]:
            lines.append("the same delta, byte for byte")
        else:
            lines.append(f"another delta: {', '.join(outcome['tensors']) or 'no tensor, but the file'} differ")
            lines += outcome["differences"] or ["environment and data are the same: the hardware or its load differs"]
        lines.append(f"wrote {again}, and the outcome into {output.shorten_path(record)}")
        answer["rerun"] = {"run": str(run.folder), **outcome}
        following, code = output.next_command("verify", again), 0 if outcome["same"] else 2
    if summary:
        facts = read_record(record)
        unstated = [name for name in ASKED_FOR if not facts["purpose"].get(name)]
        write_output(summary, summarise_record(facts, unstated=unstated))
        if unstated and (config := folder / "config.yaml").is_file():
            stated = [f"purpose.{name}=..." for name in unstated]
            add = output.quote_command("unlearn", output.shorten_path(config), *stated)
            lines.append(f"not stated: {', '.join(unstated)}; this adds them, and trains nothing: {add}")
        lines.append(f"wrote {summary}")
    if sign:  # last, as a rerun writes into the record
        lines.append(f"wrote {checks.sign_record(folder, sign)}")
        following = output.next_command("verify", output.shorten_path(folder), "--key", "PUBLIC.pem")
    output.print_result(answer, as_json, *lines, following)
    raise typer.Exit(code)


@verbs.command("testbed", rich_help_panel=STUDY)
def testbed_command(
    out: Annotated[Path, Argument(help="Folder to write.")],
    world: Annotated[
        str, Option(help="closed: invented; open: harder; people: for the benchmarks; atlas: real facts.")
    ] = "closed",
    seed: Annotated[int, Option(help="Each seed gives another world and model; atlas: other halves.")] = 0,
    entanglement: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            metavar="X",
            help="How much forget and retain-high texts share; default: 0.5, and 1 for atlas and --facts.",
        ),
    ] = None,
    oracle: Annotated[
        bool, Option("--with-oracle", help="Also train an oracle: a twin that never saw the hazard facts.")
    ] = False,
    model: Annotated[str, Option(help="atlas, --facts: the real model; default: SmolLM2, if it is installed.")] = "",
    facts: Annotated[
        Path | None, Option(help="Your own facts: a table of subject, relation or question, answer and kind.")
    ] = None,
    region: Annotated[str, Option(help="atlas: the part of the world to forget.")] = "",
    as_json: options.Json = False,
) -> None:
    """Make a testbed: a small model of an invented world, or texts and questions on what a real model knows."""
    from srmu.testbed.build import build_testbed

    own = {"model": model, "region": region}
    if facts:
        if world != "closed" or region or oracle:
            raise SrmuError("--facts goes without --world, --region and --with-oracle")
        build_own_testbed(out, facts, model, seed, 1.0 if entanglement is None else entanglement, as_json)
        return
    if world == "atlas":
        build_atlas_testbed(out, own, oracle, seed, entanglement, as_json)
        return
    if wrong := [name for name, value in own.items() if value]:
        raise SrmuError(f"--{wrong[0]} belongs to --world atlas, not to {world}")
    share = 0.5 if entanglement is None else entanglement
    report = build_testbed(out, seed=seed, entanglement=share, oracle=oracle, watch=show_progress, world=world)
    lines = describe_overlap(report)
    for name in [name for name in ("model", "oracle") if name in report]:
        lines.append(f"{name}: {', '.join(f'{k} {v:.1%}' for k, v in report[name]['accuracy'].items())}")
    output.print_result(report, as_json, *lines, f"wrote {out}", output.next_command("unlearn", out / "high.yaml"))


def build_atlas_testbed(
    out: Path, own: dict[str, str], oracle: bool, seed: int, entanglement: float | None, as_json: bool
) -> None:
    """The testbed of real facts: `srmu testbed OUT --world atlas`."""
    from srmu.testbed.atlas import build_atlas

    if oracle:
        raise SrmuError("--with-oracle: nobody can train a real model without the facts; leave it out")
    given: dict[str, Any] = {
        key: value for key, value in {**own, "entanglement": entanglement}.items() if value not in ("", None)
    }
    report = build_atlas(out, seed=seed, watch=show_progress, **given)
    facts = report["facts"]
    lines = [
        *describe_overlap(report),
        "facts known, right in two phrasings: " + ", ".join(f"{k} {v}" for k, v in facts.items() if "unknown" not in k),
        f"facts of {report['region']} failed in both: {facts['unknown test'] + facts['unknown val']}",
        report["source"],
    ]
    output.print_result(report, as_json, *lines, f"wrote {out}", output.next_command("unlearn", out / "high.yaml"))


def build_own_testbed(out: Path, facts: Path, model: str, seed: int, entanglement: float, as_json: bool) -> None:
    """The testbed of a user's own facts: `srmu testbed OUT --facts FILE --model M`."""
    from srmu.testbed.own_facts import build_own, list_counts

    report = build_own(out, facts, model=model, seed=seed, entanglement=entanglement, watch=show_progress)
    config = next(name for name in ("high.yaml", "low.yaml") if (out / name).exists())
    following = output.next_command("unlearn", out / config)
    output.print_result(report, as_json, *list_counts(report), *describe_overlap(report), f"wrote {out}", following)


def describe_overlap(report: dict[str, Any]) -> list[str]:
    return [
        f"overlap of forget with {name.replace('/', ', ')}s: {share:.1%} of types"
        for name, share in report["overlap"].items()
    ]


@verbs.command("reproduce", rich_help_panel=STUDY)
def reproduce_command(
    what: Annotated[
        Literal["table2", "table3", "table4", "figure2", "all", "robust", "ablations", "methods"],
        Argument(
            metavar="WHAT",
            show_choices=False,
            help="Of the paper: table2, table3, table4, figure2 or all; our own: robust, ablations, methods.",
        ),
    ],
    settings: Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="Overrides for every run.")] = None,
    model: Annotated[
        str, Option(help="Folder or hub id; with --world atlas, the model to ask. Default: testbeds are made.")
    ] = "",
    seeds: options.Seeds = "",
    world: Annotated[
        str, Option(help="Tables: closed (default) or atlas; robust: closed, open or both (default).")
    ] = "",
    regions: Annotated[str, Option(help="atlas: parts of the world to forget: a,b.")] = "",
    regimes: Annotated[str, Option(help="robust: high, rho0 or both: a,b.")] = "",
    methods: Annotated[str, Option(help="robust: only these rows: a,b.")] = "",
    tier: Annotated[str, Option(help="robust: smoke, standard or deep attacks.")] = "",
    show: Annotated[bool, Option("--show", help="Print what was run; run nothing.")] = False,
    out: Annotated[Path, Option(help="Folder for everything that is written.")] = Path("reproduce"),
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Repeat the tables and the figure of SRMU's paper, and say which of its claims hold here.

    `robust` holds methods that resist relearning against others, at one loss of utility;
    `methods` holds all methods.
    """
    numbers = output.split_seeds(seeds)
    own = {"world": world, "regimes": regimes, "methods": methods, "tier": tier}
    if what in ("robust", "ablations", "methods"):
        for name, value in (("model", model), ("regions", regions)):
            if value:
                raise SrmuError(f"--{name}: {what} runs on testbeds of invented worlds alone; leave it out")
        asked = {name: value for name, value in {**own, "seeds": seeds}.items() if value}
        reproduce_frontier(what, out, asked, settings or [], dry_run, show, as_json)
        return
    if world not in ("", "atlas") and model:
        raise SrmuError("--world and --model: tables are made for one or the other; leave one out")
    if wrong := [name for name, value in own.items() if value and name != "world"]:
        raise SrmuError(f"--{wrong[0]} belongs to srmu reproduce robust, not to {what}")
    given = {"model": model, "world": world, "seeds": seeds, "regions": regions}
    reproduce_tables(what, out, given, numbers, settings or [], dry_run, show, as_json)


def reproduce_tables(
    what: str,
    out: Path,
    given: dict[str, str],
    seeds: tuple[int, ...],
    settings: list[str],
    dry_run: bool,
    show: bool,
    as_json: bool,
) -> None:
    """The paper's tables and figure: `srmu reproduce table2` and so on; `given` are the options as they were typed."""
    from srmu.report.build import write_report
    from srmu.report.markdown import write_study
    from srmu.report.results import strip_paths
    from srmu.reproduce import paper

    if seeds != tuple(range(len(seeds))):
        raise SrmuError(f"--seeds: those of {what} count from 0: 0,1,2")
    place = paper.plan_paper(
        out,
        given["model"],
        len(seeds) or None,
        settings,
        given["world"] or "closed",
        output.split_names(given["regions"]),
    )
    if dry_run:
        needs, lines = paper.paper_needs(what, place)
        output.print_result(needs, as_json, *lines, output.PLANNED)
        return
    command = output.quote_command("reproduce", what, *settings, **given)
    with output.explain_interrupt(GO_ON):
        tables = paper.reproduce_paper(what, place, command=strip_paths(command), watch=show_progress, make=not show)
    print_study(tables, [*write_study(tables, out), write_report([out], out / "report.html")], as_json)


def reproduce_frontier(
    what: str, out: Path, asked: dict[str, str], settings: list[str], dry_run: bool, show: bool, as_json: bool
) -> None:
    """What stays gone under attack: `srmu reproduce robust`, `ablations` and `methods`."""
    from srmu.report.markdown import write_study
    from srmu.reproduce import robust
    from srmu.reproduce.experiment import say_nothing_run

    listed = ("seeds", "regimes", "methods")
    wanted: dict[str, Any] = {k: output.split_names(v) if k in listed else v for k, v in asked.items()}
    frontier = robust.plan_frontier(what, out, overrides=settings, **wanted)
    if dry_run:
        needs, line = robust.frontier_needs(frontier)
        output.print_result(needs, as_json, line, output.PLANNED)
        return
    with output.explain_interrupt(GO_ON):
        cases = robust.measure_frontier(frontier, show_progress, make=not show)
    command = output.quote_command("reproduce", what, *settings, **asked)
    if show and not any(row.runs for part in cases for row in part.rows):
        again = output.quote_command("reproduce", what, *settings, **asked, out=out)
        raise SrmuError(say_nothing_run(out, again))
    tables = robust.build_frontier_tables(frontier, cases, command)
    reports = robust.write_frontier_reports(frontier, cases, tables)
    print_study(tables, [*write_study(tables, out), *reports], as_json)


def print_study(tables: dict[str, Any], pages: list[Path], as_json: bool) -> None:
    """Print a study, of whose files the second is its Markdown, and where it was written."""
    from srmu.report.format import print_markdown

    if not as_json:
        print_markdown(pages[1].read_text(encoding="utf-8"))
    wrote = ", ".join(str(output.shorten_path(path)) for path in pages)
    output.print_result(tables, as_json, f"wrote {wrote}", output.open_in_browser(pages[-1]))
