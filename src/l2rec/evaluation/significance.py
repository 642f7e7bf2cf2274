"""Paired tests on per-user values, scores by segment, and correction for many tests."""

from __future__ import annotations

__all__ = [
    "PairedTest",
    "SeededTest",
    "by_segment",
    "differences",
    "holm",
    "paired_test",
    "paired_values_test",
    "satterthwaite",
    "seeded_test",
    "without_rounding",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from l2rec.errors import DataError
from l2rec.evaluation.ranking import Evaluation
from l2rec.metrics import KS, FloatArray, rank_values

ROUNDING = 1e-12
"""Deviation, in units of the largest value, that is only the rounding of floating point."""


def without_rounding(values: FloatArray) -> tuple[float, float]:
    """Compute mean and variance (over n - 1) of values [n].

    Where all values are one and the same but for rounding, the mean is the first and the variance
    0: eleven times 0.1 and twelve times 0.1 have means that differ, and variances above 0.
    """
    if float(np.ptp(values)) <= ROUNDING * float(np.abs(values).max()):
        return float(values[0]), 0.0
    return float(values.mean()), float(values.var(ddof=1))


def differences(a: FloatArray, b: FloatArray) -> FloatArray:
    """Subtract b from a; what is only the rounding of these values is 0."""
    found: FloatArray = a - b
    found[np.abs(found) <= _rounding(a, b)] = 0.0
    return found


def _rounding(a: FloatArray, b: FloatArray) -> float:
    """Return the greatest difference of two values that is only rounding.

    In units of the values, not of their differences: where there is no other difference, all of
    these are rounding.
    """
    return ROUNDING * float(max(np.abs(a).max(), np.abs(b).max()))


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
    n = len(a) if users is None else len(np.unique(users))
    if len(a) != len(b) or n < 2:
        raise DataError(f"{len(a)} and {len(b)} ranks; a paired test needs 2 or more users in both")
    each = differences(a, b)
    difference = float(each.mean())
    off = each - difference
    if users is not None:
        of_users = np.unique(users, return_inverse=True)[1]
        off = np.bincount(of_users, weights=off).astype(np.float64)
    from scipy.special import stdtr  # scipy is slow to import and only tests need it

    error = math.sqrt(float(off @ off) * n / (n - 1)) / len(a)
    rounding = _rounding(a, b)
    if error <= rounding:
        error = 0.0
        difference = difference if abs(difference) > rounding else 0.0
    if error > 0:
        t = difference / error
    else:  # every user differs by the same amount: by nothing, or surely by something
        t = math.copysign(math.inf, difference) if difference else 0.0
    p = 2.0 * float(stdtr(n - 1, -abs(t)))
    return PairedTest(float(a.mean()), float(b.mean()), difference, error, t, p)


@dataclass(frozen=True)
class SeededTest:
    """Result of a test of two recipes, each trained with several seeds.

    ``difference`` is ``mean_a`` - ``mean_b``. ``users_error``, ``seeds_error``: the two parts of
    its ``standard_error``. ``p`` is two-sided; with one seed on a side it, ``seeds_error`` and
    ``standard_error`` are None: what another seed would do is not known.
    """

    mean_a: float
    mean_b: float
    difference: float
    users_error: float
    seeds_error: float | None
    standard_error: float | None
    p: float | None


def seeded_test(
    a: FloatArray, b: FloatArray, users: npt.NDArray[np.integer] | None = None
) -> SeededTest:
    """Test the difference of two recipes against what varies over users and over seeds.

    ``a`` [S, M], ``b`` [T, M]: values of the same users in the same order, one row a seed; the
    seeds of both sides are independent. ``users``: as in `paired_values_test`. The squared
    standard error is var_users / M of the paired differences of each user's mean over seeds, plus
    var_seeds / S of the scores of either side. It is compared with Student's t of the degrees of
    freedom by Satterthwaite (1946): few seeds count as few where they are what varies, and many
    users make it the normal distribution where these are.

    Raises:
        DataError: lengths that differ, or fewer than 2 users.
    """
    paired = paired_values_test(a.mean(0), b.mean(0), users)
    plain = (paired.mean_a, paired.mean_b, paired.difference, paired.standard_error)
    if min(len(a), len(b)) < 2:
        return SeededTest(*plain, seeds_error=None, standard_error=None, p=None)
    from scipy.special import stdtr

    of_seeds = [without_rounding(side.mean(1))[1] / len(side) for side in (a, b)]
    parts = [paired.standard_error**2, *of_seeds]
    counts = [a.shape[1] if users is None else len(np.unique(users)), len(a), len(b)]
    error, freedom = satterthwaite(parts, counts)
    if error > 0:
        p = 2.0 * float(stdtr(freedom, -abs(paired.difference) / error))
    else:
        p = 0.0 if paired.difference else 1.0
    return SeededTest(*plain, math.sqrt(sum(of_seeds)), error, p)


def satterthwaite(parts: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the standard error of a sum and its degrees of freedom (Satterthwaite, 1946).

    parts: squared standard errors of what is summed. counts: of how many values each is.
    """
    variance = sum(parts)
    uncertain = sum(v**2 / (n - 1) for v, n in zip(parts, counts, strict=True))
    return math.sqrt(variance), variance**2 / uncertain if uncertain else math.inf


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


def holm(ps: Sequence[float], count: int | None = None) -> list[float]:
    """Adjust p-values for their number (Holm, 1979), in the order given.

    ``count``: of how many tests these are the ones that were made; all by default. Where it could
    as well have been others, the adjusted values are no smaller than with the p-values of all.
    """
    count = len(ps) if count is None else count
    order = np.argsort(ps, kind="stable")
    steps = [(count - rank) * float(ps[at]) for rank, at in enumerate(order)]
    rising = np.minimum(1.0, np.maximum.accumulate(steps))
    adjusted = np.empty(len(ps))
    adjusted[order] = rising
    return [float(p) for p in adjusted]
