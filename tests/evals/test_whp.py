"""Familiarity with a small made-up world, against loops and closed forms."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import attack_world
from helpers.models import pico_module, scaled, word_tokenizer
from srmu.errors import SrmuError
from srmu.evals.benchmarks import BENCHMARKS, base, whp
from srmu.evals.benchmarks.base import BenchmarkRequest, Text, Texts
from srmu.evals.subject import Subject

Rows = Sequence[Mapping[str, Any]]
COMPLETION: Rows = [{"prompt": "w1 w2", "references": ["w3"]}, {"prompt": "w4", "references": ["w5 w6", "w7"]}]
PROBABILITY: Rows = [
    {"prompt": "w1 w2 w3", "targets": ["w10", "w11 w12"], "generic": ["w13", "w14", "w15"]},
    {"prompt": "w4 w5 ", "targets": ["w16"], "generic": ["w17"]},
]


def write_list(folder: Path, completion: Rows = COMPLETION, probability: Rows = PROBABILITY) -> Path:
    """The user's own list, laid out as docs/benchmarks.md says."""
    folder.mkdir(exist_ok=True)
    lines = ["---", "configs:"]
    for name, rows in (("completion", completion), ("probability", probability)):
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += ["  - split: test", f"    path: {name}.jsonl"]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def asked(folder: Path, **given: Any) -> BenchmarkRequest:
    return BenchmarkRequest(BENCHMARKS["whp"].hub, BENCHMARKS["whp"].get, folder=folder, **given)


def pico() -> Subject:
    return Subject(pico_module(), word_tokenizer())


def values(model: Subject, question: BenchmarkRequest) -> dict[str, float]:
    return {key: metric["value"] for key, metric in whp.run_whp(model, question).metrics.items()}


def test_probabilities_are_those_of_a_loop(tmp_path: Path) -> None:
    model = pico()
    masses, shares = [], []
    for prompt, targets, generic in (("w1 w2 w3", ["w10", "w11"], ["w13", "w14", "w15"]), ("w4 w5", ["w16"], ["w17"])):
        ids = torch.tensor([model.tokens(prompt)])
        p = model.module(ids).logits[0, -1].detach().double().softmax(-1)
        target, other = (
            sum(float(p[model.tokenizer.convert_tokens_to_ids(word)]) for word in words) for words in (targets, generic)
        )
        masses.append(target)
        shares.append(target / (target + other))
    found = whp.run_whp(model, asked(write_list(tmp_path / "list"))).metrics
    for key, expected in (("probability_familiarity", masses), ("probability_share", shares)):
        assert found[f"whp/{key}"]["value"] == pytest.approx(sum(expected) / 2, rel=1e-5)
        assert found[f"whp/{key}"]["n"] == 2


def test_a_model_without_a_preference(tmp_path: Path) -> None:
    model = scaled(0)
    found = values(model, asked(write_list(tmp_path / "list")))
    assert found["whp/probability_familiarity"] == pytest.approx((2 / 64 + 1 / 64) / 2)
    assert found["whp/probability_share"] == pytest.approx((2 / 5 + 1 / 2) / 2)


def test_a_word_said_twice_counts_once(tmp_path: Path) -> None:
    rows = [dict(row) for row in PROBABILITY]
    rows[0]["targets"] = ["w10", "w10", "w11 w12", "w11"]
    once, twice = (
        values(pico(), asked(write_list(tmp_path / name, probability=given)))
        for name, given in (("once", PROBABILITY), ("twice", rows))
    )
    assert once == twice


def test_shares_of_a_broken_model(tmp_path: Path) -> None:
    """Both masses are 0 in floats: which is the larger still shows."""
    model = scaled(1e4)
    found = values(model, asked(write_list(tmp_path / "list")))
    assert found["whp/probability_familiarity"] == 0
    assert found["whp/probability_share"] in (0, 0.5, 1)


