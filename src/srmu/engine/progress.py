"""What a person sees while something runs: a live line in a terminal or a notebook, else a log."""

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn


class Tick(Protocol):
    """Called once a step, or after some of them at once, with a text on the latest."""

    def __call__(self, text: str, steps: int = 1, /) -> None: ...


Watch = Callable[[str, int], AbstractContextManager[Tick]]

# In a notebook, too, it writes plain text: rich's own output there needs ipywidgets.
stderr = Console(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)

LOG_SECONDS = 10.0  # between two log lines where nobody watches a line change
LIVE_SECONDS = 0.2  # between two changes of the line in a notebook

_shown: list[str] = []  # the labels of what is shown now


@contextmanager
def ignore_progress(label: str, total: int) -> Iterator[Tick]:
    yield lambda text, steps=1: None


@contextmanager
def show_progress(label: str, total: int) -> Iterator[Tick]:
    """Show progress over `total` steps (0: nobody knows) on standard error; call the yielded function once a step."""
    _shown.append(label)
    try:
        if in_notebook() or not stderr.is_terminal:  # a kernel sets FORCE_COLOR, which rich takes for a terminal
            yield write_lines(label, total)
            return
        numbers = BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress("{task.description}", *numbers, "{task.fields[text]}", console=stderr, transient=True) as bar:
            task = bar.add_task(label, total=total or None, text="")
            yield lambda text, steps=1: bar.update(task, advance=steps, text=text)
    finally:
        _shown.pop()


def write_lines(label: str, total: int) -> Tick:
    """A function that writes a line that changes in a notebook, and now and then a new one elsewhere."""
    live = in_notebook()
    start = last = time.monotonic()
    done = width = 0

    def tick(text: str, steps: int = 1, /) -> None:
        nonlocal last, done, width
        done += steps
        now = time.monotonic()
        if now - last < (LIVE_SECONDS if live else LOG_SECONDS) and done != total:
            return
        line = describe_steps(label, done, total, text, now - start if steps else 0)
        if live:
            end = "\n" if done == total else ""
            print("\r" + line.ljust(width), end=end, file=sys.stderr, flush=True)
        else:
            print_line(line)
        last, width = now, len(line)

    return tick


def describe_steps(label: str, done: int, total: int, text: str, seconds: float) -> str:
    """How many steps were done and which was the latest, with the time left if that can be said after `seconds`."""
    left = f" {seconds / done * (total - done):.0f} s left" if total and done and seconds else ""
    return f"{label} {done}{f'/{total}' if total else ''} {text}".rstrip() + left


def nest_progress(tick: Tick, name: str) -> Watch:
    """What shows the steps of one long step of something else, which has that name, in the text of that step."""

    @contextmanager
    def show_within(label: str, total: int) -> Iterator[Tick]:
        start, done = time.monotonic(), 0

        def tick_within(text: str, steps: int = 1, /) -> None:
            nonlocal done
            done += steps
            tick(f"{name}: {describe_steps(label, done, total, text, time.monotonic() - start)}", 0)

        yield tick_within

    return show_within


def choose_progress() -> Watch:
    """What a library function shows: progress where a person watches, unless it is part of another's work."""
    watched = stderr.is_terminal or in_notebook()
    alone = not _shown and multiprocessing.parent_process() is None
    return show_progress if watched and alone else ignore_progress


def in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def silence_libraries() -> None:
    """Hide other libraries' progress bars and warnings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silence_logs()
    import transformers  # here: the command line starts without it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def silence_logs() -> None:
    """Hide warnings of bitsandbytes, which peft imports: it misses kernels of its own."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def print_line(text: str) -> None:
    """Print one plain line on standard error, where it cannot mix with `--json` output."""
    # Unchanged: rich would turn the line number in `a.jsonl:100: ...` into an emoji.
    stderr.print(text, markup=False, emoji=False)
