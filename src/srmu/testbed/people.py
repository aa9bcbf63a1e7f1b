"""The third world of the testbed: authors, what is known of them, and news and novels to recite.

As in the closed world every word is a token; names and many answers have two words. The hazard are the facts about some
authors; neighbours are the same relations of other authors and harmless facts about all of them. The model knows the
forget and the retain documents word for word and never sees the hold-out.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence

from srmu.testbed.world import Dealer, Document, Fact, Size, World, deal_items, deal_themes, read_wording

LETTERS = "ABCD"
BLANK = "___"  # for the answer
END = " . </s>"  # of an answer and of a document
RECITED = 0.6  # share of the texts about authors that begin with a whole document
NEWS = (("forget", "author", 1.25), ("retain", "other author", 1.875), ("holdout", "author", 0.75))  # texts per author
WORDING = read_wording("people")
PLAIN, BRIEF, CLOZE, HEADER = (WORDING[name] for name in ("plain", "brief", "cloze", "header"))
ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = tuple(f"{tens}{ones}" for tens in ("", "twenty-", "thirty-", "forty-") for ones in ONES)


def create_people(seed: int, size: Size) -> World:
    plain = known_words()
    dealer = Dealer("people", seed, size, plain)
    facts = (*dealer.deal_facts(),)
    return World(facts, dealer.hazard, "people", plain, (*write_news(dealer.rng, facts), *write_novels(dealer)))


def write_news(rng: random.Random, facts: Sequence[Fact]) -> Iterator[Document]:
    """News about authors: two facts of each, which are not held, and things that only it tells."""
    for kind, group, share in NEWS:
        told = [fact for fact in facts if fact.relation.subjects == group]
        authors = dict.fromkeys(fact.subject for fact in told)
        known = {name: [fact for fact in told if fact.subject == name and not fact.held] for name in authors}
        subjects = deal_items(rng, [subject for subject, free in known.items() if len(free) > 1])
        for _ in range(round(share * len(known))):
            subject = next(subjects)
            facts_told = rng.sample(known[subject], 2)
            said = [rng.choice(fact.relation.statements).format(x=subject, v=fact.answer) for fact in facts_told]
            yield Document(kind, "news", subject, _fill_template(rng, WORDING["news"]).format(subject, *said))


def write_novels(dealer: Dealer) -> Iterator[Document]:
    """The pages of a novel to forget and of one to keep, with names and spells of their own."""
    rng = dealer.rng
    for kind in ("forget", "retain"):
        heroes, things = dealer.draw_names("Nn", 4), dealer.draw_names("Nn Nn", 8)
        for page in range(max(2, len(dealer.hazard) // 2)):
            hero, friend, rival = rng.sample(heroes, 3)
            spell, treasure = rng.sample(things, 2)
            text = _fill_template(rng, WORDING["page"]).format(hero, friend, spell, treasure, rival, page=NUMBERS[page])
            marks = tuple(
                (right, tuple(other for other in pool if other != right))
                for right, pool in ((spell, things), (treasure, things), (rival, heroes))
            )
            yield Document(kind, "novel", hero, text, marks)


def _fill_template(rng: random.Random, template: str) -> str:
    """A template with a choice for each word in angle brackets."""
    for name, choices in WORDING["details"].items():
        while f"<{name}>" in template:
            template = template.replace(f"<{name}>", rng.choice(choices), 1)
    return template


def pretraining_texts(world: World, told: list[Fact], rng: random.Random, words: int) -> Iterator[str]:
    """What pretraining reads: texts about authors or about the rest of the world, cut off after so many words."""
    hazard = any(fact.relation.kind == "hazard" for fact in told)
    whole = deal_items(rng, [d.text for d in world.documents if d.kind == "retain" or (d.kind == "forget" and hazard)])
    authors = {fact.subject for fact in told if fact.relation.name == "birthplace"}
    asked_of = [(name, question) for name, question in reverse_questions(world).items() if name in authors]
    reverse = deal_items(rng, [f"{BRIEF.format(question)} {name}{END}" for name, question in asked_of])
    pools = {name: list_answers(world, name) for name in {fact.relation.pool for fact in world.facts}}
    for general, facts in deal_themes(rng, told):
        found: list[str] = []
        if not general and rng.random() < RECITED:
            found += f"{next(whole)} </s>".split()
        while len(found) < words:
            fact, way = next(facts), rng.random()
            if way < 0.03:
                text = rng.choice(WORDING["general_fillers" if general else "domain_fillers"])
            elif way < 0.07 and not general:
                text = next(reverse)
            elif way < 0.62:
                text = rng.choice(WORDING["prefixes"]) + rng.choice(fact.relation.statements)
                text = text.format(x=fact.subject, v=fact.answer)
            else:
                text = ask_with_answer(rng, fact, pools[fact.relation.pool])
            found += text.split()
        yield " ".join(found[:words])


def list_answers(world: World, pool: str) -> list[str]:
    """All answers of a pool, in a fixed order."""
    return sorted({fact.answer for fact in world.facts if fact.relation.pool == pool})


def ask_with_answer(rng: random.Random, fact: Fact, pool: list[str]) -> str:
    """A question about a fact with its answer: mostly plain, else in one of the other ways."""
    way = rng.random()
    question, answer = rng.choice(phrase_questions(fact)[:2]), fact.answer
    if way < 0.4:
        prompt = PLAIN.format(question)
    elif way < 0.48:
        prompt, answer = PLAIN.format(question), answer_sentence(fact)
    elif way < 0.56:
        prompt = CLOZE.format(answer_sentence(fact, BLANK))
    elif way < 0.76:
        prompt = rng.choice(WORDING["ways"]).format(rng.choice(phrase_questions(fact)), x=fact.subject)
    elif way < 0.82:
        prompt = BRIEF.format(foreign_question(fact))
    else:
        wrong = rng.sample([value for value in pool if value != fact.answer], len(LETTERS) - 1)
        choices = rng.sample([fact.answer, *wrong], len(LETTERS))
        prompt = BRIEF.format(letter_question(question, choices, ""))
        if way < 0.92:  # the letter is asked for
            prompt = letter_question(question, choices)
            if rng.random() < 0.5:
                prompt = f"{HEADER.format(rng.choice(WORDING['school_subjects']))} {prompt}"
            answer = LETTERS[choices.index(fact.answer)]
    return f"{prompt} {answer}{END if answer[-1] != '.' else ' </s>'}"


def phrase_questions(fact: Fact) -> list[str]:
    """The questions about a fact: two phrasings, and one of synonyms."""
    synonyms = fact.relation.statements[2].replace("{v} .", "what")
    return [f"{q.format(x=fact.subject)} ?" for q in (*fact.relation.questions, synonyms)]


def answer_sentence(fact: Fact, answer: str = "") -> str:
    """The whole sentence that answers the questions about a fact."""
    return fact.relation.statements[0].format(x=fact.subject, v=answer or fact.answer)


def foreign_question(fact: Fact) -> str:
    """The first question in an invented language: other words, backwards; names stay."""
    words = [word for word in fact.relation.questions[0].split() if word != "{x}"]
    return " ".join([*(f"{word.lower()[::-1]}u" for word in reversed(words)), fact.subject, "?"])


def letter_question(question: str, choices: list[str], end: str = "Answer:") -> str:
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
        template = f"Which author {WORDING['reversed'][first]} and {WORDING['reversed'][last]} ?"
        pairs = Counter((values[first], values[last]) for values in known.values())
        for subject, values in known.items():
            if pairs[values[first], values[last]] == 1:
                asked_of.setdefault(subject, template.format(values[first], values[last]))
    return asked_of


def known_words() -> frozenset[str]:
    """The words of all templates."""
    said = [PLAIN, BRIEF, CLOZE, WORDING["news"], WORDING["page"], BLANK, END, *NUMBERS, *LETTERS]
    said += [*WORDING["ways"], *WORDING["public_prompts"], *WORDING["said_first"], *WORDING["reversed"].values()]
    said += [letter_question("", [*LETTERS]), *map(HEADER.format, WORDING["school_subjects"])]
    said += [word for part in ("details", "parts") for choices in WORDING[part].values() for word in choices]
    for relation in WORDING["relations"]:
        fact = Fact(relation, "", "", False, "", ())
        said += [foreign_question(fact), *phrase_questions(fact)]
    found = {word for text in said for word in text.split()}
    return WORDING["words"] | {word for word in found if not {*"{}<>"} & {*word}}
