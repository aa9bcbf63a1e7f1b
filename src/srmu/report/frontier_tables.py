"""A frontier as people read it: Markdown, terminal lines, and a picture a world and regime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any

from srmu.engine.files import write_json, write_whole
from srmu.methods.reference import markdown_table
from srmu.report.format import format_percent, print_table

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 64, 16, 560, 364
LINE = 16  # between two labels of the picture
MIDDLE = 0.6  # K* from which on labels stand beside the plot
Found = Mapping[str, Any]  # what srmu.frontier.tables_of gives
Rows = list[dict[str, str]]


def write_robust(found: Found, out: Path) -> list[Path]:
    """Write `robust.json`, `robust.md` and the pictures, or those of the ablations."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{found['kind']}.json", out / f"{found['kind']}.md"]
    write_json(paths[0], found)
    write_whole(paths[1], robust_markdown(found))
    for part in found["parts"]:
        if shown_rows(part):
            paths.append(out / f"{picture_of(found, part)}.svg")
            write_whole(paths[-1], draw_robust(found, part))
    return paths


def picture_of(found: Found, part: Found) -> str:
    return f"{found['kind']}-{part['world']}-{part['regime']}"


def robust_markdown(found: Found) -> str:
    """All of it, with the command that makes it again; no date, no path."""
    lines = ["```bash", found["command"], "```", "", describe_robust(found), ""]
    for part in found["parts"]:
        lines += [f"## {part['title']}", ""]
        if shown_rows(part):
            lines += [f"![{describe_picture(part)}]({picture_of(found, part)}.svg)", ""]
        for title, rows in robust_sections(found, part):
            lines += [
                f"{title}",
                "",
                *markdown_table([*rows[0]], [[*row.values()] for row in rows]),
                "",
            ]
    return "\n".join(lines)


def print_robust(found: Found) -> None:
    """The tables in the terminal."""
    print(describe_robust(found))
    for part in found["parts"]:
        for title, rows in robust_sections(found, part):
            print(f"\n{part['title']}. {title}")
            print_table(rows)


def describe_robust(found: Found) -> str:
    count = len(found["seeds"])
    named = ", ".join(map(str, found["seeds"]))
    over = f"over {count} testbeds (seeds {named})" if count > 1 else f"on testbed {named}"
    return (
        f"Accuracy in %, mean {over} with a 95 % interval over facts and testbeds; guessing scores "
        f"25. Of each run's change the largest share is kept that costs at most "
        f"{100 * found['budget']:g} points of mean utility on validation questions. K*: share of "
        f"the original knowledge that the strongest valid attack of tier {found['tier']} found."
    )


def robust_sections(found: Found, part: Found) -> list[tuple[str, Rows]]:
    """A part's tables as strings, with their titles."""
    rows = part["rows"]
    sections = [("At the same loss of utility:", [accuracy_line(part, row) for row in rows])]
    kinds = [
        {
            "method": row["label"],
            **{name: format_residual(one) for name, one in row["kinds"].items()},
        }
        for row in rows
        if row.get("kinds")
    ]
    if kinds:
        sections.append(("K* of each kind of question:", kinds))
    names = list(dict.fromkeys(name for row in rows for name in row.get("attacks", ())))
    if names:
        title = (
            "Accuracy under each attack, and in brackets the share of the original knowledge that "
            "is (x: the oracle recovers, too, and K* does not count it):"
        )
        sections.append((title, [attack_line(names, row) for row in rows if not row.get("why")]))
    cost = [cost_line(found, row) for row in rows if "seconds" in row]
    if cost:
        title = f"Perplexity of texts, and cost; x: as often as {found['cost']}'s seconds:"
        texts = [cost_line(found, row) for row in rows if not row.get("why")]
        sections.append((title, texts))
        whole = [
            {"method": row["label"], **{k: format_percent(v) for k, v in row["whole"].items()}}
            for row in rows
            if "whole" in row
        ]
        sections.append(("The runs whole, before any share is taken:", whole))
    return sections


def accuracy_line(part: Found, row: Found) -> dict[str, str]:
    """A method's line; one that was not run or failed says so in the first column."""
    if row.get("why"):
        blank = dict.fromkeys((*part["columns"], "K*", "strongest attack"), "")
        return {"method": row["label"], "share": "", **blank, part["columns"][0]: row["why"]}
    counted = {k: v["accuracy"] for k, v in row["attacks"].items() if v["valid"]}
    share = row.get("share")
    return {
        "method": row["label"],
        "share": "" if share is None else f"{share:.2f}",
        **{name: format_percent(row["cells"][name]) for name in part["columns"]},
        "K*": format_residual(row["K*"]),
        "strongest attack": max(counted, key=counted.__getitem__) if counted else "",
    }


