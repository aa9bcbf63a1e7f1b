"""Readers of texts, which name the file and line of a bad row."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from srmu.errors import SrmuError, first_line, suggest_word

MOST_BAD = 0.05  # share of rows that may be left out
SUFFIXES = ".jsonl .json .csv .parquet .txt"
COLUMN = re.compile(r"\{([^{}]+)\}")  # where a template has a column's text
SHOWN = 80  # characters of a value that an error may print: longer ones are texts


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where texts come from: a file or glob (`path`), or a data set of the hub (`dataset`).

    A `template` like "[INST] {question} [/INST]{answer}" makes a text of several columns. Losses
    count only what follows from its last column on; the tokens before have the label -100, as
    TOFU's code trains on answers after their questions (arXiv 2401.06121, data_module.py). Methods
    that work on activations steer and hold those tokens only. `where` takes only the rows that
    have these values. `wrap` joins all texts, a blank line between them, and cuts them into pieces
    of exactly max_length tokens, as MUSE's code does (arXiv 2407.06460, baselines/dataset.py);
    without it, each text is cut at max_length and loses its rest.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    path: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    template: str | None = None
    where: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    wrap: bool = False
    revision: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"  # skip: leave rows out that are no texts

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise SrmuError("a text source takes one of path (files) or dataset (a hub id)")
        if self.path and (self.name or self.revision or self.split != "train"):
            raise SrmuError(f"name, split and revision do not apply to the file {self.path}")
        if self.template is None:
            return
        if self.column != "text":
            raise SrmuError(f"{self.place}: a text source takes one of column and template")
        if not COLUMN.search(self.template):
            raise SrmuError(
                f"{self.place}: template {self.template!r} has no column; name one in braces, like "
                "'{question} {answer}'"
            )
        if self.wrap:
            raise SrmuError(f"{self.place}: wrap would part answers from their questions; leave out wrap or template")

    @property
    def place(self) -> str:
        """How errors name it."""
        return self.path or str(self.dataset)

    @property
    def columns(self) -> list[str]:
        """The columns that it reads."""
        texts = COLUMN.findall(self.template) if self.template else [self.column]
        return list(dict.fromkeys([*self.where, *texts]))


@dataclass(frozen=True, kw_only=True)
class RowSource(Source):
    """Texts, or rows with a text, that are in memory; errors call them by `path`."""

    rows: Iterable[Any] = ()


class TemplatedText(str):
    """A text made by a template; losses count it from the character `start` on."""

    __slots__ = ("start",)
    start: int


@dataclass
class RowReader:
    """Reads texts from rows; a row without one is an error, or is left out and counted."""

    source: Source
    bad: int = 0
    first: str = ""  # what was wrong with the first of them
    others: int = 0  # rows that `where` leaves out
    seen: dict[str, set[str]] = field(default_factory=dict)  # the values of the columns of `where`

    def take(self, read: Callable[[], str | None]) -> Iterator[str]:
        """The text that `read` returns, if the row has one and `where` takes it."""
        try:
            text = read()
        except SrmuError as error:
            if self.source.on_bad_row == "error":
                raise
            self.bad += 1
            self.first = self.first or str(error)
        else:
            self.others += text is None
            if text is not None:
                yield text

    def read_row(self, row: Any, place: str) -> str | None:
        """The text of a row; None if `where` leaves it out."""
        source = self.source
        if (source.where or source.template) and not isinstance(row, dict):
            raise SrmuError(f"{place}: where and template take columns, but the row has none")
        values = {column: str(read_cell(row, column, place)) for column in source.where}
        for column, value in values.items():
            if len(value) <= SHOWN:
                self.seen.setdefault(column, set()).add(value)
        if any(values[column] != str(value) for column, value in source.where.items()):
            return None
        if source.template is None:
            return read_text(row, source.column, place)
        words = COLUMN.split(source.template)  # text and column names, in turn
        words[1::2] = [read_text(row, column, place) for column in words[1::2]]
        text = TemplatedText("".join(words))
        text.start = sum(map(len, words[:-2]))
        return text

    def read_line(self, line: str, place: str) -> str | None:
        """The text of a line of JSON."""
        return self.read_row(parse_json(line, place), place)

    def explain_empty(self) -> SrmuError:
        """The error for a `where` that leaves out all rows."""
        for column, value in self.source.where.items():
            known = sorted(self.seen.get(column, ()))
            if str(value) not in known:
                hint = suggest_word(str(value), known) if known else ""
                if len(hint) > 4 * SHOWN:
                    hint = f"; the first of its {len(known)} values is {known[0]}"
                return SrmuError(f"{self.source.place}: no row has {column} {str(value)!r}{hint}")
        wanted = ", ".join(f"{column} {value!r}" for column, value in self.source.where.items())
        return SrmuError(f"{self.source.place}: no row has all of {wanted}; take one of them out")


def read_texts(sources: Sequence[Source]) -> list[str]:
    """All texts of the sources, in order."""
    return read_counted(sources)[0]


def read_counted(sources: Sequence[Source]) -> tuple[list[str], int]:
    """All texts of the sources, and the number of rows that were left out as they hold no text.

    SrmuError where these are many: then the file or the column is the wrong one.
    """
    texts: list[str] = []
    bad = 0
    for source in sources:
        rows = RowReader(source)
        before = len(texts)
        if isinstance(source, RowSource):
            for number, row in enumerate(source.rows, 1):
                texts += rows.take(partial(rows.read_row, row, f"{source.path}: row {number}"))
            if len(texts) == before:
                raise SrmuError(f"{source.path}: holds no text")
        elif source.dataset is not None:
            texts += read_hub(source, rows)
        else:
            pattern = str(Path(str(source.path)).expanduser())
            paths = sorted(glob.glob(pattern, recursive=True)) or [pattern]  # noqa: PTH207 - absolute patterns
            for path in map(Path, paths):
                texts += read_file(path, rows)
        count = len(texts) - before + rows.bad + rows.others
        if rows.bad > MOST_BAD * count:
            raise SrmuError(
                f"{rows.bad} of {count} rows are no texts, more than {MOST_BAD:.0%}; the first: {rows.first}"
            )
        if source.where and len(texts) == before:
            raise rows.explain_empty()
        bad += rows.bad
    return texts, bad


def read_file(path: Path, rows: RowReader) -> list[str]:
    """The texts of one file, by its suffix."""
    if not path.exists():
        raise SrmuError(f"{path}: no such file")
    if path.is_dir():
        raise SrmuError(f"{path} is a folder; name the files in it, for example '{path}/*.jsonl'")
    try:
        texts = list(_read_file(path, rows))
    except UnicodeDecodeError:
        raise SrmuError(f"{path}:{find_bad_line(path)}: not UTF-8 text; is it compressed?") from None
    except OSError as error:
        raise SrmuError(f"{path}: cannot be read: {first_line(error)}") from None
    if not texts and not rows.bad and not rows.others:
        raise SrmuError(f"{path}: holds no text")
    return texts


def find_bad_line(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    data, start = path.read_bytes(), 0
    try:
        data.decode()
    except UnicodeDecodeError as error:
        start = error.start
    return data.count(b"\n", 0, start) + 1


def _read_file(path: Path, rows: RowReader) -> Iterator[str]:
    suffix, columns = path.suffix.lower(), rows.source.columns
    if suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from rows.take(partial(rows.read_line, line, f"{path}:{number}"))
    elif suffix == ".json":
        listed = parse_json(path.read_text(encoding="utf-8-sig"), str(path), several_lines=True)
        if not isinstance(listed, list):
            wanted = ", ".join(map(repr, columns))
            raise SrmuError(f"{path}: expected a list of texts or of objects with {wanted}")
        for number, row in enumerate(listed, 1):
            yield from rows.take(partial(rows.read_row, row, f"{path}: row {number}"))
    elif suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(2**31 - 1)  # documents are longer than the 128 KiB of the default
            reader = csv.DictReader(file, strict=True)
            try:
                for row in reader:
                    if None in row:  # an unquoted comma would cut the text
                        raise csv.Error("more fields than the first line names")
                    yield from rows.take(partial(rows.read_row, row, f"{path}:{reader.line_num}"))
            except csv.Error as error:
                end = reader.reader.line_num  # also inside a row that does not end
                raise SrmuError(f"{path}:{end}: not CSV: {error}") from None
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                known = {*columns} <= {*file.schema_arrow.names}
                table = file.read(columns if known else None)
        except (pyarrow.ArrowException, OSError) as error:
            raise SrmuError(f"{path}: not Parquet: {first_line(error)}") from None
        for number, row in enumerate(table.to_pylist(), 1):
            yield from rows.take(partial(rows.read_row, row, f"{path}: row {number}"))
    elif suffix == ".txt":
        if rows.source.where or rows.source.template:
            raise SrmuError(f"{path}: where and template take columns; a .txt file has none")
        text = path.read_text(encoding="utf-8-sig").strip()
        # Paragraphs where blank lines part them, else a document a line.
        yield from filter(str.strip, text.split("\n\n") if "\n\n" in text else text.split("\n"))
    else:
        raise SrmuError(f"{path}: {suffix or 'no'} suffix; srmu reads {SUFFIXES}")


def parse_json(text: str, place: str, several_lines: bool = False) -> Any:
    """One JSON value; SrmuError naming the place where it is malformed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason, line = error.msg, f":{error.lineno}" if several_lines else ""
    except (ValueError, RecursionError):
        reason, line = "nested too deeply, or a number too long", ""
    raise SrmuError(f'{place}{line}: not JSON ({reason}); expected {{"text": "..."}}')


