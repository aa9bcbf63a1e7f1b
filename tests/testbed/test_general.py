"""The general facts that `atlas` asks a real model."""

import re
from importlib.resources import files
from typing import Any

import pytest
import yaml

TEXT = files("srmu.testbed").joinpath("worlds/general.yaml").read_text(encoding="utf-8")
KINDS: list[dict[str, Any]] = yaml.safe_load(TEXT)["kinds"]
COUNTRIES = (
    "Australia|Brazil|Canada|China|Egypt|England|France|Germany|India|Indonesia|Iran|Italy|Japan|Mexico|Nigeria|"
    "Russia|Spain|Turkey|Britain|America"
)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind["name"] for kind in KINDS])


def say_facts(kind: dict[str, Any]) -> list[str]:
    """Every sentence that a text can tell of the kind's facts."""
    frames = [*(f"{asked} {{v}}." for asked in kind["asked"]), *kind["told"]]
    return [frame.format(x=subject, v=answer) for frame in frames for subject, answer in kind["facts"].items()]


def test_there_are_enough_kinds_and_facts() -> None:
    names = [kind["name"] for kind in KINDS]
    assert len(names) == len({*names}) >= 10
    assert sum(len(kind["facts"]) for kind in KINDS) >= 500


def test_no_subject_is_given_twice() -> None:
    """YAML keeps the last of two equal keys and says nothing."""
    root = yaml.compose(TEXT, Loader=yaml.SafeLoader)
    [(_, kinds)] = root.value
    for fields in kinds.value:
        for mapping in (fields, *(value for _, value in fields.value if isinstance(value, yaml.MappingNode))):
            keys = [key.value for key, _ in mapping.value]
            assert len(keys) == len({*keys}), sorted(key for key in keys if keys.count(key) > 1)


@each_kind
def test_kind_has_two_phrasings_and_enough_answers(kind: dict[str, Any]) -> None:
    assert set(kind) == {"name", "asked", "told", "facts"}
    assert kind["name"].isalpha()
    first, second = kind["asked"]
    assert first != second
    assert all(text.count("{x}") == 1 and "{v}" not in text and text == text.strip() for text in kind["asked"])
    assert all(text.count("{x}") == text.count("{v}") == 1 and text.endswith(".") for text in kind["told"])
    assert 40 <= len(kind["facts"]) <= 90
    assert len({*kind["facts"].values()}) >= 4


@each_kind
def test_subjects_and_answers_are_texts(kind: dict[str, Any]) -> None:
    """Unquoted, YAML takes `No` for false, and `12` for a number."""
    texts = [kind["name"], *kind["asked"], *kind["told"], *kind["facts"], *kind["facts"].values()]
    assert all(isinstance(text, str) and text == text.strip() != "" for text in texts)


@each_kind
def test_sentences_begin_with_a_capital_or_a_number(kind: dict[str, Any]) -> None:
    assert [text for text in say_facts(kind) if not (text[0].isupper() or text[0].isdigit())] == []


@each_kind
def test_no_country_is_named(kind: dict[str, Any]) -> None:
    """Or general facts would be lost with the geography that a method is told to forget."""
    named = re.compile(rf"\b({COUNTRIES})")
    assert [text for text in say_facts(kind) if named.search(text)] == []
