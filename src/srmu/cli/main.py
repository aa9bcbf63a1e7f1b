"""The command line: it starts before torch is loaded, and says in one line what went wrong."""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, TextIO

import typer
from typer import Option

from srmu.cli import measuring, starting, studying, unlearning
from srmu.engine import distributed
from srmu.engine.files import OWN_CODE
from srmu.engine.progress import print_line, silence_logs
from srmu.errors import SrmuError, suggest_word

# What libraries read when they are loaded. Threads that wait for others must sleep: spinning, a busy machine is ten
# times slower. Warnings and progress bars of others would stand between our lines. What Apple's GPU cannot compute, the
# processor does.
for name, value in (
    ("OMP_WAIT_POLICY", "passive"),
    ("TRANSFORMERS_VERBOSITY", "error"),
    ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ("TQDM_DISABLE", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    ("PYTORCH_ENABLE_MPS_FALLBACK", "1"),
):
    os.environ.setdefault(name, value)
silence_logs()

SHARED = ("unlearn", "eval", "attack")  # verbs that several processes share

app = typer.Typer(
    name="srmu",
    rich_markup_mode="markdown",  # brackets in a help text are no markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every verb takes --debug: show the traceback of an error.",
)
for group in (starting, unlearning, measuring, studying):
    app.add_typer(group.verbs)


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"srmu {version('srmu')}")
        raise typer.Exit


@app.callback()
def describe_program(
    version: Annotated[
        bool, Option("--version", callback=print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make a language model unlearn chosen knowledge, and measure how well it did."""


def main() -> None:
    """Run the program. Exit codes: 0 done, 1 our fault, 2 the user's, 130 interrupted."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not end a run
    try:
        code = run_verb(arguments)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code = explain_failure(error, streams)
    if code == 130:  # what typer, too, makes of an interrupt
        print_line("srmu: interrupted")
    sys.exit(code)


def run_verb(arguments: Sequence[str]) -> int:
    """Run one verb in each of the processes that a launcher started; its exit code."""
    program = typer.main.get_command(app)
    assert isinstance(program, typer.core.TyperGroup)
    verb = arguments[0]
    if not verb.startswith("-") and verb not in program.commands:
        raise SrmuError(f"{verb!r} is not a verb of srmu{suggest_word(verb, program.commands)}")
    if not distributed.is_first():  # the first process speaks for all, but for its errors
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    if distributed.get_size() > 1 and verb not in SHARED:
        raise SrmuError(f"srmu {verb} runs in one process; start it alone, as the launcher is for {', '.join(SHARED)}")
    distributed.join_group()
    code = program(arguments, prog_name="srmu", standalone_mode=False)
    distributed.leave_group()
    return code or 0


def find_own_line(error: Exception) -> str:
    """The file and line of the user's own code, such as a method, in which an error arose; "" if it was elsewhere."""
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(OWN_CODE)
    ]
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


def explain_failure(error: Exception, streams: tuple[TextIO, TextIO]) -> int:
    """Say an error in one line on standard error; the exit code."""
    # what the system refuses, by its number: a full disk, a file that may not be written
    refused = isinstance(error, SrmuError) or (isinstance(error, OSError) and error.errno is not None)
    own = find_own_line(error)
    code: int = 2 if refused or own else getattr(error, "exit_code", 1)
    message = getattr(error, "format_message", lambda: str(error))()
    if own and not refused:
        message = f"{own}: {type(error).__name__}: {message} (--debug shows the way there)"
    elif code == 1:
        message = f"internal error: {type(error).__name__}: {message} (--debug shows where)"
    if (option := getattr(error, "option_name", None)) and "unlearn" in sys.argv:
        from srmu.runs.config import find_key

        value = dict(pairwise(sys.argv)).get(option, "VALUE")
        keys = [f"{key}={value}" for key in find_key(option.strip("-").replace("-", "_"))]
        message += f"; options of a config have no dashes: {''.join(keys) or 'method.kappa=8'}"
    message = " ".join(message.split()).replace(": Value error, ", ": ")
    sys.stdout, sys.stderr = streams
    if message and distributed.says_first(message):  # help that was asked for has been printed
        rank, size = distributed.get_rank(), distributed.get_size()
        print_line(f"srmu: {f'rank {rank} of {size}: ' if size > 1 else ''}{message}")
    return code
