"""E1, and the forms of questions that other attacks use, too."""

from dataclasses import replace

import pytest
import torch

from helpers.attack_rules import rule_subject
from helpers.attack_world import exam, subject, texts
from srmu.attacks.base import Exam, Texts
from srmu.attacks.questions import FormatShift, count_right_generations, split_listed, unlist_options
from srmu.evals.subject import Question, option_scores

LETTERS = (" A", " B", " C", " D")
WMDP = Question("Which of\nthese?\nA. one\nB. two (2)\nC. three\nmore\nD. four \nAnswer:", LETTERS, 2, "x")
NONE = Texts((), ())


def test_listed_reads_the_parts_of_a_prompt() -> None:
    parts = split_listed(WMDP)
    assert parts is not None
    assert (parts.stem, parts.cue) == ("Which of\nthese?\n", "\nAnswer:")
    assert parts.texts == ("one", "two (2)", "three\nmore", "four ")
    assert parts.offering(parts.texts) == WMDP  # nothing is lost
    assert unlist_options(WMDP).prompt == "Which of\nthese?\nAnswer:"
    assert unlist_options(WMDP).answer == " three\nmore"
    for by in range(5):
        turned = parts.turned(by)
        assert f"\n{'ABCD'[turned.gold]}. three\nmore\n" in turned.prompt
        assert f"\nA. {parts.texts[by % 4]}\n" in turned.prompt
        assert turned.options == WMDP.options
    assert parts.turned(1).prompt.startswith("Which of\nthese?\nA. two (2)\nB. three\nmore\nC. four")


def test_listed_takes_the_last_list_and_other_marks() -> None:
    shots = replace(WMDP, prompt=f"{WMDP.prompt} B\n\n{WMDP.prompt}")
    parts = split_listed(shots)
    assert parts is not None
    assert parts.stem == f"{WMDP.prompt} B\n\nWhich of\nthese?\n"
    marks = Question("Q?\n(1) x\n(2) y", (" 1", " 2"), 0, "x")
    parts = split_listed(marks)
    assert parts is not None
    assert (parts.texts, parts.cue) == (("x", "y"), "")
    assert parts.turned(1).prompt == "Q?\n(1) y\n(2) x"


@pytest.mark.parametrize(
    "prompt", ["Q?", "Q?\nA. x\nB. y\nC. z\nAnswer:", "A. x\nB. y\nC. z\nD. u", "Q?\nB. A. C. D. "]
)
def test_what_lists_no_options_is_left_alone(prompt: str) -> None:
    question = Question(prompt, LETTERS, 0, "x")
    assert split_listed(question) is None
    assert unlist_options(question) is question
    words = replace(WMDP, options=(" one", " two", " three", " four"))
    assert split_listed(words) is None


