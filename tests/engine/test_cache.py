"""What can be made again is kept, made again where it is damaged, and never in the way."""

from pathlib import Path
from typing import Any

import pytest

from srmu.engine.files import cache_dir, cached, find_cached, keep_cached, read_json
from srmu.errors import SrmuError


def count_calls(value: Any) -> tuple[list[int], Any]:
    calls: list[int] = []
    return calls, lambda: (calls.append(1), value)[1]


def test_a_value_is_made_once_for_a_key() -> None:
    calls, make = count_calls({"a": (1, 2.5)})
    key = ["model", {"limit": 3}, None]
    first = cached("evals", key, make)
    assert first == {"a": [1, 2.5]} == cached("evals", key, make)  # as JSON has it, both times
    assert calls == [1]
    for other in (["model", {"limit": 4}, None], ["model", {"limit": 3}]):
        cached("evals", other, make)
    cached("attacks", key, make)
    assert len(calls) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"value": 1}', '{"sha256": "00", "value": 1}'])
def test_a_damaged_value_is_made_again(damage: str) -> None:
    keep_cached("evals", "key", [1])
    (file,) = (cache_dir() / "evals").iterdir()
    whole = file.read_text()
    file.write_text(damage)
    assert find_cached("evals", "key") is None
    assert cached("evals", "key", lambda: [1]) == [1]
    assert file.read_text() == whole


def test_every_bit_of_a_value_counts() -> None:
    keep_cached("evals", "key", {"value": 0.125})
    (file,) = (cache_dir() / "evals").iterdir()
    file.write_text(file.read_text().replace("0.125", "0.625"))
    assert find_cached("evals", "key") is None


def test_a_cache_that_cannot_be_used_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "file" / "cache"))
    calls, make = count_calls(7)
    assert [cached("evals", "key", make) for _ in range(2)] == [7, 7]
    assert len(calls) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith("Not a directory; going on without")


def test_a_folder_in_a_values_place_is_in_nobodys_way() -> None:
    keep_cached("evals", "key", 1)
    (file,) = (cache_dir() / "evals").iterdir()
    file.unlink()
    file.mkdir()
    assert cached("evals", "key", lambda: 2) == 2


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(SrmuError, match=r"a\.json: no such file"):
        read_json(path)
    assert read_json(path, {}) == {} == read_json(path / "b.json", {})
    for text in ("{", "[" * 100_000, "\udcff"):
        path.write_text(text, errors="surrogateescape")
        for default in ((), ({},)):
            with pytest.raises(SrmuError, match=r"a\.json is damaged \(.*\); make it again"):
                read_json(path, *default)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_read_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_json(path, []) == []
    path.write_text('{"a": 1}\n2\n')
    assert read_json(path) == [{"a": 1}, 2]
    path.write_text('{"a": 1}\n{"a"')
    with pytest.raises(SrmuError, match=r"a\.jsonl is damaged"):
        read_json(path)
