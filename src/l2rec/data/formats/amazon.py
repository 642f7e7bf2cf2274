"""Amazon reviews of 2014, 2018 and 2023: JSON lines, plain or gzipped."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import polars as pl
import pyarrow as pa
import pyarrow.json as pa_json

from l2rec.data.formats.fields import clean, flat, joined, separator_of
from l2rec.data.formats.files import (
    File,
    is_folder,
    line_blocks,
    line_in_block,
    only_file,
    open_text,
    reading,
    split_note,
)
from l2rec.data.formats.ignored import check_ignored
from l2rec.data.formats.objects import one_value
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_arrow,
    as_source,
    catalog_batch,
    event_batch,
)
from l2rec.errors import DataError

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


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by a file of JSON Lines; which year it is, the keys tell when it is opened."""
    known = (f for f in files.values() if f.ends(".json", ".jsonl"))
    lines = (one_value(f, context.columns.encoding) is None for f in known)
    return "amazon" if any(lines) else None


def amazon(
    path: Path,
    files: dict[str, File],
    items: File | None,
    _kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open reviews, and the metadata beside them; the keys of the first lines tell the year."""
    known = {n: f for n, f in files.items() if f.ends(".json", ".jsonl") and f != items}
    if items is None and is_folder(path):
        metadata = [f for n, f in known.items() if n.startswith("meta_")]
        items = metadata[0] if len(metadata) == 1 else None
    reviews = {n: f for n, f in known.items() if not n.startswith("meta_") or len(known) == 1}
    encoding = context.columns.encoding
    if is_folder(path):
        file = only_file(path, _of_lines(reviews, context), (".json", ".jsonl"), "review")
    else:
        file = File(path)
    keys = _first_keys(file, encoding)
    if {"reviewerID", "asin", "unixReviewTime"} <= keys:
        format, unit = "amazon-2018", 1
        names = ("reviewerID", "asin", "unixReviewTime")
    elif {"user_id", "parent_asin", "timestamp"} <= keys:
        format, unit = "amazon-2023", 1000
        names = ("user_id", "parent_asin", "timestamp")
    else:
        raise one_value(file, encoding) or DataError(
            f"{file} has the keys {', '.join(sorted(keys)[:12])}; expected reviewerID, asin, "
            f"unixReviewTime (Amazon 2014, 2018) or user_id, parent_asin, timestamp (2023); write "
            f"other JSON Lines as CSV or Parquet, for whose columns there are --user, --item and "
            f"--timestamp"
        )
    check_ignored(
        file,
        names,
        {name: [""] for name in keys},
        [name for name in keys if re.fullmatch(r"(.*_)?history(_.*)?", name)],
        context.notes,
    )
    context.notes.extend(split_note(file))
    catalog = open_catalog(items, context) if items else None
    by_line = items and items.ends(".json", ".jsonl") and one_value(items, encoding) is None
    if items and by_line and _amazon_version(items, encoding) == "amazon-2014":
        format = "amazon-2014"
    used = [file, *([items] if items else [])]
    return as_source(format, used, _review_events(file, names, unit, context), catalog)


def _of_lines(reviews: dict[str, File], context: Context) -> dict[str, File]:
    """Leave out files of one JSON value, and say so; raise what they are if there are no others."""
    told = {n: one_value(f, context.columns.encoding) for n, f in reviews.items()}
    lines = {n: f for n, f in reviews.items() if told[n] is None}
    for name, error in told.items():
        if error is not None and not lines:
            raise error
        if error is not None:
            context.notes.append(f"{name} is one JSON value, not one review per line; not read")
    return lines


def _review_events(
    file: File, names: tuple[str, str, str], unit: int, context: Context
) -> Callable[[], Iterator[pa.RecordBatch]]:
    user, item, time = names
    schema = pa.schema([(user, pa.string()), (item, pa.string()), (time, pa.int64())])
    encoding = context.columns.encoding

    def events() -> Iterator[pa.RecordBatch]:
        with reading(file, encoding):
            for block, first in line_blocks(file, context.block_bytes, encoding):
                if not block.strip():
                    continue
                where = line_in_block(file, block, first)
                table = _json_block(block, schema)
                if table is None:
                    rows = _json_lines(file, block, first)
                    table = pa.table(
                        {
                            user: pa.array([flat(r.get(user)) for r in rows], pa.string()),
                            item: pa.array([flat(r.get(item)) for r in rows], pa.string()),
                            time: pa.array([flat(r.get(time)) for r in rows], pa.string()),
                        }
                    )
                table = table.combine_chunks()
                columns = [as_arrow(table[name]) for name in names]
                yield event_batch(columns[0], columns[1], columns[2], None, where, unit)

    return events


def _amazon_version(file: File, encoding: str) -> str:
    keys = _first_keys(file, encoding)
    if "parent_asin" in keys:
        return "amazon-2023"
    if "asin" not in keys:
        raise one_value(file, encoding) or DataError(
            f"{file} has the keys {', '.join(sorted(keys)[:12])}; expected Amazon metadata with "
            f"asin (2014, 2018) or parent_asin (2023); write other JSON Lines as CSV or Parquet"
        )
    return "amazon-2014" if "categories" in keys else "amazon-2018"


def amazon_catalog(file: File, context: Context) -> CatalogReader:
    """Open metadata of any of the three years."""
    encoding = context.columns.encoding
    version = _amazon_version(file, encoding)

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = {name: _META[version][name] for name in ("item_id", *fields)}
        schema = pa.schema(list(wanted.values()))
        with reading(file, encoding):
            for block, first in line_blocks(file, context.block_bytes, encoding):
                if not block.strip():
                    continue
                where = line_in_block(file, block, first)
                table = _json_block(block, schema)
                if table is None:
                    rows = _json_lines(file, block, first)
                    texts = {
                        name: pl.Series(
                            [flat(r.get(key), separator_of(name)) for r in rows], dtype=pl.String
                        )
                        for name, (key, _) in wanted.items()
                    }
                else:
                    frame = cast(pl.DataFrame, pl.from_arrow(table))
                    texts = {
                        name: joined(frame[key], separator_of(name))
                        for name, (key, _) in wanted.items()
                    }
                cleaned = {name: clean(texts[name], name) for name in fields}
                yield catalog_batch(texts["item_id"], cleaned, where)

    return CatalogReader(catalog, AMAZON_FIELDS, MORE_AMAZON_FIELDS)


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


def _json_lines(file: File, block: bytes, first: int) -> list[dict[str, Any]]:
    """Parse line by line: JSON, or the Python literals of the 2014 files."""
    lines = enumerate(block.decode().split("\n"), first)
    return [_json_line(file, line, number) for number, line in lines if line.strip()]


def _json_line(file: File, line: str, number: int) -> dict[str, Any]:
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


def _first_keys(file: File, encoding: str) -> set[str]:
    """Collect the keys of the first hundred lines: metadata leaves out unknown fields."""
    keys: set[str] = set()
    with reading(file, encoding), open_text(file, encoding) as stream:
        try:
            for number, line in zip(range(1, 101), stream, strict=False):
                if line.strip():
                    keys |= set(_json_line(file, line.decode(), number))
        except DataError as error:
            raise one_value(file, encoding) or error from None
    if not keys:
        raise DataError(f"{file} is empty; expected one JSON object per line")
    return keys


_KEYS = "reviews as JSON Lines, reviewerID, asin, unixReviewTime; metadata: "
READER = Reader(
    {
        "amazon-2014": _KEYS + "categories",
        "amazon-2018": _KEYS + "category",
        "amazon-2023": "reviews as JSON Lines, user_id, parent_asin, timestamp (ms); metadata "
        "likewise",
    },
    detect,
    amazon,
)
