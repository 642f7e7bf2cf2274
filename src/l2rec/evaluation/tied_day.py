"""The tied-day protocol beside leave-one-out: last events of one time, ranked as a set."""

from __future__ import annotations

__all__ = ["PROTOCOL", "beside_leave_one_out", "ranked_as_sets"]

from collections.abc import Callable

import numpy as np

from l2rec.data.dataset import Dataset
from l2rec.data.splits import LEAVE_ONE_OUT, Cases, Split, last_tied_day
from l2rec.evaluation.ranking import Evaluation
from l2rec.evaluation.ranks import protocol_of

PROTOCOL = protocol_of("tied-day, of users whose last tied events leave-one-out does not train on")
"""Name of the protocol, stored with the ranks."""


def beside_leave_one_out(dataset: Dataset, split: Split) -> Cases | None:
    """Return the test sets of the tied-day protocol for a model that was trained on ``split``; None
    where they would be those of the split itself, where it is not leave-one-out, or where items are
    cold.
    """
    if split.kind != LEAVE_ONE_OUT or not dataset.order.last_two or dataset.n_cold:
        return None
    sets = last_tied_day(dataset)
    sets = sets.take(np.isin(sets.users, split.test.users))  # those who are tested
    return sets if len(sets) else None


def ranked_as_sets(
    evaluation: Evaluation, split: Split, sets: Cases, rank: Callable[[Cases], Evaluation]
) -> Evaluation:
    """Evaluate the ``sets`` of `beside_leave_one_out`.

    A user whose last event ties with no other has the same history and target in both protocols:
    only the other users are ranked again, by ``rank``.

    ``evaluation``: of the test cases of ``split``, which are of all users of ``sets``.
    """
    place = np.searchsorted(evaluation.users, sets.users)
    tied = sets.histories.lengths < split.test.histories.lengths[place]
    again = rank(sets.take(tied))
    offsets, n = sets.targets.offsets, len(sets.targets.values)
    of_tied = np.repeat(tied, sets.targets.lengths)
    ranks, masked = np.empty(n), np.empty(n)
    top = np.empty((len(sets), evaluation.top.shape[1]), dtype=evaluation.top.dtype)
    alone = evaluation.take(place[~tied])
    for which, part in ((of_tied, again), (~of_tied, alone)):
        ranks[which], masked[which] = part.ranks, part.ranks_masked
    top[tied], top[~tied] = again.top, alone.top
    return Evaluation(
        ranks=ranks,
        ranks_masked=masked,
        users=sets.users,
        top=top,
        targets=sets.targets.values.astype(np.int64),
        n_items=evaluation.n_items,
        offsets=offsets,
    )
