"""The verbs that make many runs of ours: the testbeds, and tables over them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from srmu.cli import options
from srmu.cli.output import (
    next_command,
    open_in_browser,
    print_result,
    quote_command,
    shorten_path,
    split_names,
    split_seeds,
)
from srmu.engine.progress import print_line, show_progress, silence_libraries
from srmu.errors import SrmuError

verbs = typer.Typer()
GROUP = "Study"


@verbs.command("testbed", rich_help_panel=GROUP)
def testbed_command(
    out: Annotated[Path, Argument(help="Folder to write.")],
    world: Annotated[str, Option(help="closed; open: harder; people: benchmarks.")] = "closed",
    seed: Annotated[int, Option(help="Each seed gives another world and model.")] = 0,
    entanglement: Annotated[
        float, Option(min=0, max=1, help="How much the forget and retain-high texts share, 0 to 1.")
    ] = 0.5,
    with_oracle: Annotated[bool, Option("--with-oracle", help="Also a twin that never saw the hazard facts.")] = False,
    as_json: options.Json = False,
) -> None:
    """Train the small model of a fictional world and write its texts and questions."""
    silence_libraries()
    from srmu.testbed.build import build_testbed

    report = build_testbed(
        out, seed=seed, entanglement=entanglement, oracle=with_oracle, watch=show_progress, world=world
    )
    lines = [
        f"overlap of forget with {name.replace('/', ', ')}s: {values['jaccard']:.1%} of types"
        for name, values in report["overlap"].items()
    ]
    for name in ("model", "oracle"):
        if name in report:
            scores = ", ".join(f"{k} {v:.1%}" for k, v in report[name]["accuracy"].items())
            lines.append(f"{name}: {scores}")
    lines.append(f"wrote {out}")
    print_result(report, as_json, *lines, next_command("unlearn", out / "high.yaml"))


@verbs.command("reproduce", rich_help_panel=GROUP)
def reproduce_command(
    what: Annotated[
        Literal["table2", "table3", "table4", "figure2", "all", "robust", "ablations", "methods"],
        Argument(help="Of the paper; or our own: robust, ablations, methods."),
    ],
    settings: Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="Overrides for every run.")] = None,
    model: Annotated[str, Option(help="Folder or hub id; default: testbeds.")] = "",
    seeds: options.Seeds = "",
    world: Annotated[str, Option(help="robust: closed, open or both (both).")] = "",
    regimes: Annotated[str, Option(help="robust: high, rho0, a,b.")] = "",
    methods: Annotated[str, Option(help="robust: these rows only, a,b.")] = "",
    tier: Annotated[str, Option(help="robust: smoke, standard or deep attacks.")] = "",
    show: Annotated[bool, Option("--show", help="robust: print, run nothing.")] = False,
    out: Annotated[Path, Option(help="Folder for all of it.")] = Path("reproduce"),
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """SRMU's tables and figure again, beside the paper's numbers; which of its claims hold here.

    `robust` holds methods that resist relearning against others, at one loss of utility;
    `methods` holds all methods.
    """
    silence_libraries()
    split_seeds(seeds)
    own = {"world": world, "regimes": regimes, "methods": methods, "tier": tier}
    if what in ("robust", "ablations", "methods"):
        if model:
            raise SrmuError(f"--model: {what} runs on testbeds alone; leave it out")
        asked = {**{k: v for k, v in own.items() if v}, "seeds": seeds, "overrides": settings or ()}
        reproduce_frontier(what, out, asked, dry_run, show, as_json)
        return
    if wrong := [name for name, value in (*own.items(), ("show", show)) if value]:
        raise SrmuError(f"--{wrong[0]} belongs to srmu reproduce robust, not to {what}")
    reproduce_tables(what, out, model, split_seeds(seeds), settings or [], dry_run, as_json)


def reproduce_tables(
    what: str, out: Path, model: str, seeds: tuple[int, ...], settings: list[str], dry_run: bool, as_json: bool
) -> None:
    """The paper's tables and figure: `srmu reproduce table2` and so on."""
    from srmu.report import markdown
    from srmu.report.build import write_report
    from srmu.reproduce import paper

    if seeds != tuple(range(len(seeds))):
        raise SrmuError(f"--seeds: those of {what} count from 0: 0,1,2")
    place = paper.plan_paper(out, model, len(seeds) or None, settings)
    command = paper.format_command(what, place, settings)
    if dry_run:
        needs, lines = paper.paper_needs(what, place)
        print_result(needs, as_json, *lines, "next: the same without --dry-run")
        return
    tables = paper.reproduce_paper(what, place, command=command, watch=show_progress)
    pages = [*markdown.write_study(tables, out), write_report([out], out / "report.html")]
    if not as_json:
        markdown.print_study(tables)
    finish_study(tables, pages, as_json)


def reproduce_frontier(what: str, out: Path, asked: dict[str, Any], dry_run: bool, show: bool, as_json: bool) -> None:
    """What stays gone under attack: `srmu reproduce robust`, `ablations` and `methods`."""
    from srmu.report import markdown
    from srmu.reproduce import robust
    from srmu.reproduce.robust_tables import build_frontier_tables, write_frontier_reports

    listed = ("seeds", "regimes", "methods")
    wanted: dict[str, Any] = {k: split_names(v) if k in listed else v for k, v in asked.items()}
    frontier = robust.plan_frontier(what, out, **wanted)
    if dry_run:
        needs, line = robust.frontier_needs(frontier)
        print_result(needs, as_json, line, "next: the same without --dry-run")
        return
    try:
        cases = robust.measure_frontier(frontier, show_progress, make=not show)
    except KeyboardInterrupt:
        print_line("finished runs are kept: the same command goes on, and --show prints the tables")
        raise
    pairs = [(f"--{k}", v) for k, v in asked.items() if v and k != "overrides"]
    words = [word for pair in pairs for word in pair]
    command = quote_command("reproduce", what, *words, *asked["overrides"])
    tables = build_frontier_tables(frontier, cases, command)
    pages = [*markdown.write_study(tables, out), *write_frontier_reports(frontier, cases, command)]
    if not as_json:
        markdown.print_study(tables)
    finish_study(tables, pages, as_json)


def finish_study(tables: dict[str, Any], pages: list[Path], as_json: bool) -> None:
    wrote = ", ".join(str(shorten_path(path)) for path in pages)
    print_result(tables, as_json, f"wrote {wrote}", open_in_browser(pages[-1]))
