"""An invented world: its facts, and the texts and questions about them.

`hazard` facts are to be forgotten. `neighbour` facts are harmless facts about the same compounds, and about some
others, in nearly the same words. `general` facts are about the rest of the world. In the closed world every name and
every answer is one invented word; `open_world.py` and `people.py` have the other two. `worlds/*.yaml` has the wording.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

T = TypeVar("T")
Wording = dict[str, Any]  # the file of a world

OPTIONS = 4  # answers to choose from: chance is 25 %
HALVES = ("test", "val")


@dataclass(frozen=True)
class Size:
    """How much there is to know in a world."""

    hazard_compounds: int = 48
    other_compounds: int = 32  # have neighbour facts only
    entities: int = 40  # each of cities, people, beasts
    values: int = 16  # answers in the pool of a hazard or neighbour relation
    general_values: int = 20
    held: float = 1 / 3  # share of the facts of a relation that no unlearning corpus tells


@pydantic.dataclasses.dataclass(frozen=True)
class Relation:
    """What can be known of subjects, and how it is said: {x} subject, {v} answer, determined by the words before it."""

    kind: str
    name: str
    subjects: str
    pool: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    # questions in other languages; left out of what names trained models, which do not depend on them
    translations: tuple[str, ...] = field(default=(), repr=False)


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
        openings = [text.partition(" {v}")[0] for text in self.relation.statements if " {v}" in text]
        foreign = [text.format(x=self.subject) for text in self.relation.translations]
        return [
            {
                "question": question.format(x=self.subject),
                "choices": list(options),
                "gold": options.index(self.answer),
                "relation": self.relation.name,
                "subject": self.subject,
                "held": self.held,
                "fact": f"{self.relation.name} of {self.subject}",
                "paraphrases": [text.format(x=self.subject) for text in openings if "{x}" in text],
                **({"translations": foreign} if foreign else {}),
            }
            for question, options in zip(self.relation.questions, self.options, strict=True)
        ]


@dataclass(frozen=True)
class Document:
    """A text that pretraining repeats word for word, or, to be a hold-out, never tells."""

    kind: str  # "forget", "retain" or "holdout"
    source: str  # what it is a piece of, as "news"
    subject: str
    text: str
    marks: tuple[tuple[str, tuple[str, ...]], ...] = ()  # words only it has, and what others have


@cache
def read_wording(name: str) -> Wording:
    """The wording of a world, with its relations as `Relation`s, and the `words` of its sentences."""
    path = Path(__file__).parent / "worlds" / f"{name}.yaml"
    wording: Wording = yaml.safe_load(path.read_text(encoding="utf-8"))
    wording["prefixes"] = [""] * wording["plain_starts"] + wording["prefixes"]
    wording["relations"] = [Relation(**row) for row in wording["relations"]]
    texts = [*wording["prefixes"], *wording["domain_fillers"], *wording["general_fillers"], wording["question"]]
    texts += [text for relation in wording["relations"] for text in relation.statements + relation.questions]
    wording["words"] = frozenset(word for text in texts for word in text.split() if "{" not in word)
    return wording


@dataclass(frozen=True)
class World:
    """The facts of a seed; `shared` are the hazard compounds, in the order in which retain-high takes them."""

    facts: tuple[Fact, ...]
    shared: tuple[str, ...]
    # a trained model is kept by the repr of the two above, and by the texts it reads
    name: str = field(repr=False, compare=False)
    plain: frozenset[str] = field(default=frozenset(), repr=False, compare=False)  # words beside names and answers
    documents: tuple[Document, ...] = field(default=(), repr=False)
    goals: tuple[str, ...] = field(default=(), repr=False)  # of hazard procedures, in all wordings

    @property
    def wording(self) -> Wording:
        return read_wording(self.name)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(fact.relation.kind for fact in self.facts))

    def of_kind(self, *kinds: str) -> list[Fact]:
        return [fact for fact in self.facts if fact.relation.kind in kinds]

    def words(self) -> list[str]:
        """The vocabulary: every word that a text or a question can contain, sorted."""
        texts = [text for fact in self.facts for text in (fact.subject, fact.answer)]
        for document in self.documents:
            texts += [document.text, *(text for _, others in document.marks for text in others)]
        return sorted({word for text in texts for word in text.split()} | self.plain)

    def corpora(
        self, seed: int, entanglement: float, *, documents: int, words: int, filler: float
    ) -> dict[str, list[str]]:
        """The texts of the forget corpus, of both retain corpora, and of a hold-out: hazard facts with wrong answers.

        Half of the documents of retain-high are about other compounds; the other half is about the first `entanglement`
        of the hazard compounds. Statements only; held facts occur nowhere. Every third text is one of the world's
        documents, if it has some, but none in retain-low.
        """
        hazard, neighbour, general = (
            [fact for fact in self.facts if fact.relation.kind.startswith(kind) and not fact.held]
            for kind in ("hazard", "neighbour", "general")
        )
        shared = self.shared[: round(entanglement * len(self.shared))]
        other = [fact for fact in neighbour if fact.subject not in self.shared]
        decks = {
            "forget": [hazard],
            "retain-low": [general],
            "retain-high": [other, [fact for fact in neighbour if fact.subject in shared] or other],
            "holdout": [[replace(f, answer=next(o for o in f.options[0] if o != f.answer)) for f in hazard]],
        }
        corpora = {}
        for name, deck in decks.items():
            rng = random.Random(f"{seed} {name}")
            dealers = [deal_items(rng, facts) for facts in deck]
            whole = [document.text for document in self.documents if document.kind == name.removesuffix("-high")]
            corpora[name] = [
                whole[i // 3 % len(whole)]
                if whole and i % 3 == 2
                else tell_facts(rng, dealers[i % len(dealers)], self.wording, words=words, asked=0, filler=filler)
                for i in range(documents)
            ]
        return corpora


class Dealer:
    """Draws the names of a world and deals its facts, so that whoever knows only frequencies scores chance.

    Answers are dealt as a shuffled deck, every value of the pool (nearly) equally often. In one pass through the pool
    all questions offer wrong values at the same distances from the right one: each value is right in a quarter of them.
    """

    def __init__(self, name: str, seed: int, size: Size, plain: frozenset[str] = frozenset()) -> None:
        self.size, self.wording = size, read_wording(name)
        self.rng = random.Random(f"{seed} {self.wording['stream']}")
        self.words = {word.lower() for word in plain}  # no name is one of these
        self.names: set[str] = set()
        self.asked: Counter[tuple[str, str, bool]] = Counter()  # questions of each task so far
        self.subjects: dict[str, list[str]] = {}
        for group, row in self.wording["subjects"].items():
            if "of" in row:
                self.subjects[group] = [name for part in row["of"] for name in self.subjects[part]]
            else:
                self.subjects[group] = self.draw_names(row["form"], getattr(size, row["count"]))
        self.hazard = tuple(next(iter(self.subjects.values())))

    def draw_names(self, form: str | list[str], count: int) -> list[str]:
        """New names after a form, which the file of the closed world explains."""
        found: list[str] = []
        while len(found) < count:
            parts = (form if isinstance(form, str) else self.rng.choice(form)).split()
            name = " ".join(self._draw_part(part) for part in parts)
            if name not in self.names:
                self.names.add(name)
                found.append(name)
        return found

    def _draw_part(self, part: str) -> str:
        if part[:2].lower() != "nn":
            return self.rng.choice(self.wording["parts"][part])
        ending, _, after = part[2:].partition("+")
        word = ""
        while not word or word in self.words:
            sounds = ("onsets", "vowels", "onsets", "vowels", "codas")
            word = "".join(self.rng.choice(self.wording["sounds"][kind]) for kind in sounds) + ending
        self.words.add(word)
        return (word.capitalize() if part[0] == "N" else word) + after

    def deal_facts(self) -> Iterator[Fact]:
        """The facts of all relations. A pool of answers that is missing is drawn when first needed."""
        rng = self.rng
        pools = {pool: self.subjects[group] for pool, group in self.wording.get("named_answers", {}).items()}
        for relation in self.wording["relations"]:
            if relation.pool not in pools:
                count = self.size.general_values if relation.kind == "general" else self.size.values
                pools[relation.pool] = self.draw_names(self.wording["forms"][relation.pool], count)
            pool, known = pools[relation.pool], [*self.subjects[relation.subjects]]
            count, held = len(pool), round(self.size.held * len(known))
            rng.shuffle(known)
            for start in range(0, len(known), count):  # one pass through the deck
                distances = [rng.sample(range(1, count), OPTIONS - 1) for _ in relation.questions]
                values = rng.sample(range(count), count)
                for rank, (subject, value) in enumerate(zip(known[start:], values, strict=False), start):
                    task = relation.kind, HALVES[rank % 2], rank < held
                    wrong = [[pool[(value + step) % count] for step in steps] for steps in distances]
                    options = tuple(self.add_answer(others, pool[value], task) for others in wrong)
                    yield Fact(relation, subject, pool[value], rank < held, HALVES[rank % 2], options)

    def add_answer(self, wrong: list[str], answer: str, task: tuple[str, str, bool]) -> tuple[str, ...]:
        """The options of a task's next question: the right one takes each position in turn."""
        position = self.asked[task] % OPTIONS
        self.asked[task] += 1
        return *wrong[:position], answer, *wrong[position:]


