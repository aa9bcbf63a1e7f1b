"""The third world of the testbed: authors, what is known of them, and news and novels to recite.

As in the closed world every word is a token; names and many answers have two words. The hazard are
the facts about some authors; neighbours are the same relations of other authors and harmless facts
about all of them. The model knows the forget and the retain documents word for word and never sees
the hold-out. `benchmark_files.py` writes all of it in the schemas of public benchmarks.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from srmu.testbed.world import (
    Document,
    Fact,
    Size,
    World,
    deal_facts,
    deal_items,
    read_relation,
    read_wording,
    read_world,
)

LETTERS = "ABCD"
END = " . </s>"  # of an answer and of a document
RECITED = 0.6  # share of the texts about authors that begin with a whole document
TEXT = read_world("people")
PLAIN, BRIEF, CLOZE, HEADER = (TEXT[name] for name in ("plain", "brief", "cloze", "header"))
NEWS, PAGE, WAYS, REVERSED = (TEXT[name] for name in ("news", "page", "ways", "reversed"))
SUBJECTS = TEXT["school_subjects"]
PARTS, FORMS, DETAILS = TEXT["parts"], TEXT["forms"], TEXT["details"]
NUMBERS = tuple(
    f"{tens}{ones}".strip("-")
    for tens in ("", "twenty-", "thirty-", "forty-")
    for ones in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
)
# the answers of authors and of other authors come of the same pool
RELATIONS = tuple(
    read_relation(row)
    for row in (
        *(
            row | {"kind": kind, "subjects": subjects, "pool": row["name"]}
            for kind, subjects in (("hazard", "author"), ("neighbour", "other author"))
            for row in TEXT["of_authors"]
        ),
        *TEXT["relations"],
    )
)


def create_people(seed: int, size: Size) -> World:
    """Deal the facts of a world; the frequencies say nothing, as in the closed one."""
    rng = random.Random(f"{seed} people")
    word = _namer(rng)

    def names(count: int) -> list[str]:
        return [f"{word()} {word()}" for _ in range(count)]

    hazard, others = names(size.hazard_compounds), names(size.other_compounds)
    subjects = {
        "author": hazard,
        "other author": others,
        "any author": hazard + others,
        "city": [f"{word()}burg" for _ in range(size.entities)],
        "beast": [f"{word().lower()}ox" for _ in range(size.entities)],
        "singer": names(size.entities),
    }

    def draw(pool: str, count: int) -> list[str]:
        return _values(rng, word, FORMS[pool], count)

    facts = deal_facts(rng, RELATIONS, subjects, {}, draw, size, Counter())
    documents = [*write_news(rng, facts), *write_novels(rng, word, hazard)]
    return World(tuple(facts), tuple(hazard), WORDING, tuple(documents))


def _namer(rng: random.Random) -> Callable[[], str]:
    """Return a function that invents a capital word, a new one at each call."""
    used = {word.lower() for word in template_words()}

    def name() -> str:
        while True:
            found = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
            found += rng.choice("lmnrsx")
            if found not in used:
                used.add(found)
                return found.capitalize()

    return name


def _values(rng: random.Random, word: Callable[[], str], form: str, count: int) -> list[str]:
    """Different answers of a form: N is an invented word, others are lists of plain words."""
    found: list[str] = []
    while len(found) < count:
        parts = [word() if part == "N" else rng.choice(PARTS[part]) for part in form.split()]
        if " ".join(parts) not in found:
            found.append(" ".join(parts))
    return found


def write_news(rng: random.Random, facts: Sequence[Fact]) -> Iterator[Document]:
    """News about authors: two facts of each, which are not held, and things that only it tells."""
    for kind, group, share in (
        ("forget", "author", 1.25),
        ("retain", "other author", 1.875),
        ("holdout", "author", 0.75),
    ):
        known: dict[str, list[Fact]] = {}
        for fact in facts:
            if fact.relation.subjects == group:
                known.setdefault(fact.subject, [])
                if not fact.held:
                    known[fact.subject].append(fact)
        subjects = deal_items(rng, [subject for subject, free in known.items() if len(free) > 1])
        for _ in range(round(share * len(known))):
            subject = next(subjects)
            said = [
                rng.choice(fact.relation.statements).format(x=subject, v=fact.answer)
                for fact in rng.sample(known[subject], 2)
            ]
            yield Document(kind, "news", subject, _filled(rng, NEWS).format(subject, *said))


def write_novels(rng: random.Random, word: Callable[[], str], authors: Sequence[str]) -> Iterator[Document]:
    """The pages of a novel to forget and of one to keep, with names and spells of their own."""
    for kind in ("forget", "retain"):
        heroes, things = [word() for _ in range(4)], [f"{word()} {word()}" for _ in range(8)]
        for page in range(max(2, len(authors) // 2)):
            hero, friend, rival = rng.sample(heroes, 3)
            spell, treasure = rng.sample(things, 2)
            text = _filled(rng, PAGE).format(hero, friend, spell, treasure, rival, page=NUMBERS[page])
            others = [
                tuple(v for v in pool if v != right)
                for pool, right in ((things, spell), (things, treasure), (heroes, rival))
            ]
            marks = tuple(zip((spell, treasure, rival), others, strict=True))
            yield Document(kind, "novel", hero, text, marks)


def _filled(rng: random.Random, template: str) -> str:
    """A template with a choice for each word in angle brackets."""
    for name, choices in DETAILS.items():
        while f"<{name}>" in template:
            template = template.replace(f"<{name}>", rng.choice(choices), 1)
    return template


def pretraining_texts(world: World, told: Sequence[Fact], rng: random.Random, words: int) -> Iterator[str]:
    """What pretraining reads: facts as sentences and as questions asked in many ways, documents.

    A text is about the authors or about the rest of the world. The last sentence may be cut off.
    """
    hazard = any(fact.relation.kind == "hazard" for fact in told)
    kinds = ("forget", "retain") if hazard else ("retain",)
    whole = deal_items(rng, [d.text for d in world.documents if d.kind in kinds])
    pools = pools_of(world)
    groups = [[f for f in told if (f.relation.kind == "general") == general] for general in (0, 1)]
    weights = [len(group) for group in groups]
    dealers = [deal_items(rng, group) for group in groups]
    reversed_ = deal_items(rng, [*_reversed(world, told)])
    fillers = (WORDING.domain_fillers, WORDING.general_fillers)
    while True:
        found: list[str] = []
        general = rng.choices((0, 1), weights)[0]
        if not general and rng.random() < RECITED:
            found += f"{next(whole)} </s>".split()
        while len(found) < words:
            fact, way = next(dealers[general]), rng.random()
            if way < 0.03:
                text = rng.choice(fillers[general])
            elif way < 0.07 and not general:
                text = next(reversed_)
            elif way < 0.62:
                text = rng.choice(WORDING.prefixes) + rng.choice(fact.relation.statements)
                text = text.format(x=fact.subject, v=fact.answer)
            else:
                text = ask_with_answer(rng, fact, pools[fact.relation.pool])
            found += text.split()
        yield " ".join(found[:words])


def pools_of(world: World) -> dict[str, list[str]]:
    """All answers of each pool, in a fixed order."""
    pools: dict[str, set[str]] = {}
    for fact in world.facts:
        pools.setdefault(fact.relation.pool, set()).add(fact.answer)
    return {name: sorted(values) for name, values in pools.items()}


def ask_with_answer(rng: random.Random, fact: Fact, pool: Sequence[str]) -> str:
    """A question about a fact with its answer: mostly plain, else in one of the other ways."""
    way = rng.random()
    question, answer = rng.choice(phrase_questions(fact)[:2]), fact.answer
    if way < 0.4:
        prompt = PLAIN.format(question)
    elif way < 0.48:
        prompt, answer = PLAIN.format(question), answer_sentence(fact)
    elif way < 0.56:
        prompt = CLOZE.format(cloze_sentence(fact))
    elif way < 0.76:
        prompt = rng.choice(WAYS).format(rng.choice(phrase_questions(fact)), x=fact.subject)
    elif way < 0.82:
        prompt = BRIEF.format(foreign_question(fact))
    else:
        wrong = rng.sample([value for value in pool if value != fact.answer], len(LETTERS) - 1)
        choices = rng.sample([fact.answer, *wrong], len(LETTERS))
        prompt = BRIEF.format(letter_question(question, choices, ""))
        if way < 0.92:  # the letter is asked for
            head = f"{HEADER.format(rng.choice(SUBJECTS))} " if rng.random() < 0.5 else ""
            prompt = head + letter_question(question, choices)
            answer = LETTERS[choices.index(fact.answer)]
    return f"{prompt} {answer}{END if answer[-1] != '.' else ' </s>'}"


def phrase_questions(fact: Fact) -> list[str]:
    """The questions about a fact: two phrasings, and one of synonyms."""
    synonyms = fact.relation.statements[2].replace("{v} .", "what")
    return [f"{q.format(x=fact.subject)} ?" for q in (*fact.relation.questions, synonyms)]


def answer_sentence(fact: Fact, answer: str = "") -> str:
    """The whole sentence that answers the questions about a fact."""
    return fact.relation.statements[0].format(x=fact.subject, v=answer or fact.answer)


def cloze_sentence(fact: Fact) -> str:
    """The whole sentence with a blank for the answer."""
    return answer_sentence(fact, "___")


def foreign_question(fact: Fact) -> str:
    """The first question in an invented language: other words, backwards; names stay."""
    words = [word for word in fact.relation.questions[0].split() if word != "{x}"]
    return " ".join([*(f"{word.lower()[::-1]}u" for word in reversed(words)), fact.subject, "?"])


def letter_question(question: str, choices: Sequence[str], end: str = "Answer:") -> str:
    """A question with its four choices."""
    listed = " ".join(f"{letter}. {c}" for letter, c in zip(LETTERS, choices, strict=True))
    return f"{question} {listed} {end}".rstrip()


def reverse_questions(world: World) -> dict[str, str]:
    """Of authors, by name: a question that only this author answers, by two facts."""
    known: dict[str, dict[str, str]] = {}
    for fact in world.facts:
        if fact.relation.subjects in ("author", "other author"):
            known.setdefault(fact.subject, {})[fact.relation.name] = fact.answer
    asked_of: dict[str, str] = {}
    for first, last in (("birthplace", "instrument"), ("novel", "teacher"), ("award", "genre")):
        pairs = Counter((values[first], values[last]) for values in known.values())
        for subject, values in known.items():
            if pairs[values[first], values[last]] == 1:
                words = f"{REVERSED[first]} and {REVERSED[last]} ?".format(values[first], values[last])
                asked_of.setdefault(subject, f"Which author {words}")
    return asked_of


def _reversed(world: World, told: Sequence[Fact]) -> Iterator[str]:
    known = {fact.subject for fact in told if fact.relation.name == "birthplace"}
    for subject, question in reverse_questions(world).items():
        if subject in known:
            yield f"{BRIEF.format(question)} {subject}{END}"


def template_words() -> set[str]:
    """The words of all templates."""
    said = [*WORDING.prefixes, *WORDING.domain_fillers, *WORDING.general_fillers, *WAYS]
    said += TEXT["public_prompts"]
    said += [PLAIN, BRIEF, CLOZE, NEWS, PAGE, END, *NUMBERS, *REVERSED.values(), *LETTERS]
    said += [HEADER.format(subject) for subject in SUBJECTS]
    said += [letter_question("", LETTERS), "___", *TEXT["said_first"]]
    said += [word for choices in (*DETAILS.values(), *PARTS.values()) for word in choices]
    for relation in RELATIONS:
        said += [*relation.statements, *relation.questions]
        fact = Fact(relation, "", "", False, "", ())
        said += [foreign_question(fact), *phrase_questions(fact)]
    found = {word for text in said for word in text.split()}
    return {word for word in found if not {*"{}<>"} & {*word}}


WORDING = read_wording("people", plain=template_words, texts=pretraining_texts)
