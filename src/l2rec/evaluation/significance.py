"""Paired tests on per-user values, scores by segment, and correction for many tests."""

from __future__ import annotations

__all__ = ["PairedTest", "by_segment", "holm", "paired_test", "paired_values_test"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from l2rec.errors import DataError
from l2rec.evaluation.ranking import Evaluation
from l2rec.metrics import KS, FloatArray, rank_values


@dataclass(frozen=True)
class PairedTest:
    """Result of a paired t-test.

    ``difference`` is ``mean_a`` - ``mean_b``; ``t`` has its sign; ``p`` is two-sided.
    """

    mean_a: float
    mean_b: float
    difference: float
    standard_error: float
    t: float
    p: float


def paired_test(ranks_a: FloatArray, ranks_b: FloatArray, metric: str = "ndcg@10") -> PairedTest:
    """Test the per-user values of ``metric`` with `paired_values_test`.

    ``ranks_a``, ``ranks_b``: [M] ranks of the same users in the same order, M from 2.

    Raises:
        DataError: lengths that differ or are below 2. ValueError: an unknown metric.
    """
    return paired_values_test(rank_values(ranks_a, metric), rank_values(ranks_b, metric))


def paired_values_test(
    a: FloatArray, b: FloatArray, users: npt.NDArray[np.integer] | None = None
) -> PairedTest:
    """Compute a paired two-sided t-test.

    ``a``, ``b``: [M] values of the same users in the same order, of 2 or more. Identical values
    give t = 0 and p = 1. ``users``: [M] ints, where a user may have several values: these are not
    independent, so what varies is each user's sum (the standard error is clustered by user); with
    one value each, it is the same test.

    Raises:
        DataError: lengths that differ, or fewer than 2 users.
    """
    differences = a - b if len(a) == len(b) else np.empty(0)
    n = len(differences)
    difference = float(differences.mean()) if n else 0.0
    off = differences - difference
    if users is not None and n:
        of_users = np.unique(users, return_inverse=True)[1]
        off = np.bincount(of_users, weights=off).astype(np.float64)
    if len(off) < 2:
        raise DataError(f"{len(a)} and {len(b)} ranks; a paired test needs 2 or more users in both")
    from scipy.special import stdtr  # scipy is slow to import and only tests need it

    error = math.sqrt(float(off @ off) * len(off) / (len(off) - 1)) / n
    if error > 0:
        t = difference / error
    else:  # every user differs by the same amount: by nothing, or surely by something
        t = math.copysign(math.inf, difference) if difference else 0.0
    p = 2.0 * float(stdtr(len(off) - 1, -abs(t)))
    return PairedTest(float(a.mean()), float(b.mean()), difference, error, t, p)


def by_segment(
    evaluation: Evaluation, labels: npt.ArrayLike, ks: Sequence[int] = KS
) -> dict[str, dict[str, float]]:
    """Compute `Evaluation.metrics` of each segment, and its number of users as ``count``.

    ``labels``: [M] strings, one per evaluated user. Segments are in sorted order.

    Raises:
        DataError: another number of labels.
    """
    names = np.asarray(labels).astype(str)
    if names.shape != evaluation.users.shape:
        raise DataError(f"labels {list(names.shape)} for {len(evaluation)} users; pass one each")
    segments: dict[str, dict[str, float]] = {}
    for name in np.unique(names).tolist():
        part = evaluation.take(names == name)
        segments[name] = {"count": float(len(part)), **part.metrics(ks)}
    return segments


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm, 1979), in the order given."""
    order = np.argsort(ps, kind="stable")
    steps = [(len(ps) - rank) * float(ps[at]) for rank, at in enumerate(order)]
    rising = np.minimum(1.0, np.maximum.accumulate(steps))
    adjusted = np.empty(len(ps))
    adjusted[order] = rising
    return [float(p) for p in adjusted]
