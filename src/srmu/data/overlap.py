"""How much forget texts share with others: n-grams of the two sets, answers to questions."""

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

from srmu.errors import SrmuError

Definition = Literal["pair_containment", "pair_multiset", "corpus_jaccard"]
StopWords = Literal["none", "english"]
Tokens = Callable[[str], Sequence[Hashable]]
Grams = Counter[tuple[Hashable, ...]]

COPIED = 8  # words of a question in a row that count as a copy of it
COMMON = """
a about after all also although an and any are as at be because been before being between both
but by can could did do does during each either few for from had has have having he her hers him
his how however i if in into is it its may me might more most must my neither no nor not of on
once only or other our out over own same shall she should so some such than that the their them
then there these they this those through thus to too under until up upon us very was we were
what when where whether which while who whom whose why will with within without would yet you
your
"""
ENGLISH = frozenset(COMMON.split())
STOP_WORDS: dict[str, frozenset[str]] = {"none": frozenset(), "english": ENGLISH}


def measure_overlap(forget: Sequence[str], retain: Sequence[str], n: int) -> dict[str, float]:
    """Compare the n-grams of lower-case, whitespace-separated words; none crosses two documents.

    Fractions in 0-1: `jaccard`, shared types among all types; `forget_types`, the share of forget
    types that occur in the retain corpus; `forget_tokens`, the same with each occurrence counted.
    An empty denominator gives 0.
    """
    return corpus_overlap([lower_words(t) for t in forget], [lower_words(t) for t in retain], n)


def measure_coverage(forget: Sequence[str], retain: Sequence[str]) -> float:
    """The share of the forget set's different words, without English stop words, in the retain set.

    It never falls when texts are added to the retain set. Words are lower-case.
    """
    left, right = ([[w for w in lower_words(text) if w not in ENGLISH] for text in texts] for texts in (forget, retain))
    return corpus_overlap(left, right, 1)["forget_types"]


def corpus_overlap(
    forget: Sequence[Sequence[Hashable]], retain: Sequence[Sequence[Hashable]], n: int
) -> dict[str, float]:
    """`measure_overlap` of documents in tokens."""
    left, right = count_grams(forget, n), count_grams(retain, n)
    shared = left.keys() & right.keys()
    tokens = sum(left[gram] for gram in shared)
    return {
        "jaccard": len(shared) / max(1, len(left.keys() | right.keys())),
        "forget_types": len(shared) / max(1, len(left)),
        "forget_tokens": tokens / max(1, left.total()),
    }


