"""What suites share: rows and their errors, greedy answers one by one, likelihoods by a loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.benchmark_sets import edited, greedy, write_sets
from helpers.models import pico_module, texts, word_tokenizer
from srmu.engine.generate import continue_greedily
from srmu.errors import SrmuError
from srmu.evals.benchmarks.base import (
    BenchmarkRequest,
    Text,
    Texts,
    cut_at_stop,
    mean_metric,
    option_likelihoods,
    prompt_of,
    rouge_scores,
    write_continuations,
)
from srmu.evals.subject import Subject

ROWS = [{"text": f"w{i} w{i + 1}", "options": [f"w{i}", "w9"], "answer": i} for i in range(4)]
FIELDS = {"text": Text, "options": Texts, "answer": int}


def local(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS, **given: Any) -> BenchmarkRequest:
    return BenchmarkRequest("a/b", "get it so", folder=write_sets(folder, {("one", "test"): rows}), **given)


def pico(seed: int = 0, **special: Any) -> Subject:
    return Subject(pico_module(seed=seed), word_tokenizer(**special))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_of_a_local_folder(tmp_path: Path, ending: str) -> None:
    sets = {("one", "test"): ROWS, ("one", "dev"): ROWS[:1], ("two", "test"): ROWS[2:]}
    data = BenchmarkRequest("a/b", "", folder=write_sets(tmp_path / "set", sets, ending))
    for (config, split), rows in sets.items():
        assert data.rows(config, split, FIELDS) == rows
    assert [*data.seen] == ["one/test", "one/dev", "two/test"]


def test_a_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    assert local(tmp_path / "set", limit=3).rows("one", "test", FIELDS) == ROWS[:3]


def test_digests_follow_the_rows(tmp_path: Path) -> None:
    def digest(name: str, rows: Sequence[Mapping[str, Any]], **given: Any) -> str:
        data = local(tmp_path / name, rows, **given)
        data.rows("one", "test", {})
        return data.seen["one/test"]

    same = digest("a", ROWS)
    assert digest("b", ROWS) == same
    others = [[*ROWS[:3], {**ROWS[3], "text": "w9"}], ROWS[:3], ROWS[::-1]]
    found = [digest(f"c{i}", rows) for i, rows in enumerate(others)]
    assert len({same, *found, digest("d", ROWS, limit=2)}) == 5


def test_folder_config_and_split_that_are_not_there(tmp_path: Path) -> None:
    data = local(tmp_path / "set")
    missing = BenchmarkRequest("a/b", "get it so", folder=tmp_path / "none")
    for one, config, split in ((missing, "one", "test"), (data, "three", "test"), (data, "one", "train")):
        with pytest.raises(SrmuError) as error:
            one.rows(config, split, FIELDS)
        said = str(error.value)
        assert f"{one.folder}, config {config}, split {split} cannot be read" in said
        assert said.endswith("get it so") and "\n" not in said


@pytest.mark.parametrize(
    ("changed", "field", "said"),
    [
        ({"text": 3}, "text", "Input should be a valid string"),
        ({"text": None}, "text", "Input should be a valid string"),
        ({"text": "  "}, "text", "String should have at least 1 character"),
        ({"options": []}, "options", "List should have at least 1 item after validation, not 0"),
        ({"options": [1, 2]}, "options", "Input should be a valid string"),
        ({"options": ["w1", ""]}, "options", "String should have at least 1 character"),
        ({"options": "w1"}, "options", "Input should be a valid list"),
        ({"answer": "w1"}, "answer", "Input should be a valid integer"),
        ({"answer": 0.5}, "answer", "Input should be a valid integer"),
        ({"answer": True}, "answer", "Input should be a valid integer"),
    ],
)
def test_bad_fields(tmp_path: Path, changed: dict[str, Any], field: str, said: str) -> None:
    """All rows the same, as a column holds one type."""
    rows = [{**row, **changed} for row in ROWS]
    data = local(tmp_path / "set", rows)
    with pytest.raises(SrmuError) as error:
        data.rows("one", "test", FIELDS)
    place = f"{data.folder}, config one, split test, row 1: field {field!r}: "
    assert str(error.value) == place + said


def test_the_row_that_is_wrong(tmp_path: Path) -> None:
    data = local(tmp_path / "set", [*ROWS[:2], {**ROWS[2], "text": ""}])
    with pytest.raises(SrmuError, match="row 3: field 'text': String should have"):
        data.rows("one", "test", FIELDS)
    with pytest.raises(SrmuError, match="row 1: no field 'other'; it has text, options, answer"):
        data.rows("one", "test", {"other": Text})


@pytest.mark.parametrize("special", [{}, {"pad_token": "w59"}, {"pad_token": "</s>"}])
def test_a_padded_batch_is_as_one_by_one(special: dict[str, str]) -> None:
    """Prompts of 5 to 12 words, more than one batch of them."""
    model = pico(**special)
    prompts = texts(40, seed=3)
    said = write_continuations(model, prompts, 6)
    assert said == [greedy(model, prompt, 6) for prompt in prompts]
    assert len(set(said)) > 5


def test_answers_end_with_the_text_and_with_the_cap() -> None:
    model = pico()
    prompts = texts(30, seed=4)
    with torch.no_grad():  # the end of the text becomes likely
        model.module.lm_head.weight[2] *= 3
    rows = [model.tokens(prompt) for prompt in prompts]
    made = continue_greedily(model.module, model.tokenizer, rows, 10)
    said = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]
    assert said == [greedy(model, prompt, 10) for prompt in prompts]
    lengths = {len(ids) for ids in made}
    assert max(lengths) <= 10 and len(lengths) > 1
    assert not any(2 in ids for ids in made)
    # what its generation config calls an end is one as well
    often = max({token for ids in made for token in ids})
    model.module.generation_config.eos_token_id = [2, often]
    again = continue_greedily(model.module, model.tokenizer, rows, 10)
    assert not any(often in ids for ids in again)


def test_cut() -> None:
    assert cut_at_stop(" one\ntwo three ", ("three", "\n")) == "one"
    assert cut_at_stop("one two", ("\n",)) == "one two"
    assert cut_at_stop("\none", ("\n",)) == ""
    model = pico()
    (prompt,) = texts(1, seed=5)
    whole = write_continuations(model, [prompt], 8)[0].split()
    stop = next(word for word in whole if word != whole[0])
    kept = " ".join(whole).partition(stop)[0].strip()
    assert write_continuations(model, [prompt], 8, stops=(stop,)) == [kept]


def test_a_prompt_that_is_too_long_loses_its_first_tokens() -> None:
    """The model reads 64 tokens: 54 of a prompt where 10 are to come."""
    model = pico()
    words = " ".join(texts(12, seed=6)).split()[:80]
    last = [model.tokenizer.convert_tokens_to_ids(word) for word in words[-54:]]
    expected = model.tokenizer.decode(
        continue_greedily(model.module, model.tokenizer, [last], 10)[0], skip_special_tokens=True
    )
    assert write_continuations(model, [" ".join(words)], 10) == [expected.strip()]


def test_half_of_what_a_model_reads_is_for_the_prompt() -> None:
    model = pico()
    (prompt,) = texts(1, seed=5)
    assert len({write_continuations(model, [prompt], count)[0] for count in (32, 64, 65, 128)}) == 1


def test_the_checkpoints_own_settings_of_generation_do_not_count() -> None:
    model, prompts = pico(), texts(3, seed=4)
    plain = write_continuations(model, prompts, 12)
    model.module.generation_config.repetition_penalty = 1.7
    assert write_continuations(model, prompts, 12) == plain


def test_empty_answers() -> None:
    """Of the original all empty is an error; of an edited model it is a result."""
    module = pico_module()
    module.lm_head.bias = torch.nn.Parameter(torch.eye(64)[2] * 1e4)  # it ends at once
    prompts = texts(3, seed=7)
    assert write_continuations(edited(module), prompts, 5) == ["", "", ""]
    with pytest.raises(SrmuError, match="my answers: the model wrote nothing after any of 3"):
        write_continuations(Subject(module, word_tokenizer()), prompts, 5, label="my answers")
    assert write_continuations(Subject(module, word_tokenizer()), [], 5) == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_log_likelihoods_are_those_of_a_loop(name: str) -> None:
    model = Subject(pico_module(name), word_tokenizer())
    rows = texts(9, seed=8)
    pairs = [(" ".join(row.split()[:3]), " " + " ".join(row.split()[3:])) for row in rows]
    found = option_likelihoods(model, [(prompt, [answer]) for prompt, answer in pairs], "odds")
    for (prompt, answer), ((logp, count),) in zip(pairs, found, strict=True):
        before, ids = model.tokens(prompt), model.tokens(prompt + answer)
        with torch.no_grad():
            logs = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
        naive = sum(float(logs[i - 1, ids[i]]) for i in range(len(before), len(ids)))
        assert count == len(ids) - len(before) == len(answer.split())
        assert logp == pytest.approx(naive, abs=1e-4)


def test_a_model_that_is_not_a_number() -> None:
    module = pico_module()
    with torch.no_grad():
        module.lm_head.weight.fill_(float("nan"))
    with pytest.raises(SrmuError, match=r"odds: the model's output is not a number \(NaN\)"):
        option_likelihoods(Subject(module, word_tokenizer()), [("w1", [" w2"])], "odds")


def test_mean() -> None:
    values = np.random.default_rng(0).normal(size=17)
    found = mean_metric([*values])
    assert found["n"] == 17
    assert found["value"] == pytest.approx(values.mean())
    assert found["stderr"] == pytest.approx(values.std(ddof=1) / np.sqrt(17))
    assert mean_metric([3.0]) == {"value": 3.0, "n": 1.0}


def test_rouge() -> None:
    truth = "the cat sat on the mat"
    assert rouge_scores("recall", [truth, "dog", "", f"well {truth} now"], [truth] * 4) == [1, 0, 0, 1]
    # three of four words said are three of the six in their order: P 3/4, R 3/6, F 2PR/(P+R) = .6
    said = ["cat sat a mat"]
    assert rouge_scores("recall", said, [truth]) == [pytest.approx(0.5)]
    assert rouge_scores("fmeasure", said, [truth]) == [pytest.approx(0.6)]


def test_prompt_of() -> None:
    model = pico()
    assert prompt_of(model, "why {x}?") == "Question: why {x}?\nAnswer:"
    assert prompt_of(model, "why {x}?", "Q {question} A") == "Q why {x}? A"
    turn = "{% for m in messages %}{{ bos_token }}w1 {{ m.content }} w2{% endfor %}"
    model.tokenizer.chat_template = turn + "{% if add_generation_prompt %} w3{% endif %}"
    assert prompt_of(model, "w4") == "w1 w4 w2 w3"  # the tokenizer puts its <s> there
    assert prompt_of(model, "w4", "{question}") == "w4"
