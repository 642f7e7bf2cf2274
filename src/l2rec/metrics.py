"""Ranks from scores; Recall, NDCG, MRR from ranks; coverage, popularity and novelty of lists.

The rank of a target is its *expected* rank under random tie breaking,

    rank = 1 + #{j : s_j > s_t} + 1/2 #{j != t : s_j = s_t},

so a constant scorer ranks every item at ``(N + 1) / 2`` and gains nothing by ties. Optimistic ranks
(only strictly greater scores count) would give it rank 1.
"""

from __future__ import annotations

__all__ = [
    "KS",
    "average_popularity",
    "coverage",
    "expected_ranks",
    "items_ahead",
    "items_ahead_among",
    "novelty",
    "popularity_bias",
    "rank_values",
    "ranking_metrics",
    "reject_nan",
]

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.data.ragged import IntArray, Ragged

FloatArray = npt.NDArray[np.floating]

KS = (5, 10, 20)
"""The default cut-offs of Recall and NDCG."""


def expected_ranks(scores: Tensor, targets: Tensor, exclude: Ragged | None = None) -> Tensor:
    """Compute the expected rank of each row's target among all items: [B] float64, CPU, from 1.

    ``scores``: [B, N] float32, higher is better. ``targets``: [B] int64 columns.
    ``exclude``: B rows of items taken out of the ranking (a user's history); each distinct item
    once, the target itself never.

    Raises:
        ValueError: shapes that do not fit, items outside the N columns, or NaN scores.
    """
    _check(scores, targets)
    reject_nan(scores)
    ranks = 1.0 + items_ahead(scores, targets)
    if exclude is not None:
        ranks -= items_ahead_among(scores, targets, exclude)
    return ranks


def items_ahead(scores: Tensor, targets: Tensor) -> Tensor:
    """Count #{s_j > s_t} + 1/2 #{j != t, s_j = s_t} over all N columns: [B] float64, CPU.

    ``scores``: [B, N], free of NaN (not checked here; a NaN would count as not ahead).
    ``targets``: [B] int64.
    """
    scores = scores.detach()
    of_target = scores.gather(1, targets.to(scores.device)[:, None])  # [B, 1]
    count = _at_least_and_above_cpu if scores.device.type == "cpu" else _at_least_and_above
    # That sum is 2 #{>} + #{=}, and the target equals itself.
    return (count(scores, of_target) - 1).double() / 2.0


def items_ahead_among(scores: Tensor, targets: Tensor, items: Ragged) -> Tensor:
    """Count as `items_ahead`, but among each row's distinct ``items``: [B] float64, CPU.

    ``items``: B rows of columns, repeats and the target allowed (counted once and not at all).
    Reads as many scores as there are items, never a whole row.

    Raises:
        ValueError: another number of rows, or an item outside the N columns.
    """
    rows, n_items = scores.shape
    if len(items) != rows:
        raise ValueError(f"{len(items)} rows of items for {rows} rows of scores; pass one each")
    _check_columns(items.values, n_items, "item")
    # Row and column in one key: sorting it once makes the items of every row distinct.
    row_of = np.repeat(np.arange(rows, dtype=np.int64), items.lengths)
    keys = np.unique(row_of * n_items + items.values)
    row_of, item = np.divmod(keys, max(1, n_items))
    wanted = targets.cpu().numpy()
    others = item != wanted[row_of]
    row_of, item = row_of[others], item[others]
    scores = scores.detach()
    at, column = _indices(row_of, scores), _indices(item, scores)
    of_item = scores[at, column]
    of_target = scores.gather(1, targets.to(scores.device)[:, None])[at, 0]
    twice = (of_item > of_target).to(torch.int8) + (of_item >= of_target).to(torch.int8)
    ahead = np.bincount(row_of, weights=twice.cpu().numpy() / 2.0, minlength=rows)
    return torch.from_numpy(ahead.astype(np.float64, copy=False))


