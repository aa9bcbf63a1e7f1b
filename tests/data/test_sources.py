"""Readers, tokens and batches."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.models import VOCABULARY, pico_module, save_pico, texts, word_tokenizer, write_jsonl  # fmt: skip
from srmu.data.digest import digest_texts, own_key
from srmu.data.rows import CountedText, join_counted
from srmu.data.sources import Source, read_counted, read_texts
from srmu.data.tokens import batch_rows, pad_id, tokenise_texts, wrap_texts
from srmu.data.topics import TopicConfig, load_topic
from srmu.engine.losses import mean_nll
from srmu.engine.topic import Topic
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.runs.config import build_config
from srmu.runs.estimate import plan_dry_run
from srmu.runs.run import Run, unlearn_config

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
    lines = [json.dumps({column: row} if i % 2 else row, ensure_ascii=i % 3 == 0) + "\n" for i, row in enumerate(rows)]
    path.write_text("".join(lines), encoding="utf-8")


WRITERS: dict[str, Callable[..., None]] = {
    "jsonl": write_lines,
    "json": write_json_rows,
    "csv": write_csv,
    "parquet": write_parquet,
}


def load(path: Path | str, **options: Any) -> list[str]:
    return read_texts([Source(path=str(path), **options)])


# --- files


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("column", ["text", "body"])
def test_formats(suffix: str, column: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    WRITERS[suffix](path, ROWS, column)
    assert load(path, column=column) == ROWS


@pytest.mark.parametrize("suffix", WRITERS)
def test_any_texts_survive_a_round_trip(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
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


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_utf_16_is_read(suffix: str, coding: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    WRITERS[suffix](path, ["été one", "two"])
    path.write_bytes(path.read_text(encoding="utf-8").encode(coding))
    assert load(path) == ["été one", "two"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("Müller\n".encode("cp1252"), "a.txt:1: not UTF-8 text; convert it, perhaps iconv -f CP1252"),
        (b"PK\x03\x04\xff", r"not UTF-8 text; it is compressed \(zip\): unpack it"),
    ],
)
def test_what_is_not_text_is_named(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(SrmuError, match=says):
        load(tmp_path / "a.txt")


def test_what_datasets_writes_is_read(tmp_path: Path) -> None:
    """JSON lines under .json, a folder that it saved, a file of that folder; of several splits one is to be named."""
    from datasets import Dataset, DatasetDict

    table = Dataset.from_dict({"text": ROWS})
    table.to_json(tmp_path / "lines.json")
    table.to_json(tmp_path / "rows.json", lines=False)
    table.select(range(1)).to_json(tmp_path / "one.json")
    DatasetDict(train=table, test=table).save_to_disk(tmp_path / "splits")
    arrow = next((tmp_path / "splits" / "train").glob("*.arrow"))
    for path in (tmp_path / "lines.json", tmp_path / "rows.json", tmp_path / "splits" / "train", arrow):
        assert load(path) == ROWS
    assert load(tmp_path / "one.json") == ROWS[:1]
    with pytest.raises(SrmuError, match=r"splits holds splits; name one of them: .*splits/train, .*splits/test"):
        load(tmp_path / "splits")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(SrmuError, match="not a saved data set"):
        load(tmp_path)


def test_a_table_between_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("n\ttext\n1\tone, two\n")
    assert load(tmp_path / "a.tsv") == ["one, two"]


@pytest.mark.parametrize("name", ["forget[1].jsonl", "[a]*?.jsonl", "d[1]/a.jsonl", "ü #%&;=: .jsonl"])
def test_a_file_of_that_very_name_comes_before_a_pattern(name: str, tmp_path: Path) -> None:
    for other in ("forget1.jsonl", "ax.jsonl", "d1/a.jsonl"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / other, ["another"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_jsonl(tmp_path / name, ["this one"])
    assert load(tmp_path / name) == ["this one"]
    if "/" in name:  # the signs of a folder that is there are no pattern
        assert load(tmp_path / "d[1]" / "*.jsonl") == ["this one"]


def test_a_text_in_place_of_a_file_is_a_line(tmp_path: Path) -> None:
    for text in ("a long text " * 500, "a\0b", "~nobody-of-that-name/x"):
        with pytest.raises(SrmuError, match="no such file") as caught:
            load(text)
        assert len(str(caught.value)) < 200


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    long = "word " * 40_000
    write_csv(tmp_path / "a.csv", [long])
    assert load(tmp_path / "a.csv") == [long]


def test_globs_are_sorted_and_sources_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a", "c[1]"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"text {name}"])
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "d.jsonl", ["text d"])
    both = [Source(path="b.jsonl"), Source(path="[a-b].jsonl")]
    assert read_texts(both) == ["text b", "text a", "text b"]
    assert read_texts([Source(path="c[1].jsonl")]) == ["text c[1]"]
    assert read_texts([Source(path="**/d.jsonl")]) == ["text d"]


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
    source = Source(dataset="owner/set", name="part", split="test[:4]", column="body", revision="abc")
    assert read_texts([source]) == ["one", "two"]  # blank rows are left out
    assert hub == [(("owner/set", "part"), {"split": "test[:4]", "revision": "abc"})]


def test_hub_columns(hub: list[Any]) -> None:
    with pytest.raises(SrmuError, match="no column 'text'; found body, n"):
        read_texts([Source(dataset="owner/set")])
    with pytest.raises(SrmuError, match="owner/set row 1: 'n' is int"):
        read_texts([Source(dataset="owner/set", column="n")])


@pytest.mark.parametrize(
    "options",
    [{}, {"path": "a", "dataset": "b"}, {"path": "a", "name": "b"}, {"path": "a", "revision": "b"},
     {"path": "a", "split": "test"}],
)  # fmt: skip
def test_a_source_is_files_or_a_data_set(options: dict[str, str]) -> None:
    with pytest.raises(SrmuError):
        Source(**options)


# --- tokens and batches


def test_tokenise_cuts_and_leaves_short_texts_out() -> None:
    rows = tokenise_texts(["w0 w1 w2 w3", "w0", "w1 </s>", "w1 w2"], word_tokenizer(), 3)
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
    rows = tokenise_texts(["w0 w1 w2", "w3 w4", "w5 w6"], tokenizer, 64)
    first, second = batch_rows(rows, tokenizer, 2, padding)
    assert {name: tensor.tolist() for name, tensor in first.items()} == expected
    assert second["input_ids"].tolist() == [[1, 9, 10]]


def test_padding_falls_back_on_eos() -> None:
    assert pad_id(word_tokenizer()) == 0
    assert pad_id(word_tokenizer(pad_token=None)) == 2
    with pytest.raises(SrmuError, match="neither a pad nor an eos token"):
        pad_id(word_tokenizer(pad_token=None, eos_token=None))


# --- the digest


def test_the_digest_is_keyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = digest_texts(["ab", "c"])
    assert digest_texts(iter(["ab", "c"])) == first
    assert digest_texts(["a", "bc"]) != first
    key = Path(os.environ["SRMU_CACHE"]) / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "other"))
    assert digest_texts(["ab", "c"]) != first
    (tmp_path / "other" / "key").write_bytes(key.read_bytes())
    assert digest_texts(["ab", "c"]) == first


# --- topics


def read_topic(
    folder: Path, forget: Source | None, retain: Source | None, tokenizer: Any = None, **options: Any
) -> Topic:
    """A topic of sources in `folder`; the options are those of the texts or of the training."""
    sources = [
        [] if source is None else [replace(source, path=str(folder / str(source.path)))] for source in (forget, retain)
    ]
    train = {"batch_size": 4} | {
        name: options.pop(name) for name in ("batch_size", "shuffle", "padding") if name in options
    }
    seed = options.pop("seed", 0)
    config = TopicConfig(forget=sources[0], retain=sources[1], **{"max_length": 64, "retain_max_length": 64} | options)
    return load_topic("bio", config, tokenizer or word_tokenizer(), TrainOptions(**train), seed)


def topic(folder: Path, **options: Any) -> Topic:
    write_jsonl(folder / "f.jsonl", [*texts(9, 1, range(30)), "w1"])
    write_jsonl(folder / "r.jsonl", texts(5, 2, range(20, 60)))
    sources = Source(path="f.jsonl"), Source(path="r.jsonl")
    return read_topic(folder, *sources, **{"retain_max_length": 4, "alpha": 3.0} | options)


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
    assert forget["digest"] == digest_texts([*texts(9, 1, range(30)), "w1"])
    pairs = loaded.pairs()
    taken = [next(pairs) for _ in range(4)]
    assert taken[0][0] is taken[3][0]  # three forget batches, two retain batches: each starts again
    assert taken[0][1] is taken[2][1]


def test_order_of_documents(tmp_path: Path) -> None:
    in_file = tokenise_texts(texts(9, 1, range(30)), word_tokenizer(), 64)
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
    source = Source(path="f.jsonl")
    loaded = read_topic(tmp_path, source, None, batch_size=2)
    assert len(loaded.forget) == 2 and loaded.retain == []
    counts = loaded.counts["retain"]
    assert (counts["documents"], counts["too_short"], counts["tokens"]) == (0, 0, 0)
    pairs = loaded.pairs()
    taken = [next(pairs) for _ in range(3)]
    assert [retain for _, retain in taken] == [{}, {}, {}]
    assert taken[0][0] is taken[2][0]
    write_jsonl(tmp_path / "r.jsonl", texts(3, 2))
    beside = read_topic(tmp_path, source, Source(path="r.jsonl"), batch_size=2)
    assert documents(beside) == documents(loaded)  # the order to forget in is the same
    with pytest.raises(SrmuError, match=r"topic bio: no forget texts; name them: forget, or topics\.bio\.forget"):
        read_topic(tmp_path, None, source)


def test_retain_texts_that_are_named_must_hold_some(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "f.jsonl", texts(3, 1))
    (tmp_path / "r.jsonl").write_text('"w1"\n')
    with pytest.raises(SrmuError, match="all 1 retain texts are too short"):
        read_topic(tmp_path, Source(path="f.jsonl"), Source(path="r.jsonl"))


# --- prompts and answers


def cut(rows: list[str], padding: Any = "mask", size: int = 4, **changed: Any) -> Topic:
    tokenizer = word_tokenizer()
    some = list(batch_rows(tokenise_texts(rows, tokenizer, 64), tokenizer, size, padding))
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
    before = batch_rows(tokenise_texts(rows, tokenizer, 64), tokenizer, 4, padding)
    for batch, plain in zip(whole.forget, before, strict=True):
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(batch[key], plain[key])
        for labels, ids, mask in zip(batch["labels"], batch["input_ids"], batch["attention_mask"], strict=True):
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
    some = list(batch_rows(tokenise_texts(texts(4, 1), tokenizer, 64), tokenizer, 2, "mask"))
    return Topic("bio", some[:1], some[1:], vocabulary=torch.arange(4, VOCABULARY))


GOOD, BAD = '{"text": "a b c"}', ['{"text": 5}', '{"text": ""}', "{", '{"other": "x"}']


@pytest.mark.parametrize("row", BAD)
def test_rows_that_are_no_texts_are_left_out_when_asked(tmp_path: Path, row: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join([GOOD] * 30 + [row] + [GOOD] * 9))
    with pytest.raises(SrmuError, match=r"texts\.jsonl:31"):
        read_texts([Source(path=str(path))])
    texts, bad = read_counted(Source(path=str(path), on_bad_row="skip"))
    assert (len(texts), bad) == (39, 1)


def test_many_such_rows_are_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join([GOOD] * 18 + [BAD[0]] * 2))
    says = r"2 of 20 rows are no texts, more than 5%; the first: .*texts\.jsonl:19: 'text' is int"
    with pytest.raises(SrmuError, match=says):
        read_texts([Source(path=str(path), on_bad_row="skip")])


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
    texts, bad = read_counted(Source(path=str(path), on_bad_row="skip"))
    assert (len(texts), bad) == (40, 1)


# --- columns joined by a template

TEMPLATE = "w1 {question} w2 {answer}"


def pairs(count: int, seed: int, words: range = range(60)) -> list[dict[str, str]]:
    """Questions and answers of 5 to 12 words, and who they are about."""
    both = zip(texts(count, seed, words), texts(count, seed + 100, words), strict=True)
    return [{"who": ("Ann Lee", "Bob")[i % 2], "question": q, "answer": a} for i, (q, a) in enumerate(both)]


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def on_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> None:
    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)


def joined(rows: list[dict[str, str]]) -> list[str]:
    return [f"w1 {row['question']} w2 {row['answer']}" for row in rows]


@pytest.mark.parametrize("place", [*WRITERS, "hub"])
def test_a_template_joins_columns(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(6, 1)
    rows[2]["question"] = 'w3 {answer} "quoted", {who}'  # stays as it is
    if place == "hub":
        on_hub(monkeypatch, rows)
        source = Source(dataset="owner/set", template=TEMPLATE)
    else:
        source = Source(path=str(write_pairs(tmp_path / f"a.{place}", rows)), template=TEMPLATE)
    found = read_texts([source])
    assert found == joined(rows)
    for text, row in zip(found, rows, strict=True):
        assert isinstance(text, CountedText)
        assert [text[start:end] for start, end in text.spans] == [row["answer"]]
    assert digest_texts(found) == digest_texts(joined(rows))


def pieces_of_words(**special: Any) -> PreTrainedTokenizerFast:
    """Bytes merged into pieces of words, the space before a word in its first one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" w12 w345 was:w9 Where? There" * 9], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", **special)


