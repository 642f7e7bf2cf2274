"""Indexes of FAISS: flat, hnsw, ivf, int8 and binary."""

from __future__ import annotations

from typing import Any

import numpy as np

from l2rec.data.vectors import Floats
from l2rec.errors import ConfigError
from l2rec.index.exact import Exact
from l2rec.index.protocol import (
    BREADTH,
    CONSTRUCTION,
    LINKS,
    WIDEST,
    Rows,
    check_range,
    checked_queries,
    no_results,
)

SMALL = {"int8": "SQ8", "binary": "RaBitQ,Refine(SQ8)"}
"""FAISS's names of the kinds that keep rows in fewer bits."""
RESCORED = 10.0
"""Rows that binary scores once more, for each one that is asked for."""


def import_faiss() -> Any:
    """Import FAISS and give it as many threads as torch has in this thread.

    Each has its own OpenMP library, so a setting of one does not reach the other.

    Raises:
        ConfigError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ConfigError("this index needs FAISS: pip install 'l2rec[faiss]'") from None
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class Faiss:
    """FAISS index of kind flat, hnsw, ivf, int8 or binary."""

    def __init__(self, kind: str, index: Any) -> None:
        self.kind, self.index = kind, index

    @classmethod
    def build(
        cls,
        vectors: Floats,
        kind: str,
        lists: int | None = None,
        probes: int | None = None,
        ef: int = BREADTH,
    ) -> Faiss:
        """Build an index of vectors [N, D].

        lists: inverted lists of ivf, by default 4 sqrt(N). probes: lists searched. ef: breadth of
        a search in hnsw.
        """
        faiss = import_faiss()
        rows, dim = vectors.shape
        for name, value, most in (
            ("lists", lists, rows),
            ("probes", probes, rows),
            ("ef", ef, WIDEST),
        ):
            check_range(name, value, most)
        if kind == "flat":
            index = faiss.IndexFlatIP(dim)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = CONSTRUCTION, ef
        elif kind in SMALL:
            index = faiss.index_factory(dim, SMALL[kind], faiss.METRIC_INNER_PRODUCT)
            if kind == "binary":
                index.k_factor = RESCORED
            index.train(vectors)
        else:
            # FAISS warns below 39 rows a list: too few to find its centre.
            lists = lists or max(1, min(rows // 39, round(4 * rows**0.5)))
            index = faiss.IndexIVFFlat(
                faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT
            )
            index.cp.seed = 0
            index.train(vectors)
            index.nprobe = min(lists, probes or max(8, lists // 8))
        index.add(vectors)
        return cls(kind, index)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def dim(self) -> int:
        return int(self.index.d)

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        asked = checked_queries(queries, self.dim, k)
        rows, scores = no_results(len(asked), k)
        if not len(asked):
            return rows, scores
        faiss = import_faiss()
        # One more than asked for shows whether a tie crosses the cut.
        best, at = self.index.search(asked, min(k + 1, len(self)))
        best = np.where(at < 0, -np.inf, best).astype(np.float32)
        order = np.lexsort((at, -best))  # along the last axis: by score, then by row
        best, at = np.take_along_axis(best, order, 1), np.take_along_axis(at, order, 1)
        wanted = min(k, len(self))
        rows[:, :wanted], scores[:, :wanted] = at[:, :wanted], best[:, :wanted]
        if self.kind == "flat" and best.shape[1] > k:
            cut = np.flatnonzero(best[:, k - 1] == best[:, k])
            if len(cut):
                stored_rows = faiss.rev_swig_ptr(self.index.get_xb(), len(self) * self.dim)
                all_rows = Exact(stored_rows.reshape(len(self), self.dim))
                rows[cut], scores[cut] = all_rows.search(asked[cut], k)
        return rows, scores
