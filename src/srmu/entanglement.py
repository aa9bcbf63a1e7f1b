"""How entangled a forget corpus is with a retain corpus: what share of its n-grams they share."""

from collections import Counter
from collections.abc import Sequence


def overlap(forget: Sequence[str], retain: Sequence[str], n: int) -> dict[str, float]:
    """Compare the n-grams of lower-case, whitespace-separated words; none crosses two documents.

    Fractions in 0-1: `jaccard`, shared types among all types; `forget_types`, the share of forget
    types that occur in the retain corpus; `forget_tokens`, the same with each occurrence counted.
    An empty denominator gives 0.
    """
    left, right = _count(forget, n), _count(retain, n)
    shared = left.keys() & right.keys()
    tokens = sum(left[gram] for gram in shared)
    return {
        "jaccard": len(shared) / max(1, len(left.keys() | right.keys())),
        "forget_types": len(shared) / max(1, len(left)),
        "forget_tokens": tokens / max(1, left.total()),
    }


def _count(texts: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram occurs in the documents."""
    if n < 1:
        raise ValueError(f"n-grams have at least one word, not {n}")
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.lower().split()
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return grams
