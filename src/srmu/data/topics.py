"""Sources to a topic that a method can train on."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from srmu.data.digest import digest_texts, own_key
from srmu.data.overlap import count_shared
from srmu.data.sources import Source, read_counted
from srmu.data.tokens import MIN_TOKENS, EncodedRow, batch_rows, encode_texts, has_template, wrap_texts
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError

ROLES = ("forget", "retain")
Parts = list[tuple[Source, list[str]]]  # the texts of each source


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
        return self.model_dump(include={"coeff", "kappa", "alpha"}, exclude_none=True)


def load_topic(name: str, config: TopicConfig, tokenizer: Any, train: TrainOptions, seed: int) -> Topic:
    """Read, check, tokenise and batch one topic. SrmuError names the file and line at fault."""
    parts: dict[str, Parts] = {}
    bad_rows: dict[str, int] = {}
    for role in ROLES:
        read = [(source, *read_counted(source)) for source in getattr(config, role)]
        bad_rows[role] = sum(bad for _, _, bad in read)
        texts = [text for _, part, _ in read for text in part]
        held = {*split_held_out(texts, getattr(config, f"{role}_held_out"))[1]}
        parts[role] = [(source, [text for text in part if text not in held]) for source, part, _ in read]
    forget, retain = ([text for _, texts in parts[role] for text in texts] for role in ROLES)
    if not forget:
        raise SrmuError(f"topic {name}: no forget texts; name them: forget, or topics.{name}.forget in a config")
    shared = {"forget": count_shared(forget, retain), "retain": count_shared(retain, forget)}
    if shared["forget"] == len(forget):
        same = shared["retain"] == len(retain)
        what = "forget and retain hold the same texts" if same else "retain holds all of the forget texts"
        raise SrmuError(f"topic {name}: {what}; retain must name what the model should keep")
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    topic = Topic(name, [], [], seed, torch.tensor(ordinary), config.options)
    batches, counts = {}, {}
    for role, length in zip(ROLES, (config.max_length, config.retain_max_length or config.max_length), strict=True):
        batches[role], counts[role] = batch_role(topic, role, parts[role], length, tokenizer, train)
        counts[role] |= {"bad_rows": bad_rows[role], "shared": shared[role]}
    return replace(topic, forget=batches["forget"], retain=batches["retain"], counts=counts)


def batch_role(
    topic: Topic, role: str, parts: Parts, length: int, tokenizer: Any, train: TrainOptions
) -> tuple[list[Batch], dict[str, Any]]:
    """The batches of one role, in the order of training, and what the record says of them."""
    rows: list[EncodedRow] = []
    short = 0
    for source, part in parts:
        if source.wrap and part:
            rows += [(piece, [True] * length) for piece in wrap_texts(part, tokenizer, length, source.place)]
        elif part:
            encoded = encode_texts(part, tokenizer, length)
            rows, short = rows + encoded, short + len(part) - len(encoded)
    texts = [text for _, part in parts for text in part]
    if texts and not rows:
        why = f"(under {MIN_TOKENS} tokens, or none to count in losses)"
        raise SrmuError(f"topic {topic.name}: all {len(texts)} {role} texts are too short {why}")
    if train.padding == "count" and not all(all(counted) for _, counted in rows):
        why = "of questions, chats and templates only a part counts, so padding must not"
        raise SrmuError(f"topic {topic.name}: {why}: set train.padding=mask")
    if train.shuffle:
        order = torch.randperm(len(rows), generator=topic.generator(f"shuffle {role}"))
        rows = [rows[i] for i in order.tolist()]
    ids, counted = [row for row, _ in rows], [marks for _, marks in rows]
    counts = {
        "documents": len(texts) - short,
        "too_short": short,
        "tokens": sum(map(len, ids)),
        "digest": digest_texts(texts),
        "taken": dict(Counter(taken for text in texts if (taken := describe_taken(text, tokenizer)))),
        "key": hashlib.sha256(own_key()).hexdigest()[:16],  # tells whether two digests can be compared
    }
    return list(batch_rows(ids, tokenizer, train.batch_size, train.padding, counted)), counts


def split_held_out(texts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Texts without `count` different ones, and these: by their digests, so always the same."""
    order = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    held = {*order[:count]}
    return [text for text in texts if text not in held], order[:count]


def explain_rows(topic: str, counts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What rows are read as, and how many are left out, a sentence each; `counts` as a topic has them, by role."""
    for role in ROLES:
        if bad := counts.get(role, {}).get("bad_rows"):
            yield f"{topic}: {bad} {role} rows hold no text and are left out"
        if short := counts.get(role, {}).get("too_short"):
            total = short + counts[role]["documents"]
            yield f"{topic}: {short} of {total} {role} texts are left out: too short, or cut before their answer"
        for taken, number in counts.get(role, {}).get("taken", {}).items():
            yield f"{topic}: {number} {role} rows are read as {taken}; losses count the answers"


def describe_taken(text: str, tokenizer: Any) -> str:
    """What a row's text was made of, and how it is written; "" for a row of one text."""
    taken = getattr(text, "taken", "")
    return f"{taken}, in the model's chat template" if has_template(text, tokenizer) else taken
