"""MIND: impressions of news, of which some were clicked, after a history of clicks without times.

    behaviors.tsv    impression, user, time, history, impressions (N1-1 clicked, N2-0 not)
    news.tsv         id, category, subcategory, title, abstract, url, entities of both

A folder has both files, or is one of several (train, dev, test), which are read as one log in time
order. A history stands in all rows of its user and is read once; a later one may go on from it.
Where the parts follow each other in time, an event is of the split of its part: the last one (dev)
is test. MIND's own test part does not say what was clicked, so that none is left for validation.

In memory are the clicks and each user's history, not the news that were shown.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa

from l2rec.data.formats.files import File, Where, folders, is_folder, listing, reading
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_arrow,
    as_source,
    catalog_batch,
    event_batch,
)
from l2rec.data.formats.tables import Table, read_header
from l2rec.data.parts import TEST, TRAIN, VALID
from l2rec.errors import DataError

LOG, NEWS = "behaviors.tsv", "news.tsv"
COLUMNS = ["impression", "user", "time", "history", "shown"]
NEWS_COLUMNS = [
    *("item_id", "category", "subcategory", "title", "abstract", "url"),
    *("title_entities", "abstract_entities"),
]
FIELDS = ("title", "category", "subcategory", "abstract")
USERS_AT_A_TIME = 1 << 14
_TIME = "%m/%d/%Y %I:%M:%S %p"
_LOOKS_LIKE_TIME = re.compile(r"\d{1,2}/\d{1,2}/\d{4} \d{1,2}:\d\d:\d\d [AP]M")
_WORD = r"[^ ]+"
_LABELLED = r"[^ ]+-[01](?: |$)"
_CLICKED = r"[^ ]+-1(?: |$)"


@dataclass
class _Log:
    """Clicks (user, item, time) in file order, and histories (user, history, first time).

    ``parts``: the part that each frame of clicks is of. ``spans``: first and last time of a part.
    """

    clicks: list[pl.DataFrame] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    histories: list[pl.DataFrame] = field(default_factory=list)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)


# ---------------------------------------------------------------- the files


def _parts(path: Path, files: dict[str, File]) -> dict[str, dict[str, File]]:
    """Return the files of each part by the name of its folder."""
    if not is_folder(path):
        beside = listing(path.parent) if File(path).name == LOG else {}
        return {path.resolve().parent.name: beside | {LOG: File(path)}}
    inside = {name: found for name, found in folders(path).items() if LOG in found}
    if LOG in files and len(inside) < 2:
        return {next(iter(inside), "") or path.stem: files}
    return inside


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the name of the log and by the time in its first line."""
    if not is_folder(path) and File(path).name != LOG:
        return None
    for part in _parts(path, files).values():
        cells = read_header(part[LOG], "\t", context.columns.encoding, quotes=False)
        if len(cells) != len(COLUMNS) or not _LOOKS_LIKE_TIME.fullmatch(cells[2].strip()):
            return None
        return "mind"
    return None


