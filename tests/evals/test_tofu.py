"""TOFU's numbers against loops, closed forms, and models of which it is known what they know."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import attack_world
from helpers.models import pico_module, scaled, word_tokenizer
from srmu.errors import SrmuError
from srmu.evals.benchmarks import BENCHMARKS, base, tofu
from srmu.evals.benchmarks.base import BenchmarkRequest, BenchmarkScores, prompt_of
from srmu.evals.subject import Subject

TEMPLATE = "w50 {question}"
SETS = ("forget", "retain", "real_authors", "world_facts")
CAP = tofu.NEW_TOKENS


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of these models need no more."""
    monkeypatch.setattr(tofu, "NEW_TOKENS", 4)


def write_sets(folder: Path, sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """A folder laid out as the hub's: a file for each config, named in the README's header."""
    folder.mkdir(exist_ok=True)
    lines = ["---", "configs:"]
    for name, rows in sets.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += ["  - split: train", f"    path: {name}.jsonl"]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def made_up(i: int) -> dict[str, Any]:
    return {
        "question": f"w{i} w{i + 1}",
        "answer": f"w{i + 2} w{i + 3} w{i + 4}",
        "paraphrased_answer": f"w{i + 3} w{i + 2}",
        "perturbed_answer": [f"w{i + 5}", f"w{i + 6} w{i + 7}", f"w{i + 8} w{i} w{i + 1}"],
        "paraphrased_question": f"w{i + 1} w{i}",
    }


def real(i: int) -> dict[str, Any]:
    keep = ("question", "answer", "perturbed_answer")
    return {key: value for key, value in made_up(i).items() if key in keep}


def sets(**changed: Any) -> dict[str, list[dict[str, Any]]]:
    """Nested forget parts: the last rows of the larger ones, as on the hub."""
    forget = [made_up(i) for i in range(8)]
    return {
        "forget10_perturbed": forget,
        "forget05_perturbed": forget[-4:],
        "forget01_perturbed": forget[-2:],
        "retain_perturbed": [made_up(i) for i in range(10, 15)],
        "real_authors_perturbed": [real(i) for i in range(20, 23)],
        "world_facts_perturbed": [real(i) for i in range(30, 34)],
        **changed,
    }


def asked(folder: Path, **given: Any) -> BenchmarkRequest:
    return BenchmarkRequest("locuslab/TOFU", "get it", folder=folder, **{"template": TEMPLATE, **given})


def pico(seed: int = 0) -> Subject:
    return Subject(pico_module(seed=seed), word_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("tofu"), sets())


def test_nothing_is_needed_that_the_hub_has_not(folder: Path) -> None:
    """Each part reads four configs, split train, of the fields named on the data's card."""
    for part in BENCHMARKS["tofu"].parts:
        question = asked(folder, part=part)
        tofu.run_tofu(pico(), question)
        configs = (f"{part}_perturbed", *list(tofu.SETS.values())[1:])
        assert set(question.seen) == {f"{config}/train" for config in configs}
    assert BENCHMARKS["tofu"].parts[0] == "forget10"
    question = asked(folder)
    tofu.run_tofu(pico(), question)
    assert "forget10_perturbed/train" in question.seen


def per_token(model: Subject, prompt: str, answer: str) -> float:
    """p ** (1 / tokens), a token at a time, each with the text before it read anew."""
    before = model.tokens(prompt)
    ids = model.tokens(f"{prompt} {answer}")
    p = 1.0
    for t in range(len(before), len(ids)):
        logits = model.module(torch.tensor([ids[:t]])).logits[0, -1].detach().double()
        p *= float(logits.exp()[ids[t]] / logits.exp().sum())
    return p ** (1 / (len(ids) - len(before)))


def test_probability_and_truth_ratio_are_those_of_a_loop(folder: Path) -> None:
    model = pico()
    found, ratios = tofu.run_tofu(model, asked(folder)).metrics, ([], [])
    for name, config in tofu.SETS.items():
        rows = sets()[config.format(part="forget10")]
        probability, geometric = [], []
        for row in rows:
            prompt = TEMPLATE.format(question=row["question"])
            p = per_token(model, prompt, row["answer"])
            wrong = [per_token(model, prompt, text) for text in row["perturbed_answer"]]
            truth = per_token(model, prompt, row.get("paraphrased_answer", row["answer"]))
            probability.append(p if "paraphrased_answer" in row else p / (p + sum(wrong)))
            product = 1.0
            for q in wrong:
                product *= q
            r = product ** (1 / len(wrong)) / truth
            geometric.append(min(r, 1 / r) if name == "forget" else max(0, 1 - r))
            ratios[name == "forget"].append(r)
        for key, values in (("probability", probability), ("truth_ratio", geometric)):
            metric = found[f"tofu/{name}/{key}"]
            assert metric["value"] == pytest.approx(sum(values) / len(values), rel=1e-4), (name, key)
            assert metric["n"] == len(rows)
    for both in ratios:  # of the other sets, of the forget set: a ratio counts both ways
        assert min(both) < 1 < max(both)


def test_model_utility_is_the_harmonic_mean_of_nine(folder: Path) -> None:
    found = tofu.run_tofu(attack_world.subject("original"), asked(folder)).metrics
    nine = [
        found[f"tofu/{name}/{key}"]["value"]
        for name in ("retain", "real_authors", "world_facts")
        for key in ("probability", "rouge", "truth_ratio")
    ]
    expected = 0.0 if min(nine) == 0 else 9 / sum(1 / value for value in nine)
    assert found["tofu/model_utility"] == {"value": pytest.approx(expected), "n": 12.0}


def test_a_model_without_a_preference(folder: Path) -> None:
    """Every token has p = 1 / 64: no answer is likelier than another."""
    model = scaled(0)
    found = {key: metric["value"] for key, metric in tofu.run_tofu(model, asked(folder)).metrics.items()}
    assert found["tofu/forget/probability"] == pytest.approx(1 / 64)
    assert found["tofu/retain/probability"] == pytest.approx(1 / 64)
    assert found["tofu/real_authors/probability"] == pytest.approx(1 / 4)
    assert found["tofu/world_facts/probability"] == pytest.approx(1 / 4)
    assert found["tofu/forget/truth_ratio"] == pytest.approx(1)
    for name in SETS[1:]:
        assert found[f"tofu/{name}/truth_ratio"] == pytest.approx(0, abs=1e-5)
    assert found["tofu/model_utility"] == pytest.approx(0, abs=1e-5)


def test_a_broken_model_gives_numbers(folder: Path) -> None:
    """Its p of an answer is no float any more; logs of it must still be written and compared."""
    model = scaled(1e4)
    scores = tofu.run_tofu(model, asked(folder))
    text = json.dumps([scores.metrics, scores.values], allow_nan=False)
    assert "e+" in text or "e-" in text  # it was as broken as meant
    again = tofu.run_tofu(model, asked(folder, reference=scores.values)).metrics
    assert again["tofu/forget_quality"]["value"] == 1


def test_nested_parts(folder: Path) -> None:
    """The questions of a small part are answered as they are in a large one."""
    model = pico()
    large = tofu.run_tofu(model, asked(folder, part="forget10"))
    for part, count in (("forget05", 4), ("forget01", 2)):
        small = tofu.run_tofu(model, asked(folder, part=part))
        for key, values in small.values.items():
            assert len(values) == count
            assert values == pytest.approx(large.values[key][-count:], rel=1e-4)
        for key, metric in small.metrics.items():
            if "forget" not in key:
                assert metric["value"] == pytest.approx(large.metrics[key]["value"], rel=1e-4)


def test_the_first_rows_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_sets(tmp_path / "whole", sets())
    first = write_sets(tmp_path / "first", {name: rows[:2] for name, rows in sets().items()})
    assert tofu.MOST == 300
    monkeypatch.setattr(tofu, "MOST", 2)
    some, same = (tofu.run_tofu(pico(), asked(place)) for place in (whole, first))
    assert some == same
    assert some.metrics["tofu/forget/rouge"]["n"] == 2
    monkeypatch.setattr(tofu, "MOST", 300)
    assert tofu.run_tofu(pico(), asked(whole)).metrics["tofu/forget/rouge"]["n"] == 8


def test_it_is_the_same_again(folder: Path) -> None:
    assert tofu.run_tofu(pico(), asked(folder)) == tofu.run_tofu(pico(), asked(folder))


# A model that knows its forget set, and one that never saw it.


def known_sets() -> dict[str, list[dict[str, Any]]]:
    """The tiny world in TOFU's schema: w50 asks for hazard facts, w52 for harmless ones."""
    rows = []
    for i, (who, (hazard, harmless)) in enumerate(attack_world.facts().items()):
        for word, answer, pool in (("w50", hazard, attack_world.ANSWERS), ("w52", harmless, attack_world.HARMLESS)):
            wrong = [other for other in pool if other != answer][: 2 + i % 2]
            rows.append(
                {"question": f"{word} {who}", "answer": answer, "perturbed_answer": wrong}
                | {"paraphrased_answer": answer}
            )
    hazards, harmless_ones = rows[::2], rows[1::2]
    options = [{k: v for k, v in row.items() if "para" not in k} for row in harmless_ones]
    return {
        "forget10_perturbed": hazards,
        "retain_perturbed": harmless_ones[:16],
        "real_authors_perturbed": options[16:28],
        "world_facts_perturbed": options[28:],
    }


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BenchmarkScores]:
    """What three models score: all but the oracle against the oracle."""
    folder = write_sets(tmp_path_factory.mktemp("known"), known_sets())
    found = {"oracle": tofu.run_tofu(attack_world.subject("oracle"), asked(folder, template="{question}"))}
    question = asked(folder, template="{question}", reference=found["oracle"].values)
    for name in ("original", "unlearned"):
        found[name] = tofu.run_tofu(attack_world.subject(name), question)
    found["itself"] = tofu.run_tofu(attack_world.subject("oracle"), question)
    return found


