"""Log-probabilities of answers in few forward passes, in place of lm-eval's own."""

from collections.abc import Callable, Iterable, Sequence, Set
from functools import partial
from inspect import signature
from itertools import accumulate, pairwise
from operator import and_, eq
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from srmu.engine.sites import decoder_blocks, edit_input, edit_outputs, find_layers, swap_blocks
from srmu.errors import SrmuError

Tokens = tuple[int, ...]
Score = tuple[float, bool]  # log p of an answer, and whether each of its tokens is the likeliest
# of tokens (B, T), what is wanted, and options of a forward: logits of one or several readings, and keys and values
Reader = Callable[..., tuple[Iterable[Tensor], Any]]
APART = 0.05  # of their norm, by which logits of one model may differ: they are rounded otherwise in other batches
HELD = 1024  # tokens whose keys and values a batch keeps, before answers are read on


class SharedHeadError(SrmuError):
    """The head of a model reads more than its last block puts out."""


class Wanted(NamedTuple):
    """Tokens of answers, and the places whose logits predict them, each of these once."""

    rows: list[int]
    columns: list[int]
    at: list[int]  # of each token: the number of its place
    tokens: list[int]
    sizes: list[int]  # tokens of each answer

    @classmethod
    def of(cls, answers: Iterable[tuple[int, int, Sequence[int]]]) -> "Wanted":
        """From answers: the row of each, the column whose logits predict its first token, and its tokens."""
        places: dict[tuple[int, int], int] = {}
        wanted = cls([], [], [], [], [])
        for row, column, answer in answers:
            wanted.sizes.append(len(answer))
            for number, token in enumerate(answer):
                wanted.at.append(places.setdefault((row, column + number), len(places)))
                wanted.tokens.append(token)
        wanted.rows.extend(row for row, _ in places)
        wanted.columns.extend(column for _, column in places)
        return wanted


def score_answers(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
    *,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    done: Callable[[int, Score], None] = lambda number, result: None,
) -> list[Score]:
    """Of each pair (tokens before, tokens of the answer): log p, and whether each is the likeliest; as lm-eval's.

    A prompt of several answers is read once, and so is a start that the inputs of a batch share; only positions that
    predict an answer meet the vocabulary. `dtype` is that of the softmax; `done` gets each result.
    """

    def read(ids: Tensor, wanted: Wanted, **options: Any) -> tuple[list[Tensor], Any]:
        logits, past = read_logits(model, ids, wanted.rows, wanted.columns, **options)
        return [logits], past

    return [score for (score,) in score_readings(model, read, pairs, max_length, batch_size, dtype, done)]


def score_layers(
    model: Any,
    layers: Sequence[int],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
    dtype: torch.dtype | None = None,
) -> list[list[Score]]:
    """Of each pair: what `score_answers` gives for the model cut above each of the layers, in one reading.

    SharedHeadError where one reading cannot give this.
    """
    return score_readings(model, partial(read_layers, model, layers), pairs, max_length, dtype=dtype)


