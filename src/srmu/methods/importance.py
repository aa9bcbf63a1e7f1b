"""Parts of targets: importance maps (SRMU, arXiv 2512.16297), and random directions V or u."""

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Statistic = Literal["abs_mean", "mean_abs", "rms", "square_mean", "relu_mean", "signed_clamped"]
Fusion = Literal["ratio", "difference", "product", "product_inverse", "uniform", "shuffled"]
Direction = Literal["signs", "plus", "minus", "uniform", "unit_uniform", "gaussian", "resampled", "zero"]

Sizes = Float[Tensor, "D"]  # of features

FLAT = 0.1  # below this standard deviation a map selects next to nothing
FLAT_WORDS = f"nearly flat (sd under {FLAT}): it hardly tells features apart"


def sum_features(hidden: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "5 D"]:
    """Sums over counted tokens of x, |x|, x^2 and relu(x), in float64; a last row starts with norms and count."""
    wide = torch.float32 if hidden.device.type == "mps" else torch.float64  # MPS has no float64
    values = hidden.float()[mask]  # (tokens, D)
    each = (values, values.abs(), values.square(), values.relu())
    rows = [x.to(wide).sum(dim=0) for x in each]
    last = torch.zeros_like(rows[0])
    last[0], last[1] = values.norm(dim=-1).to(wide).sum(), len(values)
    return torch.stack([*rows, last])


def measure_features(batches: Iterable[Float[Tensor, "5 D"]], kind: Statistic = "abs_mean") -> tuple[Sizes, float]:
    """v_f or v_r, the typical size of each feature, and the mean norm of tokens, from `sum_features` of each batch.

    The maps of the paper need values >= 0, and means are signed: `abs_mean` is the smallest change that repairs this,
    `signed_clamped` the literal text.
    """
    total = torch.stack(list(batches)).sum(dim=0)
    norms, count = total[4, :2].tolist()
    row = {"mean_abs": 1, "rms": 2, "square_mean": 2, "relu_mean": 3}.get(kind, 0)
    mean = total[row] / count
    if kind == "abs_mean":
        mean = mean.abs()
    elif kind == "rms":
        mean = mean.sqrt()
    return mean.float(), norms / count


def importance_map(
    v_f: Sizes,
    v_r: Sizes,
    kind: Fusion,
    lam: float = 1.0,
    eps: float = 1e-6,
    clip_quantile: float = 1.0,
    order: Int[Tensor, "D"] | None = None,
) -> Sizes:
    """I_norm in [0, 1], from the statistics of forget and retain activations.

    `shuffled`, the control for any claim about the map, is the ratio map on other features, permuted by `order`;
    `uniform` is the paper's ablation without a map.
    """
    if kind == "uniform":
        return torch.ones_like(v_f)
    if kind in ("ratio", "shuffled"):
        # eq: SRMU eq. 2, ratio map, I = log(1 + v_f / (v_r + eps))
        raw = torch.log(1 + v_f / (v_r + eps))
    elif kind == "difference":
        # eq: SRMU eq. 2, difference map, I = relu(v_f - lambda v_r)
        raw = torch.relu(v_f - lam * v_r)
    else:
        # eq: SRMU eq. 2, product map, I = v_f v_r / (mean(v_f) mean(v_r) + eps)
        raw = v_f * v_r / (v_f.mean() * v_r.mean() + eps)
    # Only the literal signed statistic gives these; a feature without a value selects nothing.
    raw = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
    if clip_quantile < 1:
        raw = raw.clamp(max=torch.quantile(raw, clip_quantile))
    # eq: SRMU eq. 3, I_norm = I / (max(I) + 1e-8)
    normal = raw / (raw.max() + 1e-8)
    if kind == "product_inverse":
        return 1 - normal  # ours: the paper calls entangled features risky, yet pushes them most
    if kind == "shuffled":
        assert order is not None
        return normal[order]
    return normal


def describe_importance(map_: Sizes) -> dict[str, float]:
    """How selective a map is: mean, standard deviation, share above one half, Gini coefficient."""
    ordered = map_.cpu().double().sort().values
    n, total = len(ordered), float(ordered.sum())
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    gini = 2 * float((ranks * ordered).sum()) / (n * total) - (n + 1) / n if total else 0.0
    return {
        "mean": float(ordered.mean()),
        "sd": float(ordered.std(correction=0)),
        "share_above_half": float((ordered > 0.5).double().mean()),
        "gini": gini,
    }


def draw_direction(kind: Direction, width: int, generator: torch.Generator) -> Float[Tensor, " D"]:
    """A direction of `width` features; `resampled` is `signs`, drawn again each step."""
    if kind in ("plus", "minus", "zero"):
        return torch.full((width,), {"plus": 1.0, "minus": -1.0, "zero": 0.0}[kind])
    if kind == "gaussian":
        return torch.randn(width, generator=generator)
    if kind in ("uniform", "unit_uniform"):
        # Entries of U[0, 1) are not centred: RMU's directions for two topics have cosine 0.75.
        values = torch.rand(width, generator=generator)
        return values / values.norm() if kind == "unit_uniform" else values
    return torch.randint(2, (width,), generator=generator) * 2.0 - 1.0
