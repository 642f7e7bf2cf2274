"""A prepared data set with newer events, items and users added to it."""

from __future__ import annotations

__all__ = ["extend"]

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa

from l2rec.data.dataset import EVENT_COLUMNS, Dataset
from l2rec.data.formats.source import Source
from l2rec.data.prepare import PrepareConfig, build, item_text
from l2rec.errors import DataError


def extend(
    dataset: Dataset,
    newer: Source,
    out: str | Path,
    *,
    drop_unknown_items: bool = False,
    progress: bool = True,
) -> Dataset:
    """Write the data set folder ``out`` with the events of ``dataset`` and those of a log.

    Known items come first and keep their ints and texts; those that the log's catalog has besides
    follow. Their texts are its field ``text``, or made as those of ``dataset`` were. Every event
    and every item stays: filters such as ``k_core`` are not applied again. Event types are not
    carried over.

    Raises:
        DataError: ``dataset`` has cold items, splits of its own or no times, events of items
            without a text (unless ``drop_unknown_items``), a log that is all older, or whatever
            `prepare` refuses.
    """
    options = dataset.meta.get("options") or {}
    if dataset.n_cold:
        raise DataError(
            f"{dataset.path} has cold items, which newer events would make warm; extend the data "
            "set that it was made of"
        )
    if dataset.splits is not None:
        raise DataError(
            f"{dataset.path} came with splits of its own, which newer events do not have; prepare "
            "it with --splits none"
        )
    if options.get("timestamp", "timestamp") is None:
        raise DataError(
            f"{dataset.path} has no times, so nobody can say what is newer; prepare the whole log"
        )
    frame = _catalog(dataset, newer, options.get("text"))
    fields = tuple(name for name in frame.columns if name != "item_id")

    def events() -> Iterator[pa.RecordBatch]:
        yield from dataset.event_batches()
        newest = -np.inf
        for batch in newer.events():
            newest = max(newest, float(np.max(batch["timestamp"].to_numpy(), initial=-np.inf)))
            yield batch.select(list(EVENT_COLUMNS))
        if newest < float(dataset.timestamps.min()):
            raise DataError(
                f"{newer.files[0]}: its newest event (time {newest:.15g}) is older than all of "
                f"{dataset.path} (from {float(dataset.timestamps.min()):.15g} on); are both in one "
                "unit of time?"
            )

    def catalog(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from frame.select("item_id", *names).to_arrow().to_batches()

    source = Source(
        format="extend",
        files=(dataset.path / "dataset.json", *newer.files),
        events=events,
        catalog=catalog,
        fields=fields,
        notes=newer.notes,
    )
    config = PrepareConfig(
        text="{text}",
        keep_all_items=True,
        drop_unknown_items=drop_unknown_items,
        max_history=options.get("max_history"),
        ties=options.get("ties", "file"),
        ties_seed=options.get("ties_seed", 0),
    )
    origin = f"{dataset.name} + {newer.files[0].name}"
    return build(source, Path(out), config, origin=origin, progress=progress)


def _catalog(dataset: Dataset, newer: Source, template: str | None) -> pl.DataFrame:
    """Return item_id, the fields of the data set, and text: known items, then new ones."""
    known = cast(pl.DataFrame, pl.from_arrow(dataset.catalog)).drop("raw_text", strict=False)
    known = known.with_columns(pl.all().cast(pl.String))
    if newer.catalog is None:
        if any(dataset.texts()):
            return known
        ids = [pl.Series(b["item_id"]).cast(pl.String).unique() for b in newer.events()]
        rows = pl.DataFrame({"item_id": pl.concat(ids).unique(maintain_order=True)})
    else:
        own = "text" in (*newer.fields, *newer.more_fields)
        fields = tuple(dict.fromkeys((*newer.fields, *newer.more_fields)))
        rows = cast(
            pl.DataFrame, pl.from_arrow(pa.Table.from_batches(list(newer.catalog(fields))))
        ).unique("item_id", keep="first", maintain_order=True)
        text = pl.col("text") if own else item_text(template, newer.fields, rows.columns)
        rows = rows.with_columns(text.alias("text"))
    fresh = rows.join(known.select("item_id"), on="item_id", how="anti", maintain_order="left")
    fresh = fresh.select([name for name in known.columns if name in fresh.columns])
    return pl.concat([known, fresh], how="diagonal").fill_null("")
