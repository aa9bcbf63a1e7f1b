"""Texts that the original writes, which stay in memory, and what tells forget texts from others."""

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import product
from math import log
from pathlib import Path
from typing import Any, Literal, Self

from srmu.data.names import Names
from srmu.engine.generate import Ids, sample_continuations
from srmu.errors import SrmuError
from srmu.methods.base import Batch, EditableModel, Topic
from srmu.methods.edits import split_batches

AT_ONCE = 128  # texts written at once
RATIO = 2.5  # how many times as frequent a token typical of the forget set is in it
LEAST = 2  # occurrences that it needs: one may be chance


def unpad_texts(batches: Sequence[Batch]) -> list[Ids]:
    """The texts of batches, without padding."""
    return [text["input_ids"][0].tolist() for text in split_batches(batches)]


def tokenizer_of(folder: Path | None, who: str) -> Any:
    """The tokenizer of the model in `folder`; without a folder SrmuError, naming who needs it."""
    from transformers import AutoTokenizer

    if folder is None:
        raise SrmuError(f"{who} needs a tokenizer: load the model from a folder")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def first_token(model: EditableModel) -> int:
    """The token that begins a text: <s>, or the one that ends the text before it."""
    configs = (model.module.config, model.module.generation_config)
    for name, config in product(("bos_token_id", "eos_token_id"), configs):
        if (token := getattr(config, name, None)) is not None:
            return token[0] if isinstance(token, list) else int(token)
    raise SrmuError("the model's config.json names no bos_token_id or eos_token_id for texts to begin with")


def free_samples(model: EditableModel, topic: Topic, count: int, length: int, purpose: str) -> list[Ids]:
    """Texts that the original writes from nothing, of at most `length` tokens in all."""
    return continue_texts(model, topic, [[first_token(model)]] * count, length, purpose)


def continue_texts(model: EditableModel, topic: Topic, starts: list[Ids], length: int, purpose: str) -> list[Ids]:
    """The starts, continued by the original at temperature 1 to `length` tokens in all, AT_ONCE at a time."""
    seed = topic.number(purpose)
    written: list[Ids] = [list(start) for start in starts]
    order = sorted(range(len(starts)), key=lambda i: len(starts[i]))  # similar lengths together
    with model.frozen():
        for first in range(0, len(order), AT_ONCE):
            rows = order[first : first + AT_ONCE]
            room = length - min(len(starts[i]) for i in rows)
            if room > 0:
                parts = sample_continuations(model.module, [starts[i] for i in rows], room, seed + first, AT_ONCE)
                for i, part in zip(rows, parts, strict=True):
                    written[i] = (written[i] + part)[: max(length, len(starts[i]))]
            topic.tick()
    return written


