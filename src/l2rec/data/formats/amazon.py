"""Amazon reviews of 2014, 2018 and 2023: JSON lines, plain or gzipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import polars as pl
import pyarrow as pa

from l2rec.data.formats.fields import clean, flat, joined, separator_of
from l2rec.data.formats.files import (
    File,
    is_folder,
    line_blocks,
    line_in_block,
    only_file,
    reading,
    split_note,
)
from l2rec.data.formats.ignored import SAMPLE_ROWS
from l2rec.data.formats.jsonl import (
    Keys,
    check_lists,
    first_keys,
    first_rows,
    json_block,
    json_lines,
    keys_of,
    line_events,
)
from l2rec.data.formats.objects import one_value
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_source,
    catalog_batch,
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


OLDER = {"reviewerID", "asin", "unixReviewTime"}
NEWER = {"user_id", "parent_asin", "timestamp"}


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the keys of the first lines; they tell the year too, when it is opened."""
    encoding = context.columns.encoding
    logs = (f for n, f in files.items() if f != items and not n.startswith("meta_"))
    known = (keys_of(file, encoding) for file in logs)
    return "amazon" if any(keys >= OLDER or keys >= NEWER for keys in known) else None


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
    keys = first_keys(file, encoding)
    if keys >= OLDER:
        format, unit, names = "amazon-2018", 1, Keys("reviewerID", "asin", "unixReviewTime")
    elif keys >= NEWER:
        format, unit, names = "amazon-2023", 1000, Keys("user_id", "parent_asin", "timestamp")
    else:
        raise DataError(
            f"{file} has the keys {', '.join(sorted(keys)[:12])}; expected reviewerID, asin, "
            f"unixReviewTime (Amazon 2014, 2018) or user_id, parent_asin, timestamp (2023); for "
            f"other JSON Lines pass --format jsonl, and name their keys by --user, --item and "
            f"--timestamp"
        )
    # Other lists of reviews, such as pictures, are known: nobody needs a note on them.
    check_lists(file, names, first_rows(file, encoding, SAMPLE_ROWS), [])
    context.notes.extend(split_note(file))
    catalog = open_catalog(items, context) if items else None
    by_line = items and items.ends(".json", ".jsonl") and one_value(items, encoding) is None
    if items and by_line and _amazon_version(items, encoding) == "amazon-2014":
        format = "amazon-2014"
    used = [file, *([items] if items else [])]
    return as_source(format, used, line_events(file, names, context, unit), catalog)


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


def is_metadata(file: File, encoding: str) -> bool:
    """Tell whether the lines have the key of Amazon's items."""
    return not first_keys(file, encoding).isdisjoint({"asin", "parent_asin"})


def _amazon_version(file: File, encoding: str) -> str:
    keys = first_keys(file, encoding)
    if "parent_asin" in keys:
        return "amazon-2023"
    if "asin" not in keys:
        raise DataError(
            f"{file} has the keys {', '.join(sorted(keys)[:12])}; expected Amazon metadata with "
            f"asin (2014, 2018) or parent_asin (2023)"
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
                table = json_block(block, schema)
                if table is None:
                    rows = json_lines(file, block, first)
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
