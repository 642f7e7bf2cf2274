"""BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations.

Sun, Liu, Wu, Pei, Lin, Ou, Jiang. CIKM '19, https://arxiv.org/abs/1904.06690

    x_t     = LN(E[i_t] + P[t]),  E[mask] for a hidden item
    h       = bidirectional Transformer(x)              l2rec.modules.encoder
    r_{t,i} = LN(gelu(W h_t)) . E[i] + b_i              score of item i at the hidden position t

Training hides items of a sequence and asks for them; a user is asked for the item hidden right
after the history. Cross-entropy over the whole catalog, mean over hidden positions.

- Of a row of n items, max(1, round(``mask_ratio`` n)) are hidden; every hidden one is a target.
- In a share ``last_only`` of rows only the newest is, as when recommending. The paper mixes such
  rows in; one in two is RecBole's share.
- A hidden item is always replaced by the mask, never kept or swapped.
- ``max_items`` is the longest history. A row holds one item more, the hidden one: no history
  loses an item to the mask.
- It needs many epochs: each asks for few of the items (Petrov, Macdonald. RecSys '22,
  https://arxiv.org/abs/2207.07483).
"""

from __future__ import annotations

__all__ = ["BERT4Rec", "BERT4RecConfig"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, computed_positions, initialize
from l2rec.modules.objectives import catalog_loss
from l2rec.modules.sequences import catalog_rows, encode_rows, pad, sequence_batches
from l2rec.protocols import Losses, Scorer, Stage, decayed, inner_product_scorer


class BERT4RecConfig(BaseModel):
    """Options of BERT4Rec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    attention_dropout: float = Field(0.2, ge=0, lt=1)
    mask_ratio: float = Field(0.2, gt=0, lt=1)
    """Share of a row's items that are hidden."""
    last_only: float = Field(0.5, ge=0, le=1)
    """Share of rows in which the newest item alone is hidden."""

    @model_validator(mode="after")
    def _consistent(self) -> BERT4RecConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        return self


class BERT4Rec(nn.Module):
    """The recommender. A user is the head's output at a mask after the newest item, with a one
    beside it; an item is its embedding, with its bias beside it.
    """

    Config = BERT4RecConfig
    uses_backbone = False
    item_tensors = frozenset({"items.weight", "bias"})

    def __init__(
        self,
        config: BERT4RecConfig,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(len(catalog), config.dim)
        self.bias = nn.Parameter(torch.zeros(len(catalog)))
        self.mask = nn.Parameter(0.02 * torch.randn(config.dim))
        self.encoder = SequenceEncoder(
            config.dim,
            layers=config.layers,
            heads=config.heads,
            inner=config.inner,
            max_items=config.max_items + 1,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            causal=False,
        )
        self.head = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.GELU(), nn.LayerNorm(config.dim, eps=1e-12)
        )
        self.items.apply(initialize)
        self.head.apply(initialize)

    @property
    def n_items(self) -> int:
        return self.items.num_embeddings

    def forward(self, items: Tensor, real: Tensor, hidden: Tensor) -> Tensor:
        """Head outputs [M, h] at the M hidden positions, row by row.

        items: [B, T] int64. real, hidden: [B, T] bool; what stands at a hidden position, or at
        one that is not real, is not read.
        """
        x = torch.where(hidden[..., None], self.mask, self.items(items))
        out: Tensor = self.head(self.encoder(x, real)[hidden])
        return out

    # -- training --------------------------------------------------------------------------------

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Whole training sequences; what is hidden is drawn in `loss`."""
        return sequence_batches(
            sequences,
            supervision="sequence",
            n_items=self.n_items,
            max_items=self.config.max_items + 1,
            seed=seed,
            epoch=epoch,
            batch_users=batch_users,
            batch_tokens=batch_tokens,
        )

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        return [
            Stage("train", decayed(self.parameters(), lr, weight_decay), self.batches, self.loss)
        ]

    def loss(self, batch: Batch) -> Losses:
        """Cross-entropy of the hidden items, mean over the batch."""
        items, real = pad(batch.histories, self.items.weight.device)
        hidden = self.hide(real)
        scores = self(items, real, hidden) @ self.items.weight.T + self.bias
        total = catalog_loss(scores, items[hidden])
        return Losses(total, {"rec": total.detach()}, int(real.sum()), computed_positions(real))

    def hide(self, real: Tensor) -> Tensor:
        """Which positions of rows [B, T] are hidden: real ones, at least one of each row."""
        device, lengths = real.device, real.sum(1)
        wanted = (self.config.mask_ratio * lengths).round().clamp(min=1)
        noise = torch.rand(real.shape, device=device).masked_fill(~real, 2.0)
        drawn = noise.argsort(1).argsort(1) < wanted[:, None]
        newest = torch.arange(real.shape[1], device=device) == lengths[:, None] - 1
        alone = torch.rand(len(real), 1, device=device) < self.config.last_only
        return torch.where(alone, newest, drawn)

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """[B, h + 1] float32."""
        return encode_rows(self, histories, self._next, max_items=self.config.max_items)

    def _next(self, rows: Ragged) -> Tensor:
        """What is asked for right after each row: [B, h + 1]."""
        items, real = pad(rows, self.items.weight.device)
        longer = F.pad(real, (1, 0), value=True)
        users = self(F.pad(items, (0, 1)), longer, longer & ~F.pad(real, (0, 1)))
        return F.pad(users, (0, 1), value=1.0)

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """[n, h + 1] float32, of catalog ints."""
        rows = catalog_rows(items, "BERT4Rec", self.items.weight.device)
        return torch.cat((self.items.weight, self.bias[:, None]), 1).detach()[rows]

    def scorer(self) -> Scorer:
        return inner_product_scorer(self)
