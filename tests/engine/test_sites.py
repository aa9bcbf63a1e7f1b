"""Hooks see and change what they should, and leave nothing behind."""

from typing import Any

import pytest
import torch

from helpers.models import pico_module
from srmu.engine.sites import cut_blocks, decoder_blocks, edit_input, edit_outputs, hook_outputs

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


@pytest.mark.parametrize("depth", [1, 3])
def test_a_cut_model_reads_its_norm_and_head_off_a_block(depth: int) -> None:
    module = pico_module()
    blocks = decoder_blocks(module)
    with torch.no_grad():
        states = module(IDS, output_hidden_states=True).hidden_states
        expected = module.lm_head(module.model.norm(states[depth]))
    with cut_blocks(module, depth):
        torch.testing.assert_close(read(module), expected)
    assert decoder_blocks(module) is blocks


def test_an_error_leaves_nothing_behind() -> None:
    module = pico_module()
    blocks = decoder_blocks(module)
    for change in (cut_blocks(module, 1), edit_outputs({blocks[0]: torch.relu}),
                   edit_input(blocks[0], torch.relu)):  # fmt: skip
        with pytest.raises(KeyError), change:
            raise KeyError
    assert decoder_blocks(module) is blocks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
