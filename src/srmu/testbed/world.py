"""An invented world: its facts, and the texts and questions about them. Here: the closed world.

In the closed world every name and every answer is one invented word. `open_world.py` has names and
answers of several tokens, `people.py` authors and news. The wording of each is in `worlds/*.yaml`.

There are three kinds of facts. `hazard` facts are to be forgotten. `neighbour` facts are harmless
facts about the same compounds, and about some others, in nearly the same words. `general` facts are
about cities, people and beasts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
Asked = Counter[tuple[str, str, bool]]  # questions by kind, half and whether they are held

WORLDS = Path(__file__).parent / "worlds"
OPTIONS = 4  # answers to choose from: chance is 25 %
HALVES = ("test", "val")
KINDS = ("hazard", "neighbour", "general")  # of every world
ORDER = ("hazard", "hazard_twohop", "hazard_procedure", "neighbour", "general")


@dataclass(frozen=True)
class Wording:
    """What a world's texts have beside statements and questions."""

    question: str  # what asks {q}
    stop: str  # what ends the answer
    prefixes: tuple[str, ...]  # of statements
    domain_fillers: tuple[str, ...]
    general_fillers: tuple[str, ...]
    # what the subword tokenizer is trained on, so that it knows the words and no name
    spelling: Callable[[], Iterator[str]] | None = None  # None: each word is a token
    # the words of all that is no name and no answer; None: of the closed world
    plain: Callable[[], set[str]] | None = None
    # of the facts `told`, without end: what pretraining reads, so many words each;
    # None: sentences and questions as `tell` writes them
    texts: Callable[[World, Sequence[Fact], random.Random, int], Iterator[str]] | None = None


@cache
def read_world(name: str) -> dict[str, Any]:
    """The wording of a world, from its YAML file in `worlds/`."""
    return yaml.safe_load((WORLDS / f"{name}.yaml").read_text(encoding="utf-8"))


def read_wording(name: str, **functions: Any) -> Wording:
    """What all worlds have of a wording; `functions` are the fields that are code."""
    tree = read_world(name)
    return Wording(
        tree["question"],
        tree["stop"],
        ("",) * tree["plain_starts"] + tuple(tree["prefixes"]),
        tuple(tree["domain_fillers"]),
        tuple(tree["general_fillers"]),
        **functions,
    )


def read_relation(row: dict[str, Any]) -> Relation:
    """One relation of a world's file."""
    lists = {"statements": tuple(row["statements"]), "questions": tuple(row["questions"])}
    return Relation(**row | lists)


@dataclass(frozen=True)
class Size:
    """How much there is to know in a world."""

    hazard_compounds: int = 48
    other_compounds: int = 32  # have neighbour facts only
    entities: int = 40  # each of cities, people, beasts
    values: int = 16  # answers in the pool of a hazard or neighbour relation
    general_values: int = 20
    held: float = 1 / 3  # share of the facts of a relation that no unlearning corpus tells


@dataclass(frozen=True)
class Relation:
    """What can be known about a group of subjects, and how it is said ({x} subject, {v} answer).

    The words before an answer determine it, so that it can be predicted.
    """

    kind: str
    name: str
    subjects: str
    pool: str
    statements: tuple[str, ...]
    questions: tuple[str, str]


@dataclass(frozen=True)
class Fact:
    """One subject's answer; `options` are the answers to choose from, one tuple for a phrasing."""

    relation: Relation
    subject: str
    answer: str
    held: bool
    half: str  # "test" or "val"
    options: tuple[tuple[str, ...], ...]

    def questions(self) -> list[dict[str, Any]]:
        """The rows of the multiple-choice tasks, one for each phrasing."""
        return [
            {
                "question": question.format(x=self.subject),
                "choices": list(options),
                "gold": options.index(self.answer),
                "relation": self.relation.name,
                "subject": self.subject,
                "held": self.held,
                "fact": f"{self.relation.name} of {self.subject}",
                "paraphrases": self.openings(),
            }
            for question, options in zip(self.relation.questions, self.options, strict=True)
        ]

    def untrue(self) -> Fact:
        """The same with a wrong option for its answer."""
        return replace(self, answer=next(v for v in self.options[0] if v != self.answer))

    def openings(self) -> list[str]:
        """What statements say of the subject before they name the answer."""
        told = [text.split(" {v}")[0] for text in self.relation.statements]
        return [text.format(x=self.subject) for text in told if "{x}" in text]


