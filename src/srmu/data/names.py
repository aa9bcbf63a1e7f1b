"""The names in texts, and the same texts with other names in their place."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch

from srmu.data.sources import Source, read_texts
from srmu.errors import SrmuError

FEWEST = 3  # names: of two, each could only become the other
FORMS = ("", " ")  # what may come before a name: tokenizers join a space to the next word
WORD = re.compile(r"[^\W\d_][\w'-]*")
RUN = re.compile(rf"{WORD.pattern}(?: {WORD.pattern})*")
SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
OFTEN = 3  # the fewest times that a name is in the forget texts
RARER = 4.0  # how much more frequent it is there than in retain texts, in texts without capitals


class Slot(NamedTuple):
    """A place in a text where a name stands, in one of its FORMS."""

    name: int
    form: int


Item = int | Slot
Template = tuple[Item, ...]  # a text in tokens, with slots in place of its names
Naming = dict[int, int]  # for each name of a text, the name to write


def names_in(template: Template) -> list[int]:
    """The different names of a template, in order."""
    return list(dict.fromkeys(item.name for item in template if isinstance(item, Slot)))


@dataclass(frozen=True)
class Names:
    """Names in tokens, by name and form. The last `goals` of them have no harmless facts."""

    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    goals: int = 0

    @classmethod
    def encode(cls, names: Sequence[str], tokenizer: Any, goals: Sequence[str] = ()) -> Self:
        """Tokenise names; SrmuError for one that the tokenizer does not know."""
        tokens = []
        for name in (*names, *goals):
            forms = tuple(tuple(tokenizer.encode(before + name, add_special_tokens=False)) for before in FORMS)
            if any(not ids or tokenizer.unk_token_id in ids for ids in forms):
                raise SrmuError(f"the tokenizer does not know {name!r}; take it out of the list")
            tokens.append(forms)
        return cls(tuple(tokens), len(goals))

    @property
    def kinds(self) -> tuple[range, ...]:
        """The numbers of the names and of the goals: each is replaced by its own kind only."""
        first = len(self.tokens) - self.goals
        return (range(first), range(first, len(self.tokens))) if self.goals else (range(first),)

    def mentions_goal(self, items: Sequence[Item]) -> bool:
        return self.goals > 0 and any(name in self.kinds[1] for name in names_in(self.template(items)))

    @cached_property
    def slots(self) -> dict[int, list[tuple[Slot, tuple[int, ...]]]]:
        """Slots with their tokens by the first of these, the longest first."""
        every = [(Slot(name, form), ids) for name, forms in enumerate(self.tokens) for form, ids in enumerate(forms)]
        slots: dict[int, list[tuple[Slot, tuple[int, ...]]]] = {}
        for slot, ids in sorted(every, key=lambda entry: -len(entry[1])):
            slots.setdefault(ids[0], []).append((slot, ids))
        return slots

    def template(self, ids: Sequence[Item]) -> Template:
        """A text with slots in place of its names; the longest name that fits counts."""
        items: list[Item] = []
        at = 0
        while at < len(ids):
            first = ids[at]
            known = self.slots.get(first, []) if isinstance(first, int) else []
            fit = (entry for entry in known if tuple(ids[at : at + len(entry[1])]) == entry[1])
            item, name = next(fit, (first, (first,)))
            items.append(item)
            at += len(name)
        return tuple(items)

    def draw_namings(self, template: Template, count: int, generator: torch.Generator) -> list[Naming]:
        """`count` namings of a template: its own, then others at random; names stay different, and of their kind."""
        own = names_in(template)
        namings = [{name: name for name in own} for _ in range(count)]
        for naming in namings[1:]:
            for kind in self.kinds:
                order = torch.randperm(len(kind), generator=generator).tolist()
                ours = (name for name in own if name in kind)
                naming |= {name: kind[i] for name, i in zip(ours, order, strict=False)}
        return namings

    def write(self, template: Template, naming: Naming) -> tuple[list[int], list[int]]:
        """The tokens of a template with these names, and the last position of each item."""
        ids: list[int] = []
        last: list[int] = []
        for item in template:
            ids += self.tokens[naming[item.name]][item.form] if isinstance(item, Slot) else (item,)
            last.append(len(ids) - 1)
        return ids, last


def read_names(path: str, option: str = "names") -> list[str]:
    """The names in a file, one a line; SrmuError saying what is wrong with it."""
    if not path.endswith(".txt"):
        raise SrmuError(f"method.{option}={path}: expected a .txt file with a name on each line")
    try:
        texts = read_texts([Source(path=path)])
    except SrmuError as error:
        raise SrmuError(f"method.{option}={error}") from None
    names = list(dict.fromkeys(line.strip() for text in texts for line in text.splitlines() if line.strip()))
    if len(names) < FEWEST:
        why = "one on each line, because each is replaced by the others"
        raise SrmuError(f"method.{option}={path}: {len(names)} names; {FEWEST} or more are needed, {why}")
    return names


def find_names(forget: Sequence[str], retain: Sequence[str] = ()) -> list[str]:
    """Guess the names in forget texts, most frequent first; a person should review them.

    Words with a capital inside a sentence, joined where several stand together; in texts without capitals, words that
    are rare in retain texts. SrmuError where there are too few.
    """
    names = [name for name, count in count_proper_names(forget).most_common() if count >= OFTEN]
    if len(names) < FEWEST:
        here, there = (Counter(w for text in texts for w in WORD.findall(text)) for texts in (forget, retain))
        size, other = here.total() + 1, there.total() + 1
        spread = Counter(w for text in forget for w in {*WORD.findall(text)})
        names = [
            word
            for word, count in here.most_common()
            if count >= OFTEN
            and count / size > RARER * there[word] / other
            and spread[word] <= len(forget) / 5  # what all texts have is the topic's, not a name
        ]
    if len(names) < FEWEST:
        advice = "write them to a file, one on each line, and give it as method.names=names.txt"
        raise SrmuError(f"no names were found in the forget texts; {advice}")
    return names


def count_proper_names(texts: Sequence[str]) -> Counter[str]:
    """How often runs of capitalised words occur, those that only begin sentences left out."""
    sentences = [part for text in texts for part in SENTENCE.split(text)]
    inside = {w for part in sentences for w in WORD.findall(part)[1:] if w[0].isupper()}
    counts: Counter[str] = Counter()
    for part in sentences:
        first = WORD.search(part)
        named = part if first and first[0] in inside else WORD.sub("|", part, count=1)
        counts.update(RUN.findall(WORD.sub(lambda word: word[0] if word[0][0].isupper() else "|", named)))
    return counts
