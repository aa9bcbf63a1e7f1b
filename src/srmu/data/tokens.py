"""Texts to rows of tokens, and rows to padded batches."""

from collections.abc import Iterator, Sequence
from functools import partial
from operator import and_
from typing import Any, TypeGuard

from srmu.data.rows import CountedText, render_chat
from srmu.engine.generate import pad_rows
from srmu.engine.topic import Batch, Padding
from srmu.errors import SrmuError

MIN_TOKENS = 2  # a text with fewer carries no context

EncodedRow = tuple[list[int], list[bool]]  # tokens, and which of them losses count


def tokenise_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Token ids of each text, cut at `max_length` tokens; texts that are too short left out."""
    return [row for row, _ in encode_texts(texts, tokenizer, max_length)]


def encode_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[EncodedRow]:
    """Token ids of each text, cut at `max_length`, and which of them losses count.

    Of a `CountedText` they count the tokens that hold a part of its spans, and those that the tokenizer adds after one.
    A chat is written in the tokenizer's chat template, if it has one. Left out is a text with too few tokens, or with
    none that counts.
    """
    if any(getattr(text, "spans", ()) for text in texts) and not tokenizer.is_fast:
        advice = "take one with a tokenizer.json, or name one column to read"
        raise SrmuError(f"questions, chats and templates need a tokenizer that knows where its tokens are: {advice}")
    special = {*tokenizer.all_special_ids}
    chats = {i: render_chat(text, tokenizer) for i, text in enumerate(texts) if has_template(text, tokenizer)}
    plain = {i: text for i, text in enumerate(texts) if i not in chats}
    found: dict[int, EncodedRow] = {}
    for part, added in ((plain, True), (chats, False)):  # a template has special tokens of its own
        encoded = encode_part([*part.values()], tokenizer, max_length, added)
        for i, (row, counted) in zip(part, encoded, strict=True):
            words = [token not in special for token in row]
            if sum(words) >= MIN_TOKENS and any(map(and_, words, counted)):
                found[i] = row, counted
    return [found[i] for i in sorted(found)]


def encode_part(texts: Sequence[str], tokenizer: Any, max_length: int, special: bool) -> list[EncodedRow]:
    """`encode_texts` of texts that are as they will be read; `special`: with the tokens that the tokenizer adds."""
    if not texts:
        return []
    spans = [getattr(text, "spans", ()) for text in texts]
    how = {"truncation": True, "max_length": max_length, "return_offsets_mapping": any(spans)}
    encoded = tokenizer([*texts], add_special_tokens=special, **how)
    refuse_second_bos(encoded["input_ids"], tokenizer)
    rows = enumerate(encoded["input_ids"])
    counted = {i: mark_tokens(encoded["offset_mapping"][i], own) for i, own in enumerate(spans) if own}
    return [(row, counted.get(i, [True] * len(row))) for i, row in rows]


def read_ids(text: str, tokenizer: Any) -> list[int]:
    """All tokens of a text; of a chat those of the tokenizer's chat template, if it has one."""
    if has_template(text, tokenizer):
        return tokenizer(render_chat(text, tokenizer), add_special_tokens=False)["input_ids"]
    return tokenizer(text)["input_ids"]


def has_template(text: str, tokenizer: Any) -> TypeGuard[CountedText]:
    """Whether a text is a chat, and the tokenizer has a template for it."""
    return isinstance(text, CountedText) and bool(text.turns) and bool(getattr(tokenizer, "chat_template", None))


def mark_tokens(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a part of a span; after one, also those at the end that stand for no character."""
    counted = [any(start < end and first < stop for first, end in spans) for start, stop in places]
    last = max((k for k, (start, stop) in enumerate(places) if start < stop), default=0)
    counted[last + 1 :] = [counted[last]] * (len(counted) - last - 1)
    return counted


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
    rows: Sequence[list[int]], tokenizer: Any, batch_size: int, padding: Padding, counted: Sequence[list[bool]] = ()
) -> Iterator[Batch]:
    """Batches of rows, in order.

    `mask` pads right and counts real tokens only; `count` pads left and counts the padding too, as the public RMU code
    does. `counted`: which tokens of each row losses count; default: all.
    """
    stack = partial(pad_rows, padding_side="right" if padding == "mask" else "left")
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        ids = stack(chunk, padding_value=pad_id(tokenizer))
        mask = stack([1] * len(row) for row in chunk)
        labels = ids if padding == "count" else ids.masked_fill(mask == 0, -100)
        if counted:
            labels = labels.masked_fill(stack(counted[start : start + batch_size], padding_value=1) == 0, -100)
        yield Batch(input_ids=ids, attention_mask=mask, labels=labels)


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the pad token's, else the eos token's, as padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise SrmuError("the tokenizer has neither a pad nor an eos token: set pad_token in its tokenizer_config.json")
