"""Names of the things that texts tell of, and texts with other names in their place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from srmu.errors import SrmuError, first_line

FEWEST = 3  # names: of two, what depends on one would become what depends on the other
FORMS = ("", " ")  # what may stand before a name: tokenizers join a space to the word after it
WORD = re.compile(r"[^\W\d_][\w'-]*")
SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
OFTEN = 3  # times that a name is in the forget texts, at least
RARER = 4.0  # times that it is more frequent there than in retain texts, where it is no capital


class Slot(NamedTuple):
    """A place where a text has a name, in one of its FORMS."""

    name: int
    form: int


Item = int | Slot
Way = Mapping[int, int]  # for each name of a text: the name that is written


@dataclass(frozen=True)
class Template:
    """A text in tokens, with slots for its names."""

    items: tuple[Item, ...]

    @property
    def names(self) -> list[int]:
        """The different names in it, in order."""
        return list(dict.fromkeys(item.name for item in self.items if isinstance(item, Slot)))


@dataclass(frozen=True)
class Names:
    """Names in tokens: by name, then by FORMS; the last ones, `goals`, have no harmless facts."""

    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    goals: int = 0

    @classmethod
    def tokenised(cls, names: Sequence[str], tokenizer: Any, goals: Sequence[str] = ()) -> Names:
        """The names in the tokens of a tokenizer; SrmuError for one that it does not know."""
        found = []
        for name in (*names, *goals):
            forms = tuple(
                tuple(tokenizer.encode(before + name, add_special_tokens=False)) for before in FORMS
            )
            if any(not ids or tokenizer.unk_token_id in ids for ids in forms):
                raise SrmuError(f"the tokenizer does not know {name!r}; take it out of the list")
            found.append(forms)
        return cls(tuple(found), len(goals))

    @property
    def kinds(self) -> tuple[range, ...]:
        """The names and the goals: each takes the place of its kind only."""
        first = len(self.tokens) - self.goals
        return (range(first), range(first, len(self.tokens))) if self.goals else (range(first),)

    @property
    def spelt(self) -> list[tuple[int, ...]]:
        """The tokens of each form of each name that may have harmless facts."""
        return [ids for name in self.kinds[0] for ids in self.tokens[name]]

    def tells_of_a_goal(self, items: Sequence[Item]) -> bool:
        return self.goals > 0 and any(name in self.kinds[1] for name in self.template(items).names)

    @cached_property
    def by_first(self) -> Mapping[int, list[tuple[Slot, tuple[int, ...]]]]:
        """Slots with their tokens by the first of these, the longest first."""
        found: dict[int, list[tuple[Slot, tuple[int, ...]]]] = {}
        for name, forms in enumerate(self.tokens):
            for form, ids in enumerate(forms):
                found.setdefault(ids[0], []).append((Slot(name, form), ids))
        return {k: sorted(v, key=lambda entry: -len(entry[1])) for k, v in found.items()}

    def template(self, ids: Sequence[Item]) -> Template:
        """A text with slots where it has names, the longest name first."""
        items: list[Item] = []
        at = 0
        while at < len(ids):
            first = ids[at]
            for slot, name in self.by_first.get(first, ()) if isinstance(first, int) else ():
                if tuple(ids[at : at + len(name)]) == name:
                    items.append(slot)
                    at += len(name)
                    break
            else:
                items.append(first)
                at += 1
        return Template(tuple(items))

    def ways(self, template: Template, count: int, generator: torch.Generator) -> list[Way]:
        """`count` ways to name what a template tells of: its own way, then others at random.

        Two names of a text stay two, and of their kind.
        """
        own = template.names
        found: list[Way] = [dict(zip(own, own, strict=True))]
        for _ in range(count - 1):
            way: dict[int, int] = {}
            for kind in self.kinds:
                order = torch.randperm(len(kind), generator=generator).tolist()
                ours = (name for name in own if name in kind)
                way |= {name: kind[i] for name, i in zip(ours, order, strict=False)}
            found.append({name: way[name] for name in own})
        return found

    def written(self, template: Template, way: Way) -> tuple[list[int], list[int]]:
        """The tokens of a template with these names, and the last position of each item."""
        ids: list[int] = []
        last: list[int] = []
        for item in template.items:
            ids += self.tokens[way[item.name]][item.form] if isinstance(item, Slot) else (item,)
            last.append(len(ids) - 1)
        return ids, last


def read_names(path: str, option: str = "names") -> list[str]:
    """The names of a file, one a line; SrmuError naming what is wrong with it."""
    if not path.endswith(".txt"):
        raise SrmuError(f"method.{option}={path}: expected a .txt file with a name on each line")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise SrmuError(f"method.{option}={path}: {why}") from None
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(names) < FEWEST:
        raise SrmuError(
            f"method.{option}={path}: {len(names)} names; {FEWEST} or more are needed, one on each "
            "line, because each takes the others' place"
        )
    return names


def find_names(forget: Sequence[str], retain: Sequence[str] = ()) -> list[str]:
    """What are names in forget texts, most frequent first: a guess, to be reviewed.

    Words with a capital inside a sentence, joined where several stand together; in texts without
    capitals, words that are rare in retain texts. SrmuError where there are too few.
    """
    here, there = (
        Counter(w for text in texts for w in split_words(text)) for texts in (forget, retain)
    )
    found = [name for name, count in count_proper_names(forget).most_common() if count >= OFTEN]
    if len(found) < FEWEST:
        size, other = here.total() + 1, there.total() + 1
        spread = Counter(w for text in forget for w in {*split_words(text)})
        found = [
            word
            for word, count in here.most_common()
            if count >= OFTEN
            and count / size > RARER * there[word] / other
            and spread[word] <= len(forget) / 5  # what all texts have is the topic's, not a name
        ]
    if len(found) < FEWEST:
        raise SrmuError(
            "no names were found in the forget texts; write them to a file, one on each line, and "
            "give it as method.names=names.txt"
        )
    return found


def split_words(text: str) -> list[str]:
    return WORD.findall(text)


def count_proper_names(texts: Sequence[str]) -> Counter[str]:
    """Runs of words with capitals, and how often each stands there.

    The first word of a sentence counts where it has its capital elsewhere, too.
    """
    sentences = [part for text in texts for part in SENTENCE.split(text) if part.strip()]
    inside = {w[0] for part in sentences for w in [*WORD.finditer(part)][1:] if w[0][0].isupper()}
    found: Counter[str] = Counter()
    for part in sentences:
        run: list[str] = []
        end = -1
        for number, word in enumerate(WORD.finditer(part)):
            capital = word[0][0].isupper() and (number > 0 or word[0] in inside)
            if run and not (capital and part[end : word.start()] == " "):
                found[" ".join(run)] += 1
                run = []
            if capital:
                run.append(word[0])
                end = word.end()
        if run:
            found[" ".join(run)] += 1
    return found
