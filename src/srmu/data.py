"""Texts to token batches: readers that name the bad row, and topics to unlearn."""

from __future__ import annotations

import csv
import glob
import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from srmu.errors import UserError, first_line
from srmu.files import cache_dir
from srmu.losses import counted
from srmu.model import Batch

Padding = Literal["mask", "count"]

MIN_TOKENS = 2  # a text with fewer carries no context
MOST_BAD = 0.05  # share of rows that may be left out
SUFFIXES = ".jsonl .json .csv .parquet .txt"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where texts come from: a file or glob (`path`), or a data set of the hub (`dataset`)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    path: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"  # skip: leave rows out that are no texts

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise UserError("a text source takes one of path (files) or dataset (a hub id)")
        if self.path and (self.name or self.revision or self.split != "train"):
            raise UserError(f"name, split and revision do not apply to the file {self.path}")


@dataclass(frozen=True)
class Topic:
    """One thing to forget, with what to keep beside it, as batches of tokens.

    `vocabulary` holds the ids of ordinary tokens (no special ones). `options` replaces options of
    the method for this topic. `counts` says what was read, without the texts. `own` holds texts
    that the original model wrote; they are in memory only.
    """

    name: str
    forget: Sequence[Batch]
    retain: Sequence[Batch]
    seed: int = 0
    vocabulary: Tensor = field(default_factory=lambda: torch.arange(0))
    options: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    own: Sequence[Sequence[int]] = ()

    def pairs(self) -> Iterator[tuple[Batch, Batch]]:
        """Endless (forget, retain) batches in order; the shorter set starts again.

        Without retain texts, the retain batches are empty.
        """

        def again(batches: Sequence[Batch]) -> Iterator[Batch]:
            while True:
                yield from batches or [{}]

        return zip(again(self.forget), again(self.retain), strict=False)

    def split(self) -> Topic:
        """This topic's forget texts as prompts with answers: only answers keep their labels.

        Plain texts have no questions: each is cut at a place drawn uniformly between a quarter and
        three quarters of its ordinary tokens, at least one of which lies on either side. The draw
        depends on the seed and the topic only.
        """
        generator = self.generator("split")

        def cut(batch: Batch) -> Batch:
            labels = batch["labels"].clone()
            ordinary = counted(labels) & torch.isin(batch["input_ids"], self.vocabulary)
            for row, marks in zip(labels, ordinary, strict=True):
                places = marks.nonzero()[:, 0]
                share = 0.25 + 0.5 * float(torch.rand((), generator=generator))
                first = min(max(1, round(share * len(places))), len(places) - 1)
                row[: places[first]] = -100
            return batch | {"labels": labels}

        return replace(self, forget=[cut(batch) for batch in self.forget])

    def followed(self, tick: Callable[[], None]) -> Topic:
        """This topic, calling `tick` whenever a batch of it has been used."""
        return replace(self, forget=Followed(self.forget, tick), retain=Followed(self.retain, tick))

    def tick(self) -> None:
        """Say that a part of something is done, to whom `followed` named."""
        if isinstance(self.forget, Followed):
            self.forget.tick()

    def generator(self, purpose: str, shared: bool = False) -> torch.Generator:
        """A random stream of its own for each purpose, the same on every device and run.

        `shared` leaves the topic's name out, so that all topics draw the same.
        """
        return torch.Generator().manual_seed(self.number(purpose, shared))

    def number(self, purpose: str, shared: bool = False) -> int:
        """The seed of the random stream for a purpose."""
        key = f"{self.seed}/{purpose}/{'' if shared else self.name}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1

    def anchored(self, share: float) -> Topic:
        """This topic with a share of each retain batch replaced by random-token rows.

        If there are `own` texts, these take their place in turn, padded on the right. The rows are
        fixed for a batch, so that what is computed from it can be cached.
        """
        generator = self.generator("anchors")
        turn = cycle(self.own)
        largest = max(len(batch["input_ids"]) for batch in self.retain)
        if round(share * largest) == 0:
            raise UserError(
                f"anchor_share={share:g} of a retain batch of {largest} is no row; raise it"
            )

        def mix(batch: Batch) -> Batch:
            ids, mask, labels = (
                batch[k].clone() for k in ("input_ids", "attention_mask", "labels")
            )
            rows = round(share * len(ids))
            if rows == 0:  # a short last batch
                return batch
            if self.own:
                ids[-rows:], mask[-rows:], labels[-rows:] = 0, 0, -100
                for i in range(len(ids) - rows, len(ids)):
                    row = torch.tensor(next(turn)[: ids.shape[1]])
                    ids[i, : len(row)] = labels[i, : len(row)] = row
                    mask[i, : len(row)] = 1
                return {"input_ids": ids, "attention_mask": mask, "labels": labels}
            special = ~torch.isin(ids[-rows:], self.vocabulary)
            draw = torch.randint(len(self.vocabulary), (rows, ids.shape[1]), generator=generator)
            first = ids[-rows:, :1].clone()  # a leading <s> stays
            ids[-rows:] = self.vocabulary[draw]
            ids[-rows:, :1] = torch.where(special[:, :1], first, ids[-rows:, :1])
            mask[-rows:], labels[-rows:] = 1, ids[-rows:]
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        return replace(self, retain=[mix(batch) for batch in self.retain])


