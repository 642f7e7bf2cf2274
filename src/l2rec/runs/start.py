"""The start of a run that goes on from another: by fine-tuning, or with newer events.

check_start   it is finished, and what it was trained on is not what this run is tested on
unseen        what it was trained on does not validate an update
start_from    its trained tensors
"""

from __future__ import annotations

__all__ = ["check_start", "start_from", "unseen", "unseen_of"]

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from l2rec.config import RunConfig
from l2rec.data.dataset import GIVEN, Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import LEAVE_ONE_OUT, TIED_DAY, Cases, Split
from l2rec.errors import CheckpointError, DataError
from l2rec.protocols import OfOneCatalog, Progress, SizedByData
from l2rec.runs.checkpoint import load_tensors, load_trained, trained_tensors, without_gone
from l2rec.runs.folder import (
    load_run_config,
    open_run_dataset,
    read_catalog,
    require_finished,
    split_of,
)


def check_start(
    init: Path, dataset: Dataset, split: Split, progress: Progress, *, update: bool = False
) -> None:
    """Refuse a start that has not come to its end, or that was trained on other events of this very
    data set: on its test, perhaps.

    Its own start counts too. Warn of one whose data are the same log, prepared in another way, and
    of one that is gone. Of an ``update``, what ``init`` has seen is left out: `unseen`.

    Raises:
        CheckpointError: it has not, or was.
    """
    require_finished(init)
    start: Path | None = init
    while start is not None:
        if not (start / "config.yaml").is_file():
            progress.line(
                f"warning: {start} is gone, which --init {init} began from; if it was "
                "trained on this data by another split, it has seen the test"
            )
            return
        config, identity = load_run_config(start)
        theirs = _protocol_there(config, identity, dataset)
        if theirs is not None and theirs != split.protocol:
            raise CheckpointError(
                f"--init {start} was trained on this data by another split ({theirs}, not "
                f"{split.protocol}), so it may have seen the test; pre-train with the same split"
            )
        updated = update and start == init
        if theirs is None and not updated and _same_ids(_trained_on(identity), dataset):
            progress.line(
                f"warning: --init {start} was trained on data of the same users and items "
                f"({identity['dataset']['path']}); if they are the same events in another order, "
                f"or were split in another way, it may have seen the test"
            )
        start = None if identity.get("init") is None else Path(identity["init"])


def _protocol_there(config: RunConfig, identity: Mapping[str, Any], dataset: Dataset) -> str | None:
    """Return by which protocol a run was trained on a data set, alone or merged with others; None
    if it was not, as far as can be told.
    """
    if identity["dataset"]["fingerprint"] == dataset.fingerprint:
        return split_of(config, dataset).protocol
    if (
        dataset.n_cold
        and identity["dataset"]["fingerprint"] == dataset.meta["cold"]["of"]["fingerprint"]
    ):
        return "all items warm"
    whole = _trained_on(identity)
    if whole is None or dataset.fingerprint not in whole.parts.values():
        return None
    theirs = split_of(config, whole)
    if theirs.kind == GIVEN and dataset.splits is None:
        return LEAVE_ONE_OUT  # what `merge` gives to parts without splits
    return theirs.protocol


def _trained_on(identity: Mapping[str, Any]) -> Dataset | None:
    """Open the data set of a run; None if it is no longer there."""
    try:
        dataset = open_dataset(Path(identity["dataset"]["path"]))
    except DataError:
        return None
    return dataset if dataset.fingerprint == identity["dataset"]["fingerprint"] else None


def _same_ids(one: Dataset | None, other: Dataset) -> bool:
    return (
        one is not None
        and (one.n_users, one.n_items) == (other.n_users, other.n_items)
        and set(one.item_ids.to_pylist()) == set(other.item_ids.to_pylist())
        and set(one.user_ids.to_pylist()) == set(other.user_ids.to_pylist())
    )


def unseen(
    init: Path, dataset: Dataset, split: Split, progress: Progress, data: Path | None = None
) -> Split:
    """Leave out of validation what an earlier run on a part of these data was trained on, or what
    that one went on from by updates.

    Such are the last events of users who had too few to be tested then. Test events are newer.
    ``data``: the data set of ``init``, if it was moved.

    Raises:
        CheckpointError: its data set is gone or was split otherwise, or it was trained on a test
            event.
    """
    of_init = open_run_dataset(init, data)
    return unseen_of(init, dataset, _unseen_by(init, of_init, dataset, split, progress), progress)


def unseen_of(run: Path, dataset: Dataset, split: Split, progress: Progress) -> Split:
    """Leave out of validation what the runs were trained on that a run is an update of, each of the
    one before. Warn where the first of them are gone.
    """
    start = _updated_from(run)
    while start is not None:
        there = (start / "config.yaml").is_file()
        before = _trained_on(load_run_config(start)[1]) if there else None
        if before is None:
            progress.line(
                f"warning: {start}, which {run} goes on from, or its data set is gone: events that "
                "it was trained on may validate"
            )
            break
        split = _unseen_by(start, before, dataset, split, progress)
        start = _updated_from(start)
    return split


def _updated_from(run: Path) -> Path | None:
    """Return the run that another is an update of; None if it is no update."""
    identity = load_run_config(run)[1]
    start = identity.get("init") if identity.get("update") else None
    return None if start is None else Path(start)