def asked(folder: Path, rows: list[dict[str, str]], tokenizer: Any, **options: Any) -> Topic:
    write_pairs(folder / "f.jsonl", rows)
    write_jsonl(folder / "r.jsonl", texts(5, 2))
    source = Source(path="f.jsonl", template=options.pop("template", TEMPLATE))
    options = {"shuffle": False} | options
    return read_topic(folder, source, Source(path="r.jsonl"), tokenizer, **options)


def rows_of(batches: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each text, without padding."""
    return [
        (ids[mask == 1].tolist(), labels[mask == 1].tolist())
        for batch in batches
        for ids, mask, labels in zip(*(batch[k] for k in (
            "input_ids", "attention_mask", "labels")), strict=True)
    ]  # fmt: skip


def test_labels_of_answers_alone(tmp_path: Path) -> None:
    rows, tokenizer = pairs(9, 1), word_tokenizer()
    loaded = asked(tmp_path, rows, tokenizer)
    for (ids, labels), row in zip(rows_of(loaded.forget), rows, strict=True):
        question = ["<s>", "w1", *row["question"].split(), "w2"]
        answer = row["answer"].split()
        expected = []
        for place, token in enumerate(tokenizer.convert_tokens_to_ids([*question, *answer])):
            assert ids[place] == token
            expected.append(token if place >= len(question) else -100)
        assert labels == expected
    for batch in loaded.forget:  # nor does padding count
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    for ids, labels in rows_of(loaded.retain):  # of a column: all count
        assert labels == ids
    counts = loaded.counts["forget"]
    assert counts["tokens"] == sum(len(ids) for ids, _ in rows_of(loaded.forget))
    assert (counts["documents"], counts["too_short"], counts["bad_rows"]) == (9, 0, 0)
    assert counts["digest"] == digest_texts(joined(rows))


@pytest.mark.parametrize("template", [TEMPLATE, "w1 {question}{answer} w9", "{question}? {answer}"])
def test_a_token_that_holds_a_part_of_the_answer_counts(template: str, tmp_path: Path) -> None:
    """Also where it begins before, as with the space in front; and the end of the text counts."""
    tokenizer = pieces_of_words()
    rows = [
        {"question": "Where w12 \u00e9\u4e2d", "answer": "There w345"},
        {"question": "was: w9", "answer": "9"},
        {"question": "w12", "answer": "\u4e2d\u4e2d w9 Where"},
    ]
    both = rows_of(asked(tmp_path, rows, tokenizer, template=template).forget)
    for (ids, labels), row in zip(both, rows, strict=True):
        text = template.format(**row)
        start = len(text) - len(template.split("{answer}")[1]) - len(row["answer"])
        first = sum(label == -100 for label in labels)
        assert labels == [-100] * first + ids[first:] and ids[-1] == 1
        sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]  # in bytes
        boundary = len(text[:start].encode())
        assert sum(sizes[:first]) <= boundary < sum(sizes[: first + 1])


def test_what_a_template_closes_with_counts(tmp_path: Path) -> None:
    """As the end of the text does in TOFU's code."""
    loaded = asked(tmp_path, pairs(2, 1), word_tokenizer(), template="{question} {answer}</s>")
    assert [labels[-1] for _, labels in rows_of(loaded.forget)] == [2, 2]


def test_a_template_of_one_column_is_that_column(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "f.jsonl", texts(9, 1))
    write_jsonl(tmp_path / "r.jsonl", texts(5, 2))
    found = [
        read_topic(tmp_path, source, Source(path="r.jsonl"), max_length=6)
        for source in (Source(path="f.jsonl"), Source(path="f.jsonl", template="{text}"))
    ]
    assert found[0].counts == found[1].counts
    for one, other in zip(found[0].forget, found[1].forget, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_question_that_leaves_no_room_is_too_short(tmp_path: Path) -> None:
    rows = [*pairs(3, 1), {"who": "", "question": " ".join(["w5"] * 62), "answer": "w7"}]
    counts = asked(tmp_path, rows, word_tokenizer()).counts["forget"]
    assert (counts["documents"], counts["too_short"]) == (3, 1)
    with pytest.raises(SrmuError, match=r"all 4 forget texts are too short .* none to count"):
        asked(tmp_path, rows, word_tokenizer(), max_length=4)


def test_texts_of_a_template_are_not_cut_again(tmp_path: Path) -> None:
    loaded = asked(tmp_path, [*pairs(6, 1), {"question": "w1", "answer": "w2"}], word_tokenizer())
    for one, other in zip(loaded.split().forget, loaded.forget, strict=True):
        assert torch.equal(one["labels"], other["labels"])


def test_anchors_go_with_a_template(tmp_path: Path) -> None:
    batch = asked(tmp_path, pairs(4, 1), word_tokenizer()).forget[0]
    whole = Topic("bio", [batch], [batch], vocabulary=torch.arange(4, VOCABULARY))
    (mixed,) = whole.add_anchors(0.5).retain
    assert torch.equal(mixed["labels"][:2], batch["labels"][:2])
    assert torch.equal(mixed["labels"][2:], mixed["input_ids"][2:])  # random texts count whole


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "w1 {q}", "column": "a"}, "f.jsonl: a text source takes one of column and"),
        ({"template": "w1 w2"}, "f.jsonl: template 'w1 w2' has no column; name one in braces"),
        (
            {"template": "{{q}} {{ a }}"},
            "f.jsonl: template '{{q}} {{ a }}': a column stands in one pair of braces: {q}",
        ),
        ({"template": ""}, "f.jsonl: template '' has no column"),
        ({"template": "{q} {a}", "wrap": True}, "f.jsonl: wrap would separate answers from"),
    ],
)
def test_templates_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SrmuError) as error:
        Source(path="f.jsonl", **options)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"q": "w1"}, "f.jsonl:2: no column 'answer'; found question, q"),
        ({"answer": " "}, "f.jsonl:2: the answer is empty"),
        ({"answer": "w1", "question": ""}, "f.jsonl:2: the question is empty"),
        ({"answer": 5}, "f.jsonl:2: 'answer' is int, expected a string"),
        ("w1 w2", "f.jsonl:2: where and template take columns, but the row has none"),
    ],
)
def test_rows_that_a_template_does_not_fit(row: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    second = {"question": "w1"} | row if isinstance(row, dict) else row
    lines = [{"question": "w1", "answer": "w2"}, second]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = Source(path=str(path), template="{question} {answer}")
    with pytest.raises(SrmuError) as error:
        read_texts([source])
    assert str(error.value) == f"{tmp_path}/{says}"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*[lines[0]] * 40, second]))
    found, bad = read_counted(replace(source, on_bad_row="skip"))
    assert (len(found), bad) == (40, 1)


