"""From a public log to a prepared data set, in bounded memory.

    catalog file ──► item ids, fields, text                          (in memory: Arrow)
    event file  ──► user int, item int, time, type, in file order    (temporary files, mapped)
                ──► users and items that stay: k-core, by counting   (a few passes)
                ──► grouped by user, in file order                   (counting scatter, mapped)
                ──► sorted by time within each user, ties as `ties` says; cut to the newest
                ──► the folder, renamed into place when everything is written

In memory are the ids, the catalog, a byte or eight per user and item, and one chunk of events.
"""

from __future__ import annotations

__all__ = ["PrepareConfig", "build", "may_write", "prepare", "write_parquet"]

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from l2rec.data.dataset import (
    FORMAT,
    GIVEN,
    VERSION,
    Dataset,
    content_fingerprint,
    open_dataset,
    order_of,
)
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.data.preparation.config import PrepareConfig
from l2rec.data.preparation.events import CHUNK_EVENTS, Log, read_events
from l2rec.data.preparation.filtering import filter_events
from l2rec.data.preparation.items import RawCatalog, read_catalog, string_type
from l2rec.data.preparation.sequences import write_sequences
from l2rec.data.preparation.state import Mask, Report, State
from l2rec.data.ties import EventOrder
from l2rec.disk import replacing_folder, write_json
from l2rec.errors import DataError

ROOM = "free some space (about 60 bytes per event) or choose another disk"


def prepare(
    source: str | Path,
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    items: str | Path | None = None,
    format: str | None = None,
    origin: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Read a log in any of `formats.FORMATS` and write the data set folder ``out``.

    ``items``: the catalog file where it does not lie beside the events. ``origin``: what the log is
    of, if not ``source`` itself: dataset.json and errors name it. ``progress``: report
    rows and notes on standard error. An existing data set at ``out`` is replaced once the new
    one is complete; on any error ``out`` stays as it was.

    Raises:
        DataError: no known format, a log or catalog that cannot be used, nothing left after
            filtering, ``out`` is something else, or the disk is full.
    """
    config = config or PrepareConfig()
    columns = Columns(
        config.user,
        config.item,
        config.timestamp,
        config.event_type,
        config.encoding,
        config.quotes,
    )
    opened = open_source(source, items=items, format=format, columns=columns)
    opened = replace(opened, origin=origin)
    return build(opened, Path(out), config, origin=origin or str(source), progress=progress)


def build(
    source: Source,
    out: Path,
    config: PrepareConfig,
    *,
    origin: str,
    progress: bool = False,
    chunk_events: int = CHUNK_EVENTS,
    order: EventOrder | None = None,
    recorded: Mapping[str, Any] | None = None,
    reworded: Callable[[str], str] = str,
) -> Dataset:
    """Prepare a log that is open already. ``origin``: its name in dataset.json.

    ``chunk_events``: events in memory at a time; the result does not depend on it. ``order``: facts
    about the order of events where they are known; by default they are measured. ``recorded``:
    options that dataset.json names in place of those of ``config``. ``reworded``: puts notes into
    other words than those of the command line.
    """
    report = Report(progress)
    may_write(out)
    with replacing_folder(out, error=DataError, remedy=ROOM) as folder, report:
        work = folder / "work"
        work.mkdir()
        state = State(work, config, chunk_events, report)
        catalog = read_catalog(source, state)
        log = read_events(source, catalog.ids if catalog else None, state)
        if catalog is None:
            catalog = RawCatalog.of_ids(log.item_ids)
        remaining = filter_events(log, catalog, state)
        item_ok = write_sequences(log, catalog, remaining, folder, state)
        _write_tables(log, catalog, remaining.users, item_ok, folder)
        options = config.model_dump(mode="json") | dict(recorded or {})
        _write_meta(
            source,
            catalog,
            folder,
            state,
            options,
            name=out.name,
            origin=origin,
            order=order,
            reworded=reworded,
        )
        shutil.rmtree(work)
    dataset = open_dataset(out)
    report.notes(dataset)
    return dataset


def _write_tables(log: Log, catalog: RawCatalog, users: Mask, items: Mask, folder: Path) -> None:
    user_ids = log.user_ids.filter(pa.array(users))
    table = pa.table({"user_id": user_ids})
    table = table.cast(pa.schema([("user_id", string_type(table["user_id"]))]))
    write_parquet(table, folder / "users.parquet")
    write_parquet(catalog.table.filter(pa.array(items)), folder / "catalog.parquet")


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table of a data set."""
    pq.write_table(table.combine_chunks(), path, compression="zstd", row_group_size=1 << 17)


def _write_meta(
    source: Source,
    catalog: RawCatalog,
    folder: Path,
    state: State,
    options: Mapping[str, Any],
    *,
    name: str,
    origin: str,
    order: EventOrder | None,
    reworded: Callable[[str], str],
) -> None:
    arrays = [np.load(folder / f"{n}.npy", mmap_mode="r") for n in _array_names(state)]
    users = pq.read_table(folder / "users.parquet")["user_id"]
    table = pq.read_table(folder / "catalog.parquet", columns=["item_id", "text"])
    trimmed = pc.utf8_trim_whitespace(table["text"])
    textless = int(pc.sum(pc.equal(trimmed, "")).as_py() or 0)
    state.counters["items_without_text"] = textless
    if textless and source.catalog is not None:
        state.notes.append(
            f"{textless:,} items have no text; they can be read in a history but only their id "
            f"is known; use --drop-textless to drop them"
        )
    notes = [*state.notes, *dict.fromkeys(source.notes)]
    if state.splits_left_aside:
        notes.append("the splits that the log came with are left aside (--splits none)")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "users": len(users),
        "items": len(table),
        "events": len(arrays[1]),
        "fingerprint": content_fingerprint(
            len(users), len(table), arrays, [users, table["item_id"], table["text"]]
        ),
        "fields": list(catalog.fields),
        "event_types": state.event_types,
        "splits": state.splits,
        "source": {
            "origin": origin,
            "format": source.format,
            "files": [{"name": f.name, "bytes": f.stat().st_size} for f in source.files],
            **({"parts": dict(source.parts)} if source.parts else {}),
        },
        "options": dict(options),
        "counters": state.counters,
        "notes": [reworded(note) for note in notes],
    }
    offsets, items, times = arrays[:3]
    order = order or order_of(meta, offsets, items, times, table["item_id"])
    meta["order"] = order.to_json()
    write_json(folder / "dataset.json", meta, error=DataError, remedy=ROOM)


def _array_names(state: State) -> list[str]:
    names = ["offsets", "items", "timestamps"]
    if state.event_types:
        names.append("event_types")
    return [*names, "splits"] if state.splits == GIVEN else names


def may_write(out: Path) -> None:
    """Raise DataError for an ``out`` that is neither empty nor a data set to be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file, not a folder; choose another out")
    if (out / "dataset.json").is_file():
        with contextlib.suppress(ValueError, AttributeError):
            known = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
            if known.get("format") == FORMAT:
                return
    elif not any(out.iterdir()):
        return
    raise DataError(
        f"{out} exists and is not a prepared data set, so it is not overwritten; "
        f"choose another out or remove it"
    )
