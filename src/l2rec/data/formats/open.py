"""Public file formats as streams of Arrow batches: events on one side, the catalog on the other.

`FORMATS` lists them. `open_source` finds out which one it is and returns a `Source`: nothing is
read before its ``events()`` or ``catalog()`` is iterated, and never more than a block of the file
is in memory. Every DataError names the file and, where it can, the line.
"""

from __future__ import annotations

__all__ = ["FORMATS", "open_source"]

from dataclasses import replace
from pathlib import Path

from l2rec.data.formats.amazon import amazon, amazon_catalog
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.csv import separated
from l2rec.data.formats.files import (
    File,
    listing,
)
from l2rec.data.formats.movielens import movielens
from l2rec.data.formats.objects import one_value
from l2rec.data.formats.parquet import parquet, parquet_catalog
from l2rec.data.formats.recbole import atomic_catalog, is_atomic, recbole
from l2rec.data.formats.sequences import sequences, shape
from l2rec.data.formats.source import (
    BLOCK_BYTES,
    CatalogReader,
    Context,
    Source,
)
from l2rec.data.formats.tables import (
    named_table,
    read_header,
    table_catalog,
)
from l2rec.errors import DataError, nearest

FORMATS = {
    "recbole": "NAME.inter, perhaps with NAME.item: tabs, headers name:type (RecBole)",
    "amazon-2014": "reviews as JSON Lines, reviewerID, asin, unixReviewTime; metadata: categories",
    "amazon-2018": "reviews as JSON Lines, reviewerID, asin, unixReviewTime; metadata: category",
    "amazon-2023": "reviews as JSON Lines, user_id, parent_asin, timestamp (ms); metadata likewise",
    "movielens-100k": "u.data and u.item, a folder or the zip (MovieLens)",
    "movielens-1m": "ratings.dat and movies.dat, USER::ITEM::RATING::TIME (MovieLens)",
    "movielens-latest": "ratings.csv with userId, movieId and movies.csv (MovieLens)",
    "csv": "a table with a header, .csv or .tsv; --user, --item, --timestamp (yours)",
    "parquet": "such a table as Parquet, one file or a folder of parts (yours)",
    "sequences": ".txt, USER ITEM ITEM ... in a line, oldest first (S3-Rec, P5, OpenP5, TIGER)",
    "pairs": ".txt, USER ITEM in a line for each event, in order (SASRec, BERT4Rec)",
}
"""Names for ``--format``, each with what it looks like and whose data has it."""


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
    ``block_bytes``: about how much of a file is parsed at a time.

    Raises:
        DataError: no known format, or columns, headers or files are missing.
    """
    context = Context(columns or Columns(), block_bytes)
    opened = _open_source(Path(source), items, format, context)
    return replace(opened, notes=context.notes)


def _open_source(
    path: Path, items: str | Path | None, format: str | None, context: Context
) -> Source:
    if format is not None and format not in (*FORMATS, "amazon", "movielens"):
        raise DataError(
            f"--format {format} is not known{nearest(format, FORMATS)}; "
            f"choose one of {', '.join(FORMATS)}"
        )
    if items is not None and not Path(items).is_file():
        raise DataError(f"catalog file {items} does not exist; check --items")
    if (path / "dataset.json").is_file():
        raise DataError(
            f"{path} is a prepared data set already; use it as it is, or prepare its source"
        )
    files = listing(path)
    catalog_file = File(Path(items)) if items is not None else None
    kind = format or _detect(path, files, catalog_file, context)
    if kind == "movielens":
        inside = path.is_dir() or path.suffix.lower() == ".zip"
        beside = files if inside else listing(path.parent)
        kind = _detect(path, beside, catalog_file, context)
    if kind == "recbole":
        return recbole(path, files, catalog_file, context, _open_catalog)
    if kind.startswith("movielens"):
        return movielens(path, files, kind, context)
    if kind.startswith("amazon"):
        return amazon(path, files, catalog_file, context)
    if kind == "parquet":
        return parquet(path, files, catalog_file, context, _open_catalog)
    if kind in ("sequences", "pairs"):
        return sequences(path, files, catalog_file, kind, context, _open_catalog)
    logs = [f for f in files.values() if f != catalog_file]
    if len(logs) == 1 and is_atomic(logs[0], context.columns.encoding):
        return recbole(path, files, catalog_file, context, _open_catalog)
    return separated(path, files, catalog_file, context, _open_catalog)


def _detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str:
    for name, kind in (
        ("u.data", "movielens-100k"),
        ("ratings.dat", "movielens-1m"),
    ):
        if name in files:
            return kind
    if "ratings.csv" in files and "userId" in read_header(files["ratings.csv"], ",", "utf-8"):
        return "movielens-latest"
    if any(file.ends(".inter") for file in files.values()):
        return "recbole"
    encoding = context.columns.encoding

    def text() -> str | None:
        """Return the shape of the first .txt file that has one."""
        return next((s for f in files.values() if f != items and (s := shape(f, encoding))), None)

    objects = [file for file in files.values() if file.ends(".json")]
    if objects and (told := text()) and all(one_value(file, encoding) for file in objects):
        return told  # the objects are S3-Rec's attributes of items, or P5's maps of ids
    for suffixes, kind in (
        ((".json", ".jsonl"), "amazon"),
        ((".parquet",), "parquet"),
        ((".csv", ".tsv"), "csv"),
    ):
        if any(file.ends(*suffixes) for file in files.values()):
            return kind
    if told := text():
        return told
    found = ", ".join(list(files)[:5]) or "nothing"
    raise DataError(
        f"no known format in {path}: found {found}; looked for *.inter (RecBole), *.json or "
        f"*.jsonl, plain or .gz (Amazon), u.data, ratings.dat or ratings.csv (MovieLens), "
        f"*.parquet, *.csv, *.tsv and *.txt of lines USER ITEM ITEM ...; name its format with "
        f"--format, such as --format csv for a table with a header (l2rec prepare --formats lists "
        f"them)"
    )


def _open_catalog(file: File, context: Context) -> CatalogReader:
    """Open a catalog in whatever format its name says."""
    item = context.columns.item
    if file.ends(".json", ".jsonl"):
        return amazon_catalog(file, context)
    if file.ends(".parquet"):
        return parquet_catalog(file, item)
    if file.ends(".item") or is_atomic(file, context.columns.encoding):
        return atomic_catalog(file, context)
    table = named_table(file, context)
    fields = tuple(name for name in table.names if name not in (item, ""))
    return CatalogReader(table_catalog(table, item, context), fields)
