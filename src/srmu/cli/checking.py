"""The verbs for people who look at results or have to trust them: pages, and digests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from srmu.cli import options
from srmu.cli.output import next_command, open_in_browser, print_result, shorten_path, split_names
from srmu.engine.progress import show_progress, silence_libraries
from srmu.errors import SrmuError

verbs = typer.Typer()
GROUP = "Show and check"


@verbs.command("report", rich_help_panel=GROUP)
def report_command(
    paths: Annotated[list[Path], Argument(metavar="PATH...", help="Runs, or one study.")],
    out: Annotated[Path, Option("--out", "-o", help="The page.")] = Path("report.html"),
    metrics: options.Metrics = "",
    utility_metrics: options.UtilityMetrics = "",
    as_json: options.Json = False,
) -> None:
    """Draw runs, a sweep, a choice or a reproduction as one page that opens anywhere."""
    silence_libraries()
    from srmu.report.build import write_report

    forget, utility = split_names(metrics), split_names(utility_metrics)
    page = write_report(paths, out, forget=forget, utility=utility)
    size = page.stat().st_size
    print_result(
        {"page": str(page), "bytes": size},
        as_json,
        f"wrote {shorten_path(page)} ({size / 1e6:.1f} MB)",
        open_in_browser(page),
    )


@verbs.command("verify", rich_help_panel=GROUP)
def verify_command(
    folder: Annotated[Path, Argument(metavar="RUN_OR_EXPORT", help="A run or an export.")],
    settings: Annotated[list[str] | None, Argument(metavar="key=value", help="rerun: runs_dir, device.")] = None,
    rerun: Annotated[bool, Option("--rerun", help="Make the run again and compare it.")] = False,
    key: Annotated[Path | None, Option(help="Public Ed25519 key (PEM): check the signature.")] = None,
    sign: Annotated[Path | None, Option(help="Private Ed25519 key (PEM) to sign with.")] = None,
    summary: Annotated[Path | None, Option(help="Write the record here, on one page.")] = None,
    as_json: options.Json = False,
) -> None:
    """Recompute every digest of a run or an export, and of its base model, against the record."""
    silence_libraries()
    from srmu.engine.files import write_whole
    from srmu.runs import verify as checks

    if settings and not rerun:
        raise SrmuError(f"{settings[0]}: overrides go with --rerun, which makes the run again")
    answer = checks.verify_folder(folder, key, show_progress)
    lines = [
        f"as recorded: {answer['files']} files, {answer['tensors']} tensors of record "
        f"{answer['record']}" + (", signed" if key else "")
    ]
    if sign:
        lines.append(f"wrote {checks.sign_record(folder, sign)}")
    if summary:
        from srmu.runs.model_card import summarise_record
        from srmu.runs.record import read_record

        write_whole(summary, summarise_record(read_record(checks.find_record(folder))))
        lines.append(f"wrote {summary}")
    if rerun:
        again, more = repeat_run(checks.find_record(folder), settings or [])
        print_result(answer | {"rerun": again}, as_json, *lines, *more)
        raise typer.Exit(0 if again["same"] else 2)
    print_result(answer, as_json, *lines, next_command("verify", shorten_path(folder), "--rerun"))


def repeat_run(record: Path, settings: list[str]) -> tuple[dict[str, object], list[str]]:
    """Make a record's run again; whether the result is the same, and the lines that say so."""
    from srmu.runs.verify import rerun_record

    run, outcome = rerun_record(record, settings, show_progress)
    if outcome["same"]:
        lines = ["the same delta, byte for byte"]
    else:
        names = ", ".join(outcome["tensors"]) or "no tensor, but the file"
        lines = [f"another delta: {names} differ", *outcome["differences"]]
        if not outcome["differences"]:
            lines.append("environment and data are the same: the hardware or its load differs")
    folder = shorten_path(run.folder)
    lines.append(f"wrote {folder}, and the outcome into {shorten_path(record)}")
    return {"run": str(run.folder), **outcome}, [*lines, next_command("verify", folder)]
