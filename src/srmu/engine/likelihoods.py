"""Log-probabilities of answers in few forward passes, in place of lm-eval's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from itertools import accumulate, pairwise
from operator import and_, eq
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from srmu.errors import SrmuError

Tokens = tuple[int, ...]


def loglikelihoods(lm: Any, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
    """Each answer's log-probability, and whether it is the likeliest, as lm-eval's own method does.

    An input shared by several answers (options of one token) runs once, as does a prefix shared by
    the inputs of a batch. Only positions that predict an answer are projected to the vocabulary.
    """
    askers: dict[Tokens, list[int]] = {}
    for i, (_, before, answer) in enumerate(requests):
        if not before or not 0 < len(answer) <= lm.max_length:
            size = f"{len(answer)} tokens after {len(before)}; the model takes 1 to {lm.max_length}"
            raise SrmuError(f"an answer cannot be scored: {size}")  # its text may be secret
        askers.setdefault(tuple((before + answer)[-lm.max_length - 1 : -1]), []).append(i)
    tails = {row: max(len(requests[i][2]) for i in ids) for row, ids in askers.items()}
    setup = 96 if lm.device.type == "cpu" else 2048  # tokens read while a forward starts
    tensor = partial(torch.tensor, device=lm.device)
    answers: dict[int, tuple[float, bool]] = {}
    past_kept = keeps_past(lm.model)
    for rows, shared in plan_batches(tails, lm.batch_size, setup):
        shared = shared if past_kept else 0
        ids = pad_sequence([tensor(row) for row in rows], batch_first=True)
        width = max(tails[row] for row in rows)
        last = range(-width, 0)
        keep = tensor([[max(len(row) - shared + i, 0) for i in last] for row in rows])
        with torch.no_grad():
            past = None
            if shared:
                past = lm.model(ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
                past.batch_repeat_interleave(len(rows))
            states: Any = {"past_key_values": past, "use_cache": bool(shared)}
            logits = lm.model(ids[:, shared:], **states, logits_to_keep=keep).logits
            logs = logits.log_softmax(-1, dtype=lm.softmax_dtype)
        order = [i for row in rows for i in askers[row]]
        at = tensor([[n] for n, row in enumerate(rows) for _ in askers[row]])
        # an answer ends at the last position; -1 fills up shorter ones
        words = tensor([[-1] * (width - len(requests[i][2])) + requests[i][2] for i in order])
        picked = logs[at, tensor(last), words.clamp(min=0)].masked_fill(words < 0, 0)
        likeliest = (logs.argmax(-1)[at[:, 0]] == words) | (words < 0)
        results = zip(picked.sum(-1).tolist(), likeliest.all(-1).tolist(), strict=True)
        for i, result in zip(order, results, strict=True):
            answers[i] = result
            if requests[i][0] is not None:  # else it is part of a rolling request
                lm.cache_hook.add_partial("loglikelihood", requests[i][0], result)
    return [answers[i] for i in range(len(requests))]


def keeps_past(model: Any) -> bool:
    """Whether keys and values of a shared prefix can be reused; recurrent states cannot."""
    known = {"logits_to_keep", "past_key_values"} <= {*signature(model.forward).parameters}
    kinds = {*(getattr(model.config, "layer_types", None) or ())}
    attends = all("attention" in kind and "linear" not in kind for kind in kinds)
    return known and not model._is_stateful and attends


def plan_batches(tails: dict[Tokens, int], most: int, setup: int) -> list[tuple[list[Tokens], int]]:
    """Split inputs into the batches with the fewest tokens to read, longest first.

    With each batch comes the length of the prefix to read once for all rows. It includes none of
    the `tails` that answers need, and is 0 where the extra forward (worth `setup` tokens) would
    cost more.
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
