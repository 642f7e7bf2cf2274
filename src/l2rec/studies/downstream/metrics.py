"""Scores of both stages, and the difference of the arms."""

from __future__ import annotations

__all__ = ["Scored", "area", "grouped_area", "mean_by_user", "midranks"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from l2rec.evaluation.significance import holm
from l2rec.studies.downstream.daily import Exposures
from l2rec.studies.downstream.features import Clicks
from l2rec.studies.downstream.options import ARMS, CONTROL, TASKS, TREATMENT, Doubles, Ints


@dataclass(frozen=True)
class Scored:
    """A metric, and by how much each user moves it. value: its value. influence: [U] float64,
    of mean 0 or nearly: had user u not been there, the metric would be lower by about
    influence[u] / U. Its variance over users / U is that of the metric (delta method).
    """

    value: float
    influence: Doubles


def midranks(scores: npt.NDArray[np.floating], groups: Ints) -> Doubles:
    """Rank of each score within its group, from 1, ties at their mean: [n] float64."""
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
    """AUC over all pairs of a positive and a negative; None without both.

    The influence is that of clustered placements (Obuchowski, Biometrics 1997): exposures of one
    user are not independent.
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
    """GAUC: AUC of each user, weighted by exposures, over users with both classes; None without.

    (Zhu et al.: Optimized Cost per Click in Taobao, KDD '17.)
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
    """sum / weight over all users. sums, weights: [U]."""
    total = float(weights.sum())
    value = float(sums.sum()) / total
    return Scored(value, len(sums) * (sums - value * weights) / total)


def log_loss(probabilities: Doubles, labels: npt.NDArray[Any]) -> Doubles:
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    found: Doubles = -np.where(labels > 0, np.log(p), np.log1p(-p))
    return found


def ranking_scores(
    probabilities: Doubles, shown: Exposures, n_users: int, *, calibrated: bool = True
) -> dict[str, Scored | None]:
    """AUC, GAUC and log loss of each task. probabilities: [n, tasks]."""
    found: dict[str, Scored | None] = {}
    counts = np.bincount(shown.user, minlength=n_users)
    for column, task in enumerate(TASKS):
        p, labels = probabilities[:, column], shown.labels[:, column] > 0
        found[f"{task} auc"] = area(p, labels, shown.user, n_users)
        found[f"{task} gauc"] = grouped_area(p, labels, shown.user, n_users)
        if calibrated:
            losses = np.bincount(shown.user, log_loss(p, labels), minlength=n_users)
            found[f"{task} log loss"] = mean_by_user(losses.astype(np.float64), counts)
    return found


def matching_scores(
    ranks: Doubles, clicks: Clicks, n_users: int, ks: Sequence[int]
) -> dict[str, Scored | None]:
    """Recall@k of held-out clicks, each of which counts the same."""
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
    """For each metric: mean and deviation over seeds of both arms, the difference, its interval.

    Runs of one seed are paired. The variance of the difference is that over users, of the mean of
    the seeds, by the delta method, plus that over seeds, divided by their number: users and seeds
    at hand are both a sample. p is two-sided, normal; ``p_holm`` over all metrics.
    """
    from scipy.special import ndtri
    from scipy.stats import norm

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
        differences = np.array([t.value - c.value for t, c in real])
        influence = np.mean([t.influence - c.influence for t, c in real], axis=0)
        error = math.sqrt(float(influence.var(ddof=1)) / n_users) if n_users > 1 else math.nan
        seeds = float(differences.std(ddof=1)) if len(real) > 1 else 0.0
        whole = math.sqrt(error**2 + seeds**2 / len(real))
        difference = float(differences.mean())
        half = float(ndtri(1 - alpha / 2)) * whole
        z = difference / whole if whole > 0 else (math.inf if difference else 0.0)
        found[metric] |= {
            "difference": difference,
            "low": difference - half,
            "high": difference + half,
            "error_users": error,
            "sd_seeds": seeds if len(real) > 1 else None,
            "p": 2.0 * float(norm.sf(abs(z))),
        }
    tested = [metric for metric, values in found.items() if values["difference"] is not None]
    for metric, p in zip(tested, holm([found[m]["p"] for m in tested]), strict=True):
        found[metric]["p_holm"] = p
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "sd": None, "seeds": []}
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "seeds": [float(v) for v in values]}
