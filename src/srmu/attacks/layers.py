"""The residual between the blocks of a model, and what answers cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srmu.engine.fine_tune import Row
from srmu.engine.generate import join_responses
from srmu.engine.hooks import decoder_blocks, edit_outputs
from srmu.engine.losses import is_predicted, token_nll
from srmu.engine.model import Batch
from srmu.engine.train import move_batch
from srmu.evals.subject import NotApplicable, Subject

ResidualEdit = Callable[[Tensor], Tensor | None]  # of a block's output (B, T, D)


def edit_residual(model: Subject, edits: Mapping[int, ResidualEdit]) -> AbstractContextManager[None]:
    """Run the model with the outputs of some blocks, by number, put through a function each."""

    def checked(edit: ResidualEdit) -> ResidualEdit:
        def change(value: Tensor) -> Tensor | None:
            if value.ndim != 3:
                raise NotApplicable("blocks of this model pass on more than one residual a token")
            return edit(value)

        return change

    blocks = decoder_blocks(model.module)
    return edit_outputs({blocks[layer]: checked(edit) for layer, edit in edits.items()})


@torch.no_grad()
def read_outputs(model: Subject, ids: Int[Tensor, "B T"], at: Bool[Tensor, "B T"]) -> list[Float[Tensor, "N D"]]:
    """What each block puts out at N marked tokens, row after row, in the model's own dtype.

    NotApplicable where more than one set of weights answers: there is no one output.
    """
    if model.fixed:
        raise NotApplicable(model.fixed)
    outputs: list[Tensor] = []

    def keep(value: Tensor) -> None:
        outputs.append(value[at])

    with edit_residual(model, dict.fromkeys(range(len(decoder_blocks(model.module))), keep)):
        model.module(ids, use_cache=False, logits_to_keep=1)
    return outputs


def answer_rows(model: Subject, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """The tokens of prompts and their answers; of a prompt that is too long, the end."""
    rows = []
    for prompt, answer in pairs:
        before, after = model.split(prompt, answer)
        rows.append((before[-(model.max_length - len(after)) :], after))
    return rows


def pad_rows(rows: Sequence[Row], device: torch.device) -> Batch:
    """Rows padded on the right, where no token that counts can see it."""
    return move_batch(join_responses(*zip(*rows, strict=True)), device)


def batch_answers(rows: Sequence[Row], size: int, device: torch.device) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Numbers of at most `size` rows of like length, their tokens and labels (B, T)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = pad_rows([rows[i] for i in chosen], device)
        yield chosen, batch["input_ids"], batch["labels"]


def answer_nll(model: Subject, ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Nats that a token of each row's answer costs, on average."""
    counts = is_predicted(labels)
    # only columns from the first answer on meet the vocabulary
    width = ids.shape[1] - int(counts.any(dim=0).nonzero()[0])
    logits = model.module(ids, use_cache=False, logits_to_keep=width).logits
    return token_nll(logits, labels[:, -width:]).sum(dim=1) / counts.sum(dim=1)
