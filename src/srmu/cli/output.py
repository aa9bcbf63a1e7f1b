"""How the verbs answer: JSON or lines, the next command, and lists that a person types."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from srmu.engine.files import EXPORTED
from srmu.engine.progress import print_line
from srmu.errors import SrmuError

if TYPE_CHECKING:
    from srmu.runs.run import Run

PLANNED = "next: the same without --dry-run"


def print_result(
    value: Mapping[str, Any], as_json: bool, *lines: str, table: Sequence[Mapping[str, str]] | None = None
) -> None:
    """End a verb: JSON alone on standard output, or a table and lines for a person."""
    if as_json:
        typer.echo(json.dumps(value))
        return
    if table:
        from srmu.report.format import print_table

        print_table(table)
    for line in lines:
        typer.echo(line)


@contextmanager
def explain_interrupt(text: str) -> Iterator[None]:
    """Say what is kept where a person interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        print_line(text)
        raise


def confirm_work(text: str, yes: bool) -> bool:
    """Whether to start what takes long: `yes`, or what a person answers. Where nobody can, it says how to start it."""
    if not yes and sys.stdin.isatty():
        return typer.confirm(f"{text} Run it?", err=True)
    print_line(text if yes else f"{text} It is left out; --yes starts it.")
    return yes


def next_command(*words: object) -> str:
    """The last line of a verb: the command to type next, quoted for a shell."""
    return f"next: {quote_command(*words)}"


def next_for_model(model: object, *more: object) -> str:
    """The command that makes a model unlearn; for one that was exported from a run, that verifies or asks it."""
    folder = Path(str(model))
    if (folder / EXPORTED).is_file():
        return next_command("verify", model)
    card = (folder if folder.is_dir() else folder.parent) / "README.md"
    if card.is_file() and "- unlearning\n" in card.read_text(encoding="utf-8", errors="replace")[:2000]:  # rounded
        return next_command("ask", model, "PROMPT")
    return next_command("unlearn", "--model", model, "--forget", "F", "--retain", "R", *more)


def next_for_run(run: "Run") -> str:
    """The command that measures a run; of one that was measured, that attacks it, and then that exports it."""
    folder, tasks = shorten_path(run.folder), run.config.eval
    if not (run.folder / "results.json").is_file():
        return next_command("eval", folder, *([] if tasks else ["--tasks", "TASK"]))
    if run.record["attacks"]:
        return next_command("export", folder, "OUT")
    return next_command(
        "attack", folder, *([] if run.config.testbed else ["--tasks", ",".join(tasks) or "TASK", "--val", "split"])
    )


def quote_command(*words: object, **options: object) -> str:
    """A command of srmu as a shell takes it, with those of its options that have a value."""
    given = [word for name, value in options.items() if value for word in (f"--{name}", value)]
    return shlex.join(["srmu", *map(str, [*words, *given])])


def open_in_browser(page: Path) -> str:
    return f"next: open {shlex.quote(str(shorten_path(page)))} in a browser"


def split_names(text: str) -> tuple[str, ...]:
    """The names in `a,b`."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def split_seeds(text: str) -> tuple[int, ...]:
    """The seeds in `0,1,2`."""
    names = split_names(text)
    if wrong := [name for name in names if not name.isdecimal()]:
        raise SrmuError(f"--seeds {text}: {wrong[0]!r} is not a seed; expected numbers such as 0,1,2")
    return tuple(dict.fromkeys(map(int, names)))


def parse_share(text: str) -> float:
    """`1%` or `0.01` as a number; SrmuError for what is no share above 0 and below 1."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise SrmuError(f"--budget {text}: expected a share of accuracy, such as 1% or 0.01")
    return value


def read_stamp(path: Path) -> int:
    """When a file was last written; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def shorten_path(path: Path) -> Path:
    """The path as one would type it here."""
    from srmu.engine.files import tidy_path

    here, path = Path.cwd(), tidy_path(path)
    return path.relative_to(here) if path.is_relative_to(here) else path
