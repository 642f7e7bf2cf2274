"""Training batches: which users, which input, which targets; equal token budgets, no padding."""

from __future__ import annotations

__all__ = ["Batch", "TrainingBatches", "plan_batches"]

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from l2rec.data.ragged import Ragged, flat_index


@dataclass(frozen=True)
class Batch:
    """B users to train on.

    ``users``: [B] int64. ``histories``: B rows of item ints, oldest first, the input.
    ``targets``: the next items. With supervision ``last`` [B], one per row; with ``all`` one per
    input item, aligned with ``histories.values``; with ``sequence`` none. ``negatives``: [B, k]
    int32 sampled items (k may be 0). ``window``: with ``all``, a loss is of so many of the newest
    targets of each row.
    """

    users: npt.NDArray[np.int64]
    histories: Ragged
    targets: npt.NDArray[np.integer]
    negatives: npt.NDArray[np.integer]
    window: int = sys.maxsize

    def __len__(self) -> int:
        return len(self.users)

    @property
    def terms(self) -> int:
        """How many targets a loss of this batch is the mean over; rows where it has none."""
        if len(self.targets) > len(self):  # one for every input item
            return int(np.minimum(self.histories.lengths, self.window).sum())
        return len(self.targets) or len(self)

    def take(self, rows: npt.NDArray[np.integer]) -> Self:
        """Select rows, with their targets and negatives."""
        targets = self.targets
        if len(targets) == len(self):
            targets = targets[rows]
        elif len(targets):
            targets = Ragged(targets, self.histories.offsets).take(rows).values
        return replace(
            self,
            users=self.users[rows],
            histories=self.histories.take(rows),
            targets=targets,
            negatives=self.negatives[rows],
        )


PACK = 8
"""Rows of similar length that stay together in a training batch."""


def plan_batches(
    costs: npt.NDArray[np.integer], rng: np.random.Generator | None, *, max_rows: int, max_cost: int
) -> list[npt.NDArray[np.int64]]:
    """Divide rows into batches of at most ``max_rows`` rows and a total cost of ``max_cost``.

    Args:
        costs: [M] tokens of each row. A row above ``max_cost`` is a batch by itself.
        rng: for training, mixes long and short rows in a batch: with one length at a time, every
            step pulls another way and the model ranks worse. Rows stay in packs of `PACK` of
            similar cost, which keeps padding small. None, for inference, puts similar costs
            together, longest first (a lack of memory shows at once).

    Returns:
        Index arrays that together hold every row exactly once.
    """
    costs = np.asarray(costs, dtype=np.int64)
    order = np.argsort(-costs, kind="stable")
    if rng is not None:
        order = np.lexsort((rng.random(len(costs)), -costs))
        packs = rng.permutation(-(-len(costs) // PACK))
        order = order[np.argsort(packs[np.arange(len(costs)) // PACK], kind="stable")]
    total = np.concatenate(([0], np.cumsum(costs[order])))
    batches, start = [], 0
    while start < len(order):
        fits = int(np.searchsorted(total, total[start] + max_cost, side="right")) - 1
        end = max(start + 1, min(start + max_rows, fits))
        batches.append(order[start:end])
        start = end
    return batches


class TrainingBatches:
    """Batches of one epoch, the same for the same (seed, epoch); cheap to start in the middle.

    Args:
        window: with ``all``, targets of a row (the newest ones); a longer sequence becomes
            several rows, the older with their own earlier context.
        sequences: training prefixes s[:-2] of all users, user int = row. Nothing else is read.
        supervision: ``last`` draws one target position per user and epoch and predicts it from
            the items before it; ``all`` predicts every next item of the sequence in one row;
            ``sequence`` hands out whole sequences, for losses that hide parts of them.
        negatives: sampled items per row, uniform over the catalog.
        item_costs: [N] tokens of each item, for the budget.
    """

    def __init__(
        self,
        sequences: Ragged,
        *,
        supervision: Literal["last", "all", "sequence"],
        max_items: int,
        negatives: int,
        item_costs: npt.NDArray[np.integer],
        batch_users: int,
        batch_tokens: int,
        seed: int,
        epoch: int,
        targets_per_user: int = 1,
        window: int = 50,
    ) -> None:
        self._rng = [seed, epoch]
        rng = np.random.default_rng(self._rng)
        self.negatives = negatives
        self.n_items = len(item_costs)
        lengths = sequences.lengths
        users = np.flatnonzero(lengths >= 2)
        ahead = 0 if supervision == "sequence" else 1
        if supervision != "last":
            # Windows from the newest back, so that every target is supervised once an epoch. The
            # input of the newest stops before the last training item, its last target.
            inputs = lengths[users] - ahead
            windows = -(-inputs // window)
            users, back = np.repeat(users, windows), flat_index(np.zeros_like(windows), windows)
            sizes = np.minimum(np.repeat(inputs, windows) - back * window, max_items)
            ends = sequences.offsets[1:][users] - ahead - back * window
        else:
            users = np.repeat(users, np.minimum(targets_per_user, lengths[users] - 1))
            position = 1 + np.floor(rng.random(len(users)) * (lengths[users] - 1)).astype(np.int64)
            ends = sequences.offsets[:-1][users] + position
            sizes = np.minimum(position, max_items)
        self.users, self._ends, self._sizes = users, ends, sizes
        self._supervision, self._values, self._window = supervision, sequences.values, window
        total = np.concatenate(([0], np.cumsum(item_costs[np.asarray(sequences.values)])))
        costs = total[ends] - total[ends - sizes]
        self._plan = plan_batches(costs, rng, max_rows=batch_users, max_cost=batch_tokens)

    def __len__(self) -> int:
        return len(self._plan)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches ``start``, ``start + 1``, ... of the epoch."""
        for number in range(start, len(self._plan)):
            yield self[number]

    def __getitem__(self, number: int) -> Batch:
        chosen = self._plan[number]
        sizes, ends = self._sizes[chosen], self._ends[chosen]
        index = flat_index(ends - sizes, sizes)
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        histories = Ragged(np.asarray(self._values[index]), offsets)
        following = {"last": ends, "all": index + 1, "sequence": ends[:0]}[self._supervision]
        targets = self._values[following]
        rng = np.random.default_rng([*self._rng, number])
        negatives = rng.integers(self.n_items, size=(len(chosen), self.negatives), dtype=np.int32)
        return Batch(self.users[chosen], histories, np.asarray(targets), negatives, self._window)
