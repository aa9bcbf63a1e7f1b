"""A reproduction as people read it: Markdown, terminal lines, and a picture for the docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any

from srmu.engine.files import write_json, write_whole
from srmu.methods.reference import markdown_table
from srmu.report.format import format_percent, print_table

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 440, 64, 16, 610, 384
Found = Mapping[str, Any]  # what srmu.reproduce.reproduce gives


def write_reproduction(found: Found, out: Path) -> list[Path]:
    """Write `reproduce.json`, `reproduce.md` and a picture for each figure."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "reproduce.json", found)
    write_whole(out / "reproduce.md", reproduction_markdown(found))
    paths = [out / "reproduce.json", out / "reproduce.md"]
    for figure in found["figures"]:
        paths.append(out / f"{figure['name']}.svg")
        write_whole(paths[-1], draw_reproduction(figure))
    return paths


def table_rows(one: Found) -> list[dict[str, str]]:
    """A table's rows as strings: accuracies in % with intervals, and the paper's."""
    rows = []
    for row in one["rows"]:
        cells = {
            name: format_percent(row["cells"][name]) for name in one["columns"] if row["cells"]
        }
        kappa = "" if row["kappa"] is None else f"{row['kappa']:.3g}"
        paper = {
            f"paper {name}": f"{100 * row['paper'][name]:.1f}" if name in row["paper"] else ""
            for name in one["paper_columns"]
        }
        blank = dict.fromkeys(one["columns"], "")
        blank[one["columns"][0]] = row.get("why", "")
        rows.append({"method": row["label"], **(cells or blank), "kappa": kappa, **paper})
    return rows


def point_rows(figure: Found) -> list[dict[str, str]]:
    """A figure's points as strings, a row for each coefficient: forgotten, kept, and kappa."""

    def shown(point: Found) -> str:
        if point["x"] is None:
            return str(point["why"])
        numbers = f"{100 * point['x']['value']:.1f}, {100 * point['y']['value']:.1f}"
        return f"{numbers} ({point['kappa']:.2g})"

    coeffs = [point["coeff"] for point in figure["series"][0]["points"]]
    return [
        {"coeff": f"{coeff:g}"} | {s["label"]: shown(s["points"][i]) for s in figure["series"]}
        for i, coeff in enumerate(coeffs)
    ]


def claims_of(claims: Sequence[Found]) -> list[dict[str, str]]:
    """Claims as strings: the difference here and in the paper, in points, and the verdict."""
    rows = []
    for claim in claims:
        here, paper = claim["difference"], claim["paper"]
        rows.append(
            {
                "claim": claim["claim"],
                "here": "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(
                    **{key: 100 * value for key, value in here.items()}
                )
                if here
                else "",
                "in the paper": f"{100 * paper['difference']:+.1f} (z = {paper['z']:.1f})"
                if paper
                else "",
                "verdict": claim["verdict"],
            }
        )
    return rows


def reproduction_markdown(found: Found) -> str:
    """All of it, with the command that makes it again; no date, no path."""
    seeds = len(found["seeds"])
    kind = "testbed" if found["model"] == "testbed" else "run"
    over = f"{seeds} {kind}{'s' * (seeds > 1)}"
    lines = ["```bash", found["command"], "```", ""]
    lines += [
        f"Accuracy in %, mean over {over} with a 95 % interval; guessing scores 25. Kappa: norm of "
        "the target over mean norm of forget activations. Differences are in points, with a paired "
        "95 % interval; z: the paper's own difference over its sampling error.",
        "",
    ]
    for one in found["tables"]:
        lines += [f"## {one['title']}", "", *markdown_lines(table_rows(one)), "", one["note"], ""]
        lines += [*markdown_lines(claims_of(one["claims"])), ""]
    for figure in found["figures"]:
        title = f"{figure['title']} ({figure['y_title']})"
        lines += [f"## {title}", "", f"![{describe_figure(figure)}]({figure['name']}.svg)", ""]
        lines += ["Points of accuracy forgotten, accuracy kept, and kappa in brackets:", ""]
        lines += [
            *markdown_lines(point_rows(figure)),
            "",
            *markdown_lines(claims_of(figure["claims"])),
            "",
        ]
    return "\n".join(lines)


def markdown_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return markdown_table([*rows[0]], [[*row.values()] for row in rows])


def describe_figure(figure: Found) -> str:
    """The picture in words: the most that each series keeps and forgets."""
    parts = []
    for series in figure["series"]:
        drawn = [point for point in series["points"] if point["x"]]
        if drawn:
            most = max(drawn, key=lambda point: point["x"]["value"])
            x, y = 100 * most["x"]["value"], 100 * most["y"]["value"]
            parts.append(f"{series['label']} forgets at most {x:.1f} and then keeps {y:.1f}")
    return "; ".join(parts)


def draw_reproduction(figure: Found) -> str:
    """A figure as SVG that suits light and dark pages; each point tells its numbers."""
    from jinja2 import Environment, PackageLoader

    drawn = [point for series in figure["series"] for point in series["points"] if point["x"]]
    xs = [0.0, *(100 * point["x"]["value"] for point in drawn)]
    ys = [100.0, *(100 * point["y"]["value"] for point in drawn)]
    x_low, x_high = 10 * floor(min(xs) / 10), 10 * floor(max(xs) / 10) + 10
    y_low, y_high = 10 * floor(min(ys) / 10), 100

    def across(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def down(value: float) -> float:
        return round(BOTTOM - (value - y_low) / max(y_high - y_low, 1) * (BOTTOM - TOP), 1)

    series = [
        {
            "label": one["label"],
            "points": [
                {
                    "x": across(100 * point["x"]["value"]),
                    "y": down(100 * point["y"]["value"]),
                    "text": f"coeff {point['coeff']:g}, kappa {point['kappa']:.3g}: "
                    f"forgets {format_percent(point['x'])}, keeps {format_percent(point['y'])}",
                }
                for point in one["points"]
                if point["x"]
            ],
        }
        for one in figure["series"]
    ]
    environment = Environment(
        loader=PackageLoader("srmu.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("figure.svg").render(
        figure=figure,
        series=series,
        desc=describe_figure(figure),
        x_ticks=[{"at": across(v), "text": v} for v in range(x_low, x_high + 1, 10)],
        y_ticks=[{"at": down(v), "text": v} for v in range(y_low, y_high + 1, 10)],
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        top=TOP,
        right=RIGHT,
        bottom=BOTTOM,
    )


def print_reproduction(found: Found) -> None:
    """The tables and the verdicts in the terminal."""
    for one in found["tables"]:
        print(f"\n{one['title']}")
        print_table(table_rows(one))
        print(one["note"])
    for figure in found["figures"]:
        print(f"\n{figure['title']} ({figure['y_title']})")
        print("points of accuracy forgotten, accuracy kept (kappa)")
        print_table(point_rows(figure))
    for one in (*found["tables"], *found["figures"]):
        print(f"\n{one['title']}: what the paper claims")
        for claim in one["claims"]:
            print(f"- {claim['sentence']}")
