"""The report: right numbers, nothing leaked, nothing from outside, whole without JavaScript."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml

from helpers.report_world import (
    METHODS,
    METRICS,
    SECRET_HOME,
    SECRET_PATH,
    SECRET_TEXT,
    flat,
    interval,
    write_attacks,
    write_auto,
    write_comparison,
    write_reproduction,
    write_run,
    write_sweep,
)
from helpers.results import keep_rows, write_metrics
from helpers.results import write_report as write_attack_report
from srmu.cli import main
from srmu.errors import SrmuError
from srmu.evals.benchmarks import find_benchmark
from srmu.evals.results import read_attacks
from srmu.evals.statistics import Estimate
from srmu.report.attacks import attack_section, estimate_recovery
from srmu.report.benchmarks import benchmark_section
from srmu.report.build import MEAN, make_runs_page, write_report
from srmu.report.results import RunGroup, aggregate_columns, strip_paths
from srmu.report.runs import record_section


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


def page_text(entries, out, **changes):
    options = {
        "title": "Unlearning on the testbed",
        "forget": METRICS[:1],
        "utility": METRICS[1:],
        "command": "srmu demo --seeds 3",
    }
    return make_runs_page(entries, **(options | changes)).write(out).read_text(encoding="utf-8")


def aggregate_metrics(entries, metrics):
    return aggregate_columns(entries, {metric: [metric] for metric in metrics})


def one_run(folder, label="SRMU", group="high entanglement", percents=(34, 100, 78)):
    return RunGroup(label, group, (write_run(folder, label, group, 1, percents, steps=6),))


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def html(entries, tmp_path_factory):
    return page_text(entries, tmp_path_factory.mktemp("out") / "new" / "report.html")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# ---- the numbers


def test_one_seed_has_wilsons_interval(tmp_path):
    entry = one_run(tmp_path / "run")
    write_metrics(entry.runs[0], after={"x/acc": {"value": 0.5, "n": 100}})
    (row,) = aggregate_metrics([entry], ["x/acc"])
    assert row.after["x/acc"].value == 0.5
    assert row.after["x/acc"].low == pytest.approx(0.40383, abs=1e-5)
    assert row.after["x/acc"].high == pytest.approx(0.59617, abs=1e-5)
    assert str(row.after["x/acc"]) == "50.0 (40.4\N{EN DASH}59.6)"
    assert row.before == {}  # it was not measured then


def test_several_seeds_are_averaged_and_widen_the_interval(entries):
    rows = aggregate_metrics(entries, METRICS)
    assert [(row.group, row.label) for row in rows] == [(e.group, e.label) for e in entries]
    srmu = rows[5]
    hazard = srmu.after["testbed_hazard/acc"]
    assert (srmu.label, len(srmu.runs)) == ("SRMU", 3)
    assert hazard.value == pytest.approx(0.34)  # of 33, 34 and 35 %
    # Wilson at 0.34 of 192: 0.2767 to 0.4096; seeds: 1.96 * 0.01 / sqrt(3) = 0.0113
    assert hazard.low == pytest.approx(0.34 - math.hypot(0.34 - 0.2767, 0.0113), abs=2e-4)
    assert hazard.high == pytest.approx(0.34 + math.hypot(0.4096 - 0.34, 0.0113), abs=2e-4)
    assert srmu.before["testbed_general/acc"].value == 1
    assert srmu.before["testbed_general/acc"].high == 1


def test_the_mean_of_two_accuracies_has_the_questions_of_both(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "srmu.evals.statistics.accuracy_interval", lambda values, n: asked.append((values, n)) or (0, 1)
    )
    page_text([one_run(tmp_path / "run")], tmp_path / "r.html")
    # variance of the mean: (1 / 240 + 1 / 180) / 4 of p (1 - p), so 1 / 411
    assert ([pytest.approx(0.89)], 411) in asked


def test_seeds_without_a_metric_do_not_count(tmp_path):
    runs = one_run(tmp_path / "a").runs + one_run(tmp_path / "b", percents=(50, 90, 70)).runs
    keep_rows(runs[0], lambda row: row["task"] != "testbed_hazard")
    (row,) = aggregate_metrics([RunGroup("SRMU", "", runs)], METRICS[:1])
    assert row.after[METRICS[0]].value == 0.5


def test_other_numbers_than_accuracies_have_no_interval(tmp_path):
    entry = one_run(tmp_path / "run")
    results = {"text/ppl": {"value": 12.3456, "n": 100}, "text/kl": {"value": 0.25}}
    write_metrics(entry.runs[0], after=results)
    (row,) = aggregate_metrics([entry], list(results))
    assert row.after == {"text/ppl": Estimate(12.3456), "text/kl": Estimate(0.25)}
    assert str(row.after["text/ppl"]) == "12.35"


# ---- the page


def test_every_number_is_in_the_tables(entries, page):
    numbers = [
        estimate
        for row in aggregate_metrics(entries, METRICS)
        for estimate in (*row.before.values(), *row.after.values())
    ]
    for number in numbers:
        mean, _, span = str(number).partition(" ")
        assert f"{mean} {span.strip('()')}" in page.text
    for label in METHODS:
        assert label in page.text
    assert MEAN.capitalize() in page.text


def test_structure(page):
    assert page.all("html") == [{"lang": "en"}]
    assert [len(page.all(tag)) for tag in ("h1", "title", "main")] == [1, 1, 1]
    assert all("scope" in attributes for attributes in page.all("th"))
    plots = [a for a in page.all("div") if a.get("class") == "plot"]
    assert len(plots) == 2 + 2 * 4 + 2  # trade-off, curves, maps: SRMU's two entries share one
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert len(page.all("details")) == 8  # settings and record of each entry
    assert page.all("a")[0]["href"] == "#content"  # the first to be reached skips to the content
    sections = [a["aria-labelledby"] for a in page.all("section")]
    assert sections == [a["id"] for a in page.all("h2")]
    assert len(page.all("table")) == len(page.all("caption")) == len(page.all("tbody")) - 2


def test_nothing_comes_from_outside(html, page):
    assert len(html.encode()) < 6_000_000
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), tag
    style = re.search("<style>.*?</style>", html, re.DOTALL).group()
    assert "url(" not in style
    assert "@import" not in style
    assert html.count("plotly.js v") == 1


def test_nothing_private_is_shown(html, entries):
    for secret in (SECRET_TEXT, SECRET_PATH, "someone", str(entries[0].runs[0].parent)):
        assert secret not in html


def test_it_claims_no_more_than_suppression(page):
    assert "suppressed" in page.text
    assert "suppressed, not attacked" in page.text
    assert not re.search("erase|removed|certif|deleted", page.text)


def test_it_says_whether_the_map_selects(page):
    assert (
        "low entanglement Nearly flat (sd under 0.1): it hardly tells features apart." in page.text
    )  # 0.88 with a standard deviation of 0.04
    assert "high entanglement Not flat" in page.text


def test_the_same_runs_give_the_same_file(entries, html, tmp_path):
    assert page_text(entries, tmp_path / "again.html") == html


@pytest.mark.parametrize("where", ["label", "group", "title", "command"])
def test_everything_is_escaped(tmp_path, where):
    attack = "</script><script>alert(1)</script>\"'&{{ 7 * 7 }}"
    entry, changes = one_run(tmp_path / "run"), {}
    if where in ("title", "command"):
        changes = {where: attack}
    else:
        entry = replace(entry, **{where: attack})
    html = page_text([entry], tmp_path / "r.html", **changes)
    clean = page_text([one_run(tmp_path / "other")], tmp_path / "clean.html")
    assert "<script>alert" not in html
    assert len(Page(html).all("script")) == len(Page(clean).all("script"))
    assert attack in Page(html).text


def test_each_original_model_is_shown_once(page, tmp_path):
    assert page.text.count("Before: original model") == 2  # one a group
    entries = [one_run(tmp_path / "a"), one_run(tmp_path / "b", label="RMU")]
    write_metrics(entries[1].runs[0], before=flat((97, 98, 99)))
    text = Page(page_text(entries, tmp_path / "r.html")).text
    assert text.count("Before: original model") == 2  # they started from different ones
    assert "97.0 " in text


def test_what_was_not_asked_after_relearning_is_left_out(tmp_path):
    """The controls have no accuracy before relearning: no number stands there, and no nan."""
    (run,) = seeds_of(tmp_path, count=1)
    write_attacks(run, 0.7)
    results = json.loads((run / "results.json").read_text())
    original = results["attacks"]["attacks"]["benign_relearning"]["controls"]["original"]
    original["settings"] = {"LoRA, n=50": {"test": 1.0, "val": 1.0}}
    (run / "results.json").write_text(json.dumps(results))
    assert "nan" not in Page(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")).text.split()


def test_settings_that_are_as_by_default_are_folded(tmp_path):
    """Of one run, too: what was chosen is what one looks for."""
    (run,) = entry = one_run(tmp_path / "run").runs
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["method"] |= {"window": 3, "importance": "ratio"}
    config["train"] |= {"shuffle": True, "check_every": 5, "max_grad_norm": 1.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    own, usual = (block.table for block in record_section([RunGroup("SRMU", "", entry)]).blocks)
    assert not own.fold and usual.fold == "4 settings of SRMU as by default"
    facts = {row["Fact"].replace(" \N{MIDDLE DOT} ", "."): row["Value"] for row in own.rows}
    assert facts["train.max grad norm"] == "1" and facts["method.name"] == "srmu" and "seed" in facts
    assert [row["Fact"].split(" ")[-1] for row in usual.rows] == ["importance", "window", "every", "shuffle"]


def test_settings_show_options_but_no_paths(tmp_path):
    runs = one_run(tmp_path / "a").runs + one_run(tmp_path / "b").runs
    for folder, rate in zip(runs, (0.006, 0.003), strict=True):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["method"] |= {"name": "/home/someone/my.py:Mine", "stages": ["C:\\me\\a", {"b": 2}]}
        config["train"]["learning_rate"] = rate
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    html = page_text([RunGroup("Mine", "", runs)], tmp_path / "r.html")
    text = Page(html).text
    assert "method · name my.py:Mine" in text
    assert "a, b: 2" in text
    assert "train · learning rate 0.006; 0.003" in text  # one each, as they differ
    assert "train · batch size 8 train" in text  # once, as they agree
    assert "someone" not in html


def test_topics_that_take_turns_give_one_curve(tmp_path):
    entry = one_run(tmp_path / "run")
    lines = [{"step": step, "topic": ("bio", "cyber")[step % 2], "forget": (1.0, 3.0)[step % 2]} for step in range(6)]
    (entry.runs[0] / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    html = page_text([entry], tmp_path / "r.html")
    assert '"x": [0, 2, 4], "y": [2.0, 2.0, 2.0]' in html
    assert '"legendgroup": "SRMU"' in html
    assert "Forget loss" in Page(html).text


def test_a_diverged_run_leaves_valid_figures(tmp_path):
    entry = one_run(tmp_path / "run")
    lines = [{"step": i, "topic": "bio", "forget": (1.0, math.nan)[i]} for i in range(2)]
    (entry.runs[0] / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    html = page_text([entry], tmp_path / "r.html")
    assert '"x": [0], "y": [1.0]' in html
    figures = re.findall(r'class="figure">(.*?)</script>', html)
    assert figures
    assert not any("NaN" in figure for figure in figures)


@pytest.mark.parametrize(
    ("file", "lost"),
    [("metrics.jsonl", "Training curves"), ("state.safetensors", "Importance maps"), ("record.json", "stop reason")],
)
def test_what_is_missing_is_left_out(tmp_path, file, lost):
    entry = one_run(tmp_path / "run")
    assert lost in Page(page_text([entry], tmp_path / "whole.html")).text
    (entry.runs[0] / file).unlink()
    assert lost not in Page(page_text([entry], tmp_path / "part.html")).text


def test_a_run_without_a_config_is_the_users_error(tmp_path):
    entry = one_run(tmp_path / "run")
    (entry.runs[0] / "config.yaml").unlink()
    with pytest.raises(SrmuError, match=r"run/config\.yaml: no such file"):
        page_text([entry], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_wrong_input_is_named(tmp_path):
    entry = one_run(tmp_path / "run")
    with pytest.raises(SrmuError, match="no run has the result typo/acc"):
        aggregate_metrics([entry], ["typo/acc"])
    with pytest.raises(SrmuError, match="is a folder"):
        page_text([entry], tmp_path)
    (entry.runs[0] / "metrics.jsonl").write_text('{"step": 0, ')
    with pytest.raises(SrmuError, match=r"metrics\.jsonl is damaged"):
        page_text([entry], tmp_path / "r.html")


# ---- the command


@pytest.fixture
def call(monkeypatch, capfd):
    """`srmu report ...` in this process: its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["srmu", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return stop.value.code, *capfd.readouterr()

    return run


def seeds_of(root, label="SRMU", count=3, **options):
    return [
        write_run(root / f"{label}-{i}".replace(" ", "-"), label, "", i, (34, 90, 95), 6, **options)
        for i in range(count)
    ]


def test_seeds_make_one_line_and_strengths_several(tmp_path, call):
    runs = [*seeds_of(tmp_path), *seeds_of(tmp_path, "RMU", 2)]
    stronger = write_run(tmp_path / "stronger", "RMU", "", 0, (30, 80, 90), 6)
    config = yaml.safe_load((stronger / "config.yaml").read_text())
    config["method"]["kappa"] = 16.0
    (stronger / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "r.html"
    code, said, _ = call(tmp_path, "-o", out)
    assert code == 0
    assert f"wrote {out}" in said
    page = Page(out.read_text())
    buttons = [a["data-label"] for a in page.all("button") if "data-label" in a]
    assert buttons == ["rmu, kappa=8.0", "rmu, kappa=16.0", "srmu"]
    assert "srmu 34.0" in page.text
    _, said, _ = call(*reversed(runs), stronger, runs[0], "-o", out, "--json")
    assert json.loads(said) == {"page": str(out), "bytes": out.stat().st_size}
    assert "srmu 34.0" in Page(out.read_text()).text


def test_one_run_under_attack(tmp_path):
    (run,) = seeds_of(tmp_path, count=1)
    write_attacks(run, 0.86)
    page = Page(write_report([run], tmp_path / "r.html").read_text())
    assert "The strongest, benign relearning, found 82 %" in page.text  # 0.86 of 96: 0.8646
    assert "prompts (E12) 41.7" in page.text
    assert "invalid: the oracle recovers, too" in page.text
    assert "K*: the share of the knowledge" in page.text
    assert "gcg no room in forget.jsonl" in page.text
    assert "membership auc loss 0.51 0.98" in page.text
    assert "Relearning by texts: full weights" in page.text
    assert "srmu 34.0 39.2 44.4 86.0" in page.text  # after 0, 5, 10 and 50 texts
    for kind in ("LoRA", "neutral texts, full weights"):
        assert f"Relearning by steps: {kind}" in page.text
    curves = "srmu 34.0 44.4 86.0 original 100.0 100.0 100.0 oracle 26.0 26.0 26.0"
    assert page.text.count(curves) == 2  # after 0, 20 and 100 steps
    assert "Not tried: heavy tuning" in page.text
    assert "suppressed, not attacked" not in page.text


def test_a_floor_of_facts_that_were_never_known(tmp_path):
    """The soft prompt, which an oracle would make invalid, counts above its floor; relearning is under its own."""
    (run,) = seeds_of(tmp_path, count=1)
    write_attacks(run, 0.86)
    report = read_attacks(run)
    before = estimate_recovery(RunGroup("SRMU", "", (run,)))
    report |= {"oracle": False, "unknown": [i // 2 for i in range(50)]}
    report["tasks"]["unknown"] = ["never"]
    for name, entry in report["attacks"].items():
        if "right" in entry:
            taught = 10 if name in ("prompts", "forced_choice") else 45
            control = {"right": "1" * taught + "0" * (50 - taught), "accuracy": interval(taught / 50), "metrics": {}}
            entry["controls"] = {"original": entry["controls"]["original"], "unknown": control}
            entry |= {"valid": None, "floor": max(0.25, taught / 50)}
    keep_rows(run, lambda row: row["when"] != "oracle")
    write_attack_report(run, report)
    found = estimate_recovery(RunGroup("SRMU", "", (run,)))
    assert (before.strongest, before.unknown) == ("benign relearning", 0)
    assert (found.strongest, found.unknown) == ("soft prompt", 25)  # 0.97 above 0.9
    assert found.worst.value == pytest.approx((0.96875 - 0.9) / 0.1, abs=0.02)
    row = found.attacks["prompts"]
    assert row["Never known\ncontrol"].value == 0.2 and "Never known\ncontrol" not in before.attacks["prompts"]
    page = Page(write_report([run], tmp_path / "r.html").read_text())
    assert (
        "Without an oracle the original is also asked, under each attack, 25 facts of the same kind that it never"
        in page.text
    )
    assert "Never known" in page.text and "never known" in page.text
    assert "invalid: the oracle recovers, too" not in page.text


def test_relearning_by_steps_of_several_methods(tmp_path):
    """One picture a kind, a line a method that its label hides, a mean over its seeds."""
    runs = [*seeds_of(tmp_path), *seeds_of(tmp_path, "RMU", 1)]
    for i, run in enumerate(runs):
        write_attacks(run, 0.6 + 0.1 * i if run != runs[-1] else 0.9)
    keep_rows(runs[0], lambda row: not row.get("attack"))  # a seed that was not attacked
    found = [estimate_recovery(RunGroup(label, "", tuple(some))) for label, some in
             (("SRMU", runs[:-1]), ("RMU", runs[-1:]))]  # fmt: skip
    curves = found[0].curves
    own = curves[(curves["unit"] == "steps") & (curves["kind"] == "LoRA") & (curves["whose"] == "")]
    assert own["count"].tolist() == [0, 20, 100]
    assert own["accuracy"].tolist() == pytest.approx([0.34, 0.34 + 0.2 * (0.75 - 0.34), 0.75])
    entries = [RunGroup("SRMU", "", tuple(runs[:-1])), RunGroup("RMU", "", tuple(runs[-1:]))]
    section = attack_section(entries, ["SRMU", "RMU"], found)
    drawn = {block.title: block for block in section.blocks}
    (picture,) = drawn["Relearning by steps: LoRA"].figures
    assert [t.name for t in picture.plot.data] == ["SRMU", "RMU", "original", "oracle"]
    assert [t.legendgroup for t in picture.plot.data] == ["SRMU", "RMU", None, None]
    assert picture.plot.data[1].x == ("0", "20", "100")
    assert picture.plot.data[1].y[-1] == pytest.approx(0.9)
    assert "Relearning by steps: neutral texts, full weights" in drawn
    (shares, _), table = section.blocks[0].figures, section.blocks[1].table
    assert [trace.y for trace in shares.plot.data] == [("SRMU",), ("RMU",)]  # the lowest K* first
    assert [row["Method"] for row in table.rows] == ["SRMU", "RMU"]
    assert "benign relearning" in table.columns


def test_attacks_alone_are_results(tmp_path):
    (run,) = seeds_of(tmp_path, count=1)
    write_attacks(run, 0.86)
    keep_rows(run, lambda row: row.get("attack"))
    text = Page(write_report([run], tmp_path / "r.html").read_text()).text
    assert "After srmu, in one run, the model still answers 34.4 % of the questions on what was to be forgotten" in text
    assert ", of 100.0 % before. Guessing answers 25 %." in text
    assert "general went from 100.0 % to 89.6 %" in text


def test_it_leads_with_what_was_asked_and_lost_and_whether_the_budget_is_kept(tmp_path, call):
    (run,) = seeds_of(tmp_path, count=1)
    write_attacks(run, 0.86)
    keep_rows(run, lambda row: row.get("attack"))
    record = json.loads((run / "record.json").read_text())
    record["purpose"] = {"target": "the cities of Africa", "ticket": "E-17", "reason": "private"}
    (run / "record.json").write_text(json.dumps(record))
    said = {}
    for budget in ("1%", "11%", "60%"):
        call(run, "-o", tmp_path / "r.html", "--budget", budget)
        said[budget] = Page((tmp_path / "r.html").read_text()).text
    assert "To be forgotten: the cities of Africa (E-17)." in said["1%"] and "private" not in said["1%"]
    assert "Of what was to stay, it lost 10.4 points of accuracy (95 % interval 4.2 to 16.7)" in said["1%"]
    assert "The limit was a loss of 1.0 points: not kept (fail)." in said["1%"]
    assert "a loss of 11.0 points: not decided, because the limit lies within the interval." in said["11%"]
    assert "The limit was a loss of 60.0 points: kept (pass)." in said["60%"]
    assert re.search(r"5 of \d+ attacks \(tier: standard\) tried to bring it back", said["1%"])
    assert "was not measured" in said["1%"]  # the price


def test_a_budget_is_for_one_method(tmp_path):
    for name, label in (("one", "RMU"), ("two", "SRMU")):
        one_run(tmp_path / name, label)
    with pytest.raises(SrmuError, match="srmu compare RUN RUN --budget"):
        write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "r.html", budget=0.05)


def test_a_title_speaks_of_no_attack_that_did_not_run(tmp_path):
    (run,) = seeds_of(tmp_path, count=1)
    page = write_report([run], tmp_path / "r.html", forget=METRICS[:1], utility=METRICS[1:])
    assert "<title>srmu: what was forgotten</title>" in page.read_text()


def test_what_else_was_measured_is_in_a_table(tmp_path):
    (run,) = seeds_of(tmp_path, count=1)
    for name, drop in (("before", 0), ("after", 1)):
        tasks = {"virology": 0.3, "law": 0.0}
        found = {f"mmlu_{k}/acc": {"value": 0.6 - v * drop, "n": 100} for k, v in tasks.items()}
        write_metrics(run, **{name: found})
    text = Page(write_report([run], tmp_path / "r.html", forget=METRICS[:1], utility=METRICS[1:]).read_text()).text
    others = text[text.index("Metric Before After") :]
    assert others.index("mmlu virology 60.0") > 0 and "30.0" in others
    assert others.index("mmlu law 60.0") > 0


def test_a_model_that_repeats_itself_is_in_the_headline(tmp_path):
    entries = [one_run(tmp_path / name, label) for name, label in (("one", "RMU"), ("two", "SRMU"))]
    for when, share in (("before", 0.04), ("after", 0.83)):
        write_metrics(entries[0].runs[0], **{when: {"repetition/forget": {"value": share, "n": 16}}})
    text = Page(page_text(entries, tmp_path / "report.html")).text
    says = "after forget prompts the model repeats itself: 83 % of its four-token sequences, 4 % before."
    assert text.count(f"{entries[0].name}: {says}") == text.count("repeats itself") == 1
    assert "repetition forget, RMU 0.04 0.83" in text  # means of shares, without an interval of a share of questions
    assert "repeats itself" not in page_text(entries[1:], tmp_path / "report.html")


def test_a_benchmark_shows_each_model_once():
    """Seeds that started from one model share a row; axes of another scale are not in per cent."""
    suite, _ = find_benchmark("wmdp")

    def measured(value):
        return {c.metric: {"value": value, "stderr": 0.02, "n": 100} for c in suite.columns}

    seeds = [{"wmdp": {"before": measured(0.6), "after": measured(after)}} for after in (0.3, 0.34)]
    section = benchmark_section("wmdp", [(RunGroup("RMU", "", ()), seeds)], ["RMU"])
    (figure,), table = section.blocks[0].figures, section.blocks[1].table
    assert [trace.name for trace in figure.plot.data] == ["Original model", "RMU"]
    assert [trace.x[0] for trace in figure.plot.data] == pytest.approx([60, 32])
    assert figure.plot.data[1].error_x.array[0] == pytest.approx(2)  # of 30 and 34
    assert "RMU: WMDP 32 (30\N{EN DASH}34)" in figure.words
    assert ([row["Model"] for row in table.rows], table.first) == (["Original model", "RMU"], 1)


def test_a_sweep(tmp_path):
    folder = write_sweep(tmp_path / "sweep", runs=True)
    page = Page(write_report([folder], tmp_path / "r.html").read_text())
    assert "15 of 18 trials, each over 2 seeds" in page.text
    assert "failed: diverged at step 3, see forget.jsonl" in page.text
    assert "method.kappa 71.0" in page.text
    front = json.loads((folder / "sweep.json").read_text())["front"]
    assert page.text.count("on the front") >= len(front)
    assert f"{len(front) - 1} of {len(front)} trials on the front were not attacked" in page.text
    single = write_sweep(tmp_path / "single", objectives=1)
    text = Page(write_report([single], tmp_path / "r.html").read_text()).text
    assert "best so far" in text
    assert "on the front " in text


def test_an_automatic_choice(tmp_path):
    folder = write_auto(tmp_path / "auto")
    text = Page(write_report([folder], tmp_path / "r.html").read_text()).text
    assert "at most 1.0% of the utility" in text
    assert "4 62 0.4" in text and "Layer 4 was chosen." in text
    assert "The retain texts use 47% of the forget texts' words." in text
    assert "forgetting 66.0" in text
    assert "The strongest, benign relearning" in text
    found = json.loads((folder / "auto.json").read_text()) | {"run": None, "final": None}
    (folder / "auto.json").write_text(json.dumps(found))
    text = Page(write_report([folder], tmp_path / "r.html").read_text()).text
    assert "Nothing was chosen" in text


def test_a_reproduction(tmp_path):
    folder = write_reproduction(tmp_path / "again")
    text = Page(write_report([folder], tmp_path / "r.html").read_text()).text
    assert "SRMU (ratio) 34.0" in text
    assert "29.2 57.5" in text  # the paper's
    assert "SRMU (difference) diverged" in text
    assert "Of 3 claims, within noise: 2, not tested: 1" in text
    assert "SRMU keeps more than RMU +10.0 -2.0 to +22.0 within noise" in text
    assert "srmu reproduce all" in text
    assert "2 runs missing: shown is what is there." in text
    en = "\N{EN DASH}"
    assert f"SRMU (ratio) 17 x 3 5.0 3.2{en}6.8 54.1 50.0{en}58.2 4.1 -2.0{en}10.0 noise" in text
    assert "Kappa 0 steps K* RMU diverged SRMU (ratio) 8 30.0 0.90" in text
    assert "a short relearning was the only attack" in text


def test_no_page_names_a_private_place(tmp_path):
    runs = seeds_of(tmp_path / "runs", count=2)
    write_attacks(runs[0], 0.8)
    forget = tmp_path / "forget.jsonl"
    forget.write_text(json.dumps({"text": SECRET_TEXT}))
    for run in runs:  # texts that could be read
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace(SECRET_PATH, str(forget)))
    folders = [write_sweep(tmp_path / "s", runs=True), write_auto(tmp_path / "a")]
    for paths in (runs, *([folder] for folder in folders)):
        html = write_report(paths, tmp_path / "r.html").read_text()
        for secret in (SECRET_TEXT, SECRET_HOME, "someone", str(tmp_path)):
            assert secret not in html


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no room in /home/a/b.json, sorry", "no room in b.json, sorry"),
        (r"see C:\Users\a\b.json", "see b.json"),
        ("3/18 trials of HuggingFaceH4/zephyr", "3/18 trials of HuggingFaceH4/zephyr"),
    ],
)
def test_sentences_lose_their_folders(text, left):
    assert strip_paths(text) == left


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "typo", "typo is not a folder"),
        (lambda p: p, "holds no run, sweep or reproduction"),
        (lambda p: (write_sweep(p / "s") / "sweep.json").write_text("{}") and p / "s", "damaged"),
        (lambda p: (write_sweep(p / "s") / "sweep.json").write_text("{") and p / "s", "damaged"),
    ],
)
def test_wrong_folders_are_one_line(tmp_path, make, message, call):
    code, out, said = call(make(tmp_path), "-o", tmp_path / "r.html")
    assert (code, out) == (2, "")
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


