"""Readers, tokens and batches."""

import csv
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import VOCABULARY, texts, word_tokenizer, write_jsonl
from srmu.data import (
    Source,
    Topic,
    batch_up,
    digest,
    load_topic,
    own_key,
    pad_id,
    read,
    read_counted,
    tokenise,
)  # fmt: skip
from srmu.errors import UserError

ROWS = ["one two", "three\nfour, five", 'six "seven"', "  eight\t"]


def write_csv(path: Path, rows: list[str], column: str = "text") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([["id", column], *([i, row] for i, row in enumerate(rows))])


def write_parquet(path: Path, rows: list[str], column: str = "text") -> None:
    table = pyarrow.table({"id": range(len(rows)), column: rows})
    pyarrow.parquet.write_table(table, path)


def write_json_rows(path: Path, rows: list[str], column: str = "text") -> None:
    path.write_text(json.dumps([{"id": i, column: row} for i, row in enumerate(rows)]))


def write_lines(path: Path, rows: list[str], column: str = "text") -> None:
    """Objects and plain strings in turn, as UTF-8 and escaped in turn."""
    lines = [
        json.dumps({column: row} if i % 2 else row, ensure_ascii=i % 3 == 0) + "\n"
        for i, row in enumerate(rows)
    ]
    path.write_text("".join(lines), encoding="utf-8")


WRITERS: dict[str, Callable[..., None]] = {
    "jsonl": write_lines,
    "json": write_json_rows,
    "csv": write_csv,
    "parquet": write_parquet,
}


def load(path: Path | str, **options: Any) -> list[str]:
    return read([Source(path=str(path), **options)], Path())


