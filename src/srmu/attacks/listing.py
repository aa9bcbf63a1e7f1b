"""Other forms of questions, above all of those that list their options behind letters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from srmu.evals.subject import Question


@dataclass(frozen=True)
class ListedQuestion:
    """A question answered with a letter, by parts: what is asked, the options' texts, the cue.

    Options that name other options' letters ("both A and B") are turned and posed like all others.
    """

    question: Question
    stem: str  # up to the line of the first option
    opening: str  # what stands before a letter, and after it
    closing: str
    texts: tuple[str, ...]
    cue: str  # what follows the options

    def offering(self, texts: Sequence[str]) -> Question:
        """The same question with other texts behind the letters."""
        letters = [option.strip() for option in self.question.options]
        lines = [f"{self.opening}{letter}{self.closing}{text}" for letter, text in zip(letters, texts, strict=True)]
        return replace(self.question, prompt=self.stem + "\n".join(lines) + self.cue)

    def turned(self, by: int) -> Question:
        """The question with its options moved up by so many letters, the first ones to the end."""
        count = len(self.texts)
        texts = [self.texts[(i + by) % count] for i in range(count)]
        return replace(self.offering(texts), gold=(self.question.gold - by) % count)

    def cloze(self) -> Question:
        """The question without its list: the texts are the options."""
        options = tuple(f" {text}" for text in self.texts)
        return replace(self.question, prompt=self.stem.rstrip() + self.cue, options=options)


def split_listed(question: Question) -> ListedQuestion | None:
    """The parts of a prompt with a line `A. text` for each option; None where it has no such lines.

    The last such lines count (others belong to examples); only the last text must be of one line.
    """
    letters = [option.strip() for option in question.options]
    if any(len(letter) != 1 or not letter.isalnum() for letter in letters):
        return None
    first, *others = (re.escape(letter) for letter in letters)
    pattern = (
        rf"(.*)^(\(?){first}([.:)] ?)"  # stem, opening, closing; then the texts, and the cue
        + "".join(rf"(.*?)\n\2(?:{letter})\3" for letter in others)
        + r"([^\n]*)(|\n.*)"
    )
    found = re.fullmatch(pattern, question.prompt, re.DOTALL | re.MULTILINE)
    if not found:
        return None
    stem, opening, closing, *texts, cue = found.groups()
    if not stem.strip() or not all(text.strip() for text in texts):
        return None
    return ListedQuestion(question, stem, opening, closing, tuple(texts), cue)


def solve_question(question: Question) -> str:
    """A question and its right answer, for another question to follow."""
    return f"{question.prompt}{question.answer}\n\n"


def unlist_options(question: Question) -> Question:
    """The question with no options in its prompt, and their texts as options."""
    parts = split_listed(question)
    return parts.cloze() if parts else question
