"""Continuations that a model writes, and how likely it finds texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from srmu.engine.batch import Batch, move_batch
from srmu.engine.losses import is_predicted, token_nll
from srmu.engine.model import EditableModel

ROWS = 8  # texts scored at once: the logits of all their tokens are the largest tensor there is
SAMPLED_ROWS = 32  # texts continued at once, which needs the logits of one token each
Ids = list[int]


def join_responses(contexts: Sequence[Ids], responses: Sequence[Ids]) -> Batch:
    """A batch, padded on the right, that counts the responses."""

    def stack(rows: Iterable[Ids], fill: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)

    pairs = list(zip(contexts, responses, strict=True))
    return Batch(
        input_ids=stack((x + y for x, y in pairs), 0),
        attention_mask=stack(([1] * len(x + y) for x, y in pairs), 0),
        labels=stack(([-100] * len(x) + y for x, y in pairs), -100),
    )


def batch_texts(rows: Sequence[Ids]) -> Batch:
    """A batch of texts, padded on the right, that counts all their tokens."""
    return join_responses([[]] * len(rows), rows)


@torch.no_grad()
def response_likelihoods(
    model: EditableModel, contexts: Sequence[Ids], responses: Sequence[Ids]
) -> list[float]:
    """Mean log-probability of each response's tokens after its context."""
    found: list[float] = []
    for start in range(0, len(contexts), ROWS):
        rows = slice(start, start + ROWS)
        batch = move_batch(join_responses(contexts[rows], responses[rows]), model.device)
        nll = token_nll(model.logits(batch), batch["labels"])
        found += (-nll.sum(dim=1) / is_predicted(batch["labels"]).sum(dim=1)).tolist()
    return found


def sample_continuations(
    model: EditableModel,
    contexts: Sequence[Ids],
    length: int,
    seed: int,
    at_once: int = SAMPLED_ROWS,
) -> list[Ids]:
    """A continuation of each context, of `length` tokens at most, drawn from the model as it is.

    It ends with the token that ends texts, if there is one. Drawn at temperature 1 from all tokens,
    whatever the checkpoint's own settings of generation say.
    """
    module: Any = model.module
    own = module.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    plain = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=length,
        eos_token_id=own.eos_token_id,
        pad_token_id=0,
    )
    found: list[Ids] = []
    module.generation_config = plain  # what is not set there would come from the checkpoint's
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            for start in range(0, len(contexts), at_once):
                rows = [torch.tensor(row) for row in contexts[start : start + at_once]]
                ids, mask = (
                    torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_side="left")
                    for part in (rows, [torch.ones_like(row) for row in rows])
                )
                given = {"input_ids": ids, "attention_mask": mask}
                drawn = module.generate(**move_batch(given, model.device))
                for row in drawn[:, ids.shape[1] :].tolist():
                    stop = next((i for i, t in enumerate(row, 1) if t in ends), len(row))
                    found.append(row[:stop])
    finally:
        module.generation_config = own
    return found
