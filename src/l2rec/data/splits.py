"""Training, validation and test events: leave-one-out, or a global split by time.

Leave-one-out, for a user with events s[0], ..., s[n-1] and n >= 3:

    train       s[:-2]
    validation  s[:-2] -> s[-2]
    test        s[:-1] -> s[-1]

Users with fewer events are trained on whole and never evaluated.
"""

from __future__ import annotations

__all__ = ["Split", "global_time", "leave_one_out", "with_fewer_users"]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from l2rec.data.ragged import Ragged
from l2rec.errors import DataError

if TYPE_CHECKING:
    from l2rec.data.dataset import Dataset

MIN_EVENTS = 3  # one to learn from, one to validate, one to test


@dataclass(frozen=True)
class Split:
    """Training sequences, and histories with their targets of M evaluated users.

    ``train``: U rows, aligned with user ints. ``users``: [M] int64, the evaluated users, ascending.
    ``*_histories``: M rows, ``*_targets``: [M] int32, aligned with ``users``.
    """

    train: Ragged
    users: npt.NDArray[np.int64]
    valid_histories: Ragged
    valid_targets: npt.NDArray[np.int32]
    test_histories: Ragged
    test_targets: npt.NDArray[np.int32]


def leave_one_out(sequences: Ragged) -> Split:
    """Test on each user's last event, validate on the one before, train on the rest."""
    lengths = sequences.lengths
    users = np.flatnonzero(lengths >= MIN_EVENTS)
    ends = sequences.offsets[1:][users]
    evaluated = lengths[users]
    return Split(
        train=_heads(sequences, np.where(lengths >= MIN_EVENTS, lengths - 2, lengths)),
        users=users,
        valid_histories=_heads(sequences, _spread(evaluated - 2, users, len(lengths)), users),
        valid_targets=sequences.values[ends - 2].astype(np.int32),
        test_histories=_heads(sequences, _spread(evaluated - 1, users, len(lengths)), users),
        test_targets=sequences.values[ends - 1].astype(np.int32),
    )


def with_fewer_users(split: Split, share: float, seed: int) -> Split:
    """Keep the training sequences of a random share of the users; evaluate everybody as before.

    Rows of ``train`` are no longer aligned with user ints.
    """
    users = len(split.train)
    drawn = np.random.default_rng(seed).permutation(users)[: max(1, round(share * users))]
    return replace(split, train=split.train.take(np.sort(drawn)))


def global_time(dataset: Dataset, valid_from: float, test_from: float) -> Split:
    """Cut all users at the same two moments (in the unit of ``dataset.timestamps``).

    Train: events before ``valid_from``. Users with events in all three periods are evaluated;
    the target is the first event of a period, its history every event before it.

    Raises:
        DataError: the moments are not in order, or no user can be evaluated.
    """
    if not valid_from < test_from:
        raise DataError(
            f"valid_from={valid_from} is not before test_from={test_from}; "
            f"choose two moments in order"
        )
    sequences, offsets = dataset.sequences, dataset.offsets
    n_train = _counts_before(dataset, valid_from)
    n_valid = _counts_before(dataset, test_from)
    users = np.flatnonzero((n_train > 0) & (n_valid > n_train) & (sequences.lengths > n_valid))
    if not len(users):
        raise DataError(
            f"no user has events before {valid_from}, up to {test_from} and after; "
            f"choose moments inside the log's time span"
        )
    starts = offsets[:-1][users]
    n_users = dataset.n_users
    return Split(
        train=_heads(sequences, n_train),
        users=users,
        valid_histories=_heads(sequences, _spread(n_train[users], users, n_users), users),
        valid_targets=sequences.values[starts + n_train[users]].astype(np.int32),
        test_histories=_heads(sequences, _spread(n_valid[users], users, n_users), users),
        test_targets=sequences.values[starts + n_valid[users]].astype(np.int32),
    )


def _heads(
    sequences: Ragged,
    keep: npt.NDArray[np.int64],
    users: npt.NDArray[np.int64] | None = None,
) -> Ragged:
    """Copy the first ``keep[u]`` values of each row; only the rows ``users`` if given (``keep`` of
    the others must be 0). Takes a byte per event, where positions would take eight.
    """
    lengths = sequences.lengths
    # Each row is a run of ones and a run of zeros, so repeat over (kept, left out) pairs.
    runs = np.stack([keep, lengths - keep], axis=1).reshape(-1)
    mask = np.repeat(np.tile(np.array([True, False]), len(lengths)), runs)
    kept = keep if users is None else keep[users]
    offsets = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum(kept, out=offsets[1:])
    return Ragged(np.asarray(sequences.values)[mask], offsets)


def _spread(
    values: npt.NDArray[np.int64], users: npt.NDArray[np.int64], n_users: int
) -> npt.NDArray[np.int64]:
    spread = np.zeros(n_users, dtype=np.int64)
    spread[users] = values
    return spread


def _counts_before(dataset: Dataset, moment: float) -> npt.NDArray[np.int64]:
    """Count each user's events with a timestamp below ``moment``: [U]."""
    before = np.zeros(dataset.n_events + 1, dtype=np.int64)
    np.cumsum(dataset.timestamps < moment, out=before[1:])
    counts: npt.NDArray[np.int64] = np.diff(before[dataset.offsets])
    return counts
