"""Studies as people read them: Markdown with pictures for the docs, and tables in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

from srmu.engine.files import write_json, write_whole
from srmu.methods.reference import markdown_table
from srmu.report.figures import COLOURS, Figure, Series, draw_figure, make_look, paint_svg
from srmu.report.format import count_words, format_percent, print_table
from srmu.report.studies import draw_reproduction, read_estimate

Study = Mapping[str, Any]  # what `reproduce_paper` or `tables_of` gives
Rows = list[dict[str, str]]
RESIDUAL = "{value:.2f} ({low:.2f}\N{EN DASH}{high:.2f})"  # a K* with its interval
GAP = "{value:+.1f} ({low:+.1f} to {high:+.1f})"  # a difference in points


class Part(NamedTuple):
    """A part of a study: a title, a picture and its file's name, and tables with words around."""

    title: str
    tables: Sequence[tuple[str, Rows, str]]
    figure: Figure | None = None
    name: str = ""


def write_study(study: Study, out: Path) -> list[Path]:
    """Write a study as JSON and as Markdown, and a picture for each figure."""
    out.mkdir(parents=True, exist_ok=True)
    name = "reproduce" if study["kind"] == "reproduction" else study["kind"]
    paths = [out / f"{name}.json", out / f"{name}.md"]
    write_json(paths[0], study)
    words, parts = describe_study(study)
    # neither a date nor a path: what is written twice is the same
    lines = ["```bash", study["command"], "```", "", words, ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        if part.figure:
            paths.append(out / f"{part.name}.svg")
            write_whole(paths[-1], paint_svg(part.figure))
            lines += [f"![{part.figure.words}]({part.name}.svg)", ""]
        for before, rows, after in part.tables:
            table = markdown_table([*rows[0]], [[*row.values()] for row in rows])
            lines += [f"{before}\n"] if before else []
            lines += [*table, "", *([f"{after}\n"] if after else [])]
    write_whole(paths[1], "\n".join(lines))
    return paths


def print_study(study: Study) -> None:
    """Print the tables."""
    words, parts = describe_study(study)
    print(words)
    for part in parts:
        for before, rows, after in part.tables:
            print("\n" + ". ".join(filter(None, [part.title, before])))
            print_table(rows)
            print(after, end="\n" * bool(after))


def describe_study(study: Study) -> tuple[str, list[Part]]:
    """What the numbers of a study are, and its parts."""
    if study["kind"] == "reproduction":
        return describe_reproduction(study)
    return describe_frontier(study)


def keep_full(tables: Sequence[tuple[str, Rows, str]]) -> list[tuple[str, Rows, str]]:
    """The tables that have rows."""
    return [table for table in tables if table[1]]


# ---- a reproduction of the paper


def describe_reproduction(study: Study) -> tuple[str, list[Part]]:
    """The paper's tables and figures repeated, each with the paper's claims."""
    kind = "testbed" if study["model"] == "testbed" else "run"
    words = (
        f"Accuracy in %, mean over {count_words(len(study['seeds']), kind)} with a 95 % interval; "
        "guessing scores 25. Kappa: norm of the target over mean norm of forget activations. "
        "Differences are in points, with a paired 95 % interval; z: the paper's own difference "
        "over its sampling error."
    )
    parts = []
    for table in study["tables"]:
        claims = ("What the paper claims:", claim_rows(table["claims"]), "")
        parts.append(Part(table["title"], keep_full([("", table_rows(table), table["note"]), claims])))
    for one in study["figures"]:
        claims = ("What the paper claims:", claim_rows(one["claims"]), "")
        points = "Points of accuracy forgotten, accuracy kept, and kappa in brackets:"
        labels = [series["label"] for series in one["series"]]
        parts.append(
            Part(
                f"{one['title']} ({one['y_title']})",
                keep_full([(points, point_rows(one), ""), claims]),
                draw_reproduction(one, labels, one["title"]),
                one["name"],
            )
        )
    return words, parts


def table_rows(table: Study) -> Rows:
    """A table's rows as strings: accuracies in % with intervals, and the paper's."""
    rows = []
    for row in table["rows"]:
        cells = {name: format_percent(row["cells"][name])
                 for name in table["columns"] if row["cells"]}  # fmt: skip
        paper = {
            f"paper {name}": f"{100 * row['paper'][name]:.1f}" if name in row["paper"] else ""
            for name in table["paper_columns"]
        }
        kappa = "" if row["kappa"] is None else f"{row['kappa']:.3g}"
        cells = cells or fill_blank(table["columns"], row.get("why", ""))
        rows.append({"method": row["label"], **cells, "kappa": kappa, **paper})
    return rows


def fill_blank(columns: Sequence[str], why: str) -> dict[str, str]:
    """The cells of a row without numbers: the first says why."""
    return dict.fromkeys(columns, "") | {columns[0]: why}


def point_rows(figure: Study) -> Rows:
    """A figure's points as strings, a row for each coefficient: forgotten, kept, and kappa."""

    def describe_point(point: Study) -> str:
        if point["x"] is None:
            return str(point["why"])
        numbers = f"{100 * point['x']['value']:.1f}, {100 * point['y']['value']:.1f}"
        return f"{numbers} ({point['kappa']:.2g})"

    coeffs = [point["coeff"] for point in figure["series"][0]["points"]]
    return [
        {"coeff": f"{coeff:g}"} | {one["label"]: describe_point(one["points"][i]) for one in figure["series"]}
        for i, coeff in enumerate(coeffs)
    ]


def claim_rows(claims: Sequence[Study]) -> Rows:
    """Claims as strings: the difference here and in the paper, in points, and the verdict."""
    rows = []
    for claim in claims:
        gap, paper = claim["difference"], claim["paper"]
        here = GAP.format(**{key: 100 * value for key, value in gap.items()}) if gap else ""
        theirs = f"{100 * paper['difference']:+.1f} (z = {paper['z']:.1f})" if paper else ""
        rows.append({"claim": claim["claim"], "here": here, "in the paper": theirs,
                     "verdict": claim["verdict"]})  # fmt: skip
    return rows


# ---- what stays gone under attack


def describe_frontier(study: Study) -> tuple[str, list[Part]]:
    """The methods at the same loss of utility: their accuracies, K*, attacks and costs."""
    count = len(study["seeds"])
    seeds = ", ".join(map(str, study["seeds"]))
    over = f"over {count} testbeds (seeds {seeds})" if count > 1 else f"on testbed {seeds}"
    words = (
        f"Accuracy in %, mean {over} with a 95 % interval over facts and testbeds; guessing scores "
        f"25. Of each run's change the largest share is kept that costs at most "
        f"{100 * study['budget']:g} points of mean utility on validation questions. K*: share of "
        f"the original knowledge that the strongest valid attack of tier {study['tier']} found."
    )
    parts = []
    for part in study["parts"]:
        drawn = [row for row in part["rows"] if not row.get("why")]
        figure = draw_frontier(study, part, drawn) if drawn else None
        name = f"{study['kind']}-{part['world']}-{part['regime']}"
        parts.append(Part(part["title"], frontier_tables(study, part, drawn), figure, name))
    return words, parts


def frontier_tables(study: Study, part: Study, measured: Sequence[Study]) -> list[tuple[str, Rows, str]]:
    """The tables of a world and regime; only those that there are numbers for."""

    def line(key: str, form: Callable[[Study], str]) -> Rows:
        return [{"method": row["label"], **{name: form(one) for name, one in row[key].items()}}
                for row in part["rows"] if row.get(key)]  # fmt: skip

    names = dict.fromkeys(name for row in part["rows"] for name in row.get("attacks", ()))
    attacks = [
        {"method": row["label"], **{name: format_attack(row["attacks"].get(name)) for name in names}}
        for row in measured
        if names
    ]
    priced = any("seconds" in row for row in part["rows"])
    return keep_full([
        ("At the same loss of utility:", [accuracy_row(part, row) for row in part["rows"]], ""),
        ("K* of each kind of question:", line("kinds", lambda one: RESIDUAL.format(**one)), ""),
        ("Accuracy under each attack, and in brackets the share of the original knowledge that "
         "is (x: the oracle recovers, too, and K* does not count it):", attacks, ""),
        (f"Perplexity of texts, and cost; x: as often as {study['cost']}'s seconds:",
         [cost_row(study, row) for row in measured if priced], ""),
        ("The runs whole, before any share is taken:",
         line("whole", format_percent) if priced else [], ""),
    ])  # fmt: skip


def accuracy_row(part: Study, row: Study) -> dict[str, str]:
    """A method's row; one that was not run or failed says so in the first column."""
    if why := row.get("why"):
        columns = [*part["columns"], "K*", "strongest attack"]
        return {"method": row["label"], "share": "", **fill_blank(columns, why)}
    valid = {name: one["accuracy"] for name, one in row["attacks"].items() if one["valid"]}
    share = row.get("share")
    return {
        "method": row["label"],
        "share": "" if share is None else f"{share:.2f}",
        **{name: format_percent(row["cells"][name]) for name in part["columns"]},
        "K*": RESIDUAL.format(**row["K*"]),
        "strongest attack": max(valid, key=valid.__getitem__) if valid else "",
    }


def format_attack(one: Study | None) -> str:
    """An accuracy under attack, and the share of the knowledge in brackets."""
    if one is None:
        return ""
    return f"{100 * one['accuracy']:.0f} ({one['share']:.2f}){'' if one['valid'] else ' x'}"


def cost_row(study: Study, row: Study) -> dict[str, str]:
    """What a method cost, and what it made of texts."""

    def number(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    texts = {f"{kind} texts": f"{row['perplexity'][kind]:.3g}" for kind in study["texts"]}
    return {"method": row["label"], **texts, "seconds": number("seconds", ".1f"),
            "x": number("times", ".1f"), "memory, MB": number("megabytes", ".0f")}  # fmt: skip


def draw_frontier(study: Study, part: Study, rows: Sequence[Study]) -> Figure:
    """What is kept against K*, a mark a method; the controls are rings."""
    looks = {
        True: make_look(COLOURS[0], mode="markers+text"),
        False: make_look(COLOURS[1], "circle-open", mode="markers+text"),
    }
    series = [
        Series(
            row["label"],
            [{"K*": read_estimate(row["K*"]), "accuracy kept": read_estimate(row["kept"])}],
            looks["share" in row],
        )
        for row in rows
    ]
    lowest = min(90, 10 * floor(10 * min(row["kept"]["low"] for row in rows))) / 100
    found = "K*: share of the knowledge that the strongest attack found"
    kept = f"accuracy kept, mean of {' and '.join(study['kept'])}"
    return draw_figure(
        f"{part['title']}: what is kept against what attacks find", series, "K*", "accuracy kept",
        x_axis={"title": found, "range": [-0.03, 1.03], "dtick": 0.2, "tickformat": ".1f"},
        y_axis={"title": kept, "range": [lowest, 1.003], "tickformat": ".0%",
                "dtick": 0.1 if lowest < 0.8 else 0.05},
    )  # fmt: skip
