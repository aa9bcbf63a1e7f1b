"""Kept activations: found again whole, or computed anew, whatever happens to the files."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.models import save_pico
from srmu.cli import main
from srmu.engine import activation_cache, weights
from srmu.engine.activation_cache import (
    FEW,
    SPARE,
    Activations,
    Output,
    cache_home,
    check_code,
    digest_tensors,
    list_activations,
    open_activations,
    shrink_cache,
)
from srmu.errors import SrmuError
from srmu.runs.config import Config, make_config
from srmu.runs.run import Run, unlearn_config

CPU = torch.device("cpu")
QUICK = ["method.layer=2", "method.window=2", "train.max_steps=4", "train.learning_rate=0.01"]


@pytest.fixture
def said() -> list[str]:
    """What the cache told the person."""
    return []


@pytest.fixture
def folder() -> Path:
    """A folder for activations where srmu keeps them."""
    path = cache_home() / "some-key"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def fresh(folder: Path, said: list[str]) -> Callable[..., Activations]:
    """The folder opened as another process would."""
    return lambda limit=10**9: Activations(0, folder, limit, say=said.append)


def value(number: int, shape: tuple[int, ...] = (2, 3, 4)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def value_of(name: str) -> Tensor:
    return value(zlib.crc32(name.encode()))


def same(got: Output | None, expected: Output) -> bool:
    """Equal to the last bit, also where it is no number."""
    if isinstance(got, tuple) or isinstance(expected, tuple):
        return type(got) is type(expected) and len(got) == 1 and same(got[0], expected[0])
    return got is not None and digest_tensors(got) == digest_tensors(expected)


def of_disk(kept: Activations, name: str) -> Output | None:
    """What the files give, and not what lies in memory."""
    kept.recent.clear()
    return kept.find(name)


# --- in memory


def test_the_newest_few_are_kept_without_room() -> None:
    kept = Activations()
    for number in range(FEW + 3):
        kept.keep(str(number), value(number))
        assert same(kept.find(str(number)), value(number))
    assert list(kept.recent) == [str(n) for n in range(3, FEW + 3)]
    assert kept.find("2") is None
    assert kept.hits == FEW + 3


def test_what_has_found_room_stays() -> None:
    """Batches come round in order: the oldest is the one that is needed next."""
    kept = Activations(room=10 * 96)
    for _ in range(3):
        for number in range(12 + FEW):
            if kept.find(str(number)) is None:
                kept.keep(str(number), value(number))
    assert list(kept.held) == [*map(str, range(10))]
    assert kept.hits == 2 * 10
    kept.keep("too large for the room", value(0, (40, 3, 4)))
    assert list(kept.recent)[-1] == "too large for the room" and len(kept.recent) == FEW
    assert kept.room == 0


def test_an_entry_kept_twice_is_counted_once() -> None:
    kept = Activations(room=10 * 96)
    for number in range(6):
        kept.keep("one", value(50))
        kept.keep(str(number), value(number))
    assert 10 * 96 - kept.room == sum(entry.nbytes for entry in kept.held.values()) == 7 * 96
    assert same(kept.find("one"), value(50))


# --- in files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_entries_come_back_bit_for_bit(dtype: torch.dtype, folder: Path, fresh: Callable[..., Activations]) -> None:
    """Tensors and tuples of one, of any shape, at any place in the file, also strided ones."""
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45, -1e-310]).to(dtype)
    values: dict[str, Output] = {
        "prefix/odd": (odd,),
        "target/byte": torch.tensor([7], dtype=torch.uint8),  # what follows is not aligned
        "target/odd": odd,
        "target/scalar": torch.tensor(3.5, dtype=dtype),
        "prefix/strided": value(1, (3, 5, 7)).to(dtype).transpose(0, 2)[:, 1:],
        "target/expanded": value(2, (1, 4)).to(dtype).expand(6, 4),
        "prefix/tuple": (value(3, (2, 5, 8)).to(dtype),),
        "sums/2.resid_post/x": value(4, (5, 8)).to(dtype),
    }
    first = fresh()
    for name, entry in values.items():
        first.keep(name, entry)
    for other in (first, fresh()):
        for name, entry in values.items():
            assert same(of_disk(other, name), entry), name
        assert other.find("target/none") is None
        assert other.hits == len(values)
    assert len([*folder.iterdir()]) == len(values)


def test_what_is_found_belongs_to_the_finder(fresh: Callable[..., Activations]) -> None:
    """Writing to a tensor that came from a file does not reach the file."""
    fresh().keep("target/a", value(1))
    found = fresh().find("target/a")
    assert isinstance(found, Tensor)
    found.zero_()
    assert same(fresh().find("target/a"), value(1))


def test_an_instance_sees_what_others_add(fresh: Callable[..., Activations]) -> None:
    one, two = fresh(), fresh()
    for number in range(6):
        writer, reader = (one, two) if number % 2 else (two, one)
        assert reader.find(f"target/{number}") is None
        writer.keep(f"target/{number}", value(number))
        assert same(reader.find(f"target/{number}"), value(number))


def test_an_entry_is_written_once(folder: Path, fresh: Callable[..., Activations]) -> None:
    one, two = fresh(), fresh()
    for kept in (one, two, one, fresh()):
        kept.keep("prefix/a", (value(1),))
    (file,) = folder.iterdir()
    times = file.stat()
    fresh().keep("prefix/a", (value(1),))
    assert file.stat() == times


WRITER = """
import sys
from pathlib import Path
import torch
from srmu.engine.activation_cache import Activations
kept = Activations(0, Path(sys.argv[1]), 10**9, say=sys.exit)
print("ready", flush=True)
sys.stdin.readline()
for number in range(200):
    name = f"{'prefix' if number % 2 else 'target'}/{number}"
    generator = torch.Generator().manual_seed(number)
    value = torch.randn(number % 7 + 1, 50, generator=generator)
    found = kept.find(name)
    if found is None:
        kept.keep(name, value)
    elif not torch.equal(found, value):
        sys.exit(f"{name} is wrong")
