"""Continuations that a model writes, and how likely it finds texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from srmu.engine.likelihoods import read_logits
from srmu.engine.losses import is_predicted, token_nll
from srmu.engine.model import EditableModel
from srmu.engine.topic import Batch, move_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 8  # texts scored at once: the logits of all their tokens are the largest tensor there is
SAMPLED_ROWS = 32  # texts continued at once, which needs the logits of one token each
Ids = list[int]


def join_responses(contexts: Sequence[Ids], responses: Sequence[Ids]) -> Batch:
    """A batch, padded on the right, that counts the responses."""
    pairs = list(zip(contexts, responses, strict=True))
    return Batch(
        input_ids=pad_rows((x + y for x, y in pairs)),
        attention_mask=pad_rows([1] * len(x + y) for x, y in pairs),
        labels=pad_rows(([-100] * len(x) + y for x, y in pairs), padding_value=-100),
    )


def pad_rows(rows: Iterable[Sequence[int]], **options: Any) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, **options)


def batch_texts(rows: Sequence[Ids]) -> Batch:
    """A batch of texts, padded on the right, that counts all their tokens."""
    return join_responses([[]] * len(rows), rows)


@torch.no_grad()
def response_likelihoods(model: EditableModel, contexts: Sequence[Ids], responses: Sequence[Ids]) -> list[float]:
    """Mean log-probability of each response's tokens after its context."""
    found: list[float] = []
    for start in range(0, len(contexts), ROWS):
        rows = slice(start, start + ROWS)
        batch = move_batch(join_responses(contexts[rows], responses[rows]), model.device)
        nll = token_nll(model.logits(batch), batch["labels"])
        found += (-nll.sum(dim=1) / is_predicted(batch["labels"]).sum(dim=1)).tolist()
    return found


def sample_continuations(
    module: PreTrainedModel, contexts: Sequence[Ids], length: int, seed: int, at_once: int = SAMPLED_ROWS
) -> list[Ids]:
    """A continuation of each context, of `length` tokens at most, drawn at temperature 1 from all tokens."""
    rows: list[Ids] = []
    with torch.random.fork_rng(range(torch.accelerator.device_count())):
        torch.manual_seed(seed)
        for start in range(0, len(contexts), at_once):
            part = contexts[start : start + at_once]
            rows += write_on(module, part, length, list_ends(module), do_sample=True)[0]
    return rows


def continue_greedily(module: PreTrainedModel, tokenizer: Any, contexts: Sequence[Ids], length: int) -> list[Ids]:
    """The likeliest token again and again after each context, to `length` or before the token that ends a text."""
    ends = list_ends(module, tokenizer)
    rows, _ = write_on(module, contexts, length, ends)
    return [row[:-1] if row[-1] in ends else row for row in rows]


def list_ends(module: PreTrainedModel, tokenizer: Any = None) -> set[int]:
    """The tokens that end a text: those of the checkpoint's settings, and the tokenizer's."""
    own: Any = module.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return {*ends, tokenizer and tokenizer.eos_token_id} - {None}


@torch.no_grad()
def write_on(
    module: PreTrainedModel,
    contexts: Sequence[Ids],
    length: int,
    ends: set[int],
    *,
    do_sample: bool = False,
    keep_logits: bool = False,
) -> tuple[list[Ids], list[Float[Tensor, "S V"]]]:
    """Continuations of contexts, read at once where padding allows, each with the token that ends it; their logits."""
    from transformers import GenerationConfig, LogitsProcessorList

    lengths = [len(row) for row in contexts]
    if len({*lengths}) > 1 and not hides_padding(module):
        found: dict[int, Any] = {}
        for size in sorted({*lengths}):
            which = [i for i, count in enumerate(lengths) if count == size]
            part = [contexts[i] for i in which]
            both = write_on(module, part, length, ends, do_sample=do_sample, keep_logits=keep_logits)
            found |= zip(which, zip_longest(*both), strict=True)
        texts = [found[i] for i in range(len(contexts))]
        return [text for text, _ in texts], [logits for _, logits in texts if keep_logits]
    settings = GenerationConfig(
        max_new_tokens=length,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,  # behind the mask: any token will do, where the tokenizer has none
        output_logits=keep_logits,
        return_dict_in_generate=True,
    )
    drawn = LogitsProcessorList([choose_drawn] if do_sample else [])
    ids, mask = (pad_rows(rows, padding_side="left") for rows in (contexts, [[1] * len(row) for row in contexts]))
    read = move_batch({"input_ids": ids, "attention_mask": mask}, module.device)
    generator: Any = module
    own = generator.generation_config
    generator.generation_config = settings  # else the checkpoint's own would fill in, say, a penalty on repetition
    try:
        try:
            out = generator.generate(**read, logits_processor=drawn)
        except (ValueError, TypeError, AttributeError, IndexError):  # no cache that `generate` could use
            settings.use_cache = False
            out = generator.generate(**read, logits_processor=drawn)
    finally:
        generator.generation_config = own
    rows = out.sequences[:, ids.shape[1] :].tolist()
    written = [row[: next((i for i, token in enumerate(row, 1) if token in ends), None)] for row in rows]
    if not keep_logits:
        return written, []
    logits = torch.stack(out.logits, dim=1)
    return written, [part[: len(row)] for part, row in zip(logits, written, strict=True)]


def choose_drawn(ids: Tensor, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Logits whose largest is of a token drawn at temperature 1: one random number a row, `multinomial` takes V."""
    chances = logits.float().softmax(-1).cumsum(-1)
    # times the last: a sum of float32 does not end at 1
    places = torch.rand_like(chances[:, :1]) * chances[:, -1:]
    drawn = torch.searchsorted(chances, places, right=True).clamp(max=chances.shape[1] - 1)
    return logits.scatter(1, drawn, torch.inf)


def hides_padding(module: PreTrainedModel) -> bool:
    """Whether padding before a text changes nothing: its positions can be given, and no tokens are read in blocks."""
    kinds = getattr(module.config, "layer_types", None) or ()
    return "position_ids" in signature(module.forward).parameters and not any("compress" in kind for kind in kinds)


@torch.no_grad()
def next_logits(module: PreTrainedModel, rows: Sequence[Ids], width: int) -> Float[Tensor, "B {width} V"]:
    """Logits after each of the last `width` tokens of each row; a shorter row begins with its first token's again."""
    ids = pad_rows(rows).to(module.device)  # padding on the right cannot be seen from the tokens before it
    keep = [(n, max(len(row) + i, 0)) for n, row in enumerate(rows) for i in range(-width, 0)]
    return read_logits(module, ids, *zip(*keep, strict=True), use_cache=False)[0].unflatten(0, (len(rows), width))


def draw_tokens(
    logits: Float[Tensor, "B V"], samples: int, temperature: float, generator: torch.Generator
) -> list[Ids]:
    """`samples` next tokens of each row; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True).expand(-1, samples).tolist()
    chances = (logits.float() / temperature).softmax(-1).cpu()
    return torch.multinomial(chances, samples, replacement=True, generator=generator).tolist()
