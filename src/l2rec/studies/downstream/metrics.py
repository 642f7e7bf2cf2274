"""Metrics of both stages with their variance over users, and the difference of the arms."""

from __future__ import annotations

__all__ = [
    "Scored",
    "area",
    "compared",
    "grouped_area",
    "log_loss",
    "matching_scores",
    "mean_by_user",
    "midranks",
    "ranking_scores",
]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from l2rec.evaluation.significance import differences, holm, satterthwaite, without_rounding
from l2rec.studies.downstream.daily import Doubles, Exposures, Ints
from l2rec.studies.downstream.features import Clicks
from l2rec.studies.downstream.options import ARMS, CONTROL, TASKS, TREATMENT


@dataclass(frozen=True)
class Scored:
    """A metric and how much each user contributes to it.

    ``influence``: [U] float64 with mean 0 or nearly: without user u, the metric would be lower by
    about influence[u] / U. The variance of the metric is that of ``influence`` divided by U (delta
    method).
    """

    value: float
    influence: Doubles


def midranks(scores: npt.NDArray[np.floating], groups: Ints) -> Doubles:
    """Rank each score within its group, from 1, ties at their mean: [n] float64."""
    order = np.lexsort((scores, groups))
    score, group = scores[order], groups[order]
    new_group = np.concatenate(([True], group[1:] != group[:-1]))
    new_value = new_group | np.concatenate(([True], score[1:] != score[:-1]))
    first_of_group = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    tie = np.cumsum(new_value) - 1
    starts = np.flatnonzero(new_value)
    ends = np.concatenate((starts[1:], [len(order)]))
    ranks = np.empty(len(order))
    ranks[order] = (starts[tie] + ends[tie] + 1) / 2.0 - first_of_group
    return ranks


def area(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_], users: Ints, n_users: int
) -> Scored | None:
    """Compute AUC over all pairs of a positive and a negative; None without both.

    scores, labels, users: [n]. The influence is that of clustered placements (Obuchowski,
    Biometrics 1997), because exposures of one user are not independent.
    """
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return None
    everything = midranks(scores, np.zeros(len(scores), dtype=np.int64))
    among = midranks(scores, labels.astype(np.int64))
    placed = np.where(labels, everything - among, positives - (everything - among))
    placed /= np.where(labels, negatives, positives)
    value = float(placed[labels].mean())
    share = (placed - value) / np.where(labels, positives, negatives)
    moved = np.bincount(users, share, minlength=n_users).astype(np.float64)
    return Scored(value, n_users * moved)


def grouped_area(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_], users: Ints, n_users: int
) -> Scored | None:
    """Compute GAUC: each user's AUC, weighted by exposures, over users with both classes.

    scores, labels, users: [n]. None if no user has both classes. (Zhu et al.: Optimized Cost per
    Click in Taobao, KDD '17.)
    """
    counts = np.bincount(users, minlength=n_users)
    positives = np.bincount(users, labels, minlength=n_users)
    negatives = counts - positives
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return None
    ranks = np.bincount(users, midranks(scores, users) * labels, minlength=n_users)
    pairs = np.where(both, positives * negatives, 1)
    each = (ranks - positives * (positives + 1) / 2) / pairs
    weights = counts * both
    return mean_by_user(each * weights, weights)


def mean_by_user(sums: Doubles, weights: npt.NDArray[Any]) -> Scored:
    """Divide the total of ``sums`` [U] by the total of ``weights`` [U]."""
    total = float(weights.sum())
    value = float(sums.sum()) / total
    return Scored(value, len(sums) * (sums - value * weights) / total)


def log_loss(probabilities: Doubles, labels: npt.NDArray[Any]) -> Doubles:
    """Compute the log loss of each prediction, in the shape of ``probabilities``."""
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    losses: Doubles = -np.where(labels > 0, np.log(p), np.log1p(-p))
    return losses


