"""Maps, targets and losses against loops and closed forms; no model."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srmu.engine.losses import is_counted, token_cosine, token_mean, token_mse, without_first
from srmu.engine.topic import Batch
from srmu.methods import RMU, SRMU, importance
from srmu.methods.importance import (
    Direction,
    Fusion,
    Statistic,
    describe_importance,
    importance_map,
    measure_features,
    sum_features,
)

FUSIONS = get_args(Fusion)
STATISTICS = get_args(Statistic)
D = 24


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sizes(seed: int) -> torch.Tensor:
    """A statistic: (D,) in [0.1, 1.1)."""
    return torch.rand(D, generator=torch.Generator().manual_seed(seed)) + 0.1


def fuse(v_f: torch.Tensor, v_r: torch.Tensor, kind: Any, **options: Any) -> torch.Tensor:
    order = torch.randperm(len(v_f), generator=torch.Generator().manual_seed(9))
    return importance_map(v_f, v_r, kind, **{"order": order} | options)


vectors = st.lists(st.floats(0, 1e4, width=32), min_size=2, max_size=12)
signed = st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=12)


# --- importance maps (SRMU eqs. 2 and 3) ---------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(v_f=vectors, v_r=vectors)
@pytest.mark.parametrize("kind", FUSIONS)
def test_a_map_lies_between_0_and_1(kind: Any, v_f: list[float], v_r: list[float]) -> None:
    n = min(len(v_f), len(v_r))
    map_ = fuse(torch.tensor(v_f[:n]), torch.tensor(v_r[:n]), kind)
    assert map_.shape == (n,)
    assert map_.isfinite().all()
    assert ((map_ >= 0) & (map_ <= 1)).all()


@settings(max_examples=30, deadline=None)
@given(v_f=signed, v_r=signed)
@pytest.mark.parametrize("kind", FUSIONS)
def test_signed_values_give_no_nan(kind: Any, v_f: list[float], v_r: list[float]) -> None:
    """The literal statistic is signed; what has no value selects nothing."""
    n = min(len(v_f), len(v_r))
    map_ = fuse(torch.tensor(v_f[:n]), torch.tensor(v_r[:n]), kind)
    assert ((map_ >= 0) & (map_ <= 1)).all()


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", FUSIONS)
def test_every_statistic_gives_every_map(statistic: Any, kind: Any) -> None:
    """Random signed activations, the case in which the printed ratio is undefined."""
    mask = torch.ones(3, 4, dtype=torch.bool)
    values = [measure_features([sum_features(rand(3, 4, D, seed=s), mask)], statistic)[0] for s in (1, 2)]
    map_ = fuse(*values, kind)
    assert ((map_ >= 0) & (map_ <= 1)).all()
    assert (map_.max() > 0.99) if kind != "product_inverse" else (map_.min() < 0.01)


def naive_map(v_f: list[float], v_r: list[float], kind: str, lam: float, eps: float) -> Any:
    """The paper's three fusions, one feature at a time, and its normalisation."""
    n = len(v_f)
    raw = []
    for f, r in zip(v_f, v_r, strict=True):
        if kind == "ratio":
            raw.append(math.log(1 + f / (r + eps)))
        elif kind == "difference":
            raw.append(max(0.0, f - lam * r))
        else:
            raw.append(f * r / (sum(v_f) / n * (sum(v_r) / n) + eps))
    return [x / (max(raw) + 1e-8) for x in raw], max(raw)