def rank_values(
    ranks: FloatArray, metric: str, offsets: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float64]:
    """Compute the per-user values whose mean is ``metric``: [M] float64, for paired tests.

    ``ranks``: [M] from 1, of one relevant item each; or, with ``offsets`` [M + 1], [T] of sets:
    the relevant items of row i have ``ranks[offsets[i]:offsets[i + 1]]``, at least one.
    ``metric``: ``"recall@K"``: share of the set with rank <= K; ``"ndcg@K"``: sum over the set of
    1[rank <= K] / log2(rank + 1), divided by its greatest value, the set at ranks 1, 2, ...;
    ``"mrr"``: 1 / the smallest rank, without a cut-off.

    Raises:
        ValueError: another metric, a rank that is NaN or below 1, or offsets that leave a row
            without a relevant item or do not end with the ranks.
    """
    ranks = np.asarray(ranks)
    if offsets is not None:
        _check_offsets(np.asarray(offsets), len(ranks))
    if not bool(np.all(ranks >= 1.0)):
        bad = int(np.flatnonzero(~(ranks >= 1.0))[0])
        raise ValueError(f"rank {ranks[bad]} at row {bad}: ranks count from 1")
    if metric == "mrr":
        first = ranks if offsets is None else np.minimum.reduceat(ranks, offsets[:-1])
        return np.asarray(1.0 / first, dtype=np.float64)
    name, _, cut = metric.partition("@")
    if name not in ("recall", "ndcg") or not cut.isdecimal() or int(cut) < 1:
        raise ValueError(f"unknown metric {metric!r}; choose recall@K, ndcg@K or mrr, K from 1")
    gains = (ranks <= int(cut)).astype(np.float64)
    if name == "ndcg":
        gains /= np.log2(ranks + 1.0)
    if offsets is None:
        return gains
    sizes = np.diff(offsets)
    best = sizes.astype(np.float64)
    if name == "ndcg":
        ideal = np.cumsum(1.0 / np.log2(np.arange(2, int(cut) + 2)))
        best = ideal[np.minimum(sizes, int(cut)) - 1]
    return np.asarray(np.add.reduceat(gains, offsets[:-1]) / best, dtype=np.float64)


def ranking_metrics(
    ranks: FloatArray, ks: Sequence[int] = KS, offsets: npt.NDArray[np.int64] | None = None
) -> dict[str, float]:
    """Average over users: ``{"recall@5": ..., "ndcg@5": ..., ..., "mrr": ...}``.

    ``ranks``, ``offsets``: as `rank_values` takes them.

    Raises:
        ValueError: there are no ranks, or as `rank_values`.
    """
    if len(ranks) == 0:
        raise ValueError("0 ranks have no mean; evaluate at least one user")
    names = [f"{name}@{k}" for name in ("recall", "ndcg") for k in ks]
    return {name: float(rank_values(ranks, name, offsets).mean()) for name in [*names, "mrr"]}


def coverage(top_items: IntArray, n_items: int) -> float:
    """Compute the share of the catalog that appears in at least one list.

    ``top_items``: [M, k] item ints, -1 = no item.

    Raises:
        ValueError: ``n_items`` < 1, or an item outside the catalog.
    """
    if n_items < 1:
        raise ValueError(f"n_items={n_items}: coverage needs a catalog of at least one item")
    listed = _listed(top_items)
    _check_columns(listed, n_items, "item")
    seen = np.zeros(n_items, dtype=bool)
    seen[listed] = True
    return float(seen.mean())


def average_popularity(lists: Ragged, counts: IntArray) -> float:
    """Compute the mean over lists of the mean number of training events of a listed item.

    For recommended lists it is the *average recommendation popularity* (ARP; Yin, Cui, Li, Yao,
    Chen: Challenging the Long Tail Recommendation, PVLDB 5(9), 2012), for users' histories the
    *group average popularity* (GAP; see ``popularity_bias``). Each list counts the same, however
    long; an item listed twice counts twice.

    ``lists``: M rows of item ints. ``counts``: [N] training events of each item.

    Raises:
        ValueError: there is no list, a list is empty, or an item is outside the catalog.
    """
    lengths = lists.lengths
    if len(lengths) == 0 or int(lengths.min()) == 0:
        raise ValueError(
            f"{len(lengths)} lists, {np.count_nonzero(lengths == 0)} of them empty: an empty list"
            " has no mean; leave it out"
        )
    _check_columns(lists.values, len(counts), "item")
    events = np.asarray(counts)[lists.values].astype(np.float64)
    return float((np.add.reduceat(events, lists.offsets[:-1]) / lengths).mean())