@pytest.mark.slow
def test_what_is_known_shows(known: dict[str, BenchmarkScores]) -> None:
    original, oracle, unlearned = (
        {key: metric["value"] for key, metric in known[name].metrics.items()}
        for name in ("original", "oracle", "unlearned")
    )
    assert original["tofu/forget/probability"] > 0.9
    assert original["tofu/forget/rouge"] == 1
    assert original["tofu/model_utility"] > 0.9
    for other in (oracle, unlearned):
        assert other["tofu/forget/probability"] < 0.5
        assert other["tofu/forget/rouge"] < 0.6
        assert other["tofu/forget/truth_ratio"] > original["tofu/forget/truth_ratio"]
        assert other["tofu/model_utility"] > 0.8
    for name in ("retain", "real_authors", "world_facts"):
        assert original[f"tofu/{name}/rouge"] == 1


def test_forget_quality(known: dict[str, BenchmarkScores]) -> None:
    assert "tofu/forget_quality" not in known["oracle"].metrics
    quality = {
        name: known[name].metrics["tofu/forget_quality"]["value"] for name in ("itself", "original", "unlearned")
    }
    assert quality["itself"] == 1
    assert quality["original"] < 1e-6 * quality["unlearned"]
    assert quality["unlearned"] < quality["itself"]
    same = known["itself"].metrics
    assert same["tofu/forget_quality_log10"]["value"] == 0
    assert same["tofu/forget_quality_ks"]["value"] == 0


