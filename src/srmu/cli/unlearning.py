"""The verbs that change a model: one run, the best of many, and its full checkpoint."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from srmu.cli import options, output
from srmu.engine.progress import print_line, show_progress
from srmu.errors import SrmuError

if TYPE_CHECKING:
    from srmu.runs.config import Config
    from srmu.runs.run import Run
    from srmu.search.auto import AutoRequest

verbs = typer.Typer()
GROUP = "Unlearn"
KEPT = "finished runs are kept: the same command goes on"


@verbs.command("unlearn", rich_help_panel=GROUP)
def unlearn_command(
    args: Annotated[list[str] | None, Argument(metavar="CONFIG key=value", help="A YAML file, then overrides.")] = None,
    model: Annotated[str, Option(help="Folder or hub id; with --forget.")] = "",
    forget: options.Forget = None,
    retain: options.Retain = None,
    method: Annotated[str, Option(help="One of those that srmu info methods lists; default: srmu.")] = "",
    out: Annotated[Path | None, Option(help="Also export the full model to this folder.")] = None,
    dry_run: options.DryRun = False,
    shard: Annotated[bool, Option("--shard", help="Split the weights over processes (FSDP2).")] = False,
    offload: Annotated[bool, Option("--offload", help="Leave lower layers on disk.")] = False,
    as_json: options.Json = False,
) -> None:
    """Make a model unlearn texts: one run, from a config file or from --model, --forget and --retain."""
    from srmu.runs import run as runs
    from srmu.runs.plan import FETCH

    config = choose_config(args or [], model, forget or [], retain or [], method)
    if dry_run:
        from srmu.runs.estimate import plan_dry_run

        config, estimate, lines = plan_dry_run(config)
        fetched = f"next: {FETCH}, then the same with model=OWNER/NAME and without --dry-run"
        following = fetched if "dimensions" in estimate else output.PLANNED
        whole = "every option, as it would run: the same with --json"
        output.print_result(estimate, as_json, *lines, whole, following)
        return
    sharded = shard or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    plan = runs.plan_run(config, shard=sharded, offload=offload)
    again = (plan.folder / "record.json").exists()
    run = runs.run_plan(plan, out, watch=show_progress)
    record, folder = run.record, output.shorten_path(run.folder)
    done = f"{record['steps']} steps in {record['seconds']:.1f} s; wrote {folder}"
    given = [key for key in ("eval", "tasks_dir", "purpose") if key in config.model_dump(exclude_defaults=True)]
    taken = f"; it takes over {', '.join(given)}" if given else ""
    lines = [*runs.run_notes(run), f"this run was there already: {folder}{taken}" if again else done]
    if record["stop_reason"] not in ("max_steps", "edited"):
        lines.append(f"stopped early: {record['stop_reason']}")
    if out:
        lines.append(f"wrote {out}")
    if not again and record["activations"]["kept"] == "disk":
        lines.append("activations are kept for later runs; see srmu info cache")
    if record["effect"].get("broken"):
        lines.append("next: the same with the setting that the sentence above names")
    else:
        lines += [output.next_for_run(run), f"      {output.quote_command('ask', folder, 'PROMPT')}"]
        if not out and not record["attacks"]:  # else it is the next step already
            lines.append(f"      {output.quote_command('export', folder, 'OUT')}")
    output.print_result({"run": str(run.folder), "out": out and str(out), "record": record}, as_json, *lines)


def choose_config(args: list[str], model: str, forget: list[str], retain: list[str], method: str) -> "Config":
    """The config from a file or from options; SrmuError for neither and for both."""
    from srmu.runs.config import load_config, make_config

    file = args[0] if args and ("=" not in args[0] or Path(args[0]).is_file()) else ""
    if file and Path(file).is_dir():
        configs = sorted(Path(file).glob("*.yaml"))
        such = f", such as {configs[0]}" if configs else ""
        raise SrmuError(
            f"{file} is a folder: name a config file{such}, or a model with --model {file} --forget F --retain R"
        )
    if file and (forget or retain) and Path(file).suffix not in (".yaml", ".yml"):
        if args[1:2] == ["="]:
            raise SrmuError(
                f"{file} =: expected key=value without spaces, for example {file}={args[2] if args[2:] else 8}"
            )
        raise SrmuError(
            f"{file}: expected key=value; where a shell spread a glob behind --forget or --retain, "
            "quote it: --forget 'texts/*.jsonl'"
        )
    if file and (model or forget or retain or method):
        raise SrmuError(
            "a config file names model, texts and method; override them with key=value, "
            f"for example: {output.quote_command('unlearn', file, 'method.name=rmu')}"
        )
    if file:
        return load_config(Path(file), args[1:])
    if model and forget:
        return make_config(model, forget, retain, method or "srmu", args)
    raise SrmuError("name a config file, or --model M --forget F [--retain R]")


@verbs.command("auto", rich_help_panel=GROUP)
def auto_command(
    context: typer.Context,
    model: Annotated[str, Argument(help="Folder or hub id.")],
    forget: Annotated[list[str], options.FORGET],
    retain: Annotated[list[str], options.RETAIN],
    budget: options.Budget = "1%",
    tasks: Annotated[str, Option(help="Tasks on what is to be forgotten: a,b.")] = "",
    utility: options.Utility = "",
    tasks_dir: options.TasksDir = None,
    method: Annotated[str, Option(help="srmu, rmu, adaptive_rmu or rna.")] = "srmu",
    robust: Annotated[bool, Option("--robust", help="Use rename_scrub, which resists relearning.")] = False,
    names: Annotated[str, Option(help="robust: file with the names to swap, one a line.")] = "",
    goals: Annotated[str, Option(help="robust: file with phrases; all about them is to be forgotten.")] = "",
    trials: Annotated[int, Option(min=1, metavar="N", help="How many strengths to try; robust: up to 3.")] = 12,
    out: Annotated[Path, Option(help="Folder for everything that is written.")] = Path("auto"),
    seed: int = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Find a layer and a strength within a budget of lost accuracy; then unlearn, attack, report, export."""
    from dataclasses import fields

    from srmu.search import auto as search

    parsed: dict[str, Any] = {"budget": output.parse_share(budget), "tasks_dir": tasks_dir, "out": out.resolve()}
    parsed |= {"tasks": output.split_names(tasks), "utility": output.split_names(utility)}
    given = context.params | parsed  # an option is a field of the request
    request = search.AutoRequest(**{field.name: given[field.name] for field in fields(search.AutoRequest)})
    choose_strength(request, dry_run, as_json)