def test_a_run_that_nothing_measured_was_attempted(tmp_path):
    """Its page says so and shows what the run itself says; nothing is called suppressed."""
    measured, other = seeds_of(tmp_path, count=2)
    (other / "results.json").unlink()
    record = json.loads((other / "record.json").read_text())
    said = "topic: forget activations moved 1 % of the way: little was learned"
    record["effect"] = {"sentences": [said], "warnings": ["topic: one forget document"]}
    (other / "record.json").write_text(json.dumps(record))
    page = Page(write_report([other], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "attempted; effect not measured" in page.text
    assert said in page.text and "topic: one forget document" in page.text
    assert "suppress" not in page.text.lower()
    both = Page(write_report([measured, other], tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "attempted" not in both.text and "1 run without results left out" in both.text


def test_copies_of_a_run_are_no_seeds(tmp_path):
    run, other = seeds_of(tmp_path, count=2)
    shutil.copytree(run, tmp_path / "copy")
    page = Page(write_report([run, tmp_path / "copy"], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "1 run left out as a copy of another" in page.text and "in one run" in page.text
    page = Page(write_report([run, other], tmp_path / "two.html").read_text(encoding="utf-8"))
    assert "copy of another" not in page.text and "over 2 seeds" in page.text


def test_unclear_metrics_are_asked_for(tmp_path):
    (run,) = seeds_of(tmp_path, count=1)
    keep_rows(run, lambda row: False)
    write_metrics(run, after={"mine/acc": {"value": 0.5, "n": 100}})
    with pytest.raises(SrmuError, match=r"name the metrics that should fall \(forget, --metrics\)"):
        write_report([run], tmp_path / "r.html")
    with pytest.raises(SrmuError, match="no run has the result typo/acc; there are mine/acc"):
        write_report([run], tmp_path / "r.html", forget=["typo/acc"])
    with pytest.raises(SrmuError, match="which has a report of its own"):
        write_report([run, write_auto(tmp_path / "auto")], tmp_path / "r.html")


def test_the_price_of_bringing_knowledge_back(tmp_path):
    """Its sentences stand in the section on attacks, and all trainings found make one curve."""
    run = write_run(tmp_path / "run", "SRMU", "high entanglement", 0, (34, 99, 78))
    write_attacks(run, 0.8)
    results = json.loads((run / "results.json").read_text())
    settings = {f"facts, LoRA 8, 0.0005, {n} steps": {"test": n / 20, "val": 0.5} for n in (5, 10)}
    price = {"share": 0.5, "steps": 7.0, "low": 5.0, "high": 9.0, "tried": 50, "tokens": 900.0, "flop": 1e9}
    results["attacks"]["attacks"]["relearning_steps"] |= {"price": [price]}
    results["attacks"]["attacks"]["tuned_relearning"] = {
        "id": "E20", "status": "done", "why": "", "metrics": {}, "controls": {}, "settings": settings,
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results))
    entry = RunGroup("SRMU", "", (run,))
    section = attack_section([entry], ["SRMU"], [estimate_recovery(entry)])
    (told,) = (block.table for block in section.blocks if block.table and "bring it back" in block.table.caption)
    (row,) = told.rows
    assert row["Price"].startswith("50% of the knowledge is back after 7 steps (95 % interval 5 to 9): 900 tokens")
    (drawn,) = (block for block in section.blocks if block.title == "Relearning by steps: the best training found")
    assert drawn.figures[0].plot.data[0].y[-1] == 0.5
