"""Sources to a topic that a method can train on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from srmu.data.digest import digest_texts, name_key
from srmu.data.sources import Source, read_counted
from srmu.data.tokens import MIN_TOKENS, batch_rows, encode_texts, wrap_texts
from srmu.engine.batch import Batch
from srmu.engine.topic import Topic
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError

ROLES = ("forget", "retain")


def list_sources(value: Any) -> Any:
    """A path, a mapping, or a list of these, as a list of mappings."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [{"path": v} if isinstance(v, str | Path) else v for v in values]


class TopicConfig(BaseModel):
    """One topic's texts and lengths, and the strength where it differs between topics."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forget: Annotated[list[Source], BeforeValidator(list_sources)]
    retain: Annotated[list[Source], BeforeValidator(list_sources)] = []  # some methods need none
    max_length: int = Field(512, ge=MIN_TOKENS)  # tokens of a forget text
    retain_max_length: int | None = Field(None, ge=MIN_TOKENS)  # None: as max_length
    forget_held_out: int = Field(0, ge=0)  # different texts that are not trained on
    retain_held_out: int = Field(0, ge=0)
    coeff: float | None = None
    kappa: float | None = None
    alpha: float | None = None

    @property
    def options(self) -> dict[str, float]:
        """What this topic sets in place of the method's own options."""
        values = {name: getattr(self, name) for name in ("coeff", "kappa", "alpha")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class RoleTexts:
    """The forget or the retain texts of a topic, without those that are held out."""

    role: str
    sources: Sequence[Source]
    parts: Sequence[Sequence[str]]  # of each source
    bad_rows: int

    @property
    def texts(self) -> list[str]:
        return [*chain(*self.parts)]


def load_topic(name: str, config: TopicConfig, tokenizer: Any, train: TrainOptions, seed: int) -> Topic:
    """Read, check, tokenise and batch one topic. SrmuError names the file and line at fault."""
    held_out = config.forget_held_out, config.retain_held_out
    forget, retain = (read_role(role, getattr(config, role), held) for role, held in zip(ROLES, held_out, strict=True))
    if not forget.texts:
        raise SrmuError(f"topic {name}: no forget texts; name topics.{name}.forget (--forget)")
    if set(forget.texts) == set(retain.texts):
        raise SrmuError(
            f"topic {name}: forget and retain hold the same texts; retain must name what the model should keep"
        )
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    topic = Topic(name, [], [], seed, torch.tensor(ordinary), config.options)
    lengths = config.max_length, config.retain_max_length or config.max_length
    batches, counts = zip(
        *(
            batch_role(topic, texts, length, tokenizer, train)
            for texts, length in zip((forget, retain), lengths, strict=True)
        ),
        strict=True,
    )
    return replace(topic, forget=batches[0], retain=batches[1], counts=dict(zip(ROLES, counts, strict=True)))


def read_role(role: str, sources: Sequence[Source], held_out: int) -> RoleTexts:
    """Read the texts of one role; `held_out` different ones are left out, to be measured on."""
    results = [read_counted([source]) for source in sources]
    parts = [texts for texts, _ in results]
    held = {*split_held_out([*chain(*parts)], held_out)[1]}
    parts = [[text for text in part if text not in held] for part in parts]
    return RoleTexts(role, sources, parts, sum(bad for _, bad in results))


def batch_role(
    topic: Topic, texts: RoleTexts, length: int, tokenizer: Any, train: TrainOptions
) -> tuple[list[Batch], dict[str, Any]]:
    """The batches of one role, in the order of training, and what the record says of them."""
    rows: list[tuple[list[int], int]] = []
    short = 0
    for source, part in zip(texts.sources, texts.parts, strict=True):
        if source.wrap and part:
            rows += [(piece, 0) for piece in wrap_texts(part, tokenizer, length, source.place)]
        elif part:
            encoded = encode_texts(part, tokenizer, length)
            rows, short = rows + encoded, short + len(part) - len(encoded)
    count = len(texts.texts)
    if count and not rows:
        raise SrmuError(
            f"topic {topic.name}: all {count} {texts.role} texts are too short "
            f"(under {MIN_TOKENS} tokens, or none to count in losses)"
        )
    if train.padding == "count" and any(before for _, before in rows):
        raise SrmuError(
            f"topic {topic.name}: of texts of a template only the end counts, not the padding; train.padding=mask"
        )
    if train.shuffle:
        order = torch.randperm(len(rows), generator=topic.generator(f"shuffle {texts.role}"))
        rows = [rows[i] for i in order.tolist()]
    ids, before = [row for row, _ in rows], [count for _, count in rows]
    counts = {
        "documents": count - short,
        "too_short": short,
        "bad_rows": texts.bad_rows,
        "tokens": sum(map(len, ids)),
        "digest": digest_texts(texts.texts),
        "key": name_key(),
    }
    return list(batch_rows(ids, tokenizer, train.batch_size, train.padding, before)), counts


def split_held_out(texts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Texts without `count` different ones, and these: by their digests, so always the same."""
    order = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    held = {*order[:count]}
    return [text for text in texts if text not in held], order[:count]