# --- files


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("column", ["text", "body"])
def test_formats(suffix: str, column: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    WRITERS[suffix](path, ROWS, column)
    assert load(path, column=column) == ROWS


@pytest.mark.parametrize("suffix", WRITERS)
def test_any_texts_survive_a_round_trip(
    suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("round") / f"rows.{suffix}"

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1))
    def check(rows: list[str]) -> None:
        WRITERS[suffix](path, rows)
        assert load(path) == rows

    check()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("\none\ntwo", ["one", "two"]),
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("one\n\n\n\ntwo", ["one", "two"]),
        ("one\r\n\r\ntwo\r\n", ["one", "two"]),
    ],
)
def test_txt_is_lines_or_paragraphs(text: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert [t.strip() for t in load(path)] == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "one"}\n\n"two"\n'),
        ("a.json", '["one",\n "two"]'),
        ("a.csv", "text\none\ntwo\n"),
        ("a.txt", "one\ntwo\n"),
        ("A.TXT", "one\ntwo\n"),
    ],
)
def test_byte_order_mark_and_crlf_are_accepted(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load(tmp_path / name) == ["one", "two"]


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    long = "word " * 40_000
    write_csv(tmp_path / "a.csv", [long])
    assert load(tmp_path / "a.csv") == [long]


def test_globs_are_sorted_and_sources_keep_their_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"text {name}"])
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "d.jsonl", ["text d"])
    both = [Source(path="b.jsonl"), Source(path="[a-b].jsonl")]
    assert read(both, tmp_path) == ["text b", "text a", "text b"]
    assert read([Source(path="c[1].jsonl")], tmp_path) == ["text c[1]"]
    assert read([Source(path="**/d.jsonl")], tmp_path) == ["text d"]


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `load_dataset` was called with; it gives four rows."""
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return datasets.Dataset.from_dict({"body": ["one", "", "  ", "two"], "n": [1, 2, 3, 4]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_ids(hub: list[Any]) -> None:
    source = Source(
        dataset="owner/set", name="part", split="test[:4]", column="body", revision="abc"
    )
    assert read([source], Path()) == ["one", "two"]  # blank rows are left out
    assert hub == [(("owner/set", "part"), {"split": "test[:4]", "revision": "abc"})]


def test_hub_columns(hub: list[Any]) -> None:
    with pytest.raises(UserError, match="no column 'text'; found body, n"):
        read([Source(dataset="owner/set")], Path())
    with pytest.raises(UserError, match="owner/set row 1: 'n' is int"):
        read([Source(dataset="owner/set", column="n")], Path())


@pytest.mark.parametrize(
    "options",
    [{}, {"path": "a", "dataset": "b"}, {"path": "a", "name": "b"}, {"path": "a", "revision": "b"},
     {"path": "a", "split": "test"}],
)  # fmt: skip
def test_a_source_is_files_or_a_data_set(options: dict[str, str]) -> None:
    with pytest.raises(UserError):
        Source(**options)


# --- tokens and batches


def test_tokenise_cuts_and_leaves_short_texts_out() -> None:
    rows = tokenise(["w0 w1 w2 w3", "w0", "w1 </s>", "w1 w2"], word_tokenizer(), 3)
    assert rows == [[1, 4, 5], [1, 5, 6]]  # <s> counts for the length, not for the words


MASK = {
    "input_ids": [[1, 4, 5, 6], [1, 7, 8, 0]],
    "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
    "labels": [[1, 4, 5, 6], [1, 7, 8, -100]],
}
COUNT = {
    "input_ids": [[1, 4, 5, 6], [0, 1, 7, 8]],
    "attention_mask": [[1, 1, 1, 1], [0, 1, 1, 1]],
    "labels": [[1, 4, 5, 6], [0, 1, 7, 8]],
}


@pytest.mark.parametrize(("padding", "expected"), [("mask", MASK), ("count", COUNT)])
def test_batches_by_hand(padding: Any, expected: dict[str, Any]) -> None:
    tokenizer = word_tokenizer()
    rows = tokenise(["w0 w1 w2", "w3 w4", "w5 w6"], tokenizer, 64)
    first, second = batch_up(rows, tokenizer, 2, padding)
    assert {name: tensor.tolist() for name, tensor in first.items()} == expected
    assert second["input_ids"].tolist() == [[1, 9, 10]]


def test_padding_falls_back_on_eos() -> None:
    assert pad_id(word_tokenizer()) == 0
    assert pad_id(word_tokenizer(pad_token=None)) == 2
    with pytest.raises(UserError, match="neither a pad nor an eos token"):
        pad_id(word_tokenizer(pad_token=None, eos_token=None))


# --- the digest


def test_the_digest_is_keyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = digest(["ab", "c"])
    assert digest(iter(["ab", "c"])) == first
    assert digest(["a", "bc"]) != first
    key = Path(os.environ["SRMU_CACHE"]) / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "other"))
    assert digest(["ab", "c"]) != first
    (tmp_path / "other" / "key").write_bytes(key.read_bytes())
    assert digest(["ab", "c"]) == first


# --- topics


def topic(folder: Path, **options: Any) -> Topic:
    write_jsonl(folder / "f.jsonl", [*texts(9, 1, range(30)), "w1"])
    write_jsonl(folder / "r.jsonl", texts(5, 2, range(20, 60)))
    given: dict[str, Any] = {
        "base": folder, "batch_size": 4, "max_length": 64, "retain_max_length": 4,
        "shuffle": True, "padding": "mask", "seed": 0, "options": {"alpha": 3.0},
    }  # fmt: skip
    sources = [Source(path="f.jsonl")], [Source(path="r.jsonl")]
    return load_topic("bio", *sources, word_tokenizer(), **given | options)


def documents(loaded: Topic) -> list[list[int]]:
    return [row[row > 0].tolist() for batch in loaded.forget for row in batch["input_ids"]]


def test_load_topic(tmp_path: Path) -> None:
    loaded = topic(tmp_path)
    assert [len(b["input_ids"]) for b in loaded.forget] == [4, 4, 1]
    assert [b["input_ids"].shape for b in loaded.retain] == [(4, 4), (1, 4)]
    assert loaded.options == {"alpha": 3.0}
    assert loaded.vocabulary.tolist() == list(range(4, VOCABULARY))
    forget, retain = loaded.counts["forget"], loaded.counts["retain"]
    assert (forget["documents"], forget["too_short"]) == (9, 1)
    assert forget["tokens"] == sum(map(len, documents(loaded)))
    assert (retain["documents"], retain["too_short"], retain["tokens"]) == (5, 0, 20)
    assert forget["digest"] == digest([*texts(9, 1, range(30)), "w1"])
    pairs = loaded.pairs()
    taken = [next(pairs) for _ in range(4)]
    assert taken[0][0] is taken[3][0]  # three forget batches, two retain batches: each starts again
    assert taken[0][1] is taken[2][1]


def test_order_of_documents(tmp_path: Path) -> None:
    in_file = tokenise(texts(9, 1, range(30)), word_tokenizer(), 64)
    assert documents(topic(tmp_path, shuffle=False)) == in_file
    shuffled = documents(topic(tmp_path))
    assert shuffled != in_file
    assert sorted(shuffled) == sorted(in_file)
    torch.manual_seed(5)  # no global state
    assert documents(topic(tmp_path)) == shuffled
    assert documents(topic(tmp_path, seed=1)) != shuffled


def test_processes_that_race_get_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    first = own_key()
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as a process that looked too early
    assert own_key() == first


def test_retain_texts_may_be_left_out(tmp_path: Path) -> None:
    """A topic without them gives empty batches beside those to forget."""
    write_jsonl(tmp_path / "f.jsonl", texts(3, 1))
    given: dict[str, Any] = {
        "base": tmp_path, "batch_size": 2, "max_length": 64, "retain_max_length": 64,
        "shuffle": True, "padding": "mask", "seed": 0, "options": {},
    }  # fmt: skip
    source = [Source(path="f.jsonl")]
    loaded = load_topic("bio", source, [], word_tokenizer(), **given)
    assert len(loaded.forget) == 2 and loaded.retain == []
    counts = loaded.counts["retain"]
    assert (counts["documents"], counts["too_short"], counts["tokens"]) == (0, 0, 0)
    pairs = loaded.pairs()
    taken = [next(pairs) for _ in range(3)]
    assert [retain for _, retain in taken] == [{}, {}, {}]
    assert taken[0][0] is taken[2][0]
    write_jsonl(tmp_path / "r.jsonl", texts(3, 2))
    beside = load_topic("bio", source, [Source(path="r.jsonl")], word_tokenizer(), **given)
    assert documents(beside) == documents(loaded)  # the order to forget in is the same
    with pytest.raises(UserError, match=r"topic bio: no forget texts; name topics\.bio\.forget"):
        load_topic("bio", [], source, word_tokenizer(), **given)


def test_retain_texts_that_are_named_must_hold_some(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "f.jsonl", texts(3, 1))
    (tmp_path / "r.jsonl").write_text('"w1"\n')
    sources = [Source(path="f.jsonl")], [Source(path="r.jsonl")]
    with pytest.raises(UserError, match="all 1 retain texts are too short"):
        load_topic(
            "bio", *sources, word_tokenizer(), base=tmp_path, batch_size=2, max_length=64,
            retain_max_length=64, shuffle=True, padding="mask", seed=0, options={},
        )  # fmt: skip


# --- prompts and answers


def cut(rows: list[str], padding: Any = "mask", size: int = 4, **changed: Any) -> Topic:
    tokenizer = word_tokenizer()
    some = list(batch_up(tokenise(rows, tokenizer, 64), tokenizer, size, padding))
    made = Topic("bio", some, some, vocabulary=torch.arange(4, VOCABULARY))
    return replace(made, **changed).split()


def answers(loaded: Topic) -> list[tuple[list[int], list[int]]]:
    """The ordinary tokens of each prompt, and of its answer."""
    return [
        (ids[(labels == -100) & (ids > 3)].tolist(), ids[(labels != -100) & (ids > 3)].tolist())
        for batch in loaded.forget
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


@pytest.mark.parametrize("padding", ["mask", "count"])
def test_texts_are_cut_into_prompts_and_answers(padding: Any) -> None:
    """Between a quarter and three quarters of their words, on either side of the padding."""
    rows = texts(40, 1)
    words = [row.split() for row in rows]
    assert len(set(map(len, words))) > 3
    whole = cut(rows, padding)
    shares = []
    for (prompt, answer), expected in zip(answers(whole), words, strict=True):
        assert [f"w{i - 4}" for i in prompt + answer] == expected
        share = len(prompt) / len(expected)
        assert 0.25 - 0.5 / len(expected) <= share <= 0.75 + 0.5 / len(expected)
        shares.append(share)
    assert max(shares) > 0.6 and min(shares) < 0.4  # places are drawn
    tokenizer = word_tokenizer()
    before = batch_up(tokenise(rows, tokenizer, 64), tokenizer, 4, padding)
    for batch, plain in zip(whole.forget, before, strict=True):
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(batch[key], plain[key])
        for labels, ids, mask in zip(
            batch["labels"], batch["input_ids"], batch["attention_mask"], strict=True
        ):
            counted = (labels != -100).nonzero()[:, 0]
            assert counted.diff().eq(1).all()  # one stretch: all padding lies outside
            assert torch.equal(labels[counted], ids[counted])
            assert mask[counted].all()
            assert counted[-1] == mask.nonzero()[-1]  # an answer goes on to the text's end


@pytest.mark.parametrize("padding", ["mask", "count"])
@pytest.mark.parametrize("seed", range(6))
def test_either_side_has_a_word(padding: Any, seed: int) -> None:
    for prompt, answer in answers(cut(["w1 w2", "w3 w4 w5", "w6 w7"], padding, seed=seed)):
        assert prompt and answer
    ((prompt, answer),) = answers(cut(["w1 w2"], padding, seed=seed))
    assert (prompt, answer) == ([5], [6])


def test_special_tokens_are_no_words() -> None:
    """</s> counts neither as a prompt nor as an answer: words are on both sides of the cut."""
    for seed in range(8):
        rows = ["</s> </s> </s> w1 w2 </s> </s>", "w1 </s> w2"]
        assert answers(cut(rows, seed=seed)) == [([5], [6]), ([5], [6])]


def test_the_seed_and_the_topic_decide_where_texts_are_cut() -> None:
    rows = texts(30, 1)
    first = answers(cut(rows))
    torch.manual_seed(3)
    assert answers(cut(rows)) == first
    assert answers(cut(rows, seed=1)) != first
    assert answers(cut(rows, name="cyber")) != first
    assert answers(cut(rows, size=1)) == first  # however they are batched
    assert answers(cut(rows[:7])) == first[:7]


def test_what_is_to_be_kept_is_not_cut() -> None:
    some = topic_of_two()
    for one, other in zip(some.split().retain, some.retain, strict=True):
        assert one is other
    labels = [batch["labels"].clone() for batch in some.forget]
    some.split()
    assert all(torch.equal(b["labels"], old) for b, old in zip(some.forget, labels, strict=True))


def topic_of_two() -> Topic:
    tokenizer = word_tokenizer()
    some = list(batch_up(tokenise(texts(4, 1), tokenizer, 64), tokenizer, 2, "mask"))
    return Topic("bio", some[:1], some[1:], vocabulary=torch.arange(4, VOCABULARY))


GOOD, BAD = '{"text": "a b c"}', ['{"text": 5}', '{"text": ""}', "{", '{"other": "x"}']


@pytest.mark.parametrize("row", BAD)
def test_rows_that_are_no_texts_are_left_out_when_asked(tmp_path: Path, row: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join([GOOD] * 30 + [row] + [GOOD] * 9))
    with pytest.raises(UserError, match=r"texts\.jsonl:31"):
        read([Source(path=str(path))], Path())
    texts, bad = read_counted([Source(path=str(path), on_bad_row="skip")], Path())
    assert (len(texts), bad) == (39, 1)


def test_many_such_rows_are_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join([GOOD] * 18 + [BAD[0]] * 2))
    says = r"2 of 20 rows are no texts, more than 5%; the first: .*texts\.jsonl:19: 'text' is int"
    with pytest.raises(UserError, match=says):
        read([Source(path=str(path), on_bad_row="skip")], Path())


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_other_files_leave_rows_out_too(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"texts.{suffix}"
    values = ["a b c"] * 40 + [" "]
    if suffix == "json":
        path.write_text(json.dumps(values))
    elif suffix == "csv":
        path.write_text("text\n" + "\n".join(f'"{value}"' for value in values))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    texts, bad = read_counted([Source(path=str(path), on_bad_row="skip")], Path())
    assert (len(texts), bad) == (40, 1)
