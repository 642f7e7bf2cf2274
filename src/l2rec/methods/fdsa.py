"""FDSA: Feature-level Deeper Self-Attention Network for Sequential Recommendation.

Zhang, Zhao, Liu, Sheng, Xu, Wang, Liu, Zhou. IJCAI '19, https://doi.org/10.24963/ijcai.2019/600

    h^I     = causal Transformer(E[i_t])            l2rec.modules.encoder, with positions
    h^F     = causal Transformer(f(i_t))            another one, over features of the same items
    u_t     = LN(W [h^I_t; h^F_t])
    r_{t,i} = u_t . E[i]                            score of item i after position t

Every position predicts its next item. What the features are differs between papers: an option.

- ``features=text`` (UniSRec's variant, KDD '22): f = relu(W e + b), e the frozen backbone's vector
  of the item's text.
- ``features=[brand, category]``: f_k is the mean of the embeddings of field k's values, and
  f = sum_k softmax_k(v . relu(A f_k + b)) f_k, as in RecBole. ``separator`` is what stands between
  the values of a field.

Deviations:

- The loss is the full softmax, as in RecBole; the paper has the binary cross-entropy with one
  sampled negative a position.
- Each encoder has positions and norms of its own; RecBole has one LN for inputs and output.
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
from l2rec.modules.encoder import SequenceEncoder, check_heads, initialize
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.item_table import ItemTable
from l2rec.modules.sequences import (
    as_index,
    evaluating,
    newest_state,
    next_item_batches,
    pad,
)
from l2rec.protocols import Stage, UserEncoder, decayed


class FDSAConfig(BaseModel):
    """Options of FDSA."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    """Width of item vectors and states."""
    layers: int = Field(2, ge=1)
    """Transformer layers of each of the two encoders."""
    heads: int = Field(2, ge=1)
    """Attention heads; they divide ``dim``."""
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of the embedded inputs and of what each layer adds."""
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of attention weights."""
    features: Literal["text"] | tuple[str, ...] = "text"
    """``text`` for the items' texts, or names of catalog fields."""
    separator: str = Field(" ", min_length=1)
    """Text between the values of a field."""
    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""

    @model_validator(mode="after")
    def _consistent(self) -> FDSAConfig:
        check_heads(self.dim, self.heads)
        if not self.features:
            raise ValueError("features=[] leaves nothing to read; name fields, or set text")
        return self


class TextFeatures(nn.Module):
    """Features relu(W e + b) of frozen text vectors e."""

    def __init__(self, text: FrozenText, dim: int) -> None:
        super().__init__()
        self.text = text
        self.linear = nn.Linear(text.vectors.shape[1], dim)
        self.linear.apply(initialize)

    def forward(self, items: npt.NDArray[np.integer]) -> Tensor:
        """Compute f of catalog ints [n]: [n, h]."""
        rows = as_index(items, self.text.vectors.device)
        return F.relu(self.linear(self.text(rows)))


class FieldFeatures(nn.Module):
    """Features by additive attention over the fields of an item.

    A field without a value is a zero vector.

    Args:
        fields: for each field, its text in each of the N items.
        separator: text between the values of a field.
        dim: h, width of values and features.
    """

    def __init__(self, fields: Sequence[Sequence[str]], separator: str, dim: int) -> None:
        super().__init__()
        self.fields = len(fields)
        rows = [
            [(field, value.strip()) for value in text.split(separator) if value.strip()]
            for texts in zip(*fields, strict=True)
            for field, text in enumerate(texts)
        ]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(chain(*rows)))}
        self.values = Ragged.from_rows([[numbers[value] for value in row] for row in rows])
        """Rows of value ints; row ``item * fields + field`` has the values of one field."""
        self.table = nn.Embedding(len(numbers), dim)
        self.hidden = nn.Linear(dim, dim)
        self.weigh = nn.Linear(dim, 1, bias=False)
        self.apply(initialize)

    def forward(self, items: npt.NDArray[np.integer]) -> Tensor:
        """Compute f of catalog ints [n]: [n, h]."""
        device = self.table.weight.device
        rows = items.astype(np.int64)[:, None] * self.fields + np.arange(self.fields)
        values = self.values.take(rows.reshape(-1))
        pooled = F.embedding_bag(
            as_index(values.values, device),
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
            SequenceEncoder.from_config(config, dim=config.dim) for _ in range(2)
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
        """Encode rows of at most ``max_items`` items: u [B, T, h], which are real [B, T]."""
        items, real = pad(histories, self.items.weight.device)
        embedded = self.items(items)
        features = torch.zeros_like(embedded)
        features[real] = self.features(histories.values)
        states = self.item_encoder(embedded, real), self.feature_encoder(features, real)
        return self._joined(*states), real

    def _joined(self, items: Tensor, features: Tensor) -> Tensor:
        """Join the states of both encoders [B, T, h] to u [B, T, h]."""
        users: Tensor = self.dropout(self.norm(self.join(torch.cat((items, features), -1))))
        return users

    def user_encoder(self) -> UserEncoder:
        """Return u after the newest items as a function of rows of [E; f]: [N, 2 h]."""
        with evaluating(self):
            features = self.features(np.arange(self.n_items))

        def users(x: Tensor, real: Tensor) -> Tensor:
            items, features = x.chunk(2, -1)
            states = (
                self.item_encoder.whole(items, real),
                self.feature_encoder.whole(features, real),
            )
            return self._joined(*states)

        items = self.items.weight.detach()
        return newest_state(torch.cat((items, features), 1), users, self.config.max_items)

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
