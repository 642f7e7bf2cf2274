"""Training, validation and test events: the four ways to split, each defined here alone.

For a user with events s[0], ..., s[n-1], oldest first, and a case "history -> what is to be ranked
first":

    leave-one-out   n >= 3            train s[:-2], validation s[:-2] -> s[-2], test s[:-1] -> s[-1]
    tied-day        3 groups or more  the events of one time are a group G[0], ..., G[k-1]; train
                                      G[:-2], validation G[:-2] -> the set G[-2], test G[:-1] -> the
                                      set G[-1]
    time            two moments       train: events before the first; validation: the first event
                                      from there on, after all before it; test: likewise from the
                                      second moment on
    given           as the log says   every validation and every test event after all before it; if
                                      no event is of validation, each user's last training event is
                                      taken for it, of two or more

Users who cannot be evaluated in the first two ways are trained on whole. Without ties, tied-day is
leave-one-out.

Of data with cold items (`l2rec.data.cold`), their events are taken out of training, validation and
all histories; in test they are targets. Cases that are left without a history or a target go.
"""

from __future__ import annotations

__all__ = [
    "Cases",
    "Split",
    "given",
    "global_time",
    "last_tied_day",
    "leave_one_out",
    "split_events",
    "tied_day",
    "warm_targets",
    "with_fewer_users",
]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from l2rec.data.dataset import GIVEN, Dataset
from l2rec.data.moments import moment, shown
from l2rec.data.parts import MIN_EVENTS, TEST, TRAIN, VALID, with_validation
from l2rec.data.ragged import Ragged, flat_index
from l2rec.errors import DataError

if TYPE_CHECKING:
    from l2rec.config import SplitKind

LEAVE_ONE_OUT, TIED_DAY, TIME = "leave-one-out", "tied-day", "time"

WITHOUT_TIMES = {"order only": "positions instead of times", "mixed": "times of several units"}
"""Units of time by which nothing can be split."""

QUANTILES = (0.8, 0.9)
"""Shares of all events before validation and before test, where no moments are named."""

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cases:
    """Histories, and the items that are to be ranked first after each.

    ``users``: [M] int64, ascending; with given splits a user may have several cases.
    ``histories``: M rows, none empty. ``targets``: M rows of distinct items, one unless the split
    is tied-day; int32.
    """

    users: Longs
    histories: Ragged
    targets: Ragged

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Cases:
        """Select cases (ints or a mask)."""
        at = np.arange(len(self))[rows]
        return Cases(self.users[at], self.histories.take(at), self.targets.take(at))

    def pairs(self) -> tuple[Ragged, npt.NDArray[np.integer]]:
        """Return histories and single targets, a row for each target: T rows, [T]."""
        if len(self.targets.values) == len(self):
            return self.histories, self.targets.values
        rows = np.repeat(np.arange(len(self)), self.targets.lengths)
        return self.histories.take(rows), self.targets.values


@dataclass(frozen=True)
class Split:
    """Training sequences, and the cases of validation and test.

    ``kind``: which of the four ways. ``protocol``: the same in words, with its moments. ``train``:
    a row for each user who has a training event, in the order of users; none is empty. ``warm``:
    items from this one on are cold; None: there are none.
    """

    kind: str
    protocol: str
    train: Ragged
    valid: Cases
    test: Cases
    warm: int | None = None

    def whole(self) -> Ragged:
        """Return what is known of each test case, its history and then its targets, without items
        that are cold: what no method is given but to reproduce a published leak.
        """
        parts = [self.test.histories, self.test.targets]
        lengths = np.stack([part.lengths for part in parts], axis=1).ravel()
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        values = np.empty(offsets[-1], dtype=self.test.histories.values.dtype)
        for number, part in enumerate(parts):
            values[flat_index(offsets[number:-1:2], part.lengths)] = part.values
        rows = Ragged(values, offsets[::2])
        return rows if self.warm is None else _kept(rows, values < self.warm)

    def cases(self, name: str) -> Cases:
        """Return the cases of ``valid`` or ``test``."""
        return self.test if name == "test" else self.valid


