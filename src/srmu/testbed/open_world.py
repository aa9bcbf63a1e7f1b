"""The open world of the testbed: names and answers of several tokens, two hops, procedures.

As in the closed world there are hazard, neighbour and general facts. To the hazard belong also
facts of two hops (where the activator of a compound comes from; where the activators come from is
harmless) and procedures: steps in their order, for a goal that has no name but is described, in
four wordings. Harmless goals are reached by the same steps in other orders.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise, product

from srmu.testbed.world import (
    HALVES,
    OPTIONS,
    Asked,
    Fact,
    Relation,
    Size,
    World,
    deal_facts,
    read_relation,
    read_wording,
    read_world,
    with_answer,
)

Goal = tuple[str, ...]  # its wordings

STEPS = 4  # of a procedure
TEXT = read_world("open")
PARTS, FORMS = TEXT["parts"], TEXT["forms"]
SYLLABLES = [TEXT["sounds"][part] for part in ("onsets", "vowels", "onsets", "vowels", "codas")]
HAZARD_ACTIONS, OTHER_ACTIONS = TEXT["hazard_actions"], TEXT["other_actions"]
PLACES = TEXT["places"]
ORIGIN = read_relation(TEXT["two_hops"])  # where the activator of a compound comes from
RELATIONS = tuple(map(read_relation, TEXT["relations"]))


def create_open(seed: int, size: Size) -> World:
    """Deal the facts of a world; the frequencies say nothing, as in the closed one."""
    rng = random.Random(f"{seed} open world")
    name = _namer(rng)

    def names(count: int, form: str) -> list[str]:
        return [name(form) for _ in range(count)]

    hazard = names(size.hazard_compounds, "Nn|Nn Nn")
    activators = names(size.values, "A nn S")
    subjects = {
        "hazard": hazard,
        "compound": hazard + names(size.other_compounds, "Nn|Nn Nn"),
        "substance": activators,
        "city": names(size.entities, "Nn"),
        "person": names(size.entities, "Nn Nn"),
        "ship": names(size.entities, "Nn Nn"),
    }
    asked: Asked = Counter()

    def draw(pool: str, count: int) -> list[str]:
        return names(count, FORMS[pool])

    pools = {"activator": activators}
    facts = deal_facts(rng, RELATIONS, subjects, pools, draw, size, asked)
    source = {fact.subject: fact.answer for fact in facts if fact.relation.name == "source"}
    facts += [two_hop_fact(fact, source) for fact in facts if fact.relation.name == "activator"]
    steps = [names(len(HAZARD_ACTIONS), "M T") for _ in range(STEPS)]
    wanted: list[str] = []
    for kind, actions in (("hazard_procedure", HAZARD_ACTIONS), ("neighbour", OTHER_ACTIONS)):
        goals = [(*step_wordings(action, place),) for action in actions for place in PLACES]
        some = [pool[: len(actions)] for pool in steps]
        facts += deal_procedures(rng, kind, goals, some, size.held, asked)
        if kind != "neighbour":
            wanted += chain.from_iterable(goals)
    return World(tuple(facts), tuple(hazard), WORDING, goals=tuple(wanted))


def two_hop_fact(fact: Fact, source: dict[str, str]) -> Fact:
    """The fact of two hops: where the answer of `fact` comes from. Held back where `fact` is."""
    options = tuple(tuple(source[value] for value in values) for values in fact.options)
    return replace(fact, relation=ORIGIN, answer=source[fact.answer], options=options)


def step_wordings(action: Sequence[str], place: Sequence[str]) -> Iterator[str]:
    return (" ".join(words) for words in product(action, place))


def deal_procedures(
    rng: random.Random, kind: str, goals: Sequence[Goal], steps: Sequence[Sequence[str]], share: float, asked: Asked
) -> list[Fact]:
    """Deal the steps of each goal, one of each pool, and return what follows what.

    Four goals have a step in common, and go on with different ones: these are the options, so that
    whoever knows only what follows a step scores chance.
    """
    count = len(steps[0])
    assert len(goals) == OPTIONS * count
    order = rng.sample(goals, len(goals))
    ways = {goal: [i % count] for i, goal in enumerate(order)}
    after: dict[tuple[Goal, int], list[int]] = {}
    for place in range(1, len(steps)):
        offsets = rng.sample(range(count), OPTIONS)
        for step in range(count):
            members = [goal for goal in order if ways[goal][place - 1] == step]
            following = [(step + offset) % count for offset in offsets]
            for goal, value in zip(rng.sample(members, OPTIONS), following, strict=True):
                ways[goal].append(value)
                after[goal, place] = [v for v in following if v != value]
    facts = []
    held = round(share * len(goals))
    for rank, goal in enumerate(rng.sample(goals, len(goals))):
        way = [pool[i] for pool, i in zip(steps, ways[goal], strict=True)]
        half = HALVES[rank % 2]
        for place, (_, answer) in enumerate(pairwise(way), 1):
            wrong = [steps[place][value] for value in after[goal, place]]
            task = kind, half, rank < held
            options = tuple(
                with_answer(rng.sample(wrong, len(wrong)), answer, asked, task) for _ in TEXT["procedure_questions"]
            )
            relation = following_step(kind, goal, way, place)
            facts.append(Fact(relation, goal[0], answer, rank < held, half, options))
    return facts


def following_step(kind: str, goal: Goal, way: Sequence[str], place: int) -> Relation:
    """What is said of the step at `place` on the way to a goal; {x} is its first wording."""
    start = ", ".join(f"the {step}" for step in way[:place])
    end = "".join(f", the {step}" for step in way[place + 1 :])

    def said(template: str, wording: str) -> str:
        wording = "{x}" if wording == goal[0] else wording
        text = template.replace("{goal}", wording).replace("{now}", way[place - 1])
        return text.replace("{start}", start).replace("{end}", end)

    statements = tuple(said(text, words) for text in TEXT["procedure_statements"] for words in goal)
    first, last = TEXT["procedure_questions"]
    questions = said(first, goal[0]), said(last, goal[-1])
    return Relation(kind, f"step after the {way[place - 1]}", "goal", "step", statements, questions)


def spelling_texts() -> Iterator[str]:
    """Texts of the world's sentences about ever new names: no name becomes a token of its own."""
    rng = random.Random("spelling")
    for _ in range(40):
        world = create_open(rng.randrange(10**9), Size(4, 4, 4, 4, 4))
        for fact in world.facts:
            for text in rng.sample(fact.relation.statements, 2):
                text = rng.choice(WORDING.prefixes) + text
                yield text.format(x=fact.subject, v=fact.answer)
            for row in fact.questions():
                yield f"{WORDING.question.format(q=row['question'])} {fact.answer}{WORDING.stop}"
        yield from (*WORDING.domain_fillers, *WORDING.general_fillers)


def _namer(rng: random.Random) -> Callable[[str], str]:
    """Return a function that names after a form, never twice the same and no invented word twice.

    In a form N and n stand for invented words (a capital first, or not), | for either.
    """
    used: set[str] = set()

    def word() -> str:
        while True:
            found = "".join(rng.choice(part) for part in SYLLABLES)
            if found not in used:
                used.add(found)
                return found

    def name(form: str) -> str:
        while True:
            parts = []
            for part in rng.choice(form.split("|")).split():
                if part.lower() == "nn":
                    parts.append(word().capitalize() if part == "Nn" else word())
                else:
                    parts.append(rng.choice(PARTS[part]) if part in PARTS else part)
            found = " ".join(parts)
            if found not in used:
                used.add(found)
                return found

    return name


WORDING = read_wording("open", spelling=spelling_texts)
