"""Public file formats as streams of Arrow batches: events on one side, the catalog on the other.

    recbole              .inter with .item beside it; tab-separated, headers name:type
    amazon-2014 / -2018  reviews with reviewerID, asin, unixReviewTime; metadata with asin
    amazon-2023          reviews with user_id, parent_asin, timestamp (ms); metadata likewise
    movielens-100k       u.data, u.item        (a folder or the zip)
    movielens-1m         ratings.dat, movies.dat
    movielens-latest     ratings.csv, movies.csv
    csv, parquet         named columns; the catalog is a second file

`open_source` finds out which one it is and returns a `Source`: nothing is read before its
``events()`` or ``catalog()`` is iterated, and never more than a block of the file is in memory.
Every DataError names the file and, where it can, the line.
"""

from __future__ import annotations

__all__ = ["FORMATS", "Columns", "Source", "open_source"]

import ast
import codecs
import contextlib
import csv
import gzip
import html
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from l2rec.errors import DataError, nearest

FORMATS = (
    "recbole",
    "amazon-2014",
    "amazon-2018",
    "amazon-2023",
    "movielens-100k",
    "movielens-1m",
    "movielens-latest",
    "csv",
    "parquet",
)

BLOCK_BYTES = 1 << 24

Where = Callable[[int], str]  # row of a batch -> "ratings.csv, line 12"


@dataclass(frozen=True)
class Columns:
    """Column names of formats that leave them to the user, and the encoding of text files.

    ``timestamp=None``: there is none, events are in order. ``event_type=None``: the column
    ``event_type`` if there is one.
    """

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = "timestamp"
    event_type: str | None = None
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Source:
    """A log to prepare.

    ``events()``: batches of ``user_id`` and ``item_id`` (string, not empty), ``timestamp``
    (float64, finite) and perhaps ``event_type`` (string), in file order.
    ``catalog(fields)``: batches of ``item_id`` and the named fields, all strings, none null;
    None without a catalog. ``fields`` are always kept and make the default text;
    ``more_fields`` are read only when somebody names them. ``files``: what is read.
    """

    format: str
    files: tuple[Path, ...]
    events: Callable[[], Iterator[pa.RecordBatch]]
    catalog: Callable[[Sequence[str]], Iterator[pa.RecordBatch]] | None = None
    fields: tuple[str, ...] = ()
    more_fields: tuple[str, ...] = ()


def open_source(
    source: str | Path,
    *,
    items: str | Path | None = None,
    format: str | None = None,
    columns: Columns | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Source:
    """Find the format of a file, folder or zip (or take ``format``) and return its readers.

    ``items``: the catalog file, where the format does not have it beside the events.
    ``block_bytes``: about how much of a file is parsed at a time. Raises DataError if nothing
    is found, or if columns, headers or files are missing.
    """
    path = Path(source)
    context = _Context(columns or Columns(), block_bytes)
    if format is not None and format not in (*FORMATS, "amazon", "movielens"):
        raise DataError(
            f"format={format!r} is not known{nearest(format, FORMATS)}; "
            f"choose one of {', '.join(FORMATS)}"
        )
    if items is not None and not Path(items).is_file():
        raise DataError(f"catalog file {items} does not exist; check --items")
    if (path / "dataset.json").is_file():
        raise DataError(
            f"{path} is a prepared data set already; use it as it is, or prepare its source"
        )
    files = _listing(path)
    catalog_file = _File(Path(items)) if items is not None else None
    kind = format or _detect(path, files)
    if kind == "recbole":
        return _recbole(path, files, catalog_file, context)
    if kind.startswith("movielens"):
        return _movielens(path, files, kind, context)
    if kind.startswith("amazon"):
        return _amazon(path, files, catalog_file, context)
    if kind == "parquet":
        return _parquet(path, files, catalog_file, context)
    return _csv(path, files, catalog_file, context)


# ---------------------------------------------------------------- files, folders and archives


@dataclass(frozen=True)
class _Context:
    columns: Columns
    block_bytes: int


@dataclass(frozen=True)
class _File:
    """A file on disk, perhaps gzipped, or a member of a zip archive."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """Base name, without ``.gz``."""
        name = PurePosixPath(self.member).name if self.member else self.path.name
        return name.removesuffix(".gz")

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def open(self) -> BinaryIO:
        """The content, decompressed while it is read."""
        if self.member is not None:
            return cast(BinaryIO, zipfile.ZipFile(self.path).open(self.member))
        if self.path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(self.path, "rb"))
        return self.path.open("rb")


def _listing(path: Path) -> dict[str, _File]:
    """Base names to files: the file itself, a folder's files (its only subfolder's, if it has
    none itself), or the members of a zip.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path of the source")
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if len(inside) == 1 and inside[0].is_dir():
            return _listing(inside[0])
        files = [_File(p) for p in inside if p.is_file()]
    elif path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if not n.endswith("/")]
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is not a whole zip file ({error}); fetch it again") from error
        files = [_File(path, n) for n in names if not n.startswith("__MACOSX")]
    else:
        files = [_File(path)]
    return {f.name: f for f in files}


