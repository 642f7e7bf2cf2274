"""The catalog of a log: items in order, their fields and texts, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa

from l2rec.data.catalog import with_separator
from l2rec.data.formats.source import Source
from l2rec.data.preparation.state import State
from l2rec.data.preparation.texts import item_text, parse_template
from l2rec.errors import DataError

OWN = ("csv", "parquet", "jsonl")
"""Formats whose columns are whatever somebody has: prices and addresses of pictures, perhaps."""


@dataclass(frozen=True)
class RawCatalog:
    """Items in catalog order. ``table``: item_id, stored fields, text. ``ids``: one array."""

    table: pa.Table
    ids: pa.Array
    fields: tuple[str, ...]

    @classmethod
    def of_ids(cls, ids: pa.Array) -> RawCatalog:
        texts = pa.array(np.full(len(ids), ""), type=pa.string())
        return cls(pa.table({"item_id": ids, "text": texts}), ids, ())


def read_catalog(source: Source, state: State) -> RawCatalog | None:
    """Read the catalog of a log, and make the texts of its items; None where there is none.

    Raises:
        DataError: a template that does not fit, no rows, or different rows with one id.
    """
    config = state.config
    template = None if config.text is None else parse_template(config.text)
    if source.catalog is None:
        if template is not None:
            raise DataError(
                f"text={config.text!r} needs a catalog, but {source.files[0].name} comes without "
                f"one; pass --items FILE or leave text out"
            )
        state.notes.append("no catalog: items have no text, only their ids are known")
        return None
    known = (*source.fields, *source.more_fields)
    text = item_text(config.text, source.fields, known)
    if template is None and len(source.fields) > 1 and source.format in OWN:
        state.notes.append(
            f"an item reads as its columns {', '.join(source.fields)}, joined; to choose, pass "
            f'--text "{{{source.fields[0]}}}" or the like'
        )
    named = [name for _, name in template or [] if name is not None]
    extra = [name for name in source.more_fields if name in named]
    fields = (*source.fields, *extra)
    frames = []
    for batch in source.catalog(fields):
        frames.append(cast(pl.DataFrame, pl.from_arrow(batch)))
        state.report.rows("catalog rows", batch.num_rows)
    if not frames:
        raise DataError(
            f"the catalog of {source.files[-1].name} has no rows; "
            f"give a catalog with items, or none at all"
        )
    frame = _without_duplicates(pl.concat(frames), state)
    frame = frame.with_columns(text.alias("__text"))
    if "text" in fields and frame["__text"].equals(frame["text"].str.strip_chars()):
        frame = frame.drop("text")  # it is the text already
        fields = tuple(name for name in fields if name != "text")
    taken = _out_of_the_way(fields)
    frame = frame.rename(taken | {"__id": "item_id", "__text": "text"})
    ids = frame["item_id"].to_arrow().cast(pa.large_string())
    state.counters["catalog_items"] = len(ids)
    names = [taken.get(name, name) for name in fields]
    separators = {
        taken.get(name, name): between
        for name, between in source.separators.items()
        if name in fields
    }
    return RawCatalog(_plain(frame, separators), ids, tuple(names))


def _out_of_the_way(fields: Sequence[str]) -> dict[str, str]:
    """Rename fields that are called as columns of the data set are: item_id and text."""
    taken: dict[str, str] = {}
    for name in ("item_id", "text"):
        if name in fields:
            free = f"raw_{name}"
            while free in fields:
                free = f"raw_{free}"
            taken[name] = free
    return taken


def _without_duplicates(frame: pl.DataFrame, state: State) -> pl.DataFrame:
    frame = frame.rename({"item_id": "__id"})
    rows = len(frame)
    if frame["__id"].n_unique() == rows:
        return frame
    frame = frame.unique(maintain_order=True)
    double = frame["__id"].is_duplicated()
    if double.any() and state.config.duplicate_items == "error":
        ids = frame["__id"].filter(double).unique(maintain_order=True)
        raise DataError(
            f"{len(ids):,} item ids have different rows in the catalog, the first is {ids[0]!r}; "
            f"remove one of the rows or pass --duplicate-items first"
        )
    frame = frame.unique(subset="__id", keep="first", maintain_order=True)
    state.counters["duplicate_catalog_rows"] = rows - len(frame)
    state.notes.append(f"{rows - len(frame):,} repeated catalog rows were left out")
    return frame


def _plain(frame: pl.DataFrame, separators: Mapping[str, str]) -> pa.Table:
    """Return the table as strings; fields of several values say what stands between these."""
    table = frame.to_arrow()
    columns = [
        with_separator(pa.field(name, string_type(table[name])), separators.get(name))
        for name in table.column_names
    ]
    return table.cast(pa.schema(columns))


def string_type(column: pa.ChunkedArray) -> pa.DataType:
    """Choose strings with offsets of four bytes where these suffice."""
    return pa.string() if column.nbytes < 1 << 30 else pa.large_string()