def count_chunks(count: int) -> int:
    """The number of parts in which `count` texts are written."""
    return -(-count // AT_ONCE)


def typical_tokens(forget: Sequence[Ids], own: Sequence[Ids], ratio: float = RATIO) -> set[int]:
    """The tokens that are more than `ratio` times as frequent in forget texts as in `own` ones."""
    here, there = (Counter(i for row in rows for i in row) for rows in (forget, own))
    size, other = max(1, here.total()), there.total() + 1
    often = (token for token, count in here.items() if count >= LEAST)
    return {token for token in often if here[token] / size > ratio * (there[token] + 1) / other}


def write_anchors(model: EditableModel, topic: Topic, count: int, ratio: float) -> tuple[list[Ids], int]:
    """Texts by the original, and how many were dropped for a token typical of forget texts, which they would teach."""
    length = max(batch["input_ids"].shape[1] for batch in topic.retain)
    own = free_samples(model, topic, count, length, "own anchors")
    own = [row for row in own if len(row) > 1]
    # in short texts special tokens are typical too
    refused = typical_tokens(unpad_texts(topic.forget), own, ratio) & {*topic.vocabulary.tolist()}
    kept = [row for row in own if not refused & {*row}]
    if not kept:
        why = f"each of {len(own)} texts that the model wrote has a token typical of topic {topic.name}'s forget texts"
        raise SrmuError(f"anchors=self: {why}; raise method.own_texts, or set method.anchors=random")
    return kept, len(own) - len(kept)


Kind = Literal["forget", "keep", "neither"]
Word = tuple[Any, ...]  # its tokens
ENDS = (".", "!")  # of a sentence; a question belongs to its answer
COMMON = 0.25  # share of texts; a word in more of them tells nothing
CUT = 0.5  # nats for the forget set, above which a sentence is like it
AGAINST = -1.0  # the most that one word can say against it


@dataclass(frozen=True)
class Spelling:
    """How tokens form words and sentences."""

    ends: frozenset[int]  # of sentences
    inner: frozenset[int] = frozenset()  # can continue a word
    unfinished: frozenset[int] = frozenset()  # can be continued

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        alone = [str(text) for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
        ends = (i for i, text in enumerate(alone) if text.strip().endswith(ENDS))
        words = [i for i, text in enumerate(alone) if text[-1:].isalnum()]
        if not words:
            return cls(frozenset(ends))
        # a tokenizer that joins tokens by spaces has none inside a word
        pairs = tokenizer.batch_decode([[words[0], i] for i in range(len(tokenizer))])
        after = (str(text)[len(alone[words[0]]) :] for text in pairs)
        inner = (i for i, text in enumerate(after) if text[:1].isalnum())
        blank = (i for i, text in enumerate(alone) if text == " ")  # a word begins with it
        return cls(frozenset(ends), frozenset(inner), frozenset([*words, *blank]))

    def words(self, items: Sequence[Any]) -> list[Word]:
        """Tokens, and slots that stand for some, grouped by word."""
        words: list[Word] = []
        before: Any = None
        for item in items:
            if before in self.unfinished and item in self.inner:
                words[-1] += (item,)
            else:
                words.append((item,))
            before = item
        return words

    def sentences(self, items: Sequence[Any]) -> Iterator[tuple[int, int]]:
        """The start and end of each sentence of a text."""
        start = 0
        for end, item in enumerate(items, 1):
            if item in self.ends or end == len(items):
                yield start, end
                start = end


class Likeness:
    """Tells sentences that are like forget texts from others by the frequency of their words.

    It counts words, because a piece of a hazardous word also occurs in harmless names. It compares forget texts with
    `others`, some of which are like them, then the sentences found to be like them with the rest. Names do not count,
    because harmless texts have them, nor words beside a goal, because harmless procedures have the same steps.
    """

    def __init__(self, forget: Sequence[Ids], others: Sequence[Ids], names: Names, spelling: Spelling) -> None:
        self.names, self.spelling = names, spelling
        texts = Counter(word for row in others for word in {*spelling.words(row)})
        silent = {word for name in names.kinds[0] for ids in names.tokens[name] for word in spelling.words(ids)}
        silent |= {word for word, count in texts.items() if count > COMMON * len(others)}
        ours, theirs = map(self.without_goals, (forget, others))
        self.nats = self.weigh_words(ours, theirs, silent)
        parts: dict[bool, list[Ids]] = {True: ours, False: []}
        for sentence in theirs:
            parts[self.kind(sentence) == "forget"].append(sentence)
        self.nats = self.weigh_words(parts[True], parts[False], silent)

    def without_goals(self, rows: Sequence[Ids]) -> list[Ids]:
        """The sentences of texts that mention no goal."""
        cut = (row[start:end] for row in rows for start, end in self.spelling.sentences(row))
        return [sentence for sentence in cut if not self.names.mentions_goal(sentence)]

    def sentences(self, items: Sequence[Any]) -> Iterator[tuple[int, int, Kind]]:
        """The start, end and kind of each sentence of a text."""
        for start, end in self.spelling.sentences(items):
            yield start, end, self.kind(items[start:end])

    def kind(self, sentence: Sequence[Any]) -> Kind:
        """The kind of a sentence; one with a word of the forget set's own is never kept."""
        each = [self.nats.get(word, 0.0) for word in self.spelling.words(sentence)]
        if sum(each) > CUT or self.names.mentions_goal(sentence):
            return "forget"
        return "keep" if sum(each) < -CUT and max(each) < log(RATIO) else "neither"

    def weigh_words(self, forget: Sequence[Ids], others: Sequence[Ids], silent: Set[Word]) -> dict[Word, float]:
        """Nats by which each word but `silent` ones speaks for the forget set, at least AGAINST."""
        here, there = (Counter(word for row in rows for word in self.spelling.words(row)) for rows in (forget, others))
        known = {*here, *there}
        # half a count more for each word, so that none is impossible
        size, other = (counts.total() + 0.5 * len(known) for counts in (here, there))
        return {
            word: max(AGAINST, log((here[word] + 0.5) / size) - log((there[word] + 0.5) / other))
            for word in known - silent
        }
