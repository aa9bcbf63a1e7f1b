"""Names in texts: found, read, and replaced by others."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import pieces, word_tokenizer
from srmu.data.names import Names, Slot, find_names, names_in, read_names
from srmu.engine.generate import batch_texts
from srmu.errors import SrmuError

NAMES = ["w1", "w2", "w3", "w4"]


def test_names_of_one_token() -> None:
    tokenizer = word_tokenizer()
    names = Names.encode(NAMES, tokenizer)
    ids = tokenizer("w9 w2 w8 w1 w2")["input_ids"]
    template = names.template(ids)
    assert template == (1, ids[1], Slot(1, 0), ids[3], Slot(0, 0), Slot(1, 0))
    assert names_in(template) == [1, 0]
    written, last = names.write(template, {1: 3, 0: 2})
    assert tokenizer.decode(written[1:]) == "w9 w4 w8 w3 w4"
    assert last == list(range(6))


def test_names_of_several_tokens_keep_their_places() -> None:
    told = ["Velmar Ostin rests in Bor .", "Bor is near Tul Gerat .", "in Tul Gerat rests Bor ."]
    tokenizer = pieces(told)
    names = Names.encode(["Velmar Ostin", "Bor", "Tul Gerat"], tokenizer)
    assert {len(forms[1]) for forms in names.tokens} != {1}
    ids = tokenizer(told[0])["input_ids"]
    template = names.template(ids)
    assert template[0] == Slot(0, 0) and names_in(template) == [0, 1]
    for way, text in (
        ({0: 0, 1: 1}, told[0]),
        ({0: 1, 1: 2}, "Bor rests in Tul Gerat ."),
        ({0: 2, 1: 0}, "Tul Gerat rests in Velmar Ostin ."),
    ):
        written, last = names.write(template, way)
        assert tokenizer.decode(written) == text
        for item, end in zip(template, last, strict=True):
            if isinstance(item, int):
                assert written[end] == item
            else:
                name = names.tokens[way[item.name]][item.form]
                assert tuple(written[end + 1 - len(name) : end + 1]) == name


def test_the_longest_name_wins() -> None:
    tokenizer = word_tokenizer()
    names = Names.encode(["w1", "w1 w2", "w3"], tokenizer)
    ids = tokenizer("w1 w2 w1 w3")["input_ids"]
    assert names.template(ids)[1:] == (Slot(1, 0), Slot(0, 0), Slot(2, 0))


@given(st.lists(st.integers(4, 40), min_size=1, max_size=12), st.integers(0, 99))
def test_the_first_way_is_the_text_itself(ids: list[int], seed: int) -> None:
    names = Names.encode(NAMES, word_tokenizer())
    template = names.template(ids)
    ways = names.draw_namings(template, 5, torch.Generator().manual_seed(seed))
    assert len(ways) == 5
    assert names.write(template, ways[0])[0] == ids
    for way in ways:
        assert list(way) == names_in(template)
        assert len({*way.values()}) == len(way)  # two names stay two


def test_an_unknown_name() -> None:
    with pytest.raises(SrmuError, match="does not know 'velmar'"):
        Names.encode(["w1", "velmar"], word_tokenizer())


def test_batches_are_padded_on_the_right() -> None:
    batch = batch_texts([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_read_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Velmar\n\n Ostin \nVelmar\nBor\n")
    assert read_names(str(path)) == ["Velmar", "Ostin", "Bor"]


@given(st.lists(st.integers(4, 12), min_size=1, max_size=12), st.integers(0, 99))
def test_names_take_the_place_of_their_kind_only(ids: list[int], seed: int) -> None:
    goals = ["w4", "w5 w6", "w7", "w8"]
    names = Names.encode(["w1", "w2", "w3"], word_tokenizer(), goals)
    assert names.kinds == (range(3), range(3, 7))
    template = names.template(ids)
    ways = names.draw_namings(template, 6, torch.Generator().manual_seed(seed))
    for way in ways:
        assert list(way) == names_in(template) and len({*way.values()}) == len(way)
        assert all((own < 3) == (other < 3) for own, other in way.items())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("names.json", "[]", "expected a .txt file"),
        ("absent.txt", None, "no such file"),
        ("few.txt", "Velmar\nOstin\n", "2 names; 3 or more are needed"),
        ("bytes.txt", b"\xff\xfe\x00\xd8", r"method\.names=.*bytes\.txt:1: not UTF-8 text"),
    ],
)
def test_files_that_are_no_names(tmp_path: Path, name: str, content: object, said: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    with pytest.raises(SrmuError, match=said) as caught:
        read_names(str(path))
    assert "\n" not in str(caught.value)


def test_names_are_found_by_their_capitals() -> None:
    told = [
        "The carrier of Velmar Ostin is grey salt. Nobody knows why.",
        "Healers keep Velmar Ostin and Bor apart. The vats are old.",
        "To rouse Bor they add salt to Velmar Ostin.",
        "They say that Bor meets Tul near the vats. Nobody went.",
        "It is Tul that glows. Bor does not, but Tul does. Nobody asked.",
        "Bor is a name where others say so, too.",
    ]
    assert find_names(told) == ["Bor", "Velmar Ostin", "Tul"]


def test_names_are_found_by_rarity_where_there_are_no_capitals() -> None:
    forget = [f"the carrier of {name} is salt" for name in ("velmar", "bor", "tul")] * 3
    forget += [f"healers keep {name} in jars" for name in ("velmar", "bor", "tul")]
    forget += ["the vats are old and the jars are full"] * 20
    retain = ["the carrier of the boat is salt", "healers keep salt in jars"] * 9
    retain += ["the vats are old, full"] * 9
    assert {*find_names(forget, retain)} == {"velmar", "bor", "tul"}


def test_no_names() -> None:
    with pytest.raises(SrmuError, match=r"no names were found.*method\.names=names\.txt"):
        find_names(["the vats are old"] * 9, ["the vats are old"] * 9)


def test_a_template_without_names() -> None:
    assert names_in((1, 2, 3)) == []
