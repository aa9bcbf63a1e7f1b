"""The verbs that make many runs, and the one that draws what they found."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from srmu.cli.output import Json, print_result, shorten_path, split_names
from srmu.engine.progress import print_line, show_progress, silence_libraries
from srmu.errors import SrmuError
from srmu.report.format import print_table

verbs = typer.Typer()


@verbs.command("sweep")
def sweep_command(
    args: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG [key=value ...]", help="A sweep file, then overrides."),
    ],
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many to try; a grid has all its points.")
    ] = None,
    storage: Annotated[
        str, typer.Option(help="postgresql://USER@HOST/DATABASE, for workers on any machines.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Try many settings of a config, alone or with other workers; a stopped sweep goes on."""
    silence_libraries()
    from srmu.search import sweep as sweeping

    more = [] if trials is None else [f"trials={trials}"]
    ready = sweeping.Plan(Path(args[0]), [*args[1:], *more])
    try:
        found = sweeping.run_sweep(ready, storage, show_progress)
    except KeyboardInterrupt:
        print_line("what is done is kept: the same command goes on")
        raise
    if (table := sweeping.sweep_rows(found)) and not as_json:
        print_table(table)
    out = shorten_path(ready.out)
    lines = [
        *sweeping.describe_sweep(found),
        f"wrote {out / sweeping.FILE}",
        f"next: srmu report {out}",
    ]
    if best := next(iter(sweeping.best_trials(found)), None):
        typed = shlex.join([str(shorten_path(ready.config)), *ready.overrides(best["params"])])
        lines.append(f"      srmu unlearn {typed}")
    print_result(found, as_json, *lines)


@verbs.command("auto")
def auto_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    forget: Annotated[list[str], typer.Option(help="Texts to forget (file, glob).")],
    retain: Annotated[list[str], typer.Option(help="Texts to keep.")],
    budget: Annotated[str, typer.Option(help="The most utility to lose: 1% or 0.01.")] = "1%",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks on what is to go, a,b.")] = "",
    utility: Annotated[str, typer.Option(help="lm-eval tasks on what is to stay, a,b.")] = "",
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder of local YAML tasks.")] = None,
    method: Annotated[str, typer.Option(help="srmu, rmu, adaptive_rmu or rna.")] = "srmu",
    robust: Annotated[
        bool, typer.Option("--robust", help="rename_scrub: resists relearning, takes longer.")
    ] = False,
    names: Annotated[str, typer.Option(help="robust: file of names to swap, one a line.")] = "",
    goals: Annotated[
        str, typer.Option(help="robust: file of phrases about which all is to be forgotten.")
    ] = "",
    trials: Annotated[
        int, typer.Option(min=1, help="Strengths to try; with --robust 3 at most.")
    ] = 24,
    out: Annotated[Path, typer.Option(help="Folder for all of it.")] = Path("auto"),
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """One command: find layer and strength within a budget of utility, unlearn, attack, export."""
    silence_libraries()
    from srmu.search import auto as automatic

    def tell(step: str, sentence: str) -> None:
        (print_line if as_json else typer.echo)(f"{step}: {sentence}")

    asked = automatic.AutoRequest(
        model=model,
        forget=tuple(forget),
        retain=tuple(retain),
        budget=automatic.parse_share(budget),
        tasks=split_names(tasks),
        utility=split_names(utility),
        tasks_dir=str(tasks_dir or ""),
        method=method,
        robust=robust,
        names=names,
        goals=goals,
        trials=trials,
        out=out.resolve(),
        seed=seed,
        device=device,
    )
    job = automatic.prepare_job(asked)
    if answer := automatic.find_answer(job):
        for choice in answer["choices"]:
            tell(**choice)
        done = f"this was there already: {shorten_path(asked.out)}"
    else:
        planned = automatic.plan_search(job)
        if dry_run:
            lines = automatic.explain_search(planned)
            print_result(planned, as_json, *lines, "next: the same without --dry-run")
            return
        for line in automatic.explain_search(planned):
            (print_line if as_json else typer.echo)(line)
        try:
            answer = automatic.run_search(job, tell, show_progress)
        except KeyboardInterrupt:
            print_line("what is done is kept: the same command goes on")
            raise
        done = f"wrote {shorten_path(asked.out)}"
    print_result(
        answer,
        as_json,
        done,
        f"next: open {shorten_path(asked.out / automatic.PAGE)} in a browser",
        f"      srmu attack {shorten_path(asked.out / answer['run'])} --tier standard",
    )


