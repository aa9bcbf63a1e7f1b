"""Numbers, names and tables as text, and the templates of pages."""

from collections.abc import Mapping, Sequence
from functools import cache
from math import isnan, nan
from typing import Any

from srmu.evals.figures import format_number
from srmu.evals.statistics import Estimate

NOT_RUN = "not run"  # in place of the numbers of an experiment
Value = Estimate | str | float | None  # None: not measured


def name_words(name: str) -> str:
    """A name of the code as words: `testbed_hazard/acc` is the hazard."""
    return name.removeprefix("testbed_").removesuffix("/acc").replace("_", " ").replace("/", " ").strip()


def count_words(count: int, noun: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def describe_copies(count: int) -> list[str]:
    """A sentence on runs that are left out because they repeat others; none where there are none."""
    same = "settings, seed, model and texts are the same"
    return [f"{count_words(count, 'run')} left out as a copy of another: {same}."] if count else []


def read_estimate(entry: Mapping[str, float]) -> Estimate:
    """A number of a JSON file, with its interval where it has one."""
    return Estimate(entry["value"], entry.get("low", nan), entry.get("high", nan))


def plain_row(row: Mapping[str, Value]) -> dict[str, Any]:
    """A row for JSON: of an estimate its value, and its interval where it has one."""
    parts = {head: vars(value) for head, value in row.items() if isinstance(value, Estimate)}
    return {**row} | {
        head: {key: number for key, number in of_it.items() if key != "n" and not isnan(number)}
        for head, of_it in parts.items()
    }


def format_value(value: Value, form: str | None = None) -> str:
    """A value as tables and figures show it; `form`: the tick format of the axis that it is on.

    A number with an interval is a share, in per cent, but on an axis that is not.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Estimate):
        if form is None or "%" in form or not value.has_interval:
            return str(value)
        return f"{value.value:.3g} ({value.low:.3g}\N{EN DASH}{value.high:.3g})"
    if form and "%" in form and value is not None:
        return f"{100 * value:.1f}"
    return format_number(value)


def format_share(share: Estimate) -> str:
    """A share such as K*, below 1, with its interval."""
    return f"{share.value:.2f} ({share.low:.2f}\N{EN DASH}{share.high:.2f})"


def format_comparison(row: Mapping[str, Any]) -> dict[str, str]:
    """A method's line in a table of methods at the same loss of utility, of a `ComparisonRow` as a dict."""

    def cell(name: str) -> str:
        return str(read_estimate(row[name])) if row[name] else ""

    lost = row["utility_loss"]  # without a width where methods are read at that very loss
    return {
        "method": row["method"],
        "runs": f"{row['points']} x {row['seeds']}",
        "utility lost": cell("utility_loss") if lost["low"] < lost["high"] else format_value(lost["value"], "%"),
        "forget accuracy": cell("forget_accuracy"),
        "accuracy less the first's": cell("forget_difference"),
        "K*": cell("residual"),
        "K* less the first's": cell("residual_difference"),
        "half is back after": write_range(row.get("half_back", ())),
        "verdict": ", ".join(filter(None, [row["verdict"], row["note"]])),
    }


def write_range(steps: Sequence[float | None]) -> str:
    """Numbers of steps as the range that they span; None is never."""
    known = sorted(step for step in steps if step is not None)
    span = "\N{EN DASH}".join(dict.fromkeys(f"{step:.0f}" for step in (*known[:1], *known[-1:])))
    missed = len(known) < len(steps)
    return ", ".join(
        [f"{span} steps"] * bool(known) + [f"not in {len(steps) - len(known)} of {len(steps)} runs"] * missed
    )


def drop_empty(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the columns in which none says anything."""
    return [{key: row[key] for key in row if any(one[key] not in ("", None) for one in rows)} for row in rows]


def escape_controls(text: str) -> str:
    """A text that cannot steer a terminal: what is not printed stands there as Python writes it."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Rows with the same keys, as a table on standard output."""
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    # a word that is wider than its column goes on in the next line: nothing is cut
    table = Table(*(Column(head, overflow="fold") for head in rows[0]), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row.values()))  # as it is: no markup, no emoji
    print_wide(table)


def print_markdown(text: str) -> None:
    from rich.markdown import Markdown

    print_wide(Markdown(text, hyperlinks=False))


def print_wide(content: Any) -> None:
    """Print what rich draws; 160 columns wide where the output is no terminal, as rich would cut tables at 80."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(content)


@cache
def load_templates() -> Any:
    """The templates of this room: everything is escaped, figures become JSON."""
    import jinja2
    from plotly.utils import PlotlyJSONEncoder

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("srmu.report"),
        autoescape=jinja2.select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # plotly's encoder writes null for what is no number
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "cls": PlotlyJSONEncoder}
    return environment


def write_words(name: str, **facts: Any) -> list[str]:
    """The paragraphs of a piece of prose in `words.txt`, with these facts filled in."""
    piece = getattr(load_templates().get_template("words.txt").module, name)
    return [" ".join(paragraph.split()) for paragraph in piece(**facts).split("\n\n") if paragraph.strip()]
