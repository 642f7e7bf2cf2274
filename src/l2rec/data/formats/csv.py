"""CSV and TSV with named columns; the catalog is a second file."""

from __future__ import annotations

from pathlib import Path

from l2rec.data.formats.files import (
    File,
    catalog_beside,
    given_splits,
    is_folder,
    only_file,
    split_note,
    splits_note,
)
from l2rec.data.formats.recbole import is_atomic, recbole
from l2rec.data.formats.sequences import shape
from l2rec.data.formats.source import Context, OpenCatalog, Reader, Source, as_source
from l2rec.data.formats.tables import named_table, split_tables, table_events

SUFFIXES = (".csv", ".tsv")


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the end of a file's name."""
    return "csv" if any(file.ends(*SUFFIXES) for file in files.values()) else None


def separated(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open a log of named columns, and the catalog that is given or lies beside it."""
    logs = [file for file in files.values() if file != items]
    if len(logs) == 1 and is_atomic(logs[0], context.columns.encoding):
        return recbole(path, files, items, "recbole", context, open_catalog)
    others = {n: f for n, f in files.items() if items is None or f.path != items.path}
    if items is None and len(files) > 1:
        items = catalog_beside(files)
        others = {n: f for n, f in files.items() if f is not items}
    if splits := given_splits(others.values(), SUFFIXES):
        logs = list(splits)
        tables = split_tables([named_table(file, context) for file in logs])
        context.notes.append(splits_note(logs))
    else:
        logs = [
            only_file(path, others, SUFFIXES, ".csv or .tsv") if is_folder(path) else File(path)
        ]
        tables = [named_table(logs[0], context)]
        context.notes.extend(split_note(logs[0]))
    encoding = context.columns.encoding
    logs_too = [f.name for f in others.values() if f not in logs and shape(f, encoding)]
    if logs_too:
        context.notes.append(
            f"{logs[0].name} is read, not {', '.join(logs_too)}, though its lines look like events "
            f"too; give the path of the file to read that"
        )
    events = table_events(tables, context.columns, context)
    catalog = open_catalog(items, context) if items else None
    return as_source("csv", [*logs, *([items] if items else [])], events, catalog)


READER = Reader(
    {"csv": "a table with a header, .csv or .tsv; --user, --item, --timestamp (yours)"},
    detect,
    separated,
)
