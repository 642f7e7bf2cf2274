"""RecBole atomic files: .inter with .item beside it, headers name:type."""

from __future__ import annotations

from pathlib import Path

from l2rec.data.formats.files import (
    File,
    given_splits,
    is_folder,
    only_file,
    split_note,
    splits_note,
    stem,
)
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_source,
)
from l2rec.data.formats.tables import (
    Table,
    check_names,
    read_header,
    split_tables,
    table_catalog,
    table_events,
)
from l2rec.errors import DataError

TYPES = ("token", "token_seq", "float", "float_seq")


def is_atomic(file: File, encoding: str) -> bool:
    """Tell whether the header gives each column a type, as RecBole's files do under any name."""
    header = read_header(file, "\t", encoding, quotes=False)
    return all(cell.rpartition(":")[2] in TYPES for cell in header)


def atomic_table(file: File, context: Context) -> tuple[Table, dict[str, str]]:
    """Return the table under its bare column names, and the type of each."""
    encoding = context.columns.encoding
    header = read_header(file, "\t", encoding, quotes=False)
    types: dict[str, str] = {}
    for cell in header:
        name, _, kind = cell.rpartition(":")
        if not name or kind not in TYPES:
            raise DataError(
                f"{file}, line 1: header {cell!r} has no type; write name:token, name:token_seq, "
                f"name:float or name:float_seq, separated by tabs"
            )
        types[name] = kind
    check_names(file, [cell.rpartition(":")[0] for cell in header])
    table = Table(file, list(types), "\t", quotes=False, encoding=encoding, notes=context.notes)
    return table, types


def atomic_catalog(file: File, context: Context) -> CatalogReader:
    """Open a .item file: token columns make the text, numbers are read when named."""
    item = context.columns.item
    table, types = atomic_table(file, context)
    names = [name for name in types if name != item]
    return CatalogReader(
        table_catalog(table, item, context),
        tuple(name for name in names if types[name].startswith("token")),
        tuple(name for name in names if types[name].startswith("float")),
        {name: " " for name in names if types[name] == "token_seq"},
    )


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by a .inter file."""
    return "recbole" if any(file.ends(".inter") for file in files.values()) else None


def recbole(
    path: Path,
    files: dict[str, File],
    items: File | None,
    _kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open a .inter file, and the .item file that is given or lies beside it."""
    if splits := given_splits(files.values(), (".inter",)):
        logs, beside = list(splits), f"{stem(splits[0])}.item"
        context.notes.append(splits_note(logs))
    else:
        file = None if is_folder(path) else File(path)
        logs = [file or only_file(path, files, (".inter",), ".inter")]
        beside = logs[0].name.removesuffix(".inter") + ".item"
        context.notes.extend(split_note(logs[0]))
    opened = [atomic_table(file, context) for file in logs]
    lists = [name for name, kind in opened[0][1].items() if kind.endswith("_seq")]
    tables = [table for table, _ in opened]
    tables = split_tables(tables) if splits else tables
    events = table_events(tables, context.columns, context, lists)
    if items is None:
        if logs[0].member is None:
            named = logs[0].path.with_name(beside)
            items = File(named) if named.is_file() else None
        else:
            items = files.get(beside)
    catalog = open_catalog(items, context) if items else None
    return as_source("recbole", [*logs, *([items] if items else [])], events, catalog)


READER = Reader(
    {"recbole": "NAME.inter, perhaps with NAME.item: tabs, headers name:type (RecBole)"},
    detect,
    recbole,
)
