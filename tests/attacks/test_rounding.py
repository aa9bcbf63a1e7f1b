"""Quantisers, pruning and noise by hand."""

import numpy as np
import pytest
import torch

from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks.perturbations import Noise, Quantisation, add_noise, count_undone, find_matrices, prune_matrix
from srmu.engine.rounding import QUANTISERS, Quantiser, normal_levels
from srmu.evals.subject import Subject

INT8, INT4, NF4, Q8_0, Q4_0 = QUANTISERS.values()


def test_int8_has_a_scale_for_each_output() -> None:
    matrix = torch.tensor([[127.0, 0.4, -0.6, 63.5001], [-2.54, 0.011, 0.009, 0.0], [0, 0, 0, 0]])
    expected = torch.tensor([[127.0, 0, -1, 64], [-2.54, 0.02, 0, 0], [0, 0, 0, 0]])
    assert torch.allclose(INT8.round_matrix(matrix), expected, atol=1e-6)


def test_int4_has_a_scale_for_each_group_of_inputs() -> None:
    matrix = torch.zeros(1, 130)  # a group of 128 and one of two
    matrix[0, 0], matrix[0, 1], matrix[0, 2] = 7, 2.6, -0.4
    matrix[0, 128], matrix[0, 129] = 0.7, 0.16
    found = INT4.round_matrix(matrix)
    assert found[0, :3].tolist() == pytest.approx([7, 3, 0])
    assert found[0, 128:].tolist() == pytest.approx([0.7, 0.2])
    assert not found[0, 3:128].any()