def create_closed(seed: int, size: Size) -> World:
    plain = read_wording("closed")["words"]
    dealer = Dealer("closed", seed, size, plain)
    return World((*dealer.deal_facts(),), dealer.hazard, "closed", plain)


def deal_items(rng: random.Random, items: list[T]) -> Iterator[T]:
    """Yield `items` for ever, in a new order at each pass."""
    while True:
        yield from rng.sample(items, len(items))


def deal_themes(rng: random.Random, told: list[Fact]) -> Iterator[tuple[bool, Iterator[Fact]]]:
    """Yield for ever whether the next text is about general facts, and the facts to tell, each equally often."""
    groups = [[fact for fact in told if (fact.relation.kind == "general") == general] for general in (False, True)]
    dealers = [deal_items(rng, group) for group in groups]
    while True:
        general = rng.choices((False, True), [len(group) for group in groups])[0]
        yield general, dealers[general]


def tell_facts(
    rng: random.Random, facts: Iterator[Fact], wording: Wording, *, words: int, asked: float, filler: float
) -> str:
    """A document, cut off after `words` words: fillers, and facts, a share `asked` of them as questions."""
    told: list[str] = []
    fillers: list[str] = []
    while len(told) < words:
        if fillers and rng.random() < filler:
            told += rng.choice(fillers).split()
            continue
        fact = next(facts)
        fillers = wording["general_fillers" if fact.relation.kind == "general" else "domain_fillers"]
        if rng.random() < asked:
            text = f"{wording['question'].format(q=rng.choice(fact.relation.questions))} {{v}}{wording['stop']}"
        else:
            text = rng.choice(wording["prefixes"]) + rng.choice(fact.relation.statements)
        told += text.format(x=fact.subject, v=fact.answer).split()
    return " ".join(told[:words])
