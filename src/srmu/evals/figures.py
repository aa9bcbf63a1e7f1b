"""What an analysis found: numbers, sentences, and a page with pictures that opens anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Panel:
    """One picture and the table of the same numbers: a line, or bars, for each series over `x`."""

    title: str
    x_title: str
    y_title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]  # None: not measured
    kind: Literal["lines", "bars"] = "lines"


@dataclass(frozen=True)
class Analysis:
    """Plain numbers (JSON values), what they say in sentences, and pictures of them.

    None of the three holds a word of a text.
    """

    title: str
    numbers: dict[str, Any]
    sentences: list[str]
    panels: list[Panel] = field(default_factory=list)


def format_number(value: float | None) -> str:
    """A number as a person would write it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    return str(value) if isinstance(value, int) else f"{value:.4g}"
