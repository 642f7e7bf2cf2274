"""SASRec: Self-Attentive Sequential Recommendation.

Kang, McAuley. ICDM '18, https://arxiv.org/abs/1808.09781

    x_t = LN(E[i_t] + P[t])                         item and position embeddings
    h   = causal Transformer(x)                     l2rec.modules.encoder
    r_{t,i} = h_t . E[i]                            score of item i after position t

Every position predicts its next item. Defaults are those of RecBole, which most papers compare
with: post-norm blocks, the full softmax. Named options:

- ``loss=bce``: the original's binary cross-entropy with one sampled negative a position.
- ``loss=sampled``: softmax over the positive and ``negatives`` sampled items. (With equal losses
  SASRec beats BERT4Rec: Klenitskiy, Vasilev, RecSys '23.)
"""

from __future__ import annotations

__all__ = ["SASRec", "SASRecConfig"]

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, computed_positions, initialize
from l2rec.modules.item_table import ItemTable
from l2rec.modules.losses import binary_loss, sampled_softmax_loss
from l2rec.modules.objectives import catalog_loss
from l2rec.modules.sequences import (
    next_item_batches,
    pad,
)
from l2rec.protocols import Losses, Stage, decayed


class SASRecConfig(BaseModel):
    """Options of SASRec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    loss: Literal["ce", "bce", "sampled"] = "ce"
    negatives: int = Field(1, ge=1)
    """Sampled negatives of a position, for ``bce`` and ``sampled``."""

    @model_validator(mode="after")
    def _consistent(self) -> SASRecConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        return self


class SASRec(ItemTable):
    """The recommender. A user is the state after the newest item, an item its embedding."""

    Config = SASRecConfig
    uses_backbone = False
    item_tensors = frozenset({"items.weight"})

    def __init__(
        self,
        config: SASRecConfig,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.batches = next_item_batches(len(catalog), config.max_items)
        self.items = nn.Embedding(len(catalog), config.dim)
        self.items.apply(initialize)
        self.encoder = SequenceEncoder(
            config.dim,
            layers=config.layers,
            heads=config.heads,
            inner=config.inner,
            max_items=config.max_items,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )

    def forward(self, histories: Ragged) -> tuple[Tensor, Tensor]:
        """States [B, T, h] of rows of at most ``max_items`` items, and which are real [B, T]."""
        items, real = pad(histories, self.items.weight.device)
        return self.encoder(self.items(items), real), real

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        return [
            Stage("train", decayed(self.parameters(), lr, weight_decay), self.batches, self.loss)
        ]

    def loss(self, batch: Batch) -> Losses:
        """Next-item loss, mean over all positions of the batch."""
        states, real = self(batch.histories)
        users = states[real]  # [P, h], in the order of the flat histories and targets
        targets = torch.from_numpy(batch.targets.astype(np.int64)).to(users.device)
        if self.config.loss == "ce":
            total = catalog_loss(users @ self.items.weight.T, targets)
        else:
            total = self._sampled(users, targets)
        return Losses(total, {"rec": total.detach()}, len(users), computed_positions(real))

    def _sampled(self, users: Tensor, targets: Tensor) -> Tensor:
        """``bce`` or ``sampled``: negatives uniform over the catalog, the target never its own."""
        drawn = torch.randint(
            self.n_items, (len(users), self.config.negatives), device=users.device
        )
        positive = (users * self.items(targets)).sum(-1)
        negative = torch.einsum("ph,pkh->pk", users, self.items(drawn))
        negative = negative.masked_fill(drawn == targets[:, None], float("-inf"))
        loss = binary_loss if self.config.loss == "bce" else sampled_softmax_loss
        return loss(positive, negative)