def format_residual(estimate: Found) -> str:
    """`0.31 (0.24-0.39)`: a K* with its interval."""
    return "{value:.2f} ({low:.2f}\N{EN DASH}{high:.2f})".format(**estimate)


def attack_line(names: Sequence[str], row: Found) -> dict[str, str]:
    def shown(name: str) -> str:
        if name not in row["attacks"]:
            return ""
        one = row["attacks"][name]
        mark = "" if one["valid"] else " x"
        return f"{100 * one['accuracy']:.0f} ({one['share']:.2f}){mark}"

    return {"method": row["label"], **{name: shown(name) for name in names}}


def cost_line(found: Found, row: Found) -> dict[str, str]:
    def number(key: str, form: str) -> str:
        return "" if row.get(key) is None else form.format(row[key])

    return {
        "method": row["label"],
        **{f"{kind} texts": f"{row['perplexity'][kind]:.3g}" for kind in found["texts"]},
        "seconds": number("seconds", "{:.1f}"),
        "x": number("times", "{:.1f}"),
        "memory, MB": number("megabytes", "{:.0f}"),
    }


# ---- the picture


def shown_rows(part: Found) -> list[Found]:
    """The rows that the picture shows: all but those without a number."""
    return [row for row in part["rows"] if not row.get("why")]


def describe_picture(part: Found) -> str:
    """The picture in words."""
    return "; ".join(
        f"{row['label']} keeps {100 * row['kept']['value']:.1f} at K* {row['K*']['value']:.2f}"
        for row in shown_rows(part)
    )


def draw_robust(found: Found, part: Found) -> str:
    """Accuracy kept against K* as SVG that suits light and dark pages, a point a method."""
    from jinja2 import Environment, PackageLoader

    rows = shown_rows(part)
    kept = [100 * row["kept"]["low"] for row in rows]
    y_low = min(90, 10 * floor(min(kept) / 10))

    def across(value: float) -> float:
        return round(LEFT + 12 + value * (RIGHT - LEFT - 24), 1)

    def down(value: float) -> float:
        return round(BOTTOM - (value - y_low) / (100 - y_low) * (BOTTOM - TOP - 8), 1)

    points = [
        {
            "label": row["label"],
            "kind": "control" if "share" not in row else "p",
            "x": across(row["K*"]["value"]),
            "y": down(100 * row["kept"]["value"]),
            "left": across(row["K*"]["low"]),
            "right": across(row["K*"]["high"]),
            "top": down(100 * row["kept"]["high"]),
            "bottom": down(100 * row["kept"]["low"]),
            "text": f"K* {row['K*']['value']:.2f}, keeps {format_percent(row['kept'])}",
            "beside": row["K*"]["value"] < MIDDLE,
        }
        for row in rows
    ]
    near = [point for point in points if point["beside"]]
    far = [point for point in points if not point["beside"]]
    for group, x in ((near, lambda p: p["x"] + 10), (far, lambda p: RIGHT + 14)):
        place_labels(group, x)
    environment = Environment(
        loader=PackageLoader("srmu.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("frontier.svg").render(
        title=f"{part['title']}: what is kept against what attacks find",
        desc=describe_picture(part),
        points=points,
        x_title="K*: share of the knowledge that the strongest attack found",
        y_title=f"accuracy kept, mean of {' and '.join(found['kept'])}, %",
        x_ticks=[{"at": across(i / 5), "text": f"{i / 5:.1f}"} for i in range(6)],
        y_ticks=[{"at": down(v), "text": v} for v in range(y_low, 101, 10 if y_low < 80 else 5)],
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        top=TOP,
        right=RIGHT,
        bottom=BOTTOM,
    )


def place_labels(points: Sequence[dict[str, Any]], x: Callable[[dict[str, Any]], float]) -> None:
    """Give each point the place of its label: as high as the point, or as near as there is room."""
    lowest = TOP + 10.0
    for point in sorted(points, key=lambda p: (p["y"], p["x"])):
        point["label_x"], point["label_y"] = x(point), max(point["y"], lowest)
        lowest = point["label_y"] + LINE
    highest = BOTTOM - 4.0
    for point in sorted(points, key=lambda p: -p["label_y"]):
        point["label_y"] = round(min(point["label_y"], highest), 1)
        highest = point["label_y"] - LINE