def _unseen_by(
    init: Path, before: Dataset, dataset: Dataset, split: Split, progress: Progress
) -> Split:
    """Leave out of validation what one run was trained on, ``before``."""
    theirs = split_of(load_run_config(init)[0], before)
    if split.kind not in (LEAVE_ONE_OUT, TIED_DAY) or theirs.kind != split.kind:
        raise CheckpointError(
            f"{init} was trained with the split {theirs.protocol}, this is {split.protocol}; an "
            "update has the same, leave-one-out or tied-day; train others with --init"
        )
    # Both ways of splitting give every user a training row, in the order of users.
    users = pc.index_in(before.user_ids, value_set=dataset.user_ids.cast(before.user_ids.type))
    owners = np.repeat(users.to_numpy(zero_copy_only=False), theirs.train.lengths)
    trained = owners.astype(np.int64) * dataset.n_items + theirs.train.values
    if not (fine := _hold(split.test, trained, dataset)).all():
        user = dataset.user_ids[int(split.test.users[~fine][0])].as_py()
        raise CheckpointError(
            f"{init} was trained on what is now the newest event of {(~fine).sum():,} users (such "
            f"as {user!r}): the events added are older; train anew, or leave those out"
        )
    if not (fine := _hold(split.valid, trained, dataset)).all():
        left = int((~fine).sum())
        progress.line(f"{left:,} users do not validate: {init} was trained on their event")
        split = replace(split, valid=split.valid.take(fine))
    return split


def _hold(cases: Cases, trained: npt.NDArray[np.int64], dataset: Dataset) -> npt.NDArray[np.bool_]:
    """Say which cases have all of their user's trained events in the history, [M] bool.

    trained: [E] user int times the number of items, plus item int, of every event trained on. A
    user has one case.
    """
    histories: Ragged = cases.histories
    owners = np.repeat(cases.users, histories.lengths)
    held, times = np.unique(owners * dataset.n_items + histories.values, return_counts=True)
    wanted, needed = np.unique(trained, return_counts=True)
    at = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
    found = np.where(held[at] == wanted, times[at], 0)
    lacking = np.unique(wanted[found < needed] // dataset.n_items)
    return ~np.isin(cases.users, lacking)


def start_from(model: Any, init: Path, dataset: Dataset, *, update: bool = False) -> str:
    """Load the trained tensors of another run; return a line that says so.

    What belongs to its items is kept where the data have the same catalog, and left out otherwise.

    update: the catalog begins with that of the other run; rows of its items are kept.

    Raises:
        CheckpointError: tensors that do not fit, none that can be taken, or an update of a method
            whose items have codes or words that are made for one catalog.
    """
    load_run_config(init)  # refuses what is no run
    own = trained_tensors(model)
    tensors = without_gone(load_tensors(init / "model.safetensors")[0], own)
    of_items = type(model).item_tensors
    shared = {n: t for n, t in tensors.items() if n not in of_items}
    wrong = [n for n, t in shared.items() if n not in own or own[n].shape != t.shape]
    missing = sorted(own.keys() - shared.keys() - of_items)
    if wrong or missing:
        raise CheckpointError(
            f"--init {init}: {(wrong or missing)[0]} does not fit this recipe; pre-train with the "
            "same backbone and model options"
        )
    common = of_items & tensors.keys() & own.keys()
    if update:
        refuse_of_one_catalog(type(model), init)
        before = pq.read_metadata(init / "catalog.parquet").num_rows
        rows = {
            name: _with_rows(own[name], tensors[name], before, dataset.n_items, f"{init}: {name}")
            for name in common
        }
        of_them = f"; {dataset.n_items - before:,} items are new"
    elif read_catalog(init).table.equals(dataset.warm_catalog):
        free = model.sized_by_data if isinstance(model, SizedByData) else frozenset()
        fit = (n for n in common if n in free or own[n].shape == tensors[n].shape)
        rows = {name: tensors[name] for name in fit}
        of_them = ", the rows of its items kept: the catalog is the same"
    else:
        rows, of_them = {}, ", the rows of its items left out"
    if not (shared or rows or update):
        raise CheckpointError(
            f"--init {init}: nothing of it fits, as all that {type(model).__name__} learns belongs "
            "to its items and the catalog here is another; leave --init out, or use l2rec update "
            "to train a run on with newer events"
        )
    load_trained(model, {**own, **shared, **rows}, str(init))
    return f"starting from {init}: {len(shared) + len(rows)} tensors{of_them}"


def refuse_of_one_catalog(method: Any, run: Path) -> None:
    """Raise CheckpointError for a method to which an item is codes or words of one catalog: with
    other items they would be others, and what was learned of them of no use.
    """
    name = method.__name__
    if isinstance(method, OfOneCatalog) and method.one_catalog:
        raise CheckpointError(
            f"{run}: {name} gives codes or words to the items of one catalog; train it anew"
        )


def _with_rows(own: Tensor, earlier_rows: Tensor, before: int, after: int, what: str) -> Tensor:
    """Return a tensor of the ``after`` items with the earlier run's rows first, and its own after
    them; its own where it has no rows of items.
    """
    lengths = len(earlier_rows), len(own)
    if lengths == (before, after) and earlier_rows.shape[1:] == own.shape[1:]:
        rows = own.clone()
        rows[:before] = earlier_rows
        return rows
    if own.shape == earlier_rows.shape:  # a mean over the catalog
        return own
    raise CheckpointError(f"{what} is made for one catalog; train it anew")
