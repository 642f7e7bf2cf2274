"""Separated text with a header: what CSV, RecBole and MovieLens files have in common."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.dates import Clock
from l2rec.data.formats.files import File, open_text, reading
from l2rec.data.formats.ignored import SAMPLE_ROWS, check_ignored
from l2rec.data.formats.quotes import Doubled, Watched
from l2rec.data.formats.source import Context, catalog_batch, event_batch
from l2rec.errors import DataError, nearest

if TYPE_CHECKING:
    import _csv


@dataclass(frozen=True)
class Table:
    """A separated text file: its columns in file order and how they are separated.

    ``quotes``: whether cells may stand in quotes. ``escapes``: whether a backslash before a quote
    makes it a part of the cell. ``time``: the column of the time of an event, where the rows are
    events. ``split``: of its rows, as a place in `SPLITS`, where the file is one of the splits of a
    log. ``notes``: what a reader should know, after the table was read.
    """

    file: File
    names: list[str]
    separator: str = ","
    quotes: bool = True
    has_header: bool = True
    encoding: str = "utf-8"
    escapes: bool = False
    time: str | None = None
    split: int | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def quoted(self) -> bool:
        """Whether cells stand in quotes: with tabs, only if the whole file keeps to that."""
        if not self.quotes or self.escapes or self.separator != "\t":
            return self.quotes
        with reading(self.file, self.encoding), self._text() as stream:
            first, skipped = self._skip(stream)
            watch = Watched(first, stream, self.separator, len(self.names), quotes=True)
            watch.finish()
        if watch.broken is None and watch.swallowed is None:
            return True
        opened = watch.broken.opened if watch.broken else cast(tuple[int, int], watch.swallowed)[0]
        self.notes.append(
            f"{self.file.name}: quotes are part of the text, as the one that opens a cell in line "
            f"{self._line_of(skipped + opened)} and does not close it"
        )
        return False

    def batches(self, wanted: Sequence[str], block_bytes: int) -> Iterator[pa.RecordBatch]:
        """Yield the wanted columns as strings.

        Raises:
            DataError: a row of another length, a quote that does not pair up, or lines that did
                not become rows.
        """
        with reading(self.file, self.encoding), self._text() as stream:
            first, skipped = self._skip(stream)
            if not first:
                return
            watch = Watched(
                first,
                stream,
                self.separator,
                len(self.names),
                quotes=self.quoted,
                time=self.names.index(self.time) if self.time in self.names else None,
            )
            rows = 0
            try:
                for batch in self._open(watch, wanted, block_bytes):
                    rows += batch.num_rows
                    yield batch
                    if watch.broken is not None:
                        break
            except pa.ArrowInvalid as error:
                watch.finish()
                self._check_quotes(watch, skipped)
                self._explain(error)
                raise
            watch.finish()
            self._check_quotes(watch, skipped)
            self._check_lines(watch, rows, skipped)

    def _text(self) -> BinaryIO:
        stream = open_text(self.file, self.encoding)
        return cast(BinaryIO, io.BufferedReader(Doubled(stream))) if self.escapes else stream

    def _skip(self, stream: BinaryIO) -> tuple[bytes, int]:
        """Skip the header and empty lines; return the first line of data, or nothing, and how
        many bytes were skipped.
        """
        skipped = len(stream.readline()) if self.has_header else 0
        separator = self.separator.encode()  # a line of cells is not empty, even of tabs alone
        for line in iter(stream.readline, b""):
            if line.strip() or separator in line:
                return line, skipped
            skipped += len(line)
        return b"", skipped

    def _open(
        self, stream: Any, wanted: Sequence[str], block_bytes: int
    ) -> Iterator[pa.RecordBatch]:
        yield from pa_csv.open_csv(
            pa.PythonFile(stream, mode="r"),
            read_options=pa_csv.ReadOptions(column_names=self.names, block_size=block_bytes),
            parse_options=pa_csv.ParseOptions(
                delimiter=self.separator,
                quote_char='"' if self.quoted else False,
                newlines_in_values=self.quoted,
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.string() for name in self.names},
                include_columns=list(wanted),
                strings_can_be_null=False,
            ),
        )

    def _check_quotes(self, watch: Watched, skipped: int) -> None:
        """Raise DataError for a quote that does not pair up, or that holds a row of events."""
        broken = watch.broken
        if broken is not None:
            line = self._line_of(skipped + broken.opened)
            where = (
                "is not closed by the end of the file"
                if broken.what == "is not closed"
                else f"{broken.what}, in line {self._line_of(skipped + broken.at)}"
            )
            escaped = broken.escaped and not self.escapes
            cause = (
                ' (\\" is a quote inside quotes only with --quotes backslash)' if escaped else ""
            )
            raise DataError(
                f'{self.file}, line {line}: the cell that opens with a quote (") {where}{cause}; '
                f"repair that line, or pass --quotes none if quotes are part of the text"
            )
        if watch.swallowed is not None and self.time is not None:
            opened, row = watch.swallowed
            raise DataError(
                f'{self.file}, line {self._line_of(skipped + opened)}: the quote (") that opens '
                f"here closes only after line {self._line_of(skipped + row)}, which looks like an "
                f"event; repair that line, or pass --quotes none if quotes are part of the text"
            )

    def _check_lines(self, watch: Watched, rows: int, skipped: int) -> None:
        """Compare the lines of the file with the rows that came out of them."""
        if watch.inside and watch.first_inside is not None:
            self.notes.append(
                f"{self.file.name}: {watch.inside:,} line breaks stand inside quoted cells (the "
                f"first opens in line {self._line_of(skipped + watch.first_inside)}); if quotes "
                f"are part of the text, pass --quotes none"
            )
        if rows == watch.lines - watch.inside:
            return
        with self._text() as stream:
            stream.read(skipped)
            lines = sum(bool(line.strip(b"\r\n")) for line in stream)
        if rows < lines - watch.inside:
            raise DataError(
                f"{self.file} has {lines:,} lines below its header, but only {rows:,} rows could "
                f"be read from them; look for quotes and control characters in it"
            )

    def _line_of(self, offset: int) -> int:
        """Return the number of the line at an offset of the text."""
        with self._text() as stream:
            return stream.read(offset).count(b"\n") + 1

    def _explain(self, error: pa.ArrowInvalid) -> None:
        if "columns, got" not in str(error):
            return
        for line, row in self._rows():
            if len(row) != len(self.names):
                raise DataError(
                    f"{self.file}, line {line} has {len(row)} columns, not the {len(self.names)} "
                    f"{'of its header' if self.has_header else 'of this format'}; repair or remove "
                    f"that line"
                ) from error

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield line numbers and cells, slowly: to tell where an error is."""
        with self._text() as stream:
            # Line ends of all kinds become one, as Arrow takes them.
            text = io.TextIOWrapper(stream, "utf-8", errors="replace", newline=None)
            rows = _cells(text, self.separator, quotes=self.quoted)
            if self.has_header:
                next(rows, None)
            for row in rows:
                if row:
                    yield rows.line_num, row

    def sample(self, rows: int) -> dict[str, list[str]]:
        """Return the values of the first rows by column; nothing of a file that is not a table."""
        first: list[list[str]] = []
        with reading(self.file, self.encoding), contextlib.suppress(csv.Error):
            first = [row for _, (_, row) in zip(range(rows), self._rows(), strict=False)]
        whole = [row for row in first if len(row) == len(self.names)]
        return {name: [row[at] for row in whole] for at, name in enumerate(self.names)}

    def where(self, row: int) -> str:
        """Name the file and line of a data row."""
        with contextlib.suppress(csv.Error):  # a cell too long for the csv module
            for at, (line, _) in enumerate(self._rows()):
                if at == row:
                    return f"{self.file}, line {line}"
        return f"{self.file}, row {row + 1}"

    def need_all(self, names: Sequence[str], format: str) -> None:
        """Raise DataError if a column that files of this format have is missing."""
        for name in names:
            if name not in self.names:
                raise DataError(
                    f"{self.file} has no column {name!r}, as --format {format} has, but "
                    f"{', '.join(self.names[:20])}; leave --format out or choose another"
                )

    def need(self, name: str, option: str) -> str:
        """Return ``name`` if there is such a column. Raises DataError if not."""
        if name not in self.names:
            raise missing_column(self.file, name, option, self.names)
        return name


