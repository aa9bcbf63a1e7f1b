"""Functions of tensors; every loss is computed in float32.

Means are over the whole batch, of which several processes each have some rows (`ranks.spread`):
what comes out is then this process' share of the mean.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srmu.engine.distributed import total_spread


def is_counted(labels: Int[Tensor, "*B T"]) -> Bool[Tensor, "*B T"]:
    """The tokens that a loss counts: those whose label is not -100."""
    return labels != -100


def without_first(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """The mask less the first counted token of each row.

    That token is an attention sink in many models: its norm is so large that it rules any mean.
    """
    return mask & (mask.cumsum(dim=1) > 1)


def token_mse(
    hidden: Float[Tensor, "B T D"], target: Float[Tensor, "*#BTD"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean squared error over the counted tokens and all features.

    SRMU eq. 5 prints squared norms; the public RMU code takes the mean over elements. Both terms
    of the loss differ by the same factor D, so alpha means the same.
    """
    squares = (hidden.float() - target.float()).square().mean(dim=-1)  # (B, T)
    return (squares * mask).sum() / total_spread(mask.sum())


def token_mean(values: Float[Tensor, "B T *D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "*D"]:
    """Mean over the counted tokens, in float32."""
    return values.float()[mask].sum(dim=0) / total_spread(mask.sum())


def token_cosine(
    hidden: Float[Tensor, "B T D"], target: Float[Tensor, "*#BTD"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean cosine similarity over the counted tokens."""
    cosines = torch.cosine_similarity(hidden.float(), target.float(), dim=-1)
    return (cosines * mask).sum() / total_spread(mask.sum())


def is_predicted(labels: Int[Tensor, "B T"]) -> Bool[Tensor, "B S"]:
    """The counted tokens that another one comes before: S = T - 1, those that can be predicted."""
    return is_counted(labels[:, 1:])


def token_nll(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B S"]:
    """Nats that each next token costs; 0 where it is not counted."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )


def mean_nll(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean over the counted tokens of what each costs, in nats."""
    return token_nll(logits, labels).sum() / total_spread(is_predicted(labels).sum())


def row_mean(values: Float[Tensor, "B"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean over the rows that have a counted token to predict."""
    rows = is_predicted(labels).any(dim=1)
    return values.where(rows, 0).sum() / total_spread(rows.sum())


def kl_divergence(
    log_p: Float[Tensor, "*B V"], log_q: Float[Tensor, "*B V"]
) -> Float[Tensor, "*B"]:
    """KL(p || q) in nats, of log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_kl(
    logits: Float[Tensor, "B T V"], others: Float[Tensor, "B T V"]
) -> Float[Tensor, "B S"]:
    """KL(p || q) in nats at each position that predicts a token, p of `logits`, q of `others`."""
    return kl_divergence(*(x[:, :-1].float().log_softmax(-1) for x in (logits, others)))


def token_entropy(logits: Float[Tensor, "B T V"]) -> Float[Tensor, "B S"]:
    """Entropy of p in nats at each position that predicts a token."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def mean_kl(
    logits: Float[Tensor, "B T V"], others: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean of KL(p || q) over the positions that predict a counted token."""
    mask = is_predicted(labels)
    return (token_kl(logits, others) * mask).sum() / total_spread(mask.sum())


def generic_logits(
    base: Float[Tensor, "*B V"], reinforced: Float[Tensor, "*B V"], strength: float
) -> Float[Tensor, "*B V"]:
    """`base` without what training on the forget texts raised: base - strength relu(r - base).

    The target of WHP (arXiv 2310.02238, eq. 1) and the teacher of RKLU (2025.naacl-long.60). It
    changes when a constant is added to one of the two: take log_softmax first where that matters.
    """
    base, reinforced = base.float(), reinforced.float()
    return base - strength * (reinforced - base).relu()
