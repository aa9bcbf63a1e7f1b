"""Folders and files are whole or not there."""

import json
import os
from pathlib import Path

import pytest

from srmu.engine.files import cache_dir, require_free, sha256, whole_folder, write_json, write_output, write_whole
from srmu.errors import SrmuError


def test_whole_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not out.exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "out", "a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whole_folder_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole_folder(tmp_path / "out") as temporary:
        (temporary / "a.txt").write_text("a")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes with names in folders")
def test_a_pipe_is_written_into_and_stays(tmp_path: Path) -> None:
    """Else an output to /dev/null, by root, would leave a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_output(tmp_path / "pipe", "a text")
        assert os.read(end, 100) == b"a text" and (tmp_path / "pipe").is_fifo()
    finally:
        os.close(end)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_whole_folder_takes_an_empty_folder_and_refuses_a_full_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with whole_folder(out) as temporary:
        (temporary / "a.txt").write_text("a")
    with pytest.raises(SrmuError, match="not empty"), whole_folder(out):
        pass
    assert (out / "a.txt").read_text() == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_a_file_or_lies_in_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/out", "file/a/b"):
        with pytest.raises(SrmuError, match=r"is a file|not a folder"):
            require_free(tmp_path / name)
    require_free(tmp_path / "new" / "newer")


def test_a_link_that_leads_to_itself_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    # which of them depends on Python's version; both are one line
    with pytest.raises((SrmuError, OSError)), whole_folder(tmp_path / "loop") as folder:
        (folder / "a").touch()


def test_a_file_that_a_person_names(tmp_path: Path) -> None:
    write_output(tmp_path / "new" / "deep" / "a.md", "text\n")
    assert (tmp_path / "new" / "deep" / "a.md").read_text() == "text\n"
    for place, says in (
        (tmp_path, "is a folder; name a file in it"),
        (Path(), "is a folder"),
        (tmp_path / "new" / "deep" / "a.md" / "b", "cannot be written: "),
    ):
        with pytest.raises(SrmuError, match=says):
            write_output(place, "text")


def test_write_json_is_sorted_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": "é"})
    text = path.read_text()
    assert list(json.loads(text)) == ["a", "b"]
    assert text.endswith("}\n")

    with pytest.raises(TypeError):
        write_json(path, {"b": object()})

    def full(self: Path, text: str, **options: object) -> None:
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "other")
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_sha256_of_bytes_and_files(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"b" * 3_000_000)
    assert sha256(b"a", tmp_path / "b") == sha256(b"a" + b"b" * 3_000_000)
    assert sha256(b"abc").startswith("ba7816bf")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == Path(os.environ["SRMU_CACHE"])
    monkeypatch.delenv("SRMU_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "srmu"