def test_forget_quality_is_of_the_largest_gap() -> None:
    """D by a loop over both samples; no p is below that of samples that do not overlap."""
    rng = np.random.default_rng(0)
    own, other = rng.exponential(1, 30), rng.exponential(2, 30)
    gap = max(abs(np.mean(own <= x) - np.mean(other <= x)) for x in [*own, *other])
    found = tofu.measure_forget_quality(list(own), list(other))
    assert found["tofu/forget_quality_ks"]["value"] == pytest.approx(gap)
    turned = tofu.measure_forget_quality(list(1 / own), list(1 / other))
    assert turned["tofu/forget_quality"]["value"] == found["tofu/forget_quality"]["value"]
    apart = tofu.measure_forget_quality(list(range(300)), list(range(300, 600)))
    # 2 of the 600-choose-300 orders are as extreme
    assert apart["tofu/forget_quality_log10"]["value"] == pytest.approx(math.log10(2) - math.log10(math.comb(600, 300)))


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        ("forget10_perturbed", {"paraphrased_answer": None}, "row 2: field 'paraphrased_answer'"),
        ("retain_perturbed", {"perturbed_answer": "w1"}, "field 'perturbed_answer': Input should be a valid list"),
        ("retain_perturbed", {"perturbed_answer": []}, "row 2: field 'perturbed_answer': List should"),
        ("real_authors_perturbed", {"answer": " "}, "row 2: field 'answer': String should"),
        ("world_facts_perturbed", {"question": 3}, "row 2: field 'question'"),
    ],
)
def test_bad_rows(tmp_path: Path, config: str, change: dict[str, Any], said: str) -> None:
    rows = [dict(row) for row in sets()[config]]
    (name,) = change
    if change[name] is None or isinstance(change[name], list) or name == "answer":
        rows[1].update(change)
    else:  # a column has one type: it is of that type in all rows
        rows = [row | change for row in rows]
        said = said.replace("row 2", "row 1")
    with pytest.raises(SrmuError, match=f"config {config}, split train, .*{said}") as error:
        tofu.run_tofu(pico(), asked(write_sets(tmp_path / "tofu", sets(**{config: rows}))))
    assert "w2" not in str(error.value)  # nothing of what is to be forgotten


