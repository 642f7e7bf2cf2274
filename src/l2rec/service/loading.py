"""A run folder as a version that can be served, and the check before it is."""

from __future__ import annotations

__all__ = ["check_version", "load_version", "next_serial", "read_served"]

import itertools
import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from l2rec.errors import CheckpointError
from l2rec.index import Index, Milvus, build
from l2rec.index import load as load_index
from l2rec.runs.folder import RunFolder, read_report, read_run, require_finished, unfinished
from l2rec.runs.predictor import Predictor, load_folder
from l2rec.service.attributes import Attributes
from l2rec.service.ranking import Query, are_numbers, encode, rank, rank_exactly, score
from l2rec.service.version import ItemState, Version

logger = logging.getLogger("l2rec.service")

INDEX = "index"
"""Folder of a run that an index may lie in."""
CHECKED, RECALL = 8, 0.8
"""Histories that the check of a version asks for, and the recall that its index must reach."""

TIED = 1e-5
"""Scores that are no further apart are ties: sums in another order."""

_serials = itertools.count(1)


def next_serial() -> int:
    """Return the number of another loading."""
    return next(_serials)


def read_served(run: Path, expected: str | None = None) -> RunFolder:
    """Read a run folder, and check that it is whole, without building its model.

    Args:
        expected: hash that the trained tensors must have, which were deployed when the run was
            finished; without one, the run must be finished now.

    Raises:
        CheckpointError: it is not what was deployed or trained.
    """
    if expected is None:
        require_finished(run)
    folder = read_run(run)
    if expected is not None and folder.version != expected:
        raise CheckpointError(
            f"{run}: its weights are {folder.version}, {expected} was deployed; deploy it again"
        )
    if folder.vectors is not None and folder.vectors_version != folder.version:
        raise CheckpointError(
            f"{run}: item vectors of model {folder.vectors_version}, weights {folder.version}: "
            "torn or exchanged; delete items.safetensors if the weights are right"
        )
    return folder


def load_version(
    run: Path,
    *,
    index: str = "auto",
    expected: str | None = None,
    items: ItemState | None = None,
) -> Version:
    """Load a run folder, ready to serve, and build its index.

    Args:
        index: kind of index; auto is the one in the run folder, or one by the size of the catalog.
        expected: as of `read_served`.
        items: items of the event log, which the run was not trained with.

    Raises:
        L2RecError: whatever is wrong with the folder.
    """
    folder = read_served(run, expected)
    predictor = load_folder(folder)
    predictor.verify()
    report = {} if unfinished(run) else read_report(run)  # a deployed run may be trained on
    base = len(predictor.ids)
    version = Version(
        predictor=predictor,
        index=None,
        indexed=base,
        attributes=Attributes.of_catalog(folder.catalog),
        deleted=frozenset(n for n, item in enumerate(predictor.ids) if not item),
        name=run.resolve().name,
        report=report,
        loaded_at=time.time(),
        serial=next_serial(),
        run=run,
    )
    if items is not None:
        version = version.brought_to(items)
    over, indexed = _index(run, version.predictor, index, base)
    return replace(version, index=over, indexed=indexed, loaded=len(version))


def _index(run: Path, predictor: Predictor, kind: str, base: int) -> tuple[Index | None, int]:
    """Return an index and the number of rows in it: what `l2rec index` wrote into the run folder,
    of the run's first ``base`` items, or one that is built now, of all. A blended run has none: all
    its items are scored to blend them.
    """
    if predictor.vectors is None:
        return None, len(predictor.ids)
    if predictor.blend is not None:
        if kind != "auto" or (run / INDEX).is_dir():
            logger.info("%s is blended, which takes the scores of all items: no index is used", run)
        return None, len(predictor.ids)
    if kind == "auto" and (run / INDEX).is_dir():
        index, ids, version = load_index(run / INDEX)
        if isinstance(index, Milvus):  # the folder has chosen who is asked
            logger.info("%s is searched by Milvus at %s", run / INDEX, index.uri)
        if version != predictor.version or ids != predictor.ids[:base]:
            raise CheckpointError(
                f"{run / INDEX}: of vectors of model {version}, the run is {predictor.version}; "
                f"build it anew: l2rec embed {run} --out V && l2rec index V/items.parquet --out "
                f"{run / INDEX}"
            )
        return index, base
    return build(predictor.vectors.float().cpu().numpy(), kind), len(predictor.ids)


def check_version(version: Version) -> None:
    """Check by a real inference that scores are finite, that vectors have the length they should
    have, and that the index finds what exact search finds. Call it in the thread of the model.

    Raises:
        CheckpointError: what is wrong.
    """
    served = np.flatnonzero(~version.hidden)
    if not len(served):
        raise CheckpointError(f"{version.name}: no item can be recommended")
    some = served[np.unique(np.linspace(0, len(served) - 1, CHECKED).astype(np.int64))]
    histories = [[version.ids[row]] for row in some] + [[version.ids[row] for row in some]]
    rows = version.predictor.rows(histories)
    users = encode(version, rows)
    vectors = torch.stack([user.vector for user in users])
    if not are_numbers(version, vectors):
        raise CheckpointError(f"{version.name}: scores that are not finite numbers")
    if version.matrix is None:
        return
    lengths = version.matrix.norm(dim=-1)
    unit = bool((lengths - 1).abs().max() < 0.01)
    worst = float((vectors.norm(dim=-1) - 1).abs().max())
    if unit and worst > 0.01:
        raise CheckpointError(f"{version.name}: user vectors off unit length by {worst:.2g}")
    k = min(10, len(served))
    found = rank([Query(version, user, k) for user in users])
    exact = [rank_exactly(Query(version, user, k)) for user in users]
    # What scores as the last of the best does is as good: items of one text have one vector.
    hits = sum(
        int((score(version, user, a.rows) >= b.scores[-1] - TIED).sum())
        for user, a, b in zip(users, found, exact, strict=True)
    )
    recall = hits / (k * len(found))
    if recall < RECALL:
        raise CheckpointError(
            f"{version.name}: the index finds {recall:.0%} of what exact search finds; build it "
            "with `l2rec index --kind exact`"
        )
