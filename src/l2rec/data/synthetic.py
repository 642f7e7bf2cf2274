"""Data that is made, not found: chains with one right answer, and a log of industrial size."""

from __future__ import annotations

__all__ = ["chain_dataset", "industrial_log"]

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from l2rec.data.dataset import Dataset
from l2rec.data.formats import Source
from l2rec.data.prepare import PrepareConfig, build
from l2rec.errors import DataError

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey", "pink", "orange")
KINDS = ("small", "large", "old", "new", "soft", "warm", "cold", "light", "heavy", "round")
MATERIALS = (
    "wood",
    "paper",
    "glass",
    "metal",
    "cotton",
    "leather",
    "stone",
    "silk",
    "wool",
    "plastic",
)
THINGS = (
    *("lamp", "table", "chair", "book", "cup", "shoe", "coat", "clock", "box", "bag"),
    *("knife", "bowl", "door", "window", "bed", "pen", "bottle", "brush", "basket", "hat"),
    *("spoon", "mirror", "carpet", "shelf", "bike", "boat", "drum", "flute", "kite", "ladder"),
)
N_TEXTS = len(COLOURS) * len(KINDS) * len(MATERIALS) * len(THINGS)


def chain_dataset(out: str | Path, n_users: int, n_items: int, length: int, seed: int) -> Dataset:
    """Users who walk along one cycle through all items: the next item follows from this one.

    Items are in random order on the cycle and have different texts of simple English words.
    Each user starts anywhere and has ``length`` events. A model that has learned the chain
    ranks the right item first for everybody. Raises DataError for sizes that cannot be.
    """
    for name, value, least in (("n_users", n_users, 1), ("n_items", n_items, 2)):
        if value < least:
            raise DataError(f"{name}={value} is less than {least}; choose at least {least}")
    if n_items > N_TEXTS:
        raise DataError(f"n_items={n_items:,} is more than the {N_TEXTS:,} texts there are")
    if length < 1:
        raise DataError(f"length={length} is less than 1; choose at least 3 to evaluate")
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(n_items)
    starts = rng.integers(n_items, size=n_users)
    items = cycle[(starts[:, None] + np.arange(length)) % n_items].reshape(-1)
    users = np.repeat(np.arange(n_users), length)
    times = np.tile(np.arange(length, dtype=np.float64), n_users)
    # Codes that are spread over the whole range, so that neighbours share few words.
    texts = [simple_text(int(code)) for code in rng.permutation(N_TEXTS)[:n_items]]

    def events() -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict(
            {
                "user_id": _ids("u", users),
                "item_id": _ids("i", items),
                "timestamp": pa.array(times),
            }
        )

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        columns = {"item_id": _ids("i", np.arange(n_items))}
        columns |= {name: pa.array(texts) for name in fields}
        yield pa.RecordBatch.from_pydict(columns)

    options = f"n_users={n_users}, n_items={n_items}, length={length}, seed={seed}"
    return build(
        Source(format="chain", files=(), events=events, catalog=catalog, fields=("title",)),
        Path(out),
        PrepareConfig(keep_all_items=True),
        origin=f"chain_dataset({options})",
    )


def simple_text(code: int) -> str:
    """Four words such as "small red wood lamp", different for each code below ``N_TEXTS``."""
    words = []
    for choices in (KINDS, COLOURS, MATERIALS, THINGS):
        code, at = divmod(code, len(choices))
        words.append(choices[at])
    return " ".join(words)


EVENT_TYPES = ("exposure", "click", "reply")
EVENT_SHARES = (0.90, 0.09, 0.01)
ATTRIBUTES: dict[str, Sequence[str]] = {
    "kind": KINDS,
    "colour": COLOURS,
    "material": MATERIALS,
    "thing": THINGS,
    "brand": [f"brand {n}" for n in range(1000)],
    "style": ["classic", "modern", "rustic", "plain", "festive"],
    "audience": ["children", "adults", "families", "professionals"],
    "season": ["spring", "summer", "autumn", "winter", "all year"],
    "origin": ["north", "south", "east", "west"],
}
DAYS = 30
FIRST_SECOND = 1_700_000_000


def industrial_log(
    out: str | Path,
    n_events: int,
    n_users: int,
    n_items: int,
    seed: int,
    *,
    chunk_events: int = 1 << 21,
) -> Path:
    """Write a log as a platform has it: folder ``out`` with events-*.parquet and items.parquet.

    ``n_events`` events (exposures, clicks, replies) over a month, roughly in order of time; few
    items and users have most of them, yet all appear once if there are events enough. Items
    have ten text attributes. ``chunk_events``: events per file, in memory at a time. The folder
    is a source for `prepare`. Raises DataError if it exists and is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    _write_items(out / "items.parquet", n_items, rng)
    user_order, item_order = rng.permutation(n_users), rng.permutation(n_items)
    for number, first in enumerate(range(0, n_events, chunk_events)):
        rows = np.arange(first, min(n_events, first + chunk_events))
        users = _skewed(rows, n_events, user_order, 1.5, rng)
        items = _skewed(rows, n_events, item_order, 3.0, rng)
        # A minute of disorder: logs come from several machines.
        seconds = FIRST_SECOND + rows * (DAYS * 86_400 / n_events) + rng.uniform(0, 60, len(rows))
        types = rng.choice(len(EVENT_TYPES), size=len(rows), p=EVENT_SHARES).astype(np.int8)
        table = pa.table(
            {
                "user_id": _ids("user-", users),
                "item_id": _ids("item-", items),
                "timestamp": pa.array(np.floor(seconds)),
                "event_type": pa.DictionaryArray.from_arrays(types, pa.array(EVENT_TYPES)),
            }
        )
        pq.write_table(table, out / f"events-{number:05d}.parquet", compression="zstd")
    made = {"events": n_events, "users": n_users, "items": n_items, "seed": seed}
    (out / "made.txt").write_text(json.dumps(made) + "\n", encoding="utf-8")
    return out


def _skewed(
    rows: npt.NDArray[np.int64],
    n_events: int,
    order: npt.NDArray[np.int64],
    power: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Members of ``order`` for each row: a power law, and each member once at regular rows."""
    n = len(order)
    places = (n * rng.random(len(rows)) ** power).astype(np.int64)
    stride = n_events // n
    if stride:
        regular = (rows % stride == 0) & (rows // stride < n)
        places[regular] = rows[regular] // stride
    return order[places]


def _write_items(path: Path, n_items: int, rng: np.random.Generator) -> None:
    columns: dict[str, Any] = {"item_id": _ids("item-", np.arange(n_items))}
    for name, choices in ATTRIBUTES.items():
        codes = pa.array(rng.integers(len(choices), size=n_items).astype(np.int32))
        columns[name] = pa.array(choices).take(codes)
    words = [columns[name] for name in ("kind", "colour", "material", "thing", "brand")]
    title = pc.binary_join_element_wise(*words, " ")
    columns = {"item_id": columns.pop("item_id"), "title": title, **columns}
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=1 << 17)


def _ids(prefix: str, numbers: npt.NDArray[np.int64]) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")
