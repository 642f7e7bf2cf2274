"""A prepared data set with newer events, items and users added to it."""

from __future__ import annotations

__all__ = ["EARLIER", "Known", "extend", "may_grow"]

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.dataset import EVENT_COLUMNS, Dataset
from l2rec.data.formats.source import Source
from l2rec.data.preparation.events import CHUNK_EVENTS, rechunk
from l2rec.data.preparation.texts import item_text
from l2rec.data.prepare import PrepareConfig, build
from l2rec.data.ties import per_second_of, unit_of
from l2rec.errors import DataError

EARLIER = "earlier"
"""Type of the events of a data set without types, where others have one."""
KEPT_OPTIONS = ("text", "only", "user", "item", "timestamp", "event_type", "encoding", "quotes")
"""Options of the data set that say how a log is read, of the next one too."""


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
    repeated. Where ``dataset`` was made of events of some types only, so is what is added, unless
    the log holds chosen ones already. Event types are not carried over.

    Raises:
        DataError: whatever `may_grow` refuses, events of items without a text (unless
            ``drop_unknown_items``), a log that is all older or without the types that are needed,
            or whatever `prepare` refuses.
    """
    options = dataset.meta.get("options") or {}
    may_grow(dataset)
    only = () if newer.chosen else tuple(options.get("only") or ())
    frame = _catalog(dataset, newer, options.get("text"), only)
    fields = tuple(name for name in frame.columns if name != "item_id")

    def events() -> Iterator[pa.RecordBatch]:
        yield from dataset.event_batches()
        known, newest, others = Known(dataset), -np.inf, 0

        def chosen() -> Iterator[pa.RecordBatch]:
            nonlocal newest, others
            for read in newer.events():
                batch = _of_types(read, only, dataset, newer)
                others += len(read) - len(batch)
                newest = max(newest, float(np.max(batch["timestamp"].to_numpy(), initial=-np.inf)))
                yield batch.select(list(EVENT_COLUMNS))

        yield from known.without(chosen())
        if others and newest == -np.inf:
            raise DataError(
                f"{newer.called}: none of its {others:,} events is of the types that "
                f"{dataset.path} was made of ({', '.join(only)})"
            )
        if newest == -np.inf:
            raise DataError(f"{newer.called} has no events; give a log with at least one")
        units = dataset.order.unit, unit_of(newest)
        if units[0] != units[1] and all(per_second_of(unit) for unit in units):
            raise DataError(
                f"{newer.called}: its newest event (time {newest:.15g}) is in {units[1]}, those "
                f"of {dataset.path} are in {units[0]}; write the log in {units[0]}"
            )
        if newest < float(dataset.timestamps.min()):
            raise DataError(
                f"{newer.called}: its newest event (time {newest:.15g}) is older than all of "
                f"{dataset.path} (from {float(dataset.timestamps.min()):.15g} on); are both in one "
                "unit of time?"
            )
        if others:
            newer.notes.append(
                f"{others:,} events of the log are not of the types that the data set was made of "
                f"({', '.join(only)}); left out"
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
    origin = f"{dataset.name} + {newer.origin or newer.files[0].name}"
    recorded = {name: options[name] for name in KEPT_OPTIONS if name in options}
    return build(source, Path(out), config, origin=origin, progress=progress, recorded=recorded)


def may_grow(dataset: Dataset) -> None:
    """Refuse a data set that newer events cannot follow.

    Raises:
        DataError: it has cold items, splits of its own or no times.
    """
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
    if (dataset.meta.get("options") or {}).get("timestamp", "timestamp") is None:
        raise DataError(
            f"{dataset.path} has no times, so nobody can say what is newer; prepare the whole log"
        )


def _of_types(
    batch: pa.RecordBatch, only: Sequence[str], dataset: Dataset, newer: Source
) -> pa.RecordBatch:
    """Return the events of these types; all where none is named."""
    if not only:
        return batch
    if "event_type" not in batch.schema.names:
        raise DataError(
            f"{newer.called} has no event types, and {dataset.path} was made of "
            f"{', '.join(only)} only; give its column of types the name "
            f"{(dataset.meta.get('options') or {}).get('event_type') or 'event_type'!r}"
        )
    wanted = pa.array(only, pa.string())
    return batch.filter(pc.is_in(batch["event_type"].cast(pa.string()), value_set=wanted))


KEY = ("user", "item", "time", "type")


class Known:
    """Events of a data set, to leave out of a log that has them too: one for one, by user, item
    and time. ``found``: left out so far.

    since: time from which events are looked at. types: whether types are compared as well; one of
    `EARLIER` stands for any, and so does every one of a data set without types.
    """

    def __init__(self, dataset: Dataset, *, since: float = -np.inf, types: bool = False) -> None:
        text = pa.large_string()  # a column of the other kind ends at 2^31 bytes
        self._ids = dataset.user_ids.cast(text), dataset.item_ids.cast(text)
        at = np.flatnonzero(dataset.timestamps >= since)
        users = np.searchsorted(dataset.offsets, at, side="right") - 1
        events: dict[str, Any] = {"user": users, "item": dataset.items[at]}
        events["time"] = dataset.timestamps[at]
        events["type"] = np.full(len(at), -1)
        self._types: list[str] | None = None
        if types and dataset.event_types is not None:
            self._types = list(dataset.event_type_names)
            codes = dataset.event_types[at].astype(np.int64)
            earlier = self._types.index(EARLIER) if EARLIER in self._types else -1
            events["type"] = np.where(codes == earlier, -1, codes)
        self._copies = pl.DataFrame(events).group_by(*KEY).len("copies")
        self._copies = self._copies.cast({"user": pl.Int32, "item": pl.Int32, "type": pl.Int32})
        self._met: dict[tuple[int, int, float, int], int] = {}
        self.found = 0

    def without(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the events that the data set does not have, many at a time: all its ids and events
        are looked through each time.
        """
        for table in rechunk(batches, lambda: CHUNK_EVENTS):
            keep = self._unknown(table)
            self.found += int((~keep).sum())
            yield from table.filter(pa.array(keep)).to_batches()

    def _unknown(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Mark the events that the data set does not have."""
        users, items = (
            pc.index_in(table[name].cast(ids.type), value_set=ids)
            for name, ids in zip(("user_id", "item_id"), self._ids, strict=True)
        )
        columns = {"user": users, "item": items, "time": table["timestamp"]}
        if self._types is not None:
            columns["type"] = pc.index_in(table["event_type"], value_set=pa.array(self._types))
        frame = cast(pl.DataFrame, pl.from_arrow(pa.table(columns))).with_row_index("row")
        any_type = frame.with_columns(type=pl.lit(-1, pl.Int32))
        keep = np.ones(len(table), bool)
        for some in (any_type,) if self._types is None else (frame, any_type):
            known = some.select("row", *KEY).join(self._copies, on=KEY, maintain_order="left")
            for row, user, item, time, kind, copies in known.iter_rows():
                met = self._met.get((user, item, time, kind), 0)
                if keep[row] and met < copies:
                    self._met[user, item, time, kind] = met + 1
                    keep[row] = False
        return keep


def _catalog(
    dataset: Dataset, newer: Source, template: str | None, only: Sequence[str]
) -> pl.DataFrame:
    """Return item_id, the fields of the data set, and text: known items, then new ones."""
    known = cast(pl.DataFrame, pl.from_arrow(dataset.catalog)).drop("raw_text", strict=False)
    known = known.with_columns(pl.all().cast(pl.String))
    own = "text" in (*newer.fields, *newer.more_fields)
    fields = tuple(dict.fromkeys((*newer.fields, *newer.more_fields)))
    named = [] if newer.catalog is None else list(newer.catalog(fields))
    if not named:  # no catalog, or none of whose items is new
        if any(dataset.texts()):
            return known
        batches = (_of_types(batch, only, dataset, newer) for batch in newer.events())
        ids = [pl.Series(b["item_id"]).cast(pl.String).unique() for b in batches]
        every = pl.concat([pl.Series(dtype=pl.String), *ids])
        rows = pl.DataFrame({"item_id": every.unique(maintain_order=True)})
    else:
        table = cast(pl.DataFrame, pl.from_arrow(pa.Table.from_batches(named)))
        rows = table.unique("item_id", keep="first", maintain_order=True)
        text = pl.col("text") if own else item_text(template, newer.fields, rows.columns)
        rows = rows.with_columns(text.alias("text"))
    fresh = rows.join(known.select("item_id"), on="item_id", how="anti", maintain_order="left")
    fresh = fresh.select([name for name in known.columns if name in fresh.columns])
    return pl.concat([known, fresh], how="diagonal").fill_null("")
