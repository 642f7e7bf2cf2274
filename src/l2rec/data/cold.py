"""Items held out of training: a data set whose last items are cold.

A cold item is one that training never meets and nobody has in a history: it is in no training
event, no count and no row of a table, and a model learns of it, by its text, when it is tested.
Cold items are the last of the catalog, so that what is trained knows the first ``n_warm`` alone;
`l2rec.data.splits` takes their events out of all but the test's targets.
"""

from __future__ import annotations

__all__ = ["hold_out_items"]

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.dataset import GIVEN, Dataset, content_fingerprint, open_dataset
from l2rec.data.prepare import ROOM, may_write, write_parquet
from l2rec.disk import replacing_folder, write_json
from l2rec.errors import DataError


def hold_out_items(data: str | Path, out: str | Path, share: float = 0.2, seed: int = 0) -> Dataset:
    """Write a prepared data set again with a share of its items cold, drawn by the seed from those
    with a text.

    Users, events and their order are those of ``data``; items are numbered anew.

    Raises:
        DataError: a share outside 0 to 1 or of no item, fewer items with a text than that, or data
            that have cold items already or would be replaced.
    """
    dataset, out = open_dataset(data), Path(out)
    if out.resolve() == dataset.path.resolve():
        raise DataError(f"--out {out} is the data set that is read; choose another folder")
    if not 0 < share < 1:
        raise DataError(f"--share {share:g}: choose a number between 0 and 1")
    if dataset.n_cold:
        raise DataError(f"{dataset.path} has {dataset.n_cold:,} cold items already")
    cold = _drawn(dataset, round(share * dataset.n_items), seed)
    warm = np.setdiff1d(np.arange(dataset.n_items), cold)
    order = np.concatenate((warm, cold))
    number = np.empty(dataset.n_items, dtype=np.int32)
    number[order] = np.arange(dataset.n_items)
    arrays: dict[str, npt.NDArray[Any]] = {
        "offsets": dataset.offsets,
        "items": number[dataset.items],
        "timestamps": dataset.timestamps,
    }
    if dataset.event_types is not None:
        arrays["event_types"] = dataset.event_types
    if dataset.meta.get("splits") == GIVEN and dataset.splits is not None:
        arrays["splits"] = dataset.splits
    catalog = dataset.catalog.take(pa.array(order))
    users = pa.chunked_array([dataset.user_ids])
    may_write(out)
    with replacing_folder(out, error=DataError, remedy=ROOM) as folder:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", np.asarray(array))
        shutil.copyfile(dataset.path / "users.parquet", folder / "users.parquet")
        write_parquet(catalog, folder / "catalog.parquet")
        meta = dataset.meta | {
            "name": out.name,
            "fingerprint": content_fingerprint(
                dataset.n_users,
                dataset.n_items,
                list(arrays.values()),
                [users, catalog["item_id"], catalog["text"]],
            ),
            "cold": {
                "items": len(cold),
                "share": share,
                "seed": seed,
                "of": {"name": dataset.name, "fingerprint": dataset.fingerprint},
            },
            "order": dataset.order.to_json(),
        }
        write_json(folder / "dataset.json", meta, error=DataError, remedy=ROOM)
    return open_dataset(out)


def _drawn(dataset: Dataset, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw items that have a text: [count] item ints, ascending."""
    has_text = pc.not_equal(pc.utf8_trim_whitespace(dataset.catalog["text"]), "")
    able = np.flatnonzero(has_text.to_numpy())
    if not 0 < count <= len(able):
        raise DataError(
            f"{count:,} of {dataset.n_items:,} items would be cold, and {len(able):,} have a text, "
            "which is all that is known of a cold item; choose another --share"
        )
    return np.sort(np.random.default_rng(seed).permutation(able)[:count])
