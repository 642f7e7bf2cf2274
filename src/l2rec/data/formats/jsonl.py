"""JSON Lines: one object in each line, under any keys; lines may be Python literals instead.

A key with dots, such as ``user.id``, is looked up as it is and then inside the objects. Arrow
parses blocks of lines whose values are of one type each; Python parses the others, line by line.
"""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.json as pa_json

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.dates import Clock
from l2rec.data.formats.fields import clean, flat
from l2rec.data.formats.files import (
    CATALOG_NAMES,
    File,
    is_folder,
    line_blocks,
    line_in_block,
    only_file,
    open_text,
    reading,
    split_note,
)
from l2rec.data.formats.ignored import SAMPLE_ROWS, check_ignored
from l2rec.data.formats.objects import one_value
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_source,
    catalog_batch,
    event_batch,
)
from l2rec.errors import DataError, nearest

ENDINGS = (".json", ".jsonl", ".ndjson")
CATALOG_ROWS = 10_000
"""Lines of a catalog that are looked at for its keys."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Keys:
    """Keys of an event. ``time=None``: there is none, events are in order."""

    user: str
    item: str
    time: str | None
    event_type: str | None = None

    @property
    def names(self) -> list[str]:
        """All keys that are read."""
        keys = (self.user, self.item, self.time, self.event_type)
        return [key for key in keys if key is not None]


# ---------------------------------------------------------------- lines


def json_lines(file: File, block: bytes, first: int) -> list[Row]:
    """Parse line by line: JSON, or the Python literals of older files."""
    lines = enumerate(block.decode().split("\n"), first)
    return [_json_line(file, line, number) for number, line in lines if line.strip()]


def _json_line(file: File, line: str, number: int) -> Row:
    try:
        row = json.loads(line)
    except RecursionError:
        row = None
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
    return _whole(row) if "\\ud" in line.lower() else row


def _whole(row: Row) -> Row:
    """Replace halves of characters, which texts have that were cut inside an emoji."""
    text = json.dumps(row, ensure_ascii=False).encode("utf-16", "surrogatepass")
    found: Row = json.loads(text.decode("utf-16", "replace"))
    return found


def first_rows(file: File, encoding: str, rows: int = 100) -> list[Row]:
    """Parse the first lines.

    Raises:
        DataError: the file is empty, or a line is no object; if it is one value, with its shape.
    """
    found = []
    with reading(file, encoding), open_text(file, encoding) as stream:
        try:
            for number, line in zip(range(1, rows + 1), stream, strict=False):
                if line.strip():
                    found.append(_json_line(file, line.decode(), number))
        except DataError as error:
            raise one_value(file, encoding) or error from None
    if not found:
        raise DataError(f"{file} is empty; expected one JSON object per line")
    return found


def first_keys(file: File, encoding: str) -> set[str]:
    """Collect the keys of the first hundred lines: many files leave out unknown fields."""
    return {key for row in first_rows(file, encoding) for key in row}


def keys_of(file: File, encoding: str) -> set[str]:
    """Return the first keys of a file; none of a file that is no JSON Lines."""
    try:
        return first_keys(file, encoding) if file.ends(*ENDINGS) else set()
    except DataError:
        return set()


def json_block(block: bytes, schema: pa.Schema) -> pa.Table | None:
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


def value_at(row: Row, key: str) -> Any:
    """Return the value of a key, or of a path of keys with dots between them; None if missing."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def text_of(value: Any, joint: str = ", ") -> str | None:
    """Turn a value into text, numbers and truth values as JSON writes them."""
    return json.dumps(value) if isinstance(value, bool) else flat(value, joint)


def id_of(value: Any, key: str, where: str) -> str | None:
    """Turn an id into text; a whole number is the same id with and without a decimal point.

    Raises:
        DataError: it is an object or a list.
    """
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key}.{name}" for name in value)
        raise DataError(f"{where}: the id {key!r} is an object; name what is in it: {inside}")
    if isinstance(value, (list, tuple)):
        raise DataError(f"{where}: the id {key!r} is a list; ids are texts or numbers")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return text_of(value)


# ---------------------------------------------------------------- events