def score_readings(
    model: Any,
    read: Reader,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    done: Callable[[int, Score], None] = lambda number, result: None,
) -> list[list[Score]]:
    """Of each pair: its score by each of the logits that `read` gives; `done` gets that by the last."""
    past_kept = keeps_past(model)
    inputs = [cut_input(before, answer, max_length) for before, answer in pairs]
    answers: dict[Tokens, set[Tokens]] = {}  # of several tokens, by what comes before them
    for row, (_, answer) in zip(inputs, pairs, strict=True):
        if past_kept and len(answer) > 1:
            answers.setdefault(row[: len(row) + 1 - len(answer)], set()).add((*answer,))
    askers: dict[Tokens, list[tuple[int, int]]] = {}  # of each row to run: pairs, and how many tokens it predicts
    for i, (row, (_, answer)) in enumerate(zip(inputs, pairs, strict=True)):
        stem = row[: len(row) + 1 - len(answer)]
        apart = len(answers.get(stem, ())) > 1
        askers.setdefault(stem if apart else row, []).append((i, 1 if apart else len(answer)))
    tails = {row: max(count for _, count in of_it) for row, of_it in askers.items()}
    stems = {row for row, of_it in askers.items() if any(count < len(pairs[i][1]) for i, count in of_it)}
    setup = 96 if model.device.type == "cpu" else 2048  # tokens read while a forward gets going
    results: dict[int, list[Score]] = {}
    for rows, shared in plan_batches(tails, batch_size, setup, stems):
        asked = [(n, i, pairs[i][1][:count]) for n, row in enumerate(rows) for i, count in askers[row]]
        past = None
        with torch.no_grad():
            ids = pad_sequence([torch.tensor(row, device=model.device) for row in rows], batch_first=True)
            if past_kept and shared:
                past = model(ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
                past.batch_repeat_interleave(len(rows))
            start = shared if past_kept else 0
            states: Any = {"past_key_values": past} if past else {}
            states["use_cache"] = past is not None or not stems.isdisjoint(rows)
            # an answer ends at its input's last position
            wanted = Wanted.of((n, len(rows[n]) - start - len(answer), answer) for n, _, answer in asked)
            readings, past = read(ids[:, start:], wanted, **states)
            found = pick_tokens(readings, wanted, dtype)
            rest = {i: (n, pairs[i][1]) for n, i, answer in asked if len(answer) < len(pairs[i][1])}
            more = dict(zip(rest, read_on(read, past, [*rest.values()], dtype, model.device), strict=True))
        for (_, i, _), scores in zip(asked, found, strict=True):
            further = more.get(i, [(0.0, True)] * len(scores))
            results[i] = [(a + b, first and then) for (a, first), (b, then) in zip(scores, further, strict=True)]
            done(i, results[i][-1])
    return [results[i] for i in range(len(pairs))]


def split_answers(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Of each pair (prompt, the same text with its answer): the prompt's tokens, and those that the answer adds."""
    befores, wholes = (tokenizer(list(texts))["input_ids"] for texts in zip(*pairs, strict=True))
    return [(before, whole[len(before) :]) for before, whole in zip(befores, wholes, strict=True)]


def cut_input(before: Sequence[int], answer: Sequence[int], max_length: int) -> Tokens:
    """What a model reads to predict an answer: the last `max_length` tokens before the answer's last one."""
    if not before or not 0 < len(answer) <= max_length:
        size = f"{len(answer)} tokens after {len(before)}; the model takes 1 to {max_length}"
        raise SrmuError(f"an answer cannot be scored: {size}")  # its text may be to forget
    return (*before, *answer)[-max_length - 1 : -1]


def read_on(
    read: Reader, past: Any, rest: Sequence[tuple[int, Sequence[int]]], dtype: torch.dtype | None, device: torch.device
) -> list[list[Score]]:
    """The scores of an answer's tokens after its first one, for each (row of `past`, answer).

    All rows of `past` have one length, so that no position is empty.
    """
    if not rest:
        return []
    rows = [*dict.fromkeys((n, (*answer[:-1],)) for n, answer in rest)]
    past.batch_select_indices(torch.tensor([n for n, _ in rows], device=device))
    ids = pad_sequence([torch.tensor(tokens, device=device) for _, tokens in rows], batch_first=True)
    places = {row: at for at, row in enumerate(rows)}
    wanted = Wanted.of((places[n, (*answer[:-1],)], 0, answer[1:]) for n, answer in rest)
    readings, _ = read(ids, wanted, past_key_values=past, use_cache=True)
    return pick_tokens(readings, wanted, dtype)


def pick_tokens(readings: Iterable[Tensor], wanted: Wanted, dtype: torch.dtype | None) -> list[list[Score]]:
    """Of each answer: its score by each reading, logits (N, V) of the places."""
    found = []
    for logits in readings:
        logs = logits.log_softmax(-1, dtype=dtype)
        at, tokens = (torch.tensor(value, device=logits.device) for value in (wanted.at, wanted.tokens))
        found_logs, same = logs[at, tokens].cpu(), (logs.argmax(-1)[at] == tokens).cpu()
        picked, likeliest = found_logs.split(wanted.sizes), same.split(wanted.sizes)
        found.append([(float(one.sum()), bool(all_.all())) for one, all_ in zip(picked, likeliest, strict=True)])
    return [[*scores] for scores in zip(*found, strict=True)]


def read_logits(
    model: Any, ids: Tensor, rows: Sequence[int], columns: Sequence[int], **options: Any
) -> tuple[Tensor, Any]:
    """Logits (N, V) at N places of tokens (B, T), and keys and values of the past: only they meet the vocabulary."""
    at = [torch.tensor(value, device=ids.device) for value in (rows, columns)]
    if "logits_to_keep" in signature(model.forward).parameters:
        # not as logits_to_keep, which transformers before 5.20 does not take row by row
        with edit_input(model.get_output_embeddings(), lambda value: value[*at][None]):
            output = model(ids, **options)
            return output.logits[0], getattr(output, "past_key_values", None)
    return model(ids, **options).logits[*at], None


def read_layers(
    model: Any, layers: Sequence[int], ids: Tensor, wanted: Wanted, **options: Any
) -> tuple[Iterable[Tensor], Any]:
    """As `read_logits`, of the model cut above each of the layers: one forward, then norm and head of their outputs.

    A block that the model leaves out puts out what came before it. SharedHeadError where the last block's logits are
    not the model's own: other blocks, or another model, then have a part in them.
    """
    place, blocks = find_layers(model), decoder_blocks(model)
    at = [torch.tensor(value, device=ids.device) for value in (wanted.rows, wanted.columns)]
    states: dict[int, Tensor] = {}

    def take(layer: int, value: Tensor) -> None:
        # (B, T, ...), or with what a block puts out for each token besides first: (..., B, T, D); as texts of one token
        states[layer] = value[*at][:, None] if value.shape[:2] == ids.shape else value[..., *at, None, :]

    with edit_outputs({block: partial(take, layer) for layer, block in enumerate(blocks)}):
        own, past = read_logits(model, ids, wanted.rows, wanted.columns, **options)

    def finish(state: Tensor) -> Tensor:
        # the first block runs only to be replaced: what comes before it and after the last is the model's own affair
        with swap_blocks(place, blocks[:1]), edit_outputs({blocks[0]: lambda _: state}):
            return model(torch.zeros(len(at[0]), 1, dtype=ids.dtype, device=ids.device), use_cache=False).logits[:, 0]

    last = max(states)
    if (finish(states[last]) - own).norm() > APART * own.norm():
        raise SharedHeadError(f"the head of {type(model).__name__} reads more than the last block puts out")
    below = (max(run for run in states if run <= layer) for layer in layers)
    return (own if layer == last else finish(states[layer]) for layer in below), past


def keeps_past(model: Any) -> bool:
    """Whether keys and values of a shared prefix can be reused; recurrent states cannot."""
    known = {"logits_to_keep", "past_key_values"} <= {*signature(model.forward).parameters}
    kinds = {*(getattr(model.config, "layer_types", None) or ())}
    attends = all("attention" in kind and "linear" not in kind for kind in kinds)
    return known and not model._is_stateful and attends


def plan_batches(
    tails: dict[Tokens, int], most: int, setup: int, stems: Set[Tokens] = frozenset()
) -> list[tuple[list[Tokens], int]]:
    """Split inputs into the batches with the fewest tokens to read, longest first.

    With each batch comes the length of the prefix to read once for all rows, without the `tails` that answers need; 0
    where the extra forward (worth `setup` tokens) would cost more. Of `stems`, after which answers are read on, those
    of a batch have one length, and HELD tokens at most, as their keys and values are kept.
    """
    order = sorted(tails, key=lambda row: (row in stems, len(row), row))
    free = [len(row) - tails[row] for row in order]
    # the number of first tokens that each row shares with the one before
    common = [0, *(sum(accumulate(map(eq, *pair), and_)) for pair in pairwise(order))]
    best = [(0, 0, 0)]  # for the first n rows: cost, start of the last batch, its prefix
    for end in range(1, len(order) + 1):
        last, shared, plans = order[end - 1], free[end - 1], []
        for start in range(end - 1, max(end - most, 0) - 1, -1):
            size = (end - start) * len(last)
            alike = order[start] in stems and len(order[start]) == len(last) and size <= HELD
            if last in stems and start < end - 1 and not alike:
                break
            shared = min(shared, free[start])
            whole = best[start][0] + setup + size
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
