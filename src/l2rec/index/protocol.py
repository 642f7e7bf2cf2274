"""What every index is: rows to search, and what all kinds check alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from l2rec.data.vectors import Floats
from l2rec.errors import ConfigError, DataError

KINDS = ("exact", "flat", "hnsw", "ivf", "int8", "binary", "milvus")
LINKS, CONSTRUCTION = 32, 200
"""Links of a node of an HNSW graph, and breadth of the search that builds it."""
BREADTH = 128
"""Default breadth of a search in an HNSW graph: ef."""
WIDEST = 1 << 16
"""Largest ef."""

Rows = npt.NDArray[np.int64]


class Index(Protocol):
    """Protocol of a searchable index of N rows."""

    kind: str

    def __len__(self) -> int: ...

    @property
    def dim(self) -> int:
        """Size D of a row."""
        ...

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        """Return the k best rows [B, k] int64 for queries [B, D] float32, best first, and their
        inner products [B, k] float32.

        Equal scores are in order of row. Where fewer than k are found: row -1 with score -inf.
        """
        ...


@dataclass(frozen=True)
class Attribute:
    """Attribute of the rows that a search can be confined to: its name, and [N] values."""

    name: str
    values: list[str]


def checked_queries(queries: Floats, dim: int, k: int) -> Floats:
    """Check queries and convert them to contiguous float32.

    Raises:
        DataError: of another size than the index, not finite, or k below 1.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise DataError(f"queries of shape {list(queries.shape)}; this index takes [B, {dim}]")
    if not np.isfinite(queries).all():
        raise DataError("queries hold numbers that are not finite")
    if k < 1:
        raise DataError(f"k={k}; choose 1 or more")
    return queries


def check_range(name: str, value: int | None, most: int) -> None:
    """Refuse an option outside 1..most."""
    if value is not None and not 1 <= value <= most:
        raise ConfigError(f"{name}={value}: choose 1..{most}")


def no_results(queries: int, k: int) -> tuple[Rows, Floats]:
    """Return rows [B, k] and scores of a search without results, to be filled."""
    return (
        np.full((queries, k), -1, dtype=np.int64),
        np.full((queries, k), -np.inf, dtype=np.float32),
    )
