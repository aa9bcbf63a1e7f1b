"""Sources to a topic that a method can train on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from srmu.data.digest import digest_texts
from srmu.data.sources import Source, read_counted
from srmu.data.tokens import MIN_TOKENS, batch_rows, encode_texts, wrap_texts
from srmu.engine.batch import Batch
from srmu.engine.topic import Padding, Topic
from srmu.errors import SrmuError


def load_topic(
    name: str,
    forget: Sequence[Source],
    retain: Sequence[Source],
    tokenizer: Any,
    *,
    base: Path,
    batch_size: int,
    max_length: int,
    retain_max_length: int,
    shuffle: bool,
    padding: Padding,
    seed: int,
    options: Mapping[str, float],
    held_out: Mapping[str, int] = {},
) -> Topic:
    """Read, check, tokenise and batch one topic. SrmuError names the file and line at fault.

    `held_out` says by role how many different texts are left out, to be measured on.
    """
    sources = {"forget": forget, "retain": retain}
    parts: dict[str, list[list[str]]] = {}  # of each source
    texts, bad = {}, {}
    for role in sources:
        found = [read_counted([source], base) for source in sources[role]]
        parts[role], bad[role] = [part for part, _ in found], sum(count for _, count in found)
        held = {*split_held_out([*chain(*parts[role])], held_out.get(role, 0))[1]}
        parts[role] = [[text for text in part if text not in held] for part in parts[role]]
        texts[role] = [*chain(*parts[role])]
    if not texts["forget"]:
        raise SrmuError(f"topic {name}: no forget texts; name topics.{name}.forget (--forget)")
    if set(texts["forget"]) == set(texts["retain"]):
        raise SrmuError(
            f"topic {name}: forget and retain hold the same texts; "
            "retain must name what the model should keep"
        )
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    topic = Topic(name, [], [], seed, torch.tensor(ordinary), options)
    batches: dict[str, list[Batch]] = {}
    counts = {}
    for role, length in (("forget", max_length), ("retain", retain_max_length)):
        rows: list[tuple[list[int], int]] = []
        short = 0
        for source, part in zip(sources[role], parts[role], strict=True):
            if source.wrap and part:
                rows += [(piece, 0) for piece in wrap_texts(part, tokenizer, length, source.place)]
            elif part:
                few = encode_texts(part, tokenizer, length)
                rows, short = rows + few, short + len(part) - len(few)
        if texts[role] and not rows:
            raise SrmuError(
                f"topic {name}: all {len(texts[role])} {role} texts are too short "
                f"(under {MIN_TOKENS} tokens, or none to count in losses)"
            )
        if padding == "count" and any(before for _, before in rows):
            raise SrmuError(
                f"topic {name}: of texts of a template only the end counts, not the padding; "
                "train.padding=mask"
            )
        if shuffle:
            order = torch.randperm(len(rows), generator=topic.generator(f"shuffle {role}"))
            rows = [rows[i] for i in order.tolist()]
        ids, before = [row for row, _ in rows], [count for _, count in rows]
        batches[role] = list(batch_rows(ids, tokenizer, batch_size, padding, before))
        counts[role] = {
            "documents": len(texts[role]) - short,
            "too_short": short,
            "bad_rows": bad[role],
            "tokens": sum(map(len, ids)),
            "digest": digest_texts(texts[role]),
        }
    return replace(topic, forget=batches["forget"], retain=batches["retain"], counts=counts)


def split_held_out(texts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Texts without `count` different ones, and these: by their digests, so always the same."""
    order = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    held = {*order[:count]}
    return [text for text in texts if text not in held], order[:count]
