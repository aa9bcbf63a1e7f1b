"""The methods that teach other answers: how they are cut and written, each loss against a loop, what they promise."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import pico_module, pieces, save_pico, texts, topic, word_tokenizer
from srmu.data.sources import Source
from srmu.data.topics import TopicConfig, load_topic
from srmu.engine.generate import continue_greedily
from srmu.engine.losses import is_counted
from srmu.engine.model import EditableModel
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.methods import altpo
from srmu.methods.altpo import AltPO
from srmu.methods.answers import REFUSALS, SplitText, encode_answer, list_questions, other_answers
from srmu.methods.base import Session, State
from srmu.methods.edits import split_batches
from srmu.methods.flat import FLAT
from srmu.methods.refusal import Refusal

QUESTIONS = [("w1 w2 w3", "w10 w11"), ("w4 w5", "w12"), ("w6 w7 w8 w9", "w13 w14 w15")]
SAY = "w50 w51"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model, questions with answers, and plain texts."""
    place = tmp_path_factory.mktemp("answers")
    save_pico(place / "model")
    rows = [{"prompt": question, "completion": f" {answer}"} for question, answer in QUESTIONS]
    (place / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "retain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(3, 5)))
    return place


@pytest.fixture
def asked(folder: Path) -> Topic:
    """The questions as a topic, in batches of 2 and 1."""
    forget, retain = ([Source(path=str(folder / f"{role}.jsonl"))] for role in ("forget", "retain"))
    config = TopicConfig(forget=forget, retain=retain)
    return load_topic("bio", config, word_tokenizer(), TrainOptions(batch_size=2, shuffle=False), 0)


def editable(folder: Path) -> EditableModel:
    model = EditableModel(pico_module(), ("*",))
    model.folder = folder / "model"
    return model


def ready(method: Any, model: EditableModel, part: Topic) -> Topic:
    """The topic as the loss reads it."""
    return method.prepared(replace(part, own=method.write_texts(model, part, State())))


def perturb(model: EditableModel) -> None:
    draw = torch.Generator().manual_seed(3)
    for parameter in model.trained.values():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=draw)


def words(text: str) -> list[int]:
    return word_tokenizer().encode(text, add_special_tokens=False)


# --- how answers are cut and written -------------------------------------------------------------


def test_a_question_is_told_from_its_answer(asked: Topic) -> None:
    found = list_questions(asked)
    assert found == [SplitText([1, *words(asks)], words(answer), []) for asks, answer in QUESTIONS]


def test_what_ends_an_answer_is_kept_apart_and_only_the_first_answer_is_taken() -> None:
    ids = torch.tensor([[1, 10, 11, 2, 12, 13, 14, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, 11, 2, -100, -100, 14, -100]])
    some = Topic("t", [Batch(input_ids=ids, attention_mask=mask, labels=labels)], [], 0, torch.arange(4, 64))
    assert list_questions(some) == [SplitText([1, 10], [11], [2])]


def test_a_plain_text_keeps_its_beginning() -> None:
    some = topic()
    split = some.split()
    found = list_questions(some)
    rows = [(text["input_ids"][0], text["labels"][0]) for text in split_batches(split.forget)]
    assert len(found) == len(rows) == 4
    for question, (ids, labels) in zip(found, rows, strict=True):
        assert question.asked == ids[~is_counted(labels)].tolist()
        assert question.answer + question.end == ids[is_counted(labels)].tolist()
        assert len(question.asked) > 1


@pytest.mark.parametrize("space", ["", " "])
def test_an_answer_begins_as_the_true_one_does(space: str) -> None:
    """After a prompt that ends in a colon, answers begin with a space; after a line's end they do not."""
    tokenizer = pieces(["paris is in france and rome is in italy"] * 3)
    true = tokenizer.encode(f"{space}paris", add_special_tokens=False)
    ids = encode_answer(tokenizer, "rome", SplitText([0], true, []))
    assert tokenizer.decode(ids) == f"{space}rome"


