"""Texts with generic terms in place of a topic's own, aligned token by token."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from srmu.data.names import Names, Slot
from srmu.engine.files import read_json
from srmu.engine.generate import Ids, batch_texts
from srmu.errors import SrmuError
from srmu.methods.base import Batch, Topic


class Anchors(NamedTuple):
    """Terms and their generic ones, in the same order."""

    terms: Names
    generics: Names


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
            moved[row, last:, token] = torch.minimum(moved[row, last:, token], before[row, last:, token])
        return moved


def tokenizer_of(folder: Path | None, who: str) -> Any:
    """The tokenizer of the model in `folder`; without a folder SrmuError, naming who needs it."""
    if folder is None:
        raise SrmuError(f"{who} needs a tokenizer: load the model from a folder")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def anchors_for(folder: Path | None, path: str, topic: Topic) -> Anchors:
    """The terms of a file in the tokens of the model in `folder`."""
    terms = read_anchors(path)
    anchors = tokenise_terms(terms, tokenizer_of(folder, "method.anchors"))
    if terms and not any(translate_batch(batch, anchors).named for batch in topic.forget[:]):
        raise SrmuError(f"method.anchors={path}: none of its terms is in {topic.name}'s forget texts")
    return anchors


def read_anchors(path: str) -> dict[str, str]:
    """Terms with their generic ones, from a JSON file; SrmuError naming the file if it is wrong."""
    if not path.endswith(".json"):
        raise SrmuError(f"method.anchors={path}: expected a .json file of {{term: generic term}}")
    terms: Any = read_json(Path(path))
    texts = [*terms, *terms.values()] if isinstance(terms, dict) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise SrmuError(f'method.anchors={path}: expected an object of texts, like {{"Hogwarts": "the academy"}}')
    return {term.strip(): generic.strip() for term, generic in terms.items()}


def tokenise_terms(terms: dict[str, str], tokenizer: Any) -> Anchors:
    """The terms in tokens; one that the tokenizer does not know occurs in no text."""
    unknown = tokenizer.unk_token_id
    known = [term for term in terms if unknown not in tokenizer.encode(f" {term}", add_special_tokens=False)]
    return Anchors(Names.encode(known, tokenizer), Names.encode([terms[term] for term in known], tokenizer))


def translate_batch(batch: Batch, anchors: Anchors) -> Translation:
    """The batch with generic terms, padded on the right.

    A token outside terms has its own place; the last token of a term has that of the last token of
    its generic term, and its other tokens have none. From the second occurrence of a term in a text
    on, its tokens are not learned: after "He is called Harry" nobody is "Jon", and a model that
    learns to rename a person in mid-text contradicts itself. The paper leaves those tokens out too.
    """
    shape = batch["input_ids"].shape
    places, usable = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    same = {number: number for number in range(len(anchors.terms.tokens))}
    rows: list[Ids] = []
    named: list[tuple[int, int, int]] = []
    every = zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True)
    for row, (padded, mask) in enumerate(every):
        template = anchors.terms.template(padded[mask == 1].tolist())
        written, ends = anchors.generics.write(template, same)
        rows.append(written)
        at = int(mask.argmax())  # position of an item's first token: padding may come first
        seen: set[int] = set()
        for item, end in zip(template, ends, strict=True):
            last = at
            if isinstance(item, Slot):
                last += len(anchors.terms.tokens[item.name][item.form]) - 1
                if item.name in seen:
                    usable[row, at - 1] = False  # it predicts the term
                seen.add(item.name)
                named.append((row, last, anchors.generics.tokens[item.name][item.form][0]))
            places[row, last], usable[row, last] = end, True
            at = last + 1
    return Translation(batch_texts(rows), places, usable, named)
