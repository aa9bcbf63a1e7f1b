"""Objectives that teach other answers to what forget texts ask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from srmu.engine import losses
from srmu.engine.generate import Ids, join_responses
from srmu.errors import SrmuError
from srmu.methods.base import Batch, EditableModel, State, Topic
from srmu.methods.edits import split_batches
from srmu.methods.logits import Retaining, log_ratios
from srmu.methods.own_texts import tokenizer_of

OTHER = "other_"  # begins the names of the tensors that hold the same questions with other answers
SPACED = ("Ġ", "▁", " ")  # how a tokenizer spells the space that a token begins with


class SplitText(NamedTuple):
    """A forget text in parts."""

    asked: Ids
    answer: Ids  # the first, of a chat with several
    end: Ids  # what ends the answer, such as </s>


def list_questions(topic: Topic) -> list[SplitText]:
    """The forget texts in parts; a plain text is cut as `Topic.split` does, and its rest is the answer."""
    found, ordinary = [], {*topic.vocabulary.tolist()}
    for text in split_batches(topic.split().forget):
        ids, counted = text["input_ids"][0].tolist(), losses.is_counted(text["labels"][0]).tolist()
        first = counted.index(True)
        stop = [*counted, False].index(False, first)
        last = next((i for i in range(first, stop) if ids[i] not in ordinary), stop)
        found.append(SplitText(ids[:first], ids[first:last], ids[last:stop]))
    return found


def encode_answer(tokenizer: Any, text: str, question: SplitText) -> Ids:
    """A text in tokens, as an answer to the question: it begins with a space where the true answer does."""

    def is_spaced(ids: Ids) -> bool:
        return bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(SPACED)

    ways = [tokenizer.encode(f"{space}{text}", add_special_tokens=False) for space in ("", " ")]
    return next((ids for ids in ways if is_spaced(ids) == is_spaced(question.answer)), ways[0])


@dataclass(frozen=True, kw_only=True)
class Answering(Retaining):
    """An objective that teaches other answers, which `write_texts` gives for each forget text in turn."""

    def prepared(self, topic: Topic) -> Topic:
        """The topic with other answers beside the true ones: all its batches with the first, with the second, ..."""
        questions, split = list_questions(topic), topic.split()
        count = len(topic.own) // len(questions)
        pairs = zip(questions * count, topic.own, strict=True)
        forget = []
        for batch in [*split.forget] * count:
            some = [next(pairs) for _ in batch["labels"]]
            other = join_responses([question.asked for question, _ in some], [[*ids] for _, ids in some])
            forget.append(batch.replace(**{OTHER + name: tensor for name, tensor in other.items()}))
        return replace(split, forget=forget)


REFUSALS = (
    "I don't know.",
    "I'm sorry, I don't know that.",
    "I have no information about that.",
    "I can't answer that question.",
    "That is something I know nothing about.",
    "I'm not sure; I haven't learned about that.",
)


@dataclass(frozen=True, kw_only=True)
class Refusing(Answering):
    """An objective whose other answers are refusals."""

    refusals: tuple[str, ...] = REFUSALS  # one is drawn for each text

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.refusals or not all(text.strip() for text in self.refusals):
            raise SrmuError('method.refusals: expected one or more texts, such as ["I don\'t know."]')

    def write_texts(self, model: EditableModel, topic: Topic, state: State) -> Sequence[Sequence[int]]:
        tokenizer, questions = tokenizer_of(model.folder, f"method {self.name}"), list_questions(topic)
        generator = topic.generator("refusals")
        draw = torch.randint(len(self.refusals), (len(questions),), generator=generator).tolist()
        pairs = zip(draw, questions, strict=True)
        found = fit_answers(model, questions, (encode_answer(tokenizer, self.refusals[i], q) for i, q in pairs))
        if not any(found):
            raise SrmuError(f"topic {topic.name}: no forget text leaves room for a refusal; lower max_length")
        return found


def fit_answers(model: EditableModel, questions: Sequence[SplitText], answers: Iterator[Ids]) -> list[Ids]:
    """The answers with what ends the true ones; [] where the model has no room for one, or there is none."""
    room = model.position_count
    found = []
    for question, ids in zip(questions, answers, strict=True):
        fits = ids and (room is None or len(question.asked + ids + question.end) <= room)
        found.append(ids + question.end if fits else [])
    return found


def other_answers(batch: Batch) -> Batch:
    """The same questions with the other answers; a row that counts nothing counts nothing here either."""
    other = Batch({name.removeprefix(OTHER): x for name, x in batch.items() if name.startswith(OTHER)})
    counts = losses.is_counted(batch["labels"]).any(dim=1, keepdim=True)
    return other.replace(labels=other["labels"].where(counts, -100))


def preference_loss(model: EditableModel, batch: Batch, beta: float) -> losses.Mean:
    """DPO (arXiv 2305.18290) with the other answers preferred, times 2 / beta as in NPO."""
    other = other_answers(batch)
    margins: Tensor = log_ratios(model, other) - log_ratios(model, batch)
    mean = losses.row_mean(-2 / beta * logsigmoid(beta * margins), other["labels"])
    return replace(mean, least=1)  # a batch may have none