def ranking_scores(
    probabilities: Doubles, shown: Exposures, n_users: int, *, calibrated: bool = True
) -> dict[str, Scored | None]:
    """Compute AUC, GAUC and, if ``calibrated``, log loss of each task.

    probabilities: [n, tasks], or any scores if not ``calibrated``.
    """
    scores: dict[str, Scored | None] = {}
    counts = np.bincount(shown.user, minlength=n_users)
    for column, task in enumerate(TASKS):
        p, labels = probabilities[:, column], shown.labels[:, column] > 0
        scores[f"{task} auc"] = area(p, labels, shown.user, n_users)
        scores[f"{task} gauc"] = grouped_area(p, labels, shown.user, n_users)
        if calibrated:
            losses = np.bincount(shown.user, log_loss(p, labels), minlength=n_users)
            scores[f"{task} log loss"] = mean_by_user(losses.astype(np.float64), counts)
    return scores


def matching_scores(
    ranks: Doubles, clicks: Clicks, n_users: int, ks: Sequence[int]
) -> dict[str, Scored | None]:
    """Compute Recall@k of held-out clicks, which all weigh the same. ranks: [n], from 1."""
    counts = np.bincount(clicks.user, minlength=n_users)
    return {
        f"recall@{k}": mean_by_user(
            np.bincount(clicks.user, ranks <= k, minlength=n_users).astype(np.float64), counts
        )
        for k in ks
    }


def compared(
    arms: Mapping[str, Sequence[Mapping[str, Scored | None]]], n_users: int, alpha: float
) -> dict[str, dict[str, Any]]:
    """Compare the arms by metric: mean and deviation over seeds, the difference and its interval.

    Trainings with the same seed are paired. Both the users and the seeds are a sample, so the
    variance of the difference is the sum of two: that over users of the mean of the seeds (delta
    method), and that over seeds divided by their number. Interval and p, two-sided, are of
    Student's t with the degrees of freedom by Satterthwaite (1946); one seed says nothing of what
    seeds vary, and has neither. ``p_holm`` is corrected for all metrics.
    """
    from scipy.special import stdtr, stdtrit

    found: dict[str, dict[str, Any]] = {}
    for metric in arms[CONTROL][0]:
        scored = {name: [seed[metric] for seed in runs] for name, runs in arms.items()}
        pairs = list(zip(scored[TREATMENT], scored[CONTROL], strict=True))
        values = {name: [s.value for s in each if s is not None] for name, each in scored.items()}
        found[metric] = {name: _spread(values[name]) for name in ARMS}
        real = [(t, c) for t, c in pairs if t is not None and c is not None]
        if len(real) < len(pairs):
            found[metric] |= {"difference": None}
            continue
        by_seed = differences(
            *(np.array([s.value for s in arm]) for arm in zip(*real, strict=True))
        )
        influence = np.mean([differences(t.influence, c.influence) for t, c in real], axis=0)
        error = math.sqrt(float(influence.var(ddof=1)) / n_users) if n_users > 1 else math.nan
        difference = float(by_seed.mean())
        unknown = ("low", "high", "sd_seeds", "p", "p_holm")
        sampled: dict[str, float | None] = dict.fromkeys(unknown)
        if len(real) > 1 and n_users > 1:
            seeds = math.sqrt(without_rounding(by_seed)[1])
            parts, counts = [error**2, seeds**2 / len(real)], [n_users, len(real)]
            whole, freedom = satterthwaite(parts, counts)
            half = float(stdtrit(freedom, 1 - alpha / 2)) * whole
            t = difference / whole if whole > 0 else (math.inf if difference else 0.0)
            sampled |= {
                "low": difference - half,
                "high": difference + half,
                "sd_seeds": seeds,
                "p": 2.0 * float(stdtr(freedom, -abs(t))),
            }
        found[metric] |= {"difference": difference, "error_users": error, **sampled}
    tested = [m for m, result in found.items() if result.get("p") is not None]
    for metric, p in zip(tested, holm([found[m]["p"] for m in tested]), strict=True):
        found[metric]["p_holm"] = p
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Summarise the values of all seeds."""
    if not values:
        return {"mean": None, "sd": None, "seeds": []}
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "seeds": [float(v) for v in values]}