def _cells(lines: Iterable[str], separator: str, *, quotes: bool) -> _csv.Reader:
    """Split lines into cells."""
    if quotes:
        return csv.reader(lines, delimiter=separator)
    return csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)


def missing_column(file: File, name: str, option: str, names: Sequence[str]) -> DataError:
    """Return the error for a column that a file does not have, with the nearest name."""
    flag = "--" + option.replace("_", "-")
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    if any(re.fullmatch(r"[\d\s.+-]*\d[\d\s.+-]*", cell) for cell in names):
        return DataError(
            f"{file} has no column {name!r}: its first line is {shown[:60]!r}, data and not a "
            f"header; write a line with the names of the columns above it, such as "
            f"user_id,item_id,timestamp, and one event in each line"
        )
    advice = f"pass {flag} COLUMN"
    if option == "item":
        advice += ", a name that the events and the catalog both have"
    if option == "timestamp":
        advice += ", or --timestamp none if the events are in order and have no times"
    return DataError(
        f"{file} has no column {name!r}, it has {shown}{nearest(name, names)}; {advice}"
    )


def read_header(file: File, separator: str, encoding: str, *, quotes: bool = True) -> list[str]:
    """Return the cells of the first line.

    Raises:
        DataError: the file is empty, two columns have one name, or the text is in no such encoding.
    """
    text = _first_line(file, encoding)
    with reading(file, encoding):
        if "\0" in text:
            raise DataError(
                f"{file}, line 1 has NUL characters, as text in UTF-16 has; pass its encoding, "
                f"for example --encoding utf-16-le"
            )
        if not text.strip():
            raise DataError(
                f"{file} is empty; expected a header line with the names of the columns"
            )
        if re.fullmatch(r"sep=.", text, re.IGNORECASE):
            raise DataError(
                f"{file}, line 1: {text!r} is a note to a spreadsheet, no header; delete it"
            )
        names = next(_cells([text], separator, quotes=quotes))
    check_names(file, names)
    return names


