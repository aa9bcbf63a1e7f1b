"""The result of an analysis: numbers, sentences and pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader

BINS = 40  # of a histogram


class Panel(NamedTuple):
    """One picture and the table of the same numbers: a line, or bars, for each series over `x`."""

    title: str
    x_title: str
    y_title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]  # None: not measured
    kind: Literal["lines", "bars"] = "lines"


class Analysis(NamedTuple):
    """Plain numbers (JSON values), what they say in sentences, and pictures of them: no word of a text."""

    title: str
    numbers: dict[str, Any]
    sentences: list[str]
    panels: Sequence[Panel] = ()


def format_number(value: float | None) -> str:
    """A number as a person would write it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def write_sentences(template: str, **values: Any) -> list[str]:
    """The lines of a template, each a sentence on what was measured."""
    environment = Environment(loader=PackageLoader("srmu.evals"), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": "{:.1%}".format, "percent": "{:.0%}".format, "number": format_number}
    return environment.get_template(template).render(**values).splitlines()


def draw_histogram(title: str, x_title: str, values: Mapping[str, Any], low: float, high: float) -> Panel:
    """Shares of values in bins between two limits, one series for each name that has values."""
    edges = np.linspace(low, high, BINS + 1)
    known = {name: np.clip(np.asarray(each), low, high) for name, each in values.items() if len(each)}
    series = {name: (np.histogram(each, edges)[0] / len(each)).tolist() for name, each in known.items()}
    middles = ((edges[:-1] + edges[1:]) / 2).round(4).tolist()
    return Panel(title, x_title, "share of tokens", middles, series, "bars")