def popularity_bias(top_items: IntArray, histories: Ragged, counts: IntArray) -> float:
    """Compare the popularity of the lists with that of the same users' histories.

    Returns the relative change of the group average popularity,

        dGAP = (GAP(lists) - GAP(histories)) / GAP(histories),

    of Abdollahpouri, Mansoury, Burke, Mobasher: The Unfairness of Popularity Bias in
    Recommendation, RMSE workshop at RecSys '19, arXiv:1907.13286. 0: as popular as the histories;
    1: twice as popular; below 0: less popular. Being relative to the users at hand, it compares
    groups of users whose tastes differ in popularity.

    ``top_items``: [M, k] item ints, -1 = no item. ``histories``: M rows of item ints, of the same
    users. ``counts``: [N] training events of each item.

    Raises:
        ValueError: as `average_popularity`, or no item of the histories has a training event.
    """
    top_items = np.asarray(top_items)
    listed = top_items != -1
    offsets = np.concatenate(([0], np.cumsum(listed.sum(1))))
    chosen = average_popularity(histories, counts)
    if len(top_items) != len(histories) or chosen == 0:
        raise ValueError(
            f"{len(top_items)} lists for {len(histories)} histories with {chosen:g} training events"
            " an item; pass one list for each history of trained items"
        )
    return average_popularity(Ragged(top_items[listed], offsets), counts) / chosen - 1.0


def novelty(top_items: IntArray, counts: IntArray) -> float:
    """Compute the mean of -log2(share of all training events) over listed items, in bits.

    ``top_items``: [M, k] item ints, -1 = no item. ``counts``: [N] training events of each item;
    an item without events counts as having one, so that novelty stays finite.

    Raises:
        ValueError: no item is listed, there is no event, or an item is outside the catalog.
    """
    listed, counts = _listed(top_items), np.asarray(counts)
    total = int(counts.sum())
    if len(listed) == 0 or total == 0:
        raise ValueError(f"{len(listed)} listed items and {total} training events; need both")
    _check_columns(listed, len(counts), "item")
    return float(-np.log2(np.maximum(counts[listed], 1) / total).mean())


def _at_least_and_above(scores: Tensor, limits: Tensor) -> Tensor:
    """Count #{s >= limit} + #{s > limit} of every row: [B] int64, CPU. ``limits``: [B, 1]."""
    return ((scores >= limits).sum(1) + (scores > limits).sum(1)).cpu()


def _at_least_and_above_cpu(scores: Tensor, limits: Tensor) -> Tensor:
    """Count the same for scores in main memory, row by row in numpy.

    A row's comparison fits the processor's cache, and counting its bytes takes half the time of
    torch's sum, which widens them to int64 first. It starts no threads: many small parallel sums
    made a whole evaluation ten times slower on a busy machine.
    """
    block, of_row = scores.numpy(), limits.numpy()[:, 0]
    fits = np.empty(block.shape[1], dtype=bool)
    counts = np.empty(len(block), dtype=np.int64)
    for row, (values, limit) in enumerate(zip(block, of_row, strict=True)):
        above = np.count_nonzero(np.greater(values, limit, out=fits))
        counts[row] = above + np.count_nonzero(np.greater_equal(values, limit, out=fits))
    return torch.from_numpy(counts)


def _listed(top_items: IntArray) -> IntArray:
    """Flatten the lists to item ints, without the -1 that stand for no item."""
    flat = np.asarray(top_items).reshape(-1)
    return np.asarray(flat[flat != -1])


def _indices(values: npt.NDArray[np.int64], scores: Tensor) -> Tensor:
    return torch.from_numpy(values).to(scores.device)


def _check(scores: Tensor, targets: Tensor) -> None:
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"scores {list(scores.shape)} and targets {list(targets.shape)} do not fit;"
            " pass [B, N] and [B]"
        )
    _check_columns(targets.cpu().numpy(), scores.shape[1], "target")


def _check_columns(values: IntArray, n_items: int, what: str) -> None:
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= n_items):
        bad = int(values.min()) if int(values.min()) < 0 else int(values.max())
        raise ValueError(f"{what} {bad} is outside the {n_items} scored items (0..{n_items - 1})")


def _check_offsets(offsets: npt.NDArray[np.int64], ranks: int) -> None:
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != ranks:
        raise ValueError(f"offsets have to be [M + 1], from 0 to the {ranks} ranks")
    empty = np.flatnonzero(np.diff(offsets) < 1)
    if len(empty):
        raise ValueError(
            f"row {int(empty[0])} has no relevant item, so it has no metric; leave it out"
        )


def reject_nan(scores: Tensor) -> None:
    """Raise a ValueError if one of the scores [B, N] is NaN."""
    if scores.numel() == 0:
        return
    # The maximum of a row is NaN as soon as one score is: one cheap pass, no boolean block.
    broken = scores.detach().amax(1).isnan()
    if bool(broken.any()):
        row = int(broken.nonzero()[0, 0])
        raise ValueError(f"NaN among the scores of row {row}; NaN cannot be ranked")