def _detect(path: Path, files: dict[str, _File]) -> str:
    for name, kind in (
        ("u.data", "movielens-100k"),
        ("ratings.dat", "movielens-1m"),
    ):
        if name in files:
            return kind
    if "ratings.csv" in files and "userId" in _header(files["ratings.csv"], ",", "utf-8"):
        return "movielens-latest"
    for suffixes, kind in (
        ((".inter",), "recbole"),
        ((".json", ".jsonl"), "amazon"),
        ((".parquet",), "parquet"),
        ((".csv", ".tsv"), "csv"),
    ):
        if any(name.endswith(suffixes) for name in files):
            return kind
    found = ", ".join(list(files)[:5]) or "nothing"
    raise DataError(
        f"no known format in {path}: found {found}; looked for *.inter (RecBole), *.json or "
        f"*.jsonl, plain or .gz (Amazon), u.data, ratings.dat or ratings.csv (MovieLens), "
        f"*.parquet, *.csv and *.tsv; name it with format="
    )


def _only(path: Path, files: dict[str, _File], suffixes: tuple[str, ...], what: str) -> _File:
    found = [f for name, f in files.items() if name.endswith(suffixes)]
    if len(found) != 1:
        names = ", ".join(f.name for f in found[:5]) or "none"
        raise DataError(
            f"{path} has {len(found)} {what} files ({names}), not one; give the path of the file"
        )
    return found[0]


def _need(path: Path, files: dict[str, _File], name: str) -> _File:
    if name not in files:
        raise DataError(
            f"{path} has no {name}, it has {', '.join(list(files)[:5]) or 'nothing'}; "
            f"unpack the whole archive, or choose another format="
        )
    return files[name]


@contextlib.contextmanager
def _reading(file: _File, encoding: str = "utf-8") -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one DataError that says where."""
    try:
        yield
    except DataError:
        raise
    except EOFError as error:
        raise DataError(
            f"{file} is incomplete: its compressed data ends early; fetch the file again"
        ) from error
    except (gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} is damaged ({error}); fetch the file again, or rename it if it is not gzip"
        ) from error
    except UnicodeDecodeError as error:
        raise _bad_encoding(file, encoding) from error
    except LookupError as error:
        raise DataError(
            f"encoding={encoding!r} is not known ({error}); choose utf-8 or latin-1"
        ) from error
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        if "UTF8" in reason.upper().replace("-", ""):
            raise _bad_encoding(file, encoding) from error
        raise DataError(f"{file} cannot be read: {reason}; repair or remove that row") from error
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist; check the path") from error


def _bad_encoding(file: _File, encoding: str) -> DataError:
    """Read the file once more for the first byte that is not text."""
    decoder = codecs.getincrementaldecoder(encoding)()
    position = line = 0
    with file.open() as stream:
        while block := stream.read(1 << 20):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                at = error.start - waiting
                line += block[: max(at, 0)].count(b"\n")
                return DataError(
                    f"{file}, line {line + 1}: byte {error.object[error.start]:#04x} at position "
                    f"{position + at:,} is not {encoding}; pass the file's encoding, "
                    f"for example --encoding latin-1"
                )
            position += len(block)
            line += block.count(b"\n")
    return DataError(f"{file} is not {encoding}; pass the file's encoding=")


def _blocks(file: _File, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines of about ``block_bytes``, each block with the number of its first line."""
    line = 1
    with file.open() as stream:
        rest = b""
        while block := stream.read(block_bytes):
            end = block.rfind(b"\n") + 1
            if not end:
                rest += block
                continue
            whole = rest + block[:end]
            yield whole, line
            line += whole.count(b"\n")
            rest = block[end:]
        if rest:
            yield rest, line


# ---------------------------------------------------------------- what every reader ends with


def _strings(column: pa.Array) -> pa.Array:
    return column if column.type == pa.string() else column.cast(pa.string())


