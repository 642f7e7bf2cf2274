"""Inputs of both arms: periods of days, features of users, items and exposures, held-out clicks.

daily log ── Known ──┐                  ┌─ Arm(treated=False) ─ Features without vectors
                     ├─ Table of states ┤
vectors ─── Frozen ──┘                  └─ Arm(treated=True)  ─ Features with vectors
"""

from __future__ import annotations

__all__ = [
    "Arm",
    "Clicks",
    "Days",
    "Scores",
    "States",
    "Table",
    "as_date",
    "as_tensor",
    "attributes",
    "periods",
    "row_blocks",
    "user_hash",
]

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.data.hashing import GOLDEN, mixed
from l2rec.data.ragged import Ragged
from l2rec.errors import DataError
from l2rec.metrics import expected_ranks
from l2rec.protocols import Progress
from l2rec.runs.machine import device
from l2rec.studies.downstream.daily import (
    DAY,
    Doubles,
    Exposures,
    Ints,
    Known,
    daily_log,
    exposures,
)
from l2rec.studies.downstream.dlrm import Features
from l2rec.studies.downstream.options import DownstreamConfig
from l2rec.studies.downstream.vectors import Frozen

Moments = tuple[Tensor, Tensor]
"""Shift and scale [K] of dense features."""
Scores = Callable[["States"], Callable[[Ints], Tensor]]
"""C candidates of a day -> a function of B user states, whose scores are [B, C]."""


@dataclass(frozen=True)
class Days:
    """Days since 1970: the first to train on, the one that chooses the epoch, the first to test
    on, and the last.
    """

    train: int
    choose: int
    test: int
    last: int

    def named(self) -> dict[str, str]:
        """Write each period as its first and last date."""
        spans = {
            "train": (self.train, self.choose - 1),
            "choose": (self.choose, self.choose),
            "test": (self.test, self.last),
        }
        return {name: f"{as_date(a)} .. {as_date(b)}" for name, (a, b) in spans.items()}


def as_date(day: int) -> str:
    """Write a day since 1970 as a date."""
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()