@dataclass(frozen=True)
class Followed(Sequence[Batch]):
    """Batches that call `tick` after each one that a loop has done with."""

    batches: Sequence[Batch]
    tick: Callable[[], None]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, key: Any) -> Any:
        part = self.batches[key]
        return Followed(part, self.tick) if isinstance(key, slice) else part

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch
            self.tick()


def in_turn(parts: Sequence[Sequence[Batch]]) -> list[Batch]:
    """A batch of each part, another of each, and so on: the first few are of all parts."""
    rows = zip_longest(*parts)
    return [batch for row in rows for batch in row if batch is not None]


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
    """Read, check, tokenise and batch one topic. UserError names the file and line at fault.

    `held_out` says by role how many different texts are left out, to be measured on.
    """
    texts, bad = {}, {}
    for role, sources in (("forget", forget), ("retain", retain)):
        texts[role], bad[role] = read_counted(sources, base)
    for role, count in held_out.items():
        texts[role], _ = apart(texts[role], count)
    if not texts["forget"]:
        raise UserError(f"topic {name}: no forget texts; name topics.{name}.forget (--forget)")
    if set(texts["forget"]) == set(texts["retain"]):
        raise UserError(
            f"topic {name}: forget and retain hold the same texts; "
            "retain must name what the model should keep"
        )
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    topic = Topic(name, [], [], seed, torch.tensor(ordinary), options)
    batches: dict[str, list[Batch]] = {}
    counts = {}
    for role, length in (("forget", max_length), ("retain", retain_max_length)):
        rows = tokenise(texts[role], tokenizer, length) if texts[role] else []
        if texts[role] and not rows:
            raise UserError(
                f"topic {name}: all {len(texts[role])} {role} texts are too short "
                f"(under {MIN_TOKENS} tokens)"
            )
        if shuffle:
            order = torch.randperm(len(rows), generator=topic.generator(f"shuffle {role}"))
            rows = [rows[i] for i in order.tolist()]
        batches[role] = list(batch_up(rows, tokenizer, batch_size, padding))
        counts[role] = {
            "documents": len(rows),
            "too_short": len(texts[role]) - len(rows),
            "bad_rows": bad[role],
            "tokens": sum(map(len, rows)),
            "digest": digest(texts[role]),
        }
    return replace(topic, forget=batches["forget"], retain=batches["retain"], counts=counts)


