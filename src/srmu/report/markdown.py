"""Studies as people read them: Markdown with pictures for the docs, and tables in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

from srmu.engine.files import write_json, write_whole
from srmu.methods.reference import markdown_table
from srmu.report.figures import COLOURS, Figure, Series, draw_figure, label_look, make_look, paint_svg
from srmu.report.format import format_percent, format_share, print_table, read_estimate, write_words

Study = Mapping[str, Any]  # what `reproduce_paper` or `build_frontier_tables` gives
Rows = list[dict[str, str]]


class StudyPart(NamedTuple):
    """A part of a study: a title, tables with what is said before and after, a picture and its name."""

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


def describe_study(study: Study) -> tuple[str, list[StudyPart]]:
    """What the numbers of a study are, and its parts, with the tables that have rows."""
    if study["kind"] == "reproduction":
        (words,) = write_words("reproduction", study=study)
        parts = reproduction_parts(study)
    else:
        (words,) = write_words("frontier", study=study)
        parts = [frontier_part(study, part) for part in study["parts"]]
    return words, [part._replace(tables=[table for table in part.tables if table[1]]) for part in parts]


# ---- a reproduction of the paper


def study_labels(study: Study) -> list[str]:
    """The methods of a reproduction: the lines of its figures, then the other rows of its tables."""
    lines = [series["label"] for figure in study["figures"] for series in figure["series"]]
    return list(dict.fromkeys([*lines, *(row["label"] for table in study["tables"] for row in table["rows"])]))


def reproduction_parts(study: Study) -> list[StudyPart]:
    """The paper's tables and figures repeated, each with the paper's claims."""
    claims = "What the paper claims:"
    parts = [
        StudyPart(table["title"], [("", table_rows(table), table["note"]), (claims, claim_rows(table["claims"]), "")])
        for table in study["tables"]
    ]
    points = "Points of accuracy forgotten, accuracy kept, and kappa in brackets:"
    for one in study["figures"]:
        tables = [(points, point_rows(one), ""), (claims, claim_rows(one["claims"]), "")]
        parts.append(
            StudyPart(
                f"{one['title']} ({one['y_title']})", tables, draw_reproduction(one, study_labels(study)), one["name"]
            )
        )
    return parts


def table_rows(table: Study) -> Rows:
    """A table's rows as strings: accuracies in % with intervals, and the paper's."""
    rows = []
    for row in table["rows"]:
        cells = fill_blank(table["columns"], row.get("why", ""))
        if row["cells"]:
            cells = {name: format_percent(row["cells"][name]) for name in table["columns"]}
        paper = {
            f"paper {name}": f"{100 * row['paper'][name]:.1f}" if name in row["paper"] else ""
            for name in table["paper_columns"]
        }
        kappa = "" if row["kappa"] is None else f"{row['kappa']:.3g}"
        rows.append({"method": row["label"], **cells, "kappa": kappa, **paper})
    return rows


def fill_blank(columns: Sequence[str], why: str) -> dict[str, str]:
    """The cells of a row without numbers: the first says why."""
    return dict.fromkeys(columns, "") | {columns[0]: why}


def point_rows(figure: Study) -> Rows:
    """A figure's points as strings, a row for each coefficient: forgotten, kept, and kappa."""
    rows: dict[str, dict[str, str]] = {}
    for one in figure["series"]:
        for point in one["points"]:
            text = point.get("why", "")
            if point["x"]:
                text = f"{100 * point['x']['value']:.1f}, {100 * point['y']['value']:.1f} ({point['kappa']:.2g})"
            coeff = f"{point['coeff']:g}"
            rows.setdefault(coeff, {"coeff": coeff})[one["label"]] = text
    return [*rows.values()]


def claim_rows(claims: Sequence[Study]) -> Rows:
    """Claims as strings: the difference here and in the paper, in points, and the verdict."""
    rows = []
    for claim in claims:
        here = theirs = ""
        if gap := claim["difference"]:
            here = "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**{key: 100 * v for key, v in gap.items()})
        if paper := claim["paper"]:
            theirs = f"{100 * paper['difference']:+.1f} (z = {paper['z']:.1f})"
        rows.append({"claim": claim["claim"], "here": here, "in the paper": theirs, "verdict": claim["verdict"]})
    return rows


