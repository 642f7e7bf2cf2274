"""FDSA: Feature-level Deeper Self-Attention Network for Sequential Recommendation.

Zhang, Zhao, Liu, Sheng, Xu, Wang, Liu, Zhou. IJCAI '19, https://doi.org/10.24963/ijcai.2019/600

    h^I     = causal Transformer(E[i_t])            l2rec.modules.encoder, with positions
    h^F     = causal Transformer(f(i_t))            another one, over features of the same items
    u_t     = LN(W [h^I_t; h^F_t])
    r_{t,i} = u_t . E[i]                            score of item i after position t

Every position predicts its next item with the full softmax. What the features are differs between
papers, so it is an option:

- ``features=text`` (UniSRec's variant, KDD '22): f = relu(W e), of the frozen backbone's text
  vector e.
- ``features=[brand, category]``: a field's vector is the mean of its values' embeddings, and f is
  the fields' additive attention: softmax_k(v . relu(A f_k)), as in RecBole. ``separator`` says
  what stands between the values of a field.

Each encoder has positions and norms of its own; RecBole has one LN for both inputs and the output.
"""

from __future__ import annotations

__all__ = ["FDSA", "FDSAConfig"]

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import ConfigError, DataError
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, initialize
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.item_table import ItemTable
from l2rec.modules.sequences import (
    next_item_batches,
    pad,
)
from l2rec.protocols import Stage, decayed


class FDSAConfig(BaseModel):
    """Options of FDSA."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    layers: int = Field(2, ge=1)
    """Of each encoder, as are ``heads`` and ``inner``."""
    heads: int = Field(2, ge=1)
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    features: Literal["text"] | tuple[str, ...] = "text"
    """``text``, or names of catalog fields."""
    separator: str = Field(" ", min_length=1)
    """Between the values of a field."""
    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""

    @model_validator(mode="after")
    def _consistent(self) -> FDSAConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        if not self.features:
            raise ValueError("features=[] leaves nothing to read; name fields, or set text")
        return self


class TextFeatures(nn.Module):
    """relu(W e + b) of frozen text vectors e."""

    def __init__(self, text: FrozenText, dim: int) -> None:
        super().__init__()
        self.text = text
        self.linear = nn.Linear(text.vectors.shape[1], dim)
        self.linear.apply(initialize)

    def forward(self, items: npt.NDArray[np.integer]) -> Tensor:
        """f of catalog ints: [n, h]."""
        rows = torch.from_numpy(items.astype(np.int64)).to(self.text.vectors.device)
        return F.relu(self.linear(self.text(rows)))


class FieldFeatures(nn.Module):
    """Additive attention over the fields of an item; a field without a value is a zero vector."""

    def __init__(self, fields: Sequence[Sequence[str]], separator: str, dim: int) -> None:
        """fields: of each field, the text of every item."""
        super().__init__()
        self.fields = len(fields)
        rows = [
            [(field, value.strip()) for value in text.split(separator) if value.strip()]
            for texts in zip(*fields, strict=True)
            for field, text in enumerate(texts)
        ]
        known = {value: number for number, value in enumerate(dict.fromkeys(chain(*rows)))}
        self.values = Ragged.from_rows([[known[value] for value in row] for row in rows])
        """Row ``item * fields + field``: ints of the values."""
        self.table = nn.Embedding(len(known), dim)
        self.hidden = nn.Linear(dim, dim)
        self.weigh = nn.Linear(dim, 1, bias=False)
        self.apply(initialize)

    def forward(self, items: npt.NDArray[np.integer]) -> Tensor:
        """f of catalog ints: [n, h]."""
        device = self.table.weight.device
        rows = items.astype(np.int64)[:, None] * self.fields + np.arange(self.fields)
        values = self.values.take(rows.reshape(-1))
        pooled = F.embedding_bag(
            torch.from_numpy(values.values.astype(np.int64)).to(device),
            self.table.weight,
            torch.from_numpy(values.offsets[:-1]).to(device),
            mode="mean",
        ).view(len(items), self.fields, -1)
        weights = self.weigh(F.relu(self.hidden(pooled))).softmax(1)
        out: Tensor = (weights * pooled).sum(1)
        return out


class FDSA(ItemTable):
    """The recommender. A user is the joint state after the newest item, an item its embedding."""

    Config = FDSAConfig
    uses_backbone = True
    item_tensors = frozenset({"items.weight", "features.table.weight"})

    def __init__(
        self,
        config: FDSAConfig,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.batches = next_item_batches(len(catalog), config.max_items)
        self.cached: list[Path] = []
        """Cache entries this model was built from."""
        self.items = nn.Embedding(len(catalog), config.dim)
        self.items.apply(initialize)
        self.features = self._features(catalog, backbone, cache)
        self.item_encoder, self.feature_encoder = (
            SequenceEncoder(
                config.dim,
                layers=config.layers,
                heads=config.heads,
                inner=config.inner,
                max_items=config.max_items,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
            )
            for _ in range(2)
        )
        self.join = nn.Linear(2 * config.dim, config.dim)
        self.join.apply(initialize)
        self.norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def _features(
        self, catalog: Catalog, backbone: Backbone | None, cache: Path | None
    ) -> TextFeatures | FieldFeatures:
        config = self.config
        if config.features != "text":
            fields = [catalog.field(name) for name in config.features]
            if not any(text.strip() for texts in fields for text in texts):
                raise DataError(
                    f"no item has a value of {', '.join(config.features)}; name other fields "
                    f"(there are: {', '.join(catalog.fields)}), or set features=text"
                )
            return FieldFeatures(fields, config.separator, config.dim)
        texts = catalog.require_texts("FDSA with features=text")
        if backbone is None:
            raise ConfigError("features=text needs a backbone; give one, or name catalog fields")
        text = FrozenText(backbone, texts, max_tokens=config.text_tokens, cache=cache)
        self.cached = text.files
        return TextFeatures(text, config.dim)

    def forward(self, histories: Ragged) -> tuple[Tensor, Tensor]:
        """u [B, T, h] of rows of at most ``max_items`` items, and which are real [B, T]."""
        items, real = pad(histories, self.items.weight.device)
        embedded = self.items(items)
        features = torch.zeros_like(embedded)
        features[real] = self.features(histories.values)
        states = (self.item_encoder(embedded, real), self.feature_encoder(features, real))
        return self.dropout(self.norm(self.join(torch.cat(states, -1)))), real

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        return [
            Stage(
                "train",
                decayed(self.parameters(), lr, weight_decay),
                self.batches,
                self.next_item_loss,
            )
        ]