def split_events(
    dataset: Dataset,
    kind: SplitKind = "auto",
    valid_from: float | str | None = None,
    test_from: float | str | None = None,
    users: int | None = None,
) -> Split:
    """Split a data set in one of the four ways; there is somebody to validate and to test.

    Args:
        dataset: the prepared data set.
        kind: which way; ``auto``: as given, where the log came with splits other than
            leave-one-out, otherwise leave-one-out.
        valid_from: first moment of validation, with ``time``: a date such as 2023-11-28, a number
            in the unit of the timestamps, or, between 0 and 1, the share of events before it.
        test_from: first moment of test, likewise.
        users: most cases of validation and of test, evenly spread over all; None: all.

    Raises:
        DataError: nobody can be validated or tested, a split by time of events that have none, or
            one of the log's own where it has none.
    """
    split = _split_events(dataset, kind, valid_from, test_from)
    split = _without_cold(split, dataset) if dataset.n_cold else split
    return split if users is None else _of_few(split, users)


def _of_few(split: Split, most: int) -> Split:
    """Keep at most so many cases of validation and of test, evenly spread."""
    valid, test = _spread(split.valid, most), _spread(split.test, most)
    if len(valid) == len(split.valid) and len(test) == len(split.test):
        return split
    protocol = f"{split.protocol}; {len(test):,} of {len(split.test):,} cases of test"
    return replace(split, protocol=protocol, valid=valid, test=test)


def _spread(cases: Cases, most: int) -> Cases:
    if len(cases) <= most:
        return cases
    return cases.take(np.linspace(0, len(cases) - 1, most).astype(np.int64))


def _split_events(
    dataset: Dataset,
    kind: SplitKind,
    valid_from: float | str | None,
    test_from: float | str | None,
) -> Split:
    """Split all events, those of cold items too."""
    if kind == "auto":
        kind = "leave-one-out" if dataset.splits is None else "given"
    if kind == GIVEN and dataset.meta.get("splits") == LEAVE_ONE_OUT:
        kind = "leave-one-out"
    if kind == GIVEN:
        return given(dataset)
    if kind == TIME:
        return global_time(dataset, *_moments(dataset, valid_from, test_from))
    split = leave_one_out(dataset.sequences) if kind == LEAVE_ONE_OUT else tied_day(dataset)
    if not len(split.test):
        what = "three events" if kind == LEAVE_ONE_OUT else "events of three different times"
        raise DataError(
            f"{dataset.path}: no user has {what}: one to learn from, two to be tested on"
        )
    return split


def _moments(
    dataset: Dataset, valid_from: float | str | None, test_from: float | str | None
) -> tuple[float, float]:
    """Turn what names the two moments into times."""
    order = dataset.order
    if order.unit in WITHOUT_TIMES:
        raise DataError(
            f"{dataset.path} has {WITHOUT_TIMES[order.unit]}, and those of different users have "
            f"nothing to do with each other; choose leave-one-out, or prepare a log with times"
        )
    values = [
        moment(str(value), order.per_second or 1.0)
        for value in (
            QUANTILES[0] if valid_from is None else valid_from,
            QUANTILES[1] if test_from is None else test_from,
        )
    ]
    valid, test = (
        # An event's own time: what happened at it belongs to the later period.
        float(np.quantile(dataset.timestamps, value, method="higher")) if 0 < value < 1 else value
        for value in values
    )
    return valid, test


def leave_one_out(sequences: Ragged) -> Split:
    """Test on each user's last event, validate on the one before, train on the rest."""
    lengths = sequences.lengths
    users = np.flatnonzero(lengths >= MIN_EVENTS)
    ends = lengths[users]
    return Split(
        kind=LEAVE_ONE_OUT,
        protocol=LEAVE_ONE_OUT,
        train=_heads(sequences, np.where(lengths >= MIN_EVENTS, lengths - 2, lengths)),
        valid=_next_events(sequences, users, ends - 2),
        test=_next_events(sequences, users, ends - 1),
    )


def tied_day(dataset: Dataset) -> Split:
    """Test on each user's last group of events with one time, as a set; validate on the group
    before, train on the rest.
    """
    sequences, lengths = dataset.sequences, dataset.sequences.lengths
    groups = _groups(dataset)
    users = np.flatnonzero(groups.lengths >= MIN_EVENTS)
    last = groups.offsets[1:][users]
    starts = {back: groups.values[last - back].astype(np.int64) for back in (1, 2)}
    train = lengths.copy()
    train[users] = starts[2]
    return Split(
        kind=TIED_DAY,
        protocol="tied-day: a user's last events of one time as a set",
        train=_heads(sequences, train),
        valid=_sets(sequences, users, starts[2], starts[1]),
        test=_sets(sequences, users, starts[1], lengths[users]),
    )


