"""Files of logs to read, and what a reader makes of them."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from l2rec.data.dataset import Dataset
from l2rec.data.formats.source import Source

Event = tuple[str, str, float]
"""User, item and time."""


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """Write a file of text, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def lines(path: Path, rows: list[dict[str, Any]], write_row: Callable[[Any], str]) -> Path:
    """Write a file with a line for each row, packed if its name says so."""
    text = "".join(write_row(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def events_of(source: Source) -> list[Event]:
    """Read all events: user, item and time."""
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    return [(r["user_id"], r["item_id"], r["timestamp"]) for r in rows]


def catalog_of(source: Source, *fields: str) -> dict[str, dict[str, str]]:
    """Read the catalog: fields by item."""
    assert source.catalog is not None
    batches = source.catalog(fields or source.fields)
    return {row.pop("item_id"): row for batch in batches for row in batch.to_pylist()}


def dated(folder: Path, texts: list[str], users: int = 30) -> Dataset:
    """Prepare users with 3 to 9 events each, some of one day, over items of these texts."""
    rng = np.random.default_rng(5)
    rows = []
    for user in range(users):
        day = user % 5
        for item in rng.permutation(len(texts))[: 3 + user % 7]:
            day += int(rng.integers(0, 2))
            rows.append((f"u{user}", f"i{item}", 1_600_000_000 + 86_400 * day))
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(len(texts))], "text": texts})
    return Dataset.from_frames(events, items, folder, progress=False)