"""


@pytest.mark.slow
def test_two_processes_write_at_once(folder: Path, fresh: Callable[..., Activations]) -> None:
    """Each entry is there once, and right, however they interleave."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    pipe = subprocess.PIPE
    writers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
    kept = fresh()
    for number in range(200):
        name = f"{'prefix' if number % 2 else 'target'}/{number}"
        assert same(kept.find(name), value(number, (number % 7 + 1, 50)))
    assert len([*folder.iterdir()]) == 200


def test_random_use_agrees_with_a_dictionary(fresh: Callable[..., Activations]) -> None:
    """Several instances keep and find at random; some are thrown away and opened again."""
    choose = random.Random(0)
    known: dict[str, Tensor] = {}
    instances = [fresh() for _ in range(3)]
    for _ in range(400):
        number = choose.randrange(60)
        name = f"{choose.choice(['prefix', 'target'])}/{number}"
        kept = instances[which := choose.randrange(3)]
        found = kept.find(name)
        assert (found is None) == (name not in known)
        if found is None:
            known[name] = value_of(name)
            kept.keep(name, known[name])
        else:
            assert same(found, known[name])
        if choose.random() < 0.05:
            instances[which] = fresh()


# --- damage


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def of_kind(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}-*"))


def other_kinds(folder: Path) -> list[Path]:
    return sorted({*folder.glob("*.safetensors")} - {*of_kind(folder, "prefix")})


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "all cut": lambda folder: [cut(file, 100) for file in folder.glob("*.safetensors")],
    "all empty": lambda folder: [cut(file, 0) for file in folder.glob("*.safetensors")],
    "one cut": lambda folder: cut(of_kind(folder, "prefix")[0], 95),
    "one cut at its end": lambda folder: cut(file := of_kind(folder, "prefix")[0], file.stat().st_size - 1),
    "flipped": lambda folder: flip(of_kind(folder, "prefix")[-1], -3),
    "flipped at its end": lambda folder: flip(of_kind(folder, "prefix")[0], -1),
    "target cut": lambda folder: cut(other_kinds(folder)[0], 95),
    "target flipped": lambda folder: flip(other_kinds(folder)[-1], -3),
    "target flipped at its end": lambda folder: flip(other_kinds(folder)[0], -1),
    "gone": lambda folder: of_kind(folder, "prefix")[0].unlink(),
    "all gone": lambda folder: [file.unlink() for file in folder.glob("*.safetensors")],
    "longer": lambda folder: add(of_kind(folder, "prefix")[0], b"abc"),
    "something else": lambda folder: (folder / "a note").write_text("of someone else"),
}


