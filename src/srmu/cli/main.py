"""The command line: verbs only. What they do is in the modules they call, imported inside them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from srmu.cli import measuring, searching
from srmu.cli.output import Json, print_result, shorten_path
from srmu.engine import distributed
from srmu.engine.progress import print_line, show_progress, silence_libraries
from srmu.errors import SrmuError
from srmu.report.format import print_table

# Threads that wait for others must sleep: spinning, a busy machine is ten times slower. It has to
# be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SHARED = ("unlearn", "eval", "attack")  # verbs that several processes share

app = typer.Typer(
    name="srmu",
    help="Make a language model unlearn chosen knowledge, and measure how well it did.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every verb takes --debug: show the traceback of an error.",
)
app.add_typer(measuring.verbs)
app.add_typer(searching.verbs)


def main() -> None:
    """Run the program. Exit codes: 0 done, 1 our fault, 2 the user's, 130 interrupted."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    shown = sys.stdout, sys.stderr
    try:
        if not distributed.is_first():  # the first process speaks for all, but for its errors
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        if distributed.get_size() > 1 and arguments[0] not in SHARED:
            raise SrmuError(
                f"srmu {arguments[0]} runs in one process: start it without the launcher, which is "
                f"for {', '.join(SHARED)}"
            )
        distributed.join_group()
        code = app(arguments, prog_name="srmu", standalone_mode=False)
        distributed.leave_group()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if debug:
            raise
        theirs = isinstance(error, SrmuError | PermissionError)
        code = 2 if theirs else getattr(error, "exit_code", 1)
        message = getattr(error, "format_message", lambda: str(error))()
        if code == 1:
            message = f"internal error: {type(error).__name__}: {message} (--debug shows where)"
        message = " ".join(message.split())
        sys.stdout, sys.stderr = shown
        if distributed.says_first(message):
            who = (
                f"rank {distributed.get_rank()} of {distributed.get_size()}: "
                if distributed.get_size() > 1
                else ""
            )
            print_line(f"srmu: {who}{message}")
    if code == 130:  # what typer, too, makes of an interrupt
        print_line("srmu: interrupted")
    sys.exit(code or 0)


@app.command()
def demo_command(
    out: Annotated[Path, typer.Argument(help="Folder for the testbed, runs and report.")] = Path(
        "demo"
    ),
    seeds: Annotated[int, typer.Option(help="Runs of each method, with other directions.")] = 3,
    as_json: Json = False,
) -> None:
    """The whole story offline: a testbed, four methods, two regimes, a table and a picture."""
    silence_libraries()
    from srmu.reproduce.demo import play_demo, terminal_table

    entries, report = play_demo(out, seeds=seeds, watch=show_progress)
    rows = terminal_table(entries)
    if as_json:
        print_result({"report": str(report), "rows": rows}, True)
        return
    print_table(rows)
    print_result(
        {},
        False,
        "",
        f"Accuracy in %, mean over {seeds} runs, with a 95 % interval; guessing scores 25.",
        "hazard: the facts to forget; hazard_held: those that no forget text states; neighbour:",
        "harmless facts on the same things; general: the rest. Entangled: whether the retain texts",
        "are general (low) or neighbour texts (high). No attack was run: this shows what is",
        "suppressed, not what is gone.",
        f"wrote {report}",
        f"next: open {report} in a browser, or change something:",
        f"      srmu unlearn {out}/testbed/high.yaml method.kappa=16",
    )


@app.command()
def testbed_command(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Another world and model for each.")] = 0,
    entanglement: Annotated[
        float, typer.Option(min=0, max=1, help="How much forget and retain-high share, 0 to 1.")
    ] = 0.5,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also a twin that never saw the hazard facts.")
    ] = False,
    world: Annotated[
        str, typer.Option(help="closed; open: longer names, procedures; people: for --suite.")
    ] = "closed",
    as_json: Json = False,
) -> None:
    """Train the small model of a fictional world and write its texts and questions."""
    silence_libraries()
    from srmu.testbed.build import build_testbed

    report = build_testbed(
        out, seed=seed, entanglement=entanglement, oracle=oracle, watch=show_progress, world=world
    )
    lines = [
        f"overlap of forget with {name.replace('/', ', ')}s: {values['jaccard']:.1%} of types"
        for name, values in report["overlap"].items()
    ]
    for name in ("model", "oracle"):
        if name in report:
            scores = ", ".join(f"{k} {v:.1%}" for k, v in report[name]["accuracy"].items())
            lines.append(f"{name}: {scores}")
    print_result(report, as_json, *lines, f"wrote {out}", f"next: srmu unlearn {out}/high.yaml")


