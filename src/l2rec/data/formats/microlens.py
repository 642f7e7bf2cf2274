"""MicroLens: what users of a video service commented on, with the titles of the videos.

NAME_pairs.csv       user,item,timestamp, in milliseconds
NAME_pairs.tsv       USER, a tab, and their ITEMs with blanks, oldest first; no times
NAME_titles.csv      item,title
NAME_title_en.csv    the same without a header and without quotes: cut at the first comma
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa

from l2rec.data.formats.dates import in_milliseconds
from l2rec.data.formats.files import File, beside, is_folder, line_blocks, reading
from l2rec.data.formats.sequences import line_events
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_arrow,
    as_source,
    catalog_batch,
)
from l2rec.data.formats.tables import named_table, read_header, table_catalog, table_events
from l2rec.errors import DataError

TABLE, SEQUENCES = "_pairs.csv", "_pairs.tsv"
COLUMNS = ["user", "item", "timestamp"]
TITLES = ("_titles.csv", "_title_en.csv", "_titles_en.csv", "_title.csv")
_ITEMS = re.compile(r"\d+( \d+)*")
_TITLE = r"^(\d+)(?:,(.*))?$"


def _is_log(file: File, encoding: str) -> bool:
    if file.ends(TABLE):
        return read_header(file, ",", encoding) == COLUMNS
    if not file.ends(SEQUENCES):
        return False
    cells = read_header(file, "\t", encoding, quotes=False)
    return len(cells) == 2 and all(_ITEMS.fullmatch(cell.strip()) for cell in cells)


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the end of a file's name and its first line."""
    logs = (file for file in files.values() if file != items)
    return "microlens" if any(_is_log(f, context.columns.encoding) for f in logs) else None


def microlens(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open the log with times, or else the one without, and the titles given or beside it."""
    encoding = context.columns.encoding
    file = _log(path, files, items, encoding) if is_folder(path) else File(path)
    files = beside(path, files)
    if not file.ends(TABLE, SEQUENCES) or not _is_log(file, encoding):
        raise DataError(
            f"{file} is not MicroLens: expected NAME{TABLE} with the header {','.join(COLUMNS)}, "
            f"or NAME{SEQUENCES} with a user, a tab and their items in each line; choose another "
            f"--format"
        )
    name = file.name[: -len(TABLE)]
    items = items or next((f for end in TITLES if (f := files.get(name + end))), None)
    others = sorted(n for n, f in files.items() if n.startswith(name) and f not in (file, items))
    if others:
        context.notes.append(f"not read beside {file.name}: {', '.join(others)}")
    if file.ends(SEQUENCES):
        events = line_events(file, "sequences", context)
    else:
        time = None if context.columns.timestamp is None else "timestamp"
        columns = replace(context.columns, user="user", item="item", timestamp=time)
        table = named_table(file, context)
        first = table.sample(1)["timestamp"]
        if time and first and not in_milliseconds(first[0]):
            context.notes.append(
                f"times are taken for milliseconds, but the first, {first[0]}, would be of the "
                f"year 1973 or earlier; if they are seconds, pass --format csv --user user --item "
                f"item"
            )
        events = table_events([table], columns, context, unit=1000)
    catalog = _titles(items, context, open_catalog) if items else None
    return as_source(kind, [file, *([items] if items else [])], events, catalog)


def _log(path: Path, files: dict[str, File], items: File | None, encoding: str) -> File:
    logs = [file for file in files.values() if file != items and _is_log(file, encoding)]
    found = [file for file in logs if file.ends(TABLE)] or logs
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{path} has {len(found)} logs of MicroLens ({names}), not one; give the path of the "
            f"file, NAME{TABLE} or NAME{SEQUENCES}"
        )
    return found[0]


# ---------------------------------------------------------------- titles


def _titles(file: File, context: Context, open_catalog: OpenCatalog) -> CatalogReader:
    """Open the titles, with a header or without."""
    encoding = context.columns.encoding
    if not file.ends(*TITLES):
        return open_catalog(file, context)
    if read_header(file, ",", encoding, quotes=False)[0].strip() != "item":
        return CatalogReader(_cut_titles(file, context), ("title",))
    table = named_table(file, context)
    fields = tuple(name for name in table.names if name not in ("item", ""))
    return CatalogReader(table_catalog(table, "item", context), fields)


def _cut_titles(
    file: File, context: Context
) -> Callable[[Sequence[str]], Iterator[pa.RecordBatch]]:
    """Read lines that are cut at their first comma; quotes are part of a title."""
    encoding = context.columns.encoding

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with reading(file, encoding):
            for block, first in line_blocks(file, context.block_bytes, encoding):
                lines = (
                    pl.DataFrame({"text": block.decode().split("\n")})
                    .with_row_index("line", offset=first)
                    .with_columns(pl.col("text").str.strip_chars("\r"))
                    .filter(pl.col("text").str.strip_chars() != "")
                    .with_columns(
                        item=pl.col("text").str.extract(_TITLE, 1),
                        title=pl.col("text").str.extract(_TITLE, 2),
                    )
                )
                if lines["item"].null_count():
                    line, text = lines.filter(pl.col("item").is_null()).row(0)[:2]
                    raise DataError(
                        f"{file}, line {line} does not begin with a number and a comma: "
                        f"{text[:60]!r}; write one item in each line, as 7,its title"
                    )
                yield catalog_batch(
                    as_arrow(lines["item"]),
                    {name: as_arrow(lines[name]) for name in fields},
                    lambda row, lines=lines: f"{file}, line {lines['line'][row]}",  # type: ignore[misc]
                )

    return catalog


READER = Reader(
    {"microlens": "NAME_pairs.csv (ms) or .tsv, NAME_titles.csv or _title_en.csv (MicroLens)"},
    detect,
    microlens,
)