def read_cell(row: Mapping[str, Any], column: str, place: str) -> Any:
    """What a row holds in a column."""
    if column not in row:
        names = ", ".join(map(str, row)) or "none"
        raise SrmuError(f"{place}: no column {column!r}; found {names}")
    return row[column]


def read_text(row: Any, column: str, place: str) -> str:
    """The text of a row, which is an object with `column` or a plain string."""
    if isinstance(row, dict):
        row = read_cell(row, column, place)
    if not isinstance(row, str):
        raise SrmuError(f"{place}: {column!r} is {type(row).__name__}, expected a string")
    if not row.strip():
        raise SrmuError(f"{place}: the {column} is empty")
    try:
        row.encode()
    except UnicodeEncodeError:
        raise SrmuError(f"{place}: the {column} holds half of a surrogate pair") from None
    return row


def read_hub(source: Source, rows: RowReader) -> list[str]:
    """The texts of a hub data set; blank rows, which WikiText is full of, are left out."""
    from datasets import load_dataset

    try:
        table = load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # datasets raises many kinds; the user can mend each
        raise SrmuError(
            f"data set {source.dataset} cannot be loaded: {first_line(error)}; a gated set needs "
            "`hf auth login`, a local copy goes in as path: file.jsonl"
        ) from error
    for column in source.columns:
        if column not in table.column_names:
            raise SrmuError(
                f"data set {source.dataset} has no column {column!r}; found {', '.join(table.column_names)}"
            )
    texts: list[str] = []
    for number, row in enumerate(table.select_columns(source.columns), 1):
        text = "" if source.template else row[source.column]
        if source.template or not isinstance(text, str) or text.strip():
            texts += rows.take(partial(rows.read_row, row, f"{source.dataset} row {number}"))
    return texts
