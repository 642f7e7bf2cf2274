"""Public file formats as streams of Arrow batches: events on one side, the catalog on the other.

`FORMATS` lists them. `open_source` finds out which one it is and returns a `Source`: nothing is
read before its ``events()`` or ``catalog()`` is iterated, and never more than a block of the file
is in memory. Every DataError names the file and, where it can, the line.
"""

from __future__ import annotations

__all__ = ["FORMATS", "open_source"]

from dataclasses import replace
from pathlib import Path

from l2rec.data.formats import (
    amazon,
    amazon_csv,
    csv,
    jsonl,
    lcrec,
    microlens,
    mind,
    minionerec,
    movielens,
    parquet,
    recbole,
    recformer,
    s3rec,
    sequences,
    ucsd,
    unisrec,
    yambda,
)
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.files import File, beside, listing
from l2rec.data.formats.objects import kind as object_kind
from l2rec.data.formats.objects import object_catalog, one_value
from l2rec.data.formats.source import BLOCK_BYTES, CatalogReader, Context, Reader, Source
from l2rec.data.formats.tables import named_table, table_catalog
from l2rec.errors import DataError, nearest

READERS: tuple[Reader, ...] = (
    movielens.READER,
    lcrec.READER,
    recformer.READER,
    unisrec.READER,
    minionerec.READER,
    mind.READER,
    microlens.READER,
    recbole.READER,
    sequences.READER,
    amazon_csv.READER,
    amazon.READER,
    ucsd.READER,
    jsonl.READER,
    yambda.READER,
    parquet.READER,
    csv.READER,
)
"""All readers, in the order in which they are asked whether a log is theirs."""

FORMATS = {name: looks for reader in READERS for name, looks in reader.formats.items()}
"""Names for ``--format``, each with what it looks like and whose data has it."""

LOG_ENDINGS = (".inter", ".csv", ".tsv", ".parquet", *jsonl.ENDINGS)
"""Ends of files that are logs in some format or other."""

FAMILIES = {"amazon": amazon.READER, "movielens": movielens.READER}
"""Names for ``--format`` that leave the year or the size to the reader."""


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
    if format is None and Path(source).is_dir():
        context.notes.extend(_unread(Path(source), opened, context))
    return replace(opened, notes=context.notes)


def _unread(folder: Path, opened: Source, context: Context) -> list[str]:
    """Name the files of a folder that may be logs too, and of which no note speaks."""
    told = " ".join(context.notes)
    left = [
        name
        for name, file in listing(folder).items()
        if file.ends(*LOG_ENDINGS)
        and not file.ends(s3rec.ATTRIBUTES)
        and file.path not in opened.files
        and name not in told
    ]
    left += [name for name in _in_subfolders(folder, opened) if name not in told]
    if not left:
        return []
    shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
    return [f"read as {opened.format}; not read: {shown}; give the path of a file to read it alone"]


def _in_subfolders(folder: Path, opened: Source) -> list[str]:
    """Name the files below the folder that was listed which may be logs, and were not read."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if len(inside) == 1 and inside[0].is_dir():
        return _in_subfolders(inside[0], opened)
    found = sorted(path for pattern in ("*/*", "*/*/*") for path in folder.glob(pattern))
    return [
        str(path.relative_to(folder))
        for path in found
        if path.is_file() and File(path).ends(*LOG_ENDINGS) and path not in opened.files
    ]


def _open_source(
    path: Path, items: str | Path | None, format: str | None, context: Context
) -> Source:
    if format is not None and format not in {*FORMATS, *FAMILIES}:
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
    reader, kind = _reader(path, files, catalog_file, format, context)
    return reader.open(path, files, catalog_file, kind, context, _open_catalog)


def _reader(
    path: Path, files: dict[str, File], items: File | None, format: str | None, context: Context
) -> tuple[Reader, str]:
    """Find the reader and the name of the format, by name or by looking."""
    if format == "movielens":
        files = beside(path, files)
        format = movielens.detect(path, files, items, context)
        if format is None:
            raise DataError(
                f"{path} has no u.data, no ratings.dat and no ratings.csv with a column userId, as "
                f"MovieLens has; choose another --format"
            )
    if format == "amazon":
        format = amazon_csv.detect(path, files, items, context) or format
    if format is not None:
        named = (reader for reader in READERS if format in reader.formats)
        return FAMILIES.get(format) or next(named), format
    for reader in READERS:
        if (kind := reader.detect(path, files, items, context)) is not None:
            return reader, kind
    for file in files.values():
        if any(other.ends(".txt") for other in files.values()):
            break  # which may well be the log
        if file.ends(".json") and (told := one_value(file, context.columns.encoding)):
            raise told
    found = ", ".join(list(files)[:5]) or _folders_in(path)
    raise DataError(
        f"no known format in {path}: found {found}; looked for *.inter (RecBole), *.json, *.jsonl "
        f"or *.ndjson, plain or .gz, u.data, ratings.dat or ratings.csv (MovieLens), "
        f"*.parquet, *.csv, *.tsv and *.txt of lines USER ITEM ITEM ...; name its format with "
        f"--format, such as --format csv for a table with a header or --format sequences for a "
        f"user and all their items in each line (l2rec prepare --formats lists them)"
    )


def _folders_in(path: Path) -> str:
    """Say what a folder without files holds."""
    names = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    return f"only folders ({', '.join(names[:5])})" if names else "nothing"


def _open_catalog(file: File, context: Context) -> CatalogReader:
    """Open a catalog in whatever format its name says."""
    item, encoding = context.columns.item, context.columns.encoding
    if file.ends(".json") and object_kind(file, encoding) == "fields":
        return object_catalog(file, context)
    if file.ends(s3rec.ATTRIBUTES):
        return s3rec.attribute_catalog(file, context)
    if file.ends(*jsonl.ENDINGS):
        if amazon.is_metadata(file, encoding):
            return amazon.amazon_catalog(file, context)
        return jsonl.line_catalog(file, item, context)
    if file.ends(".parquet"):
        return parquet.parquet_catalog(file, item)
    atomic = recbole.is_atomic(file, encoding)
    if atomic and file.ends(".text"):
        return unisrec.text_catalog(file, context)
    if atomic or file.ends(".item"):
        return recbole.atomic_catalog(file, context)
    table = named_table(file, context)
    fields = tuple(name for name in table.names if name not in (item, ""))
    return CatalogReader(table_catalog(table, item, context), fields)