def ngram_overlap(
    forget: Sequence[str],
    retain: Sequence[str],
    definition: Definition = "pair_containment",
    *,
    lower: bool = True,
    tokens: Tokens | None = None,
    tokeniser: str = "words",
    stop_words: StopWords = "none",
    truncation: int | None = None,
    pairs: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The overlap of two sets of texts in uni- and bigrams, in 0-1, with all that decides it.

    `pair_containment` is the mean over pairs of a forget and a retain document of |shared types| /
    |forget types|; `pair_multiset` is the same with every occurrence counted; `corpus_jaccard`
    compares the types of the two whole sets. Up to `pairs` different pairs are drawn, of forget
    documents that have an n-gram. `tokens` cuts a text, at white space unless given, into what
    `tokeniser` names; then stop words go, then what is beyond `truncation` tokens.
    """
    if definition not in get_args(Definition) or stop_words not in STOP_WORDS:
        known = f"{', '.join(get_args(Definition))}; stop words: {', '.join(STOP_WORDS)}"
        raise SrmuError(f"overlap {definition!r} with stop words {stop_words!r}: choose of {known}")
    if (truncation is not None and truncation < 1) or pairs < 1:
        raise SrmuError(f"truncation {truncation} and pairs {pairs} must be 1 or more")
    cut = tokens or str.split

    def read(text: str) -> Sequence[Hashable]:
        stopped = STOP_WORDS[stop_words]
        parts = cut(text.lower() if lower else text)
        kept = [t for t in parts if not (isinstance(t, str) and t.lower() in stopped)]
        return kept[:truncation]

    documents = {"forget": [*map(read, forget)], "retain": [*map(read, retain)]}
    for name, rows in documents.items():
        if not any(rows):
            raise SrmuError(f"no {name} text has a word to compare")
    sides = documents["forget"], documents["retain"]
    answer: dict[str, Any] = {
        "definition": definition,
        "lower": lower,
        "tokeniser": tokeniser,
        "stop_words": stop_words,
        "truncation": truncation,
        "documents": {name: len(rows) for name, rows in documents.items()},
        "pairs": None,
        "seed": None,
    }
    for n, name in ((1, "unigram"), (2, "bigram")):
        if definition == "corpus_jaccard":
            answer[name] = corpus_overlap(*sides, n)["jaccard"]
        else:
            answer[name], drawn = average_pairs(*sides, n, definition == "pair_multiset", pairs, seed)
            answer |= {"pairs": drawn, "seed": seed}
    return answer


def measure_contamination(
    questions: Sequence[tuple[str, str, str]], texts: Sequence[str], n: int = COPIED
) -> dict[str, float]:
    """The share of questions, (prompt, answer, subject), that a set of texts gives away.

    `copied`: `n` words in a row of prompt and right answer (all of them where there are fewer)
    occur in a text; `stated`: the answer and the subject occur in one text, whole words each;
    `either`. An unknown subject is "": then nothing is stated. Case and the marks around a word
    do not count.
    """
    if not questions:
        raise SrmuError("no evaluation question to compare with the texts")
    documents = [plain_words(text) for text in texts]
    lengths = {min(n, len(plain_words(f"{prompt} {answer}"))) for prompt, answer, _ in questions}
    known = {size: {*count_grams(documents, size)} for size in lengths if size}
    spans = {w for _, *names in questions for w in map(plain_words, names) if w}
    places = find_documents(documents, spans)
    copied, stated = [], []
    for prompt, answer, subject in questions:
        row = plain_words(f"{prompt} {answer}")
        size = min(n, len(row))
        copied.append(bool(size) and any(gram in known[size] for gram in count_grams([row], size)))
        stated.append(bool(places.get(plain_words(answer), set()) & places.get(plain_words(subject), set())))
    count = len(questions)
    return {
        "copied": sum(copied) / count,
        "stated": sum(stated) / count,
        "either": sum(map(max, copied, stated)) / count,
        "questions": count,
        "n": n,
    }


def lower_words(text: str) -> list[str]:
    """The lower-case, whitespace-separated words of a text."""
    return text.lower().split()


def count_grams(documents: Sequence[Sequence[Hashable]], n: int) -> Grams:
    """How often each n-gram occurs in the documents."""
    if n < 1:
        raise ValueError(f"n-grams have at least one word, not {n}")
    counts: Grams = Counter()
    for row in documents:
        counts.update(zip(*(row[i:] for i in range(n)), strict=False))
    return counts


def average_pairs(
    forget: Sequence[Sequence[Hashable]],
    retain: Sequence[Sequence[Hashable]],
    n: int,
    counted: bool,
    pairs: int,
    seed: int,
) -> tuple[float, int]:
    """Mean containment over pairs drawn without replacement, and how many there were."""
    forget = [row for row in forget if len(row) >= n]
    total = len(forget) * len(retain)
    drawn = random.Random(seed).sample(range(total), min(pairs, total))

    @lru_cache(maxsize=1000)  # documents may be many and long
    def right_of(j: int) -> Grams:
        return count_grams([retain[j]], n)

    shares = []
    last, left = -1, Counter[tuple[Hashable, ...]]()
    for pair in sorted(drawn):
        i, j = divmod(pair, len(retain))
        if i != last:
            last, left = i, count_grams([forget[i]], n)
        right = right_of(j)
        if counted:
            shares.append((left & right).total() / left.total())
        else:
            shares.append(len(left.keys() & right.keys()) / len(left))
    return sum(shares) / max(1, len(shares)), len(shares)


def plain_words(text: str) -> tuple[str, ...]:
    """The lower-case words of a text, without the punctuation around them."""
    stripped = (word.strip(".,;:!?\"'()[]{}") for word in lower_words(text))
    return tuple(word for word in stripped if word)


def find_documents(documents: Sequence[Sequence[str]], spans: set[tuple[str, ...]]) -> dict[tuple[str, ...], set[int]]:
    """In which documents each run of words occurs."""
    places: dict[tuple[str, ...], set[int]] = {}
    sizes = {len(span) for span in spans}
    for i, row in enumerate(documents):
        for size in sizes:
            for gram in zip(*(row[k:] for k in range(size)), strict=False):
                if gram in spans:
                    places.setdefault(gram, set()).add(i)
    return places
