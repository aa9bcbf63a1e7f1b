"""Studies as people read them: Markdown for the docs and the terminal, sections of pages."""

from collections.abc import Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any

from srmu.engine.files import write_json, write_whole
from srmu.methods.reference import markdown_table
from srmu.report.attacks import CONTROLS
from srmu.report.figures import Figure, Series, draw_figure, label_look, make_look
from srmu.report.format import (
    NOT_RUN,
    count_words,
    drop_empty,
    format_comparison,
    format_share,
    read_estimate,
    write_words,
)
from srmu.report.html import LABEL, Block, Section, Table

Study = Mapping[str, Any]  # what `reproduce_paper` or `build_frontier_tables` gives
Rows = list[dict[str, str]]


def write_study(study: Study, out: Path) -> list[Path]:
    """Write a study as JSON and as Markdown, which links the figures of its pages."""
    out.mkdir(parents=True, exist_ok=True)
    name = "reproduce" if study["kind"] == "reproduction" else study["kind"]
    paths = [out / f"{name}.json", out / f"{name}.md"]
    write_json(paths[0], study)
    words, sections = describe_study(study)
    # neither a date nor a path: what is written twice is the same
    lines = ["```bash", study["command"], "```", "", words, ""]
    for name, section in sections.items():
        lines += [f"## {section.title}", ""]
        lines += [line for note in section.notes for line in (note, "")]
        for block in section.blocks:
            if block.figures:
                page = "report" if study["kind"] == "reproduction" else name
                lines += [f"[The figure]({page}.html)", ""]
            if table := block.table:
                rows = [{column: row[column] for column in table.columns} for row in table.rows]
                lines += [f"{table.caption}:", "", markdown_table(rows), ""]
    write_whole(paths[1], "\n".join(lines))
    return paths


def describe_study(study: Study) -> tuple[str, dict[str, Section]]:
    """What the numbers of a study are, and its sections by their names."""
    if study["kind"] == "reproduction":
        return write_words("reproduction", study=study)[0], reproduction_sections(study)
    names = [f"{study['kind']}-{part['world']}-{part['regime']}" for part in study["parts"]]
    sections = [frontier_section(study, part) for part in study["parts"]]
    return write_words("frontier", study=study)[0], dict(zip(names, sections, strict=True))


def list_blocks(tables: Mapping[str, Rows], *figures: Figure) -> list[Block]:
    """The figures, and by their captions the tables that have rows."""
    blocks = [Block([figure]) for figure in figures]
    shown = [Table(caption, rows, words="claim" in rows[0]) for caption, rows in tables.items() if rows]
    return blocks + [Block(table=table) for table in shown]


# ---- a reproduction of the paper


def study_labels(study: Study) -> list[str]:
    """The methods of a reproduction: the lines of its figures, then the other rows of its tables."""
    lines = [series["label"] for figure in study["figures"] for series in figure["series"]]
    return list(dict.fromkeys([*lines, *(row["label"] for table in study["tables"] for row in table["rows"])]))


def reproduction_sections(study: Study) -> dict[str, Section]:
    """The paper's tables and figures repeated, each with the paper's claims."""
    claims = "What the paper claims"
    numbers = "Per cent, with 95 % intervals; beside the paper's numbers"
    points = "Points of accuracy forgotten, accuracy kept, and kappa in brackets"
    sections = {}
    for one in study["tables"]:
        blocks = list_blocks({numbers: table_rows(one), claims: claim_rows(one["claims"])})
        sections[one["name"]] = Section(one["title"], [*filter(None, [one["note"], count_missing(one)])], blocks)
    for one in study["figures"]:
        tables = {
            points: point_rows(one),
            **{describe_loss(each): compared_rows(each) for each in one["compared"]},
            "Accuracy in % after LoRA has learned other facts about the region; K*: the share of the original "
            "knowledge that it finds": relearned_rows(one),
            claims: claim_rows(one["claims"]),
        }
        blocks = list_blocks(tables, draw_reproduction(one, study_labels(study)))
        title = f"{one['title']} ({one['y_title']})"
        sections[one["name"]] = Section(title, [*filter(None, [count_missing(one)])], blocks)
    return sections


