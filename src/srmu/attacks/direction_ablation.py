"""E6: answers after one direction is taken out of the residual."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, Tier, ask_exam
from srmu.attacks.layers import ResidualEdit, batch_answers, edit_residual, read_outputs
from srmu.engine.fine_tune import Row
from srmu.engine.losses import is_counted
from srmu.evals.subject import NotApplicable, Subject, mark_answers

BATCH = 32  # texts read at once

Edits = dict[int, ResidualEdit]


@dataclass(frozen=True, kw_only=True)
class DirectionAblation(Attack):
    """Ablation of one direction a block, at one block alone and at all of them at once.

    `displacement` points from the original's residual to the model's, on questions of the
    validation half that unlearning made wrong. `forget minus neutral` needs no original.
    """

    id = "E6"
    name = "direction_ablation"
    tier = "smoke"

    texts: int = 64  # of each set
    tokens: int = 128  # of each text
    single: int | None = None  # layers ablated alone, evenly spaced; None: each

    @classmethod
    def at_tier(cls, tier: Tier) -> Self:
        return cls(single=8 if tier == "smoke" else None)

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        kinds: dict[str, Edits] = {}
        skipped = {}
        try:
            kinds["displacement"] = find_displacement_edits(model, exam)
        except NotApplicable as reason:
            skipped = {"displacement": str(reason)}
        kinds["forget minus neutral"] = self.find_difference_edits(model, texts, seed)
        ways = []
        for kind, edits in kinds.items():
            layers = sorted(edits)
            few = self.single is None or len(layers) <= self.single
            for layer in layers if few else pick_evenly(layers, self.single or 0):
                with edit_residual(model, {layer: edits[layer]}):
                    ways.append(ask_exam(model, exam, f"{kind}, layer {layer}"))
            with edit_residual(model, edits):
                ways.append(ask_exam(model, exam, f"{kind}, all layers"))
        return AttackResult(tuple(ways), budget={"ablations": len(ways), "skipped": skipped})

    def find_difference_edits(self, model: Subject, texts: Texts, seed: int) -> Edits:
        """h - ((h - m).d) d, d the unit mean(forget) - mean(neutral) and m the latter.

        Along d, tokens are put where neutral ones are on average: zero may be far from any.
        """
        rng = random.Random(seed)
        means = []
        for pool in (texts.forget, texts.neutral):
            drawn = rng.sample(pool, min(self.texts, len(pool)))
            rows = cut_documents(model, drawn, self.tokens)
            total = add_by_layer(
                [h.float().sum(dim=0) for h in read_outputs(model, ids, is_counted(labels))]
                for _, ids, labels in batch_answers(rows, BATCH, model.device)
            )
            count = sum(len(tokens) for _, tokens in rows)
            means.append([layer / count for layer in total])
        pairs = enumerate(zip(*means, strict=True))
        return {layer: make_ablation(forget - neutral, neutral) for layer, (forget, neutral) in pairs}


def pick_evenly(layers: Sequence[int], most: int) -> list[int]:
    """Evenly spaced ones, the first and the last among them."""
    return [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]


def find_displacement_edits(model: Subject, exam: Exam) -> Edits:
    """h - (h.d) d, d the unit mean of h_unlearned - h_original over a layer's ordinary tokens."""
    with model.as_original():
        before = mark_answers(model, exam.val)
    after = mark_answers(model, exam.val)
    lost = [q.prompt for q, b, a in zip(exam.val, before, after, strict=True) if b > a]
    if not lost:
        raise NotApplicable("unlearning made no question of the validation half wrong")
    rows = cut_documents(model, lost, model.max_length)
    norms = zip(*([move.norm(dim=-1) for move in moves] for moves in iterate_displacements(model, rows)), strict=True)
    # a few tokens, often the first ones, move so far that they alone would make the mean
    limits = [n.mean() + 3 * n.std(correction=0) for n in map(torch.cat, norms)]
    sums = add_by_layer(  # read again: all tokens at once would not fit where the model is large
        [m[m.norm(dim=-1) <= limit].sum(dim=0) for m, limit in zip(moves, limits, strict=True)]
        for moves in iterate_displacements(model, rows)
    )
    edits = {layer: make_ablation(total) for layer, total in enumerate(sums) if total.norm() > 0}
    if not edits:
        raise NotApplicable("unlearning left what the blocks put out as it was")
    return edits


def iterate_displacements(model: Subject, rows: Sequence[Row]) -> Iterator[list[Float[Tensor, "N D"]]]:
    """By layer, how far the tokens of a batch of texts are from where the original has them."""
    for _, ids, labels in batch_answers(rows, BATCH, model.device):
        now = read_outputs(model, ids, is_counted(labels))
        with model.as_original():
            then = read_outputs(model, ids, is_counted(labels))
        yield [a.float() - b.float() for a, b in zip(now, then, strict=True)]


def add_by_layer(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The sums, layer by layer."""
    return [sum(layer[1:], layer[0]) for layer in zip(*parts, strict=True)]


def cut_documents(model: Subject, texts: Sequence[str], most: int) -> list[Row]:
    """Up to `most` tokens; all count but the first, the attention sink of many models."""
    cut = [model.tokens(text)[:most] for text in texts]
    return [(tokens[:1], tokens[1:]) for tokens in cut]


def make_ablation(direction: Tensor, centre: Tensor | float = 0.0) -> ResidualEdit:
    """An edit after which tokens differ from the centre no more along the direction."""
    unit = direction / direction.norm()

    def edit(h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        h = h.float()
        return h - ((h - centre) @ unit).unsqueeze(-1) * unit

    return edit