def test_other_places_that_a_template_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("w1 w2\n")
    with pytest.raises(SrmuError, match=r"a\.txt: row 1: where and template take columns"):
        load(tmp_path / "a.txt", template="{q}")
    on_hub(monkeypatch, [{"q": "w1", "a": "w2"}, {"q": "w1", "a": " "}])
    with pytest.raises(SrmuError, match="data set owner/set has no column 'c'; found q, a"):
        read_texts([Source(dataset="owner/set", template="{q} {c}")])
    with pytest.raises(SrmuError, match="owner/set row 2: the a is empty"):
        read_texts([Source(dataset="owner/set", template="{q} {a}")])
    write_pairs(tmp_path / "a.parquet", [{"q": "w1", "a": "w2"}])
    with pytest.raises(SrmuError, match=r"a\.parquet: row 1: no column 'c'; found q, a"):
        load(tmp_path / "a.parquet", template="{q} {c}")


def test_padding_that_counts_does_not_go_with_a_template(tmp_path: Path) -> None:
    with pytest.raises(SrmuError, match=r"topic bio: .* templates only .* train\.padding=mask"):
        asked(tmp_path, pairs(4, 1), word_tokenizer(), padding="count")


def test_a_template_needs_places_of_tokens(tmp_path: Path) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(SrmuError, match=r"templates need a tokenizer .* tokenizer\.json"):
        tokenise_texts([join_counted([("w1 ", False), ("w2", True)])], Slow(), 8)