def count_missing(part: Study) -> str:
    """A note on runs that are still to be made."""
    return f"{count_words(part['missing'], 'run')} missing: shown is what is there." if part["missing"] else ""


def describe_loss(compared: Study) -> str:
    """What methods are compared at; differences to the first are of those runs that both have."""
    share = 100 * compared["lost"]
    lost = f"{share:g} point{'' if share == 1 else 's'} of {compared['kept']} knowledge"
    return f"At a loss of {lost}; a difference below 0: forgets more than the first"


def table_rows(table: Study) -> Rows:
    """A table's rows as strings: accuracies in % with intervals, and the paper's."""
    rows = []
    for row in table["rows"]:
        cells = dict.fromkeys(table["columns"], "") | {table["columns"][0]: row.get("why", "")}
        cells |= {name: str(read_estimate(cell)) for name, cell in row["cells"].items()}
        kappa = "" if row["kappa"] is None else f"{row['kappa']:.3g}"
        theirs = {name: f"{100 * value:.1f}" for name, value in row["paper"].items()}
        paper = {f"paper {name}": theirs.get(name, "") for name in table["paper_columns"]}
        rows.append({LABEL: row["label"], "method": row["label"], **cells, "kappa": kappa, **paper})
    return rows


def point_rows(figure: Study) -> Rows:
    """A figure's points as strings, a row for each strength: forgotten, kept, and kappa."""
    rows: dict[float, dict[str, str]] = {}
    for one in figure["series"]:
        for point in one["points"]:
            if text := format_point(point):
                row = rows.setdefault(point["coeff"], {figure["head"]: f"{point['coeff']:g}"})
                row[one["label"]] = text
    return fill_rows([rows[coeff] for coeff in sorted(rows)], [one["label"] for one in figure["series"]])


def format_point(point: Study) -> str:
    """What is forgotten, what is kept, and kappa; or why not. Nothing of a point that was not run."""
    if not point["x"]:
        return point["why"].replace(NOT_RUN, "")
    kappa = "" if point["kappa"] is None else f" ({point['kappa']:.2g})"
    return f"{100 * point['x']['value']:.1f}, {100 * point['y']['value']:.1f}{kappa}"


