"""A tree of items by recursive spectral clustering, and items' codes from it.

Ng, Jordan, Weiss. On Spectral Clustering: Analysis and an Algorithm. NIPS '01; recursively, over
what users choose together, in Hua et al. How to Index Item IDs for Recommendation Foundation
Models. SIGIR-AP '23, https://arxiv.org/abs/2305.06569.

    A_ij     sequences that hold both i and j, A_ii = 0;  d_i = sum_j A_ij
    U        eigenvectors of the K largest eigenvalues of D^-1/2 A D^-1/2 (the least ones of the
             normalised Laplacian), rows at unit length
    clusters k-means over the rows of U; each is clustered in turn until it is small enough
    code     the clusters on the way to an item, then its place in the last one

Legend: N items, n of a node, K clusters of a node.
"""

from __future__ import annotations

__all__ = ["spectral_clusters", "together", "tree_codes"]

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from torch.nn import functional as F

from l2rec.data.ragged import Ragged
from l2rec.modules.quantizer import centres

DENSE = 512
"""Most items of a node whose eigenvectors are computed densely."""

Ints = npt.NDArray[np.int64]


def together(sequences: Ragged, count: int) -> sp.csr_array:
    """Count the sequences that hold both of two items: [count, count] float64, zero diagonal."""
    row = np.repeat(np.arange(len(sequences)), sequences.lengths)
    shape = (len(sequences), count)
    holds = sp.csr_array((np.ones(len(row)), (row, sequences.values)), shape=shape)
    holds.data[:] = 1.0  # an item that a sequence has twice counts once
    both = (holds.T @ holds).tocsr()
    both.setdiag(0.0)
    both.eliminate_zeros()
    return both


def tree_codes(both: sp.csr_array, *, clusters: int, leaf: int, seed: int) -> list[tuple[int, ...]]:
    """Return the code of every item: all different, none the beginning of another.

    both: [N, N], how often two items are chosen together. clusters: K. leaf: most items of a
    cluster that is not clustered again, at least K. Codes are below the larger of the two.
    """
    codes: list[tuple[int, ...]] = [()] * both.shape[0]
    nodes: list[tuple[Ints, tuple[int, ...]]] = [(np.arange(len(codes)), ())]
    while nodes:
        items, path = nodes.pop()
        if len(items) <= leaf:
            for place, item in enumerate(items.tolist()):
                codes[item] = (*path, place)
            continue
        labels = spectral_clusters(both[items][:, items], clusters, seed)
        nodes += [(items[part], (*path, label)) for label, part in _parts(labels)]
    return codes


def _parts(labels: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield the places [n] of each label; labels are numbered anew, without gaps."""
    _, dense = np.unique(labels, return_inverse=True)
    for label in range(int(dense.max()) + 1):
        yield label, np.flatnonzero(dense == label)


def spectral_clusters(both: sp.csr_array, count: int, seed: int) -> Ints:
    """Cluster n > ``count`` items into ``count`` clusters, two at least of which have items.

    Items that are chosen with no other are a cluster of their own; where nothing tells the items
    apart they are cut into equal parts, in their order.

    both: [n, n], symmetric. Returns [n] int64.
    """
    n, linked = int(both.shape[0]), np.asarray(both.sum(1)) > 0
    labels = np.zeros(n, dtype=np.int64)
    if not linked.all():
        labels[~linked] = count - 1
        if linked.sum() > count > 2:
            labels[linked] = spectral_clusters(both[linked][:, linked], count - 1, seed)
    else:
        rows = torch.from_numpy(_eigenvectors(both, count, seed))
        rows = F.normalize(rows, dim=-1)
        labels = torch.cdist(rows, centres(rows, count, seed=seed)).argmin(-1).numpy()
    if (labels == labels[0]).all():
        return np.arange(n) * count // n
    return labels


def _eigenvectors(both: sp.csr_array, count: int, seed: int) -> npt.NDArray[np.float64]:
    """Return those of the ``count`` largest eigenvalues of D^-1/2 A D^-1/2, [n, count]."""
    n, scale = both.shape[0], sp.diags_array(np.asarray(both.sum(1)) ** -0.5)
    normed = scale @ both @ scale
    if n <= max(DENSE, count + 1):
        _, vectors = eigh(normed.toarray(), subset_by_index=[n - count, n - 1])
    else:  # eigenvalues from 0 to 1, so that the largest are the farthest from zero, too
        shifted = (normed + sp.eye_array(n)) / 2
        start = np.random.default_rng(seed).standard_normal(n)
        _, vectors = eigsh(shifted, k=count, which="LA", v0=start, tol=1e-4)
    return np.ascontiguousarray(vectors)