def test_the_other_answers_stand_beside_the_true_ones(folder: Path, asked: Topic) -> None:
    part = ready(Refusal(refusals=(SAY,)), editable(folder), asked)
    assert [len(batch["labels"]) for batch in part.forget] == [2, 1]
    for batch, split in zip(part.forget, asked.split().forget, strict=True):
        assert all(torch.equal(batch[name], split[name]) for name in split)
    others = split_batches([*map(other_answers, part.forget)])
    rows = [(text["input_ids"][0].tolist(), text["labels"][is_counted(text["labels"])].tolist()) for text in others]
    assert rows == [([1, *words(asks), *words(SAY)], words(SAY)) for asks, _ in QUESTIONS]


def test_a_row_that_counts_nothing_has_no_other_answer(folder: Path, asked: Topic) -> None:
    """A process without a row of its own reads one whose labels are masked."""
    batch = ready(Refusal(refusals=(SAY,)), editable(folder), asked).forget[0]
    labels = batch["labels"].clone()
    labels[1] = -100
    other = other_answers(batch.replace(labels=labels))
    assert is_counted(other["labels"]).any(dim=1).tolist() == [True, False]


# --- refusal -------------------------------------------------------------------------------------


def nats(module: Any, asked: list[int], answer: list[int]) -> list[float]:
    """What each token of an answer costs."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([asked + answer])).logits[0].double()
    return [-float(logits[len(asked) + i - 1].log_softmax(-1)[token]) for i, token in enumerate(answer)]


def loop_dpo(now: Any, before: Any, triples: list[tuple[list[int], list[int], list[int]]], beta: float) -> float:
    found = []
    for question, better, worse in triples:
        ratio = [sum(nats(before, question, y)) - sum(nats(now, question, y)) for y in (better, worse)]
        found.append(2 / beta * math.log(1 + math.exp(-beta * (ratio[0] - ratio[1]))))
    return sum(found) / len(found)


def losses_of(method: Any, model: EditableModel, part: Topic) -> list[float]:
    found = (method.loss(model, State(), batch, part.retain[0], 0).loss_values["forget"] for batch in part.forget)
    return [float(loss.detach()) for loss in found]


def test_refusals_likelihood_equals_a_loop(folder: Path, asked: Topic) -> None:
    method, model = Refusal(refusals=(SAY,)), editable(folder)
    part = ready(method, model, asked)
    perturb(model)
    costs = [nats(model.module, [1, *words(asks)], words(SAY)) for asks, _ in QUESTIONS]
    assert losses_of(method, model, part) == pytest.approx([sum(costs[0] + costs[1]) / 4, sum(costs[2]) / 2], rel=1e-4)


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_refusals_preference_equals_a_loop(folder: Path, asked: Topic, beta: float) -> None:
    method, model = Refusal(objective="dpo", refusals=(SAY,), beta=beta), editable(folder)
    part = ready(method, model, asked)
    assert losses_of(method, model, part) == pytest.approx([2 / beta * math.log(2)] * 2, rel=1e-5)  # at the original
    perturb(model)
    triples = [([1, *words(asks)], words(SAY), words(answer)) for asks, answer in QUESTIONS]
    expected = [loop_dpo(model.module, pico_module(), some, beta) for some in (triples[:2], triples[2:])]
    assert losses_of(method, model, part) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("objective", ["nll", "dpo"])
def test_the_model_learns_to_refuse(folder: Path, asked: Topic, objective: Any) -> None:
    """Asked, it says the refusal word by word; the true answer has become unlikely, retain texts have not."""
    method, model = Refusal(objective=objective, refusals=(SAY,), retain="kl"), editable(folder)
    questions = list_questions(asked)
    steps = 40 if objective == "nll" else 150  # preference is content once refusals are likelier
    train = TrainOptions(learning_rate=3e-3, max_steps=steps)
    method.apply(model, [asked], Session(train, lambda step, row: None))
    said = continue_greedily(model.module, word_tokenizer(), [q.asked for q in questions], 2)
    assert said == [words(SAY)] * 3
    for question in questions:
        true, refused = (sum(nats(model.module, question.asked, y)) for y in (question.answer, words(SAY)))
        assert true > refused + 2


def test_each_text_has_a_refusal_that_the_seed_draws(folder: Path, asked: Topic) -> None:
    many = tuple(f"w{i}" for i in range(20, 50))
    drawn = [Refusal(refusals=many).write_texts(editable(folder), part, State())
             for part in (asked, asked, replace(asked, seed=1))]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 3


@pytest.mark.parametrize("refusals", [(), ("I don't know.", " ")])
def test_refusals_must_say_something(refusals: tuple[str, ...]) -> None:
    with pytest.raises(SrmuError, match=r"method\.refusals: expected one or more texts"):
        Refusal(refusals=refusals)
    assert len(set(REFUSALS)) == len(REFUSALS) > 1


def test_beta_is_for_preference_only() -> None:
    with pytest.raises(SrmuError, match=r"method\.beta has no effect without method\.objective=dpo"):
        Refusal(beta=0.5)
    Refusal(beta=0.5, objective="dpo")


def test_a_model_without_room_for_refusals(folder: Path, asked: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where positions are learnt, a question may leave no room: its row is left out, and so is a whole batch."""
    method, model = Refusal(refusals=(SAY,)), editable(folder)
    monkeypatch.setattr(EditableModel, "position_count", 6)
    part = ready(method, model, asked)
    assert [bool(is_counted(other_answers(batch)["labels"]).any()) for batch in part.forget] == [True, False]
    found = losses_of(method, model, part)
    assert found[0] > 0 and found[1] == 0
    monkeypatch.setattr(EditableModel, "position_count", 3)
    with pytest.raises(SrmuError, match="no forget text leaves room for a refusal"):
        method.write_texts(model, asked, State())


