"""Inputs of the two views, Eq. 1-2 of L2Rec (SIGIR '26), and means over their outputs.

    Eq. 1   semantic view: all tokens of the newest items that fit,     `semantic_tokens`
            item after item; one block per item
    Eq. 2   behavioural view: one vector per item, pooled and           `mean_of`,
            projected by P_U; one block is one position                 `BehavioralProjector`

Both are flat (packed) runs over the rows of a batch. Legend: B rows, K blocks (items of all rows
together), n tokens, D hidden size.
"""

from __future__ import annotations

__all__ = [
    "BehavioralProjector",
    "Segments",
    "SemanticTokens",
    "View",
    "ViewInput",
    "mean_of",
    "near_identity_",
    "pack_views",
    "prefix_mean",
    "semantic_tokens",
]

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.ragged import Ragged, flat_index
from l2rec.modules.packing import Attend, Packing, lay, pack

View = Literal["semantic", "behavioral"]


@dataclass(frozen=True)
class Segments:
    """Division of packed tokens into blocks (items), and of blocks into rows.

    lengths: [B] int64 tokens per row. blocks: [B] int64 blocks per row (at least 1).
    block: [n] int64 block of each token, 0..K-1 over the whole batch, ascending.
    row: [K] int64 row of each block.
    """

    lengths: Tensor
    blocks: Tensor
    block: Tensor
    row: Tensor

    @property
    def last(self) -> Tensor:
        """Newest block of each row, [B] int64."""
        return self.blocks.cumsum(0) - 1

    @cached_property
    def place(self) -> Tensor:
        """Place of each block in its row, from 0, [K] int64."""
        first = self.blocks.cumsum(0) - self.blocks
        return torch.arange(len(self.row), device=first.device) - first[self.row]

    @cached_property
    def last_token(self) -> Tensor:
        """Last token of each block, [K] int64."""
        counts = torch.bincount(self.block, minlength=len(self.row))
        return counts.cumsum(0) - 1

    @classmethod
    def of_items(cls, counts: Tensor) -> Segments:
        """Build those of the behavioural view, every item a block of one token.

        counts: [B] int64, items per row.
        """
        total = int(counts.sum())
        rows = torch.repeat_interleave(
            torch.arange(len(counts), device=counts.device), counts, output_size=total
        )
        return cls(counts, counts, torch.arange(total, device=counts.device), rows)


@dataclass(frozen=True)
class SemanticTokens:
    """Input of the semantic view, before Embed.

    ids: [n] int64 token ids. kept: [B] int64, number of newest items of each row that fit.
    """

    ids: Tensor
    segments: Segments
    kept: npt.NDArray[np.int64]


def semantic_tokens(
    histories: Ragged,
    table: Ragged,
    *,
    item_tokens: int,
    max_tokens: int,
    max_items: int,
    before: list[int],
    after: list[int],
    device: torch.device | str = "cpu",
) -> SemanticTokens:
    """Concatenate the texts of each history's newest items, [c_1; ...; c_L] of Eq. 1.

    A row is ``before``, then of each item its text and ``after``. Texts are cut to ``item_tokens``;
    items that do not fit into ``max_tokens`` are dropped whole, oldest first, but never the newest.
    With [CLS] before and [SEP] after, a one-item history reads as the backbone reads a single text.

    Args:
        histories: item ints, oldest first, no row empty.
        table: token ids of every item, without special tokens.
        item_tokens: most tokens of one item's text. max_tokens: T, most tokens of a row.
        max_items: L, most items of a row.
        before: token ids that start a row. after: token ids that end an item, at least one where
            texts may be empty.
        device: of the tensors that are returned.
    """
    histories = histories.tail(max_items)
    items = histories.values
    starts = table.offsets[:-1][items]
    text = np.minimum(table.offsets[1:][items] - starts, item_tokens)
    cost = text + len(after)
    # Tokens from each item to the end of its row; monotone, so what fits is a newest run.
    total = np.concatenate(([0], np.cumsum(cost)))
    to_end = np.repeat(total[histories.offsets[1:]], histories.lengths) - total[:-1]
    fits = to_end <= max_tokens - len(before)
    newest = np.zeros(len(items), dtype=bool)
    newest[histories.offsets[1:] - 1] = True
    fits |= newest
    row = np.repeat(np.arange(len(histories)), histories.lengths)[fits]
    starts, text, cost = starts[fits], text[fits], cost[fits]
    kept = np.bincount(row, minlength=len(histories)).astype(np.int64)
    first = np.concatenate(([0], np.cumsum(kept)[:-1]))

    size = cost.copy()
    size[first] += len(before)
    block_start = np.concatenate(([0], np.cumsum(size)[:-1]))
    text_start = block_start.copy()
    text_start[first] += len(before)
    ids = np.empty(int(size.sum()), dtype=np.int64)
    for k, token in enumerate(before):
        ids[block_start[first] + k] = token
    ids[flat_index(text_start, text)] = table.values[flat_index(starts, text)]
    for k, token in enumerate(after):
        ids[text_start + text + k] = token

    lengths = np.add.reduceat(size, first)
    segments = Segments(
        lengths=torch.from_numpy(lengths).to(device),
        blocks=torch.from_numpy(kept).to(device),
        block=torch.from_numpy(np.repeat(np.arange(len(size)), size)).to(device),
        row=torch.from_numpy(row).to(device),
    )
    return SemanticTokens(torch.from_numpy(ids).to(device), segments, kept)


