"""Losses, and the functions of tensors that they are made of, all in float32.

A loss is a `Mean`: processes that share a batch each have a part of its sum and count, and the loop divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean before its division: `weight` times `total` over `count`."""

    total: Float[Tensor, "*D"]
    count: Int[Tensor, ""]
    weight: float = 1.0
    least: int = 0  # 1: the mean over nothing is 0, not NaN

    @property
    def value(self) -> Float[Tensor, "*D"]:
        """The mean over the values of this process."""
        return self.share(self.count)

    def share(self, count: Int[Tensor, ""]) -> Float[Tensor, "*D"]:
        """This process' share of the mean over `count` values, those of all processes."""
        return self.weight * (self.total / count.clamp(min=self.least))

    def pool(self, other: Mean) -> Mean:
        """The mean over the values of both."""
        return replace(self, total=self.total + other.total, count=self.count + other.count)

    def __mul__(self, weight: float) -> Mean:
        return replace(self, weight=weight * self.weight)

    __rmul__ = __mul__

    def __neg__(self) -> Mean:
        return self * -1.0


def average_means(means: Sequence[Mean]) -> float:
    """The mean over the values of all, each with weight 1; 0 over nothing."""
    return sum(float(mean.total) for mean in means) / max(1, sum(int(mean.count) for mean in means))


def masked_mean(values: Float[Tensor, "*B"], mask: Bool[Tensor, "*B"], least: int = 0) -> Mean:
    """The mean of the values that the mask marks."""
    return Mean((values * mask).sum(), mask.sum(), least=least)


def is_counted(labels: Int[Tensor, "*B T"]) -> Bool[Tensor, "*B T"]:
    """The tokens that a loss counts: those whose label is not -100."""
    return labels != -100


def is_predicted(labels: Int[Tensor, "B T"]) -> Bool[Tensor, "B S"]:
    """The counted tokens that follow another one, and so can be predicted: S = T - 1."""
    return is_counted(labels[:, 1:])


def without_first(mask: Bool[Tensor, "B T"], read: Shaped[Tensor, "B T"] | None = None) -> Bool[Tensor, "B T"]:
    """The mask less the first token of each row, an attention sink whose norm would dominate any mean.

    `read`: the tokens that the model reads, where a row may begin with some that do not count.
    """
    return mask & ((mask if read is None else mask | read.bool()).cumsum(dim=1) > 1)


def token_mean(values: Float[Tensor, "B T *D"], mask: Bool[Tensor, "B T"]) -> Mean:
    """Mean over the counted tokens."""
    return Mean(values.float()[mask].sum(dim=0), mask.sum())


def token_mse(hidden: Float[Tensor, "B T D"], target: Float[Tensor, "*#BTD"], mask: Bool[Tensor, "B T"]) -> Mean:
    """Mean squared error over the counted tokens and all features, as in the public RMU code.

    SRMU eq. 5 prints squared norms: both terms of its loss are D times these, so alpha means the same.
    """
    return masked_mean((hidden.float() - target.float()).square().mean(dim=-1), mask)


def token_cosine(hidden: Float[Tensor, "B T D"], target: Float[Tensor, "*#BTD"], mask: Bool[Tensor, "B T"]) -> Mean:
    """Mean cosine similarity over the counted tokens."""
    return masked_mean(torch.cosine_similarity(hidden.float(), target.float(), dim=-1), mask)


def token_nll(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B S"]:
    """Nats that each next token costs; 0 where it is not counted."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )


def token_distance(hidden: Float[Tensor, "B T D"], other: Float[Tensor, "*#BTD"]) -> Float[Tensor, "B T"]:
    """Euclidean distance of each token's features."""
    return (hidden.float() - other.float()).norm(dim=-1)


def mean_nll(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Mean:
    """Nats that a counted token costs on average."""
    return Mean(token_nll(logits, labels).sum(), is_predicted(labels).sum())


def weighted_nll(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], power: float, other: float = 0.0) -> Mean:
    """Mean of p^power (1 - p)^other nll over counted tokens, p being their likelihoods and the weights constants."""
    nll = token_nll(logits, labels)
    chance = (-nll.detach()).exp()
    return Mean((chance**power * (1 - chance) ** other * nll).sum(), is_predicted(labels).sum())


def text_nlls(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, B]:
    """Nats that a counted token of each text costs on average; 0 where none is predicted."""
    # Public ports of SimNPO divide by the unshifted labels: one too many per text.
    return token_nll(logits, labels).sum(dim=1) / is_predicted(labels).sum(dim=1).clamp(min=1)


def text_chances(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, B]:
    """The mean likelihood of a counted token of each text; 0 where none is predicted."""
    mask = is_predicted(labels)
    return ((-token_nll(logits, labels)).exp() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def row_mean(values: Float[Tensor, B], labels: Int[Tensor, "B T"]) -> Mean:
    """Mean over the rows that have a counted token to predict."""
    rows = is_predicted(labels).any(dim=1)
    return Mean(values.where(rows, 0).sum(), rows.sum())


def kl_divergence(log_p: Float[Tensor, "*B V"], log_q: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """KL(p || q) in nats, of log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_kl(logits: Float[Tensor, "B T V"], others: Float[Tensor, "B T V"]) -> Float[Tensor, "B S"]:
    """KL(p || q) in nats at each position that predicts a token, p of `logits`, q of `others`."""
    return kl_divergence(*(x[:, :-1].float().log_softmax(-1) for x in (logits, others)))


def mean_kl(logits: Float[Tensor, "B T V"], others: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Mean:
    """Mean of KL(p || q) over the positions that predict a counted token."""
    return masked_mean(token_kl(logits, others), is_predicted(labels))


def token_entropy(logits: Float[Tensor, "B T V"]) -> Float[Tensor, "B S"]:
    """Entropy of p in nats at each position that predicts a token."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def generic_logits(
    base: Float[Tensor, "*B V"], reinforced: Float[Tensor, "*B V"], strength: float
) -> Float[Tensor, "*B V"]:
    """`base` without what training on the forget texts raised: base - strength relu(r - base).

    The target of WHP (arXiv 2310.02238, eq. 1) and the teacher of RKLU (2025.naacl-long.60), which normalises first.
    """
    base, reinforced = base.float(), reinforced.float()
    return base - strength * (reinforced - base).relu()