def _event_batch(
    users: pa.Array,
    items: pa.Array,
    times: pa.Array,
    types: pa.Array | None,
    where: Where,
    scale: float = 1.0,
) -> pa.RecordBatch:
    """Check ids and timestamps of one batch; ``scale`` turns timestamps into seconds."""
    columns = {"user_id": _strings(users), "item_id": _strings(items)}
    for what, ids in (("user", columns["user_id"]), ("item", columns["item_id"])):
        missing = pc.fill_null(pc.equal(ids, ""), True)
        if pc.any(missing).as_py():
            row = int(pc.index(missing, True).as_py())
            raise DataError(f"{where(row)} has no {what} id; give it one or remove the row")
    seconds = _seconds(times, where) * scale
    columns["timestamp"] = pa.array(seconds, type=pa.float64())
    if types is not None:
        columns["event_type"] = pc.fill_null(_strings(types), "")
    return pa.RecordBatch.from_pydict(columns)


def _seconds(times: pa.Array, where: Where) -> np.ndarray[Any, np.dtype[np.float64]]:
    column = cast(pl.Series, pl.from_arrow(times))
    if column.dtype.is_temporal():
        numbers = column.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    elif column.dtype == pl.String:
        numbers = column.str.strip_chars().cast(pl.Float64, strict=False)
    else:
        numbers = column.cast(pl.Float64, strict=False)
    wrong = ~numbers.is_finite().fill_null(False)
    if wrong.any():
        row = cast(int, wrong.arg_max())
        value = column[row]
        shown = "is missing" if value is None or value == "" else f"{value!r} is not a number"
        raise DataError(
            f"{where(row)}: timestamp {shown}; give seconds since 1970 (or pass --timestamp none "
            f"if the events are in order and have no times)"
        )
    return numbers.to_numpy()


def _catalog_batch(ids: Any, fields: dict[str, Any], where: Where) -> pa.RecordBatch:
    """Ids and text fields as strings without nulls."""
    columns = {
        name: pc.fill_null(_strings(_arrow(column)), "")
        for name, column in {"item_id": ids, **fields}.items()
    }
    missing = pc.equal(columns["item_id"], "")
    if pc.any(missing).as_py():
        row = int(pc.index(missing, True).as_py())
        raise DataError(f"{where(row)} has no item id; give it one or remove the row")
    return pa.RecordBatch.from_pydict(columns)


def _arrow(column: Any) -> pa.Array:
    array = column.to_arrow() if isinstance(column, pl.Series) else column
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


# ---------------------------------------------------------------- separated text


@dataclass(frozen=True)
class _Table:
    """A separated text file: its columns in file order and how they are set apart."""

    file: _File
    names: list[str]
    separator: str = ","
    quotes: bool = True
    has_header: bool = True
    encoding: str = "utf-8"

    def batches(self, wanted: Sequence[str], block_bytes: int) -> Iterator[pa.RecordBatch]:
        """The wanted columns as strings."""
        with _reading(self.file, self.encoding), self.file.open() as stream:
            first = self._skip(stream)
            if not first:
                return
            reader = self._open(_Rejoined(first, stream), wanted, block_bytes)
            yield from reader

    def _skip(self, stream: BinaryIO) -> bytes:
        """Pass the header; some of what follows, or nothing at the end of the file."""
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
        """Line numbers and cells, slowly: to say where an error is."""
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
        """File and line of a data row."""
        for at, (line, _) in enumerate(self._rows()):
            if at == row:
                return f"{self.file}, line {line}"
        return f"{self.file}, row {row + 1}"

    def need(self, name: str, option: str) -> str:
        """``name`` if there is such a column; else a DataError."""
        if name not in self.names:
            raise _missing_column(self.file, name, option, self.names)
        return name


class _Rejoined(io.RawIOBase):
    """A first line that was read already, then the rest of the stream."""

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


def _missing_column(file: _File, name: str, option: str, names: Sequence[str]) -> DataError:
    flag = "--" + option.replace("_", "-")
    return DataError(
        f"{file} has no column {name!r}, it has {', '.join(names)}{nearest(name, names)}; "
        f"pass {flag} COLUMN"
    )


def _header(file: _File, separator: str, encoding: str) -> list[str]:
    """Cells of the first line. Raises DataError for an empty file."""
    with _reading(file, encoding), file.open() as stream:
        line = stream.readline()
        text = line.decode(encoding).removeprefix("\ufeff").rstrip("\r\n")
    if not text.strip():
        raise DataError(f"{file} is empty; expected a header line with the names of the columns")
    return next(csv.reader([text], delimiter=separator))


def _named_table(file: _File, encoding: str) -> _Table:
    separator = "\t" if file.name.endswith(".tsv") else ","
    names = _header(file, separator, encoding)
    if len(names) == 1 and separator == ",":
        separator = next((s for s in "\t;|" if s in names[0]), ",")
        names = _header(file, separator, encoding)
    return _Table(file, names, separator, encoding=encoding)


