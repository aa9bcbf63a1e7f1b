import pytest

from srmu.entanglement import overlap


def test_a_hand_example():
    forget = ["a b a", "c a"]  # a 3, b 1, c 1; ab, ba, ca
    retain = ["A b d", "c"]  # a, b, c, d; ab, bd
    assert overlap(forget, retain, 1) == {"jaccard": 3 / 4, "forget_types": 1, "forget_tokens": 1}
    assert overlap(forget, retain, 2) == pytest.approx(
        {"jaccard": 1 / 4, "forget_types": 1 / 3, "forget_tokens": 1 / 3}
    )


def test_occurrences_count_in_tokens_only():
    assert overlap(["a a a b"], ["a c"], 1) == pytest.approx(
        {"jaccard": 1 / 3, "forget_types": 1 / 2, "forget_tokens": 3 / 4}
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_identical_and_disjoint(n):
    texts = ["the red fox runs", "a b c d e"]
    assert set(overlap(texts, texts, n).values()) == {1}
    assert set(overlap(texts, ["u v w x y"], n).values()) == {0}


def test_no_ngram_crosses_two_documents():
    assert overlap(["a b", "c d"], ["b c"], 2)["forget_types"] == 0


def test_texts_too_short_share_nothing():
    assert set(overlap(["a"], ["a"], 2).values()) == {0}
    assert set(overlap([], [], 1).values()) == {0}


def test_an_ngram_has_a_word():
    with pytest.raises(ValueError, match="at least one word"):
        overlap(["a"], ["a"], 0)