# --- rows that have a value


@pytest.mark.parametrize("place", [*WRITERS, "hub"])
def test_rows_of_a_value(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(7, 1)
    if place == "hub":
        on_hub(monkeypatch, rows)
        source = Source(dataset="owner/set", column="answer", where={"who": "Ann Lee"})
    else:
        path = write_pairs(tmp_path / f"a.{place}", rows)
        source = Source(path=str(path), column="answer", where={"who": "Ann Lee"})
    wanted = [row for row in rows if row["who"] == "Ann Lee"]
    assert read_texts([source]) == [row["answer"] for row in wanted]
    assert read_texts([replace(source, column="text", template=TEMPLATE)]) == joined(wanted)
    one = rows[4]
    both = {"who": one["who"], "question": one["question"]}
    assert read_texts([replace(source, where=both)]) == [one["answer"]]
    with pytest.raises(SrmuError) as error:
        read_texts([replace(source, where={"who": "An Lee"})])
    assert str(error.value).endswith(": no row has who 'An Lee'; did you mean Ann Lee?")
    with pytest.raises(SrmuError, match="no row has who 'x'; choose one of Ann Lee, Bob"):
        read_texts([replace(source, where={"who": "x"})])
    crossed = {"who": "Bob", "question": one["question"]}
    with pytest.raises(SrmuError, match="no row has all of who 'Bob', question"):
        read_texts([replace(source, where=crossed)])
    with pytest.raises(SrmuError, match="no column 'whom'; found who, question, answer"):
        read_texts([replace(source, where={"whom": "Bob"})])


@pytest.mark.parametrize(("value", "kept"), [(1, "a"), ("1", "a"), (2.5, "b"), (True, "c")])
def test_values_need_not_be_texts(value: Any, kept: str, tmp_path: Path) -> None:
    rows = [{"n": n, "text": f"w1 {t}"} for n, t in ((1, "a"), (2.5, "b"), (True, "c"))]
    assert load(write_pairs(tmp_path / "a.jsonl", rows), where={"n": value}) == [f"w1 {kept}"]


def test_one_file_of_several_may_have_no_such_row(tmp_path: Path) -> None:
    rows = pairs(6, 1)
    write_pairs(tmp_path / "a.jsonl", rows[1::2])
    write_pairs(tmp_path / "b.jsonl", rows)
    found = load(tmp_path / "*.jsonl", column="answer", where={"who": "Ann Lee"})
    assert found == [row["answer"] for row in rows[::2]]


def test_an_error_lists_few_values_and_no_texts(tmp_path: Path) -> None:
    rows = [{"who": f"person number {i}", "text": "w1 w2 " * 40} for i in range(60)]
    path = write_pairs(tmp_path / "a.jsonl", rows)
    with pytest.raises(SrmuError) as error:
        load(path, where={"who": "zzz"})
    assert str(error.value).endswith("zzz'; the first of its 60 values is person number 0")
    with pytest.raises(SrmuError) as error:
        load(path, where={"text": "zzz"})
    assert str(error.value) == f"{path}: no row has text 'zzz'"


def test_rows_left_out_by_where_are_not_bad(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", pairs(60, 1))
    with path.open("a") as file:
        file.write("{\n")
    found, bad = read_counted(Source(path=str(path), template=TEMPLATE, where={"who": "Bob"}, on_bad_row="skip"))
    assert (len(found), bad) == (30, 1)


# --- pieces of all texts


@pytest.mark.parametrize("max_length", [2, 3, 7, 16])
@pytest.mark.parametrize("bos", [True, False])
def test_pieces_by_hand(bos: bool, max_length: int) -> None:
    tokenizer = word_tokenizer()
    if not bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    rows = texts(9, 1)
    tokens = [4 + int(word[1:]) for row in rows for word in row.split()]
    size = max_length - bos
    expected: list[list[int]] = []
    for i, token in enumerate(tokens):
        if i % size == 0:
            expected.append([1] if bos else [])
        expected[-1].append(token)
    for token in expected[0]:
        if len(expected[-1]) < max_length:
            expected[-1].append(token)
    assert wrap_texts(rows, tokenizer, max_length) == expected
    assert {*map(len, expected)} == {max_length}


def test_pieces_that_come_out_even_are_not_filled() -> None:
    assert wrap_texts(["w0 w1", "w2 w3"], word_tokenizer(), 3) == [[1, 4, 5], [1, 6, 7]]
    assert wrap_texts(["w0 w1 w2"], word_tokenizer(), 3) == [[1, 4, 5], [1, 6, 1]]
    assert wrap_texts(["w0 w1"], word_tokenizer(), 3) == [[1, 4, 5]]
    with pytest.raises(SrmuError, match=r"a\.txt: all texts together are 2 tokens, too few"):
        wrap_texts(["w0 w1"], word_tokenizer(), 4, "a.txt")
    with pytest.raises(SrmuError, match="texts begin with <s>, and the tokenizer adds it again"):
        wrap_texts(["<s> w0 w1"], word_tokenizer(), 3)


def test_a_blank_line_stands_between_texts() -> None:
    tokenizer = pieces_of_words()
    ids = tokenizer("w12\n\nw345", add_special_tokens=False)["input_ids"]
    assert wrap_texts(["w12", "w345"], tokenizer, len(ids)) == [ids]


def test_a_topic_of_pieces(tmp_path: Path) -> None:
    plain = topic(tmp_path, max_length=6, retain_max_length=64)
    sources = Source(path="f.jsonl", wrap=True), Source(path="r.jsonl")
    loaded = read_topic(tmp_path, *sources, max_length=6)
    rows = [*texts(9, 1, range(30)), "w1"]
    assert sorted(documents(loaded)) == sorted(wrap_texts(rows, word_tokenizer(), 6))
    assert documents(loaded) != wrap_texts(rows, word_tokenizer(), 6)  # shuffled
    for batch in loaded.forget:
        assert batch["attention_mask"].all() and torch.equal(batch["labels"], batch["input_ids"])
    counts, count = loaded.counts["forget"], len(documents(loaded))
    assert (counts["documents"], counts["too_short"], counts["tokens"]) == (10, 0, 6 * count)
    assert counts["digest"] == plain.counts["forget"]["digest"]
    assert loaded.counts["retain"] == plain.counts["retain"]
    for one, other in zip(loaded.retain, plain.retain, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    fewer = read_topic(tmp_path, *sources, max_length=6, forget_held_out=4)
    assert fewer.counts["forget"]["documents"] == 6
    with pytest.raises(SrmuError, match=r"f\.jsonl: all texts together are \d+ tokens, too few"):
        read_topic(tmp_path, *sources, max_length=4096)


# --- whole runs


def made_of(folder: Path, *overrides: str) -> Any:
    """A config whose texts are joined, filtered and wrapped."""
    if not (folder / "model").exists():
        save_pico(folder / "model")
        write_pairs(folder / "forget.jsonl", pairs(12, 1, range(30)))
        write_jsonl(folder / "retain.jsonl", texts(9, 2, range(20, 60)))
    forget = {"path": str(folder / "forget.jsonl"), "template": TEMPLATE, "where": {"who": "Bob"}}
    retain = {"path": str(folder / "retain.jsonl"), "wrap": True}
    tree = {
        "model": str(folder / "model"),
        "method": {"name": "graddiff", "retain": "nll"},
        "topics": {"bio": {"forget": forget, "retain": retain, "max_length": 24}},
        "train": {"max_steps": 5, "batch_size": 6, "learning_rate": 1e-3, "forget_ceiling": 1e9,
                  "checkpoint_seconds": 0, "shuffle": False},
        "runs_dir": str(folder / "runs"),
    }  # fmt: skip
    return build_config(tree, overrides)


def by_hand(rows: list[dict[str, str]]) -> float:
    """The mean loss of the answers' tokens under the pico model, in a loop over them."""
    module, tokenizer = pico_module(), word_tokenizer()
    losses = []
    for row, text in zip(rows, joined(rows), strict=True):
        ids = tokenizer(text)["input_ids"][:24]
        with torch.no_grad():
            log_p = module(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(row["question"].split()) + 3, len(ids)):
            losses.append(-float(log_p[place - 1, ids[place]]))
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_a_run_counts_answers_alone(tmp_path: Path) -> None:
    run = unlearn_config(made_of(tmp_path))
    rows = pairs(12, 1, range(30))[1::2]
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["forget"] == pytest.approx(-by_hand(rows), rel=1e-5)
    data = run.record["data"]["bio"]
    kept = wrap_texts(texts(9, 2, range(20, 60)), word_tokenizer(), 24)
    assert data["forget"]["documents"] == 6
    assert data["forget"]["digest"] == digest_texts(joined(rows))
    assert (data["retain"]["documents"], data["retain"]["tokens"]) == (9, 24 * len(kept))
    assert data["retain"]["digest"] == digest_texts(texts(9, 2, range(20, 60)))
    source = run.record["reproduction"]["config"]["topics"]["bio"]["forget"][0]
    assert (source["template"], source["where"]) == (TEMPLATE, {"who": "Bob"})
    assert Run.open(run.folder).config == run.config  # the folder's config.yaml says it all
    assert unlearn_config(made_of(tmp_path)).folder == run.folder
    ids = {run.config.id}
    for override in ("forget.template=w3 {question} {answer}", "forget.where.who=Ann Lee",
                     "retain.wrap=false"):  # fmt: skip
        ids.add(made_of(tmp_path, f"topics.bio.{override}").id)
    assert len(ids) == 4


def test_predictions_of_a_question_have_no_gradient(tmp_path: Path) -> None:
    """Whatever a question's tokens are: the loss does not know them as targets."""
    (batch, *_) = asked(tmp_path, pairs(4, 1), word_tokenizer()).forget
    logits = torch.randn(*batch["input_ids"].shape, VOCABULARY, requires_grad=True)
    mean_nll(logits, batch["labels"]).value.backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum(dim=-1)
    assert torch.equal(moved[:, :-1] > 0, batch["labels"][:, 1:] != -100)
    assert not moved[:, -1].any()


@pytest.mark.slow
def test_a_misdirection_measures_and_steers_answers_alone(tmp_path: Path) -> None:
    run = unlearn_config(
        made_of(tmp_path, "method={name: srmu, layer: 2, skip_first: false}",
                "train.forget_ceiling=null", "cache=none")
    )  # fmt: skip
    module, tokenizer = pico_module(), word_tokenizer()
    norms, target = [], load_file(run.folder / "state.safetensors")["bio.target"]
    squares = []
    for row, text in zip((rows := pairs(12, 1, range(30))[1::2]), joined(rows), strict=True):
        ids = tokenizer(text)["input_ids"][:24]
        with torch.no_grad():
            hidden = module(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
        for vector in hidden[len(row["question"].split()) + 3 :]:
            norms.append(float(vector.norm()))
            squares.append(float((vector - target).square().mean()))
    measured = run.record["topics"]["bio"]["activation_norm"]
    assert measured == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["forget"] == pytest.approx(sum(squares) / len(squares), rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_of_such_texts_goes_on(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    @contextmanager
    def watch(label: str, total: int) -> Iterator[Any]:
        done = 0

        def tick(text: str) -> None:
            nonlocal done
            done += 1
            if total == 5 and done == 4:
                raise Killed

        yield tick

    whole = unlearn_config(made_of(tmp_path, f"runs_dir={tmp_path / 'whole'}"))
    with pytest.raises(Killed):
        unlearn_config(made_of(tmp_path), watch=watch)
    resumed = unlearn_config(made_of(tmp_path))
    assert resumed.record["resumed_at"] > 0
    for name, tensor in whole.delta.items():
        assert torch.equal(tensor, resumed.delta[name])


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("weights", [True, False])
def test_a_dry_run_of_such_texts(weights: bool, tmp_path: Path) -> None:
    """Also of a model of which only the config.json is there, and texts of a hub that is not."""
    config = made_of(tmp_path)
    if not weights:
        for path in (tmp_path / "model").iterdir():
            if path.name != "config.json":
                path.unlink()
        config = made_of(tmp_path, "topics.bio.forget={dataset: o/s, template: '{q} {a}', where: "
                         "{who: Bob}}", "topics.bio.retain={dataset: o/s, wrap: true}")  # fmt: skip
    planned, found, _ = plan_dry_run(config)
    assert found["steps"] == 5 and planned.id == found["id"]
    assert not (tmp_path / "runs").exists()