@dataclass(frozen=True)
class ViewInput:
    """One view of a batch: x [n, D] inputs, u [U, D] user vectors, user [n] their row of u; D as
    word vectors have.
    """

    view: View
    x: Tensor
    segments: Segments
    u: Tensor
    user: Tensor


def pack_views(
    inputs: Sequence[ViewInput], attend: Attend, dtype: torch.dtype
) -> tuple[Tensor, Packing]:
    """Lay all views behind one another, for one pass of the backbone.

    Returns:
        x [N, word_dim] in ``dtype``, and how its rows are packed, a group of each view.
    """
    parts = [
        (part.x, *pack(part.segments.lengths, attend, blocks=part.segments.block))
        for part in inputs
    ]
    return lay(parts, dtype)


class BehavioralProjector(nn.Module):
    """Projector P_U of Eq. 2 with a gain: item vectors [n, D] -> inputs [n, D'], gain * (W x + b).

    W starts at the identity (`near_identity_`) and b at minus the mean item vector. Pooled token
    embeddings are small and share a large common part: left as they are, the backbone's position
    and type embeddings drown them and all single-item outputs coincide. `calibrate` sets the gain
    so that item vectors enter at the scale of the backbone's own word embeddings times ``boost``.
    """

    def __init__(self, dim: int, word_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, word_dim)
        self.gain = nn.Parameter(torch.ones(()))
        near_identity_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def calibrate(self, vectors: Tensor, scale: float) -> None:
        """Centre on ``vectors`` [N, D] and set the gain so that they enter with RMS ``scale``.

        Fewer than two vectors change nothing; equal ones leave the gain as it is.
        """
        if len(vectors) < 2:  # nothing to centre on
            return
        mean = vectors.float().mean(0)
        self.linear.bias.copy_(-self.linear.weight @ mean)
        spread = (vectors.float() - mean).square().mean().sqrt()
        if spread > 0:
            self.gain.copy_(scale / spread)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gain * self.linear(x)
        return out


def near_identity_(weight: Tensor) -> None:
    """Set a matrix to the identity if it is square, else to random orthogonal rows or columns."""
    square = weight.shape[0] == weight.shape[1]
    (nn.init.eye_ if square else nn.init.orthogonal_)(weight)


def mean_of(x: Tensor, index: Tensor, n: int) -> Tensor:
    """Average the rows of x [m, D] that share an index: [n, D] float32.

    index: [m] int64, 0..n-1; the mean of no rows is zero.
    """
    sums = x.new_zeros((n, x.shape[-1]), dtype=torch.float32).index_add_(0, index, x.float())
    return sums / torch.bincount(index, minlength=n).clamp_min(1)[:, None]


def prefix_mean(x: Tensor, segments: Segments) -> Tensor:
    """Average all tokens of a row from its start to the end of each block.

    x: [n, D] tokens. Returns [K, D] float32: mean k does not depend on later blocks.
    """
    blocks, row = len(segments.row), segments.row
    sums = x.new_zeros((blocks, x.shape[-1]), dtype=torch.float32)
    sums = sums.index_add_(0, segments.block, x.float())
    counts = torch.bincount(segments.block, minlength=blocks).float()
    if blocks == len(segments.blocks):
        return sums / counts[:, None]
    if len(segments.blocks) == 1:
        return sums.cumsum(0) / counts.cumsum(0)[:, None]
    # Cumulate inside a padded [B, K_max] grid: a global cumulative sum would tie a row's rounding
    # to the rows before it.
    width = int(segments.blocks.max())
    place = row * width + segments.place
    grid = sums.new_zeros((len(segments.blocks) * width, x.shape[-1])).index_copy(0, place, sums)
    number = counts.new_zeros(len(segments.blocks) * width).index_copy(0, place, counts)
    grid = grid.view(-1, width, x.shape[-1]).cumsum(1).flatten(0, 1)
    number = number.view(-1, width).cumsum(1).flatten()
    return grid[place] / number[place, None]
