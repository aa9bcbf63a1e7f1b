"""Log-probabilities of answers in few forward passes, in place of lm-eval's own."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from itertools import accumulate, pairwise
from operator import and_, eq
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from srmu.engine.sites import edit_input
from srmu.errors import SrmuError

Tokens = tuple[int, ...]


def score_answers(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
    *,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    done: Callable[[int, tuple[float, bool]], None] = lambda number, result: None,
) -> list[tuple[float, bool]]:
    """Of each pair (tokens before, tokens of the answer): log p, and whether each is the likeliest; as lm-eval's.

    An input that several answers need is run once, a start that the inputs of a batch share too, and only positions
    that predict an answer meet the vocabulary. `dtype` is that of the softmax; `done` is told of each result.
    """
    askers: dict[Tokens, list[int]] = {}
    for i, (before, answer) in enumerate(pairs):
        if not before or not 0 < len(answer) <= max_length:
            size = f"{len(answer)} tokens after {len(before)}; the model takes 1 to {max_length}"
            raise SrmuError(f"an answer cannot be scored: {size}")  # its text may be to forget
        askers.setdefault((*before, *answer)[-max_length - 1 : -1], []).append(i)
    tails = {row: max(len(pairs[i][1]) for i in ids) for row, ids in askers.items()}
    setup = 96 if model.device.type == "cpu" else 2048  # tokens read while a forward gets going
    tensor = partial(torch.tensor, device=model.device)
    results: dict[int, tuple[float, bool]] = {}
    past_kept = keeps_past(model)
    for rows, shared in plan_batches(tails, batch_size, setup):
        shared = shared if past_kept else 0
        ids = pad_sequence([tensor(row) for row in rows], batch_first=True)
        width = max(tails[row] for row in rows)
        last = range(-width, 0)
        keep = tensor([[max(len(row) - shared + i, 0) for i in last] for row in rows])
        with torch.no_grad():
            past = None
            if shared:
                past = model(ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
                past.batch_repeat_interleave(len(rows))
            states: Any = {"past_key_values": past} if shared else {}
            logits = read_logits(model, ids[:, shared:], keep, use_cache=bool(shared), **states)
            logs = logits.log_softmax(-1, dtype=dtype)
        which = [i for row in rows for i in askers[row]]
        at = tensor([[n] for n, row in enumerate(rows) for _ in askers[row]])
        # an answer ends at its input's last position; -1 before it, where others are longer
        words = tensor([[-1] * (width - len(pairs[i][1])) + [*pairs[i][1]] for i in which])
        picked = logs[at, tensor(last), words.clamp(min=0)].masked_fill(words < 0, 0)
        likeliest = (logs.argmax(-1)[at[:, 0]] == words) | (words < 0)
        for i, *result in zip(which, picked.sum(-1).tolist(), likeliest.all(-1).tolist(), strict=True):
            results[i] = (result[0], result[1])
            done(i, results[i])
    return [results[i] for i in range(len(pairs))]


def read_logits(model: Any, ids: Tensor, keep: Tensor, **options: Any) -> Tensor:
    """Logits at some positions of each row, (B, W, V) for the (B, W) of `keep`; only they meet the vocabulary."""
    if "logits_to_keep" in signature(model.forward).parameters:
        # not as logits_to_keep, which transformers before 5.20 does not take row by row
        with edit_input(model.get_output_embeddings(), lambda value: value.take_along_dim(keep[..., None], 1)):
            return model(ids, **options).logits
    return model(ids, **options).logits[torch.arange(len(ids), device=ids.device)[:, None], keep]


def keeps_past(model: Any) -> bool:
    """Whether keys and values of a shared prefix can be reused; recurrent states cannot."""
    known = {"logits_to_keep", "past_key_values"} <= {*signature(model.forward).parameters}
    kinds = {*(getattr(model.config, "layer_types", None) or ())}
    attends = all("attention" in kind and "linear" not in kind for kind in kinds)
    return known and not model._is_stateful and attends


def plan_batches(tails: dict[Tokens, int], most: int, setup: int) -> list[tuple[list[Tokens], int]]:
    """Split inputs into the batches with the fewest tokens to read, longest first.

    With each batch comes the length of the prefix to read once for all rows, without the `tails` that answers need; 0
    where the extra forward (worth `setup` tokens) would cost more.
    """
    order = sorted(tails, key=lambda row: (len(row), row))
    free = [len(row) - tails[row] for row in order]
    # the number of first tokens that each row shares with the one before
    common = [0, *(sum(accumulate(map(eq, *pair), and_)) for pair in pairwise(order))]
    best = [(0, 0, 0)]  # for the first n rows: cost, start of the last batch, its prefix
    for end in range(1, len(order) + 1):
        shared, plans = free[end - 1], []
        for start in range(end - 1, max(end - most, 0) - 1, -1):
            shared = min(shared, free[start])
            whole = best[start][0] + setup + (end - start) * len(order[end - 1])
            split = whole + setup - (end - start - 1) * shared
            plans.append((whole, start, 0) if whole <= split else (split, start, shared))
            shared = min(shared, common[start])
        best.append(min(plans))
    cut, end = [], len(order)
    while end:
        _, start, shared = best[end]
        cut.append((order[start:end], shared))
        end = start
    return cut