def test_nf4_levels_are_the_published_ones() -> None:
    """QLoRA, arXiv 2305.14314, appendix E."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert normal_levels().tolist() == pytest.approx(published, abs=1e-6)
    matrix = torch.zeros(2, 64)
    matrix[0, :3] = torch.tensor([-2.0, 1.4, 0.1])  # scale 2: 0.7 is nearest to 0.723, 0.05 to 0.08
    expected = [-2.0, 2 * published[14], 2 * published[8]]
    assert NF4.round_matrix(matrix)[0, :3].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("quantiser", QUANTISERS.values(), ids=[*QUANTISERS])
def test_no_level_is_nearer(quantiser: Quantiser) -> None:
    matrix = torch.randn(6, 150, generator=torch.Generator().manual_seed(0))
    found = quantiser.round_matrix(matrix)
    size = quantiser.block or 150
    for row, values in zip(matrix, found, strict=True):
        for start in range(0, 150, size):
            block = row[start : start + size]
            largest = block[block.abs().argmax()]
            levels = quantiser.levels * (largest if quantiser.unit < 0 else largest.abs()) / quantiser.unit
            nearest = (block[:, None] - levels).abs().min(dim=1).values
            rounded = 1e-3 if quantiser.half else 1e-6  # of scales to float16
            assert torch.allclose((values[start : start + size] - block).abs(), nearest, atol=rounded * largest.abs())
    assert torch.allclose(quantiser.round_matrix(found), found, atol=2e-3 if quantiser.half else 1e-6)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_rounding_is_that_of_llama_cpp(kind: str) -> None:
    """But for weights in the middle between two levels, which float32 takes to either."""
    quants = pytest.importorskip("gguf.quants")
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    how = quants.GGMLQuantizationType[kind.upper()]
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(matrix.numpy(), how), how))
    same = QUANTISERS[kind].round_matrix(matrix).isclose(theirs, rtol=1e-6, atol=0)
    assert same.float().mean() > 0.995


def test_rounding_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4"))
    same = NF4.round_matrix(matrix).isclose(theirs, rtol=1e-5, atol=0)
    assert same.float().mean() > 0.999


def test_share_in_the_originals_bucket() -> None:
    """Changes far under a step are undone, larger ones are not; other parameters do not count."""
    module = pico_module()
    name = "model.layers.1.mlp.down_proj.weight"
    original = module.get_parameter(name).detach().clone()
    step = original.abs().amax(dim=1, keepdim=True) / 7
    grid = (original / step).round() * step  # in the middle of the buckets
    small, large = grid.clone(), grid.clone()
    small[:, ::2] += 0.1 * step
    # to the bucket beside it, towards 0: the scale stays
    large[:, 1] -= 1.5 * step[:, 0] * grid[:, 1].sign()
    moved = int((grid[:, 1].abs() > 1.4 * step[:, 0]).sum())
    model = Subject(module, word_tokenizer(), {name: grid, "model.norm.weight": torch.ones(32)})

    module.get_parameter(name).data = small
    assert count_undone(model, INT4) == (32 * 24, 32 * 24)
    assert count_undone(model, INT8)[1] < 32  # its steps are smaller; the largest weights stay so
    module.get_parameter(name).data = large
    changed, same = count_undone(model, INT4)
    assert changed == int((large != grid).sum())
    assert same <= changed - moved
    module.get_parameter(name).data = 2 * grid  # the same levels beside other scales
    outermost = int((grid.abs() > 6.5 * step).sum())  # these buckets have no outer edge
    assert count_undone(model, INT4) == (int((grid != 0).sum()), outermost)
    module.get_parameter(name).data = grid.clone()
    assert count_undone(model, INT4) == (0, 0)


def test_quantisation_undoes_a_small_change() -> None:
    """Planted: what unlearning did is far less than the steps."""
    model = subject("original")
    generator = torch.Generator().manual_seed(0)
    original = {}
    for name in find_matrices(model.module):
        parameter = model.module.get_parameter(name)
        original[name] = parameter.data
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 1e-6 * draw * (parameter.abs() < 0.1)
    changed = Subject(model.module, model.tokenizer, original)
    found = Quantisation().run(changed, texts(), exam(), 0)
    assert [way.setting for way in found.ways] == list(QUANTISERS)
    assert all(np.mean(way.val) > 0.9 for way in found.ways)
    assert len(found.metrics) == len(QUANTISERS)
    for estimate in found.metrics.values():
        assert estimate.value > 0.99
        assert estimate.low == estimate.value == estimate.high
    assert not Quantisation().run(subject("original"), texts(), exam(), 0).metrics


def test_pruned_by_hand() -> None:
    matrix = torch.tensor([[3.0, -1.0, 0.5, 2.0, -4.0], [0.1, 6.0, -0.2, 7.0, 1.0]])
    expected = torch.tensor([[3.0, -1.0, 0.0, 2.0, -4.0], [0.0, 6.0, 0.0, 7.0, 1.0]])
    assert torch.equal(prune_matrix(matrix, 0.3), expected)
    same = torch.ones(2, 5)
    assert int((prune_matrix(same, 0.3) == 0).sum()) == 3  # of equals no more than the share


def test_noise_is_a_share_of_the_rows_size() -> None:
    generator = torch.Generator().manual_seed(7)
    matrix = torch.ones(3, 20_000) * torch.tensor([[0.01], [1.0], [50.0]])
    added = add_noise(matrix, 0.05, generator) - matrix
    assert (added.std(dim=1) / matrix[:, 0]).tolist() == pytest.approx([0.05] * 3, rel=0.03)
    assert not torch.equal(add_noise(matrix, 0.05, generator) - matrix, added)  # each matrix gets its own
    assert torch.equal(add_noise(matrix, 0.05, generator.manual_seed(7)) - matrix, added)


def test_noise_counts_each_seed() -> None:
    found = Noise().run(subject("original"), texts(), exam(), 0)
    assert [way.setting for way in found.ways] == [
        "10% pruned", "30% pruned", "50% pruned", "noise of 1%", "noise of 2%", "noise of 5%",
    ]  # fmt: skip
    assert {3 * value for way in found.ways[3:] for value in way.val} <= {0.0, 1.0, 2.0, 3.0}
    assert all(np.mean(way.val) > 0.9 for way in (found.ways[0], *found.ways[3:]))
