"""The k best items of many users as a table: user_id, item_id, score, rank."""

from __future__ import annotations

__all__ = ["COLUMNS", "recommendations", "table_of"]

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from l2rec.data.ids import as_list
from l2rec.data.ragged import Ragged
from l2rec.errors import ConfigError, DataError
from l2rec.evaluation.ranking import top_k
from l2rec.runs.predictor import Predictor

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

Frame = Literal["polars", "pandas", "arrow"]
COLUMNS = ("user_id", "item_id", "score", "rank")
BLOCK = 256
"""Users who are scored at once."""


def recommendations(
    predictor: Predictor,
    histories: Mapping[str, Sequence[str]],
    k: int = 10,
    *,
    filter_viewed: bool = True,
    items_to_recommend: Sequence[str] | None = None,
    frame: Frame = "polars",
) -> Any:
    """Rank the next items for many users at once.

    Args:
        predictor: the model.
        histories: item ids of each user, oldest first, by the user's id.
        k: most items of a user.
        filter_viewed: leave out the items of the user's history.
        items_to_recommend: item ids that may be recommended; None: all.
        frame: library of the table that is returned.

    Returns:
        A table of rows by user, in the order of ``histories``, best item first: ``user_id``,
        ``item_id``, ``score`` float32, ``rank`` from 1. A user for whom fewer than ``k`` items are
        left has fewer rows.

    Raises:
        DataError: an empty history, unknown ids, or k outside 1..N. ConfigError: another frame.
    """
    if frame not in ("polars", "pandas", "arrow"):
        raise ConfigError(f"frame={frame!r}: choose polars, pandas or arrow")
    users = list(histories)
    rows = predictor.rows(list(histories.values()))
    empty = np.flatnonzero(rows.lengths == 0)
    if len(empty):
        raise DataError(f"user {users[empty[0]]!r} has an empty history: give at least one item id")
    candidates = None
    if items_to_recommend is not None:
        allowed = as_list(items_to_recommend, "items_to_recommend", "item ids, or None for all")
        if not allowed:
            raise DataError("items_to_recommend is empty: give item ids, or None for all")
        candidates = predictor.rows([allowed])[0]
    table = table_of(predictor, users, rows, k, filter_viewed=filter_viewed, candidates=candidates)
    return _as(table, frame)


def table_of(
    predictor: Predictor,
    users: Sequence[str],
    rows: Ragged,
    k: int,
    *,
    filter_viewed: bool,
    candidates: npt.NDArray[np.integer] | None = None,
) -> pa.Table:
    """Rank for users by ``rows``, a row of item ints for each of them, none empty; return the
    table of `recommendations`.

    Raises:
        DataError: k outside 1..N.
    """
    import pyarrow as pa

    def scores(block: Ragged) -> Tensor:
        return predictor.scores(predictor.encode(block))

    best = top_k(
        scores,
        rows,
        predictor.check_k(k),
        exclude=rows if filter_viewed else None,
        candidates=candidates,
        batch_size=BLOCK,
    )
    listed = best.items >= 0
    at, place = np.nonzero(listed)
    ids = np.asarray(predictor.ids, dtype=object)
    columns = (  # strings typed even where there are no rows
        pa.array([str(users[row]) for row in at.tolist()], pa.string()),
        pa.array(ids[best.items[listed]], pa.string()),
        best.scores[listed],
        (place + 1).astype(np.int64),
    )
    return pa.table(dict(zip(COLUMNS, columns, strict=True)))


def _as(table: pa.Table, frame: Frame) -> Any:
    """Return the table as one of a library."""
    if frame == "arrow":
        return table
    if frame == "polars":
        import polars as pl

        return pl.from_arrow(table)
    try:
        return table.to_pandas()
    except ModuleNotFoundError:
        raise ConfigError("frame='pandas' needs pandas: pip install pandas") from None
