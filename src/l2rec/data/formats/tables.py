"""Separated text with a header: what CSV, RecBole and MovieLens files have in common."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.files import File, reading
from l2rec.data.formats.source import Context, catalog_batch, event_batch
from l2rec.errors import DataError, nearest


@dataclass(frozen=True)
class Table:
    """A separated text file: its columns in file order and how they are separated."""

    file: File
    names: list[str]
    separator: str = ","
    quotes: bool = True
    has_header: bool = True
    encoding: str = "utf-8"

    def batches(self, wanted: Sequence[str], block_bytes: int) -> Iterator[pa.RecordBatch]:
        """Yield the wanted columns as strings."""
        with reading(self.file, self.encoding), self.file.open() as stream:
            first = self._skip(stream)
            if not first:
                return
            reader = self._open(_Rejoined(first, stream), wanted, block_bytes)
            yield from reader

    def _skip(self, stream: BinaryIO) -> bytes:
        """Skip the header and empty lines; return the first line of data, or nothing."""
        if self.has_header:
            stream.readline()
        for line in iter(stream.readline, b""):
            if line.strip():
                return line
        return b""

    def _open(
        self, stream: Any, wanted: Sequence[str], block_bytes: int
    ) -> Iterator[pa.RecordBatch]:
        try:
            yield from pa_csv.open_csv(
                pa.PythonFile(stream, mode="r"),
                read_options=pa_csv.ReadOptions(
                    column_names=self.names, block_size=block_bytes, encoding=self.encoding
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=self.separator,
                    quote_char='"' if self.quotes else False,
                    newlines_in_values=self.quotes,
                ),
                convert_options=pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in self.names},
                    include_columns=list(wanted),
                    strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid as error:
            self._explain(error)
            raise

    def _explain(self, error: pa.ArrowInvalid) -> None:
        if "columns, got" not in str(error):
            return
        for line, row in self._rows():
            if len(row) != len(self.names):
                raise DataError(
                    f"{self.file}, line {line} has {len(row)} columns, not the {len(self.names)} "
                    f"of its header; repair or remove that line"
                ) from error

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield line numbers and cells, slowly: to tell where an error is."""
        with self.file.open() as stream:
            text = io.TextIOWrapper(stream, self.encoding, errors="replace", newline="")
            if self.quotes:
                rows = csv.reader(text, delimiter=self.separator)
            else:
                rows = csv.reader(text, delimiter=self.separator, quoting=csv.QUOTE_NONE)
            if self.has_header:
                next(rows, None)
            for row in rows:
                if row:
                    yield rows.line_num, row

    def where(self, row: int) -> str:
        """Name the file and line of a data row."""
        for at, (line, _) in enumerate(self._rows()):
            if at == row:
                return f"{self.file}, line {line}"
        return f"{self.file}, row {row + 1}"

    def need(self, name: str, option: str) -> str:
        """Return ``name`` if there is such a column. Raises DataError if not."""
        if name not in self.names:
            raise missing_column(self.file, name, option, self.names)
        return name


class _Rejoined(io.RawIOBase):
    """A stream whose first line was read already and is put back."""

    def __init__(self, first: bytes, rest: BinaryIO) -> None:
        self._first = first
        self._rest = rest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not self._first:
            return self._rest.read(size)
        head = self._first if size < 0 else self._first[:size]
        self._first = self._first[len(head) :]
        return head + self._rest.read(size - len(head) if size >= 0 else -1)


def missing_column(file: File, name: str, option: str, names: Sequence[str]) -> DataError:
    """Return the error for a column that a file does not have, with the nearest name."""
    flag = "--" + option.replace("_", "-")
    return DataError(
        f"{file} has no column {name!r}, it has {', '.join(names)}{nearest(name, names)}; "
        f"pass {flag} COLUMN"
    )


def read_header(file: File, separator: str, encoding: str) -> list[str]:
    """Return the cells of the first line. Raises DataError for an empty file."""
    with reading(file, encoding), file.open() as stream:
        line = stream.readline()
        text = line.decode(encoding).removeprefix("\ufeff").rstrip("\r\n")
    if not text.strip():
        raise DataError(f"{file} is empty; expected a header line with the names of the columns")
    return next(csv.reader([text], delimiter=separator))


def named_table(file: File, encoding: str) -> Table:
    """Open a file of comma- or tab-separated values by its header."""
    separator = "\t" if file.name.endswith(".tsv") else ","
    names = read_header(file, separator, encoding)
    if len(names) == 1 and separator == ",":
        separator = next((s for s in "\t;|" if s in names[0]), ",")
        names = read_header(file, separator, encoding)
    return Table(file, names, separator, encoding=encoding)


def table_events(
    tables: Sequence[Table], columns: Columns, context: Context
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Check that the columns exist; return a function that reads them.

    Raises:
        DataError: a column is missing.
    """
    for table in tables:
        table.need(columns.user, "user")
        table.need(columns.item, "item")
        if columns.timestamp is not None:
            table.need(columns.timestamp, "timestamp")
        if columns.event_type is not None:
            table.need(columns.event_type, "event_type")
    event_type = columns.event_type
    if event_type is None and all("event_type" in table.names for table in tables):
        event_type = "event_type"
    wanted = [columns.user, columns.item, columns.timestamp, event_type]
    names = [name for name in wanted if name is not None]

    def events() -> Iterator[pa.RecordBatch]:
        total = 0
        for table in tables:
            first = 0
            for batch in table.batches(names, context.block_bytes):
                yield event_batch(
                    batch[columns.user],
                    batch[columns.item],
                    batch[columns.timestamp] if columns.timestamp else file_order(total, batch),
                    batch[event_type] if event_type else None,
                    lambda row, table=table, first=first: table.where(first + row),  # type: ignore[misc]
                )
                first += batch.num_rows
                total += batch.num_rows

    return events


def file_order(first: int, batch: pa.RecordBatch) -> pa.Array:
    """Return row numbers as times, for events that are in order and have no times."""
    return pa.array(np.arange(first, first + batch.num_rows, dtype=np.float64))


def table_catalog(
    table: Table, item: str, context: Context, option: str = "item"
) -> Callable[[Sequence[str]], Iterator[pa.RecordBatch]]:
    """Return a reader of a table's items."""
    table.need(item, option)

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        first = 0
        for batch in table.batches(list(dict.fromkeys([item, *fields])), context.block_bytes):
            yield catalog_batch(
                batch[item],
                {name: batch[name] for name in fields},
                lambda row, first=first: table.where(first + row),  # type: ignore[misc]
            )
            first += batch.num_rows

    return catalog