def choose_strength(request: "AutoRequest", dry_run: bool, as_json: bool) -> None:
    """Carry out a request of `srmu auto`, or show what it would do."""
    from srmu.search import auto as search

    def tell(step: str, sentence: str) -> None:
        say(f"{step}: {sentence}")

    say = print_line if as_json else typer.echo
    out = output.shorten_path(request.out)
    job = search.prepare_job(request)
    if answer := search.find_answer(job):
        for choice in answer["choices"]:
            tell(**choice)
        done = f"this was there already: {out}"
    else:
        plan = search.plan_search(job)
        lines = search.explain_search(plan)
        if dry_run:
            output.print_result(plan, as_json, *lines, output.PLANNED)
            return
        say("\n".join(lines))
        with output.explain_interrupt(KEPT):
            answer = search.run_search(job, tell, show_progress)
        done = f"wrote {out}"
    again = output.quote_command("attack", out / answer["run"], "--tier", "standard")
    output.print_result(answer, as_json, done, output.open_in_browser(out / search.PAGE), f"      {again}")


@verbs.command("sweep", rich_help_panel=GROUP)
def sweep_command(
    args: Annotated[
        list[str] | None, Argument(metavar="CONFIG key=value", help="A sweep file, then overrides.")
    ] = None,
    storage: Annotated[str, Option(help="A database for several machines: postgresql://...")] = "",
    as_json: options.Json = False,
) -> None:
    """Try many settings of a config, on one machine or several; a stopped sweep goes on."""
    from srmu.search import sweep as search

    if not args:
        raise SrmuError(
            "name a sweep file, which says what to try in which config; configs/sweep-grid.yaml is one: "
            "srmu sweep configs/sweep-grid.yaml"
        )
    sweep = search.read_sweep(Path(args[0]), args[1:])
    with output.explain_interrupt(KEPT):
        report = search.run_sweep(sweep, storage, show_progress)
    out = output.shorten_path(sweep.out)
    lines = [*search.describe_sweep(report), f"wrote {out / search.FILE}", output.next_command("report", out)]
    if best := next(iter(search.best_trials(report)), None):
        overrides = sweep.list_overrides(best["params"])
        lines.append(f"      {output.quote_command('unlearn', output.shorten_path(sweep.config), *overrides)}")
    output.print_result(report, as_json, *lines, table=search.sweep_rows(report))


