"""How much forget texts share with others: n-grams of the two sets, answers to questions."""

import random
from collections import Counter
from typing import Any, Literal, get_args

from srmu.errors import SrmuError, suggest_word

Definition = Literal["pair_containment", "pair_multiset", "corpus_jaccard"]

COPIED = 8  # words of a question in a row that count as a copy of it
PAIRS, SEED = 2000, 0  # pairs of documents that are compared at most, and how they are drawn
COMMON = """
a about after all also although an and any are as at be because been before being between both but by can could did
do does during each either few for from had has have having he her hers him his how however i if in into is it its
may me might more most must my neither no nor not of on once only or other our out over own same shall she should so
some such than that the their them then there these they this those through thus to too under until up upon us very
was we were what when where whether which while who whom whose why will with within without would yet you your
"""
STOP_WORDS = frozenset(COMMON.split())


def measure_overlap(forget: list[str], retain: list[str], n: int) -> dict[str, float]:
    """Compare the n-grams of lower-case, whitespace-separated words; none crosses two documents.

    Fractions in 0-1: `jaccard`, shared types among all types; `forget_types`, the share of forget
    types that occur in the retain corpus; `forget_tokens`, the same with each occurrence counted.
    An empty denominator gives 0.
    """
    left, right = (count_grams([text.lower().split() for text in texts], n) for texts in (forget, retain))
    shared = left.keys() & right.keys()
    return {
        "jaccard": len(shared) / max(1, len(left.keys() | right.keys())),
        "forget_types": len(shared) / max(1, len(left)),
        "forget_tokens": sum(left[gram] for gram in shared) / max(1, left.total()),
    }


def measure_coverage(forget: list[str], retain: list[str]) -> float:
    """The share of the forget set's different words, without English stop words, in the retain set.

    It never falls when texts are added to the retain set. Words are lower-case.
    """
    left, right = ({*" ".join(texts).lower().split()} - STOP_WORDS for texts in (forget, retain))
    return len(left & right) / max(1, len(left))


def ngram_overlap(forget: list[str], retain: list[str], definition: Definition = "pair_containment") -> dict[str, Any]:
    """The overlap of two sets of texts in uni- and bigrams, in 0-1, with the settings that decide it.

    `pair_containment` is the mean over pairs of a forget and a retain document of |shared types| /
    |forget types|; `pair_multiset` is the same with every occurrence counted; `corpus_jaccard`
    compares the types of the two whole sets. The pairs are different, and their forget documents have
    an n-gram.
    """
    if definition not in (known := get_args(Definition)):
        raise SrmuError(f"overlap {definition!r} does not exist{suggest_word(definition, known)}")
    for name, texts in (("forget", forget), ("retain", retain)):
        if not any(map(str.strip, texts)):
            raise SrmuError(f"no {name} text has a word to compare")
    sizes = {"forget": len(forget), "retain": len(retain)}
    answer: dict[str, Any] = {"definition": definition, "documents": sizes, "pairs": None, "seed": None}
    answer |= {"lower": True, "tokeniser": "words", "stop_words": "none", "truncation": None}
    for n, name in ((1, "unigram"), (2, "bigram")):
        if definition == "corpus_jaccard":
            answer[name] = measure_overlap(forget, retain, n)["jaccard"]
        else:
            shares = compare_pairs(forget, retain, n, counted=definition == "pair_multiset")
            answer |= {name: sum(shares) / max(1, len(shares)), "pairs": len(shares), "seed": SEED}
    return answer


def compare_pairs(forget: list[str], retain: list[str], n: int, *, counted: bool) -> list[float]:
    """How much of each drawn forget document its retain document contains."""
    rows = [row for text in forget if len(row := text.lower().split()) >= n]
    total = len(rows) * len(retain)
    shares = []
    for pair in sorted(random.Random(SEED).sample(range(total), min(PAIRS, total))):
        left = count_grams([rows[pair // len(retain)]], n)
        right = count_grams([retain[pair % len(retain)].lower().split()], n)
        types = len(left.keys() & right.keys()) / len(left)
        shares.append((left & right).total() / left.total() if counted else types)
    return shares


def measure_contamination(questions: list[tuple[str, str, str]], texts: list[str]) -> dict[str, float]:
    """The share of questions, (prompt, answer, subject), that a set of texts gives away.

    `copied`: `n` (8) words in a row of prompt and right answer (all of them where there are fewer)
    occur in a text; `stated`: the answer and the subject occur in one text, whole words each;
    `either`. An unknown subject is "": then nothing is stated. Case and the marks around a word
    do not count.
    """
    documents = [plain_words(text) for text in texts]
    rows = [plain_words(f"{prompt} {answer}") for prompt, answer, _ in questions]
    sizes = [min(COPIED, len(row)) for row in rows]
    known = {size: count_grams(documents, size) for size in {*sizes}}
    copied = [
        not known[size].keys().isdisjoint(count_grams([row], size)) for row, size in zip(rows, sizes, strict=True)
    ]
    spans = [(plain_words(answer), plain_words(subject)) for _, answer, subject in questions]
    places: dict[tuple[str, ...], set[int]] = {span: set() for pair in spans for span in pair}
    lengths = {len(span) for span in places}
    for i, document in enumerate(documents):
        for size in lengths:
            for gram in count_grams([document], size).keys() & places.keys():
                places[gram].add(i)
    stated = [bool(places[answer] & places[subject]) for answer, subject in spans]
    return {
        "copied": sum(copied) / len(rows),
        "stated": sum(stated) / len(rows),
        "either": sum(map(max, copied, stated)) / len(rows),
        "questions": len(rows),
        "n": COPIED,
    }


def count_grams(documents: list[Any], n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram occurs in documents of words; there are none of 0 words."""
    counts: Counter[tuple[str, ...]] = Counter()
    for row in documents:
        counts.update(zip(*(row[i:] for i in range(n)), strict=False))
    return counts


def plain_words(text: str) -> tuple[str, ...]:
    """The lower-case words of a text, without the punctuation around them."""
    stripped = (word.strip(".,;:!?\"'()[]{}") for word in text.lower().split())
    return tuple(word for word in stripped if word)
