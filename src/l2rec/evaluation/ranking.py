"""Full ranking of every target over the whole catalog, and the k best items of a history.

One evaluator for all methods: it takes a ``Recommender``, scores one block of users at a time and
keeps per-user ranks, with the history in the ranking and with it masked. The matrix of all users by
all items is never in memory.
"""

from __future__ import annotations

__all__ = ["Evaluation", "evaluate", "evaluate_each", "top_k"]

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.data.ragged import IntArray, Ragged, flat_index
from l2rec.errors import ConfigError, DataError, TrainingError
from l2rec.metrics import (
    KS,
    coverage,
    items_ahead,
    items_ahead_among,
    rank_values,
    ranking_metrics,
)
from l2rec.modules import processes
from l2rec.protocols import Recommender, Scorer, TopK

_TOP = 20
# Scores of a block, 16 MB: beyond 32 MB the C library maps fresh memory for every block, and the
# first touch of its pages costs more than the ranking.
_BLOCK_SCORES = 1 << 22
_LEAST_ROWS, _MOST_ROWS = 16, 1024
_COVERAGE_AT = 10


@dataclass(frozen=True)
class Evaluation:
    """Result of ranking the T targets of M histories, one for each or a set.

    ``ranks``, ``ranks_masked``: [T] float64 expected ranks from 1, with the history in the
    ranking and without it (other targets are never masked). ``users``: [M] int64 dense user ints.
    ``top``: [M, min(20, N)] int32 best items, history not masked, equal scores in order of item
    int. ``targets``: [T] int64. ``n_items``: N. ``offsets``: [M + 1] int64, the targets of history
    i are ``offsets[i]:offsets[i + 1]``; None: one each.
    """

    ranks: npt.NDArray[np.float64]
    ranks_masked: npt.NDArray[np.float64]
    users: npt.NDArray[np.int64]
    top: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int64]
    n_items: int
    offsets: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.users)

    def values(self, metric: str, *, masked: bool = False) -> npt.NDArray[np.float64]:
        """Compute what each history adds to the mean of a metric of `metrics`: [M] float64."""
        return rank_values(self.ranks_masked if masked else self.ranks, metric, self.offsets)

    def metrics(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Compute ``recall@K``, ``ndcg@K``, ``mrr``, each also ``..._masked``, and ``coverage@10``.

        Raises:
            ValueError: there are no users.
        """
        masked = ranking_metrics(self.ranks_masked, ks, self.offsets)
        return {
            **ranking_metrics(self.ranks, ks, self.offsets),
            **{f"{name}_masked": value for name, value in masked.items()},
            f"coverage@{_COVERAGE_AT}": coverage(self.top[:, :_COVERAGE_AT], self.n_items),
        }

    def take(self, rows: IntArray | npt.NDArray[np.bool_]) -> Evaluation:
        """Select histories (ints or a mask) as a new Evaluation."""
        rows = np.arange(len(self))[rows]
        return self._selected(rows, *target_rows(rows, self.offsets))

    def of_targets(self, which: npt.NDArray[np.bool_]) -> Evaluation:
        """Select targets ([T] bool): what is left of the histories that have one of them."""
        histories, offsets = targets_taken(which, self.offsets)
        return self._selected(histories, np.flatnonzero(which), offsets)

    def _selected(
        self,
        histories: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64] | None,
    ) -> Evaluation:
        return replace(
            self,
            ranks=self.ranks[targets],
            ranks_masked=self.ranks_masked[targets],
            users=self.users[histories],
            top=self.top[histories],
            targets=self.targets[targets],
            offsets=offsets,
        )


def targets_taken(
    which: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Return the histories that keep a marked target ([T] bool), and offsets of what they keep."""
    if offsets is None:
        return np.flatnonzero(which), None
    before = np.concatenate(([0], np.cumsum(which)))
    counts = np.diff(before[offsets])
    histories = np.flatnonzero(counts)
    return histories, np.concatenate(([0], np.cumsum(counts[histories])))


def target_rows(
    rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Return where the targets of the selected histories stand, and offsets into the selection."""
    if offsets is None:
        return rows, None
    sizes = np.diff(offsets)[rows]
    return flat_index(offsets[rows], sizes), np.concatenate(([0], np.cumsum(sizes)))


def evaluate(
    recommender: Recommender,
    histories: Ragged,
    targets: IntArray | Ragged,
    *,
    users: IntArray | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Rank ``targets[i]`` among all N items given ``histories[i]``, for M users.

    ``histories``: M rows of item ints, oldest first. ``targets``: [M] item ints, or M rows of one
    or several different ones, each ranked among all items. ``users``: [M] dense user ints, 0..M-1
    by default. At most ``batch_size`` users are scored at once, by
    default a number that is fast; it changes memory and speed, never the result. ``progress`` is
    called after each block with the number of users ranked so far. Runs in
    ``torch.inference_mode``; a recommender that has training-time noise turns it off in
    ``scorer()``.

    Raises:
        DataError: lengths that differ, or items outside the catalog. TrainingError: NaN scores.
        ConfigError: a batch size below 1.
    """
    return evaluate_each(
        recommender.n_items,
        {"": recommender.scorer},
        histories,
        targets,
        users=users,
        batch_size=batch_size,
        progress=progress,
    )[""]


def evaluate_each(
    n_items: int,
    scorers: Mapping[str, Callable[[], Scorer]],
    histories: Ragged,
    targets: IntArray | Ragged,
    *,
    users: IntArray | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate several scorers in one pass: all score a block of users before the next block.

    Work that they share can so be done once for each block. ``scorers``: by name, each created
    when the pass begins. Arguments and errors are those of `evaluate`. Processes that train
    together rank a part of the blocks each, and all have the whole result.
    """
    rows = len(targets)
    offsets = None
    if isinstance(targets, Ragged):
        if rows and int(targets.lengths.min()) < 1:
            raise DataError("a history without a target; leave it out")
        offsets = None if len(targets.values) == rows else targets.offsets
        targets = targets.values
    wanted: npt.NDArray[np.int64] = np.asarray(targets, dtype=np.int64)
    user_ints: npt.NDArray[np.int64] = np.asarray(
        np.arange(rows) if users is None else users, dtype=np.int64
    )
    if not len(histories) == rows == len(user_ints):
        raise DataError(
            f"{len(histories)} histories, {rows} targets and {len(user_ints)} users;"
            " pass one of each for every evaluated user"
        )
    _check_items(wanted, n_items, "target")
    _check_items(histories.values, n_items, "history")
    world = processes.current()
    evaluations = {
        name: Evaluation(
            ranks=np.zeros(len(wanted), dtype=np.float64),
            ranks_masked=np.zeros(len(wanted), dtype=np.float64),
            users=user_ints,
            top=np.zeros((rows, min(_TOP, n_items)), dtype=np.int32),
            targets=wanted,
            n_items=n_items,
            offsets=offsets,
        )
        for name in scorers
    }
    with torch.inference_mode():
        ready = {name: scorer() for name, scorer in scorers.items()}
        size = _block_rows(n_items) if batch_size is None else batch_size
        if world.size > 1:
            size = min(size, max(1, -(-rows // world.size)))
        for block in islice(_blocks(rows, size), world.rank, None, world.size):
            read = _rows(histories, block)
            at = block if offsets is None else slice(offsets[block.start], offsets[block.stop])
            sizes = None if offsets is None else np.diff(offsets[block.start : block.stop + 1])
            sought = torch.from_numpy(wanted[at])
            for name, result in evaluations.items():
                result.ranks[at], result.ranks_masked[at], result.top[block] = _rank_block(
                    ready[name], read, sought, sizes, n_items, block.start
                )
            if progress is not None:
                progress(block.stop)
    if world.size == 1:
        return evaluations
    return {
        name: replace(
            result,
            ranks=world.total(result.ranks),
            ranks_masked=world.total(result.ranks_masked),
            top=world.total(result.top),
        )
        for name, result in evaluations.items()
    }


def top_k(
    scorer_or_recommender: Scorer | Recommender,
    histories: Ragged,
    k: int,
    *,
    exclude: Ragged | None = None,
    candidates: IntArray | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TopK:
    """List the ``k`` best items of each of B histories: items [B, k] int64, scores [B, k] float32.

    Best first; equal scores in order of item int. ``exclude``: B rows of items never listed.
    ``candidates``: [C] item ints, nothing else is listed (to anyone). Where fewer than ``k``
    items are left, and for items scored -inf, the rest is item -1 with score -inf. ``progress`` is
    called after each block with the number of histories done so far.

    Raises:
        DataError: ``k`` below 1 or above the catalog, rows that do not fit, or items outside the
            catalog. TrainingError: NaN scores.
    """
    if isinstance(scorer_or_recommender, Recommender):
        known: int | None = scorer_or_recommender.n_items
    else:
        known = None  # a bare scorer shows the size of its catalog with its first block
    _check_k(k, known)
    if exclude is not None and len(exclude) != len(histories):
        raise DataError(f"{len(exclude)} rows to exclude for {len(histories)} histories")
    chosen = None if candidates is None else np.unique(np.asarray(candidates, dtype=np.int64))
    items = np.full((len(histories), k), -1, dtype=np.int64)
    scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
    with torch.inference_mode():
        if isinstance(scorer_or_recommender, Recommender):
            scorer = scorer_or_recommender.scorer()
        else:
            scorer = scorer_or_recommender
        done = 0
        while done < len(histories):
            size = _block_rows(known) if batch_size is None else batch_size
            rows = next(_blocks(len(histories), size, done))
            block = _score(scorer, _rows(histories, rows), known)
            if known is None:
                known = block.shape[1]
                _check_k(k, known)
            if exclude is not None:
                block = _without(block, _rows(exclude, rows))
            values, columns = _best_of(block, k, chosen, rows.start)
            items[rows, : columns.shape[1]] = columns.cpu().numpy()
            scores[rows, : columns.shape[1]] = values.cpu().numpy()
            done = rows.stop
            if progress is not None:
                progress(done)
    items[np.isneginf(scores)] = -1
    return TopK(items, scores)


def _rank_block(
    scorer: Scorer,
    histories: Ragged,
    targets: Tensor,
    sizes: npt.NDArray[np.int64] | None,
    n_items: int,
    first: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Rank one block of users: ranks [T], masked ranks [T], best items [B, min(20, N)].

    ``sizes``: [B] number of targets of each user, None for one. In a separate function, so that its
    scores are freed before the next block is scored.
    """
    scores = _score(scorer, histories, n_items)
    # Top-k first: it also finds NaN, which the counts would not see.
    values, top = _best(scores, min(_TOP, n_items), first)
    top = top.masked_fill(values.isneginf(), -1)
    if sizes is not None:
        row_of = np.repeat(np.arange(len(histories)), sizes)
        histories = _outside(histories, row_of, targets.numpy(), n_items).take(row_of)
        scores = scores[torch.from_numpy(row_of).to(scores.device)]
    ranks = 1.0 + items_ahead(scores, targets)
    masked = ranks - items_ahead_among(scores, targets, histories)
    return ranks.numpy(), masked.numpy(), top.to(torch.int32).cpu().numpy()


def _outside(
    histories: Ragged, row_of: npt.NDArray[np.int64], targets: IntArray, n_items: int
) -> Ragged:
    """Take a row's targets out of its history: with it masked, they stay in the ranking."""
    rows = np.repeat(np.arange(len(histories)), histories.lengths)
    kept = ~np.isin(rows * n_items + histories.values, row_of * n_items + targets)
    offsets = np.searchsorted(rows[kept], np.arange(len(histories) + 1)).astype(np.int64)
    return Ragged(np.asarray(histories.values[kept]), offsets)


def _score(scorer: Scorer, histories: Ragged, n_items: int | None) -> Tensor:
    """Score a block and check the contract: [B, N] float32."""
    scores = scorer(histories)
    width = n_items if n_items is not None else scores.shape[-1]
    if scores.dtype != torch.float32 or scores.shape != (len(histories), width):
        raise ValueError(
            f"the scorer returned {list(scores.shape)} {scores.dtype} for"
            f" [{len(histories)}, {width}] torch.float32"
        )
    return scores


def _best_of(
    scores: Tensor, k: int, candidates: npt.NDArray[np.int64] | None, first: int
) -> tuple[Tensor, Tensor]:
    """Find the k best among the candidate columns (sorted, distinct), or among all."""
    if candidates is None:
        return _best(scores, k, first)
    _check_items(candidates, scores.shape[1], "candidate")
    columns = torch.from_numpy(candidates).to(scores.device)
    values, places = _best(scores[:, columns], min(k, len(candidates)), first)
    return values, columns[places]


def _best(scores: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """Find the k best columns of every row: (values, columns) [B, k], ties in order of column.

    ``torch.topk`` leaves open which of several equal scores it returns. One more value than
    asked for shows whether a tie crosses the cut; only those rows are looked at again.
    """
    if k == 0 or len(scores) == 0:
        return scores[:, :0], torch.zeros((len(scores), 0), dtype=torch.int64)
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    broken = values[:, 0].isnan()  # topk treats NaN as the greatest value
    if bool(broken.any()):
        row = first + int(broken.nonzero()[0, 0])
        raise TrainingError(
            f"NaN among the scores of row {row}: the model has diverged; train it again with a"
            " lower learning rate or rank with an earlier checkpoint"
        )
    if bool((values[:, 1:] == values[:, :-1]).any()):
        columns, order = columns.sort(dim=1)
        values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, order)
        if values.shape[1] > k:
            crossing = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
            if len(crossing):
                columns[crossing, :k] = _cut_tie(
                    scores[crossing], values[crossing, :k], columns[crossing, :k]
                )
    return values[:, :k], columns[:, :k]


def _cut_tie(scores: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """Give the slots of the last, tied value to its lowest columns: columns [B, k].

    ``scores``: [B, N]; ``values``, ``columns``: [B, k], correct above the tie.
    """
    n_items, k = scores.shape[1], values.shape[1]
    last = values[:, -1:]
    # N, N-1, ..., 1 where tied and 0 elsewhere: its greatest k are the lowest tied columns.
    place = torch.arange(n_items, 0, -1, dtype=torch.int32, device=scores.device)
    lowest = n_items - torch.where(scores == last, place, 0).topk(k, dim=1).values.long()
    slot = torch.arange(k, device=scores.device)[None, :]
    above = (values > last).sum(1, keepdim=True)
    return torch.where(slot < above, columns, lowest.gather(1, (slot - above).clamp(min=0)))


def _without(scores: Tensor, exclude: Ragged) -> Tensor:
    """Copy ``scores`` [B, N] with the excluded items at -inf: scorers may return a view."""
    _check_items(exclude.values, scores.shape[1], "excluded")
    row_of = np.repeat(np.arange(len(exclude)), exclude.lengths)
    at = torch.from_numpy(row_of).to(scores.device)
    column = torch.from_numpy(exclude.values.astype(np.int64)).to(scores.device)
    scores = scores.clone(memory_format=torch.contiguous_format)
    scores[at, column] = -math.inf
    return scores


def _block_rows(n_items: int | None) -> int:
    """Choose how many users are scored at once; few while nobody knows of how many items."""
    if n_items is None:
        return _LEAST_ROWS
    scores = 4 * _BLOCK_SCORES if torch.cuda.is_available() else _BLOCK_SCORES  # few, large blocks
    return max(_LEAST_ROWS, min(_MOST_ROWS, scores // max(1, n_items)))


def _blocks(total: int, size: int, start: int = 0) -> Iterator[slice]:
    if size < 1:
        raise ConfigError(f"batch_size={size}; score at least 1 user at a time")
    return (slice(at, min(at + size, total)) for at in range(start, total, size))


def _rows(ragged: Ragged, rows: slice) -> Ragged:
    """Slice consecutive rows without copying their values."""
    offsets = ragged.offsets[rows.start : rows.stop + 1]
    return Ragged(np.asarray(ragged.values[offsets[0] : offsets[-1]]), offsets - offsets[0])


def _check_k(k: int, n_items: int | None) -> None:
    if k < 1 or (n_items is not None and k > n_items):
        limit = "the catalog" if n_items is None else f"{n_items}, the number of items"
        raise DataError(f"k={k}; choose from 1 to {limit}")


def _check_items(items: IntArray, n_items: int, what: str) -> None:
    if len(items) and (int(items.min()) < 0 or int(items.max()) >= n_items):
        bad = int(items.min()) if int(items.min()) < 0 else int(items.max())
        raise DataError(
            f"{what} item {bad} is outside the catalog of {n_items} items (0..{n_items - 1})"
        )