def check_names(file: File, names: Sequence[str]) -> None:
    """Raise DataError if two columns have one name; several may have none."""
    double = next((name for name in names if name and names.count(name) > 1), None)
    if double is not None:
        raise DataError(
            f"{file}, line 1: {names.count(double)} columns are named {double!r}; rename all but "
            f"the one to read"
        )


def _first_line(file: File, encoding: str) -> str:
    with reading(file, encoding), open_text(file, encoding) as stream:
        return stream.readline().decode().rstrip("\r\n")


def named_table(file: File, context: Context) -> Table:
    """Open a file of comma- or tab-separated values by its header."""
    encoding, quotes = context.columns.encoding, context.columns.quotes != "none"
    separator = "\t" if file.ends(".tsv") else ","
    names = read_header(file, separator, encoding, quotes=quotes)
    if len(names) == 1 and separator == ",":
        separator = next((s for s in "\t;|" if s in names[0]), ",")
        names = read_header(file, separator, encoding, quotes=quotes)
    if quotes and _first_line(file, encoding).count('"') % 2:
        if separator != "\t":
            raise DataError(
                f'{file}, line 1: the header has a quote (") that does not close in its line; '
                f"repair it, or pass --quotes none if quotes are part of the text"
            )
        names = read_header(file, separator, encoding, quotes=False)
    return Table(
        file,
        names,
        separator,
        quotes=quotes,
        encoding=encoding,
        escapes=context.columns.quotes == "backslash",
        notes=context.notes,
    )


def table_events(
    tables: Sequence[Table],
    columns: Columns,
    context: Context,
    lists: Collection[str] = (),
    unit: int = 1,
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Check that the columns exist; return a function that reads them.

    ``lists``: columns that hold lists by their type. ``unit``: how many of a time are a second.

    Raises:
        DataError: a column is missing, or one that is not read holds histories.
    """
    tables = [replace(table, time=columns.timestamp) for table in tables]
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
    for table in tables:
        check_ignored(table.file, names, table.sample(SAMPLE_ROWS), lists, context.notes)

    def events() -> Iterator[pa.RecordBatch]:
        total, clock = 0, Clock()
        for table in tables:
            first = 0
            for batch in table.batches(names, context.block_bytes):
                yield event_batch(
                    batch[columns.user],
                    batch[columns.item],
                    batch[columns.timestamp] if columns.timestamp else file_order(total, batch),
                    batch[event_type] if event_type else None,
                    lambda row, table=table, first=first: table.where(first + row),  # type: ignore[misc]
                    unit if columns.timestamp else 1,
                    splits=split_column(table.split, batch),
                    clock=clock,
                )
                first += batch.num_rows
                total += batch.num_rows

    return events


def split_tables(tables: Sequence[Table]) -> list[Table]:
    """Return the train, valid and test table of a log, each with its split.

    Raises:
        DataError: their columns differ.
    """
    for table in tables[1:]:
        if set(table.names) != set(tables[0].names):
            raise DataError(
                f"{tables[0].file} and {table.file.name} beside it have different columns, so they "
                f"are not splits of one log; give the path of the file"
            )
    return [replace(table, split=split) for split, table in enumerate(tables)]


def split_column(split: int | None, batch: pa.RecordBatch) -> pa.Array | None:
    """Return the split of each row, where the rows are of one."""
    return None if split is None else pa.array(np.full(batch.num_rows, split, dtype=np.int8))


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
