"""Whatever a file, a config or an override holds: texts come out, or one line that says where."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.models import word_tokenizer, write_jsonl
from srmu.data.digest import digest_texts
from srmu.data.sources import Source, read_texts
from srmu.data.tokens import tokenise_texts
from srmu.errors import SrmuError
from srmu.runs.config import build_config, load_config

EXAMPLES = 300
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# What parsers stumble over, between bytes that are almost right.
PIECES = st.sampled_from(
    [
        b'{"text": "a b c"}', b'{"text": 5}', b'{"text": null}', b'{"text": ""}', b"[", b"]", b"{",
        b"}", b'"', b"\\", b"\\ud800", b"\xed\xa0\x80", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n",
        b"\r", b"\x00", b",", b"text", b'"a b"', b"NaN", b"1e999", b"null", b"PAR1", b"\x1f\x8b",
        b"\xe2\x80\xa8", b"[[[[[[[[[[", b"-", b": ", b"&a [*a]", b"!!python/object:os.system",
    ]
)  # fmt: skip
BLOBS = st.one_of(st.binary(max_size=200), st.lists(st.one_of(PIECES, st.binary(max_size=4))).map(b"".join))


def taken(path: Path) -> None:
    """Read the file as a set of texts: they can be used, or one line names the file."""
    try:
        texts = read_texts([Source(path=str(path))])
    except SrmuError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    assert texts
    assert all(isinstance(text, str) and text for text in texts)
    digest_texts(texts)
    tokenise_texts(texts, word_tokenizer(), 16)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt", "parquet"])
@given(data=BLOBS)
@fuzzed
def test_any_bytes_in_a_file_of_texts(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"texts.{suffix}"
    path.write_bytes(data)
    taken(path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)


@given(rows=st.lists(st.one_of(JSON, JSON.map(lambda value: {"text": value})), max_size=4))
@fuzzed
def test_any_json_in_a_row(tmp_path: Path, rows: list[Any]) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    taken(path)


@given(data=BLOBS)
@fuzzed
def test_any_bytes_in_a_config(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    with pytest.raises(SrmuError) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def tree(folder: Path) -> dict[str, Any]:
    texts = {"forget": str(folder / "f.jsonl"), "retain": str(folder / "r.jsonl")}
    return {"model": str(folder), "method": "srmu", "topics": {"t": texts}}


KEYS = st.sampled_from(
    [
        "model", "dtype", "device", "method", "method.name", "method.kappa", "method.layer",
        "method.importance", "topics", "topics.t", "topics.t.forget", "topics.t.max_length",
        "train", "train.learning_rate", "train.max_steps", "eval", "seed", "runs_dir", "cache",
        "purpose", "purpose.reason", "purpose.not_covered", "revision", "tasks_dir",
    ]
)  # fmt: skip


@given(key=st.one_of(KEYS, st.text(max_size=12)), value=st.one_of(JSON, st.none()))
@fuzzed
def test_any_value_at_any_key(tmp_path: Path, key: str, value: Any) -> None:
    override = f"{key}={json.dumps(value)}"
    try:
        config = build_config(tree(tmp_path), [override])
    except SrmuError as error:
        assert "\n" not in str(error)
    else:
        assert config.id


@given(override=st.one_of(st.text(max_size=30), st.builds("{}={}".format, KEYS, st.text())))
@fuzzed
def test_any_text_as_an_override(tmp_path: Path, override: str) -> None:
    try:
        build_config(tree(tmp_path), [override])
    except SrmuError as error:
        assert "\n" not in str(error)


# --- what is worth a name -------------------------------------------------------------------------


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine here"}\n{"text": "half \\ud83d of a pair"}\n')
    with pytest.raises(SrmuError, match=r"texts.jsonl:2: .*half of a surrogate pair"):
        read_texts([Source(path=str(path))])


def test_a_gzip_named_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "a b c"}\n'))
    with pytest.raises(SrmuError, match=r"texts.jsonl:1: not UTF-8 text; it is compressed \(gzip\)"):
        read_texts([Source(path=str(path))])


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").mkdir()
    with pytest.raises(SrmuError, match="is a folder; name the files in it"):
        read_texts([Source(path=str(tmp_path / "texts.jsonl"))])


@pytest.mark.slow
def test_a_line_of_100_megabytes(tmp_path: Path) -> None:
    """It is a text like another: cut at `max_length` tokens."""
    path = tmp_path / "texts.jsonl"
    write_jsonl(path, ["w1 w2 w3 w4 " * 8_500_000])
    assert path.stat().st_size > 100_000_000
    (text,) = read_texts([Source(path=str(path))])
    assert len(text) > 100_000_000


def test_a_mark_of_byte_order_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_bytes(b"\xef\xbb\xbftext\r\nw1 w2\r\nw3 w4\r\n")
    assert read_texts([Source(path=str(path))]) == ["w1 w2", "w3 w4"]