def tokenise(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Token ids of each text, cut at `max_length` tokens; texts that are too short left out."""
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and any(row[:2] == [bos, bos] for row in rows):
        raise UserError(
            f"texts begin with {tokenizer.bos_token}, and the tokenizer adds it again; "
            "take it out of the texts"
        )
    special = set(tokenizer.all_special_ids)
    return [row for row in rows if sum(i not in special for i in row) >= MIN_TOKENS]


def batch_up(
    rows: Sequence[list[int]], tokenizer: Any, batch_size: int, padding: Padding
) -> Iterator[Batch]:
    """Batches in order. `mask` pads right and counts real tokens only; `count` pads left and
    counts the padding too, as the public RMU code does."""
    pad = pad_id(tokenizer)
    for start in range(0, len(rows), batch_size):
        chunk = [torch.tensor(row) for row in rows[start : start + batch_size]]
        side = "right" if padding == "mask" else "left"

        def stack(values: list[Tensor], fill: int, side: str = side) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=fill, padding_side=side
            )

        ids = stack(chunk, pad)
        mask = stack([torch.ones_like(row) for row in chunk], 0)
        labels = ids if padding == "count" else ids.masked_fill(mask == 0, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pad_id(tokenizer: Any) -> int:
    """The id to pad with; eos where there is no pad token (it is masked)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(
        "the tokenizer has neither a pad nor an eos token; "
        "set pad_token in the model's tokenizer_config.json"
    )


def own_key() -> bytes:
    """This user's secret of 32 bytes, drawn on first use; processes that race get the same.

    Where the cache folder cannot be used it lasts as long as the process: a later run then takes
    its texts for others.
    """
    path = cache_dir() / "key"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".key.{os.getpid()}")
            fresh.write_bytes(os.urandom(32))
            fresh.chmod(0o600)
            with suppress(FileExistsError):  # another process was faster: its key holds
                os.link(fresh, path)
            fresh.unlink()
        return path.read_bytes()
    except OSError:
        return passing_key()


@cache
def passing_key() -> bytes:
    return os.urandom(32)


def digest(texts: Iterable[str]) -> str:
    """Keyed digest of the texts: it tells two data sets apart here and says nothing elsewhere."""
    code = hmac.new(own_key(), digestmod="sha256")
    for text in texts:
        code.update(text.encode() + b"\0")
    return code.hexdigest()


