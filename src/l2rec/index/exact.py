"""Exact search: what every other kind is measured against."""

from __future__ import annotations

import numpy as np

from l2rec.data.vectors import Floats
from l2rec.index.protocol import Rows, checked_queries, no_results

BLOCK_SCORES = 1 << 22
"""Scores that exact search computes at once: 16 MB, as in `evaluation`."""


class Exact:
    """Exact index: all inner products, a block of queries at a time."""

    kind = "exact"

    def __init__(self, vectors: Floats) -> None:
        import torch

        self.vectors = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        import torch

        from l2rec.data.ragged import Ragged
        from l2rec.evaluation.ranking import top_k

        asked = torch.from_numpy(checked_queries(queries, self.dim, k))
        rows, scores = no_results(len(asked), k)
        numbers = Ragged(np.arange(len(asked), dtype=np.int32), np.arange(len(asked) + 1))
        best = top_k(  # each query is a history of one item: its number
            lambda some: asked[torch.from_numpy(some.values)] @ self.vectors.T,
            numbers,
            min(k, len(self)),
            batch_size=max(1, BLOCK_SCORES // len(self)),
        )
        rows[:, : best.items.shape[1]] = best.items
        scores[:, : best.items.shape[1]] = best.scores
        return rows, scores
