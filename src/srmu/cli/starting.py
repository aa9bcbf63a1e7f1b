"""The verbs to begin with: the demo, and what srmu knows of itself and of this machine."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from srmu.cli import options, output
from srmu.engine.progress import print_line, show_progress

KINDS = {
    "testbeds": "testbeds",
    "evals": "evals",
    "attacks": "attacks",
    "suites": "suites",
    "hashes": "hashes",
    "models from GGUF": "gguf",
    "merged adapters": "adapters",
    "dequantised models": "dequantised",
    "what models know": "atlas",
    "answers of the demo": "asked",
}

verbs = typer.Typer()
topics = typer.Typer(no_args_is_help=True)
verbs.add_typer(
    topics,
    name="info",
    rich_help_panel="Start",
    help="List the methods and their options, the attacks, the cache, and what is installed here.",
)


@verbs.command("demo", rich_help_panel="Start")
def play_demo_command(
    out: Annotated[Path, Option(help="Folder for the testbed, the runs and the report.")] = Path("demo"),
    seeds: Annotated[str, Option(help="Seeds of the runs; default: 0,1,2, and 0 for the real model.")] = "",
    world: Annotated[
        str, Option(help="atlas: a real model; closed: an invented world; default: the real one if it is installed.")
    ] = "",
    as_json: options.Json = False,
) -> None:
    """See it all on a small real model, offline: four methods, a table, a map, an attack and a report."""
    from srmu.reproduce import demo

    named = output.split_seeds(seeds)
    chosen, why = (world, "") if world else demo.choose_world()
    if why:
        print_line(why)
    real = chosen == "atlas"
    numbers = named or ((0,) if real else (0, 1, 2))
    entries, report = demo.play_demo(out, numbers, show_progress, chosen)
    rows = demo.terminal_table(entries)
    if real:
        show_real_demo(out, report, numbers, rows, as_json)
        return
    compared = demo.compare_published(rows, out, numbers)
    output.print_result(
        {"report": str(report), "seeds": numbers, "rows": rows, "compared": compared},
        as_json,
        f"Accuracy in %, mean over {len(numbers)} runs, with a 95 % interval; guessing scores 25.",
        "hazard: the facts to forget; hazard_held: those that no forget text states; neighbour:",
        "harmless facts on the same things; general: the rest. Entangled: whether the retain texts",
        "are general (low) or neighbour texts (high). No attack was run: this shows what is",
        "suppressed, not what is gone.",
        compared,
        f"wrote {report}",
        output.open_in_browser(report),
        f"      {output.quote_command('unlearn', out / 'testbed/high.yaml', 'method.kappa=16')}",
        table=rows,
    )


def show_real_demo(out: Path, report: Path, seeds: tuple[int, ...], rows: list[dict[str, Any]], as_json: bool) -> None:
    """What the demo on a real model ends with."""
    output.print_result(
        {"report": str(report), "seeds": seeds, "rows": rows},
        as_json,
        "Accuracy in %, with a 95 % interval; guessing scores 25. hazard: facts on one part of the",
        "world, to be forgotten; hazard_held: those that no forget text states; neighbour: facts on",
        "the rest of the world and other facts on the same countries; general: other things.",
        "Entangled: whether the retain texts are the model's own (low) or on other places (high).",
        "One attack was run, a short relearning of SRMU's model: the page shows what comes back.",
        f"wrote {report}",
        output.open_in_browser(report),
        f"      {output.quote_command('unlearn', out / 'atlas/high.yaml', 'method.kappa=16')}",
        table=rows,
    )


ADVICE = (
    "Which? srmu or rmu: quick, in little memory, for hazardous knowledge in a large model.",
    "npo or simnpo: answers like those of a model that never saw the texts (TOFU); trains all weights.",
    "refusal: answers that it does not know; trains all weights.",
    "rename_scrub: meant to outlast fine-tuning, at many times the cost; experimental.",
)


@topics.command("methods")
def list_methods_command(
    name: Annotated[str, Argument(help="A method, to see its options.")] = "",
    markdown: Annotated[
        bool, Option("--markdown", help="Print all methods as the reference page of the docs.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """The methods: paper, level, what each needs and trains, and its options."""
    from srmu.methods import reference
    from srmu.runs.config import find_method

    if markdown:
        typer.echo(reference.reference_page(), nl=False)
        return
    chosen = {name: find_method(name)} if name else reference.METHODS
    table = reference.list_methods()
    answer: dict[str, dict[str, Any]] = {row["method"]: {**row} for row in table if row["method"] in chosen}
    lines = []
    for key, cls in chosen.items():
        known, about = reference.list_options(cls), reference.first_sentence(cls)
        defaults = {option: value for option, (value, _) in known.items()}
        answer.setdefault(key, {}).update(about=about, learning_rate=cls.learning_rate, options=defaults)
        if not name:
            continue  # the table is enough
        lines += [f"{key} ({cls.paper}): {about}", f"    train.learning_rate: {reference.describe_rate(cls)}"]
        for option, (value, text) in known.items():
            lines.append(f"    {option}: {reference.format_default(value)}" + (f"  # {text}" if text else ""))
    example = name or "srmu"
    lines += [] if name else [*ADVICE, "srmu info methods NAME shows the options and defaults of one."]
    lines.append(output.next_command("inspect", "MODEL", "--method", example))
    lines.append(f"      {output.quote_command('unlearn', 'CONFIG', f'method.name={example}')}")
    output.print_result(answer, as_json, *lines, table=None if name else table)


@topics.command("attacks")
def list_attacks_command(as_json: options.Json = False) -> None:
    """The attacks: name, number, the tier from which each runs, and what it does."""
    from srmu.attacks import ATTACKS
    from srmu.methods.reference import first_sentence

    table = [{"attack": n, "number": a.id, "tier": a.tier, "what": first_sentence(a)} for n, a in ATTACKS.items()]
    following = output.next_command("attack", "RUN", "--attacks", "relearning_steps,quantisation")
    output.print_result({"attacks": table}, as_json, "docs/attacks.md says more of each.", following, table=table)


@topics.command("cache")
def show_cache(
    action: Annotated[Literal["ls", "clear"], Argument(help="ls lists it, clear empties it.")] = "ls",
    everything: Annotated[bool, Option("--all", help="Also clear testbeds and evaluations.")] = False,
    as_json: options.Json = False,
) -> None:
    """The cache folder: activations that later runs use again, testbeds, evaluations."""
    from datetime import datetime

    from srmu.engine import activation_cache as caches

    root = caches.cache_dir()
    entries = caches.list_activations()
    others = {name: caches.folder_bytes(root / folder) for name, folder in KINDS.items()}
    total = sum(entry["bytes"] for entry in entries)
    answer: dict[str, Any] = {"folder": str(root), "activations_bytes": total, "others": others}
    if action == "clear":
        freed = caches.clear_cache(("activations", *(KINDS.values() if everything else ())))
        lines = [f"freed {freed / 1e9:.3f} GB in {root}", output.next_command("info", "cache")]
        output.print_result(answer | {"freed_bytes": freed}, as_json, *lines)
        return
    rows = [
        {
            "activations": output.shorten_path(entry["folder"]).name,
            "GB": f"{entry['bytes'] / 1e9:.3f}",
            "last used": f"{datetime.fromtimestamp(entry['used']):%Y-%m-%d %H:%M}",
            "model": str(entry.get("model", "unknown")),
        }
        for entry in reversed(entries)
    ]
    held = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in others.items())
    output.print_result(
        answer | {"activations": rows, "limit_bytes": caches.limit_bytes()},
        as_json,
        f"{root}: activations {total / 1e9:.3f} of at most {caches.limit_bytes() / 1e9:g} GB "
        f"(SRMU_CACHE_LIMIT), {held}",
        output.next_command("info", "cache", "clear"),
        table=rows,
    )


@topics.command("environment")
def show_environment(as_json: options.Json = False) -> None:
    """Versions, processor, GPU and free memory: what the bits of a result may depend on."""
    from srmu.engine.devices import find_device, free_bytes
    from srmu.runs.record import describe_environment, describe_tool

    device = find_device("auto")
    tool = describe_tool()
    facts = {"srmu": tool, **describe_environment(), "device": device, "free_bytes": free_bytes(device)}
    lines = [f"srmu {tool['version']}" + (f" ({tool['commit'][:8]})" if tool["commit"] else "")]
    lines += [f"{name}: {value}" for name, value in facts.items() if name not in ("srmu", "packages", "free_bytes")]
    lines.append(f"free memory of {device}: {facts['free_bytes'] / 1e9:.1f} GB")
    lines += [f"{name} {number}" for name, number in facts["packages"].items()]
    output.print_result(facts, as_json, *lines, output.next_command("demo"))