def apart(texts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Texts without `count` different ones, and these: by their digests, so always the same."""
    order = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    held = {*order[:count]}
    return [text for text in texts if text not in held], order[:count]


@dataclass
class Rows:
    """What becomes of a row that is no text: an error, or it is left out and counted."""

    skip: bool
    bad: int = 0
    first: str = ""  # what was wrong with the first of them

    def take(self, text: Callable[[], str]) -> Iterator[str]:
        try:
            yield text()
        except UserError as error:
            if not self.skip:
                raise
            self.bad += 1
            self.first = self.first or str(error)


def read(sources: Sequence[Source], base: Path) -> list[str]:
    """All texts of the sources in order; relative paths start at `base`."""
    return read_counted(sources, base)[0]


def read_counted(sources: Sequence[Source], base: Path) -> tuple[list[str], int]:
    """`read`, and how many rows were left out because they are no texts.

    UserError where these are many: then it is the file or the column that is wrong.
    """
    texts: list[str] = []
    bad = 0
    for source in sources:
        rows = Rows(source.on_bad_row == "skip")
        before = len(texts)
        if source.dataset is not None:
            texts += read_hub(source, rows)
        else:
            pattern = str(base / Path(str(source.path)).expanduser())
            paths = sorted(glob.glob(pattern, recursive=True)) or [pattern]  # noqa: PTH207 - absolute patterns
            for path in map(Path, paths):
                texts += read_file(path, source.column, rows)
        count = len(texts) - before + rows.bad
        if rows.bad > MOST_BAD * count:
            raise UserError(
                f"{rows.bad} of {count} rows are no texts, more than {MOST_BAD:.0%}; the first: "
                f"{rows.first}"
            )
        bad += rows.bad
    return texts, bad


def read_file(path: Path, column: str, rows: Rows) -> list[str]:
    """The texts of one file, by its suffix."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the files in it, for example '{path}/*.jsonl'")
    try:
        texts = list(_read_file(path, column, rows))
    except UnicodeDecodeError:
        raise UserError(f"{path}:{bad_line(path)}: not UTF-8 text; is it compressed?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if not texts and not rows.bad:
        raise UserError(f"{path}: holds no text")
    return texts


def bad_line(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    data, start = path.read_bytes(), 0
    try:
        data.decode()
    except UnicodeDecodeError as error:
        start = error.start
    return data.count(b"\n", 0, start) + 1


def _read_file(path: Path, column: str, rows: Rows) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from rows.take(partial(in_line, line, column, f"{path}:{number}"))
    elif suffix == ".json":
        listed = parse(path.read_text(encoding="utf-8-sig"), str(path), several_lines=True)
        if not isinstance(listed, list):
            raise UserError(f"{path}: expected a list of texts or of objects with {column!r}")
        for number, row in enumerate(listed, 1):
            yield from rows.take(partial(checked, row, column, f"{path}: row {number}"))
    elif suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(2**31 - 1)  # documents are longer than the 128 KiB of the default
            reader = csv.DictReader(file, strict=True)
            try:
                for row in reader:
                    if None in row:  # an unquoted comma would cut the text
                        raise csv.Error("more fields than the first line names")
                    place = f"{path}:{reader.line_num}"
                    yield from rows.take(partial(checked, row, column, place))
            except csv.Error as error:
                end = reader.reader.line_num  # also inside a row that does not end
                raise UserError(f"{path}:{end}: not CSV: {error}") from None
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                found = file.schema_arrow.names
                table = file.read([column] if column in found else None)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not Parquet: {first_line(error)}") from None
        for number, row in enumerate(table.to_pylist(), 1):
            yield from rows.take(partial(checked, row, column, f"{path}: row {number}"))
    elif suffix == ".txt":
        text = path.read_text(encoding="utf-8-sig").strip()
        # Paragraphs where blank lines part them, else a document a line.
        yield from filter(str.strip, text.split("\n\n") if "\n\n" in text else text.split("\n"))
    else:
        raise UserError(f"{path}: {suffix or 'no'} suffix; srmu reads {SUFFIXES}")


def in_line(line: str, column: str, place: str) -> str:
    """The text of a line of JSON."""
    return checked(parse(line, place), column, place)


def parse(text: str, place: str, several_lines: bool = False) -> Any:
    """One JSON value; UserError naming the place where it is malformed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason, line = error.msg, f":{error.lineno}" if several_lines else ""
    except (ValueError, RecursionError):
        reason, line = "nested too deeply, or a number too long", ""
    raise UserError(f'{place}{line}: not JSON ({reason}); expected {{"text": "..."}}')


def checked(row: Any, column: str, place: str) -> str:
    """The text of a row, which is an object with `column` or a plain string."""
    if isinstance(row, dict):
        if column not in row:
            found = ", ".join(map(str, row)) or "none"
            raise UserError(f"{place}: no column {column!r}; found {found}")
        row = row[column]
    if not isinstance(row, str):
        raise UserError(f"{place}: {column!r} is {type(row).__name__}, expected a string")
    if not row.strip():
        raise UserError(f"{place}: the text is empty")
    try:
        row.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: the text holds half of a surrogate pair") from None
    return row


def read_hub(source: Source, rows: Rows) -> list[str]:
    """The texts of a hub data set; blank rows, which WikiText is full of, are left out."""
    from datasets import load_dataset

    try:
        table = load_dataset(
            source.dataset, source.name, split=source.split, revision=source.revision
        )
    except Exception as error:  # datasets raises many kinds; each is the user's to mend
        raise UserError(
            f"data set {source.dataset} cannot be loaded: {first_line(error)}; a gated set needs "
            "`hf auth login`, a local copy goes in as path: file.jsonl"
        ) from error
    if source.column not in table.column_names:
        raise UserError(
            f"data set {source.dataset} has no column {source.column!r}; "
            f"found {', '.join(table.column_names)}"
        )
    found: list[str] = []
    for number, row in enumerate(table[source.column], 1):
        if not isinstance(row, str) or row.strip():
            place = f"{source.dataset} row {number}"
            found += rows.take(partial(checked, row, source.column, place))
    return found
