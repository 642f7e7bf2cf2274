"""Frozen vectors of the treatment arm: encoded by a run as each day begins, or read from files."""

from __future__ import annotations

__all__ = ["Frozen", "vectors_of_files", "vectors_of_run"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.vectors import read_vectors
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.protocols import Embedder, Progress, TakesNewItems
from l2rec.runs.folder import open_run_dataset
from l2rec.runs.predictor import Predictor, load
from l2rec.studies.downstream.daily import CLICK, REPLY, Floats, Ints, Known

HISTORIES = 512
"""Histories encoded at once."""


@dataclass(frozen=True)
class Frozen:
    """Vectors of users and items that stay as they are.

    ``items``: [N, D] float32. ``users``: ([n] users, [n] days) -> [n, D] float32. Both are zero
    where there is no vector. ``about``: facts for the report.
    """

    items: Floats
    users: Callable[[Ints, Ints], Floats]
    about: Mapping[str, Any]


def vectors_of_run(
    run: Path, dataset: Dataset, max_history: int, progress: Progress, run_data: Path | None = None
) -> Callable[[Known], Frozen]:
    """Open a run as the source of vectors: users as each day begins, items once.

    Items that the run does not know are encoded from their texts, if its method can do that.
    Returns a function of what is known of each day, for `Table`.

    Args:
        run: a finished run.
        dataset: the log that is studied.
        max_history: newest clicks that a user is encoded from.
        run_data: folder of the run's data set, by default the path that it was trained on.

    Raises:
        ConfigError: the run's method has no vectors.
        DataError: the run knows none of the items.
    """
    past = open_run_dataset(run, run_data)
    if past.event_types is not None and set(past.event_type_names) - {CLICK, REPLY}:
        progress.line(
            f"note: {run} was trained on events of type {', '.join(past.event_type_names)}, and "
            f"users are encoded from their clicks; see `l2rec prepare --only {CLICK}`"
        )
    predictor = load(run)
    if not isinstance(predictor.model, Embedder):
        raise ConfigError(f"{run}: {type(predictor.model).__name__} has no vectors: it only ranks")
    ids: list[str] = dataset.item_ids.to_pylist()
    known = sum(predictor.row_of(item) is not None for item in ids)
    if not known:
        raise DataError(f"{run} knows none of the {len(ids):,} items of {dataset.path}")
    if known < len(ids) and isinstance(predictor.model, TakesNewItems):
        new = {
            item: text
            for item, text in zip(ids, dataset.texts(), strict=True)
            if predictor.row_of(item) is None and text.strip()
        }
        predictor = predictor.with_items(new)
        progress.line(f"{len(new):,} items newer than {run}: encoded from their texts alone")
    rows = np.array([-1 if (at := predictor.row_of(item)) is None else at for item in ids])
    assert predictor.vectors is not None
    items = predictor.vectors.float().cpu().numpy()[rows] * (rows >= 0)[:, None]

    def frozen(features: Known) -> Frozen:
        def users(user: Ints, day: Ints) -> Floats:
            return _encoded(predictor, features, rows, user, day, max_history, progress)

        about = {
            "source": str(run),
            "version": predictor.version,
            "users": "encoded anew as each day begins",
            "items_known": known,
            "items_by_text": int((rows >= 0).sum()) - known,
            "items_without": int((rows < 0).sum()),
        }
        return Frozen(items.astype(np.float32), users, about)

    return frozen


def _encoded(
    predictor: Predictor,
    known: Known,
    rows: Ints,
    user: Ints,
    day: Ints,
    max_history: int,
    progress: Progress,
) -> Floats:
    """Encode users [n] as days [n] begin -> [n, D] float32, zero without a known item.

    ``rows``: [N] the model's row of each item, -1 for none. Days between which a user clicked
    nothing share one encoding.
    """
    state = user * (int(known.clicks.size) + 1) + known.n_clicks(user, day)
    _, first, back = np.unique(state, return_index=True, return_inverse=True)
    histories = known.histories(user[first], day[first], max_history)
    mapped = rows[histories.values]  # items without a row of the model are left out
    row_of = np.repeat(np.arange(len(histories)), histories.lengths)[mapped >= 0]
    lengths = np.bincount(row_of, minlength=len(histories))
    clean = Ragged(mapped[mapped >= 0].astype(np.int32), np.concatenate(([0], np.cumsum(lengths))))
    some = np.flatnonzero(lengths > 0)
    assert predictor.vectors is not None
    encoded = np.zeros((len(clean), predictor.vectors.shape[1]), dtype=np.float32)
    progress.line(f"encoding {len(some):,} histories of {len(np.unique(user)):,} users")
    with torch.inference_mode():
        for start in range(0, len(some), HISTORIES):
            part = some[start : start + HISTORIES]
            encoded[part] = predictor.model.encode_users(clean.take(part)).float().cpu().numpy()
            progress.validating(min(start + HISTORIES, len(some)), len(some))
    return encoded[back]


def vectors_of_files(folder: Path, dataset: Dataset) -> Callable[[Known], Frozen]:
    """Read the vectors that `l2rec embed` wrote: one for each user, the same on every day.

    Returns a function as `vectors_of_run` does.

    Raises:
        CheckpointError: missing or damaged files, or a file and a folder of shards.
        DataError: items and users of two models, or none of the data set's ids.
    """
    items, users = (read_vectors(_written(folder, name)) for name in ("items", "users"))
    if items.version != users.version:
        raise DataError(
            f"{folder}: items of model {items.version}, users of {users.version}; embed them again"
        )
    of_items, items_known = _aligned(items.ids, items.vectors, dataset.item_ids)
    of_users, users_known = _aligned(users.ids, users.vectors, dataset.user_ids)
    if not items_known or not users_known:
        raise DataError(
            f"{folder} has vectors of {items_known} items and {users_known} users of "
            f"{dataset.path}; embed a run on the same items and users"
        )
    about = {
        "source": str(folder),
        "version": items.version,
        "users": "one vector for all days",
        "items_known": items_known,
        "items_by_text": 0,
        "items_without": dataset.n_items - items_known,
        "users_without": dataset.n_users - users_known,
    }
    return lambda _: Frozen(of_items, lambda user, day: of_users[user], about)


def _written(folder: Path, name: str) -> Path:
    """Return what `l2rec embed` wrote, one file or a folder of shards. Raises CheckpointError."""
    whole, shards = folder / f"{name}.parquet", folder / name
    if whole.exists() and shards.exists():
        raise CheckpointError(
            f"{folder} has {whole.name} and a folder {name} of shards; delete the older one"
        )
    return shards if shards.exists() else whole


def _aligned(ids: list[str], vectors: Floats, wanted: Any) -> tuple[Floats, int]:
    """Order vectors by the ``wanted`` ids, zero for unknown ids; also count the known ids."""
    at = pc.index_in(pc.cast(wanted, pa.string()), value_set=pa.array(ids, pa.string()))
    rows = pc.fill_null(at, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    ordered: Floats = vectors[rows] * (rows >= 0)[:, None]
    return ordered.astype(np.float32), int((rows >= 0).sum())