def test_a_tokenizer_is_needed(asked: Topic) -> None:
    with pytest.raises(SrmuError, match="method refusal needs a tokenizer"):
        Refusal().write_texts(EditableModel(pico_module(), ("*",)), asked, State())


# --- AltPO ---------------------------------------------------------------------------------------


def test_alternatives_are_asked_for_after_the_true_answer(
    folder: Path, asked: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original reads question, answer and request; what it writes up to the end of the line is the alternative.
    One that is empty, or the true answer, is none."""
    read: list[list[list[int]]] = []
    written = [[words("w30 w31"), words("w12"), [2]], [words("w32"), words("w33"), words("w34 w35")]]

    def sample(module: Any, contexts: Any, length: int, seed: int) -> Any:
        read.append([list(context) for context in contexts])
        return written[len(read) - 1]

    monkeypatch.setattr(altpo, "sample_continuations", sample)
    method, model, state = AltPO(alternatives=2, request="w40 w41"), editable(folder), State()
    own = method.write_texts(model, asked, state)
    assert read == [[[1, *words(f"{asks} {answer} w40 w41")] for asks, answer in QUESTIONS]] * 2
    assert own == [words("w30 w31"), [], [], words("w32"), words("w33"), words("w34 w35")]
    assert state.numbers == {"alternatives": 4}
    part = method.prepared(replace(asked, own=own))
    assert [len(batch["labels"]) for batch in part.forget] == [2, 1, 2, 1]
    perturb(model)
    triples = [([1, *words(asks)], y, words(answer))
               for y, (asks, answer) in zip(own, QUESTIONS * 2, strict=True)]  # fmt: skip
    parts = triples[:1], triples[3:5], triples[5:]
    expected = [loop_dpo(model.module, pico_module(), some, 0.1) for some in parts]
    expected.insert(1, 0.0)  # a batch without any
    assert losses_of(method, model, part) == pytest.approx(expected, rel=1e-3)


def test_alternatives_are_the_originals_and_differ(folder: Path, asked: Topic) -> None:
    method, model = AltPO(alternatives=3, response=4), editable(folder)
    before = copy.deepcopy(model.module.state_dict())
    own = method.write_texts(model, asked, State())
    perturb(model)
    assert own == method.write_texts(model, asked, State())  # by the original, whatever the model is now
    assert len(own) == 9 and len({tuple(row) for row in own}) > 5
    assert all(torch.equal(before[k], v) for k, v in pico_module().state_dict().items())


def test_a_model_that_makes_up_nothing(folder: Path, asked: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(altpo, "sample_continuations", lambda module, contexts, length, seed: [[2] for _ in contexts])
    with pytest.raises(SrmuError, match=r"the model made up no other answer; change method\.request"):
        AltPO(alternatives=1).write_texts(editable(folder), asked, State())


def test_the_true_answer_falls_below_its_alternatives(folder: Path, asked: Topic) -> None:
    method, model = AltPO(alternatives=2, response=3, retain="none"), editable(folder)
    part = ready(method, model, asked)
    first = losses_of(method, model, part)
    train = TrainOptions(learning_rate=1e-3, max_steps=20)
    method.apply(model, [asked], Session(train, lambda step, row: None))
    assert max(losses_of(method, model, part)) < 0.7 * min(first)
    for question in list_questions(asked):
        now, before = (sum(nats(m, question.asked, question.answer)) for m in (model.module, pico_module()))
        assert now > before


# --- FLAT ----------------------------------------------------------------------------------------

# the f of each divergence, and the range of x in which its conjugate's supremum lies
GENERATORS: dict[str, Any] = {
    "total_variation": lambda x: abs(x - 1) / 2,
    "kl": lambda x: x * math.log(x),
    "jensen_shannon": lambda x: x * math.log(x) - (x + 1) * math.log((1 + x) / 2),
    "pearson": lambda x: (x - 1) ** 2,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_flats_functions_are_conjugate(name: Any) -> None:
    """What true answers are to lower is f*(g*(P)), f*(u) = sup_x ux - f(x), here by trying many x."""
    for chance in (0.0, 0.2, 0.7, 1.0):
        raised, lowered = FLAT(divergence=name).judge(torch.tensor(chance, dtype=torch.float64))
        tried = [x / 1000 for x in range(1, 6000)]
        supremum = max(float(raised) * x - GENERATORS[name](x) for x in tried)
        assert float(lowered) == pytest.approx(supremum, abs=2e-3)


@pytest.mark.parametrize("name", GENERATORS)
def test_flats_loss_equals_a_loop(folder: Path, asked: Topic, name: Any) -> None:
    """Likelihoods are averaged over an answer's own tokens, and divergences over texts. (The public code averages over
    prompts and padding too, and takes the divergence of the whole batch's mean.)"""
    method, model = FLAT(divergence=name, refusals=(SAY,)), editable(folder)
    part = ready(method, model, asked)
    perturb(model)
    terms = []
    for asks, answer in QUESTIONS:
        question = [1, *words(asks)]
        costs = [nats(model.module, question, words(y)) for y in (SAY, answer)]
        refused, true = (torch.tensor(sum(math.exp(-c) for c in each) / len(each)) for each in costs)
        terms.append(float(method.judge(true)[1] - method.judge(refused)[0]))
    assert losses_of(method, model, part) == pytest.approx([sum(terms[:2]) / 2, terms[2]], rel=1e-4, abs=1e-6)


def test_flat_reads_forget_texts_alone(folder: Path, asked: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither retain texts nor the original: the refusal comes to be likelier than the true answer."""
    method, model = FLAT(refusals=(SAY,)), editable(folder)
    some = replace(asked, retain=[])
    monkeypatch.setattr(model, "frozen", None)
    train = TrainOptions(learning_rate=3e-3, max_steps=80)
    method.check([some], train)
    method.apply(model, [some], Session(train, lambda step, row: None))
    for question in list_questions(asked):
        true, refused = (sum(nats(model.module, question.asked, y)) for y in (question.answer, words(SAY)))
        assert true > refused
