"""Continuations against loops written out, whatever the tokenizer and the checkpoint lack."""

from typing import Any

import pytest
import torch

from helpers.models import pico_module, texts, word_tokenizer
from srmu.engine.generate import continue_greedily, list_ends, next_logits, write_on

ROWS: list[list[int]] = list(word_tokenizer()(texts(9, seed=3))["input_ids"])


def write_by_hand(module: Any, row: list[int], length: int, ends: set[int]) -> list[int]:
    written: list[int] = []
    with torch.no_grad():
        while len(written) < length and not ends & {*written}:
            ids = torch.tensor([row + written])
            written.append(int(module(ids).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("special", [{}, {"pad_token": None}, {"eos_token": None}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rows_are_continued_as_one_by_one(name: str, special: dict[str, Any]) -> None:
    """With and without tokens to pad with and to end texts with."""
    module, tokenizer = pico_module(name), word_tokenizer(**special)
    often = write_by_hand(module, ROWS[0], 3, set())[-1]
    module.generation_config.eos_token_id = [often]
    ends = list_ends(module, tokenizer)
    assert ends == {often, tokenizer.eos_token_id} - {None}
    expected = [write_by_hand(module, row, 6, ends) for row in ROWS]
    assert write_on(module, ROWS, 6, ends)[0] == expected
    cut = [row[:-1] if row[-1] in ends else row for row in expected]
    assert continue_greedily(module, tokenizer, ROWS, 6) == cut
    assert {len(row) for row in cut} > {6}


def test_the_checkpoints_own_settings_play_no_part() -> None:
    module = pico_module()
    expected = [write_by_hand(module, row, 8, set()) for row in ROWS]
    module.generation_config.repetition_penalty = 5.0
    module.generation_config.eos_token_id = None
    own = module.generation_config
    assert write_on(module, ROWS, 8, set())[0] == expected
    assert module.generation_config is own


def test_logits_are_those_behind_each_token() -> None:
    module = pico_module()
    written, logits = write_on(module, ROWS, 4, {7}, keep_logits=True)
    for row, tokens, values in zip(ROWS, written, logits, strict=True):
        with torch.no_grad():
            whole = module(torch.tensor([row + tokens])).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(values, whole, rtol=1e-4, atol=1e-4)
        assert values.argmax(-1).tolist() == tokens


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_next_logits_are_those_of_each_row_alone(name: str) -> None:
    module = pico_module(name)
    rows = [[1, 9, 8, 7, 6], [1, 5], [1, 4, 3]]
    found = next_logits(module, rows, 2)
    for row, logits in zip(rows, found, strict=True):
        with torch.no_grad():
            alone = module(torch.tensor([row])).logits[0, -2:]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
