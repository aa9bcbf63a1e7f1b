"""Texts under several namings, as rename_scrub reads them. They stay in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from srmu.data.names import Item, Names, Template, names_in
from srmu.engine.generate import Ids, batch_texts
from srmu.engine.losses import Mean, kl_divergence, masked_mean
from srmu.engine.topic import move_batch
from srmu.methods.base import Batch, EditableModel, Topic
from srmu.methods.own_texts import Kind, Likeness

HELD_AT_ONCE = 4  # held-out texts that are read at once


def leave_one_out(log_p: Float[Tensor, "G K L V"]) -> tuple[Float[Tensor, "G K L V"], Float[Tensor, "G K L"]]:
    """For each naming, the mean distribution under the others, and KL(own || mean) in nats.

    The divergence is what the next token reveals of the name.
    """
    p = log_p.exp()
    # eq: rename_scrub, q_k = mean over j != k of p0(. | the text in naming j)
    mean = (p.sum(dim=1, keepdim=True) - p) / (p.shape[1] - 1)
    target = mean.clamp(min=1e-30).log()
    return target, kl_divergence(log_p, target)


def count_still_told(
    log_p: Float[Tensor, "G K L V"], top: Int[Tensor, "G K L"], where: Bool[Tensor, "G K L"]
) -> tuple[float, int]:
    """How often a name's own answer is likelier than that of another name, and the number of pairs.

    `top` is the answer of the original at each place; a tie counts one half.
    """
    others = top.transpose(1, 2)[:, None].expand(-1, top.shape[1], -1, -1)  # (G, K, L, K)
    own, rival = log_p.gather(-1, top[..., None]), log_p.gather(-1, others)
    wins = (own > rival).float() + 0.5 * (own == rival).float()
    pairs = where[..., None] & (others != top[..., None])
    return float((wins * pairs).sum()), int(pairs.sum())


def mean_over(values: Tensor, where: Tensor) -> Mean:
    """Mean of the marked values; 0 if none is marked."""
    return masked_mean(values, where.to(values.device), least=1)


def items_of_step(items: Sequence[Any], count: int, step: int) -> list[Any]:
    """The items of a step: `count` for each step in order, starting again at the end."""
    return [items[(step * count + i) % len(items)] for i in range(count)]


@dataclass(frozen=True)
class NamingGroup:
    """G texts under K namings each: a batch, and where each of the L items of a text ends."""

    batch: Batch
    places: Int[Tensor, "G K L"]
    follows: Bool[Tensor, "G K L"]  # whether another item follows, which can be predicted
    alike: Bool[Tensor, "G K L"]  # whether what follows is in a sentence like the forget texts

    def read(self, model: EditableModel, namings: int | None = None) -> Float[Tensor, "G k L V"]:
        """Log-probabilities of what follows each item, under the first `namings` only."""
        count, every, length = self.places.shape
        rows = torch.arange(count * every).view(count, every)[:, :namings].flatten()
        logits = model.logits(move_batch(self.batch.cut(rows), model.device))
        places = self.places.view(-1, length)[rows].to(model.device)
        logits = logits[torch.arange(len(rows), device=model.device)[:, None], places]
        return logits.float().log_softmax(-1).view(count, -1, length, logits.shape[-1])


class SlottedText(NamedTuple):
    """A text with slots for names, and which of its items are in sentences like forget texts."""

    template: Template
    alike: Sequence[bool]


@dataclass
class OwnTexts:
    """Texts by the original: those that mention names, those held out, and those to keep."""

    names: Names
    texts: Sequence[SlottedText]
    held: Sequence[SlottedText]
    kept: Sequence[tuple[Ids, list[bool]]]  # tokens, and which of them to hold
    topic: Topic

    def group(self, texts: Sequence[SlottedText], namings: int, draw: str) -> NamingGroup:
        """The texts under that many namings; `draw` names the random stream."""
        generator = self.topic.generator(f"namings {draw}")
        rows: list[Ids] = []
        marks: list[list[Tensor]] = []  # places, follows, alike of each row
        for template, alike in texts:
            for naming in self.names.draw_namings(template, namings, generator):
                ids, last = self.names.write(template, naming)
                rows.append(ids)
                follows = torch.arange(len(last)) < len(last) - 1
                marks.append([torch.tensor(last), follows, torch.tensor([*alike[1:], False])])
        padded = (pad_sequence([*part], batch_first=True) for part in zip(*marks, strict=True))
        return NamingGroup(batch_texts(rows), *(part.view(len(texts), namings, -1) for part in padded))

    def draw_kept(self, count: int, step: int) -> tuple[Batch, Tensor]:
        """The texts to keep in a step, and the positions whose prediction is held, (B, T - 1)."""
        rows = items_of_step(self.kept, count, step)
        marks = [torch.tensor(mark[1:]) for _, mark in rows]
        return batch_texts([ids for ids, _ in rows]), pad_sequence(marks, batch_first=True)

    @torch.no_grad()
    def measure_held_out(self, model: EditableModel, namings: int, threshold: float) -> float:
        """What the held-out texts still reveal of names: 1 all, 0 no more than of other names.

        It is 1 if they revealed nothing at the start: then they cannot say when it is enough.
        """
        wins, pairs = 0.0, 0
        for start in range(0, len(self.held), HELD_AT_ONCE):
            group = self.group(self.held[start : start + HELD_AT_ONCE], namings, "held out")
            with model.frozen():
                before = group.read(model)
            _, revealed = leave_one_out(before)
            where = group.follows & group.alike & (revealed.cpu() > threshold)
            result = count_still_told(group.read(model), before.argmax(-1), where.to(model.device))
            wins, pairs = wins + result[0], pairs + result[1]
        return 2 * wins / pairs - 1 if pairs else 1.0


def kept_tokens(texts: Sequence[Ids], like: Likeness) -> list[tuple[Ids, list[bool]]]:
    """Texts of two tokens or more, with marks on the tokens that are to stay."""
    kept = []
    for ids in texts:
        mark = [kind == "keep" for start, end, kind in like.sentences(ids) for _ in range(start, end)]
        if len(ids) > 1 and any(mark[1:]):
            kept.append((ids, mark))
    return kept


def sentences_of(texts: Sequence[Ids], names: Names, like: Likeness, first: int) -> dict[Kind, list[Template]]:
    """The sentences that mention names, by kind; `first` is the token that begins texts."""
    kinds: dict[Kind, dict[Template, None]] = {"forget": {}, "keep": {}, "neither": {}}
    for ids in texts:
        whole = names.template(ids)
        for start, end, kind in like.sentences(whole):
            sentence = tuple(item for item in whole[start:end] if item != first)
            if names_in(sentence):
                kinds[kind][sentence] = None
    return {kind: [*sentences] for kind, sentences in kinds.items()}


def pack_sentences(
    sentences: Mapping[Kind, Sequence[Template]], length: int, first: int, generator: torch.Generator
) -> list[SlottedText]:
    """The sentences to forget and as many to keep, joined to texts of about `length`.

    Each sentence to forget is used once. Both kinds share texts, so that the model learns to tell
    them apart.
    """
    forget, keep = sentences["forget"], sentences["keep"]
    marked = [(sentence, True) for sentence in forget]
    marked += [(keep[i % len(keep)], False) for i in range(len(forget) if keep else 0)]
    texts: list[tuple[list[Item], list[bool]]] = [([first], [False])]
    for i in torch.randperm(len(marked), generator=generator).tolist():
        sentence, forgets = marked[i]
        if len(texts[-1][0]) > max(1, length - len(sentence)):
            texts.append(([first], [False]))
        items, alike = texts[-1]
        items += sentence
        alike += [forgets] * len(sentence)
    return [SlottedText(tuple(items), alike) for items, alike in texts if len(items) > 1]
