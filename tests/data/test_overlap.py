from itertools import pairwise

import pytest

from srmu.data.overlap import measure_contamination, measure_coverage, measure_jaccard, ngram_overlap
from srmu.errors import SrmuError
from srmu.testbed.world import Size, create_closed


def test_a_hand_example():
    forget = ["a b a", "c a"]  # a 3, b 1, c 1; ab, ba, ca
    retain = ["A b d", "c"]  # a, b, c, d; ab, bd
    assert measure_jaccard(forget, retain, 1) == 3 / 4
    assert measure_jaccard(forget, retain, 2) == 1 / 4
    assert measure_jaccard(["a a a b"], ["a c"], 1) == 1 / 3  # types, not occurrences


@pytest.mark.parametrize("n", [1, 2, 3])
def test_identical_and_disjoint(n):
    texts = ["the red fox runs", "a b c d e"]
    assert measure_jaccard(texts, texts, n) == 1
    assert measure_jaccard(texts, ["u v w x y"], n) == 0


def test_no_ngram_crosses_two_documents():
    assert measure_jaccard(["a b", "c d"], ["b c"], 2) == 0


def test_texts_too_short_share_nothing():
    assert measure_jaccard(["a"], ["a"], 2) == 0
    assert measure_jaccard([], [], 1) == 0


def test_pairs_by_hand():
    forget, retain = ["a a b", "c"], ["a b b", "A d"]
    # types: {a, b} of {a, b}: 1, of {a}: 1/2; {c}: 0 and 0. Bigrams: aa, ab with ab, bb: 1/2, 0
    found = ngram_overlap(forget, retain)
    assert found["unigram"] == pytest.approx(1.5 / 4)
    assert found["bigram"] == pytest.approx(0.5 / 2)  # the text without a bigram is in no pair
    # with multiplicity: a 2, b 1 with a 1, b 2: 2 of 3; with a 1, d 1: 1 of 3
    many = ngram_overlap(forget, retain, "pair_multiset")
    assert many["unigram"] == pytest.approx((2 / 3 + 1 / 3) / 4)
    whole = ngram_overlap(forget, retain, "corpus_jaccard")
    assert whole["unigram"] == measure_jaccard(forget, retain, 1)
    assert whole["bigram"] == measure_jaccard(forget, retain, 2)
    assert whole["pairs"] is whole["seed"] is None


def test_what_decides_the_number_is_told():
    plain = ngram_overlap(["The cat sat"], ["the dog sat"])
    assert plain["unigram"] == pytest.approx(2 / 3)
    assert plain["lower"] and plain["stop_words"] == "none" and plain["tokeniser"] == "words"
    assert plain["documents"] == {"forget": 1, "retain": 1} and plain["pairs"] == 1


def test_pairs_are_drawn_and_always_the_same():
    forget = [f"w{i} w{i + 1} a" for i in range(50)]
    retain = [f"w{i} w{i + 2} b" for i in range(50)]
    first, again = (ngram_overlap(forget, retain) for _ in range(2))
    assert first == again and (first["pairs"], first["seed"]) == (2000, 0)
    assert ngram_overlap(forget[:40], retain[:40])["pairs"] == 1600


@pytest.mark.parametrize(("forget", "retain"), [([], ["a"]), (["a"], []), (["a"], [" "])])
def test_nothing_to_compare(forget, retain):
    with pytest.raises(SrmuError, match=r"no (forget|retain) text has a word"):
        ngram_overlap(forget, retain)


def test_an_unknown_definition_is_refused():
    with pytest.raises(SrmuError, match=r"overlap 'pair_contain' does not exist; did you mean pair_containment\?"):
        ngram_overlap(["a"], ["a"], "pair_contain")


FACTS = ["北京是中国的首都。", "ข้าวไทยปลูกในนา", "東京は日本の首都です"]


@pytest.mark.parametrize("text", FACTS)
def test_scripts_without_spaces(text: str):
    """A text was one word: two that say nearly the same shared nothing, and no answer was ever stated."""
    longer = f"{text[:-1]}ก和"
    assert measure_jaccard([text], [longer], 1) > 0.5 and measure_jaccard([text], [longer], 2) > 0.5
    assert measure_coverage([text], [longer]) > 0.5
    others = [one for one in FACTS if one != text]
    assert measure_coverage([text], others) < 0.2
    assert ngram_overlap([text], [longer])["bigram"] > 0.5
    asked = [("", text[3:5], text[:2]), ("", f"{text[4]}{text[3]}", text[:2])]
    assert measure_contamination(asked, [text])["stated"] == 1 / 2


def test_words_beside_other_scripts_are_whole():
    assert measure_jaccard(["GPT模型 runs"], ["gpt 模 型 runs"], 1) == 1
    assert measure_jaccard(["한국어 문장"], ["한국어 글"], 1) == 1 / 3  # Korean has spaces


def test_coverage_leaves_stop_words_out_and_never_falls():
    assert measure_coverage(["the red fox"], ["the Red hen"]) == 1 / 2
    assert measure_coverage(["the red fox"], ["the Red hen", "a fox"]) == 1


@pytest.mark.parametrize("seed", range(3))
def test_coverage_and_jaccard_rank_dialled_entanglements(seed):
    """The pair definitions do not: half of the texts share a subject at every setting above 0."""
    world = create_closed(seed, Size())
    found = []
    for dial in (0, 0.25, 0.5, 0.75, 1):
        texts = world.corpora(seed, dial, documents=240, words=31, filler=0.25)
        pair = texts["forget"], texts["retain-high"]
        jaccard = ngram_overlap(*pair, "corpus_jaccard")
        found.append((measure_coverage(*pair), jaccard["unigram"], jaccard["bigram"]))
    for column in zip(*found, strict=True):
        assert all(a < b for a, b in pairwise(column)), column
    low = measure_coverage(texts["forget"], texts["retain-low"])
    assert low < found[0][0] / 2


def test_contamination():
    texts = ["Note that the carrier of zorine is smoke, as a rule.", "pafine; glows red. Nothing else"]
    copy = ("the carrier of zorine is", " smoke", "")  # its 6 words occur
    moved = ("what does zorine travel on", " smoke", "zorine")  # its subject and answer do
    clean = ("what is the colour of zorine", " red", "zorine")  # in two different texts
    found = measure_contamination([copy, moved, clean], texts)
    assert found == {"copied": 1 / 3, "stated": 1 / 3, "either": 2 / 3, "questions": 3, "n": 8}
    longer = ("note that the carrier of zorine is smoke as a law", "x", "")
    assert measure_contamination([longer], texts)["copied"] == 1  # eight words in a row of eleven
    assert measure_contamination([("glow", "s", "x")], texts)["either"] == 0  # no part of a word
    assert measure_contamination([copy], [])["either"] == 0