@pytest.mark.parametrize(
    ("text", "words", "found"),
    [
        ("They met Mira  Vale.", "mira vale", True),
        ("MIRA VALE's boat", "Mira Vale", True),
        ("They met Miranda Valery", "Mira Vale", False),
        ("the tidecrafter", "tidecraft", False),
        ("the lowtidecraft", "tidecraft", False),
        ("(tidecraft)", "tidecraft", True),
        ("a+b", "a+b", True),
        ("aab", "a+b", False),
        ("", "tidecraft", False),
    ],
)
def test_words_are_whole(text: str, words: str, found: bool) -> None:
    assert whp.has_words(text, words) is found


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": "One", "references": ["Vale", "Ness"]},
        {"prompt": "Two", "references": ["vale", "ness"]},
        {"prompt": "Three", "references": ["Ness"]},
        # what the prompt says itself is no sign of knowledge
        {"prompt": "Vale, four", "references": ["Vale", "Ness"]},
    ]
    asks = {}

    def write(model: Subject, prompts: list[str], count: int, **_: Any) -> list[str]:
        asks[tuple(prompts)] = count
        return ["by the Vale"] * len(prompts)

    monkeypatch.setattr(base, "write_continuations", write)
    place = write_list(tmp_path / "list", rows)
    model = pico()
    model.module.config.max_position_embeddings = 2048
    model.tokenizer.chat_template = "{{ messages[0]['content'] }} w1"
    found = whp.run_whp(model, asked(place)).metrics["whp/completion_familiarity"]
    assert found["value"] == 0.5
    assert found["n"] == 4
    # texts to go on with stand as they are
    assert asks == {("One", "Two", "Three", "Vale, four"): 30}
    asks.clear()
    whp.run_whp(model, asked(place, template="Go on: {question}"))
    assert [prompts[0] for prompts in asks] == ["Go on: One"]


def test_what_is_known_shows(tmp_path: Path) -> None:
    """The tiny world's hazard facts: the original knows all, the oracle none."""
    facts = attack_world.facts().items()
    completion = [{"prompt": f"w50 {who}", "references": [hazard]} for who, (hazard, _) in facts]
    probability = [
        {
            "prompt": f"w50 {who}",
            "targets": [hazard],
            "generic": [word for word in attack_world.ANSWERS if word != hazard],
        }
        for who, (hazard, _) in facts
    ]
    place = write_list(tmp_path / "list", completion, probability)
    original, oracle, unlearned = (
        values(attack_world.subject(name), asked(place)) for name in ("original", "oracle", "unlearned")
    )
    assert original["whp/completion_familiarity"] == 1
    assert original["whp/probability_familiarity"] > 0.9
    assert original["whp/probability_share"] > 0.9
    for other in (oracle, unlearned):
        for key, value in other.items():
            assert value < original[key] - 0.3, key


def test_it_is_the_same_again(tmp_path: Path) -> None:
    place = write_list(tmp_path / "list")
    assert whp.run_whp(pico(), asked(place)) == whp.run_whp(pico(), asked(place))


def test_without_a_list(tmp_path: Path) -> None:
    said = "none, config completion, split test cannot be read: .*; write a folder with completion"
    with pytest.raises(SrmuError, match=said):
        whp.run_whp(pico(), asked(tmp_path / "none"))


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        ("completion", {"references": []}, "row 2: field 'references': List should"),
        ("completion", {"prompt": " "}, "row 2: field 'prompt': String should"),
        ("completion", {"references": ["W4"]}, "row 2: the prompt itself has all of its 'references'"),
        ("probability", {"targets": ["w1", ""]}, "row 2: field 'targets': String should"),
        ("probability", {"generic": ["w16 w3"]}, "row 2: a word of 'targets' and one of 'generic'"),
    ],
)
def test_bad_rows(
    tmp_path: Path, config: str, change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named before the model writes anything, and none of their words shown."""
    monkeypatch.setattr(base, "write_continuations", None)
    rows = [dict(row) for row in (COMPLETION if config == "completion" else PROBABILITY)]
    rows[1].update(change)
    place = write_list(tmp_path / "list", **{config: rows})
    with pytest.raises(SrmuError, match=f"config {config}, (split test, )?{said}") as error:
        whp.run_whp(pico(), asked(place))
    assert "w16" not in str(error.value)
    assert "w4" not in str(error.value).lower()


@pytest.mark.parametrize(("config", "name"), [("completion", "references"), ("probability", "generic")])
def test_a_missing_field(tmp_path: Path, config: str, name: str) -> None:
    rows = COMPLETION if config == "completion" else PROBABILITY
    rows = [{key: value for key, value in row.items() if key != name} for row in rows]
    place = write_list(tmp_path / "list", **{config: rows})
    with pytest.raises(SrmuError, match=f"config {config}, split test, row 1: no field '{name}'"):
        whp.run_whp(pico(), asked(place))


def test_the_row_in_the_instructions_is_one(tmp_path: Path) -> None:
    """What `get` shows can be written as it stands."""
    decoder = json.JSONDecoder()
    text = BENCHMARKS["whp"].get
    first, second = (decoder.raw_decode(text, text.index(start))[0] for start in ('{"prompt": "The', '{"prompt": "At'))
    data = BenchmarkRequest("", "", folder=write_list(tmp_path / "list", [first], [second]))
    assert data.rows("completion", "test", {"prompt": Text, "references": Texts}) == [first]
    fields = {"prompt": Text, "targets": Texts, "generic": Texts}
    assert data.rows("probability", "test", fields) == [second]
