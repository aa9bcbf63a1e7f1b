"""What docstrings show as typed gives what they show."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import srmu
from helpers.models import pico_module, word_tokenizer

SOURCE = Path(srmu.__file__).parent
SHOWN = [path.relative_to(SOURCE) for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", SHOWN, ids=str)
def test_examples_in_docstrings(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module(".".join(["srmu", *path.with_suffix("").parts]))
    known = {"srmu": srmu, "model": pico_module(), "tokenizer": word_tokenizer()}
    failed, tried = doctest.testmod(module, extraglobs=known, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
