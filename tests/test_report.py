"""The report: right numbers, nothing leaked, nothing from outside, whole without JavaScript."""

import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from srmu.errors import UserError
from srmu.report import MEAN, Entry, Estimate, render, table

METRICS = ("organism_hazard/acc", "organism_neighbour/acc", "organism_general/acc")
COUNTS = (192, 240, 180)
METHODS = {  # label: name in the config
    "RMU": "rmu",
    "SRMU": "srmu",
    "Adaptive RMU": "adaptive_rmu",
    "SRMU + random anchors": "srmu",
}
AFTER = {  # hazard, neighbour, general of each method, in per cent
    "low entanglement": [(34, 48, 100), (34, 46, 100), (37, 51, 100), (35, 68, 100)],
    "high entanglement": [(34, 99, 68), (34, 100, 78), (38, 99, 76), (33, 99, 97)],
}
SECRET_TEXT = "the activator of zorvex is brimstone salt"
SECRET_PATH = "/home/someone/private/forget.jsonl"


def flat(percents):
    return {
        metric: {"value": percent / 100, "stderr": 0.03, "n": n}
        for metric, percent, n in zip(METRICS, percents, COUNTS, strict=True)
    }


def write_run(folder, label, group, seed, percents, steps=120, width=192):
    """A run folder as `srmu unlearn` leaves it, with numbers that look like a real one's."""
    folder.mkdir(parents=True)
    draw = random.Random(f"{label} {group} {seed}")
    numpy = np.random.default_rng(seed)
    method = METHODS[label]
    config = {
        "model": "/home/someone/private/model",
        "method": {"name": method, "layer": 4, "kappa": 8.0, "alpha": 40.0},
        "topics": {"organism": {"forget": SECRET_PATH, "retain": SECRET_PATH}},
        "train": {"learning_rate": 0.006, "max_steps": steps, "batch_size": 8},
        "eval": ["organism"],
        "seed": seed,
    }
    if "anchors" in label:
        config["method"]["retain_anchors"] = {"kind": "random", "share": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(steps):
        noise = draw.gauss(0, 0.02)
        pull = math.exp(-step / (14 + 5 * list(METHODS).index(label)))
        line = {"step": step, "topic": "organism", "seconds": 0.03, "target_ratio": 8.0}
        line["forget"] = (0.12 + 0.88 * pull) * (1 + noise)
        line["retain"] = 0.02 * (1 - pull) * (1 + 3 * abs(noise)) + 1e-4
        line["loss"] = line["forget"] + line["retain"]
        if method != "adaptive_rmu":
            line["forget_cos"] = 0.95 - 0.85 * pull + noise
            line["retain_cos"] = 1 - 0.08 * (1 - pull) + noise / 10
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    facts = {"coeff": 15.7, "kappa": 8.0, "target_norm": 221.0, "activation_norm": 27.6}
    state = {"organism.direction": numpy.choice([-1.0, 1.0], width).astype(np.float32)}
    state["organism.target"] = state["organism.direction"] * np.float32(15.7)
    if method == "srmu":
        spread = (
            numpy.beta(1.2, 6, width)
            if group.startswith("high")
            else numpy.normal(0.88, 0.04, width)
        )
        values = np.clip(spread, 0, 1).astype(np.float32)
        state["organism.importance"] = values
        facts["importance"] = {
            "mean": float(values.mean()),
            "sd": float(values.std()),
            "share_above_half": float((values > 0.5).mean()),
            "gini": 0.33,
        }
    save_file(state, folder / "state.safetensors")
    shifted = [
        min(100, percent + shift) for percent, shift in zip(percents, (seed - 1,) * 3, strict=True)
    ]
    (folder / "results.json").write_text(json.dumps(flat(shifted)))
    (folder / "before.json").write_text(json.dumps(flat((100, 100, 100))))
    record = {
        "id": f"{draw.getrandbits(32):08x}",
        "method": method,
        "seconds": round(4 + draw.random(), 2),
        "steps": steps,
        "stop_reason": "max_steps",
        "topics": {"organism": facts},
        "environment": {"cwd": SECRET_PATH, "note": SECRET_TEXT},
    }
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def write_comparison(root, seeds=3):
    entries = []
    for group, rows in AFTER.items():
        for label, percents in zip(METHODS, rows, strict=True):
            folders = [root / f"{group}-{label}-{seed}".replace(" ", "-") for seed in range(seeds)]
            for seed, folder in enumerate(folders):
                write_run(folder, label, group, seed, percents)
            entries.append(Entry(label, group, tuple(folders)))
    return entries


class Page(HTMLParser):
    """A page's text without its scripts, its attributes, and whether every tag is closed."""

    VOID = ("meta", "link", "br", "path", "circle")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def write_report(entries, out, **changes):
    options = {
        "title": "Unlearning on the testbed",
        "forget_metrics": METRICS[:1],
        "utility_metrics": METRICS[1:],
        "command": "srmu demo --seeds 3",
    }
    return render(entries, out, **(options | changes)).read_text(encoding="utf-8")


def one_run(folder, label="SRMU", group="high entanglement", percents=(34, 100, 78)):
    return Entry(label, group, (write_run(folder, label, group, 1, percents, steps=6),))


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def html(entries, tmp_path_factory):
    return write_report(entries, tmp_path_factory.mktemp("out") / "new" / "report.html")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# ---- the numbers


def test_one_seed_has_wilsons_interval(tmp_path):
    entry = one_run(tmp_path / "run")
    results = {"x/acc": {"value": 0.5, "n": 100}}
    (entry.runs[0] / "results.json").write_text(json.dumps(results))
    (row,) = table([entry], ["x/acc"])
    assert row.after["x/acc"].mean == 0.5
    assert row.after["x/acc"].low == pytest.approx(0.40383, abs=1e-5)
    assert row.after["x/acc"].high == pytest.approx(0.59617, abs=1e-5)
    assert str(row.after["x/acc"]) == "50.0 (40.4\N{EN DASH}59.6)"
    assert row.before == {}  # before.json knows no such metric


def test_several_seeds_are_averaged_and_widen_the_interval(entries):
    rows = table(entries, METRICS)
    assert [(row.group, row.label) for row in rows] == [(e.group, e.label) for e in entries]
    srmu = rows[5]
    hazard = srmu.after["organism_hazard/acc"]
    assert (srmu.label, srmu.seeds) == ("SRMU", 3)
    assert hazard.mean == pytest.approx(0.34)  # of 33, 34 and 35 %
    # Wilson at 0.34 of 192: 0.2767 to 0.4096; seeds: 1.96 * 0.01 / sqrt(3) = 0.0113
    assert hazard.low == pytest.approx(0.34 - math.hypot(0.34 - 0.2767, 0.0113), abs=2e-4)
    assert hazard.high == pytest.approx(0.34 + math.hypot(0.4096 - 0.34, 0.0113), abs=2e-4)
    assert srmu.before["organism_general/acc"].mean == 1
    assert srmu.before["organism_general/acc"].high == 1


def test_the_mean_of_two_accuracies_has_the_questions_of_both(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "srmu.evals.interval", lambda values, n: asked.append((values, n)) or (0, 1)
    )
    write_report([one_run(tmp_path / "run")], tmp_path / "r.html")
    # variance of the mean: (1 / 240 + 1 / 180) / 4 of p (1 - p), so 1 / 411
    assert ([pytest.approx(0.89)], 411) in asked


def test_seeds_without_a_metric_do_not_count(tmp_path):
    runs = one_run(tmp_path / "a").runs + one_run(tmp_path / "b", percents=(50, 90, 70)).runs
    (runs[0] / "results.json").write_text("{}")
    (row,) = table([Entry("SRMU", "", runs)], METRICS[:1])
    assert row.after[METRICS[0]].mean == 0.5


def test_other_numbers_than_accuracies_have_no_interval(tmp_path):
    entry = one_run(tmp_path / "run")
    results = {"text/ppl": {"value": 12.3456, "n": 100}, "text/kl": {"value": 0.25}}
    (entry.runs[0] / "results.json").write_text(json.dumps(results))
    (row,) = table([entry], list(results))
    assert row.after == {"text/ppl": Estimate(12.3456), "text/kl": Estimate(0.25)}
    assert str(row.after["text/ppl"]) == "12.35"


# ---- the page


def test_every_number_is_in_the_tables(entries, page):
    numbers = [
        estimate
        for row in table(entries, METRICS)
        for estimate in (*row.before.values(), *row.after.values())
    ]
    for number in numbers:
        mean, _, span = str(number).partition(" ")
        assert f"{mean} {span.strip('()')}" in page.text
    for label in METHODS:
        assert label in page.text
    assert MEAN in page.text


def test_structure(page):
    assert page.all("html") == [{"lang": "en"}]
    assert [len(page.all(tag)) for tag in ("h1", "title", "main")] == [1, 1, 1]
    assert all("scope" in attributes for attributes in page.all("th"))
    plots = [a for a in page.all("div") if a.get("class") == "plot"]
    assert len(plots) == 2 + 2 * 4 + 2  # trade-off, curves, maps: SRMU's two entries share one
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert len({plot["id"] for plot in plots}) == len(plots)
    assert len(page.all("details")) == 8


def test_nothing_comes_from_outside(html, page):
    assert len(html.encode()) < 6_000_000
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert not attributes.get(name) or attributes[name].startswith("data:"), tag
    style = re.search("<style>.*?</style>", html, re.DOTALL).group()
    assert "url(" not in style
    assert "@import" not in style
    assert html.count("plotly.js v") == 1


def test_nothing_private_is_shown(html, entries):
    for secret in (SECRET_TEXT, SECRET_PATH, "someone", str(entries[0].runs[0].parent)):
        assert secret not in html


def test_it_claims_no_more_than_suppression(page):
    assert "suppressed" in page.text
    assert "No attack was run" in page.text
    assert not re.search("erase|removed|certif|deleted", page.text)


def test_it_says_whether_the_map_selects(page):
    topic = "entanglement \N{MIDDLE DOT} topic organism"
    assert f"low {topic} Nearly flat" in page.text  # 0.88 with a standard deviation of 0.04
    assert f"high {topic} Not flat" in page.text


def test_the_same_runs_give_the_same_file(entries, html, tmp_path):
    assert write_report(entries, tmp_path / "again.html") == html


@pytest.mark.parametrize("where", ["label", "group", "title", "command"])
def test_everything_is_escaped(tmp_path, where):
    attack = "</script><script>alert(1)</script>\"'&{{ 7 * 7 }}"
    entry, changes = one_run(tmp_path / "run"), {}
    if where in ("title", "command"):
        changes = {where: attack}
    else:
        entry = replace(entry, **{where: attack})
    html = write_report([entry], tmp_path / "r.html", **changes)
    clean = write_report([one_run(tmp_path / "other")], tmp_path / "clean.html")
    assert "<script>alert" not in html
    assert len(Page(html).all("script")) == len(Page(clean).all("script"))
    assert attack in Page(html).text


def test_each_original_model_is_shown_once(page, tmp_path):
    assert page.text.count("Before: original model") == 2  # one a group
    entries = [one_run(tmp_path / "a"), one_run(tmp_path / "b", label="RMU")]
    (entries[1].runs[0] / "before.json").write_text(json.dumps(flat((97, 98, 99))))
    text = Page(write_report(entries, tmp_path / "r.html")).text
    assert text.count("Before: original model") == 2  # they started from different ones
    assert "97.0 " in text


def test_settings_show_options_but_no_paths(tmp_path):
    runs = one_run(tmp_path / "a").runs + one_run(tmp_path / "b").runs
    for folder, rate in zip(runs, (0.006, 0.003), strict=True):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["method"] |= {"name": "/home/someone/my.py:Mine", "stages": ["C:\\me\\a", {"b": 2}]}
        config["train"]["learning_rate"] = rate
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    html = write_report([Entry("Mine", "", runs)], tmp_path / "r.html")
    text = Page(html).text
    assert "method · name my.py:Mine" in text
    assert "a, b: 2" in text
    assert "train · learning rate 0.006 0.003" in text  # one each, as they differ
    assert "train · batch size 8 train" in text  # once, as they agree
    assert "someone" not in html


def test_topics_that_take_turns_give_one_curve(tmp_path):
    entry = one_run(tmp_path / "run")
    lines = [
        {"step": step, "topic": ("bio", "cyber")[step % 2], "forget": (1.0, 3.0)[step % 2]}
        for step in range(6)
    ]
    (entry.runs[0] / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    html = write_report([entry], tmp_path / "r.html")
    assert "x: [0, 2, 4], y: [2.0, 2.0, 2.0]" in html
    assert 'meta: "SRMU"' in html
    assert "Retain loss" not in Page(html).text


@pytest.mark.parametrize(
    ("file", "lost"),
    [
        ("metrics.jsonl", "Training curves"),
        ("state.safetensors", "Importance maps"),
        ("before.json", "Before: original model"),
        ("record.json", "stop reason"),
    ],
)
def test_what_is_missing_is_left_out(tmp_path, file, lost):
    entry = one_run(tmp_path / "run")
    assert lost in Page(write_report([entry], tmp_path / "whole.html")).text
    (entry.runs[0] / file).unlink()
    assert lost not in Page(write_report([entry], tmp_path / "part.html")).text


@pytest.mark.parametrize(
    ("file", "command"), [("results.json", "srmu eval"), ("config.yaml", "srmu unlearn")]
)
def test_an_incomplete_folder_is_the_users_error(tmp_path, file, command):
    entry = one_run(tmp_path / "run")
    (entry.runs[0] / file).unlink()
    with pytest.raises(UserError, match=rf"run has no {file}; run `{command}") as caught:
        write_report([entry], tmp_path / "r.html")
    assert str(entry.runs[0]) in str(caught.value)
    assert not (tmp_path / "r.html").exists()


def test_wrong_input_is_named(tmp_path):
    entry = one_run(tmp_path / "run")
    with pytest.raises(UserError, match="no run has the result typo/acc"):
        table([entry], ["typo/acc"])
    with pytest.raises(UserError, match="is a folder"):
        write_report([entry], tmp_path)
    (entry.runs[0] / "metrics.jsonl").write_text('{"step": 0, ')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        write_report([entry], tmp_path / "r.html")


def test_importing_it_is_cheap():
    heavy = "{'torch', 'plotly', 'jinja2', 'transformers', 'numpy'}"
    check = f"import sys, srmu.report; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