def _table_events(
    tables: Sequence[_Table], columns: Columns, context: _Context
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Checks that the columns exist now; reads later."""
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
                yield _event_batch(
                    batch[columns.user],
                    batch[columns.item],
                    batch[columns.timestamp] if columns.timestamp else _order(total, batch),
                    batch[event_type] if event_type else None,
                    lambda row, table=table, first=first: table.where(first + row),  # type: ignore[misc]
                )
                first += batch.num_rows
                total += batch.num_rows

    return events


def _order(first: int, batch: pa.RecordBatch) -> pa.Array:
    return pa.array(np.arange(first, first + batch.num_rows, dtype=np.float64))


def _table_catalog(
    table: _Table, item: str, context: _Context, option: str = "item"
) -> Callable[[Sequence[str]], Iterator[pa.RecordBatch]]:
    table.need(item, option)

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        first = 0
        for batch in table.batches(list(dict.fromkeys([item, *fields])), context.block_bytes):
            yield _catalog_batch(
                batch[item],
                {name: batch[name] for name in fields},
                lambda row, first=first: table.where(first + row),  # type: ignore[misc]
            )
            first += batch.num_rows

    return catalog


@dataclass(frozen=True)
class _Catalog:
    read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    fields: tuple[str, ...]
    more_fields: tuple[str, ...] = ()


def _open_catalog(file: _File, context: _Context) -> _Catalog:
    """A catalog in whatever format its name says."""
    item, encoding = context.columns.item, context.columns.encoding
    if file.name.endswith(".item"):
        return _atomic_catalog(file, context)
    if file.name.endswith((".json", ".jsonl")):
        return _amazon_catalog(file, context)
    if file.name.endswith(".parquet"):
        return _parquet_catalog(file, item)
    table = _named_table(file, encoding)
    fields = tuple(name for name in table.names if name != item)
    return _Catalog(_table_catalog(table, item, context), fields)


def _source(
    format: str,
    files: Sequence[_File],
    events: Callable[[], Iterator[pa.RecordBatch]],
    catalog: _Catalog | None,
) -> Source:
    return Source(
        format=format,
        files=tuple(dict.fromkeys(f.path for f in files)),
        events=events,
        catalog=catalog.read if catalog else None,
        fields=catalog.fields if catalog else (),
        more_fields=catalog.more_fields if catalog else (),
    )


def _csv(path: Path, files: dict[str, _File], items: _File | None, context: _Context) -> Source:
    others = {n: f for n, f in files.items() if items is None or f.path != items.path}
    if items is None and len(files) > 1:
        items = next((f for n, f in files.items() if n.split(".")[0] in CATALOG_NAMES), None)
        others = {n: f for n, f in files.items() if f is not items}
    file = _File(path) if path.is_file() and path.suffix != ".zip" else None
    file = file or _only(path, others, (".csv", ".tsv"), ".csv or .tsv")
    table = _named_table(file, context.columns.encoding)
    events = _table_events([table], context.columns, context)
    catalog = _open_catalog(items, context) if items else None
    return _source("csv", [file, *([items] if items else [])], events, catalog)


CATALOG_NAMES = ("items", "catalog", "movies")


# ---------------------------------------------------------------- RecBole atomic files


def _atomic_table(file: _File, encoding: str) -> tuple[_Table, dict[str, str]]:
    """The table under its bare column names, and the type of each."""
    header = _header(file, "\t", encoding)
    types: dict[str, str] = {}
    for cell in header:
        name, _, kind = cell.rpartition(":")
        if not name or kind not in ("token", "token_seq", "float", "float_seq"):
            raise DataError(
                f"{file}, line 1: header {cell!r} has no type; write name:token, name:token_seq, "
                f"name:float or name:float_seq, separated by tabs"
            )
        types[name] = kind
    return _Table(file, list(types), "\t", quotes=False, encoding=encoding), types


def _atomic_catalog(file: _File, context: _Context) -> _Catalog:
    item = context.columns.item
    table, types = _atomic_table(file, context.columns.encoding)
    names = [name for name in types if name != item]
    return _Catalog(
        _table_catalog(table, item, context),
        tuple(name for name in names if types[name].startswith("token")),
        tuple(name for name in names if types[name].startswith("float")),
    )


def _recbole(path: Path, files: dict[str, _File], items: _File | None, context: _Context) -> Source:
    file = _only(path, files, (".inter",), ".inter")
    table, _ = _atomic_table(file, context.columns.encoding)
    events = _table_events([table], context.columns, context)
    if items is None:
        beside = file.name.removesuffix(".inter") + ".item"
        if file.member is None:
            named = file.path.with_name(beside)
            items = _File(named) if named.is_file() else None
        else:
            items = files.get(beside)
    catalog = _open_catalog(items, context) if items else None
    return _source("recbole", [file, *([items] if items else [])], events, catalog)


# ---------------------------------------------------------------- MovieLens

GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
MOVIE_FIELDS = ("movie_title", "release_year", "class")  # as RecBole's copy names them
MORE_MOVIE_FIELDS = ("title", "clean_title")


def _movielens(path: Path, files: dict[str, _File], kind: str, context: _Context) -> Source:
    if path.is_file() and path.suffix != ".zip":
        files = _listing(path.parent)
    if kind == "movielens":
        kind = _detect(path, files)
    names = ["user_id", "item_id", "rating", "timestamp"]
    columns = Columns()
    if kind == "movielens-100k":
        ratings, movies = _need(path, files, "u.data"), _need(path, files, "u.item")
        table = _Table(ratings, names, "\t", quotes=False, has_header=False)
        events = _table_events([table], columns, context)
        flags = ["item_id", "title", "date", "video", "url", *GENRES]
        films = _Table(movies, flags, "|", quotes=False, has_header=False, encoding="latin-1")
        parts = _film_batches_100k(films, context)
    elif kind == "movielens-1m":
        ratings, movies = _need(path, files, "ratings.dat"), _need(path, files, "movies.dat")
        events = _double_colon_events(ratings, names, context)
        parts = _film_batches_1m(movies, context)
    else:
        ratings, movies = _need(path, files, "ratings.csv"), _need(path, files, "movies.csv")
        table = _named_table(ratings, "utf-8")
        columns = Columns(user="userId", item="movieId")
        events = _table_events([table], columns, context)
        films = _named_table(movies, "utf-8")
        for name in ("movieId", "title", "genres"):
            films.need(name, "items")
        parts = _film_batches_latest(films, context)
    catalog = _Catalog(_films(parts), MOVIE_FIELDS, MORE_MOVIE_FIELDS)
    return _source(kind, [ratings, movies], events, catalog)


Films = Callable[[], Iterator[tuple[pl.Series, pl.Series, pl.Series, Where]]]  # id, title, genres


def _film_batches_100k(films: _Table, context: _Context) -> Films:
    def read() -> Iterator[tuple[pl.Series, pl.Series, pl.Series, Where]]:
        for batch in films.batches(["item_id", "title", *GENRES], context.block_bytes):
            frame = cast(pl.DataFrame, pl.from_arrow(batch))
            named = [pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in GENRES]
            genres = frame.select(pl.concat_str(named, separator=" ", ignore_nulls=True))
            yield frame["item_id"], frame["title"], genres.to_series(), films.where

    return read


def _film_batches_latest(films: _Table, context: _Context) -> Films:
    def read() -> Iterator[tuple[pl.Series, pl.Series, pl.Series, Where]]:
        for batch in films.batches(["movieId", "title", "genres"], context.block_bytes):
            frame = cast(pl.DataFrame, pl.from_arrow(batch))
            genres = frame["genres"].str.replace_all("(no genres listed)", "", literal=True)
            genres = genres.str.replace_all("|", " ", literal=True)
            yield frame["movieId"], frame["title"], genres, films.where

    return read


def _film_batches_1m(file: _File, context: _Context) -> Films:
    def read() -> Iterator[tuple[pl.Series, pl.Series, pl.Series, Where]]:
        with _reading(file, "latin-1"):
            for batch, where in _double_colon(file, ["id", "title", "genres"], context):
                frame = cast(pl.DataFrame, pl.from_arrow(batch))
                genres = frame["genres"].str.replace_all("|", " ", literal=True)
                yield frame["id"], frame["title"], genres, where

    return read


def _films(parts: Films) -> Callable[[Sequence[str]], Iterator[pa.RecordBatch]]:
    """Split "Godfather, The (1972)" into title and year; offer "The Godfather" too."""

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for ids, titles, genres, where in parts():
            frame = pl.DataFrame({"title": titles, "class": genres}).with_columns(
                movie_title=pl.col("title").str.replace(r"\s*\(\d{4}\)\s*$", "").str.strip_chars(),
                release_year=pl.col("title").str.extract(r"\((\d{4})\)\s*$").fill_null(""),
            )
            clean = pl.col("movie_title").str.replace(
                r"^(.*), (The|A|An|Le|La|Les|L'|Il|El|Der|Die|Das)$", "$2 $1"
            )
            frame = frame.with_columns(clean_title=clean.str.replace("^L' ", "L'"))
            yield _catalog_batch(ids, {name: frame[name] for name in fields}, where)

    return catalog


def _double_colon(
    file: _File, names: list[str], context: _Context
) -> Iterator[tuple[pa.RecordBatch, Where]]:
    """MovieLens 1M separates by two characters; Arrow by one."""
    for block, first in _blocks(file, context.block_bytes):
        lines = block.count(b"\n") + (not block.endswith(b"\n"))
        plain = block.replace(b"::", b"\x1f").decode("latin-1").encode()
        try:
            table = pa_csv.read_csv(
                io.BytesIO(plain),
                read_options=pa_csv.ReadOptions(column_names=names, block_size=len(plain) + 1),
                parse_options=pa_csv.ParseOptions(delimiter="\x1f", quote_char=False),
                convert_options=pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in names}
                ),
            )
        except pa.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{file}, lines {first}-{first + lines - 1}: {reason}; expected {'::'.join(names)}"
            ) from error
        where = _line_in_block(file, block, first)
        for batch in table.combine_chunks().to_batches():
            yield batch, where


def _line_in_block(file: _File, block: bytes, first: int) -> Where:
    def where(row: int) -> str:
        lines = [n for n, line in enumerate(block.split(b"\n"), first) if line.strip()]
        return f"{file}, line {lines[row]}"

    return where


def _double_colon_events(
    file: _File, names: list[str], context: _Context
) -> Callable[[], Iterator[pa.RecordBatch]]:
    def events() -> Iterator[pa.RecordBatch]:
        with _reading(file):
            for batch, where in _double_colon(file, names, context):
                yield _event_batch(
                    batch["user_id"], batch["item_id"], batch["timestamp"], None, where
                )

    return events


# ---------------------------------------------------------------- Amazon reviews

AMAZON_FIELDS = ("title", "category", "brand")
MORE_AMAZON_FIELDS = ("description", "feature")

_STRINGS = pa.list_(pa.string())
_META: dict[str, dict[str, tuple[str, pa.DataType]]] = {
    "amazon-2014": {
        "item_id": ("asin", pa.string()),
        "title": ("title", pa.string()),
        "category": ("categories", pa.list_(_STRINGS)),
        "brand": ("brand", pa.string()),
        "description": ("description", pa.string()),
        "feature": ("feature", _STRINGS),
    },
    "amazon-2018": {
        "item_id": ("asin", pa.string()),
        "title": ("title", pa.string()),
        "category": ("category", _STRINGS),
        "brand": ("brand", pa.string()),
        "description": ("description", _STRINGS),
        "feature": ("feature", _STRINGS),
    },
    "amazon-2023": {
        "item_id": ("parent_asin", pa.string()),
        "title": ("title", pa.string()),
        "category": ("categories", _STRINGS),
        "brand": ("store", pa.string()),
        "description": ("description", _STRINGS),
        "feature": ("features", _STRINGS),
    },
}


def _amazon(path: Path, files: dict[str, _File], items: _File | None, context: _Context) -> Source:
    known = {n: f for n, f in files.items() if n.endswith((".json", ".jsonl"))}
    if items is None and not (path.is_file() and path.suffix != ".zip"):
        metadata = [f for n, f in known.items() if n.startswith("meta_")]
        items = metadata[0] if len(metadata) == 1 else None
    reviews = {n: f for n, f in known.items() if not n.startswith("meta_") or len(known) == 1}
    file = _File(path) if path.is_file() and path.suffix != ".zip" else None
    file = file or _only(path, reviews, (".json", ".jsonl"), "review")
    keys = _first_keys(file)
    if {"reviewerID", "asin", "unixReviewTime"} <= keys:
        format, scale = "amazon-2018", 1.0
        names = ("reviewerID", "asin", "unixReviewTime")
    elif {"user_id", "parent_asin", "timestamp"} <= keys:
        format, scale = "amazon-2023", 1e-3
        names = ("user_id", "parent_asin", "timestamp")
    else:
        raise DataError(
            f"{file} has the keys {', '.join(sorted(keys)[:12])}; expected reviewerID, asin, "
            f"unixReviewTime (Amazon 2014, 2018) or user_id, parent_asin, timestamp (2023)"
        )
    catalog = _amazon_catalog(items, context) if items else None
    if items and _amazon_version(items) == "amazon-2014":
        format = "amazon-2014"
    used = [file, *([items] if items else [])]
    return _source(format, used, _review_events(file, names, scale, context), catalog)


def _review_events(
    file: _File, names: tuple[str, str, str], scale: float, context: _Context
) -> Callable[[], Iterator[pa.RecordBatch]]:
    user, item, time = names
    schema = pa.schema([(user, pa.string()), (item, pa.string()), (time, pa.int64())])

    def events() -> Iterator[pa.RecordBatch]:
        with _reading(file):
            for block, first in _blocks(file, context.block_bytes):
                if not block.strip():
                    continue
                where = _line_in_block(file, block, first)
                table = _json_block(block, schema)
                if table is None:
                    rows = _json_lines(file, block, first)
                    table = pa.table(
                        {
                            user: pa.array([_flat(r.get(user)) for r in rows], pa.string()),
                            item: pa.array([_flat(r.get(item)) for r in rows], pa.string()),
                            time: pa.array([_flat(r.get(time)) for r in rows], pa.string()),
                        }
                    )
                table = table.combine_chunks()
                columns = [_arrow(table[name]) for name in names]
                yield _event_batch(columns[0], columns[1], columns[2], None, where, scale)

    return events


def _amazon_version(file: _File) -> str:
    keys = _first_keys(file)
    if "parent_asin" in keys:
        return "amazon-2023"
    if "asin" not in keys:
        raise DataError(
            f"{file} has the keys {', '.join(sorted(keys)[:12])}; expected Amazon metadata with "
            f"asin (2014, 2018) or parent_asin (2023)"
        )
    return "amazon-2014" if "categories" in keys else "amazon-2018"


def _amazon_catalog(file: _File, context: _Context) -> _Catalog:
    version = _amazon_version(file)

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = {name: _META[version][name] for name in ("item_id", *fields)}
        schema = pa.schema(list(wanted.values()))
        with _reading(file):
            for block, first in _blocks(file, context.block_bytes):
                if not block.strip():
                    continue
                where = _line_in_block(file, block, first)
                table = _json_block(block, schema)
                if table is None:
                    rows = _json_lines(file, block, first)
                    texts = {
                        name: pl.Series(
                            [_flat(r.get(key), _joint(name)) for r in rows], dtype=pl.String
                        )
                        for name, (key, _) in wanted.items()
                    }
                else:
                    frame = cast(pl.DataFrame, pl.from_arrow(table))
                    texts = {
                        name: _joined(frame[key], _joint(name)) for name, (key, _) in wanted.items()
                    }
                cleaned = {name: _clean(texts[name], name) for name in fields}
                yield _catalog_batch(texts["item_id"], cleaned, where)

    return _Catalog(catalog, AMAZON_FIELDS, MORE_AMAZON_FIELDS)


def _json_block(block: bytes, schema: pa.Schema) -> pa.Table | None:
    """Parse whole lines at once; None if some line does not fit the schema."""
    block.decode()  # Arrow reports bad bytes late; this says so at once
    try:
        return pa_json.read_json(
            io.BytesIO(block),
            read_options=pa_json.ReadOptions(block_size=len(block) + 1),
            parse_options=pa_json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowInvalid:
        return None


def _json_lines(file: _File, block: bytes, first: int) -> list[dict[str, Any]]:
    """Line by line: JSON, or the Python literals of the 2014 files."""
    lines = enumerate(block.decode().split("\n"), first)
    return [_json_line(file, line, number) for number, line in lines if line.strip()]


def _json_line(file: _File, line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        try:
            row = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            row = None
    if not isinstance(row, dict):
        raise DataError(
            f"{file}, line {number} is neither a JSON object nor a Python dict: "
            f"{line.strip()[:60]!r}; repair or remove that line"
        )
    return row


def _first_keys(file: _File) -> set[str]:
    """Keys of the first hundred lines: metadata leaves out what it does not know."""
    keys: set[str] = set()
    with _reading(file), file.open() as stream:
        for number, line in zip(range(1, 101), stream, strict=False):
            if line.strip():
                keys |= set(_json_line(file, line.decode(), number))
    if not keys:
        raise DataError(f"{file} is empty; expected one JSON object per line")
    return keys


def _joint(name: str) -> str:
    return ", " if name == "category" else " "


def _flat(value: Any, joint: str = " ") -> str | None:
    """A scalar as text, nested lists as one text without repeats."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        parts = [_flat(v, joint) for v in _leaves(value)]
        return joint.join(dict.fromkeys(p for p in parts if p))
    return str(value)


def _leaves(value: Sequence[Any]) -> Iterator[Any]:
    for part in value:
        if isinstance(part, (list, tuple)):
            yield from _leaves(part)
        else:
            yield part


def _joined(column: pl.Series, joint: str) -> pl.Series:
    """`_flat` for a whole column."""
    while isinstance(column.dtype, pl.List) and isinstance(column.dtype.inner, pl.List):
        column = column.list.eval(pl.element().explode())
    if isinstance(column.dtype, pl.List):
        parts = column.list.eval(pl.element().filter(pl.element().fill_null("") != ""))
        return parts.list.unique(maintain_order=True).list.join(joint)
    return column


_ENTITY = r"&[#a-zA-Z0-9]+;"
_TAG = r"</?[a-zA-Z][^<>]*>"


def _clean(texts: pl.Series, name: str) -> pl.Series:
    """Plain text: entities resolved, tags and scraped scripts removed, one space between words."""
    texts = texts.fill_null("")
    escaped = texts.str.contains(_ENTITY).arg_true()
    if len(escaped):
        texts = texts.scatter(escaped, [html.unescape(t) for t in texts.gather(escaped)])
    texts = texts.str.replace_all(_TAG, " ").str.replace_all(r"\s+", " ").str.strip_chars()
    if name == "title":
        # Some 2018 pages were scraped before their script had run; the title is JavaScript.
        script = texts.str.contains("getTime", literal=True).arg_true()
        texts = texts.scatter(script, "") if len(script) else texts
    return texts


# ---------------------------------------------------------------- Parquet


def _parquet_file(file: _File) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.path if file.member is None else io.BytesIO(file.open().read()))
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file} is not a whole Parquet file ({reason}); fetch it again") from error


