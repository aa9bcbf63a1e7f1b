"""Readers of texts, which name the file and line of a bad row."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from srmu.data.rows import CHATS, KNOWN, TEXT, join_counted, read_cell, read_text, take_row
from srmu.engine.files import find_paths
from srmu.errors import SrmuError, first_line, suggest_path, suggest_word

MOST_BAD = 0.05  # share of rows that may be left out
SHOWN = 80  # characters of a value that an error may print: longer ones are texts
SAVED = ("state.json", "dataset_dict.json")  # in a folder that `datasets` saved
PACKED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
COLUMN = re.compile(r"\{([^{}]+)\}")  # where a template has a column's text
JINJA = re.compile(r"\{\{\s*\w+\s*\}\}")
BAD_BYTE = re.compile("[\udc80-\udcff]")  # how Python escapes a byte that is not UTF-8


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where texts come from: a file or glob (`path`), or a data set of the hub (`dataset`).

    A row without a `text` may hold a question with its answer, or a chat: `take_row` tells them by their columns. A
    `template` like "[INST] {question} [/INST]{answer}" makes a text of several columns. Losses, and methods that work
    on activations, count only answers, and what follows from a template's last column on; the tokens before have the
    label -100, as TOFU's code trains on answers after their questions (arXiv 2401.06121, data_module.py). `where` takes
    only the rows that have these values. `wrap` joins all texts and cuts them into pieces of exactly max_length tokens,
    as MUSE's code does (arXiv 2407.06460, baselines/dataset.py); without it, each text is cut at max_length and loses
    its rest.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    path: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = TEXT
    template: str | None = None
    where: dict[str, str | int | float | bool] = field(default_factory=dict)
    wrap: bool = False
    plain: bool = False  # of questions and chats the plain form, not the model's chat template
    revision: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"  # skip: leave out rows that hold no text

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise SrmuError("a text source takes one of path (files) or dataset (a hub id)")
        if self.path and (self.name or self.revision or self.split != "train"):
            raise SrmuError(f"name, split and revision do not apply to the file {self.path}")
        if self.plain and self.column != TEXT:
            raise SrmuError(f"{self.place}: plain is for questions and chats; leave out plain or column")
        if self.template is None:
            return
        named = COLUMN.search(self.template)
        for fault, message in (
            (self.column != TEXT, "a text source takes one of column and template"),
            (not named, f"template {self.template!r} has no column; name one in braces: '{{q}} {{answer}}'"),
            (JINJA.search(self.template), f"template {self.template!r}: a column stands in one pair of braces: {{q}}"),
            (self.plain, "plain is for questions and chats; leave out plain or template"),
            (self.wrap, "wrap would separate answers from their questions; leave out wrap or template"),
        ):
            if fault:
                raise SrmuError(f"{self.place}: {message}")

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


def read_texts(sources: list[Source]) -> list[str]:
    """All texts of the sources, in order."""
    return [text for source in sources for text in read_counted(source)[0]]


def read_counted(source: Source) -> tuple[list[str], int]:
    """All texts of a source, and the number of rows left out as they hold no text: many are a wrong file or column."""
    texts: list[str] = []
    bad: list[SrmuError] = []  # what is wrong with the rows that are left out
    count = 0
    for place, row in read_rows(source):
        count += 1
        try:
            texts += read_row(source, row, place)
        except SrmuError as error:
            if source.on_bad_row == "error":
                raise
            bad.append(error)
    if isinstance(source, RowSource) and not count:
        raise SrmuError(f"{source.place}: holds no text")
    if len(bad) > MOST_BAD * count:
        raise SrmuError(f"{len(bad)} of {count} rows are no texts, more than {MOST_BAD:.0%}; the first: {bad[0]}")
    if source.where and not texts:
        raise explain_empty(source)
    return texts, len(bad)


def explain_empty(source: Source) -> SrmuError:
    """The error for a `where` that leaves out all rows, with the values there are."""
    rows = [row for _, row in read_rows(source) if isinstance(row, dict)]
    for column, value in source.where.items():
        seen = {str(row.get(column)) for row in rows}
        if str(value) not in seen:
            known = sorted(text for text in seen if len(text) <= SHOWN)
            hint = suggest_word(str(value), known) if known else ""
            if len(hint) > 4 * SHOWN:
                hint = f"; the first of its {len(known)} values is {known[0]}"
            return SrmuError(f"{source.place}: no row has {column} {str(value)!r}{hint}")
    wanted = ", ".join(f"{column} {value!r}" for column, value in source.where.items())
    return SrmuError(f"{source.place}: no row has all of {wanted}; take one of them out")


def read_row(source: Source, row: Any, place: str) -> list[str]:
    """The text of a row; none if `where` leaves the row out."""
    if isinstance(row, SrmuError):  # a line that is not JSON
        raise row
    if (source.where or source.template) and not isinstance(row, dict):
        raise SrmuError(f"{place}: where and template take columns, but the row has none")
    values = {column: str(read_cell(row, column, place)) for column in source.where}
    if values != {column: str(value) for column, value in source.where.items()}:
        return []
    if source.template is None:
        if source.column == TEXT and isinstance(row, dict) and row.get(TEXT) is None:
            held = {column: value for column, value in row.items() if value is not None}
            # a table has empty cells: if a row is of no kind without them, they are what it lacks
            filled = held | {column: "" for column, value in row.items() if value is None and column not in CHATS}
            if text := take_row(held, place, plain=source.plain) or take_row(filled, place, plain=source.plain):
                if source.wrap:
                    raise SrmuError(f"{place}: wrap would separate answers from their questions; leave it out")
                return [text]
            if TEXT not in row:
                named = ", ".join(map(str, row)) or "none"
                raise SrmuError(
                    f"{place}: no column 'text'; found {named}; expected {KNOWN}: for others name column, or a template"
                )
        return [read_text(row, source.column, place)]
    words = COLUMN.split(source.template)  # text and column names, in turn
    words[1::2] = [read_text(row, column, place) for column in words[1::2]]
    return [join_counted([("".join(words[:-2]), False), ("".join(words[-2:]), True)])]


def read_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """The rows of a source, each with its place for errors."""
    if isinstance(source, RowSource):
        yield from number_rows(source.place, source.rows)
    elif source.dataset is not None:
        yield from read_hub(source)
    else:
        for path in find_paths(source.place) or [Path(source.place)]:
            yield from read_file(path, source)


def number_rows(place: str | Path, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{place}: row {number}", row) for number, row in enumerate(rows, 1))


def read_file(path: Path, source: Source) -> Iterator[tuple[str, Any]]:
    """The rows of one file."""
    if not path.exists():
        raise SrmuError(f"{path}: no such file{suggest_path(path)}")
    if path.is_dir() and not any((path / name).is_file() for name in SAVED):
        raise SrmuError(f"{path} is a folder; name the files in it, for example '{path}/*.jsonl'")
    row = None
    try:
        for row in parse_file(path, source):
            yield row
    except UnicodeDecodeError:
        data = path.read_bytes()
        line = BAD_BYTE.split(data.decode(errors="surrogateescape"))[0].count("\n") + 1
        packed = next((kind for mark, kind in PACKED.items() if data.startswith(mark)), None)
        advice = f"it is compressed ({packed}): unpack it" if packed else "convert it, perhaps iconv -f CP1252 -t UTF-8"
        raise SrmuError(f"{path}:{line}: not UTF-8 text; {advice}") from None
    except OSError as error:
        raise SrmuError(f"{path}: cannot be read: {first_line(error)}") from None
    if row is None:
        raise SrmuError(f"{path}: holds no text")


def parse_file(path: Path, source: Source) -> Iterator[tuple[str, Any]]:
    """The rows of a file, by its suffix; for a line that is not JSON, the error instead of its row."""
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".arrow":
        yield from number_rows(path, read_saved(path))
        return
    with path.open("rb") as start:
        encoding = json.detect_encoding(start.read(4))
    if suffix in (".jsonl", ".ndjson"):
        with path.open(encoding=encoding) as file:
            yield from parse_lines(file, path)
    elif suffix == ".json":
        text = path.read_text(encoding=encoding)
        listed = parse_json(text, path)
        if isinstance(listed, SrmuError):
            if not isinstance(parse_json(text.partition("\n")[0], path), dict | str):
                raise listed
            yield from parse_lines(text.split("\n"), path)  # as `datasets` and pandas write with lines=True
            return
        if isinstance(listed, dict) and len(text.splitlines()) == 1:
            listed = [listed]
        if not isinstance(listed, list):
            raise SrmuError(f"{path}: expected a list of texts or of objects with {', '.join(source.columns)}")
        yield from number_rows(path, listed)
    elif suffix in (".csv", ".tsv"):
        with path.open(encoding=encoding, newline="") as file:
            csv.field_size_limit(2**31 - 1)  # documents are longer than the 128 KiB of the default
            reader = csv.DictReader(file, strict=True, delimiter="\t" if suffix == ".tsv" else ",")
            try:
                names = reader.fieldnames or []
                read = source.columns if TEXT in names or source.columns != [TEXT] else names  # all may be
                if twice := [name for name in read if names.count(name) > 1]:
                    raise csv.Error(f"two columns are called {twice[0]!r}")
                for row in reader:
                    if None in row:  # an unquoted comma would cut the text
                        raise csv.Error("more fields than the first line names")
                    yield f"{path}:{reader.line_num}", row
            except csv.Error as error:
                raise SrmuError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from None
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                known = {*source.columns} <= {*file.schema_arrow.names}
                table = file.read(source.columns if known else None)
        except (pyarrow.ArrowException, OSError) as error:
            raise SrmuError(f"{path}: not Parquet: {first_line(error)}") from None
        yield from number_rows(path, table.to_pylist())
    elif suffix == ".txt":
        text = path.read_text(encoding=encoding).strip()
        # Paragraphs where blank lines part them, else a document a line.
        yield from number_rows(path, filter(str.strip, text.split("\n\n" if "\n\n" in text else "\n")))
    else:
        raise SrmuError(f"{path}: {suffix or 'no'} suffix; srmu reads .jsonl .json .csv .tsv .parquet .arrow .txt")


def read_saved(path: Path) -> Iterable[Any]:
    """The rows of a data set that `datasets` saved: a folder, or one of its .arrow files."""
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        table = load_from_disk(path) if path.is_dir() else Dataset.from_file(str(path))
    except Exception as error:  # datasets raises many kinds
        raise SrmuError(f"{path}: not a saved data set: {first_line(error)}") from None
    if isinstance(table, DatasetDict):
        raise SrmuError(f"{path} holds splits; name one of them: {', '.join(str(path / split) for split in table)}")
    return table


def read_hub(source: Source) -> Iterator[tuple[str, Any]]:
    """The rows of a hub data set; blank texts, which WikiText is full of, are left out."""
    from datasets import load_dataset

    try:
        table = load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # datasets raises many kinds; the user can mend each
        advice = "a gated set needs `hf auth login`, a local copy goes in as path: file.jsonl"
        raise SrmuError(f"data set {source.dataset} cannot be loaded: {first_line(error)}; {advice}") from error
    columns = source.columns
    if TEXT in columns and TEXT not in table.column_names and not source.template:  # a row may hold more than a text
        columns = [*dict.fromkeys([*source.where, *table.column_names])]
    if missing := [column for column in columns if column not in table.column_names]:
        found = ", ".join(table.column_names)
        raise SrmuError(f"data set {source.dataset} has no column {missing[0]!r}; found {found}")
    for number, row in enumerate(table.select_columns(columns), 1):
        if source.template or str(row.get(source.column, row)).strip():
            yield f"{source.dataset} row {number}", row


def parse_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    return ((f"{path}:{i}", parse_json(line.strip(), path, i)) for i, line in enumerate(lines, 1) if line.strip())


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """A JSON value that begins on that line of a file, or the error that says where it is malformed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason, line = error.msg, line + error.lineno - 1
    except (ValueError, RecursionError):
        reason = "nested too deeply, or a number too long"
    return SrmuError(f'{path}:{line}: not JSON ({reason}); expected {{"text": "..."}}')
