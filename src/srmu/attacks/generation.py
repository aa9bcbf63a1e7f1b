"""What a model says next, and whether it says the answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from srmu.evals.subject import Question, Subject

ROWS = 64  # texts read at once


@torch.no_grad()
def next_logits(model: Subject, rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Logits after each of the last `width` tokens of each row, (B, width, V).

    A row's own come last; where it has fewer tokens, those before are its first token's.
    """
    rows = [row[-model.max_length :] for row in rows]
    # Padding on the right cannot be seen from the tokens before it.
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    keep = torch.tensor([[max(len(row) + i, 0) for i in range(-width, 0)] for row in rows])
    given = {"input_ids": ids.to(model.device), "logits_to_keep": keep.to(model.device)}
    return model.module(**given, use_cache=False).logits


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
            logits = next_logits(model, [[*parts[i][0], *said] for i, said in keys], 1)[:, 0]
            drawn = _draw(logits, samples, temperature, generator)
            for (i, said), row in zip(keys, drawn, strict=True):
                for token, count in Counter(row[: live[i, said]]).items():
                    tokens = (*said, token)
                    over = token in tokenizer.all_special_ids
                    text = normalise_text(tokenizer.decode(said if over else tokens))
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


def _draw(
    logits: Tensor, samples: int, temperature: float, generator: torch.Generator
) -> list[list[int]]:
    """Next tokens of each row, `samples` of them."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True).expand(-1, samples).tolist()
    chances = (logits.float() / temperature).softmax(-1).cpu()
    return torch.multinomial(chances, samples, replacement=True, generator=generator).tolist()