def periods(until: float, last: int, test_days: int) -> Days:
    """Divide the days of a log: training begins on the day after the newest event of the vectors.

    ``until``: seconds, that newest event. ``last``: last day of the log, since 1970.

    Raises:
        DataError: no day is left to train on.
    """
    days = Days(int(until // DAY) + 1, last - test_days, last - test_days + 1, last)
    if days.train >= days.choose:
        wanted = as_date(last - test_days - 3)
        raise DataError(
            f"the vectors know events up to {as_date(days.train - 1)} and the log ends on "
            f"{as_date(last)}: of the {max(0, last - days.train + 1)} days left, {test_days} are "
            f"to test, one is to choose and none to train on; train the run on less: `l2rec "
            f"prepare LOG --only click --before {wanted}`"
        )
    return days


@dataclass
class States:
    """S users or items, each as a day begins.

    ``owner``: [S] user or item ints. ``day``: [S] days since 1970. ``dense``: [S, K] float32, not
    scaled. ``ids``: [S, F] int64 rows of the embedding tables. ``vectors``: [S] rows of the
    table's frozen vectors. ``histories``: S rows of users, None for items.
    """

    owner: Ints
    day: Ints
    dense: Tensor
    ids: Tensor
    vectors: Ints
    histories: Ragged | None = None


def user_hash(users: Ints, buckets: int) -> Ints:
    """Hash user ints into buckets [n] by splitmix64, which spreads consecutive ints evenly."""
    return (mixed(users.astype(np.uint64) + GOLDEN) % np.uint64(buckets)).astype(np.int64)


def attributes(
    catalog: Catalog, names: Sequence[str] | None = None, most: int = 5000
) -> dict[str, Ints]:
    """Assign numbers to the values of catalog fields, from 0 in alphabetical order: [N] int64.

    Without ``names``: all fields with 2 to ``most`` values that four items share on average.

    Raises:
        DataError: no such field.
    """
    values_of = {}
    for name in catalog.fields if names is None else names:
        column = np.array(catalog.field(name), dtype=object)
        _, values = np.unique(column.astype(str), return_inverse=True)
        count = int(values.max(initial=-1)) + 1
        if names is not None or (1 < count <= most and 4 * count <= len(values)):
            values_of[name] = values.astype(np.int64)
    return values_of


def as_tensor(values: npt.NDArray[Any]) -> Tensor:
    """Put an array on the device."""
    return torch.from_numpy(values).to(device())


def row_blocks(rows: Ints, size: int = 8192) -> Iterator[Ints]:
    """Split row numbers into blocks."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


class Table:
    """Exposures, labels, features and vectors that both stages read, for all arms and seeds.

    Args:
        dataset: a log of exposures, clicks and replies.
        config: options.
        make: source of the vectors, from `vectors_of_run` or `vectors_of_files`.
        until: seconds, the newest event that the vectors know.

    Raises:
        DataError: too few days, or a period without clicks or without exposures that were not
            clicked.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DownstreamConfig,
        make: Callable[[Known], Frozen],
        until: float,
        progress: Progress,
    ) -> None:
        log = daily_log(dataset)
        self.config = config
        self.n_users, self.n_items = dataset.n_users, dataset.n_items
        self.days = periods(until, log.days[1], config.test_days)
        days = self.days
        shown = exposures(log, cut=days.test, window=3600 * config.window_hours)
        self.shown = shown.take(np.flatnonzero(shown.day >= days.train))
        self.fields = attributes(Catalog(dataset.catalog), config.fields)
        self.known = Known(log, self.fields, average=days.train)
        self.parts = {
            "train": np.flatnonzero(self.shown.day < days.choose),
            "choose": np.flatnonzero(self.shown.day == days.choose),
            "test": np.flatnonzero(self.shown.day >= days.test),
        }
        for name, rows in self.parts.items():
            clicks = int(self.shown.labels[rows, 0].sum())
            if not 0 < clicks < len(rows):
                raise DataError(
                    f"{len(rows):,} exposures to {name} with ({days.named()[name]}), {clicks:,} "
                    "of them clicked; both kinds are needed: give a longer log"
                )
        self.sizes = [config.user_buckets, dataset.n_items + 1]
        self.sizes += [int(values.max(initial=0)) + 1 for values in self.fields.values()]
        first = np.full(dataset.n_items, np.iinfo(np.int64).max)
        np.minimum.at(first, log.item, log.day)
        self.first_day = first
        self.frozen = make(self.known)
        self._tables(progress)

    def _tables(self, progress: Progress) -> None:
        """Compute the states, features and labels of all exposures."""
        shown = self.shown
        span = self.days.last + 1
        progress.line(
            f"{len(shown):,} exposures from {as_date(self.days.train)} on; attributes of items: "
            + (", ".join(self.fields) or "none")
        )
        users, self.user_row = np.unique(shown.user * span + shown.day, return_inverse=True)
        self.users = self.user_states(users // span, users % span)
        train = self.parts["train"]
        old = train[self.known.shown_before(shown.item[train], shown.day[train])]
        self.trained = np.zeros(self.n_items, dtype=np.bool_)
        self.trained[shown.item[old]] = True
        items, self.item_row = np.unique(shown.item * span + shown.day, return_inverse=True)
        self.items = self.item_states(items // span, items % span)
        self.cross = as_tensor(self.known.pairs(shown.user, shown.item, shown.day))
        self.labels = as_tensor(shown.labels)
        vectors = self.frozen.users(self.users.owner, self.users.day)
        self.user_vectors = as_tensor(vectors)
        self.item_vectors = as_tensor(self.frozen.items)
        share = np.bincount(shown.item[train], minlength=self.n_items) / len(train)
        self.log_q = as_tensor(np.log(np.maximum(share, 1e-12)).astype(np.float32))
        rates = shown.labels[train].mean(0).clip(1e-6, 1 - 1e-6)
        self.log_odds = as_tensor(np.log(rates / (1 - rates)))
        self.clicks = {name: Clicks.of(self, self.parts[name]) for name in ("choose", "test")}

    def shown_in(self, part: str) -> Exposures:
        """Select the exposures of a period: ``train``, ``choose`` or ``test``."""
        return self.shown.take(self.parts[part])

    def user_states(self, users: Ints, days: Ints) -> States:
        """Describe users [S] as days [S] begin."""
        return States(
            users,
            days,
            as_tensor(self.known.users(users, days)),
            as_tensor(user_hash(users, self.config.user_buckets)[:, None]),
            np.arange(len(users)),
            self.known.histories(users, days, self.config.max_history),
        )

    def item_states(self, items: Ints, days: Ints) -> States:
        """Describe items [S] as days [S] begin.

        Row 0 of the item embeddings stands for items that nobody had been shown before the day, and
        for those whose row no training exposure would train.
        """
        seen = self.known.shown_before(items, days) & self.trained[items]
        ids = [np.where(seen, items + 1, 0), *(values[items] for values in self.fields.values())]
        return States(
            items,
            days,
            as_tensor(self.known.items(items, days)),
            as_tensor(np.stack(ids, axis=1)),
            items,
        )


class Arm:
    """The table as one arm reads it: dense features scaled on the training days.

    Counters and the cosine are standardised column by column. Vectors and their product are divided
    by their mean length, because so many standardised columns would outweigh the counters.
    """

    def __init__(self, table: Table, treated: bool) -> None:
        self.table, self.treated = table, treated
        self.size = table.item_vectors.shape[1] if treated else 0
        rows = table.parts["train"]
        parts = list(row_blocks(rows))
        self.moments = _moments((self._pair_dense(p) for p in parts), self.size)
        self.user_moments = _moments(
            (self._user_dense(table.user_row[p]) for p in parts), self.size
        )
        self.item_moments = _moments(
            (self._item_dense(table.items, table.item_row[p]) for p in parts), self.size
        )

    def _user_dense(self, at: Ints) -> Tensor:
        """Gather the dense features of user states, and in the treatment their vectors."""
        users = self.table.users
        parts = [users.dense[at]]
        if self.treated:
            parts.append(self.table.user_vectors[users.vectors[at]])
        return torch.cat(parts, dim=1)

    def _item_dense(self, states: States, at: Ints) -> Tensor:
        """Gather the dense features of item states, and in the treatment their vectors."""
        parts = [states.dense[at]]
        if self.treated:
            parts.append(self.table.item_vectors[states.vectors[at]])
        return torch.cat(parts, dim=1)

    def _pair_dense(self, rows: Ints) -> Tensor:
        """Gather dense features [B, K] of exposures: of users, items and pairs.

        In the treatment cos(a, b), a, b and their elementwise product follow.
        """
        t = self.table
        user, item = t.user_row[rows], t.item_row[rows]
        parts = [t.users.dense[user], t.items.dense[item], t.cross[rows]]
        if self.treated:
            a, b = self.pair_vectors(rows)
            parts += [nn.functional.cosine_similarity(a, b)[:, None], a, b, a * b]
        return torch.cat(parts, dim=1)

    def pair_vectors(self, rows: Ints) -> tuple[Tensor, Tensor]:
        """Gather the frozen vectors [B, D] of users and of items of exposures."""
        t = self.table
        users, items = t.users.vectors[t.user_row[rows]], t.items.vectors[t.item_row[rows]]
        return t.user_vectors[users], t.item_vectors[items]

    def _bags(self, at: Ints) -> tuple[Tensor, Tensor]:
        """Gather the histories of user states, as values and offsets."""
        assert self.table.users.histories is not None
        taken = self.table.users.histories.take(at)
        # Row 0 of the item embeddings means "new"; a history contains only items that were shown.
        return as_tensor(taken.values.astype(np.int64) + 1), as_tensor(taken.offsets)

    def pairs(self, rows: Ints) -> Features:
        """Gather the features of exposures for the ranking stage."""
        t = self.table
        user, item = t.user_row[rows], t.item_row[rows]
        ids = torch.cat((t.users.ids[user], t.items.ids[item]), dim=1)
        return Features(_standard(self._pair_dense(rows), self.moments), ids, *self._bags(user))

    def of_users(self, at: Ints) -> tuple[Features, Tensor | None]:
        """Gather user states for the user tower, with frozen vectors [B, D] in the treatment."""
        users = self.table.users
        dense = _standard(self._user_dense(at), self.user_moments)
        frozen = self.table.user_vectors[users.vectors[at]] if self.treated else None
        return Features(dense, users.ids[at], *self._bags(at)), frozen

    def of_items(self, states: States, at: Ints) -> tuple[Features, Tensor | None]:
        """Gather item states for the item tower, with frozen vectors [B, D] in the treatment."""
        dense = _standard(self._item_dense(states, at), self.item_moments)
        frozen = self.table.item_vectors[states.vectors[at]] if self.treated else None
        return Features(dense, states.ids[at]), frozen


def _moments(blocks: Iterator[Tensor], size: int) -> Moments:
    """Compute shift and scale [K] of the columns of all blocks.

    Counters come first: their mean and deviation. Vectors of ``size`` columns follow: no shift, and
    the root of each vector's mean squared length.
    """
    count, total, squares = 0, Tensor(), Tensor()
    for block in blocks:
        sums = block.double().sum(0), block.double().square().sum(0)
        total, squares = (total + sums[0], squares + sums[1]) if count else sums
        count += len(block)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    vectors = len(mean) // size if size else 0
    for start in range(len(mean) - vectors * size, len(mean), size or 1):
        mean[start : start + size] = 0.0
        deviation[start : start + size] = (squares[start : start + size].sum() / count).sqrt()
    deviation[deviation < 1e-6] = 1.0
    return mean.float(), deviation.float()


def _standard(dense: Tensor, moments: Moments) -> Tensor:
    """Shift and scale dense features [B, K]."""
    return (dense - moments[0]) / moments[1]


@dataclass(frozen=True)
class Clicks:
    """n held-out clicks, and the candidates of each day: items that had appeared by its end.

    ``user``, ``item``, ``day``: [n]. ``state``: [n] rows of the table's user states.
    """

    user: Ints
    state: Ints
    item: Ints
    day: Ints
    candidates: Mapping[int, States]

    @classmethod
    def of(cls, table: Table, rows: Ints) -> Clicks:
        """Select the clicked exposures among ``rows``."""
        rows = rows[table.shown.labels[rows, 0] > 0]
        shown, candidates = table.shown, {}
        for day in np.unique(shown.day[rows]):
            there = np.flatnonzero(table.first_day <= day)
            candidates[int(day)] = table.item_states(there, np.full(len(there), day))
        return cls(
            shown.user[rows], table.user_row[rows], shown.item[rows], shown.day[rows], candidates
        )

    def ranks(self, scores: Scores) -> Doubles:
        """Rank each click among all candidates of its day: expected rank [n], from 1."""
        ranks = np.zeros(len(self.item))
        for day, states in self.candidates.items():
            of_users = scores(states)
            for part in row_blocks(np.flatnonzero(self.day == day), 512):
                columns = np.searchsorted(states.owner, self.item[part])
                rows = of_users(self.state[part])
                ranks[part] = expected_ranks(rows, torch.from_numpy(columns)).numpy()
        return ranks
