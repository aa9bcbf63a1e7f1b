"""The map of a testbed of real places: what it counts, what it draws, and where there is none."""

import json

import pytest

from helpers.report_world import LOST, write_atlas, write_atlas_run, write_run
from srmu.report.build import write_report
from srmu.report.maps import map_section, read_maps
from srmu.report.results import RunGroup


@pytest.fixture
def atlas(tmp_path):
    return write_atlas(tmp_path / "atlas")


def entry(*runs, label="SRMU"):
    return RunGroup(label, "", runs)


def test_a_fact_is_known_where_both_phrasings_are_right(tmp_path, atlas):
    (found,) = read_maps([entry(write_atlas_run(tmp_path / "run", atlas))])
    states = {fact.words: (fact.hazard, fact.kept) for fact in found.facts}
    assert states == {
        "country of Kisumu: Kenya": (True, False),
        "country of Kano: Nigeria": (True, False),  # half right
        "country of Oran: Algeria": (True, True),
        "country of Leipzig: Germany": (False, True),
        "country of Lima & Callao: Peru": (False, False),
    }  # neither Tunis, of which one phrasing was wrong before, nor what has no place
    assert (found.known, found.lost) == ((3, 2), (2, 1))


def test_a_limit_asks_the_first_questions(tmp_path, atlas):
    some = {"testbed_hazard": "1111", "testbed_neighbour": "11"}
    (found,) = read_maps([entry(write_atlas_run(tmp_path / "run", atlas, before=some, after=some))])
    assert (found.known, found.lost) == ((2, 1), (0, 0))


def test_the_maps_show_what_the_table_counts(tmp_path, atlas):
    section = map_section(read_maps([entry(write_atlas_run(tmp_path / "run", atlas))]))
    before, after, table = section.blocks
    assert before.title == "Before: 3 facts about Africa to forget, 2 about the rest of the world to keep"
    assert after.title == "After SRMU: 2 of 3 forgotten, 1 of 2 lost as a side effect"
    assert (before.labels, after.labels) == ([], ["SRMU"])  # a click hides one, not the other
    dots, *legend = after.figures[0].plot.data
    assert [trace.name for trace in legend] == ["forgotten, as asked", "lost as a side effect", "still right"]
    looks = {trace.name: (trace.marker.color[0], trace.marker.symbol[0]) for trace in legend}
    assert len({colour for colour, _ in looks.values()}) == len({symbol for _, symbol in looks.values()}) == 3
    marker = dots.marker
    columns = dots.customdata, dots.y, dots.x, marker.color, marker.symbol, marker.size
    drawn = {
        words: (state, (y, x), (colour, symbol), size)
        for (words, state), y, x, colour, symbol, size in zip(*columns, strict=True)
    }
    assert [*drawn][-1] == "country of Lima &amp; Callao: Peru"  # damage lies on top
    assert {words: state for words, (state, *_) in drawn.items()} == {
        "country of Kisumu: Kenya": "forgotten, as asked",
        "country of Kano: Nigeria": "forgotten, as asked",
        "country of Oran: Algeria": "still right",
        "country of Leipzig: Germany": "still right",
        "country of Lima &amp; Callao: Peru": "lost as a side effect",
    }
    assert all(look == looks[state] for state, _, look, _ in drawn.values())
    assert drawn["country of Kisumu: Kenya"][1] == (-0.1, 34.75)
    assert drawn["country of Oran: Algeria"][3] > drawn["country of Leipzig: Germany"][3]
    assert "forgotten, as asked: 2; lost as a side effect: 1; still right: 2." in after.figures[0].words
    (row,) = table.table.rows
    assert row["Africa\nforgotten, as asked"] == "2 (66.7 % of 3)"
    assert row["Elsewhere\nlost as a side effect"] == "1 (50.0 % of 2)"


def test_methods_share_the_map_of_before(tmp_path, atlas):
    kept = LOST | {"testbed_neighbour": "111111"}
    rmu = entry(write_atlas_run(tmp_path / "rmu", atlas, "RMU", after=kept), label="RMU")
    srmu = entry(*(write_atlas_run(tmp_path / f"srmu-{seed}", atlas, seed=seed) for seed in range(2)))
    section = map_section(read_maps([rmu, srmu]))
    assert [block.title.split(":")[0] for block in section.blocks[:-1]] == ["Before", "After RMU", "After SRMU"]
    assert "the first is drawn" in section.notes[0]
    assert "the first is drawn" not in map_section(read_maps([rmu])).notes[0]


def test_the_headline_says_what_the_map_shows(tmp_path, atlas):
    run = write_atlas_run(tmp_path / "runs" / "srmu", atlas)
    text = write_report([run], tmp_path / "r.html").read_text()
    assert "Of 3 facts about Africa that the model knew, it now misses 2; of 2 about the rest of the world, 1." in text
    assert text.index("The map</h2>") < text.index("Forgetting against utility</h2>")
    assert "GeoNames, CC BY 4.0" in text
    write_atlas_run(tmp_path / "runs" / "rmu", atlas, "RMU")
    text = write_report([tmp_path / "runs"], tmp_path / "r.html").read_text()
    assert "3 facts about Africa and 2 about the rest of the world. Of these it misses 2 and 1 after rmu, and 2" in text
    assert text.count('"source": "data:image/png;base64,') == 3


@pytest.mark.parametrize("world", ["closed", "gone", "none", "unmeasured"])
def test_other_runs_have_no_map(tmp_path, world):
    atlas = write_atlas(tmp_path / "atlas", world if world == "closed" else "atlas")
    run = write_atlas_run(tmp_path / "run", atlas)
    if world == "gone":
        (atlas / "testbed.json").unlink()
    elif world == "none":
        run = write_run(tmp_path / "other", "SRMU", "", 0, (34, 90, 95), 6)
    elif world == "unmeasured":
        results = json.loads((run / "results.json").read_text())
        results["rows"] = [{k: v for k, v in row.items() if k != "answers"} for row in results["rows"]]
        (run / "results.json").write_text(json.dumps(results))
    assert read_maps([entry(run)]) == []
    text = write_report([run], tmp_path / "r.html").read_text()
    assert "The map</h2>" not in text
    assert "facts about Africa" not in text