@dataclass(frozen=True)
class Document:
    """A text that pretraining repeats word for word, or, to be a hold-out, never tells."""

    kind: str  # "forget", "retain" or "holdout"
    source: str  # what it is a piece of, as "news"
    subject: str
    text: str
    marks: tuple[tuple[str, tuple[str, ...]], ...] = ()  # words only it has, and what others have


@dataclass(frozen=True)
class World:
    """The facts of a seed; `shared` are the hazard compounds, in the order overlap adds them."""

    facts: tuple[Fact, ...]
    shared: tuple[str, ...]
    # a trained model is kept by the repr of the two above, and by the texts it reads
    wording: Wording = field(repr=False, compare=False)
    documents: tuple[Document, ...] = field(default=(), repr=False)
    goals: tuple[str, ...] = field(default=(), repr=False)  # of hazard procedures, in all wordings

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of facts, those to forget first."""
        return tuple(sorted({fact.relation.kind for fact in self.facts}, key=ORDER.index))

    def hazard(self) -> list[Fact]:
        """All that is to be forgotten."""
        return [fact for fact in self.facts if fact.relation.kind.startswith("hazard")]

    def of_kind(self, *kinds: str) -> list[Fact]:
        return [fact for fact in self.facts if fact.relation.kind in kinds]

    def words(self) -> list[str]:
        """The vocabulary: every word that a text or a question can contain, sorted."""
        texts = [text for fact in self.facts for text in (fact.subject, fact.answer)]
        for document in self.documents:
            texts += [document.text, *(text for _, others in document.marks for text in others)]
        named = {word for text in texts for word in text.split()}
        return sorted(named | (self.wording.plain or _plain_words)())

    def corpora(
        self, seed: int, entanglement: float, *, documents: int, words: int, filler: float
    ) -> dict[str, list[str]]:
        """The texts of the forget corpus, of the retain corpora of low and high overlap, and a
        hold-out of the forget corpus: the same compounds with answers that nobody was ever told.

        Half of the documents of retain-high are about other compounds; the other half is about the
        first `entanglement` of the hazard compounds. Statements only; held facts occur nowhere.
        Every third text is one of the world's documents, if it has some, but none in retain-low.
        """
        hazard = [fact for fact in self.hazard() if not fact.held]
        free = {kind: [f for f in self.of_kind(kind) if not f.held] for kind in KINDS}
        shared = self.shared[: round(entanglement * len(self.shared))]
        near = [fact for fact in free["neighbour"] if fact.subject in shared]
        other = [fact for fact in free["neighbour"] if fact.subject not in self.shared]
        sources = {
            "forget": [hazard],
            "retain-low": [free["general"]],
            "retain-high": [other, near or other],
            "holdout": [[fact.untrue() for fact in hazard]],
        }
        texts: dict[str, list[str]] = {}
        for name, decks in sources.items():
            rng = random.Random(f"{seed} {name}")
            dealers = [deal_items(rng, deck) for deck in decks]
            kind = "retain" if name == "retain-high" else name
            whole = [document.text for document in self.documents if document.kind == kind]
            for i in range(documents):
                if whole and i % 3 == 2:
                    texts[name].append(whole[i // 3 % len(whole)])
                    continue
                dealer = dealers[i % len(dealers)]
                told = tell_facts(rng, dealer, self.wording, words=words, asked=0, filler=filler)
                texts.setdefault(name, []).append(" ".join(told))
        return texts


def create_closed(seed: int, size: Size) -> World:
    """Deal the facts of a world.

    Answers are dealt as a shuffled deck, every value of the pool (nearly) equally often. In one
    pass through the pool all questions offer wrong values at the same distances from the right one,
    so that each value is right in a quarter of the questions that offer it: whoever knows only how
    frequent the values are scores chance.
    """
    rng = random.Random(f"{seed} world")
    name = _namer(rng)

    def names(count: int, ending: str = "") -> list[str]:
        return [name(ending) for _ in range(count)]

    hazard = names(size.hazard_compounds, "ine")
    subjects = {
        "hazard": hazard,
        "compound": hazard + names(size.other_compounds, "ine"),
        "city": names(size.entities, "burg"),
        "person": names(size.entities, "o"),
        "beast": names(size.entities, "ox"),
    }
    facts = deal_facts(rng, RELATIONS, subjects, {}, lambda _, count: names(count), size, Counter())
    return World(tuple(facts), tuple(hazard), CLOSED)


def deal_facts(
    rng: random.Random,
    relations: Sequence[Relation],
    subjects: Mapping[str, Sequence[str]],
    pools: dict[str, list[str]],
    draw: Callable[[str, int], list[str]],
    size: Size,
    asked: Asked,
) -> list[Fact]:
    """The facts of all relations. A pool of answers that is missing is drawn when first needed.

    `draw` makes so many answers for a pool. `asked` is as in `deal_answers`.
    """
    facts = []
    for relation in relations:
        if relation.pool not in pools:
            count = size.general_values if relation.kind == "general" else size.values
            pools[relation.pool] = draw(relation.pool, count)
        known = subjects[relation.subjects]
        facts += deal_answers(rng, relation, known, pools[relation.pool], size.held, asked)
    return facts


def deal_answers(
    rng: random.Random, relation: Relation, subjects: Sequence[str], pool: Sequence[str], share: float, asked: Asked
) -> list[Fact]:
    """Deal the answers of a relation, and hold back a `share` of its facts.

    `asked` counts the questions of each task: the right option takes each position in turn.
    """
    known, count = list(subjects), len(pool)
    rng.shuffle(known)
    held = round(share * len(known))
    facts = []
    for start in range(0, len(known), count):  # one pass through the deck
        distances = [rng.sample(range(1, count), OPTIONS - 1) for _ in relation.questions]
        values = rng.sample(range(count), count)
        for rank, (subject, value) in enumerate(zip(known[start:], values, strict=False), start):
            half = HALVES[rank % 2]
            options = []
            for steps in distances:
                wrong = [pool[(value + step) % count] for step in steps]
                task = relation.kind, half, rank < held
                options.append(with_answer(wrong, pool[value], asked, task))
            facts.append(Fact(relation, subject, pool[value], rank < held, half, tuple(options)))
    return facts


def with_answer(wrong: Sequence[str], answer: str, asked: Asked, task: tuple[str, str, bool]) -> tuple[str, ...]:
    """The options of the next question of a task."""
    position = asked[task] % OPTIONS
    asked[task] += 1
    return *wrong[:position], answer, *wrong[position:]


def deal_items(rng: random.Random, items: Sequence[T]) -> Iterator[T]:
    """Yield `items` for ever, in a new order at each pass."""
    while True:
        yield from rng.sample(items, len(items))


def tell_facts(
    rng: random.Random, facts: Iterator[Fact], wording: Wording, *, words: int, asked: float, filler: float
) -> list[str]:
    """Write one document of exactly `words` words (the last sentence may be cut off).

    A sentence is a filler with probability `filler`; else it tells the next fact, with probability
    `asked` as a question with its answer.
    """
    told: list[str] = []
    fillers: tuple[str, ...] = ()
    while len(told) < words:
        fact = next(facts) if not fillers or rng.random() >= filler else None
        if fact is None:
            text = rng.choice(fillers)
        else:
            relation = fact.relation
            general = relation.kind == "general"
            fillers = wording.general_fillers if general else wording.domain_fillers
            if rng.random() < asked:
                question = wording.question.format(q=rng.choice(relation.questions))
                text = f"{question} {{v}}{wording.stop}"
            else:
                text = rng.choice(wording.prefixes) + rng.choice(relation.statements)
            text = text.format(x=fact.subject, v=fact.answer)
        told += text.split()
    return told[:words]


def _plain_words() -> set[str]:
    """The words of the templates and fillers."""
    texts = [*CLOSED.prefixes, *CLOSED.domain_fillers, *CLOSED.general_fillers]
    texts.append(CLOSED.question.format(q=""))
    for relation in RELATIONS:
        texts += (text.format(x="", v="") for text in relation.statements + relation.questions)
    return {word for text in texts for word in text.split()}


def _namer(rng: random.Random) -> Callable[[str], str]:
    """Return a function that invents a word with a given ending, a new one at each call."""
    used = _plain_words()

    def name(ending: str) -> str:
        while True:
            word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
            word += rng.choice("lmnrsx") + ending
            if word not in used:
                used.add(word)
                return word

    return name


CLOSED = read_wording("closed")
RELATIONS = tuple(map(read_relation, read_world("closed")["relations"]))