@verbs.command("export", rich_help_panel=GROUP)
def export_command(
    run: Annotated[Path, Argument(help="A run's folder.")],
    out: Annotated[Path, Argument(help="Folder to write.")],
    link: Annotated[bool | None, Option("--link/--copy", help="Share files that do not change, or copy them.")] = None,
    last_good: Annotated[bool, Option("--last-good", help="For a run that diverged: its last good weights.")] = False,
    adapter: Annotated[bool, Option("--adapter", help="Write only the change, as a LoRA adapter for peft.")] = False,
    error: Annotated[
        float | None, Option(help="adapter: the share of the change that may be lost; default: 0.05.")
    ] = None,
    quantise: Annotated[str | None, Option(help="Round the weights: q4_0, q4_k, q8_0 (GGUF), nf4 or fp8.")] = None,
    push: Annotated[str, Option(metavar="OWNER/NAME", help="Then upload it to the hub, private, with its card.")] = "",
    dry_run: Annotated[bool, Option("--dry-run", help="--push: list what would be uploaded; do nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a run's model: whole, rounded to be served, or as an adapter; --push uploads it."""
    from srmu.runs import hub
    from srmu.runs.run import Run

    opened = Run.open(run)
    if (adapter or quantise is not None) and (link is not None or (adapter and quantise is not None)):
        option, other = ("--adapter", "--quantise") if adapter else ("--quantise", "--adapter")
        raise SrmuError(f"{option} goes without --link, --copy and {other}")
    if error is not None and not adapter:
        raise SrmuError("--error goes with --adapter")
    for place in (opened.folder, opened.base):
        if out.resolve().is_relative_to(place.resolve()):
            raise SrmuError(f"{out} lies in {place}, which must stay as it is; name a folder elsewhere")
    if dry_run:
        if not push or adapter or quantise is not None:
            raise SrmuError("--dry-run goes with --push OWNER/NAME, without --adapter and --quantise")
        print_push(hub.plan_push(opened, push, last_good), as_json)
        return
    if push:
        hub.require_hub(push)
    if quantise is not None:
        print_quantised(opened, out, quantise, last_good, as_json)
    elif adapter:
        print_adapter(opened, out, 0.05 if error is None else error, last_good, as_json)
    else:
        print_export(opened, out, link, last_good, as_json)
    if push:
        print_line(f"uploaded to {hub.push_folder(out, push)}, private if it was made just now")


def print_push(plan: dict[str, Any], as_json: bool) -> None:
    """What an upload to the hub would hold."""
    from srmu.engine.files import format_gb

    lines = [f"{size / 1e6:12,.1f} MB  {name}" for name, size in plan["files"].items()]
    where = f"would be uploaded to {plan['repository']} on the hub, private unless it is there already"
    lines.append(f"{format_gb(plan['bytes'])} {where}; README.md is the model card")
    output.print_result(plan, as_json, *lines, "next: the same without --dry-run")


def print_export(run: "Run", out: Path, link: bool | None, last_good: bool, as_json: bool) -> None:
    """Write a run's full model, and say what changed."""
    from srmu.engine.text_part import find_loader

    run.export(out, link, show_progress, last_good=last_good)
    changed = list(run.delta)
    lines = [f"{len(changed)} tensors changed: {', '.join(changed)}", f"wrote {out}, with its model card and record"]
    loader = find_loader(out).__name__
    lines.append(f"{output.next_command('verify', out)}, then {loader}.from_pretrained({str(out)!r})")
    output.print_result({"out": str(out), "changed": changed}, as_json, *lines)


def print_quantised(run: "Run", out: Path, kind: str, last_good: bool, as_json: bool) -> None:
    """Write a run's model with rounded weights, and say what rounding does to it."""
    from srmu.runs.quantise import export_quantised

    place, costs = export_quantised(run, out, kind, show_progress, last_good=last_good)
    rows = [{"texts": role, **{when: f"{cost:.2f}" for when, cost in each.items()}} for role, each in costs.items()]
    lines = [
        *["mean loss of a token (nats): before the run, after it, and after rounding"] * bool(costs),
        f"wrote {place}, with its model card; srmu eval evaluates it as it ships",
        output.next_command("eval", place, "--tasks", "TASK"),
    ]
    output.print_result({"out": str(place), "quantised": kind, "costs": costs}, as_json, *lines, table=rows)


def print_adapter(run: "Run", out: Path, error: float, last_good: bool, as_json: bool) -> None:
    """Write a run's change as an adapter, and say how near it comes."""
    from srmu.engine.text_part import find_loader
    from srmu.runs.adapter import export_adapter

    found = export_adapter(run, out, error, last_good=last_good)
    rows = [
        {"module": name, "rank": str(part["rank"]), "left out": f"{part['error']:.1%} of the change"}
        for name, part in found["modules"].items()
    ]
    lines = [
        f"{found['numbers']:,} numbers, which leave out {found['logits']:.1%} of what the run does to logits",
        f"wrote {out}, which goes with the model {run.config.model}",
        f"next: base = {find_loader(run.base).__name__}.from_pretrained({str(run.base)!r})",
        f"      PeftModel.from_pretrained(base, {str(out)!r}), or a server that takes adapters",
    ]
    output.print_result({"out": str(out), **found}, as_json, *lines, table=rows)
