"""RecBole atomic files: .inter with .item beside it, headers name:type."""

from __future__ import annotations

from pathlib import Path

from l2rec.data.formats.files import File, only_file
from l2rec.data.formats.source import CatalogReader, Context, OpenCatalog, Source, as_source
from l2rec.data.formats.tables import Table, read_header, table_catalog, table_events
from l2rec.errors import DataError


def _atomic_table(file: File, encoding: str) -> tuple[Table, dict[str, str]]:
    """Return the table under its bare column names, and the type of each."""
    header = read_header(file, "\t", encoding)
    types: dict[str, str] = {}
    for cell in header:
        name, _, kind = cell.rpartition(":")
        if not name or kind not in ("token", "token_seq", "float", "float_seq"):
            raise DataError(
                f"{file}, line 1: header {cell!r} has no type; write name:token, name:token_seq, "
                f"name:float or name:float_seq, separated by tabs"
            )
        types[name] = kind
    return Table(file, list(types), "\t", quotes=False, encoding=encoding), types


def atomic_catalog(file: File, context: Context) -> CatalogReader:
    """Open a .item file: token columns make the text, numbers are read when named."""
    item = context.columns.item
    table, types = _atomic_table(file, context.columns.encoding)
    names = [name for name in types if name != item]
    return CatalogReader(
        table_catalog(table, item, context),
        tuple(name for name in names if types[name].startswith("token")),
        tuple(name for name in names if types[name].startswith("float")),
    )


def recbole(
    path: Path,
    files: dict[str, File],
    items: File | None,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open a .inter file, and the .item file that is given or lies beside it."""
    file = only_file(path, files, (".inter",), ".inter")
    table, _ = _atomic_table(file, context.columns.encoding)
    events = table_events([table], context.columns, context)
    if items is None:
        beside = file.name.removesuffix(".inter") + ".item"
        if file.member is None:
            named = file.path.with_name(beside)
            items = File(named) if named.is_file() else None
        else:
            items = files.get(beside)
    catalog = open_catalog(items, context) if items else None
    return as_source("recbole", [file, *([items] if items else [])], events, catalog)
