"""The errors a user can cause: one line each, exit code 2.

SrmuError            wrong input: a file, an option, a model, a folder
└── DivergedError    the training produced a non-finite number
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SrmuError(ValueError):
    """Something the user can mend: says in a line what was wrong, where, and what to type."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names of columns or files may hold more


class DivergedError(SrmuError):
    """A loss or gradient became non-finite; the model holds the last good weights."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, for a one-line error of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def suggest_word(word: str, known: Iterable[object]) -> str:
    """`; did you mean ...?`, or what there is to choose from."""
    names = [str(name) for name in known]
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; choose one of {', '.join(names)}"