@verbs.command("reproduce")
def reproduce_command(
    what: Annotated[
        Literal["table2", "table3", "table4", "figure2", "all", "robust", "ablations", "methods"],
        typer.Argument(help="Of the paper; or our own: robust, ablations, methods."),
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="For every run.")
    ] = None,
    model: Annotated[str, typer.Option(help="Folder or hub id; default: testbeds.")] = "",
    seeds: Annotated[
        str,
        typer.Option(
            help="How many testbeds (3), or draws of the directions on a model (1). Of robust, "
            "ablations and methods: which testbeds, a,b (1,2,3)."
        ),
    ] = "",
    world: Annotated[str, typer.Option(help="robust: closed, open or both (both).")] = "",
    regimes: Annotated[str, typer.Option(help="robust: high, rho0, a,b.")] = "",
    methods: Annotated[str, typer.Option(help="robust: these rows only, a,b.")] = "",
    tier: Annotated[str, typer.Option(help="robust: smoke, standard or deep attacks.")] = "",
    show: Annotated[
        bool, typer.Option("--show", help="robust: tables of what is there, run nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for all of it.")] = Path("reproduce"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it needs, do nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """SRMU's tables and figure again, beside the paper's numbers; which of its claims hold here.

    `robust` holds methods that resist relearning against others, at one loss of utility; `methods`
    all methods.
    """
    silence_libraries()
    own = {"world": world, "regimes": regimes, "methods": methods, "tier": tier}
    if what in ("robust", "ablations", "methods"):
        if model:
            raise SrmuError(f"--model: {what} runs on testbeds alone; leave it out")
        asked = {**{k: v for k, v in own.items() if v}, "seeds": seeds, "overrides": settings or ()}
        held_up(what, out, asked, dry_run, show, as_json)
        return
    if given := [name for name, value in (*own.items(), ("show", show)) if value]:
        raise SrmuError(f"--{given[0]} belongs to srmu reproduce robust, not to {what}")
    if seeds and not seeds.isdecimal():
        raise SrmuError(f"--seeds {seeds}: of {what} a number of testbeds, 3")
    from srmu.report import markdown
    from srmu.report.build import write_report as drawn
    from srmu.reproduce import paper as again

    place = again.plan_paper(out, model, int(seeds) if seeds else None, settings or ())
    command = again.format_command(what, place, settings or ())
    if dry_run:
        found, lines = again.paper_needs(what, place)
        print_result(found, as_json, *lines, "next: the same without --dry-run")
        return
    found = again.reproduce_paper(what, place, command=command, watch=show_progress)
    paths = [*markdown.write_study(found, out), drawn([out], out / "report.html")]
    if not as_json:
        markdown.print_study(found)
    wrote = ", ".join(str(shorten_path(path)) for path in paths)
    print_result(
        found, as_json, f"wrote {wrote}", f"next: open {shorten_path(paths[-1])} in a browser"
    )


def held_up(
    what: str, out: Path, asked: dict[str, Any], dry_run: bool, show: bool, as_json: bool
) -> None:
    """What stays gone under attack: `srmu reproduce robust`, `ablations` and `methods`."""
    from srmu.report import markdown
    from srmu.reproduce import robust as frontier
    from srmu.reproduce.robust_tables import build_frontier_tables, write_frontier_reports

    names = ("seeds", "regimes", "methods")
    given: dict[str, Any] = {k: split_names(v) if k in names else v for k, v in asked.items()}
    wanted = frontier.plan_frontier(what, out, **given)
    if dry_run:
        needed, line = frontier.frontier_needs(wanted)
        print_result(needed, as_json, line, "next: the same without --dry-run")
        return
    try:
        made = (
            frontier.read_frontier(wanted)
            if show
            else frontier.measure_frontier(wanted, show_progress)
        )
    except KeyboardInterrupt:
        print_line("what is done is kept: the same command goes on, and --show has its tables")
        raise
    typed = [(f"--{k}", v) for k, v in asked.items() if v and k != "overrides"]
    options = [word for pair in typed for word in pair]
    command = shlex.join(["srmu", "reproduce", what, *options, *asked["overrides"]])
    found = build_frontier_tables(wanted, made, command)
    paths = [
        *markdown.write_study(found, out),
        *write_frontier_reports(wanted, made, command),
    ]
    if not as_json:
        markdown.print_study(found)
    wrote = ", ".join(str(shorten_path(path)) for path in paths)
    print_result(
        found, as_json, f"wrote {wrote}", f"next: open {shorten_path(paths[-1])} in a browser"
    )


@verbs.command("report")
def report_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Runs, folders of runs, or one study."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    forget: Annotated[
        str, typer.Option(help="Metrics that should fall; default: those attacked.")
    ] = "",
    utility: Annotated[str, typer.Option(help="Metrics that should stay.")] = "",
    as_json: Json = False,
) -> None:
    """Draw runs, a sweep, a choice or a reproduction as one page that opens anywhere."""
    silence_libraries()
    from srmu.report.build import write_report as drawn

    page = drawn(paths, out, forget=split_names(forget), utility=split_names(utility))
    size = page.stat().st_size
    lines = [
        f"wrote {shorten_path(page)} ({size / 1e6:.1f} MB)",
        f"next: open {shorten_path(page)} in a browser",
    ]
    print_result({"page": str(page), "bytes": size}, as_json, *lines)
