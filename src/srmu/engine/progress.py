"""What a person sees while something runs: one live line in a terminal, log lines elsewhere."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Tick = Callable[[str], None]
Watch = Callable[[str, int], AbstractContextManager[Tick]]

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

LOG_SECONDS = 10.0  # between two log lines where there is no terminal


@contextmanager
def ignore_progress(label: str, total: int) -> Iterator[Tick]:
    """Show nothing: the default of library functions."""
    yield lambda text: None


@contextmanager
def show_progress(label: str, total: int) -> Iterator[Tick]:
    """Show progress over `total` steps on standard error; call the yielded function once a step."""
    if stderr.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=stderr, transient=True) as bar:
            task = bar.add_task(label, total=total, text="")
            yield lambda text: bar.update(task, advance=1, text=text)
        return
    start = last = time.monotonic()
    done = 0

    def tick(text: str) -> None:
        nonlocal last, done
        done += 1
        now = time.monotonic()
        if now - last >= LOG_SECONDS or done == total:
            left = (now - start) / done * (total - done)
            print_line(f"{label} {done}/{total} {text} {left:.0f} s left".replace("  ", " "))
            last = now

    yield tick


def silence_libraries() -> None:
    """Hide other libraries' progress bars and warnings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers  # here: the command line starts without it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def print_line(text: str) -> None:
    """Print one plain line on standard error, where it cannot mix with `--json` output."""
    # Unchanged: rich would turn the line number in `a.jsonl:100: ...` into an emoji.
    stderr.print(text, markup=False, emoji=False)