def draw_reproduction(figure: Study, labels: Sequence[str]) -> Figure:
    """What is kept against what is forgotten, a line a method; points that were not measured are left out."""
    series = []
    for one in figure["series"]:
        rows = [
            {
                "coeff": float(point["coeff"]),
                "kappa": point["kappa"],
                figure["x_title"]: read_estimate(point["x"]),
                figure["y_title"]: read_estimate(point["y"]),
            }
            for point in one["points"]
            if point["x"] and point["y"]
        ]
        look = label_look(labels.index(one["label"]), mode="lines+markers", width=1.75)
        series.append(Series(one["label"], rows, look, one["label"]))
    axis = {"tickformat": ".0%"}
    return draw_figure(figure["title"], series, figure["x_title"], figure["y_title"], x_axis=axis, y_axis=axis)


# ---- what stays gone under attack


def frontier_part(study: Study, part: Study) -> StudyPart:
    """The tables and the picture of a world and regime: accuracies, K*, attacks and costs."""
    measured = [row for row in part["rows"] if not row.get("why")]

    def list_cells(key: str, form: Callable[[Any], str]) -> Rows:
        return [
            {"method": row["label"], **{name: form(one) for name, one in row[key].items()}}
            for row in part["rows"]
            if row.get(key)
        ]

    names = dict.fromkeys(name for row in part["rows"] for name in row.get("attacks", ()))
    attacks = [
        {"method": row["label"], **{name: format_attack(row["attacks"].get(name)) for name in names}}
        for row in measured
        if names
    ]
    priced = any("seconds" in row for row in part["rows"])
    tables = [
        ("At the same loss of utility:", [accuracy_row(part, row) for row in part["rows"]], ""),
        ("K* of each kind of question:", list_cells("kinds", lambda one: format_share(read_estimate(one))), ""),
        ("Accuracy under each attack, and in brackets the share of the original knowledge that "
         "is (x: the oracle recovers, too, and K* does not count it):", attacks, ""),
        (f"Perplexity of texts, and cost; x: as often as {study['cost']}'s seconds:",
         [cost_row(study, row) for row in measured if priced], ""),
        ("The runs whole, before any share is taken:", list_cells("whole", format_percent) if priced else [], ""),
    ]  # fmt: skip
    figure = draw_frontier(study, part, measured) if measured else None
    return StudyPart(part["title"], tables, figure, f"{study['kind']}-{part['world']}-{part['regime']}")


def accuracy_row(part: Study, row: Study) -> dict[str, str]:
    """A method's row; one that was not run or failed says so in the first column."""
    if why := row.get("why"):
        return {"method": row["label"], "share": "", **fill_blank([*part["columns"], "K*", "strongest attack"], why)}
    valid = {name: one["accuracy"] for name, one in row["attacks"].items() if one["valid"]}
    share = row.get("share")
    return {
        "method": row["label"],
        "share": "" if share is None else f"{share:.2f}",
        **{name: format_percent(row["cells"][name]) for name in part["columns"]},
        "K*": format_share(read_estimate(row["K*"])),
        "strongest attack": max(valid, key=valid.__getitem__) if valid else "",
    }


def format_attack(one: Study | None) -> str:
    """An accuracy under attack, and the share of the knowledge in brackets."""
    if one is None:
        return ""
    return f"{100 * one['accuracy']:.0f} ({one['share']:.2f}){'' if one['valid'] else ' x'}"


def cost_row(study: Study, row: Study) -> dict[str, str]:
    """What a method cost, and what it made of texts."""
    texts = {f"{kind} texts": f"{row['perplexity'][kind]:.3g}" for kind in study["texts"]}
    costs = {"seconds": ("seconds", ".1f"), "x": ("times", ".1f"), "memory, MB": ("megabytes", ".0f")}
    numbers = {head: "" if row.get(key) is None else format(row[key], form) for head, (key, form) in costs.items()}
    return {"method": row["label"], **texts, **numbers}


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