def _parquet(path: Path, files: dict[str, _File], items: _File | None, context: _Context) -> Source:
    parts = {n: f for n, f in files.items() if n.endswith(".parquet")}
    if items is None:
        items = next((f for n, f in parts.items() if n.split(".")[0] in CATALOG_NAMES), None)
    logs = [f for f in parts.values() if items is None or f != items]
    if not logs:
        raise DataError(f"{path} has no Parquet file with events; give the path of the file")
    columns = context.columns
    event_type = columns.event_type
    for file in logs:
        names = _parquet_file(file).schema_arrow.names
        for name, option in (
            (columns.user, "user"),
            (columns.item, "item"),
            (columns.timestamp, "timestamp"),
            (columns.event_type, "event_type"),
        ):
            if name is not None and name not in names:
                raise _missing_column(file, name, option, names)
    if event_type is None and all(
        "event_type" in _parquet_file(f).schema_arrow.names for f in logs
    ):
        event_type = "event_type"
    events = _parquet_events(logs, columns, event_type, context)
    catalog = _open_catalog(items, context) if items else None
    return _source("parquet", [*logs, *([items] if items else [])], events, catalog)


def _parquet_events(
    files: list[_File], columns: Columns, event_type: str | None, context: _Context
) -> Callable[[], Iterator[pa.RecordBatch]]:
    wanted = [columns.user, columns.item, columns.timestamp, event_type]
    names = [name for name in wanted if name is not None]
    rows = max(1, context.block_bytes // 32)  # an event takes about so many bytes

    def events() -> Iterator[pa.RecordBatch]:
        total = 0
        for file in files:
            first = 0
            with _reading(file):
                for batch in _parquet_file(file).iter_batches(batch_size=rows, columns=names):
                    yield _event_batch(
                        batch[columns.user],
                        batch[columns.item],
                        batch[columns.timestamp] if columns.timestamp else _order(total, batch),
                        batch[event_type] if event_type else None,
                        lambda row, file=file, first=first: f"{file}, row {first + row + 1}",  # type: ignore[misc]
                    )
                    first += batch.num_rows
                    total += batch.num_rows

    return events


def _parquet_catalog(file: _File, item: str) -> _Catalog:
    schema = _parquet_file(file).schema_arrow
    if item not in schema.names:
        raise _missing_column(file, item, "item", schema.names)
    kinds = {f.name: f.type for f in schema if f.name != item}
    texts = tuple(name for name, kind in kinds.items() if _is_text(kind))
    more = tuple(n for n, kind in kinds.items() if n not in texts and not pa.types.is_nested(kind))

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        first = 0
        names = list(dict.fromkeys([item, *fields]))
        with _reading(file):
            for batch in _parquet_file(file).iter_batches(batch_size=1 << 16, columns=names):
                yield _catalog_batch(
                    batch[item],
                    {n: _joined(cast(pl.Series, pl.from_arrow(batch[n])), ", ") for n in fields}
                    if any(pa.types.is_list(kinds[n]) for n in fields if n in kinds)
                    else {n: batch[n] for n in fields},
                    lambda row, first=first: f"{file}, row {first + row + 1}",  # type: ignore[misc]
                )
                first += batch.num_rows

    return _Catalog(catalog, texts, more)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
