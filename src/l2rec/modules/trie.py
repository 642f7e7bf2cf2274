"""A catalog as a trie of token sequences: what a constrained decoder may say next.

Every item has a code, a short sequence of tokens; items may share one (they collide). Nodes of a
depth are ints 0, 1, ...; the root is the one node of depth 0, and children of a node stand next to
one another. A code that ends early goes on as a chain of nodes with the token `END`, which costs
nothing, so that all leaves are at the same depth.

Legend: N items, C distinct codes, L length of the longest, n_t nodes of depth t.
"""

from __future__ import annotations

__all__ = ["END", "Trie"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.data.ragged import Ragged
from l2rec.errors import DataError

END = -1
"""Token of the nodes below the end of a code."""


@dataclass(frozen=True)
class Trie:
    """tokens: of each depth 1..L, the token of every node, [n_t] int64. first: of each depth
    0..L-1, where the children of every node begin, [n_t + 1] int64; the last entry is their end.
    items: [N] int64, item ints leaf by leaf. items_first: [C + 1] int64, where those of each leaf
    begin. leaf: [N] int64, the leaf of each item.
    """

    tokens: list[Tensor]
    first: list[Tensor]
    items: Tensor
    items_first: Tensor
    leaf: Tensor

    @classmethod
    def of(cls, codes: Ragged, device: torch.device | str = "cpu") -> Trie:
        """Build the trie of N codes.

        codes: N rows of token ids from 0, none empty.

        Raises:
            DataError: no code, an empty one, or one that another begins with, so that a decoder
                could not tell where it ends.
        """
        if not len(codes) or int(codes.lengths.min()) < 1:
            raise DataError("every item needs a code of one token or more")
        grid = np.full((len(codes), int(codes.lengths.max())), END, dtype=np.int64)
        row = np.repeat(np.arange(len(codes)), codes.lengths)
        grid[row, np.arange(len(row)) - codes.offsets[:-1][row]] = codes.values
        distinct, leaf = np.unique(grid, axis=0, return_inverse=True)
        leaf = leaf.reshape(-1)

        # A prefix is new where it differs from that of the row before: rows are sorted.
        differs = np.ones(distinct.shape, dtype=bool)
        differs[1:] = np.logical_or.accumulate(distinct[1:] != distinct[:-1], axis=1)
        tokens, first = [], []
        above = np.zeros(len(distinct), dtype=np.int64)  # node of each code, one depth up
        for depth in range(distinct.shape[1]):
            new = np.flatnonzero(differs[:, depth])
            tokens.append(distinct[new, depth])
            counts = np.bincount(above[new], minlength=int(above[-1]) + 1)
            first.append(np.concatenate(([0], np.cumsum(counts))))
            siblings = np.repeat(counts, counts) > 1
            if bool((siblings & (tokens[-1] == END)).any()):
                raise DataError("a code is the beginning of another; end every code with a token")
            above = np.cumsum(differs[:, depth]) - 1

        def moved(values: npt.NDArray[np.integer]) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)

        return cls(
            tokens=[moved(of_depth) for of_depth in tokens],
            first=[moved(of_depth) for of_depth in first],
            items=moved(np.argsort(leaf, kind="stable")),
            items_first=moved(np.concatenate(([0], np.cumsum(np.bincount(leaf))))),
            leaf=moved(leaf),
        )

    @property
    def depth(self) -> int:
        """L, tokens of the longest code."""
        return len(self.tokens)

    @property
    def n_items(self) -> int:
        """N."""
        return len(self.leaf)

    @property
    def collisions(self) -> float:
        """Share of the items that share their code with another."""
        sizes = self.items_first.diff()
        return float(sizes[sizes > 1].sum()) / self.n_items

    def children(self, depth: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the children of nodes [...] of a depth: [..., W] ints of depth + 1, W the most
        that one of them has, and which are real, alike, bool; the others repeat a real node.
        """
        first = self.first[depth]
        begin, end = first[nodes], first[nodes + 1]
        width = int((end - begin).max()) if nodes.numel() else 0
        found = begin[..., None] + torch.arange(width, device=nodes.device)
        real = found < end[..., None]
        return torch.where(real, found, begin[..., None]), real