def last_tied_day(dataset: Dataset) -> Cases:
    """Return the test sets of `tied_day` that leave-one-out does not train on: of users with three
    events or more, those whose last group has at most two, and a history before it.
    """
    lengths = dataset.sequences.lengths
    groups = _groups(dataset)
    users = np.flatnonzero(lengths >= MIN_EVENTS)
    starts = groups.values[groups.offsets[1:][users] - 1].astype(np.int64)
    unseen = (lengths[users] - starts <= MIN_EVENTS - 1) & (starts > 0)
    users, starts = users[unseen], starts[unseen]
    return _sets(dataset.sequences, users, starts, lengths[users])


def global_time(dataset: Dataset, valid_from: float, test_from: float) -> Split:
    """Cut all users at the same two moments (in the unit of ``dataset.timestamps``).

    Raises:
        DataError: the moments are not in order, times are only positions, or nobody can be
            validated or tested.
    """
    per_second = dataset.order.per_second
    names = [
        f"{at:.15g}" if per_second is None else shown(at / per_second)
        for at in (valid_from, test_from)
    ]
    if not valid_from < test_from:
        raise DataError(
            f"validation from {names[0]} on, and test from {names[1]} on, which is not later; "
            f"choose two moments in order (--valid-from, --test-from)"
        )
    sequences = dataset.sequences
    n_train = _counts_before(dataset, valid_from)
    n_valid = _counts_before(dataset, test_from)
    valid = np.flatnonzero((n_train > 0) & (n_valid > n_train))
    test = np.flatnonzero((n_valid > 0) & (sequences.lengths > n_valid))
    if not len(valid) or not len(test):
        raise DataError(
            f"no user has events before {names[0]} and from there up to {names[1]}, or none has "
            f"before {names[1]} and later; choose moments inside the log's time span"
        )
    return Split(
        kind=TIME,
        protocol=f"time: validation from {names[0]}, test from {names[1]}, a user's first event of "
        f"each",
        train=_not_empty(_heads(sequences, n_train)),
        valid=_next_events(sequences, valid, n_train[valid]),
        test=_next_events(sequences, test, n_valid[test]),
    )


def given(dataset: Dataset) -> Split:
    """Split as the log says: train on its training events, and validate and test on each other
    event, with all of the user's events before it as history.

    Raises:
        DataError: the log did not say, or has no validation or no test event with a history.
    """
    if dataset.splits is None:
        raise DataError(
            f"{dataset.path} has no splits of its own; choose leave-one-out, tied-day or time"
        )
    sequences = dataset.sequences
    owners = np.repeat(np.arange(dataset.n_users, dtype=np.int64), sequences.lengths)
    splits = with_validation(dataset.splits, dataset.offsets)
    n_train = np.bincount(owners[splits == TRAIN], minlength=dataset.n_users)

    def of(split: int) -> Cases:
        at = np.flatnonzero(splits == split)
        before = at - dataset.offsets[owners[at]]
        at, before = at[before > 0], before[before > 0]
        if not len(at):
            name = "validation" if split == VALID else "test"
            raise DataError(
                f"the splits that {dataset.path} was given have no {name} event with a history; "
                f"choose another split"
            )
        return _next_events(sequences, owners[at], before)

    return Split(
        kind=GIVEN,
        protocol="the splits that the data came with, every event of them",
        train=_not_empty(_heads(sequences, n_train)),
        valid=of(VALID),
        test=of(TEST),
    )


def _without_cold(split: Split, dataset: Dataset) -> Split:
    """Take events of cold items out of all but the test's targets.

    Raises:
        DataError: nobody is left to be validated, or to be tested on warm or on cold items.
    """
    warm = dataset.n_warm
    valid = _with_history(warm_targets(split.valid, warm), warm)
    test = _with_history(split.test, warm)
    cold_targets = int((test.targets.values >= warm).sum())
    if not len(valid) or not 0 < cold_targets < len(test.targets.values):
        raise DataError(
            f"{dataset.path}: with {dataset.n_cold:,} cold items, {len(valid):,} users are left to "
            f"be validated, and {cold_targets:,} of {len(test.targets.values):,} targets of the "
            "test are cold; choose another --share of l2rec cold, or another split"
        )
    return Split(
        kind=split.kind,
        protocol=f"{split.protocol}; {dataset.n_cold:,} of {dataset.n_items:,} items are cold: in "
        "no training event and no history",
        train=_not_empty(_kept(split.train, split.train.values < warm)),
        valid=valid,
        test=test,
        warm=warm,
    )


