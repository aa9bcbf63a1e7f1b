"""Questions that list their options, taken apart, and answers that a model writes out."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from srmu.engine.generate import draw_tokens, next_logits
from srmu.evals.subject import Question, Subject

ROWS = 64  # texts read at once


@dataclass(frozen=True)
class ListedQuestion:
    """A question answered with a letter, by parts: what is asked, the options' texts, the cue."""

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
        by %= len(self.texts)
        gold = (self.question.gold - by) % len(self.texts)
        return replace(self.offering([*self.texts[by:], *self.texts[:by]]), gold=gold)


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


def unlist_options(question: Question) -> Question:
    """The question with no options in its prompt, and their texts as options."""
    parts = split_listed(question)
    if parts is None:
        return question
    options = tuple(f" {text}" for text in parts.texts)
    return replace(question, prompt=parts.stem.rstrip() + parts.cue, options=options)


def solve_question(question: Question) -> str:
    """A question and its right answer, for another question to follow."""
    return f"{question.prompt}{question.answer}\n\n"


@torch.no_grad()
def count_right_generations(
    model: Subject, questions: list[Question], samples: int = 1, temperature: float = 0.0, extra: int = 0, seed: int = 0
) -> list[int]:
    """How many of the generations after each prompt begin with the right answer.

    They have the answer's own number of tokens and `extra` more; case and the amount of space do
    not count. Temperature 0 is greedy. Each beginning that can still become the answer is read
    once, whatever number of samples has it, and all others end at once.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = [normalise_text(q.answer) for q in questions]
    parts = [model.split(q.prompt, q.answer) for q in questions]
    right = [0] * len(questions)
    # by question and tokens so far: samples
    live: Counter[tuple[int, tuple[int, ...]]] = Counter({(i, ()): samples for i in range(len(questions))})
    while live:
        going: Counter[tuple[int, tuple[int, ...]]] = Counter()
        order = sorted(live, key=lambda key: (len(parts[key[0]][0]), key))
        for start in range(0, len(order), ROWS):
            keys = order[start : start + ROWS]
            rows = [[*parts[i][0], *begun][-model.max_length :] for i, begun in keys]
            drawn = draw_tokens(next_logits(model.module, rows, 1)[:, 0], samples, temperature, generator)
            for (i, begun), row in zip(keys, drawn, strict=True):
                for token, count in Counter(row[: live[i, begun]]).items():
                    tokens = (*begun, token)
                    over = token in model.tokenizer.all_special_ids
                    text = normalise_text(model.tokenizer.decode(begun if over else tokens))
                    over |= len(tokens) == len(parts[i][1]) + extra
                    if re.match(re.escape(wanted[i]) + (r"(?!\w)" if over else r"\W"), text):
                        right[i] += count
                    elif not over and wanted[i].startswith(text):
                        going[i, tokens] += count
        live = going
    return right


def normalise_text(text: str) -> str:
    """A text to compare: without case, extra space and a last character that is not whole yet."""
    return " ".join(text.casefold().split()).rstrip("\ufffd")