def mind(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open the parts that there are, and the news that are given or lie beside them."""
    parts = _parts(path, files)
    if not parts:
        raise DataError(
            f"{path} has no {LOG}, nor has a folder in it; give a folder of MIND, such as "
            f"MINDsmall_train, or the folder that holds several of them"
        )
    logs = {name: part[LOG] for name, part in parts.items()}
    news = [part[NEWS] for part in parts.values() if NEWS in part]
    context.notes.extend(_other_parts(logs))
    catalog = _news(news, context) if news else None
    if items is not None:
        catalog, news = open_catalog(items, context), [items]
    return as_source(kind, [*logs.values(), *news], _events(logs, context), catalog)


def _other_parts(logs: Mapping[str, File]) -> list[str]:
    """Name the parts beside the only one that is read."""
    file = next(iter(logs.values()))
    if len(logs) > 1 or file.member is not None:
        return []
    folder = file.path.resolve().parent
    beside = sorted(
        other.name
        for other in folder.parent.iterdir()
        if other != folder and (other / LOG).is_file()
    )
    if not beside:
        return []
    return [
        f"{folder.name} alone is read, not {', '.join(beside)} beside it; give the folder that "
        f"holds them to read all"
    ]


# ---------------------------------------------------------------- events


def _events(logs: Mapping[str, File], context: Context) -> Callable[[], Iterator[pa.RecordBatch]]:
    def events() -> Iterator[pa.RecordBatch]:
        log = _Log()
        for name, file in logs.items():
            _read(name, file, log, context)
        if not log.clicks:
            names = ", ".join(map(str, logs.values()))
            raise DataError(
                f"no row of {names} says what was clicked (N1-1 N2-0), as in MIND's test part; "
                f"give the train or dev part"
            )
        start, cuts = min(first for first, _ in log.spans.values()), _cuts(log)
        clicks = pl.concat(log.clicks)
        if not cuts:
            _check_apart(log)
        histories = (
            pl.concat(log.histories)
            .group_by("user", "history", maintain_order=True)
            .agg(pl.col("time").min())
        )
        several = histories["user"].is_duplicated()
        once, again = histories.filter(~several), histories.filter(several)
        known = 0
        for batch in (
            *_batches_of(once, start, cuts),
            *_merged_batches(again, clicks, start, cuts, context),
        ):
            known += batch.num_rows
            yield batch
        for part in log.clicks:
            yield _batch(part, cuts)
        context.notes.extend(_notes(log, known, start))

    return events


def _read(name: str, file: File, log: _Log, context: Context) -> None:
    """Read the rows that say what was clicked."""
    encoding = context.columns.encoding
    table = Table(file, COLUMNS, "\t", quotes=False, has_header=False, encoding=encoding)
    row = unlabelled = 0
    with reading(file, encoding):
        for batch in table.batches(COLUMNS[1:], context.block_bytes):
            rows = _rows(batch, lambda at, row=row: table.where(row + at))  # type: ignore[misc]
            row += len(rows)
            labelled = rows.filter(pl.col("labelled"))
            unlabelled += len(rows) - len(labelled)
            if not len(labelled):
                continue
            first, last = cast(float, labelled["time"].min()), cast(float, labelled["time"].max())
            low, high = log.spans.get(name, (first, last))
            log.spans[name] = min(first, low), max(last, high)
            log.histories.append(
                labelled.filter(pl.col("history") != "")
                .group_by("user", "history", maintain_order=True)
                .agg(pl.col("time").min())
            )
            log.parts.append(name)
            log.clicks.append(
                labelled.select("user", "time", item="clicks")
                .filter(pl.col("item").list.len() > 0)
                .explode("item")
            )
    if unlabelled:
        context.notes.append(
            f"{name}/{LOG}: {unlabelled:,} rows were left out, as they do not say what was clicked"
        )


def _rows(batch: pa.RecordBatch, where: Where) -> pl.DataFrame:
    """Return user, time, history, clicks, and whether a row says what was clicked.

    Raises:
        DataError: a row has no user, a time of another form, or says of some news alone whether
            they were clicked.
    """
    moment = pl.col("time").str.strip_chars().str.to_datetime(_TIME, time_unit="us", strict=False)
    clicks = pl.col("shown").str.extract_all(_CLICKED)
    words, labels = (pl.col("shown").str.count_matches(what) for what in (_WORD, _LABELLED))
    frame = cast(pl.DataFrame, pl.from_arrow(batch))
    rows = frame.select(
        "user",
        moment.dt.epoch("us") / 1e6,
        pl.col("history").str.strip_chars(),
        clicks=clicks.list.eval(pl.element().str.strip_chars().str.strip_suffix("-1")),
        labelled=(labels > 0) | (words == 0),
        mixed=(labels > 0) & (labels < words),
    )
    if rows["time"].null_count():
        at = int(rows["time"].is_null().arg_max() or 0)
        raise DataError(
            f"{where(at)}: time {frame['time'][at]!r} is not of MIND's form, such as "
            f"11/15/2019 8:55:22 AM; repair or remove that line"
        )
    if rows["mixed"].any():
        raise DataError(
            f"{where(int(rows['mixed'].arg_max() or 0))}: some of its news end in -0 or -1 and "
            f"others do not; repair or remove that line"
        )
    if (rows["user"] == "").any():
        at = int((rows["user"] == "").arg_max() or 0)
        raise DataError(f"{where(at)} has no user id; give it one or remove the row")
    return rows


def _cuts(log: _Log) -> list[float]:
    """Return where the parts after the first begin; nothing unless each ends before the next."""
    spans = sorted(log.spans.values())
    apart = all(end < first for (_, end), (first, _) in pairwise(spans))
    return [first for first, _ in spans[1:]] if apart else []


def _check_apart(log: _Log) -> None:
    """Refuse parts of which one has the clicks of another, as MINDsmall and MINDlarge have."""
    clicks: dict[str, list[pl.DataFrame]] = {}
    for name, frame in zip(log.parts, log.clicks, strict=True):
        clicks.setdefault(name, []).append(frame)
    whole = {name: pl.concat(frames).unique() for name, frames in clicks.items()}
    for one, other in combinations(whole, 2):
        small, large = sorted((whole[one], whole[other]), key=len)
        twice = len(small.join(large, on=small.columns, how="semi"))
        if twice * 2 > len(small) > 0:
            raise DataError(
                f"{one} and {other} have {twice:,} clicks in common, which would be read twice; "
                f"give one of them, or a folder of parts that follow each other in time"
            )


def _batch(events: pl.DataFrame, cuts: Sequence[float]) -> pa.RecordBatch:
    """Make a batch; the last part is test, and the one before it, of three or more, validation."""
    users, items, times = (as_arrow(events[name]) for name in ("user", "item", "time"))
    splits = None
    if cuts:
        split_of = np.array([TRAIN] * (len(cuts) - 1) + [VALID if cuts[1:] else TRAIN, TEST])
        parts = np.searchsorted(cuts, events["time"].to_numpy(), side="right")
        splits = pa.array(split_of[parts].astype(np.int8))
    return event_batch(
        users, items, times, None, lambda row: f"{LOG}, event {row + 1}", splits=splits
    )


def _batches_of(
    histories: pl.DataFrame, start: float, cuts: Sequence[float]
) -> Iterator[pa.RecordBatch]:
    """Yield histories as events that end a second before the first impression."""
    for rows in histories.iter_slices(USERS_AT_A_TIME):
        items = rows.select("user", item=pl.col("history").str.extract_all(_WORD)).with_columns(
            time=start - pl.int_ranges(pl.col("item").list.len().cast(pl.Int64), 0, -1)
        )
        if len(items):
            yield _batch(items.explode("item", "time"), cuts)


# ---------------------------------------------------------------- users with several histories

Known = list[tuple[str, float | None]]
"""Events of a user in order; those of a history have no time."""


def _merged_batches(
    histories: pl.DataFrame,
    clicks: pl.DataFrame,
    start: float,
    cuts: Sequence[float],
    context: Context,
) -> Iterator[pa.RecordBatch]:
    """Yield the histories of users who have several as one each, with the events new in a later
    one where its order says.
    """
    users = histories["user"].unique(maintain_order=True)
    clicked: dict[str, Known] = {user: [] for user in users}
    theirs = clicks.filter(pl.col("user").is_in(users.implode())).sort("time", maintain_order=True)
    for user, item, time in theirs.select("user", "item", "time").iter_rows():
        clicked[user].append((item, time))
    versions: dict[str, list[tuple[list[str], float]]] = {user: [] for user in users}
    for user, history, time in histories.sort("time", maintain_order=True).iter_rows():
        versions[user].append((re.findall(_WORD, history), time))
    new = turned = 0
    rows: list[tuple[str, str, float]] = []
    for user, (first, *others) in versions.items():
        known: Known = [(item, None) for item in first[0]]
        waiting = clicked[user]
        for items, until in others:
            known += [event for event in waiting if cast(float, event[1]) < until]
            waiting = [event for event in waiting if cast(float, event[1]) >= until]
            known, added, back = _with(known, items)
            new, turned = new + added, turned + back
        rows += [(user, item, time) for item, time in _timed(known, start)]
    if rows:
        yield _batch(pl.DataFrame(rows, schema=["user", "item", "time"], orient="row"), cuts)
    if new:
        context.notes.append(
            f"{new:,} events stand in a later history of their user alone; they were put after "
            f"the event that they follow there"
        )
    if turned:
        context.notes.append(
            f"{turned:,} events stand elsewhere in a later history of their user; the order of "
            f"the first one was kept"
        )


def _with(known: Known, items: Sequence[str]) -> tuple[Known, int, int]:
    """Add the events of a later history that are not known; count them, and those out of order.

    The n-th event of an item in one is its n-th in the other.
    """
    places: dict[str, list[int]] = {}
    for at, (item, _) in enumerate(known):
        places.setdefault(item, []).append(at)
    seen: Counter[str] = Counter()
    found: list[int | None] = []
    for item in items:
        of_item = places.get(item, [])
        found.append(of_item[seen[item]] if seen[item] < len(of_item) else None)
        seen[item] += 1
    # What comes before the first known event goes right before it; if none is known, to the end.
    last = next((at for at in found if at is not None), len(known)) - 1
    after: dict[int, list[str]] = {}
    turned = 0
    for item, place in zip(items, found, strict=True):
        if place is None:
            after.setdefault(last, []).append(item)
        elif place < last:
            turned += 1
        else:
            last = place
    merged: Known = [(item, None) for item in after.get(-1, [])]
    for at, event in enumerate(known):
        merged.append(event)
        merged += [(item, None) for item in after.get(at, [])]
    return merged, sum(map(len, after.values())), turned


def _timed(known: Known, start: float) -> list[tuple[str, float]]:
    """Return the events without times with made-up ones: before the first impression of the log,
    or within a second after the click that they follow.
    """
    clicks = [at for at, (_, time) in enumerate(known) if time is not None]
    ends = [*clicks, len(known)]
    timed = [(item, start - (ends[0] - at)) for at, (item, _) in enumerate(known[: ends[0]])]
    for click, end in zip(clicks, ends[1:], strict=True):
        step = 1 / (end - click)
        time = cast(float, known[click][1])
        timed += [(known[at][0], time + (at - click) * step) for at in range(click + 1, end)]
    return timed


# ---------------------------------------------------------------- notes and news


def _notes(log: _Log, known: int, start: float) -> list[str]:
    notes = []
    if known:
        notes.append(
            f"the times of {known:,} events are made up: MIND's histories have an order and no "
            f"times, and were put before the first impression ({_moment(start)})"
        )
    parts = sorted(log.spans, key=lambda name: log.spans[name])
    if _cuts(log):
        named = " and ".join(
            f"{name} is {split}"
            for name, split in zip(reversed(parts[1:]), ("test", "valid"), strict=False)
        )
        notes.append(
            f"splits are given: {named}, all before "
            f"{'them' if len(parts) > 2 else 'it'} is train; "
            f"{parts[-1]} begins at {_moment(log.spans[parts[-1]][0])}"
        )
    elif len(parts) > 1:
        notes.append(f"{', '.join(parts)} overlap in time, so that they are no splits")
    return notes


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _news(files: Sequence[File], context: Context) -> CatalogReader:
    """Open the news of all parts; those in several have the same rows."""
    encoding = context.columns.encoding

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for file in files:
            table = Table(
                file, NEWS_COLUMNS, "\t", quotes=False, has_header=False, encoding=encoding
            )
            row = 0
            for batch in table.batches(["item_id", *fields], context.block_bytes):
                texts = {name: batch[name] for name in fields}
                yield catalog_batch(
                    batch["item_id"],
                    texts,
                    lambda at, table=table, row=row: table.where(row + at),  # type: ignore[misc]
                )
                row += batch.num_rows

    return CatalogReader(catalog, FIELDS)


READER = Reader(
    {"mind": "behaviors.tsv and news.tsv, or a folder with the train and dev folders (MIND)"},
    detect,
    mind,
)