def warm_targets(cases: Cases, warm: int) -> Cases:
    """Drop cold targets, and cases that have no other."""
    targets = _kept(cases.targets, cases.targets.values < warm)
    return Cases(cases.users, cases.histories, targets).take(targets.lengths > 0)


def _with_history(cases: Cases, warm: int) -> Cases:
    """Drop cold items from histories, and cases that have no other there."""
    histories = _kept(cases.histories, cases.histories.values < warm)
    return Cases(cases.users, histories, cases.targets).take(histories.lengths > 0)


def _kept(rows: Ragged, which: npt.NDArray[np.bool_]) -> Ragged:
    """Copy the marked values of each row; which: of all values."""
    before = np.zeros(len(rows.values) + 1, dtype=np.int64)
    np.cumsum(which, out=before[1:])
    return Ragged(np.asarray(rows.values)[which], before[rows.offsets])


def with_fewer_users(split: Split, share: float, seed: int) -> Split:
    """Keep the training sequences of a random share of the users; evaluate everybody as before."""
    users = len(split.train)
    drawn = np.random.default_rng(seed).permutation(users)[: max(1, round(share * users))]
    return replace(split, train=split.train.take(np.sort(drawn)))


def _next_events(sequences: Ragged, users: Longs, before: Longs) -> Cases:
    """Return a case for each of ``users``: the event after their first ``before`` events."""
    starts = sequences.offsets[:-1][users]
    if bool((np.diff(users) > 0).all()):
        keep = np.zeros(len(sequences), dtype=np.int64)
        keep[users] = before
        histories = _heads(sequences, keep, users)
    else:
        histories = sequences.gather(starts, before)
    targets = np.asarray(sequences.values[starts + before], dtype=np.int32)
    return Cases(users, histories, Ragged(targets, np.arange(len(users) + 1, dtype=np.int64)))


def _sets(sequences: Ragged, users: Longs, starts: Longs, ends: Longs) -> Cases:
    """Return a case for each of ``users``: the distinct items of events ``starts`` to ``ends``."""
    firsts = sequences.offsets[:-1][users]
    events = sequences.gather(firsts + starts, ends - starts)
    rows = np.repeat(np.arange(len(users)), events.lengths)
    width = int(events.values.max(initial=0)) + 1
    _, first = np.unique(rows * width + events.values, return_index=True)
    kept = np.sort(first)
    offsets = np.searchsorted(rows[kept], np.arange(len(users) + 1)).astype(np.int64)
    targets = Ragged(events.values[kept].astype(np.int32), offsets)
    return Cases(users, sequences.gather(firsts, starts), targets)


def _groups(dataset: Dataset) -> Ragged:
    """Return where each user's groups of equal time begin, counted from the user's first event."""
    times, offsets = np.asarray(dataset.timestamps), dataset.offsets
    begins = np.ones(len(times), dtype=bool)
    begins[1:] = times[1:] != times[:-1]
    begins[offsets[:-1][np.diff(offsets) > 0]] = True
    at = np.flatnonzero(begins)
    bounds = np.searchsorted(at, offsets)
    owners = np.repeat(np.arange(len(offsets) - 1), np.diff(bounds))
    return Ragged(at - offsets[owners], bounds.astype(np.int64))


def _heads(sequences: Ragged, keep: Longs, users: Longs | None = None) -> Ragged:
    """Copy the first ``keep[u]`` values of each row; only the rows ``users`` if given (``keep`` of
    the others must be 0). Takes a byte per event, where positions would take eight.
    """
    # Each row is a run of ones and a run of zeros, so repeat over (kept, left out) pairs.
    runs = np.stack([keep, sequences.lengths - keep], axis=1).reshape(-1)
    mask = np.repeat(np.tile(np.array([True, False]), len(keep)), runs)
    kept = keep if users is None else keep[users]
    offsets = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum(kept, out=offsets[1:])
    return Ragged(np.asarray(sequences.values)[mask], offsets)


def _not_empty(rows: Ragged) -> Ragged:
    return rows.take(np.flatnonzero(rows.lengths > 0))


def _counts_before(dataset: Dataset, moment: float) -> Longs:
    """Count each user's events with a timestamp below ``moment``: [U]."""
    before = np.zeros(dataset.n_events + 1, dtype=np.int64)
    np.cumsum(dataset.timestamps < moment, out=before[1:])
    counts: Longs = np.diff(before[dataset.offsets])
    return counts