@app.command()
def unlearn_command(
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [key=value ...]", help="A YAML file, then overrides."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; with --forget.")] = None,
    forget: Annotated[list[str] | None, typer.Option(help="Texts to forget (file, glob).")] = None,
    retain: Annotated[
        list[str] | None, typer.Option(help="Texts to keep; some methods need none.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A name of srmu methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also export the full model here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, do nothing.")] = False,
    from_record: Annotated[
        Path | None, typer.Option(help="Make this record's run again and compare.")
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Cut the weights over the launcher's processes (FSDP2).")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Leave the layers below those that change on disk.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Unlearn: one run, from a config file or from --model, --forget and --retain."""
    silence_libraries()
    from srmu.runs import run as runs
    from srmu.runs.config import load_config, make_config

    given = args or []
    if from_record:
        if model or forget or retain or method or out or dry_run or shard or offload:
            raise SrmuError("--from-record takes key=value overrides and no other option")
        if distributed.get_size() > 1:
            raise SrmuError("--from-record runs in one process: start it without the launcher")
        rerun_command(from_record, given, as_json)
        return
    if given and "=" not in given[0]:
        if model or forget or retain or method:
            raise SrmuError(
                "a config file names model, texts and method; override them with key=value, "
                f"for example: srmu unlearn {given[0]} method.name=rmu"
            )
        config = load_config(Path(given[0]), given[1:])
    elif model and forget:
        config = make_config(model, forget, retain or [], method or "srmu", given)
    else:
        raise SrmuError("name a config file, or --model M --forget F [--retain R]")
    if dry_run:
        from srmu.runs.dry_run import plan_dry_run as planned

        config, estimate, lines = planned(config)
        print_result(
            estimate, as_json, config.to_yaml(), *lines, "next: the same without --dry-run"
        )
        return
    sharded = shard or distributed.asked_to_shard()
    plan = runs.plan_run(config, shard=sharded, offload=offload)
    again = (plan.folder / "record.json").exists()
    run = runs.run_plan(plan, out, watch=show_progress)
    record = run.record
    lines = [*runs.run_notes(run)]
    folder = shorten_path(run.folder)
    if again:
        lines.append(f"this run was there already: {folder}")
    else:
        lines.append(f"{record['steps']} steps in {record['seconds']:.1f} s; wrote {folder}")
    if record["stop_reason"] not in ("max_steps", "edited"):
        lines.append(f"stopped early: {record['stop_reason']}")
    if out:
        lines.append(f"wrote {out}")
    if not again and record["activations"]["kept"] == "disk":
        lines.append("activations are kept for later runs; see srmu cache ls")
    tasks = "" if run.config.eval else " --tasks TASK"
    lines.append(f"next: srmu eval {folder}{tasks}")
    if not out:
        lines.append(f"      srmu export {folder} OUT")
    print_result(
        {"run": str(run.folder), "out": out and str(out), "record": record}, as_json, *lines
    )


def rerun_command(record: Path, overrides: list[str], as_json: bool) -> None:
    """Make a record's run again and say whether the same came out."""
    from srmu.runs.rerun import rerun_record

    run, found = rerun_record(record, overrides, show_progress)
    if found["same"]:
        said = ["the same delta, byte for byte"]
    else:
        names = ", ".join(found["tensors"]) or "no tensor, but the file"
        said = [f"another delta: {names} differ", *found["differences"]]
        if not found["differences"]:
            said.append("environment and data are alike: the hardware, or how busy it was, differs")
    print_result(
        {"run": str(run.folder), **found},
        as_json,
        *said,
        f"wrote {shorten_path(run.folder)}, and the outcome into {shorten_path(record)}",
        f"next: srmu verify {shorten_path(record.parent)}",
    )
    if not found["same"]:
        raise typer.Exit(2)


@app.command()
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="What to check.")],
    key: Annotated[
        Path | None, typer.Option(help="Public Ed25519 key (PEM): check the signature, too.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(help="Private Ed25519 key (PEM): sign what was verified.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Write the record on one page here (Markdown).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Recompute every digest of a run or an export, and of its base model, against the record."""
    from srmu.engine.files import write_whole
    from srmu.runs import verify as verifying

    found = verifying.verify_folder(folder, key, show_progress)
    lines = [
        f"as recorded: {found['files']} files, {found['tensors']} tensors of record "
        f"{found['record']}" + (", signed" if key else "")
    ]
    if sign:
        lines.append(f"wrote {verifying.sign_record(folder, sign)}")
    if summary:
        from srmu.runs.model_card import summarise_record as page
        from srmu.runs.record import read_record

        write_whole(summary, page(read_record(verifying.find_record(folder))))
        lines.append(f"wrote {summary}")
    lines.append("next: srmu unlearn --from-record RUN/record.json makes the run again")
    print_result(found, as_json, *lines)


@app.command()
def export_command(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    link: Annotated[
        bool | None,
        typer.Option("--link/--copy", help="Share the files that stay as they were, or copy them."),
    ] = None,
    last_good: Annotated[
        bool, typer.Option("--last-good", help="Of a run that diverged: the weights before that.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run's full Hugging Face checkpoint; all but the changed tensors stay as they were."""
    silence_libraries()
    from srmu.runs.run import Run

    opened = Run.open(run)
    opened.export(out, link, show_progress, last_good=last_good)
    changed = list(opened.delta)
    print_result(
        {"out": str(out), "changed": changed},
        as_json,
        f"{len(changed)} tensors changed: {', '.join(changed)}",
        f"wrote {out}, with its model card and record",
        f"next: srmu verify {out}, then AutoModelForCausalLM.from_pretrained({str(out)!r})",
    )


@app.command()
def cache_command(
    action: Annotated[Literal["ls", "clear"], typer.Argument(help="List it, or empty it.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Clear testbeds and kept evaluations, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The cache folder: activations that later runs use again, testbeds, evaluations."""
    from datetime import datetime

    from srmu.engine import activation_cache as caches

    root = caches.cache_dir()
    found = caches.list_activations()
    rows = [
        {
            "activations": shorten_path(entry["folder"]).name,
            "GB": f"{entry['bytes'] / 1e9:.3f}",
            "last used": f"{datetime.fromtimestamp(entry['used']):%Y-%m-%d %H:%M}",
            "model": str(entry.get("model", "unknown")),
        }
        for entry in reversed(found)
    ]
    kinds = ("organism", "evals", "attacks", "hashes")
    others = {name: caches.folder_bytes(root / name) for name in kinds}
    total = sum(entry["bytes"] for entry in found)
    answer: dict[str, Any] = {"folder": str(root), "activations_bytes": total, "others": others}
    if action == "ls":
        if rows and not as_json:
            print_table(rows)
        held = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in others.items())
        print_result(
            answer | {"activations": rows, "limit_bytes": caches.limit_bytes()},
            as_json,
            f"{root}: activations {total / 1e9:.3f} of at most {caches.limit_bytes() / 1e9:g} GB "
            f"(SRMU_CACHE_LIMIT), {held}",
            "next: srmu cache clear",
        )
        return
    freed = caches.clear_cache(("activations", *others) if everything else ("activations",))
    print_result(answer | {"freed_bytes": freed}, as_json, f"freed {freed / 1e9:.3f} GB in {root}")


@app.command()
def methods_command(
    name: Annotated[str, typer.Argument(help="One method: its options.")] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="All of it, as the page of the documentation.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the methods: paper, level, what each needs and trains; and the options of each."""
    from srmu.methods import reference
    from srmu.runs.config import find_method

    if markdown:
        typer.echo(reference.reference_page(), nl=False)
        return
    chosen = {name: find_method(name)} if name else reference.METHODS
    if as_json:
        rows = {row.pop("method"): row for row in reference.list_methods()}
        print_result(
            {
                key: rows.get(key, {})
                | {
                    "about": reference.first_sentence(cls),
                    "learning_rate": cls.learning_rate,
                    "options": {k: value for k, (value, _) in reference.list_options(cls).items()},
                }
                for key, cls in chosen.items()
            },
            True,
        )
        return
    if not name:
        print_table(reference.list_methods())
    for key, cls in chosen.items():
        typer.echo(f"{key} ({cls.paper}): {reference.first_sentence(cls)}")
        typer.echo(f"    train.learning_rate: {cls.learning_rate:g}")
        for option, (value, text) in reference.list_options(cls).items():
            typer.echo(
                f"    {option}: {reference.format_default(value)}" + (f"  # {text}" if text else "")
            )
    typer.echo(f"next: srmu unlearn CONFIG method.name={name or 'npo'}, or srmu methods NAME")
