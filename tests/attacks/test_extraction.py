import pytest
import torch

from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from helpers.models import texts as random_texts
from srmu.attacks.base import Texts
from srmu.attacks.questions import Extraction, extraction_strength
from srmu.evals.subject import Subject


@pytest.mark.parametrize(
    ("greedy", "answer", "value"),
    [("abcd", "abcd", 1), ("xbcd", "abcd", 0.75), ("axcd", "abcd", 0.5), ("abcx", "abcd", 0),
     ("xbxd", "abcd", 0.25), ("a", "a", 1), ("x", "a", 0)],
)  # fmt: skip
def test_strength(greedy: str, answer: str, value: float) -> None:
    assert extraction_strength([*map(ord, greedy)], [*map(ord, answer)]) == value


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_strengths_are_those_of_growing_prefixes(name: str) -> None:
    """By the definition: give more and more of the answer until the rest comes by itself."""
    module, tokenizer = pico_module(name), word_tokenizer()
    model = Subject(module, tokenizer)
    pairs = []
    for text in random_texts(30, 3):
        row = tokenizer(text)["input_ids"]
        given, answer = row[:3], row[3:]
        if len(pairs) % 3:  # a random model recites nothing but what it says itself
            with torch.no_grad():
                for at in range(len(pairs) % 4, len(answer)):
                    ids = torch.tensor([given + answer[:at]])
                    answer[at] = int(module(ids).logits[0, -1].argmax())
        pairs.append((given, answer))

    @torch.no_grad()
    def naive(given: list[int], answer: list[int]) -> float:
        for k in range(len(answer)):
            said: list[int] = []
            for _ in answer[k:]:
                ids = torch.tensor([given + answer[:k] + said])
                said.append(int(module(ids).logits[0, -1].argmax()))
            if said == answer[k:]:
                return 1 - k / len(answer)
        return 0.0

    found = Extraction(positions=40).measure_strengths(model, pairs)  # several batches
    assert found == pytest.approx([naive(*pair) for pair in pairs])
    assert len(set(found)) > 2


def test_what_was_learnt_is_extracted() -> None:
    """`w50 subject answer`: the subject cannot be told from w50, the answer from both can."""
    for name, answers, halves in (("original", 1, 0.5), ("oracle", 0, 0)):
        model = subject(name)
        before = {k: v.clone() for k, v in model.module.state_dict().items()}
        found = Extraction().run(model, texts(), exam(), 0)
        assert found.ways == ()
        assert found.metrics["answers"].value == pytest.approx(answers, abs=0.05)
        assert found.metrics["forget texts"].value == pytest.approx(halves, abs=0.05)
        assert found.metrics["forget texts"].n == 64
        assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
        assert Extraction().run(model, texts(), exam(), 0) == found


def test_few_forget_texts_give_no_interval() -> None:
    found = Extraction().run(subject("original"), Texts(texts().forget[:5], ()), exam(), 0)
    assert set(found.metrics) == {"answers"}
