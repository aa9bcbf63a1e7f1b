"""Whether what a model says next is the answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch

from srmu.engine.generate import draw_tokens, next_logits
from srmu.evals.subject import Question, Subject

ROWS = 64  # texts read at once


@torch.no_grad()
def count_right_generations(
    model: Subject,
    questions: Sequence[Question],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    extra: int = 0,
    seed: int = 0,
) -> list[int]:
    """How many of the generations after each prompt begin with the right answer.

    They have the answer's own number of tokens and `extra` more; case and the amount of space do
    not count. Temperature 0 is greedy. Each beginning that can still become the answer is read
    once, whatever number of samples has it, and all others end at once.
    """
    tokenizer, generator = model.tokenizer, torch.Generator().manual_seed(seed)
    wanted = [normalise_text(q.answer) for q in questions]
    parts = [model.split(q.prompt, q.answer) for q in questions]
    right = [0] * len(questions)
    live: dict[tuple[int, tuple[int, ...]], int]  # by question and tokens so far: samples
    live = {(i, ()): samples for i in range(len(questions))}
    while live:
        going: Counter[tuple[int, tuple[int, ...]]] = Counter()
        order = sorted(live, key=lambda key: (len(parts[key[0]][0]), key))
        for start in range(0, len(order), ROWS):
            keys = order[start : start + ROWS]
            rows = [[*parts[i][0], *begun][-model.max_length :] for i, begun in keys]
            logits = next_logits(model.module, rows, 1)[:, 0]
            drawn = draw_tokens(logits, samples, temperature, generator)
            for (i, begun), row in zip(keys, drawn, strict=True):
                for token, count in Counter(row[: live[i, begun]]).items():
                    tokens = (*begun, token)
                    over = token in tokenizer.all_special_ids
                    text = normalise_text(tokenizer.decode(begun if over else tokens))
                    over |= len(tokens) == len(parts[i][1]) + extra
                    if re.match(re.escape(wanted[i]) + (r"(?!\w)" if over else r"\W"), text):
                        right[i] += count
                    elif not over and wanted[i].startswith(text):
                        going[i, tokens] += count
        live = dict(going)
    return right


def normalise_text(text: str) -> str:
    """A text to compare: without case, extra space and a last character that is not whole yet."""
    return " ".join(text.casefold().split()).rstrip("\ufffd")
