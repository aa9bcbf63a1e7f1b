"""Names of the things that texts tell of, and texts with other names in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srmu.errors import UserError, first_line
from srmu.model import Batch
from srmu.sampling import Ids

FEWEST = 3  # names: with two, all that depends on a name would become the other's
FORMS = ("", " ")  # what may stand before a name: tokenizers join a space to the word after it


class Slot(NamedTuple):
    """A place where a text has a name, in one of its FORMS."""

    name: int
    form: int


@dataclass(frozen=True)
class Template:
    """A text in tokens, with slots for its names. Each item, a token or a slot, is a place."""

    items: tuple[int | Slot, ...]

    @property
    def names(self) -> list[int]:
        """The different names in it, in order."""
        return list(dict.fromkeys(item.name for item in self.items if isinstance(item, Slot)))


@dataclass(frozen=True)
class Names:
    """Names in tokens: by name, then by FORMS."""

    tokens: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def tokenised(cls, names: Sequence[str], tokenizer: Any) -> Names:
        """The names in the tokens of a tokenizer; UserError for one that it does not know."""
        found = []
        for name in names:
            forms = tuple(
                tuple(tokenizer.encode(before + name, add_special_tokens=False)) for before in FORMS
            )
            if any(not ids or tokenizer.unk_token_id in ids for ids in forms):
                raise UserError(f"method.names: the tokenizer does not know {name!r}")
            found.append(forms)
        return cls(tuple(found))

    @property
    def pieces(self) -> set[int]:
        """All tokens that names are made of."""
        return {token for forms in self.tokens for ids in forms for token in ids}

    def template(self, ids: Sequence[int]) -> Template:
        """A text with slots where it has names, the longest name first."""
        known = self._by_first
        items: list[int | Slot] = []
        at = 0
        while at < len(ids):
            for slot, name in known.get(ids[at], ()):
                if tuple(ids[at : at + len(name)]) == name:
                    items.append(slot)
                    at += len(name)
                    break
            else:
                items.append(ids[at])
                at += 1
        return Template(tuple(items))

    @property
    def _by_first(self) -> Mapping[int, list[tuple[Slot, tuple[int, ...]]]]:
        found: dict[int, list[tuple[Slot, tuple[int, ...]]]] = {}
        for name, forms in enumerate(self.tokens):
            for form, ids in enumerate(forms):
                found.setdefault(ids[0], []).append((Slot(name, form), ids))
        return {k: sorted(v, key=lambda entry: -len(entry[1])) for k, v in found.items()}

    def renamed(
        self, template: Template, count: int, generator: torch.Generator
    ) -> list[dict[int, int]]:
        """`count` ways to name what a template tells of: its own way, then other names at random.

        Two names of a text stay two.
        """
        own = template.names
        ways = [dict(zip(own, own, strict=True))]
        for _ in range(count - 1):
            order = torch.randperm(len(self.tokens), generator=generator).tolist()
            ways.append(dict(zip(own, order, strict=False)))
        return ways

    def written(self, template: Template, way: Mapping[int, int]) -> tuple[Ids, Ids]:
        """The tokens of a template with these names, and the last position of each item."""
        ids: Ids = []
        last: Ids = []
        for item in template.items:
            ids += self.tokens[way[item.name]][item.form] if isinstance(item, Slot) else (item,)
            last.append(len(ids) - 1)
        return ids, last


def batch_of(rows: Iterable[Ids]) -> Batch:
    """Rows of tokens as a batch, padded on the right; all real tokens count."""
    tensors = [torch.tensor(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in tensors], batch_first=True)
    ids = pad(tensors, batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def read_names(path: str) -> list[str]:
    """The names of a file, one a line; UserError naming what is wrong with it."""
    if not path.endswith(".txt"):
        raise UserError(f"method.names={path}: expected a .txt file with a name on each line")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise UserError(f"method.names={path}: {why}") from None
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(names) < FEWEST:
        raise UserError(
            f"method.names={path}: {len(names)} names; {FEWEST} or more are needed, one a line, "
            "because each is replaced by others"
        )
    return names


def gathered(values: Tensor, last: Sequence[Ids]) -> Tensor:
    """Values (K, T, V) of K renamed texts at the last position of each item: (K, L, V)."""
    places = torch.tensor(last, device=values.device)
    return values[torch.arange(len(last), device=values.device)[:, None], places]