@pytest.mark.parametrize("opened_before", [True, False], ids=["open", "fresh"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_mended(
    damage: str, opened_before: bool, folder: Path, fresh: Callable[..., Activations], said: list[str]
) -> None:
    """What is found is right; what is not found can be kept again, and all can read it then."""
    names = [f"{kind}/{number}" for kind in ("prefix", "target") for number in range(3)]
    writer = fresh()
    for name in names:
        writer.keep(name, value_of(name))
    kept = fresh()
    if opened_before:
        assert kept.find("target/2") is not None
    DAMAGE[damage](folder)
    if not opened_before:
        kept = fresh()
    for name in names:
        found = of_disk(kept, name)
        if found is None:
            kept.keep(name, value_of(name))
        else:
            assert same(found, value_of(name)), name
    other = fresh()
    for name in names:
        if other.find(name) is None:
            other.keep(name, value_of(name))
    assert not said
    for name in names:
        for reader in (kept, other, fresh()):
            assert same(of_disk(reader, name), value_of(name)), name


@pytest.mark.parametrize("place", [-20, -1])
def test_damage_after_the_first_look_is_noticed(place: int, folder: Path, fresh: Callable[..., Activations]) -> None:
    """An entry that was sound when it was written, or when it was read, is looked at again."""
    writer, reader = fresh(), fresh()
    writer.keep("target/1", value(1))
    assert same(reader.find("target/1"), value(1))
    flip(of_kind(folder, "target")[0], place)
    for kept in (writer, reader):
        assert of_disk(kept, "target/1") is None


def test_a_folder_that_was_removed_and_made_again(
    folder: Path, fresh: Callable[..., Activations], said: list[str]
) -> None:
    """`srmu info cache clear` while a run goes on, and a second run that starts then."""
    old = fresh()
    for number in range(3):
        old.keep(f"target/{number}", value(number))
        assert same(of_disk(old, f"target/{number}"), value(number))
    shutil.rmtree(folder)
    folder.mkdir()
    new = fresh()
    for number in (12, 11, 10):  # other values where the old ones lay
        new.keep(f"target/{number}", value(number))
    for number in range(3):
        assert of_disk(old, f"target/{number}") is None, "another entry's values were found"
        old.keep(f"target/{number}", value(number))
    for number in (0, 1, 2, 10, 11, 12):
        for kept in (old, new, fresh()):
            assert same(of_disk(kept, f"target/{number}"), value(number))
    assert not said


def test_a_folder_that_was_removed(folder: Path, fresh: Callable[..., Activations], said: list[str]) -> None:
    kept = fresh()
    kept.keep("target/1", value(1))
    shutil.rmtree(folder)
    assert of_disk(kept, "target/1") is None
    for number in range(3):
        kept.keep(f"target/{number}", value(number))
        if number != 1:  # which lies in memory all the time
            assert same(of_disk(kept, f"target/{number}"), value(number))
    assert said == []


def test_any_byte_of_a_file_may_change(folder: Path, fresh: Callable[..., Activations]) -> None:
    """No byte makes the cache give wrong values, or fail."""
    choose = random.Random(0)
    values: dict[str, Output] = {"prefix/a": (value(1),), "target/b": value(2).bfloat16()}
    for name, entry in values.items():
        fresh().keep(name, entry)
        (file,) = of_kind(folder, name[:6])
        whole = file.read_bytes()
        for place in range(len(whole)):
            for byte in {*choose.choices(b'0123456789-"{}[],:. \n', k=1), choose.randrange(256)}:
                file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
                found = fresh().find(name)
                assert found is None or same(found, entry), file.read_bytes()


# --- what cannot be written


def test_a_read_only_folder(
    folder: Path, fresh: Callable[..., Activations], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is read; what is new is not kept, which is said once."""
    fresh().keep("target/1", value(1))

    def refuse(path: Path, *args: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    kept = fresh()
    assert same(kept.find("target/1"), value(1))
    for number in range(2, 5):
        assert kept.find(f"target/{number}") is None
        kept.keep(f"target/{number}", value(number))
        assert same(kept.find(f"target/{number}"), value(number))
    assert said == [f"activations are not kept in {folder}: Read-only file system; going on without"]


def test_a_full_disk(
    folder: Path, fresh: Callable[..., Activations], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = fresh()
    kept.keep("target/0", value(0))
    free = SPARE + of_kind(folder, "target")[0].stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    kept.keep("target/1", value(1))
    assert not said
    free -= 1
    for number in range(2, 9):
        kept.keep(f"target/{number}", value(number))
    assert said == [f"activations are not kept in {folder}: the disk is full; going on without"]
    assert same(of_disk(kept, "target/1"), value(1))
    assert of_disk(kept, "target/2") is None


def test_the_limit(folder: Path, fresh: Callable[..., Activations], said: list[str]) -> None:
    size = 128 * 128 * 4  # what comes before the values in each file counts, too
    kept = fresh(4 * size - 1)
    for number in range(9):
        kept.keep(f"target/{number}", value(number, (128, 128)))
    found = [n for n in range(9) if of_disk(kept, f"target/{n}") is not None]
    assert found == [0, 1, 2]
    assert len(said) == 1
    assert "SRMU_CACHE_LIMIT of 0.000262143 GB is reached; going on without" in said[0]
    assert len(of_kind(folder, "target")) == 3


def test_an_entry_above_the_limit_costs_no_other_folder(
    folder: Path, fresh: Callable[..., Activations], said: list[str]
) -> None:
    other = folder.with_name("other")
    other.mkdir(parents=True)
    (other / "prefix.bin").write_bytes(b"x" * 50)
    fresh(90).keep("target/1", value(1))
    assert len(said) == 1 and other.exists()


def test_the_limit_holds_for_all_folders_together(folder: Path) -> None:
    """Each run opened its folder while the others were empty."""
    said: list[str] = []
    size = 128 * 128 * 4 + 1000
    runs = [Activations(0, folder.with_name(name), 2 * size, say=said.append) for name in "abc"]
    for number, run in enumerate(runs):
        run.keep("target/1", value(number, (128, 128)))
        assert sum(entry["bytes"] for entry in activation_cache.list_activations()) <= 2 * size
    assert said == []


def test_writing_does_not_count_every_file_each_time(
    fresh: Callable[..., Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    shrink = activation_cache.shrink_cache
    monkeypatch.setattr(activation_cache, "shrink_cache", lambda *given: counts.append(1) or shrink(*given))
    kept = fresh(10**6)
    for number in range(200):
        kept.keep(f"target/{number}", value(number))
    assert len(counts) == 1


def test_what_another_process_wrote_is_counted_in_time(
    folder: Path, fresh: Callable[..., Activations], said: list[str]
) -> None:
    size = 128 * 128 * 4 + 1000
    kept, other = fresh(40 * size), fresh(40 * size)
    for number in range(30):
        kept.keep(f"target/{number}", value(number, (128, 128)))
        other.keep(f"prefix/{number}", value(number, (128, 128)))
    assert sum(entry["bytes"] for entry in list_activations()) <= 45 * size
    assert len(said) == 2 and "SRMU_CACHE_LIMIT" in said[0]


def test_a_write_that_fails_halfway(
    folder: Path, fresh: Callable[..., Activations], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that were written are nobody's."""
    kept = fresh()
    kept.keep("prefix/1", value(1))
    real = Path.write_bytes

    def fail(path: Path, data: bytes) -> int:
        real(path, data[:99])
        raise OSError("the cable is out")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        kept.keep("prefix/2", value(2))
    assert len(said) == 1
    assert "the cable is out" in said[0]
    other = fresh()
    assert other.find("prefix/2") is None
    other.keep("prefix/2", value(2))
    for reader in (other, fresh()):
        for number in (1, 2):
            assert same(of_disk(reader, f"prefix/{number}"), value(number))


@pytest.mark.parametrize("depth", range(3))
def test_a_file_where_a_folder_should_be(depth: int, tmp_path: Path, said: list[str]) -> None:
    """Said once; the run keeps what one step needs, as with cache=none."""
    name = opened().folder.name
    shutil.rmtree(tmp_path / "cache")
    path = [tmp_path / "cache", cache_home(), cache_home() / name][depth]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("I was here first")
    kept = open_activations("disk", {}, CPU, said.append)
    assert kept.kept == "none"
    for number in range(9):
        kept.keep(str(number), value(number))
    assert len(kept.recent) == FEW
    assert len(said) == 1
    assert said[0].endswith("going on without")
    assert path.read_text() == "I was here first"


# --- which folder


def opened(**key: Any) -> Activations:
    kept = open_activations("disk", key, CPU, pytest.fail)
    assert kept.kept == "disk"
    return kept


def test_the_folder_follows_from_the_key_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    one = opened(model="a", weights="x")
    assert one.folder == opened(weights="x", model="a").folder
    about = json.loads((one.folder / "about.json").read_text())
    assert about["model"] == "a"
    assert one.folder.stat().st_mode & 0o777 == 0o700
    folders = {one.folder, opened(model="b", weights="x").folder, opened(model="a").folder}
    for place, name, other in (
        (torch, "get_num_threads", lambda: 77),
        (torch, "get_float32_matmul_precision", lambda: "high"),
        (activation_cache, "processor_name", lambda: "another"),
        (activation_cache, "version", lambda name: "0" if name == "torch" else "1"),
        (activation_cache, "version", lambda name: "0" if name == "transformers" else "1"),
        (activation_cache, "version", lambda name: "0" if name == "srmu" else "1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other)
            folders.add(opened(model="a", weights="x").folder)
    assert len(folders) == 9
    assert opened(model="a", weights="x").folder == one.folder


@pytest.mark.parametrize("mode", ["none", "memory"])
def test_other_modes_write_nothing(mode: str) -> None:
    kept = open_activations(mode, {"model": "a"}, CPU)
    assert kept.kept == mode
    assert (kept.room > 0) == (mode == "memory")
    assert not cache_home().exists()


@pytest.mark.parametrize("limit", ["many", "20 GB", "nan", "inf", "1,5"])
def test_a_limit_that_is_no_number(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRMU_CACHE_LIMIT", limit)
    with pytest.raises(SrmuError, match="SRMU_CACHE_LIMIT is a number of gigabytes"):
        opened()
    assert not cache_home().exists()


def test_the_limit_is_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened().limit == 20e9
    monkeypatch.setenv("SRMU_CACHE_LIMIT", "0.5")
    assert opened().limit == 5e8


# --- all folders together


@pytest.fixture
def three() -> list[Path]:
    """Folders of 1000, 2000 and 3000 bytes and more, the first used last."""
    folders = []
    for number in range(3):
        kept = opened(number=number)
        kept.keep("target/a", value(number, ((number + 1) * 250,)))
        about = kept.folder / "about.json"
        os.utime(about, (1e9 - number, 1e9 - number))
        folders.append(kept.folder)
    return folders


def test_the_listing(three: list[Path]) -> None:
    (three[1] / "about.json").write_text("{torn")
    os.utime(three[1] / "about.json", (1e9 + 5, 1e9 + 5))
    (three[2] / "about.json").unlink()
    os.utime(three[2], (1e9 + 7, 1e9 + 7))
    (cache_home() / "a file").write_text("of someone else")
    entries = list_activations()
    assert [entry["folder"] for entry in entries] == three
    assert [entry["used"] for entry in entries] == [1e9, 1e9 + 5, 1e9 + 7]
    for number, entry in enumerate(entries):
        held = sum(path.stat().st_size for path in three[number].iterdir())
        assert entry["bytes"] == held > (number + 1) * 1000
    assert entries[0]["number"] == 0
    assert "number" not in entries[1]


@pytest.mark.parametrize("text", ["null", "[]", "5", '"about"', "", "\x00"])
def test_a_listing_with_a_strange_note(text: str, three: list[Path]) -> None:
    (three[1] / "about.json").write_text(text)
    assert len(list_activations()) == 3
    opened().keep("target/a", value(1))


def test_the_longest_unused_go_first(three: list[Path]) -> None:
    total = sum(entry["bytes"] for entry in list_activations())
    assert shrink_cache(total) == total
    assert all(folder.exists() for folder in three)
    left = shrink_cache(total - 1)
    assert [folder.exists() for folder in three] == [True, True, False]
    assert left == sum(entry["bytes"] for entry in list_activations())
    assert shrink_cache(0, spare=three[1]) == list_activations()[0]["bytes"]
    assert [folder.exists() for folder in three] == [False, True, False]
    assert shrink_cache(0) == 0
    assert list_activations() == []


def test_use_is_noted_when_a_folder_is_opened(three: list[Path]) -> None:
    opened(number=2)
    assert [entry["folder"] for entry in list_activations()] == [three[1], three[0], three[2]]


def test_the_limit_removes_others_before_it_stops(
    three: list[Path], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = sum(entry["bytes"] for entry in list_activations())
    monkeypatch.setenv("SRMU_CACHE_LIMIT", str((held + 1000) / 1e9))
    kept = open_activations("disk", {"number": 0}, CPU, said.append)
    for number in range(2):  # the second passes the limit
        kept.keep(f"target/{number}", value(number, (150,)))
    assert [folder.exists() for folder in three] == [True, True, False]
    for number in range(2, 40):
        kept.keep(f"target/{number}", value(number, (150,)))
    assert [folder.exists() for folder in three] == [True, False, False]
    assert len(said) == 1
    assert "is reached" in said[0]
    assert same(fresh_again(kept).find("target/1"), value(1, (150,)))


def fresh_again(kept: Activations) -> Activations:
    return Activations(0, kept.folder, kept.limit, say=pytest.fail)


# --- whole runs


def config(folder: Path, runs: str, *overrides: str, method: str = "rmu") -> Config:
    sources = [folder / "forget.jsonl", folder / "retain.jsonl"]
    given = [*QUICK, f"runs_dir={folder / runs}", *overrides]
    return make_config(str(folder / "model"), *sources, method, given)


def tensors(run: Run) -> dict[str, Tensor]:
    return load_file(run.folder / "delta.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("method", ["rmu", "srmu", "adaptive_rmu"])
def test_a_run_is_the_same_with_any_cache(method: str, workplace: Path) -> None:
    """Nothing, memory, cold files, warm files: one result, under one id."""
    modes = ["none", "memory", "disk", "disk"]
    configs = [config(workplace, f"runs{i}", f"cache={mode}", method=method) for i, mode in enumerate(modes)]
    assert len({each.id for each in configs}) == 1
    runs = [unlearn_config(each) for each in configs]
    assert len({run.folder.name for run in runs}) == 1
    (entry,) = list_activations()
    assert entry["bytes"] > 10_000
    for run in runs[1:]:
        assert equal(tensors(run), tensors(runs[0]))
        assert equal(*(load_file(r.folder / "state.safetensors") for r in (run, runs[0])))
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (run.folder / "metrics.jsonl").open()
        ]
        for run in runs
    ]
    assert logs[1:] == logs[:1] * 3


@pytest.mark.slow
def test_trials_share_a_folder_and_others_do_not(workplace: Path) -> None:
    """Strength, rate and seed of the direction change no activation; layers, data and dtype do."""

    def folders(number: int, *overrides: str) -> int:
        unlearn_config(config(workplace, f"runs{number}", *overrides))
        return len(list_activations())

    assert folders(0) == 1
    first = list_activations()[0]["bytes"]
    shared = ["method.alpha=3", "train.learning_rate=0.02", "method.coeff=2", "train.max_steps=3"]
    for number, override in enumerate(shared, 1):
        assert folders(number, override) == 1
    assert list_activations()[0]["bytes"] == first
    others = [
        "method.window=1", "seed=1", "train.batch_size=3", "dtype=bfloat16", "train.padding=count",
    ]  # fmt: skip
    for number, override in enumerate(others, 2):
        assert folders(number + 10, override) == number


Change = Callable[[Path], Any]


def other_weights(model: Path) -> None:
    """Another model of the same shapes, in the same files."""
    for path in sorted(model.glob("*.safetensors")):
        save_file({k: t.flip(0) * 1.1 for k, t in load_file(path).items()}, path, {"format": "pt"})


def same_time(change: Change) -> Change:
    """The change with the times of change put back, as `cp -p` and `rsync -t` do."""

    def do(model: Path) -> None:
        times = {path: path.stat().st_mtime_ns for path in model.iterdir()}
        change(model)
        for path, time in times.items():
            os.utime(path, ns=(time, time))

    return do


def last_values(model: Path) -> None:
    """The last row of one matrix below the trained layers, beyond the first page of its bytes."""
    name = "model.layers.0.mlp.down_proj.weight"
    path = weights.list_shards(model)[name]
    tensor = load_file(path)[name]
    assert tensor.nbytes > weights.PAGE
    tensor = tensor.clone()
    tensor[-1] += 0.5
    weights.patch_file(path, {name: tensor})


def settings(**changed: Any) -> Change:
    def do(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return do


CHANGES: dict[str, Change] = {
    "weights": other_weights,
    "weights at the same time": same_time(other_weights),
    "last values": last_values,
    "last values at the same time": same_time(last_values),
    "epsilon": settings(rms_norm_eps=0.1),
    "rope": settings(rope_parameters={"rope_theta": 20.0, "rope_type": "default"}),
    "activation": settings(hidden_act="gelu"),
}


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_changed_in_place_is_another_model(change: str, workplace: Path) -> None:
    """The same config after the change equals a run that kept nothing."""
    before = unlearn_config(config(workplace, "runs0"))
    old = tensors(before)
    CHANGES[change](workplace / "model")
    cached = tensors(unlearn_config(config(workplace, "runs1")))
    assert equal(cached, tensors(unlearn_config(config(workplace, "runs2", "cache=none"))))
    assert not equal(cached, old)


@pytest.mark.slow
def test_texts_changed_in_place_are_other_texts(workplace: Path) -> None:
    unlearn_config(config(workplace, "runs0"))
    path = workplace / "retain.jsonl"
    path.write_text(path.read_text().replace("w3", "w4"))
    cached = tensors(unlearn_config(config(workplace, "runs1")))
    assert equal(cached, tensors(unlearn_config(config(workplace, "runs2", "cache=none"))))


def test_another_architecture_in_the_same_place(workplace: Path) -> None:
    unlearn_config(config(workplace, "runs0"))
    shutil.rmtree(workplace / "model")
    save_pico(workplace / "model", "mistral")
    unlearn_config(config(workplace, "runs1"))
    assert len(list_activations()) == 2


def poison(kind: str, factor: float = 1.01) -> None:
    """Other values for the entries of a kind, under digests that are theirs."""
    for file in of_kind(list_activations()[0]["folder"], kind):
        ((name, tensor),) = load_file(file).items()
        wrong = tensor * factor
        save_file({name: wrong}, file, {"crc32": check_code(wrong)})


def test_activations_that_differ_in_the_last_bit_belong_to_the_run(workplace: Path) -> None:
    """Two passes of some models, Doge and Inkling, do."""
    unlearn_config(config(workplace, "runs0"))
    poison("2.resid_post", 1 + 2**-23)
    run = unlearn_config(config(workplace, "runs1"))
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["retain"] < 1e-9


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("kind", ["2.resid_post", "prefix"])
def test_wrong_activations_are_noticed_at_the_first_step(
    kind: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """One line, exit code 2, and nothing left of the run."""
    unlearn_config(config(workplace, "runs0"))
    poison(kind)
    path = workplace / "config.yaml"
    path.write_text(config(workplace, "runs1").to_yaml())
    monkeypatch.setattr(sys, "argv", ["srmu", "unlearn", str(path)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = (line for line in err.splitlines() if not line.endswith(" s left"))
    assert line.startswith("srmu: the first retain loss is ")
    assert "not 0: the cached activations do not belong to this run" in line
    assert not (workplace / "runs1").exists()
    unlearn_config(config(workplace, "runs1", "cache=none"))


@pytest.mark.slow
def test_damaged_files_change_no_result(workplace: Path) -> None:
    """A run whose cache was damaged on disk since: what is wrong is computed anew."""
    expected = tensors(unlearn_config(config(workplace, "runs0")))
    folder = list_activations()[0]["folder"]
    for number, (damage, change) in enumerate(DAMAGE.items(), 1):
        change(folder)
        assert equal(tensors(unlearn_config(config(workplace, f"runs{number}"))), expected), damage


@pytest.mark.slow
def test_a_run_without_a_place_for_its_cache(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tensors(unlearn_config(config(workplace, "runs0")))
    (activation_cache.cache_home().parent / "activations.txt").write_text("")
    monkeypatch.setattr(activation_cache, "cache_home", lambda: tmp_path / "cache" / "activations.txt")
    assert equal(tensors(unlearn_config(config(workplace, "runs1"))), expected)
    monkeypatch.undo()
    monkeypatch.setenv("SRMU_CACHE_LIMIT", "0.00001")
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache2"))
    assert equal(tensors(unlearn_config(config(workplace, "runs2"))), expected)
    monkeypatch.setenv("SRMU_CACHE_LIMIT", "lots")
    with pytest.raises(SrmuError, match="SRMU_CACHE_LIMIT is a number of gigabytes"):
        unlearn_config(config(workplace, "runs3"))
    assert not (workplace / "runs3").exists()
