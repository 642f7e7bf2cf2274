"""From histories to ranked rows of one version.

The rule is the predictor's: inner products plus the prior, which is kept here as the rows that it
touches.
"""

from __future__ import annotations

__all__ = ["Query", "Ranked", "User", "are_numbers", "encode", "rank", "score"]

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.data.ragged import Ragged
from l2rec.service.attributes import Floats, Mask, Rows
from l2rec.service.version import Version

logger = logging.getLogger("l2rec.service")

HEADROOM = 4
"""Most rows that are fetched beyond k in place of deleted ones among them, in units of k."""


@dataclass(frozen=True, eq=False)
class User:
    """An encoded history.

    vector: [D], or scores [N] of a method that only ranks. gate: of Eq. 7, if there is one.
    rows, added: [n] int64 and [n] float32, the prior: what is added to the inner products with some
    items, such as co-occurrence.
    """

    vector: Tensor
    gate: float | None = None
    rows: Rows = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    added: Floats = field(default_factory=lambda: np.zeros(0, dtype=np.float32))


def encode(version: Version, rows: Ragged) -> list[User]:
    """Encode histories of item ints. Call it in the thread of the version's model."""
    encoded = version.predictor.encode(rows)
    vectors = encoded.vectors.float().cpu()
    if encoded.prior is None:
        pairs = zip(vectors, encoded.gates, strict=True)
        return [User(vector.clone(), gate) for vector, gate in pairs]
    dense = encoded.prior.float().cpu().numpy()
    some = [np.flatnonzero(row) for row in dense]
    return [
        User(vector.clone(), gate, found, row[found])
        for vector, gate, found, row in zip(vectors, encoded.gates, some, dense, strict=True)
    ]


def are_numbers(version: Version, vectors: Tensor) -> bool:
    """Tell whether vectors of users [B, D] are finite numbers. Where a method only ranks, these are
    scores, of which some may be -inf: of items that a search did not find.
    """
    good = torch.isfinite(vectors)
    if version.matrix is None:
        good |= good.any(-1, keepdim=True) & vectors.isneginf()
    return bool(good.all())


def score(version: Version, user: User, rows: Rows) -> Floats:
    """Score some rows, [n] float32."""
    if version.matrix is None:
        found: Floats = user.vector.numpy()[rows]
        return found
    if len(rows) * 2 < len(version):
        scores = (version.matrix[torch.from_numpy(rows)] @ user.vector).numpy()
    else:
        scores = (version.matrix @ user.vector).numpy()[rows]
    if len(user.rows):
        everywhere = np.zeros(len(version), dtype=np.float32)
        everywhere[user.rows] = user.added
        scores = scores + everywhere[rows]
    return scores


@dataclass(frozen=True, eq=False)
class Query:
    """without: rows that are not listed. only: [N] bool, nothing else is listed."""

    version: Version
    user: User
    k: int
    without: Rows = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    only: Mask | None = None


@dataclass(frozen=True, eq=False)
class Ranked:
    """Best first; fewer than k where fewer are left. rows: int64. scores: float32."""

    rows: Rows
    scores: Floats


def rank(queries: Sequence[Query]) -> list[Ranked]:
    """Find the k best rows of each query that may be listed.

    Queries without a filter are searched together, with as many rows to spare as may be taken out;
    where that was not enough, and where there is a filter or a prior, all rows are scored: a prior
    touches so many that an index would be asked for thousands.
    """
    found: list[Ranked | None] = [None] * len(queries)
    together: dict[int, list[int]] = {}
    for number, query in enumerate(queries):
        plain = query.only is None and not len(query.user.rows)
        if plain and query.version.index is not None:
            together.setdefault(id(query.version), []).append(number)
    for numbers in together.values():
        try:
            searched = _searched([queries[n] for n in numbers])
        except Exception:  # such as of a server that is away: exact search needs nobody
            logger.exception("the index failed; all rows are scored")
            continue
        for number, ranked in zip(numbers, searched, strict=True):
            found[number] = ranked
    return [
        rank_exactly(query) if ranked is None else ranked
        for query, ranked in zip(queries, found, strict=True)
    ]


def _searched(queries: Sequence[Query]) -> list[Ranked | None]:
    """Search by the index, and score newer rows beside it; None where too few were left."""
    version = queries[0].version
    matrix, index = version.matrix, version.index
    assert matrix is not None and index is not None
    spare = min(len(version.deleted), HEADROOM * max(query.k for query in queries))
    wanted = max(query.k + len(query.without) for query in queries)
    wanted = min(wanted + spare, version.indexed)
    users = torch.stack([query.user.vector for query in queries])
    positions, scores = index.search(users.numpy(), wanted)
    searched = positions.shape[1]
    if len(matrix) > version.indexed:
        newer = (users @ matrix[version.indexed :].T).numpy()
        rows = np.arange(version.indexed, len(matrix), dtype=np.int64)
        positions = np.concatenate((positions, np.tile(rows, (len(users), 1))), axis=1)
        scores = np.concatenate((scores, newer), axis=1)
    found: list[Ranked | None] = []
    for query, some, their in zip(queries, positions, scores, strict=True):
        keep = (some >= 0) & ~version.hidden[some] & ~np.isin(some, query.without)
        # Newer rows are all here: only of the index's may better ones than these be missing.
        complete = keep[:searched].sum() >= query.k or wanted == version.indexed
        found.append(_best(some[keep], their[keep], query.k) if complete else None)
    return found


def rank_exactly(query: Query) -> Ranked:
    """Score all rows that may be listed, and return the k best."""
    allowed = ~query.version.hidden
    allowed[query.without] = False
    if query.only is not None:
        allowed &= query.only
    rows = np.flatnonzero(allowed)
    return _best(rows, score(query.version, query.user, rows), query.k)


def _best(rows: Rows, scores: npt.NDArray[np.float32], k: int) -> Ranked:
    """Return the k best rows, best first; equal scores in order of rows. What scores -inf is not
    listed: a search among tokens that names items has not found it.
    """
    reached = scores > -np.inf
    if not reached.all():
        rows, scores = rows[reached], scores[reached]
    if len(rows) > 4 * k:
        some = np.argpartition(-scores, k)[: k + 1]
        some = np.flatnonzero(scores >= scores[some].min())  # with all that tie with the last
        rows, scores = rows[some], scores[some]
    order = np.lexsort((rows, -scores))[:k]
    return Ranked(rows[order].astype(np.int64), scores[order].astype(np.float32))
