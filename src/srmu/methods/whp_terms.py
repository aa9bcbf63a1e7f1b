"""Texts with generic terms in place of a topic's own, aligned token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from srmu.engine.batch import Batch
from srmu.engine.generate import Ids
from srmu.engine.topic import Topic
from srmu.errors import SrmuError, first_line


class Anchor(NamedTuple):
    """One spelling of a term in tokens; `number` identifies the term."""

    number: int
    term: Ids
    generic: Ids


Anchors = dict[int, list[Anchor]]  # by the term's first token, the longest first


class Translation(NamedTuple):
    """A batch with generic terms, and the places of the original positions in it."""

    batch: Batch
    places: Tensor  # (B, T) in the translation; 0 where there is none
    usable: Tensor  # (B, T) bool: whether the next token can be learned there
    named: list[tuple[int, int, int]]  # row, last position of a term, first token of its generic

    def align_logits(self, logits: Tensor, before: Tensor) -> Tensor:
        """Logits of the translation at the original's positions; `before` are the original's.

        After a term, its generic term is no likelier than in the original text, where it was not
        mentioned. (The paper reduces these logits too, and does not say by how much.)
        """
        rows = torch.arange(len(self.places))[:, None]
        moved = logits[rows.to(logits.device), self.places.to(logits.device)]
        for row, last, token in self.named:
            own = before[row, last:, token]
            moved[row, last:, token] = torch.minimum(moved[row, last:, token], own)
        return moved


def tokenizer_of(folder: Path | None, who: str) -> Any:
    """The tokenizer of the model in `folder`; without a folder SrmuError, naming who needs it."""
    if folder is None:
        raise SrmuError(f"{who} needs a tokenizer: load the model from a folder")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def anchors_for(folder: Path | None, path: str, topic: Topic) -> Anchors:
    """The terms of a file in the tokens of the model in `folder`."""
    tokenizer = tokenizer_of(folder, "method.anchors")
    terms = read_anchors(path)
    anchors = tokenise_terms(terms, tokenizer)
    if terms and not any(translate_batch(batch, anchors).named for batch in topic.forget[:]):
        raise SrmuError(f"method.anchors={path}: none of its terms is in {topic.name}'s forget texts")
    return anchors


def read_anchors(path: str) -> dict[str, str]:
    """Terms with their generic ones, from a JSON file; SrmuError naming the file if it is wrong."""
    if not path.endswith(".json"):
        raise SrmuError(f"method.anchors={path}: expected a .json file of {{term: generic term}}")
    try:
        terms: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise SrmuError(f"method.anchors={path}: {why}") from None
    texts = [*terms, *terms.values()] if isinstance(terms, dict) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise SrmuError(f'method.anchors={path}: expected an object of texts, like {{"Hogwarts": "the academy"}}')
    return terms


def tokenise_terms(terms: dict[str, str], tokenizer: Any) -> Anchors:
    """The terms in tokens, as they are spelt at the start of a text and inside one."""
    ways: dict[tuple[int, ...], Anchor] = {}
    for number, (term, generic) in enumerate(terms.items()):
        for space in ("", " "):
            old, new = (tokenizer.encode(space + text.strip(), add_special_tokens=False) for text in (term, generic))
            if tokenizer.unk_token_id in new:
                raise SrmuError(f"method.anchors: the tokenizer does not know {generic!r}")
            if tokenizer.unk_token_id not in old:  # else it occurs in no text
                ways.setdefault(tuple(old), Anchor(number, old, new))
    anchors: Anchors = {}
    for anchor in sorted(ways.values(), key=lambda anchor: -len(anchor.term)):
        anchors.setdefault(anchor.term[0], []).append(anchor)
    return anchors


def translate_batch(batch: Batch, anchors: Anchors) -> Translation:
    """The batch with generic terms, padded on the right.

    A token outside terms has its own place; the last token of a term has that of the last token of
    its generic term, and its other tokens have none. From the second occurrence of a term in a text
    on, its tokens are not learned: after "He is called Harry" nobody is "Jon", and a model that
    learns to rename a person in mid-text contradicts itself. The paper leaves those tokens out too.
    """
    shape = batch["input_ids"].shape
    places, usable = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    rows: list[Tensor] = []
    named: list[tuple[int, int, int]] = []
    every = zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True)
    for row, (padded, mask) in enumerate(every):
        ids: Ids = padded[mask == 1].tolist()
        at = int(mask.argmax())  # position of ids[0]: padding may come first
        written: Ids = []
        seen: set[int] = set()
        while ids:
            known = anchors.get(ids[0], ())
            anchor = next((a for a in known if ids[: len(a.term)] == a.term), None)
            size = len(anchor.term) if anchor else 1
            last = at + size - 1
            if anchor:
                if anchor.number in seen and written:
                    usable[row, at - 1] = False  # it predicts the term
                seen.add(anchor.number)
                named.append((row, last, anchor.generic[0]))
            written += anchor.generic if anchor else ids[:1]
            places[row, last], usable[row, last] = len(written) - 1, True
            ids, at = ids[size:], last + 1
        rows.append(torch.tensor(written))
    pad = torch.nn.utils.rnn.pad_sequence
    translated = Batch(
        input_ids=pad(rows, batch_first=True),
        attention_mask=pad([torch.ones_like(ids) for ids in rows], batch_first=True),
    )
    return Translation(translated, places, usable, named)
