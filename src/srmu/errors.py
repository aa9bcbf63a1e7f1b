"""The errors a user can cause: one line each, exit code 2.

SrmuError            wrong input: a file, an option, a model, a folder
└── DivergedError    the training produced a non-finite number
"""

from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path


class SrmuError(ValueError):
    """Something the user can mend: one line that says what was wrong, where, and what to type.

    The command line prints it and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names of columns or files may hold more


class DivergedError(SrmuError):
    """A loss or a gradient is no longer finite.

    Of a run from a config the folder keeps the last good weights; a model in memory is as it was before.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's message, for a one-line error of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def suggest_word(word: str, known: Iterable[object], elsewhere: Iterable[str] = (), group: str = "") -> str:
    """`; did you mean ...?`, or what there is to choose from.

    A word may be short for a name (`lr` for `learning_rate`); if for none, those `elsewhere` are meant. `group` is
    written before the names that are known.
    """
    names = [str(name) for name in known]
    own = get_close_matches(word, names, n=1, cutoff=0.6) or [name for name in names if is_short_for(word, name)]
    meant = [group + name for name in own] or [*elsewhere]
    return f"; did you mean {' or '.join(meant)}?" if meant else f"; choose one of {', '.join(names)}"


def suggest_path(path: Path) -> str:
    """`; did you mean ...?` of what lies beside a path that is missing, or beside the first folder missing of it."""
    with suppress(OSError, StopIteration):  # nothing is missing, or no name or folder can be read
        missing = next(one for one in (path, *path.parents) if one.parent.exists() and not one.exists())
        beside = {one.stem: one for one in sorted(missing.parent.iterdir()) if not one.name.startswith(".")}
        return "".join(f"; did you mean {beside[near]}?" for near in get_close_matches(missing.stem, beside, n=1))
    return ""


def is_short_for(word: str, name: str) -> bool:
    """Whether a word is a name, the last word of it, or its initials."""
    words = name.split("_")
    return word in (name, words[-1], "".join(part[:1] for part in words))