def fill_rows(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> Rows:
    """Rows that all have the same columns: what they have, those of `columns` in their order."""
    there = {key for row in rows for key in row}
    order = [*dict.fromkeys([*(key for row in rows for key in row if key not in columns), *columns])]
    return [{key: row.get(key, "") for key in order if key in there} for row in rows]


def compared_rows(compared: Study) -> Rows:
    """Methods at the same loss as strings; without a column that says nothing."""
    return drop_empty([format_comparison(row) for row in compared["rows"]])


def relearned_rows(figure: Study) -> Rows:
    """Points under a short training as strings: accuracy in % by steps, and K*; or why there are none."""
    rows = []
    for row in figure["relearned"]:
        cells = {"method": row["method"], "K*": row.get("why", "")}
        if not row.get("why"):
            cells["kappa"] = "" if row["kappa"] is None else f"{row['kappa']:.2g}"
            cells |= {name: f"{100 * value:.1f}" for name, value in row["steps"].items()}
            cells["K*"] = format_share(read_estimate(row["K*"]))
        rows.append(cells)
    return fill_rows(rows, ["K*"])


def claim_rows(claims: list[Study]) -> Rows:
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


def draw_reproduction(figure: Study, labels: list[str]) -> Figure:
    """What is kept against what is forgotten, a line a method; points that were not measured are left out."""
    titles = {"x": figure["x_title"], "y": figure["y_title"]}
    series = []
    for one in figure["series"]:
        rows = [
            {"coeff": float(point["coeff"]), "kappa": point["kappa"]}
            | {title: read_estimate(point[axis]) for axis, title in titles.items()}
            for point in one["points"]
            if point["x"] and point["y"]
        ]
        look = label_look(labels.index(one["label"]), mode="lines+markers", width=1.75)
        series.append(Series(one["label"], rows, look, one["label"]))
    axis = {"tickformat": ".0%"}
    return draw_figure("", series, *titles.values(), x_axis=axis, y_axis=axis, subject=figure["title"])


# ---- what stays gone under attack


def frontier_section(study: Study, part: Study) -> Section:
    """The figure and the tables of a world and regime: accuracies, K*, attacks and costs."""
    measured = [row for row in part["rows"] if not row.get("why")]
    attacks = dict.fromkeys(name for row in measured for name in row["attacks"])
    under_attack = (
        "Accuracy under each attack, and in brackets the share of the original knowledge that is "
        "(x: the oracle recovers, too, and K* does not count it)"
    )
    tables = {
        "At the same loss of utility": [accuracy_row(part, row) for row in part["rows"]],
        "K* of each kind of question": [
            name_row(row) | {name: format_share(read_estimate(one)) for name, one in row["kinds"].items()}
            for row in measured
            if row.get("kinds")
        ],
        under_attack: [
            name_row(row) | {name: format_attack(row["attacks"].get(name)) for name in attacks}
            for row in measured
            if attacks
        ],
        f"Perplexity of texts, and cost; x: as often as {study['cost']}'s seconds": [
            cost_row(study, row) for row in measured
        ],
        "The runs whole, before any share is taken": [
            name_row(row) | {name: str(read_estimate(one)) for name, one in row["whole"].items()}
            for row in measured
            if "whole" in row
        ],
    }
    figures = [draw_frontier(study, part, measured)] if measured else []
    return Section(part["title"], [], list_blocks(tables, *figures))


def name_row(row: Study) -> dict[str, str]:
    """The first column of a row; the controls have no label, so that they are never hidden."""
    return {LABEL: row["label"] if "share" in row else "", "method": row["label"]}


def accuracy_row(part: Study, row: Study) -> dict[str, str]:
    """A method's row; one that was not run or failed says so in the first column of numbers."""
    names = [*part["columns"], "K*", "strongest attack"]
    if why := row.get("why"):
        return name_row(row) | {"share": "", **dict.fromkeys(names, ""), names[0]: why}
    valid = {name: one["accuracy"] for name, one in row["attacks"].items() if one["valid"]}
    return name_row(row) | {
        "share": f"{row['share']:.2f}" if "share" in row else "",
        **{name: str(read_estimate(row["cells"][name])) for name in part["columns"]},
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
    return name_row(row) | texts | numbers


def draw_frontier(study: Study, part: Study, rows: Sequence[Study]) -> Figure:
    """What is kept against K*, a mark a method; the controls are rings."""
    labels = [row["label"] for row in rows if "share" in row]
    series = []
    for row in rows:
        mark = {"K*": read_estimate(row["K*"]), "accuracy kept": read_estimate(row["kept"])}
        label = name_row(row)[LABEL]
        look = label_look(labels.index(label), size=11) if label else make_look(**CONTROLS[row["label"]], size=11)
        series.append(Series(row["label"], [mark], look, label))
    lowest = min(90, 10 * floor(10 * min(row["kept"]["low"] for row in rows))) / 100
    found, kept = "K*: share of the knowledge that the strongest attack found", " and ".join(study["kept"])
    x_axis = {"title": found, "range": [-0.03, 1.03], "tickformat": ".1f"}
    y_axis = {"title": f"accuracy kept, mean of {kept}", "range": [lowest, 1.003], "tickformat": ".0%"}
    return draw_figure("", series, "K*", "accuracy kept", x_axis=x_axis, y_axis=y_axis, subject=part["title"])