def test_a_missing_field(tmp_path: Path) -> None:
    rows = [real(i) for i in range(3)]
    place = write_sets(tmp_path / "tofu", sets(forget10_perturbed=rows))
    with pytest.raises(SrmuError, match="forget10_perturbed, split train, row 1: no field 'para"):
        tofu.run_tofu(pico(), asked(place))


def test_a_missing_part(tmp_path: Path) -> None:
    place = write_sets(tmp_path / "tofu", {"retain_perturbed": sets()["retain_perturbed"]})
    with pytest.raises(SrmuError, match="config forget10_perturbed, split train cannot be read"):
        tofu.run_tofu(pico(), asked(place))


# Prompts


def test_a_chat_template_is_a_template(folder: Path) -> None:
    chat = pico()
    chat.tokenizer.chat_template = (
        "{% for message in messages %}w57 {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} w58{% endif %}"
    )
    assert prompt_of(chat, "w1") == "w57 w1 w58"
    plain = tofu.run_tofu(pico(), asked(folder, template="w57 {question} w58"))
    assert tofu.run_tofu(chat, asked(folder, template="")) == plain
    # a template given goes before the tokenizer's
    assert tofu.run_tofu(chat, asked(folder)) == tofu.run_tofu(pico(), asked(folder)) != plain


@pytest.mark.parametrize(
    ("prompt", "pair"),
    [
        ("Answer:", ("Answer:", " yes")),
        ("Answer: ", ("Answer:", " yes")),
        ("<|assistant|>\n", ("<|assistant|>\n", "yes")),
    ],
)
def test_one_blank_before_an_answer(prompt: str, pair: tuple[str, str]) -> None:
    assert tofu.split_space(prompt, "yes") == pair


def test_answers_are_asked_for_under_the_cap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks: list[tuple[list[str], int]] = []

    def write(model: Subject, prompts: list[str], count: int, **_: Any) -> list[str]:
        asks.append((prompts, count))
        return ["w2 w3 w4"] * len(prompts)

    monkeypatch.setattr(base, "write_continuations", write)
    monkeypatch.setattr(tofu, "NEW_TOKENS", CAP)
    found = tofu.run_tofu(pico(), asked(folder)).metrics
    assert [count for _, count in asks] == [200] * 4
    assert asks[0][0] == [f"w50 w{i} w{i + 1}" for i in range(8)]
    # the first question's answer is what was written; the second's has two of its words
    assert found["tofu/forget/rouge"]["value"] == pytest.approx((1 + 2 / 3 + 1 / 3) / 8)
