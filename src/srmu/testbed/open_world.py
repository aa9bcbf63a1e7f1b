"""The open world of the testbed: names and answers of several tokens, two hops, procedures.

Beside the kinds of facts of the closed world, the hazard has facts of two hops (where the activator of a compound comes
from; where the activators come from is harmless) and procedures: steps in their order, for a goal that has no name but
is described, in four wordings. Harmless goals are reached by the same steps in other orders.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise, product

from srmu.testbed.world import HALVES, OPTIONS, Dealer, Fact, Relation, Size, World, read_wording

Goal = tuple[str, ...]  # its wordings

STEPS = 4  # of a procedure
WORDING = read_wording("open")
HAZARD_ACTIONS, OTHER_ACTIONS, PLACES = (WORDING[key] for key in ("hazard_actions", "other_actions", "places"))
ORIGIN = Relation(**WORDING["two_hops"])  # where the activator of a compound comes from


def create_open(seed: int, size: Size) -> World:
    dealer = Dealer("open", seed, size)
    facts = [*dealer.deal_facts()]
    source = {fact.subject: fact.answer for fact in facts if fact.relation.name == "source"}
    for fact in [fact for fact in facts if fact.relation.name == "activator"]:
        options = tuple(tuple(source[value] for value in values) for values in fact.options)
        facts.append(replace(fact, relation=ORIGIN, answer=source[fact.answer], options=options))
    steps = [dealer.draw_names(WORDING["forms"]["step"], len(HAZARD_ACTIONS)) for _ in range(STEPS)]
    goals = {
        kind: [tuple(map(" ".join, product(action, place))) for action, place in product(actions, PLACES)]
        for kind, actions in (("hazard_procedure", HAZARD_ACTIONS), ("neighbour", OTHER_ACTIONS))
    }
    for kind, wanted in goals.items():
        facts += deal_procedures(dealer, kind, wanted, [pool[: len(wanted) // OPTIONS] for pool in steps])
    return World((*facts,), dealer.hazard, "open", goals=tuple(chain.from_iterable(goals["hazard_procedure"])))


def deal_procedures(dealer: Dealer, kind: str, goals: list[Goal], steps: list[list[str]]) -> Iterator[Fact]:
    """Deal the steps of each goal, one of each pool, and yield what follows what."""
    # four goals share a step and go on with different ones, the options: to know only what follows a step is chance
    rng, count = dealer.rng, len(steps[0])
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
    held = round(dealer.size.held * len(goals))
    for rank, goal in enumerate(rng.sample(goals, len(goals))):
        way = [pool[i] for pool, i in zip(steps, ways[goal], strict=True)]
        task = kind, HALVES[rank % 2], rank < held
        for place, (_, answer) in enumerate(pairwise(way), 1):
            said = {
                "now": way[place - 1],
                "start": ", ".join(f"the {step}" for step in way[:place]),
                "end": "".join(f", the {step}" for step in way[place + 1 :]),
                "v": "{v}",
            }
            words = ("{x}", *goal[1:])
            told = tuple(text.format(goal=name, **said) for text in WORDING["procedure_statements"] for name in words)
            texts = zip(WORDING["procedure_questions"], (words[0], words[-1]), strict=True)
            asked = tuple(text.format(goal=name, **said) for text, name in texts)
            relation = Relation(kind, f"step after the {way[place - 1]}", "goal", "step", told, asked)
            wrong = [steps[place][value] for value in after[goal, place]]
            options = tuple(dealer.add_answer(rng.sample(wrong, len(wrong)), answer, task) for _ in asked)
            yield Fact(relation, goal[0], answer, rank < held, HALVES[rank % 2], options)


def spelling_texts() -> Iterator[str]:
    """Texts of the world's sentences about ever new names: no name becomes a token of its own."""
    rng = random.Random("spelling")
    for _ in range(40):
        world = create_open(rng.randrange(10**9), Size(4, 4, 4, 4, 4))
        for fact in world.facts:
            for text in rng.sample(fact.relation.statements, 2):
                yield (rng.choice(WORDING["prefixes"]) + text).format(x=fact.subject, v=fact.answer)
            for row in fact.questions():
                yield f"{WORDING['question'].format(q=row['question'])} {fact.answer}{WORDING['stop']}"
        yield from (*WORDING["domain_fillers"], *WORDING["general_fillers"])
