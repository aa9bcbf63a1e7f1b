"""How much forget texts share with others: n-grams of the two sets, answers to questions."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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
# Characters of scripts without spaces between words: Thai to Myanmar, Khmer, Chinese and Japanese.
SPACELESS = (
    r"\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    r"\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD_OVER = rf"(?![^\W{SPACELESS}])"  # no letter of the same word follows
SPACED_WORD = re.compile(rf"[^\s{SPACELESS}]+")
WORD_OR_SIGN = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")
TWO_SIGNS = re.compile(rf"(?=([{SPACELESS}]{{2}}))")


def measure_jaccard(forget: list[str], retain: list[str], n: int) -> float:
    """The share of the n-grams of two corpora that both have; none crosses two documents, and of none it is 0."""
    left, right = (count_grams([split_words(text) for text in texts], n) for texts in (forget, retain))
    return len(left.keys() & right.keys()) / max(1, len(left.keys() | right.keys()))


def count_shared(texts: Sequence[str], others: Sequence[str]) -> int:
    """How many of the texts are among the others, word for word."""
    known = {*others}
    return sum(text in known for text in texts)


def measure_coverage(forget: list[str], retain: list[str]) -> float:
    """The share of the forget set's words, without STOP_WORDS, in the retain set; more retain texts never lower it.

    In a script without spaces, two characters in a row count as a word: single ones occur in every text.
    """
    left, right = (
        {*TWO_SIGNS.findall(text)} | {*SPACED_WORD.findall(text)} - STOP_WORDS
        for text in (" ".join(texts).lower() for texts in (forget, retain))
    )
    return len(left & right) / max(1, len(left))


def ngram_overlap(forget: list[str], retain: list[str], definition: Definition = "pair_containment") -> dict[str, Any]:
    """The overlap of two sets of texts in uni- and bigrams, in 0-1, with the settings that decide it.

    `pair_containment` is the mean over pairs of a forget and a retain document of |shared types| / |forget types|;
    `pair_multiset` is the same with every occurrence counted; `corpus_jaccard` compares the types of the whole sets.
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
            answer[name] = measure_jaccard(forget, retain, n)
        else:
            shares = compare_pairs(forget, retain, n, counted=definition == "pair_multiset")
            answer |= {name: sum(shares) / max(1, len(shares)), "pairs": len(shares), "seed": SEED}
    return answer


def compare_pairs(forget: list[str], retain: list[str], n: int, *, counted: bool) -> list[float]:
    """How much of each drawn forget document, of those with an n-gram, its retain document contains."""
    rows = [row for text in forget if len(row := split_words(text)) >= n]
    total = len(rows) * len(retain)
    shares = []
    for pair in sorted(random.Random(SEED).sample(range(total), min(PAIRS, total))):
        left = count_grams([rows[pair // len(retain)]], n)
        right = count_grams([split_words(retain[pair % len(retain)])], n)
        types = len(left.keys() & right.keys()) / len(left)
        shares.append((left & right).total() / left.total() if counted else types)
    return shares


def measure_contamination(questions: list[tuple[str, str, str]], texts: list[str]) -> dict[str, float]:
    """The share of questions, (prompt, answer, subject), that a set of texts gives away.

    `copied`: `n` (8) words in a row of prompt and right answer (all of them where there are fewer) occur in a text;
    `stated`: the answer and the subject occur in one text, whole words each; `either`. An unknown subject is "": then
    nothing is stated. Case and the marks around a word do not count.
    """
    rows = [plain_words(f"{prompt} {answer}") for prompt, answer, _ in questions]
    copies = [[*list_grams(row, min(COPIED, len(row)))] for row in rows]
    spans = [(plain_words(answer), plain_words(subject)) for _, answer, subject in questions]
    places: dict[tuple[str, ...], set[int]] = {gram: set() for grams in (*copies, *spans) for gram in grams}
    sizes = {len(gram) for gram in places}
    for i, words in enumerate(map(plain_words, texts)):
        for size in sizes:
            for gram in places.keys() & {*list_grams(words, size)}:
                places[gram].add(i)
    copied = [any(places[gram] for gram in grams) for grams in copies]
    stated = [bool(places[answer] & places[subject]) for answer, subject in spans]
    shares = {"copied": copied, "stated": stated, "either": [*map(max, copied, stated)]}
    return {name: sum(marks) / len(rows) for name, marks in shares.items()} | {"questions": len(rows), "n": COPIED}


def count_grams(documents: list[list[str]], n: int) -> Counter[tuple[str, ...]]:
    return Counter(gram for words in documents for gram in list_grams(words, n))


def list_grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """The n-grams of words; there are none of 0 words."""
    return zip(*(words[i:] for i in range(n)), strict=False)


def split_words(text: str) -> list[str]:
    """The words of a text in lower case; in a script without spaces, its characters."""
    return WORD_OR_SIGN.findall(text.lower())


def plain_words(text: str) -> tuple[str, ...]:
    """The lower-case words of a text, without the punctuation around them."""
    stripped = (word.strip(".,;:!?\"'()[]{}") for word in split_words(text))
    return tuple(word for word in stripped if word)
