"""The description of each method, taken from its class: for the terminal and the docs."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from srmu.methods import METHODS, Edit, Method, Misdirection

PACKAGE = Path(__file__).parents[1]
ROLES = {"*": "all tensors", "*.mlp_down": "MLP down-projections", "*.mlp": "the MLPs' matrices"}


def list_methods() -> list[dict[str, str]]:
    """A row for each method: name, paper, level, what it needs, what it trains by default."""
    return [
        {
            "method": name,
            "paper": cls.paper,
            "level": cls.level,
            "needs, besides forget texts": ", ".join(cls.uses) or "nothing",
            "trains": describe_trained(cls),
        }
        for name, cls in METHODS.items()
    ]


def describe_trained(cls: type[Method]) -> str:
    """What a method trains by default, in words."""
    if issubclass(cls, Misdirection):
        return "down-projections of 3 layers"
    return ", ".join(ROLES.get(pattern, pattern) for pattern in cls().trainable)


def first_sentence(cls: type[Method]) -> str:
    """The first sentence of a method's docstring."""
    return (cls.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()


def list_options(cls: type[Method]) -> dict[str, tuple[Any, str]]:
    """The default of each option, and the comment behind it in the source."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Method):
            lines = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE)
            comments |= {name: text.replace("type: ignore[assignment]  # ", "") for name, text in lines}
    kinds = get_type_hints(cls)
    options = {}
    for f in fields(cls):
        choices = ", ".join(map(str, get_args(kinds[f.name]))) if is_choice(kinds[f.name]) else ""
        parts = [choices and f"one of {choices}", comments.get(f.name, "")]
        options[f.name] = f.default, "; ".join(filter(None, parts))
    return options


def is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


def find_equations() -> Iterator[tuple[str, str, str]]:
    """The text of each equation in the code, the file, and the function that computes it.

    Equations are comments that begin with `eq:`.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        marks = [i for i, line in enumerate(lines) if re.match(r" *# eq: ", line)]
        if not marks:
            continue
        places = [
            (node.lineno, node.end_lineno or 0, node.name)
            for node in ast.walk(ast.parse("\n".join(lines)))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        for i in marks:
            text = lines[i].partition("# eq: ")[2]
            around = [p for p in places if p[0] <= i + 1 <= p[1]]
            # the outer two name the place
            inner = ".".join(name for _, _, name in sorted(around)[:2])
            yield text, path.relative_to(PACKAGE).as_posix(), inner


def reference_page() -> str:
    """The page of the documentation: all methods, their options, and where each equation is."""
    rows = list_methods()
    page = [
        "# Every method and option",
        "",
        "This page is what `srmu info methods --markdown` prints; a test compares the two.",
        "",
        *markdown_table([*rows[0]], [[*row.values()] for row in rows]),
        "",
    ]
    for name, cls in METHODS.items():
        page += [f"## {name}", "", f"{first_sentence(cls)} ({cls.paper})", ""]
        if not issubclass(cls, Edit):
            page += [f"`train.learning_rate`, where it is not given: {cls.learning_rate:g}.", ""]
        if cls.endless:
            page += [
                "Its loss has no lower bound: unless `train.forget_ceiling` is given, it stops "
                "where a forget token costs as many nats as a guess among all tokens.",
                "",
            ]
        lines = [[f"`{k}`", f"`{format_default(v)}`", text] for k, (v, text) in list_options(cls).items()]
        page += [*markdown_table(["option", "default", ""], lines), ""] if lines else []
    page += ["## Where each equation is", ""]
    equations = [[f"`{text}`", f"`{file}`", f"`{name}`"] for text, file, name in find_equations()]
    page += [*markdown_table(["equation", "file", "place"], equations), ""]
    return "\n".join(page)


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]


def format_default(value: Any) -> str:
    """A default as a config file spells it."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
