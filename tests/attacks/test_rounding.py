"""Quantisers, pruning and noise by hand."""

import ctypes

import numpy as np
import pytest
import torch

from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks.perturbations import Noise, Quantisation, add_noise, count_undone, find_matrices, prune_matrix
from srmu.engine import rounding
from srmu.engine.rounding import QUANTISERS, Quantiser, normal_levels, pack_q4_k
from srmu.evals.subject import Subject

INT8, INT4, NF4 = (QUANTISERS[kind] for kind in ("int8", "int4", "nf4"))


def draw_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16().float()


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
    """Also where the last block is not full; what is rounded stays, but where scales are rounded too."""
    matrix = torch.randn(6, 150, generator=torch.Generator().manual_seed(0))
    found = quantiser.round_matrix(matrix)
    assert found.shape == matrix.shape
    weights, rounded = quantiser.group_weights(matrix), quantiser.group_weights(found)
    scale, offset = quantiser.scale_groups(weights)
    levels = quantiser.levels * scale + offset
    nearest = (weights[..., None] - levels[..., None, :]).abs().amin(dim=3)
    largest = weights.abs().amax(dim=2, keepdim=True)
    inside = (torch.arange(weights[0].numel()) < 150).view(weights.shape[1:])  # not what fills up the last block
    apart = ((rounded - weights).abs() - nearest).abs() / largest.clamp(min=1e-9)
    assert apart[:, inside].max() < (1e-3 if quantiser.half else 1e-6)
    if quantiser.together == 1 and quantiser.unit != 127.5:
        assert torch.allclose(quantiser.round_matrix(found), found, atol=2e-3 if quantiser.half else 1e-6)
    assert not quantiser.round_matrix(torch.zeros(2, 40)).any()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_rounding_is_that_of_gguf(kind: str) -> None:
    """But for weights in the middle between two levels, which float32 takes to either."""
    quants = pytest.importorskip("gguf.quants")
    matrix = draw_matrix(64, 96)
    how = quants.GGMLQuantizationType[kind.upper()]
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(matrix.numpy(), how), how))
    same = QUANTISERS[kind].round_matrix(matrix).isclose(theirs, rtol=1e-6, atol=0)
    assert same.float().mean() > 0.995


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_q4_k_is_what_its_bytes_say(shift: float) -> None:
    """Each rounded weight is one that a file holds, and most are nearer than in Q4_0."""
    quants = pytest.importorskip("gguf.quants")
    matrix = draw_matrix(64, 512) * torch.logspace(-3, 1, 64)[:, None] + shift
    matrix[3, 40:80], matrix[4], matrix[5, :256] = 0, -0.25, 1e-9
    rounded = QUANTISERS["q4_k"].round_matrix(matrix)
    stored = pack_q4_k(matrix).numpy()
    assert stored.shape == (64, 2 * 144)
    assert torch.equal(torch.from_numpy(quants.dequantize(stored, quants.GGMLQuantizationType.Q4_K)), rounded)
    errors = [(QUANTISERS[kind].round_matrix(matrix) - matrix).square().mean().sqrt() for kind in ("q4_k", "q4_0")]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("kind", [*QUANTISERS])
def test_rows_are_rounded_alike_a_few_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = QUANTISERS[kind].round_matrix(draw_matrix(7, 300))
    monkeypatch.setattr(rounding, "PART", 700)
    assert torch.equal(QUANTISERS[kind].round_matrix(draw_matrix(7, 300)), whole)


def test_q4_k_is_that_of_llama_cpp() -> None:
    """But for blocks in which two scales are as good, to the last bits of a sum."""
    quants, library = pytest.importorskip("gguf.quants"), pytest.importorskip("xllamacpp.xllamacpp")
    matrix = draw_matrix(64, 512)
    stored = np.zeros((64, 2 * 144), np.uint8)
    quantise = ctypes.CDLL(library.__file__).quantize_row_q4_K_ref
    quantise(ctypes.c_void_p(matrix.data_ptr()), ctypes.c_void_p(stored.ctypes.data), ctypes.c_int64(matrix.numel()))
    theirs = torch.from_numpy(quants.dequantize(stored, quants.GGMLQuantizationType.Q4_K))
    rounded = QUANTISERS["q4_k"].round_matrix(matrix)
    assert rounded.isclose(theirs, rtol=1e-6, atol=0).float().mean() > 0.97
    errors = [float((one - matrix).square().mean()) for one in (rounded, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_rounding_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    matrix = draw_matrix(64, 128)
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4"))
    same = NF4.round_matrix(matrix).isclose(theirs, rtol=1e-5, atol=0)
    assert same.float().mean() > 0.999
    levels, largest, _ = functional.int8_vectorwise_quant(matrix.half())
    same = INT8.round_matrix(matrix).isclose(levels * largest[:, None] / 127, rtol=1e-5)
    assert same.float().mean() > 0.99  # all but those in the middle between two levels


def test_rounding_is_that_of_torchao() -> None:
    """Of weights in float32; its kernels want bfloat16, in which scales and offsets are kept, too."""
    torchao = pytest.importorskip("torchao.quantization.quant_primitives")
    matrix = draw_matrix(64, 256)
    kind, size, bounds = torchao.MappingType.SYMMETRIC, (1, 256), (torch.int8, -128, 127)
    given = torchao.choose_qparams_affine(matrix, kind, size, *bounds)
    levels = torchao.quantize_affine(matrix, size, *given, *bounds)
    theirs = torchao.dequantize_affine(levels, size, *given, *bounds)
    same = QUANTISERS["torchao_int8"].round_matrix(matrix).isclose(theirs, rtol=1e-5, atol=0)
    assert same.float().mean() > 0.99
    kind, size, bounds = torchao.MappingType.ASYMMETRIC, (1, 128), (torch.int32, 0, 15)
    given = torchao._choose_qparams_affine_tinygemm(matrix, kind, size, *bounds)
    levels = torchao._quantize_affine_tinygemm(matrix, size, *given, *bounds)
    theirs = torchao._dequantize_affine_tinygemm(levels, size, *given, *bounds)
    same = QUANTISERS["torchao_int4"].round_matrix(matrix).isclose(theirs, rtol=1e-4, atol=1e-6)
    assert same.float().mean() > 0.99


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
