"""Several prepared data sets as one, for pre-training on many domains."""

from __future__ import annotations

__all__ = ["merge"]

import functools
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.formats.source import Source
from l2rec.data.parts import leave_one_out_marks
from l2rec.data.prepare import PrepareConfig, build
from l2rec.errors import DataError

TEXT = pa.large_string()
"""Of all ids: a column of `pa.string` ends at 2^31 bytes."""


def merge(parts: Sequence[str | Path], out: str | Path, *, progress: bool = True) -> Dataset:
    """Write one data set folder ``out`` with the users and items of all ``parts``.

    Ids become ``name/id``, so users and items of different parts stay apart; item texts and the
    order of events are those of the parts. Event types are not carried over. Where a part came with
    splits, so does the whole: the other parts' are leave-one-out.

    Raises:
        DataError: fewer than two parts, two of one name, one with cold items, or one that would be
            replaced.
    """
    datasets = [open_dataset(part) for part in parts]
    names = [dataset.name for dataset in datasets]
    if len(datasets) < 2:
        raise DataError(f"{len(datasets)} data sets to merge; name at least two")
    if len(set(names)) < len(names):
        raise DataError(f"data sets of one name cannot be merged: {', '.join(names)}")

    for dataset in datasets:
        if dataset.path.resolve() == Path(out).resolve():
            raise DataError(f"--out {out} is one of the data sets; choose another folder")
        if dataset.n_cold:
            raise DataError(
                f"{dataset.path} has cold items, which would be trained on; merge the data set "
                f"that it was made of"
            )
    with_splits = any(dataset.splits is not None for dataset in datasets)

    def events() -> Iterator[pa.RecordBatch]:
        for dataset in datasets:
            yield from _events(dataset, with_splits=with_splits)

    def catalog(_: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for dataset in datasets:
            table = dataset.catalog.select(["item_id", "text"])
            ids = _prefixed(dataset.name, table["item_id"])
            yield from pa.table({"item_id": ids, "text": table["text"]}).to_batches()

    source = Source(
        format="merge",
        files=tuple(dataset.path / "dataset.json" for dataset in datasets),
        events=events,
        catalog=catalog,
        fields=("text",),
        parts={
            name: fingerprint
            for dataset in datasets
            for name, fingerprint in _parts(dataset).items()
        },
    )
    config = PrepareConfig(keep_all_items=True)
    order = functools.reduce(operator.add, (dataset.order for dataset in datasets))
    origin = " + ".join(names)
    return build(source, Path(out), config, origin=origin, progress=progress, order=order)


def _parts(dataset: Dataset) -> dict[str, str]:
    """Return the fingerprints of a data set and of those that it was merged from, by name."""
    return {dataset.name: dataset.fingerprint} | {
        f"{dataset.name}/{name}": fingerprint for name, fingerprint in dataset.parts.items()
    }


def _prefixed(name: str, ids: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    parts = pa.scalar(name, TEXT), ids.cast(TEXT), pa.scalar("/", TEXT)
    return pc.binary_join_element_wise(*parts)


def _events(dataset: Dataset, *, with_splits: bool) -> Iterator[pa.RecordBatch]:
    return dataset.event_batches(
        users=_prefixed(dataset.name, dataset.user_ids),
        items=_prefixed(dataset.name, dataset.item_ids),
        more={"split": _splits(dataset)} if with_splits else {},
    )


def _splits(dataset: Dataset) -> npt.NDArray[np.int8]:
    """Return the split of each event, [E]: as given, or leave-one-out."""
    return leave_one_out_marks(dataset.offsets) if dataset.splits is None else dataset.splits
