"""The sequence encoder of SASRec and its relatives: learned positions, post-norm Transformer."""

from __future__ import annotations

__all__ = [
    "SequenceEncoder",
    "attention",
    "computed_positions",
    "in_length_groups",
    "initialize",
    "length_groups",
]

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def initialize(module: nn.Module, std: float = 0.02) -> None:
    """BERT's start, for ``module.apply``: weights N(0, std), biases zero, norms one."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for [B, H, T, d]; ``hidden`` bool, True where q must not look.

    Written out: for the short rows of histories the fused kernel of a CPU is slower.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores + torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(
            hidden, torch.finfo(scores.dtype).min
        )
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights @ v


def length_groups(real: Tensor, shrink: float = 0.7) -> list[tuple[Tensor, int]]:
    """Rows of a padded grid [B, T] by length: (row ints [b], width) of each group, longest first.

    A group holds lengths down to ``shrink`` times its own longest.
    """
    lengths, order = real.sum(1).sort(descending=True, stable=True)
    falling = lengths.tolist()
    groups, start = [], 0
    while start < len(falling):
        least = shrink * falling[start]
        end = start + int((lengths[start:] >= least).sum())
        groups.append((order[start:end], max(1, falling[start])))
        start = end
    return groups


def computed_positions(real: Tensor) -> int:
    """Positions that `in_length_groups` computes for a grid [B, T], padding included."""
    return sum(len(rows) * width for rows, width in length_groups(real))


def in_length_groups(read: Callable[[Tensor, Tensor], Tensor], x: Tensor, real: Tensor) -> Tensor:
    """``read`` over rows of like length together, so that padding of a mixed batch costs little.

    x: [B, T, h] and real: [B, T] bool with padding on the right -> [B, T, d], zeros (or whatever
    ``read`` makes of it) at padding. ``read`` gets some rows, cut at their longest.
    """
    groups = length_groups(real)
    if len(groups) <= 1:
        return read(x, real)
    width = x.shape[1]
    parts = [
        F.pad(read(x[rows, :wide], real[rows, :wide]), (0, 0, 0, width - wide))
        for rows, wide in groups
    ]
    return torch.cat(parts)[torch.cat([rows for rows, _ in groups]).argsort()]


class _Layer(nn.Module):
    """Post-norm block: LN(x + attention(x)), LN(x + W2 gelu(W1 x))."""

    def __init__(
        self, dim: int, heads: int, inner: int, dropout: float, attention_dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.inner = nn.Linear(dim, inner)
        self.outer = nn.Linear(inner, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.attention_dropout if self.training else 0.0
        seen = attention(q, k, v, hidden, dropout).transpose(1, 2).reshape(batch, length, dim)
        x = self.norms[0](x + self.dropout(self.out(seen)))
        out: Tensor = self.norms[1](x + self.dropout(self.outer(F.gelu(self.inner(x)))))
        return out


class SequenceEncoder(nn.Module):
    """Item vectors in, states out, position by position.

    Args:
        dim: h of inputs and states. layers, heads, inner: of the Transformer.
        max_items: longest row; positions count from the oldest item of a row.
        dropout, attention_dropout: of sums and of attention weights.
        causal: a position sees itself and what came before it; else the whole row.
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 2,
        heads: int = 2,
        inner: int = 256,
        max_items: int = 50,
        dropout: float = 0.5,
        attention_dropout: float = 0.5,
        causal: bool = True,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.positions = nn.Embedding(max_items, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _Layer(dim, heads, inner, dropout, attention_dropout, eps) for _ in range(layers)
        )
        self.apply(initialize)

    def forward(self, x: Tensor, real: Tensor, causal: bool | None = None) -> Tensor:
        """x: [B, T, h], real: [B, T] bool with padding on the right -> states [B, T, h].

        causal: for this call alone; None is the encoder's own.
        """
        look = self.causal if causal is None else causal
        return in_length_groups(lambda x, real: self._read(x, real, look), x, real)

    def _read(self, x: Tensor, real: Tensor, causal: bool) -> Tensor:
        x = self.dropout(self.norm(x + self.positions.weight[: x.shape[1]]))
        hidden = self._hidden(real, causal)
        for layer in self.layers:
            x = layer(x, hidden)
        return x

    def _hidden(self, real: Tensor, causal: bool) -> Tensor | None:
        """[B or 1, 1, T, T] bool. Right padding is never seen by a causal row's real positions."""
        length = real.shape[1]
        if causal:
            ahead = torch.ones(length, length, dtype=torch.bool, device=real.device).triu(1)
            return ahead[None, None]
        return None if bool(real.all()) else ~real[:, None, None, :].expand(-1, 1, length, -1)
