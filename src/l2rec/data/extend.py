"""A prepared data set with newer events, items and users added to it."""

from __future__ import annotations

__all__ = ["extend"]

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

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
    and every item stays: filters such as ``k_core`` are not applied again. Events of the log that
    ``dataset`` has already (user, item and time; one copy there stands for one in the log) are not
    repeated. Event types are not carried over.

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
        known, newest = _Known(dataset), -np.inf
        for batch in newer.events():
            newest = max(newest, float(np.max(batch["timestamp"].to_numpy(), initial=-np.inf)))
            yield known.without(batch.select(list(EVENT_COLUMNS)))
        if newest < float(dataset.timestamps.min()):
            raise DataError(
                f"{newer.files[0]}: its newest event (time {newest:.15g}) is older than all of "
                f"{dataset.path} (from {float(dataset.timestamps.min()):.15g} on); are both in one "
                "unit of time?"
            )
        if known.found:
            newer.notes.append(f"{known.found:,} events of the log were there already; left out")

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


class _Known:
    """Events of a data set, to leave out of a log that has them too. ``found``: left out so far."""

    def __init__(self, dataset: Dataset) -> None:
        self._ids = dataset.user_ids.cast(pa.string()), dataset.item_ids.cast(pa.string())
        users = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
        events = {"user": users, "item": dataset.items, "time": dataset.timestamps}
        self._copies = pl.DataFrame(events).group_by("user", "item", "time").len("copies")
        self._copies = self._copies.cast({"user": pl.Int32, "item": pl.Int32})
        self._met: dict[tuple[int, int, float], int] = {}
        self.found = 0

    def without(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the events of a batch that the data set does not have."""
        users, items = self._ids
        columns = {
            "user": pc.index_in(batch["user_id"], value_set=users),
            "item": pc.index_in(batch["item_id"], value_set=items),
            "time": batch["timestamp"],
        }
        frame = cast(pl.DataFrame, pl.from_arrow(pa.table(columns))).with_row_index("row")
        known = frame.join(self._copies, on=["user", "item", "time"], maintain_order="left")
        left_out = []
        for row, user, item, time, copies in known.iter_rows():
            met = self._met.get((user, item, time), 0)
            if met < copies:
                self._met[user, item, time] = met + 1
                left_out.append(row)
        self.found += len(left_out)
        keep = np.ones(len(batch), bool)
        keep[left_out] = False
        return batch.filter(pa.array(keep))


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