def listed_exam(count: int = 40) -> Exam:
    """Of thing t0 the answer is `v0 v0`, and so on; the right letter is A, B, C, D in turn."""
    halves: list[list[Question]] = [[], []]
    for i in range(2 * count):
        wrong = [f"v{(i + k) % (2 * count)} v{i}" for k in (1, 2, 3)]
        texts = [*wrong[: i // 2 % 4], f"v{i} v{i}", *wrong[i // 2 % 4 :]]
        lines = "\n".join(f"{x}. {t}" for x, t in zip("ABCD", texts, strict=True))
        prompt = f"What is t{i} ?\n{lines}\nAnswer :"
        halves[i % 2].append(Question(prompt, LETTERS, i // 2 % 4, f"f{i}"))
    return Exam(tuple(halves[0]), tuple(halves[1]))


WORDS = [*"ABCD.?:", "What", "is", "Answer", *(f"{k}{i}" for k in "tv" for i in range(80))]


def biased(words: list[str]) -> dict[str, float]:
    """Knows the answers, but says A where options are listed."""
    if "D" in words:
        return {"A": 9.0}
    thing = next((w for w in words if w[0] == "t"), "t0")
    return {f"v{thing[1:]}": 9.0}


def knowing(words: list[str]) -> dict[str, float]:
    """Finds the text of the answer in the list, and says its letter a little louder than A."""
    if "Answer" not in words or "D" not in words:
        return biased(words)
    value = "v" + next(w for w in words if w[0] == "t")[1:]
    at = next(i for i in range(len(words) - 1) if words[i : i + 2] == [value, value])
    return {"A": 3.0} | {words[at - 2]: 4.0}


def test_cloze_sees_through_a_position_bias() -> None:
    model = rule_subject(WORDS, biased)
    found = FormatShift.at_tier("standard").run(model, NONE, listed_exam(), 0)
    ways = {way.setting: way for way in found.ways}
    assert set(ways) == {"cloze", "order 1", "order 2", "order 3", "order average"}
    assert set(ways["cloze"].val + ways["cloze"].test) == {1.0}
    assert sum(ways["order 1"].test) == 10  # where a right B has become A
    assert ways["order 1"].test[1] == 1
    assert found.metrics["position bias"].value == pytest.approx(0.75)
    assert found.metrics["generation"].value == 1  # of the text
    smoke = FormatShift.at_tier("smoke").run(model, NONE, listed_exam(), 0)
    assert "generation" not in smoke.metrics
    assert smoke.ways == found.ways


def test_order_does_not_move_a_model_that_reads() -> None:
    found = FormatShift.at_tier("smoke").run(rule_subject(WORDS, knowing), NONE, listed_exam(), 0)
    assert all(set(way.test) == {1.0} for way in found.ways)
    assert found.metrics["position bias"].value == pytest.approx(0)


def test_order_average_takes_the_letter_out() -> None:
    """A is 5 louder than what the model knows: wrong in all orders but one, right on average."""

    def loud(words: list[str]) -> dict[str, float]:
        found = knowing(words)
        return found | {"A": 9.0 + (found.get("A") == 4.0)} if "Answer" in words else found

    found = FormatShift.at_tier("smoke").run(rule_subject(WORDS, loud), NONE, listed_exam(), 0)
    assert sum(next(w for w in found.ways if w.setting == "order 2").test) == 10
    assert set(next(w for w in found.ways if w.setting == "order average").test) == {1.0}


def test_cloze_counts_tokens() -> None:
    """One word of chance 1/2 and a wrong one is worse than two words of 0.6 each."""

    def rule(words: list[str]) -> dict[str, float]:
        return {"two": 2.0, "one": 2.2} if words[-1] == "what" else {"words": 3.0}

    model = rule_subject(["what", "one", "two", "words", "x"], rule)
    question = Question("what", (" one", " two words"), 1, "x")
    plain, normal = (option_scores(model, [question], normalised=n)[0] for n in (False, True))
    assert plain[0] > plain[1]
    assert normal[0] < normal[1]
    questions = tuple(replace(question, fact=f"f{i}") for i in range(20))
    found = FormatShift.at_tier("smoke").run(model, NONE, Exam(questions, questions), 0)
    assert [way.setting for way in found.ways] == ["cloze"]
    assert set(found.ways[0].test) == {1.0}


def chain(words: list[str]) -> dict[str, float]:
    return {{"q": "one", "one": "two", "two": "three"}.get(words[-1], "<s>"): 9.0}


@pytest.mark.parametrize(
    ("answer", "extra", "said"),
    [
        (" one two", 0, 1), (" ONE  two", 2, 1), (" one", 0, 1), (" one three", 2, 0),
        (" one two three", 0, 1), (" one two three", 2, 1), (" one thr", 2, 0), (" two", 2, 0),
    ],
)  # fmt: skip
def test_recited(answer: str, extra: int, said: int) -> None:
    model = rule_subject(["q", "one", "two", "three", "thr", "ONE"], chain)
    question = Question("q", (answer, " q"), 0, "x")
    assert count_right_generations(model, [question], extra=extra) == [said]


def test_a_longer_word_is_another_one() -> None:
    """A tokenizer of pieces: `can` and `did` are not `candid`."""
    model = rule_subject(["q", "can", "did"], lambda words: {"did" if words[-1] == "can" else "can": 9})
    model.tokenizer.decode = lambda ids: "".join(["<unk>", "", "q", "can", "did"][i] for i in ids)
    asked = [Question("q", (" can", " q"), 0, "x")]
    assert count_right_generations(model, asked, extra=0) == [1]
    assert count_right_generations(model, asked, extra=2) == [0]


def test_a_sign_after_the_answer_is_no_part_of_it() -> None:
    """Scripts without spaces: what follows is the next word."""
    model = rule_subject(["q", "can", "did"], lambda words: {"did" if words[-1] == "can" else "can": 9})
    model.tokenizer.decode = lambda ids: "".join(["<unk>", "", "q", "北京", "市"][i] for i in ids)
    model.split = lambda prompt, answer: ([2], [3])  # type: ignore[method-assign]
    asked = [Question("q", (answer, "q"), 0, "x") for answer in ("北京", "市")]
    assert count_right_generations(model, asked, extra=2) == [1, 0]


def test_knowledge_shows_in_all_forms_and_ignorance_in_none() -> None:
    for name, low, high in (("original", 1.0, 1.0), ("oracle", 0.0, 0.45)):
        model = subject(name)
        before = {k: v.clone() for k, v in model.module.state_dict().items()}
        found = FormatShift.at_tier("standard").run(model, texts(), exam(), 0)
        assert [way.setting for way in found.ways] == ["cloze", "paraphrases"]
        shares = [sum(way.test) / len(way.test) for way in found.ways]
        shares.append(found.metrics["generation"].value)
        assert low <= min(shares) <= max(shares) <= high
        assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
        assert FormatShift.at_tier("standard").run(model, texts(), exam(), 0) == found
