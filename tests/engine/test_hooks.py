"""Hooks see and change what they should, and leave nothing behind."""

from typing import Any

import pytest
import torch
from torch import nn

from helpers.models import pico_module
from srmu.engine.hooks import (
    cut_blocks,
    decoder_blocks,
    edit_input,
    edit_outputs,
    hook_outputs,
    swap_blocks,
)

IDS = torch.tensor([[1, 9, 8, 7]])


def read(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS).logits


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_what_one_block_puts_out_is_what_the_next_one_reads(arch: str) -> None:
    module = pico_module(arch)
    blocks = decoder_blocks(module)
    plain = read(module)
    out: list[torch.Tensor] = []
    into: list[torch.Tensor] = []
    with edit_outputs({blocks[1]: out.append}), edit_input(blocks[2], into.append):
        assert read(module).equal(plain)  # what gives None changes nothing
    assert out[0].equal(into[0])
    with edit_outputs({blocks[1]: lambda h: 2 * h.double()}):
        doubled = read(module)
    with edit_input(blocks[2], lambda h: 2 * h.double()):
        assert read(module).equal(doubled)
    assert not doubled.equal(plain)
    assert read(module).equal(plain)


def test_hooks_see_inputs_beside_outputs() -> None:
    module = pico_module()
    embedding = module.get_input_embeddings()
    seen: list[Any] = []
    with hook_outputs({embedding: lambda args, output: seen.append((args, output))}):
        read(module)
    ((args, output),) = seen
    assert args[0].equal(IDS)
    assert output.equal(embedding(IDS))


def test_blocks_are_cut_and_swapped() -> None:
    module = pico_module()
    whole = decoder_blocks(module)
    with cut_blocks(module, 1):
        assert len(decoder_blocks(module)) == 1
        cut = read(module)
    assert decoder_blocks(module) is whole
    with swap_blocks(module, nn.ModuleList([whole[0]])):
        assert read(module).equal(cut)


def test_an_error_leaves_nothing_behind() -> None:
    module = pico_module()
    blocks = decoder_blocks(module)
    for change in (cut_blocks(module, 1), edit_outputs({blocks[0]: torch.relu}),
                   edit_input(blocks[0], torch.relu)):  # fmt: skip
        with pytest.raises(KeyError), change:
            raise KeyError
    assert decoder_blocks(module) is blocks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
