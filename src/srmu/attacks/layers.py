"""Reading and changing the residual between the blocks of a model, whatever its architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from srmu.engine.loading import find_layers
from srmu.engine.losses import is_predicted, token_nll
from srmu.evals.subject import NotApplicable, Subject

Edit = Callable[[Tensor], Tensor]  # of a block's output (B, T, D)
Rows = Sequence[tuple[list[int], list[int]]]  # tokens: what comes first, and what is counted


def decoder_blocks(model: Subject) -> nn.ModuleList:
    owner, attribute = find_layers(model.module)
    return getattr(owner, attribute)


@contextmanager
def cut_blocks(model: Subject, depth: int) -> Iterator[None]:
    """Run the block with the first `depth` blocks only, then the model's own norm and head."""
    owner, attribute = find_layers(model.module)
    whole = getattr(owner, attribute)
    setattr(owner, attribute, whole[:depth])
    try:
        yield
    finally:
        setattr(owner, attribute, whole)


@contextmanager
def edit_outputs(model: Subject, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Run the block with the outputs of some blocks, by number, put through a function each."""

    def hook(edit: Edit) -> Callable[..., Any]:
        def change(module: nn.Module, args: Any, output: Any) -> Any:
            value = residual_stream(output)
            new = edit(value).to(value.dtype)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return change

    with ExitStack() as stack:
        for layer, edit in edits.items():
            handle = decoder_blocks(model)[layer].register_forward_hook(hook(edit))
            stack.callback(handle.remove)
        yield


def residual_stream(output: Any) -> Float[Tensor, "B T D"]:
    value = output[0] if isinstance(output, tuple) else output
    if value.ndim != 3:
        raise NotApplicable("blocks of this model pass on more than one residual a token")
    return value


@torch.no_grad()
def read_outputs(
    model: Subject, ids: Int[Tensor, "B T"], at: Bool[Tensor, "B T"]
) -> list[Float[Tensor, "N D"]]:
    """What each block puts out at N marked tokens, row after row, in the model's own dtype.

    NotApplicable where more than one set of weights answers: there is no one output.
    """
    if model.fixed:
        raise NotApplicable(model.fixed)
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value[at])
        return value

    with edit_outputs(model, dict.fromkeys(range(len(decoder_blocks(model))), keep)):
        model.module(ids, use_cache=False, logits_to_keep=1)
    return found


def answer_rows(model: Subject, pairs: Sequence[tuple[str, str]]) -> Rows:
    """The tokens of prompts and their answers; of a prompt that is too long, the end."""
    found = []
    for prompt, answer in pairs:
        before, after = model.split(prompt, answer)
        found.append((before[-(model.max_length - len(after)) :], after))
    return found


def batch_answers(
    rows: Rows, size: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Numbers of at most `size` rows of like length, their tokens and labels (B, T)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, *pad_answers([rows[i] for i in chosen], device)


def pad_answers(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and labels (B, T), padded on the right, where no token that counts can see it."""
    ids = [torch.tensor(before + after) for before, after in rows]
    labels = [torch.tensor([-100] * len(before) + after) for before, after in rows]
    return (
        pad_sequence(ids, batch_first=True).to(device),
        pad_sequence(labels, batch_first=True, padding_value=-100).to(device),
    )


def answer_nll(
    model: Subject, ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Nats that a token of each row's answer costs, on average."""
    counts = is_predicted(labels)
    # only columns from the first answer on meet the vocabulary
    width = ids.shape[1] - int(counts.any(dim=0).nonzero()[0])
    logits = model.module(ids, use_cache=False, logits_to_keep=width).logits
    return token_nll(logits, labels[:, -width:]).sum(dim=1) / counts.sum(dim=1)
