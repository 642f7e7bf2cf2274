"""What training, evaluation and the service know of a method: three small protocols."""

from __future__ import annotations

__all__ = ["Embedder", "Losses", "Recommender", "Scorer", "TopK"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from l2rec.data.ragged import Ragged

Scorer = Callable[[Ragged], Tensor]
"""Histories of B users -> scores [B, N] float32 over the whole catalog, higher is better."""


@dataclass(frozen=True)
class Losses:
    """``total``: scalar to differentiate. ``parts``: named scalars for the log, already detached."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class TopK:
    """``items``: [B, k] int64 dense item ints, -1 where fewer are left. ``scores``: [B, k] float32."""

    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@runtime_checkable
class Recommender(Protocol):
    """Anything that can be ranked by the one evaluator."""

    @property
    def n_items(self) -> int:
        """N, the number of catalog items that are scored."""
        ...

    def scorer(self) -> Scorer:
        """A function of histories with everything that does not depend on them (the encoded
        catalog, counts, ...) computed once. Valid until the model's weights or catalog change."""
        ...


@runtime_checkable
class Embedder(Recommender, Protocol):
    """A recommender whose scores are inner products of vectors: what can be indexed."""

    def encode_users(self, histories: Ragged) -> Tensor:
        """[B, D] float32."""
        ...

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Catalog ints or raw texts -> [n, D] float32."""
        ...
