"""Texts to rows of tokens, and rows to padded batches."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from srmu.engine.generate import pad_rows
from srmu.engine.topic import Batch, Padding
from srmu.errors import SrmuError

MIN_TOKENS = 2  # a text with fewer carries no context


def tokenise_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Token ids of each text, cut at `max_length` tokens; texts that are too short left out."""
    return [row for row, _ in encode_texts(texts, tokenizer, max_length)]


def encode_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[tuple[list[int], int]]:
    """Token ids of each text, with the number of first tokens that losses leave out.

    Of a template's text, losses count the tokens from the first one on that holds a part of its last column; a text
    that is cut before that is too short.
    """
    starts: list[int] = [getattr(text, "start", 0) for text in texts]  # of a TemplatedText
    if any(starts) and not tokenizer.is_fast:
        advice = "take one with a tokenizer.json, or leave the template out and name a column"
        raise SrmuError(f"a template needs a tokenizer that knows where its tokens are in a text: {advice}")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_offsets_mapping=any(starts))
    refuse_second_bos(encoded["input_ids"], tokenizer)
    special = set(tokenizer.all_special_ids)
    rows = []
    for i, (row, start) in enumerate(zip(encoded["input_ids"], starts, strict=True)):
        spans = encoded["offset_mapping"][i] if start else []
        before = next((k for k, (_, end) in enumerate(spans) if end > start), len(spans))
        words = [token not in special for token in row]
        if sum(words) >= MIN_TOKENS and any(words[before:]):
            rows.append((row, before))
    return rows


def wrap_texts(texts: Sequence[str], tokenizer: Any, max_length: int, place: str = "texts") -> list[list[int]]:
    """All texts, a blank line between them, in pieces of exactly `max_length` tokens, each after a BOS token if any.

    The last is filled up with the start of the first (arXiv 2407.06460, load_data.py and baselines/dataset.py).
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    bos = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
    size = max_length - len(bos)
    if len(ids) < size:
        short = f"all texts together are {len(ids)} tokens, too few for a piece of {max_length}"
        raise SrmuError(f"{place}: {short}; lower max_length, or leave out wrap")
    rows = [bos + ids[at : at + size] for at in range(0, len(ids), size)]
    rows[-1] = (rows[-1] + rows[0])[:max_length]
    refuse_second_bos(rows, tokenizer)
    return rows


def refuse_second_bos(rows: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """SrmuError where a row begins with two BOS tokens."""
    bos = tokenizer.bos_token_id
    if bos is not None and any([*row[:2]] == [bos, bos] for row in rows):
        begin = f"texts begin with {tokenizer.bos_token}"
        raise SrmuError(f"{begin}, and the tokenizer adds it again; take it out of the texts")


def batch_rows(
    rows: Sequence[list[int]], tokenizer: Any, batch_size: int, padding: Padding, before: Sequence[int] = ()
) -> Iterator[Batch]:
    """Batches of rows, in order.

    `mask` pads right and counts real tokens only; `count` pads left and counts the padding too, as the public RMU code
    does. `before`: how many of each row's first tokens losses leave out.
    """
    stack = partial(pad_rows, padding_side="right" if padding == "mask" else "left")
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        ids = stack(chunk, padding_value=pad_id(tokenizer))
        mask = stack([1] * len(row) for row in chunk)
        labels = ids if padding == "count" else ids.masked_fill(mask == 0, -100)
        if any(first := before[start : start + batch_size]):
            late = stack([i < count for i in range(len(row))] for row, count in zip(chunk, first, strict=True))
            labels = labels.masked_fill(late, -100)
        yield Batch(input_ids=ids, attention_mask=mask, labels=labels)


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the pad token's, else the eos token's, as padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise SrmuError("the tokenizer has neither a pad nor an eos token: set pad_token in its tokenizer_config.json")