def line_events(
    file: File, keys: Keys, context: Context, unit: int = 1
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Return a reader of the events of a file. ``unit``: how many of a time are a second."""
    encoding = context.columns.encoding

    def events() -> Iterator[pa.RecordBatch]:
        schema = _schema(first_rows(file, encoding), keys)
        total, clock = 0, Clock()
        with reading(file, encoding):
            for block, first in line_blocks(file, context.block_bytes, encoding):
                if not block.strip():
                    continue
                columns = _columns(file, block, first, keys, schema)
                rows = len(columns[keys.user])
                order = pa.array(np.arange(total, total + rows, dtype=np.float64))
                total += rows
                yield event_batch(
                    columns[keys.user],
                    columns[keys.item],
                    order if keys.time is None else columns[keys.time],
                    None if keys.event_type is None else columns[keys.event_type],
                    line_in_block(file, block, first),
                    1 if keys.time is None else unit,
                    clock=clock,
                )

    return events


def _schema(rows: Sequence[Row], keys: Keys) -> pa.Schema | None:
    """Return the types of the keys for Arrow; None if Python has to read the lines."""
    fields = []
    for key in dict.fromkeys(keys.names):
        kinds = {type(row.get(key)) for row in rows} - {type(None)}
        if kinds == {str}:
            fields.append((key, pa.string()))
        elif kinds == {int}:
            fields.append((key, pa.int64()))
        elif kinds in ({float}, {float, int}) and key == keys.time:
            fields.append((key, pa.float64()))
        else:
            return None
    return pa.schema(fields)


def _columns(
    file: File, block: bytes, first: int, keys: Keys, schema: pa.Schema | None
) -> dict[str, pa.Array]:
    names = keys.names
    table = None if schema is None else json_block(block, schema)
    if table is not None:
        table = table.combine_chunks()
        return {name: table[name].combine_chunks() for name in names}
    rows, where = json_lines(file, block, first), line_in_block(file, block, first)

    def text(row: Row, number: int, name: str) -> str | None:
        value = value_at(row, name)
        is_id = name in (keys.user, keys.item)
        return id_of(value, name, where(number)) if is_id else text_of(value)

    return {
        name: pa.array([text(row, n, name) for n, row in enumerate(rows)], pa.string())
        for name in names
    }


def keys_for(file: File, rows: Sequence[Row], columns: Columns) -> Keys:
    """Return the keys that the options name.

    Raises:
        DataError: no line has one of them.
    """
    names: dict[str, str | None] = {
        "user": columns.user,
        "item": columns.item,
        "timestamp": columns.timestamp,
        "event-type": columns.event_type,
    }
    for option, name in names.items():
        if name is not None and all(value_at(row, name) is None for row in rows):
            raise one_value(file, columns.encoding) or _missing_key(file, name, option, rows)
    known = any("event_type" in row for row in rows)
    event_type = columns.event_type or ("event_type" if known else None)
    return Keys(columns.user, columns.item, columns.timestamp, event_type)


def _missing_key(
    file: File, name: str, option: str, rows: Sequence[Row], more: str = ""
) -> DataError:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shown = ", ".join(keys[:20]) + (", ..." if len(keys) > 20 else "")
    advice = f"pass --{option} KEY (with dots if it is nested, such as user.id)"
    if option == "timestamp":
        advice += ", or --timestamp none if the events are in order and have no times"
    return DataError(
        f"{file} has no key {name!r}, it has {shown}{nearest(name, keys)}; {advice}{more}"
    )


def check_lists(file: File, keys: Keys, rows: Sequence[Row], notes: list[str]) -> None:
    """Refuse a log whose lines hold histories; note other lists that nobody reads."""
    names = dict.fromkeys([*keys.names, *(key for row in rows for key in row)])
    samples = {name: [value_at(row, name) for row in rows] for name in names}
    lists = [
        n for n, values in samples.items() if any(isinstance(v, (list, tuple)) for v in values)
    ]
    check_ignored(file, keys.names, samples, lists, notes)


# ---------------------------------------------------------------- the catalog


def line_catalog(
    file: File,
    item: str,
    context: Context,
    named: Mapping[str, tuple[str, ...]] | None = None,
    *,
    marked_up: bool = False,
    without_id: bool = False,
) -> CatalogReader:
    """Open a catalog: texts and lists of texts make the text, numbers are read when named.

    Args:
        named: the fields that make the text and the keys of each, of which the first that is not
            empty counts; all others are read when named. By default all keys that hold texts.
        marked_up: whether tags and entities are to be removed.
        without_id: whether lines without an id are left out, with a note.

    Raises:
        DataError: no line has the key of the id.
    """
    encoding = context.columns.encoding
    rows = first_rows(file, encoding, CATALOG_ROWS)
    item = _key_of_ids(file, item, rows, context)
    texts, others = _fields(rows, item, file, context.notes)
    keys = {name: (name,) for name in (*texts, *others)} | dict(named or {})
    first = texts if named is None else tuple(named)

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        left_out = 0
        with reading(file, encoding):
            for block, line in line_blocks(file, context.block_bytes, encoding):
                found = json_lines(file, block, line)
                rows = [row for row in found if not without_id or value_at(row, item) is not None]
                left_out += len(found) - len(rows)
                columns = {
                    name: pl.Series([_first_text(row, keys[name]) for row in rows], dtype=pl.String)
                    for name in fields
                }
                if marked_up:
                    columns = {name: clean(text, name) for name, text in columns.items()}
                where = line_in_block(file, block, line)
                ids = [id_of(value_at(row, item), item, where(n)) for n, row in enumerate(rows)]
                yield catalog_batch(pa.array(ids, pa.string()), columns, where)
        if left_out:
            context.notes.append(f"{file.name}: lines without {item!r} were left out: {left_out:,}")

    more = tuple(name for name in (*texts, *others) if name not in first)
    several = [name for name in (*first, *more) if _several(rows, keys[name])]
    return CatalogReader(catalog, first, more, dict.fromkeys(several, ", "))


def _key_of_ids(file: File, item: str, rows: Sequence[Row], context: Context) -> str:
    """Return the key of a catalog's ids: ``item``, the log's, or, where that is inside an object
    there, a name that catalogs have.

    Raises:
        DataError: no line has it.
    """
    names = (item, item.rpartition(".")[2], "item_id", "id") if "." in item else (item,)
    for name in names:
        if any(value_at(row, name) is not None for row in rows):
            if name != item:
                context.notes.append(f"{file.name}: ids of items are read from {name!r}")
            return name
    raise one_value(file, context.columns.encoding) or _missing_key(
        file, item, "item", rows, "; a log with keys or columns needs to have the same one"
    )


def _several(rows: Iterable[Row], keys: Sequence[str]) -> bool:
    """Tell whether a field has lists of values, and nothing else."""
    values = [value_at(row, key) for row in rows for key in keys]
    values = [value for value in values if value is not None]
    return bool(values) and all(isinstance(value, (list, tuple)) for value in values)


def _fields(
    rows: Iterable[Row], item: str, file: File, notes: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sort the keys into those of texts and those of numbers; note those that are neither."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.items():
            kinds.setdefault(key, set()).add(_kind(value))
    kinds.pop(item, None)
    nested = [key for key, kind in kinds.items() if "nested" in kind]
    if nested:
        notes.append(f"{file.name}: not read, as they hold objects: {', '.join(map(repr, nested))}")
    texts = [key for key in kinds if key not in nested and "text" in kinds[key]]
    others = [key for key in kinds if key not in nested and key not in texts]
    return tuple(texts), tuple(others)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "nested"
    if isinstance(value, (list, tuple)):
        inner = {_kind(part) for part in value}
        return "nested" if "nested" in inner else "text"
    return "text" if isinstance(value, str) else "number" if value is not None else "nothing"


def _first_text(row: Row, keys: Sequence[str]) -> str:
    return next((text for key in keys if (text := text_of(value_at(row, key)))), "")


# ---------------------------------------------------------------- the reader


def _logs(files: dict[str, File], items: File | None) -> list[File]:
    """Return the files of lines that may be the log: not a catalog by name, unless all are."""
    known = [f for f in files.values() if f.ends(*ENDINGS) and f != items]
    logs = [f for f in known if not _is_catalog(f)]
    return logs or (known if len(files) == 1 else [])


def _is_catalog(file: File) -> bool:
    name = file.name.lower()
    return name.startswith("meta_") or name.split(".")[0] in CATALOG_NAMES


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the end of a file's name, unless all such files are one value and others are not."""
    logs = _logs(files, items)
    tables = (".parquet", ".csv", ".tsv", ".txt")
    others = any(f.ends(*tables) for f in files.values() if f != items)
    if others and all(one_value(f, context.columns.encoding) for f in logs):
        return None
    return "jsonl" if logs else None


def lines(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open a log by the keys that the options name, and the catalog given or beside it."""
    encoding = context.columns.encoding
    if not is_folder(path):
        file = File(path)
    else:
        logs = _logs(files, items)
        for other in logs:
            if len(logs) > 1 and (told := one_value(other, encoding)) is not None:
                raise told
        file = only_file(path, {f.name: f for f in logs}, ENDINGS, "JSON Lines")
        items = items or next((f for f in files.values() if f != file and _is_catalog(f)), None)
    rows = first_rows(file, encoding, SAMPLE_ROWS)
    keys = keys_for(file, rows, context.columns)
    check_lists(file, keys, rows, context.notes)
    context.notes.extend(split_note(file))
    catalog = open_catalog(items, context) if items else None
    used = [file, *([items] if items else [])]
    return as_source(kind, used, line_events(file, keys, context), catalog)


READER = Reader(
    {"jsonl": "JSON Lines of any keys; --user, --item, --timestamp, as a.b if nested (yours)"},
    detect,
    lines,
)
