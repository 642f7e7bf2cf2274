"""Sequence encoder of SASRec and its relatives: learned positions and a post-norm Transformer.

Kang, McAuley. ICDM '18, https://arxiv.org/abs/1808.09781
"""

from __future__ import annotations

__all__ = [
    "EncoderOptions",
    "SequenceEncoder",
    "attention",
    "causal_mask",
    "check_heads",
    "computed_positions",
    "in_length_groups",
    "initialize",
    "length_groups",
    "places",
    "self_attention",
]

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def initialize(module: nn.Module, std: float = 0.02) -> None:
    """Initialise one module as BERT does: weights N(0, std), biases zero, norms one.

    For use with ``module.apply``.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v for q, k, v [B, H, T, d]: [B, H, T, d].

    Written out: for the short rows of histories the fused kernel of a CPU is slower.

    Args:
        hidden: bool, broadcast to [B, H, T, T], True where a query must not look; None hides
            nothing.
        dropout: rate for the attention weights; 0 outside of training.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores + torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(
            hidden, torch.finfo(scores.dtype).min
        )
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights @ v


def self_attention(qkv: Tensor, heads: int, hidden: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attend within each row: [B, T, h].

    Args:
        qkv: [B, T, 3 h] queries, keys and values of all heads, in this order.
        heads: number of heads; it divides h.
        hidden, dropout: as in `attention`.
    """
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return attention(q, k, v, hidden, dropout).transpose(1, 2).reshape(batch, length, width // 3)


def places(real: Tensor, *, from_newest: bool) -> Tensor:
    """Count the positions of rows: [T] from the oldest item, or [B, T] from the newest.

    real: [B, T] bool, padding on the right; its places have no meaning.
    """
    at = torch.arange(real.shape[1], device=real.device)
    return (real.sum(1, keepdim=True) - 1 - at).clamp(min=0) if from_newest else at


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Return ``hidden`` of `attention` for positions that see none after them: [1, 1, T, T]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]


def length_groups(real: Tensor, shrink: float = 0.7) -> list[tuple[Tensor, int]]:
    """Group the rows of a padded grid [B, T] by length, longest first.

    Returns:
        (row ints [b] int64, width) of each group. A group holds lengths from its longest down to
        ``shrink`` times that.
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
    """Count the positions that `in_length_groups` computes for a grid [B, T], with padding."""
    return sum(len(rows) * width for rows, width in length_groups(real))


def in_length_groups(read: Callable[[Tensor, Tensor], Tensor], x: Tensor, real: Tensor) -> Tensor:
    """Call ``read`` on rows of like length together, so that padding costs little: [B, T, d].

    Args:
        read: maps some rows [b, t, h], cut at the longest of them, and their part of ``real`` to
            [b, t, d].
        x: [B, T, h].
        real: [B, T] bool, padding on the right. What is returned at padding has no meaning.
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


def check_heads(dim: int, heads: int) -> None:
    """Refuse heads that do not divide the width; for validators of configurations.

    Raises:
        ValueError: ``heads`` does not divide ``dim``.
    """
    if dim % heads:
        raise ValueError(f"heads={heads} does not divide dim={dim}")


class EncoderOptions(Protocol):
    """Options of a method that has a `SequenceEncoder`."""

    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def max_items(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def attention_dropout(self) -> float: ...


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
        dropout = self.attention_dropout if self.training else 0.0
        seen = self_attention(self.qkv(x), self.heads, hidden, dropout)
        x = self.norms[0](x + self.dropout(self.out(seen)))
        out: Tensor = self.norms[1](x + self.dropout(self.outer(F.gelu(self.inner(x)))))
        return out


class SequenceEncoder(nn.Module):
    """Transformer that turns the item vectors of a row into a state at every position.

    Args:
        dim: h, width of inputs and states.
        layers: number of layers.
        heads: attention heads; they divide ``dim``.
        inner: width of the feed-forward part.
        max_items: longest row.
        from_newest: positions count from the newest item of a row, instead of the oldest.
        dropout: rate for the embedded inputs and for what each layer adds.
        attention_dropout: rate for attention weights.
        causal: whether a position sees itself and what came before it alone, or the whole row.
        eps: of the layer norms.
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
        from_newest: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.from_newest = causal, from_newest
        self.positions = nn.Embedding(max_items, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _Layer(dim, heads, inner, dropout, attention_dropout, eps) for _ in range(layers)
        )
        self.apply(initialize)

    @classmethod
    def from_config(
        cls,
        config: EncoderOptions,
        *,
        dim: int,
        max_items: int | None = None,
        causal: bool = True,
        from_newest: bool = False,
    ) -> SequenceEncoder:
        """Build the encoder that a method's options ask for.

        Args:
            config: the method's options.
            dim: h, width of item vectors and states.
            max_items: longest row, where it is not ``config.max_items``.
            causal, from_newest: as of the class.
        """
        return cls(
            dim,
            layers=config.layers,
            heads=config.heads,
            inner=config.inner,
            max_items=config.max_items if max_items is None else max_items,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            causal=causal,
            from_newest=from_newest,
        )

    def forward(self, x: Tensor, real: Tensor, causal: bool | None = None) -> Tensor:
        """Encode rows: item vectors [B, T, h] -> states [B, T, h].

        Args:
            x: item vectors.
            real: [B, T] bool, padding on the right.
            causal: replaces the encoder's ``causal`` in this call, unless it is None.
        """
        look = self.causal if causal is None else causal

        def read(x: Tensor, real: Tensor) -> Tensor:
            all_seen = not look and bool(real.all())
            return self._read(x, real, None if all_seen else self._hidden(real, look))

        return in_length_groups(read, x, real)

    def whole(self, x: Tensor, real: Tensor) -> Tensor:
        """Encode rows as `forward` does, the grid at once: what is computed depends on no length.

        For `l2rec.protocols.UserEncoder`; padding makes it slower.
        """
        return self._read(x, real, self._hidden(real, self.causal))

    def _read(self, x: Tensor, real: Tensor, hidden: Tensor | None) -> Tensor:
        at = places(real, from_newest=self.from_newest)
        x = self.dropout(self.norm(x + self.positions(at)))
        for layer in self.layers:
            x = layer(x, hidden)
        return x

    def _hidden(self, real: Tensor, causal: bool) -> Tensor:
        """Return ``hidden`` of `attention`: [B or 1, 1, T, T] bool.

        A causal row needs nothing for its padding, which comes after every real position.
        """
        length = real.shape[1]
        if causal:
            return causal_mask(length, real.device)
        return ~real[:, None, None, :].expand(-1, 1, length, -1)