@pytest.mark.parametrize("lam", [0.5, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("kind", ["ratio", "difference", "product", "product_inverse"])
def test_maps_equal_a_loop(kind: Any, lam: float, eps: float) -> None:
    v_f, v_r = sizes(1), sizes(2)
    got = importance_map(v_f, v_r, kind, lam=lam, eps=eps)
    expected, biggest = naive_map(v_f.tolist(), v_r.tolist(), kind, lam, eps)
    largest = biggest / (biggest + 1e-8)
    if kind == "product_inverse":
        expected = [1 - x for x in expected]
        assert got.min() == pytest.approx(1 - largest, abs=1e-6)
    else:
        assert got.max() == pytest.approx(largest, rel=1e-6)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_small_map_keeps_the_constant_of_equation_3() -> None:
    """max(I_norm) = max(I) / (max(I) + 1e-8), also where the constant is not negligible."""
    v_f = torch.tensor([3e-8, 1e-8, 0.0])
    got = importance_map(v_f, torch.zeros(3), "difference")
    assert got.tolist() == pytest.approx([0.75, 0.25, 0.0], rel=1e-5)


def test_equal_statistics_leave_no_selection() -> None:
    v = sizes(1)
    torch.testing.assert_close(importance_map(v, v, "ratio"), torch.ones(D), rtol=0, atol=1e-4)
    assert torch.equal(importance_map(v, v, "difference"), torch.zeros(D))
    assert torch.equal(importance_map(v, v, "uniform"), torch.ones(D))
    assert importance_map(torch.zeros(D), torch.zeros(D), "product").eq(0).all()


def test_a_zero_map_is_the_zero_target() -> None:
    """With v_f == v_r the difference map gives the loss of the variant direction=zero."""
    v, hidden, mask = sizes(1), rand(2, 3, D), torch.ones(2, 3, dtype=torch.bool)
    for strength in ({"coeff": 5.0}, {"kappa": 5.0}):
        method = SRMU(importance="difference", **strength)
        target = method.scaled(rand(D).sign() * importance_map(v, v, "difference"), norm=3.0)
        nothing = SRMU(direction="zero", **strength).scaled(draw("zero"), norm=3.0)
        assert torch.equal(target, nothing)
        assert token_mse(hidden, target, mask).value == hidden.square().mean()


@pytest.mark.parametrize("k", [0.01, 3.0, 1000.0])
def test_scaling_both_statistics_changes_no_map(k: float) -> None:
    v_f, v_r = sizes(1), sizes(2)
    for kind, eps in (("ratio", 1e-12), ("shuffled", 1e-12), ("difference", 1e-6)):
        torch.testing.assert_close(fuse(k * v_f, k * v_r, kind, eps=eps), fuse(v_f, v_r, kind, eps=eps))


@pytest.mark.parametrize("kind", ["product", "product_inverse"])
def test_the_product_map_is_symmetric_and_scale_free(kind: Any) -> None:
    v_f, v_r = sizes(1), sizes(2)
    map_ = importance_map(v_f, v_r, kind)
    assert torch.equal(importance_map(v_r, v_f, kind), map_)
    torch.testing.assert_close(importance_map(7 * v_f, v_r, kind), map_)
    torch.testing.assert_close(importance_map(v_f, v_r / 7, kind), map_)
    torch.testing.assert_close(importance_map(v_f, v_r, "product_inverse"), 1 - fuse(v_f, v_r, "product"))


@pytest.mark.parametrize("kind", [k for k in FUSIONS if k != "shuffled"])
def test_permuting_features_permutes_the_map(kind: Any) -> None:
    v_f, v_r = sizes(1), sizes(2)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(3))
    expected = importance_map(v_f, v_r, kind)[order]
    torch.testing.assert_close(importance_map(v_f[order], v_r[order], kind), expected)


def test_the_shuffled_map_holds_the_ratio_maps_values_elsewhere() -> None:
    v_f, v_r = sizes(1), sizes(2)
    ratio, shuffled = (fuse(v_f, v_r, kind) for kind in ("ratio", "shuffled"))
    assert torch.equal(ratio.sort().values, shuffled.sort().values)
    assert not torch.equal(ratio, shuffled)


def test_a_clipped_map_saturates_its_outliers() -> None:
    v_r = torch.ones(101)
    v_f = torch.arange(101) / 100
    v_f[-1] = 1000.0
    literal = importance_map(v_f, v_r, "difference", lam=0.0)
    clipped = importance_map(v_f, v_r, "difference", lam=0.0, clip_quantile=0.99)
    assert literal[:-1].max() < 0.001
    assert clipped[-1] == clipped[-2] == clipped.max() == pytest.approx(1)
    torch.testing.assert_close(clipped[:-1], v_f[:-1] / 0.99, rtol=1e-5, atol=1e-6)


# --- targets -------------------------------------------------------------------------------------


def draw(direction: Any, seed: int = 4) -> torch.Tensor:
    return importance.draw_direction(direction, D, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("c", [0.5, 7.0, 100.0])
@pytest.mark.parametrize("kind", ["ratio", "difference", "product"])
def test_the_target_is_c_times_the_map_in_size(kind: Any, c: float) -> None:
    """|T| = c_map * I_norm, element by element (SRMU eq. 4)."""
    map_ = importance_map(sizes(1), sizes(2), kind)
    method = SRMU(importance=kind, coeff=c)
    for direction in ("signs", "plus", "minus"):
        target = method.scaled(draw(direction) * map_, norm=3.0)
        assert torch.equal(target.abs(), c * map_)
    assert torch.equal(method.scaled(draw("plus") * map_, 3.0), -method.scaled(draw("minus") * map_, 3.0))


def test_the_uniform_target_has_norm_c_root_d() -> None:
    map_ = importance_map(sizes(1), sizes(2), "uniform")
    target = SRMU(importance="uniform", coeff=7.0).scaled(draw("signs") * map_, norm=3.0)
    assert target.norm() == pytest.approx(7.0 * math.sqrt(D))


@settings(max_examples=30, deadline=None)
@given(kappa=st.floats(0.01, 100), norm=st.floats(0.01, 100), seed=st.integers(0, 99))
@pytest.mark.parametrize("cls", [RMU, SRMU])
def test_kappa_is_the_targets_norm_over_the_activations(cls: Any, kappa: float, norm: float, seed: int) -> None:
    shape = rand(D, seed=seed)
    target = cls(kappa=kappa).scaled(shape, norm)
    assert target.norm() == pytest.approx(kappa * norm, rel=1e-5)
    assert torch.cosine_similarity(target, shape, dim=0) == pytest.approx(1, abs=1e-5)


def test_kappa_of_a_zero_shape_is_zero() -> None:
    assert SRMU(kappa=3.0).scaled(torch.zeros(D), 2.0).eq(0).all()


@pytest.mark.parametrize("direction", get_args(Direction))
def test_directions(direction: Any) -> None:
    v = draw(direction)
    assert v.shape == (D,)
    assert torch.equal(v, draw(direction))
    fixed = direction in ("plus", "minus", "zero")
    assert torch.equal(v, draw(direction, seed=5)) == fixed
    if direction in ("signs", "resampled"):
        assert set(v.tolist()) == {-1.0, 1.0}
    elif direction == "unit_uniform":
        assert v.norm() == pytest.approx(1)
        assert (v >= 0).all()
    elif direction == "uniform":
        assert ((v >= 0) & (v < 1)).all()
        torch.testing.assert_close(v / v.norm(), draw("unit_uniform"))
    elif direction == "gaussian":
        assert (v < 0).any()
    else:
        assert set(v.tolist()) == {{"plus": 1.0, "minus": -1.0, "zero": 0.0}[direction]}


def test_rmus_directions_are_nearly_alike() -> None:
    """Entries of U[0, 1): cosine 3/4 between two draws, sqrt(3)/2 with the all-ones vector."""
    one, other = (importance.draw_direction("unit_uniform", 4096, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert float(one @ other) == pytest.approx(0.75, abs=0.02)
    assert float(one.sum()) / 64 == pytest.approx(math.sqrt(3) / 2, abs=0.02)


def test_signs_are_balanced() -> None:
    v = importance.draw_direction("signs", 4096, torch.Generator().manual_seed(0))
    assert abs(v.mean()) < 0.05  # three standard deviations of 1/64


# --- statistics ----------------------------------------------------------------------------------


def loop(batches: Any, kind: str) -> tuple[list[float], float]:
    """Each feature's statistic over all counted tokens, and the mean norm, token by token."""
    tokens = [
        hidden[b, t].tolist()
        for hidden, mask in batches
        for b in range(hidden.shape[0])
        for t in range(hidden.shape[1])
        if mask[b, t]
    ]
    change = {
        "mean_abs": abs, "rms": lambda x: x * x, "square_mean": lambda x: x * x,
        "relu_mean": lambda x: max(x, 0.0),
    }.get(kind, float)  # fmt: skip
    finish = {"abs_mean": abs, "rms": math.sqrt}.get(kind, float)
    means = [finish(sum(map(change, feature)) / len(tokens)) for feature in zip(*tokens)]  # noqa: B905
    norms = [math.sqrt(sum(x * x for x in token)) for token in tokens]
    return means, sum(norms) / len(norms)


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_equal_a_loop_over_tokens(kind: Any) -> None:
    """Batches of unequal counts: the mean is over tokens, not over documents or batches."""
    batches = [(rand(3, 5, D, seed=s) + 0.3, rand(3, 5, seed=10 + s) > s / 2) for s in range(3)]
    assert len({int(mask.sum()) for _, mask in batches}) == 3
    got, norm = measure_features([sum_features(*b) for b in batches], kind)
    expected, expected_norm = loop(batches, kind)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert norm == pytest.approx(expected_norm, rel=1e-6)
    if kind != "signed_clamped":
        assert (got >= 0).all()


def test_statistics_ignore_what_is_not_counted() -> None:
    hidden, mask = rand(2, 4, D), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    expected = measure_features([sum_features(hidden, mask)])
    spoilt = hidden.masked_fill(~mask[..., None], float("nan"))
    got = measure_features([sum_features(spoilt, mask)])
    assert torch.equal(got[0], expected[0])
    assert got[1] == expected[1]


def test_statistics_of_bf16_are_taken_in_wider_numbers() -> None:
    """A thousand tokens of 1 and one of 1000: bf16 sums would stop growing at 256."""
    hidden = torch.ones(1, 1001, 2, dtype=torch.bfloat16)
    hidden[0, 0] = 1000.0
    got, norm = measure_features([sum_features(hidden, torch.ones(1, 1001).bool())])
    assert got.tolist() == pytest.approx([2000 / 1001] * 2, rel=1e-6)
    assert norm == pytest.approx(2000 / 1001 * math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_of_each_text_is_left_out(skip_first: bool, side: str) -> None:
    """The first counted one, wherever padding puts it."""
    rows = [[5, 6, 7], [8, 9]]
    pad = [-100]
    labels = torch.tensor([rows[0], rows[1] + pad if side == "right" else pad + rows[1]])
    got = RMU(skip_first=skip_first).measured_tokens(Batch(labels=labels))
    firsts = torch.tensor([[1, 0, 0], [1, 0, 0] if side == "right" else [0, 1, 0]]).bool()
    expected = (labels != -100) & ~(firsts if skip_first else torch.zeros_like(firsts))
    assert torch.equal(got, expected)
    assert torch.equal(is_counted(labels), labels != -100)


def test_without_first_skips_over_uncounted_tokens() -> None:
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(without_first(mask), expected)


def test_the_first_token_of_an_answer_is_no_first_token() -> None:
    """Of a prompt with an answer only the answer counts, and none of it is the sink."""
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    read = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])  # the last is padded on the left
    expected = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(without_first(mask, read), expected)


# --- losses --------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
TARGETS = [(D,), (3, 1, D), (3, 4, D)]


@pytest.mark.parametrize("shape", TARGETS)
def test_token_mse_equals_a_triple_loop(shape: tuple[int, ...]) -> None:
    hidden, target = rand(3, 4, D), rand(*shape, seed=1)
    full, total, count = target.expand(3, 4, D), 0.0, 0
    for b in range(3):
        for t in range(4):
            for d in range(D):
                if MASK[b, t]:
                    total += float(hidden[b, t, d] - full[b, t, d]) ** 2
                    count += 1
    assert token_mse(hidden, target, MASK).value == pytest.approx(total / count, rel=1e-6)


def test_token_mse_has_the_closed_forms_gradient() -> None:
    """2(h - T) / (counted elements); exactly zero where nothing is counted."""
    hidden, target = rand(3, 4, D).requires_grad_(), rand(D, seed=1)
    token_mse(hidden, target, MASK).value.backward()
    expected = 2 * (hidden - target) / (int(MASK.sum()) * D) * MASK[..., None]
    torch.testing.assert_close(hidden.grad, expected.detach(), rtol=1e-5, atol=1e-9)
    assert hidden.grad[~MASK].eq(0).all()


def test_token_mse_of_a_fixed_tensor() -> None:
    """h = 0 and T = c * u give c^2 / D, the loss of RMU in closed form."""
    u = torch.rand(D, generator=torch.Generator().manual_seed(0))
    u = u / u.norm()
    got = token_mse(torch.zeros(3, 4, D), 6.5 * u, MASK).value
    assert got == pytest.approx(6.5**2 / D, rel=1e-6)


@pytest.mark.parametrize("shape", TARGETS)
def test_token_cosine_equals_a_loop(shape: tuple[int, ...]) -> None:
    hidden, target = rand(3, 4, D), rand(*shape, seed=1)
    full, cosines = target.expand(3, 4, D), []
    for b in range(3):
        for t in range(4):
            if MASK[b, t]:
                h, v = hidden[b, t], full[b, t]
                cosines.append(float(h @ v) / math.sqrt(float(h @ h) * float(v @ v)))
    assert token_cosine(hidden, target, MASK).value == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


def test_token_mean_equals_a_loop() -> None:
    values = rand(3, 4, D)
    rows = [values[b, t] for b in range(3) for t in range(4) if MASK[b, t]]
    torch.testing.assert_close(token_mean(values, MASK).value, sum(rows) / len(rows))


@pytest.mark.parametrize("loss", [token_mse, token_cosine])
def test_losses_of_bf16_are_computed_in_float32(loss: Any) -> None:
    hidden, target = rand(3, 4, D).bfloat16(), rand(D, seed=1).bfloat16()
    got = loss(hidden, target, MASK).value
    assert got.dtype == torch.float32
    assert got == loss(hidden.float(), target.float(), MASK).value
    assert token_mean(hidden, MASK).value.dtype == torch.float32


# --- describe ------------------------------------------------------------------------------------


def gini(values: list[float]) -> float:
    """Half the mean absolute difference of all pairs over the mean."""
    n = len(values)
    return sum(abs(a - b) for a in values for b in values) / (2 * n * n * (sum(values) / n))


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 8,
        [1.0] + [0.0] * 9,
        [0.0, 0.25, 0.5, 0.75, 1.0],
        sizes(1).tolist(),
        importance_map(sizes(1), sizes(2), "ratio").tolist(),
    ],
)
def test_describe_by_definition(values: list[float]) -> None:
    got = describe_importance(torch.tensor(values))
    mean = sum(values) / len(values)
    assert got["mean"] == pytest.approx(mean, abs=1e-6)
    sd = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    assert got["sd"] == pytest.approx(sd, abs=1e-6)
    assert got["share_above_half"] == sum(x > 0.5 for x in values) / len(values)
    assert got["gini"] == pytest.approx(gini(values), abs=1e-6)


def test_describe_of_a_zero_map() -> None:
    assert describe_importance(torch.zeros(5)) == {"mean": 0, "sd": 0, "share_above_half": 0, "gini": 0}
