"""The description of each method, taken from its class: for the terminal and the docs."""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from srmu.methods import METHODS, Edit, Method, Misdirection, WeightWalk
from srmu.methods.base import Needs, list_marks

PACKAGE = Path(__file__).parents[1]
LINE = r"^( *)(?:(?:def|class) (\w+)[(:]|# eq: (.*)|[^ \n)])"
ROLES = {"*": "all tensors", "*.mlp_down": "MLP down-projections", "*.mlp": "the MLPs' matrices"}


def list_methods() -> list[dict[str, str]]:
    """A row for each method: name, paper, level, what it needs, what it trains by default."""
    rows = []
    for name, cls in METHODS.items():
        steers = issubclass(cls, Misdirection)
        trains = ["down-projections of 3 layers"] if steers else [ROLES.get(p, p) for p in cls().trainable]
        needs = {"needs, besides forget texts": ", ".join(cls.uses) or "nothing", "trains": ", ".join(trains)}
        rows.append({"method": name, "paper": cls.paper, "level": cls.level, **needs})
    return rows


def first_sentence(cls: type) -> str:
    """The first paragraph of a docstring, of a method or of an attack."""
    return (cls.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()


def describe_rate(cls: type[Method]) -> str:
    """The default of `train.learning_rate`."""
    if issubclass(cls, Edit):
        return "none: it takes no steps"
    how = " of the norm of the weights" if issubclass(cls, WeightWalk) else ""
    return f"{cls.learning_rate:.3g}{' for a 7B model, higher in narrower ones' if cls.scales else how}"


def list_options(cls: type[Method]) -> dict[str, tuple[Any, str]]:
    """The default of each option, and what it may be: the comment behind it in the source, and what it needs."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Method):
            comments |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE)
    needs = {option: f"only with {mark.condition}" for option, mark in list_marks(cls) if isinstance(mark, Needs)}
    options, kinds = {}, get_type_hints(cls)
    for f in fields(cls):
        chosen = get_origin(kinds[f.name]) is Literal
        choices = [f"one of {', '.join(map(str, get_args(kinds[f.name])))}"] if chosen else []
        options[f.name] = f.default, "; ".join([*choices, *filter(None, (comments.get(f.name), needs.get(f.name)))])
    return options


def find_equations() -> Iterator[tuple[str, str, str]]:
    """The text of each comment that begins with `eq:`, the file, and the class or function that computes it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        around: dict[str, str] = {}  # the names of what encloses a line, by their indentation
        for indent, name, equation in re.findall(LINE, path.read_text(encoding="utf-8"), re.MULTILINE):
            around = {outer: place for outer, place in around.items() if len(outer) < len(indent)}
            if name:
                around[indent] = name
            elif equation:
                yield equation, path.relative_to(PACKAGE).as_posix(), ".".join([*around.values()][:2])


def reference_page() -> str:
    """The page of the documentation: all methods, their options, and where each equation is."""
    from jinja2 import Environment, PackageLoader

    def tabulate_options(cls: type[Method]) -> list[dict[str, str]]:
        options = list_options(cls).items()
        return [{"option": f"`{k}`", "default": f"`{format_default(v)}`", "": text} for k, (v, text) in options]

    equations = [{"equation": f"`{t}`", "file": f"`{f}`", "place": f"`{p}`"} for t, f, p in find_equations()]
    environment = Environment(
        loader=PackageLoader("srmu.methods"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"table": markdown_table, "sentence": first_sentence, "options": tabulate_options}
    environment.filters["rate"] = describe_rate
    return environment.get_template("reference.md").render(rows=list_methods(), methods=METHODS, equations=equations)


def markdown_table(rows: list[dict[str, str]]) -> str:
    """A Markdown table of rows of the same keys."""
    cells = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells)


def format_default(value: Any) -> str:
    """A default as a config file spells it."""
    return value if isinstance(value, str) else json.dumps(value)
