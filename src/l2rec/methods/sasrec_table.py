"""SASRec over the item table of L2Rec: what the table and the skip are worth without a language
model on the side of the user.

    T   = norm(E + E L + R)                           l2rec.modules.text_table
    x_t = LN(sqrt(D) T[i_t] + P[t])                   items and positions
    h   = causal Transformer(x), trained from nothing l2rec.modules.encoder
    u_t = norm(h_t / (2 |h_t|) + s T[i_t])            the newest item beside the state, s from 1
    r_{t,i} = u_t . T[i] / tau

The rival that L2Rec with ``items=table`` has to beat: the same table, the same skip, the full
softmax at every position and the same temperature, but a small Transformer of its own in place of
the adapted backbone. Not a published method: SASRec is Kang, McAuley, ICDM '18.
"""

from __future__ import annotations

__all__ = ["SASRecTable", "SASRecTableConfig"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import ConfigError
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, computed_positions
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.objectives import fused_catalog_loss
from l2rec.modules.sequences import encode_rows, last_of, next_item_batches, pad
from l2rec.modules.text_table import TextTable
from l2rec.protocols import Losses, ParameterGroup, Scorer, Stage, decayed


class SASRecTableConfig(BaseModel):
    """Options of SASRecTable; those of the encoder are SASRec's, those of the table L2Rec's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    temperature: float = Field(0.07, gt=0)
    table_dropout: float = Field(0.2, ge=0, lt=1)
    text_dropout: float = Field(0.0, ge=0, lt=1)
    table_lr: float = Field(2e-4, gt=0)
    """Of R, whose rows are seen rarely."""


class SASRecTable(nn.Module):
    """The recommender. Users and items are unit vectors [D]; scores are their cosines.

    Args:
        config: options. catalog: the items' texts. backbone: reads texts, and is not trained.
        cache: folder for text vectors, keyed by content; None keeps nothing.

    Raises:
        ConfigError: ``heads`` does not divide the backbone's width.
    """

    Config = SASRecTableConfig
    uses_backbone = True
    item_tensors = frozenset({"table.residual", "table.mean", "table.held"})

    def __init__(
        self,
        config: SASRecTableConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        if backbone.dim % config.heads:
            raise ConfigError(f"heads={config.heads} does not divide the width {backbone.dim}")
        self.config = config
        self.batches = next_item_batches(len(catalog), config.max_items)
        texts = catalog.require_texts("SASRecTable")
        self.text = FrozenText(backbone, texts, max_tokens=config.text_tokens, cache=cache)
        self.cached = self.text.files
        """Cache entries this model was built from."""
        self.table = TextTable(self.text.vectors, config.table_dropout, config.text_dropout)
        self.encoder = SequenceEncoder(
            backbone.dim,
            layers=config.layers,
            heads=config.heads,
            inner=config.inner,
            max_items=config.max_items,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )
        self.skip = nn.Parameter(torch.tensor(1.0))

    @property
    def n_items(self) -> int:
        """N, items of the catalog, those added later included."""
        return len(self.text)

    def forward(self, histories: Ragged, table: Tensor) -> tuple[Tensor, Tensor]:
        """Unit user vectors [B, T, D] at every position, and which are real [B, T]."""
        items, real = pad(histories, table.device)
        rows = table[items]
        states = self.encoder(rows * table.shape[-1] ** 0.5, real)
        beside = 0.5 * F.normalize(states, dim=-1) + self.skip * rows
        return F.normalize(beside, dim=-1), real

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """One stage; the free residual of the table has a learning rate of its own."""
        residual = self.table.residual
        rest = [p for p in self.parameters() if p is not residual]
        slow = ParameterGroup("table", [residual], self.config.table_lr, 0.0)
        groups = [*decayed(rest, lr, weight_decay), slow]
        return [Stage("train", groups, self.batches, self.loss)]

    def loss(self, batch: Batch) -> Losses:
        """Full softmax over the catalog, mean over all positions of the batch."""
        table = self.table()
        users, real = self(batch.histories, table)
        targets = torch.from_numpy(batch.targets.astype(np.int64)).to(table.device)
        total = fused_catalog_loss(
            users[real] / self.config.temperature, table, targets, dtype=self.text.dtype
        )
        return Losses(total, {"rec": total.detach()}, len(targets), computed_positions(real))

    def calibrate(
        self, sequences: Ragged, histories: Ragged, targets: npt.NDArray[np.integer]
    ) -> None:
        """Tell the table which items training holds."""
        self.table.restrict(sequences.values)

    # -- inference -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _items(self) -> Tensor:
        """T [N, D] in evaluation mode."""
        training = self.training
        self.eval()
        table: Tensor = self.table()
        self.train(training)
        return table

    def _users(self, histories: Ragged, table: Tensor) -> Tensor:
        return encode_rows(
            self,
            histories,
            lambda rows: last_of(*self(rows, table)),
            max_items=self.config.max_items,
        )

    def encode_users(self, histories: Ragged) -> Tensor:
        """Unit vectors [B, D] float32."""
        return self._users(histories, self._items())

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Unit vectors [n, D] float32, of catalog ints or of raw texts."""
        if len(items) and isinstance(items[0], str):
            with self.text.borrowed([str(text) for text in items]) as borrowed:
                rows = torch.from_numpy(borrowed.astype(np.int64))
                with torch.inference_mode():
                    return self.table.of_text(self.text(rows.to(self.text.vectors.device)))
        table = self._items()
        return table[torch.from_numpy(np.asarray(items, dtype=np.int64)).to(table.device)]

    def scorer(self) -> Scorer:
        """Histories -> cosines [B, N] float32. The table is computed once."""
        table = self._items()
        return lambda histories: self._users(histories, table) @ table.T

    def freeze(self) -> None:
        """For a model that is only used from here on: the table is computed once."""
        self.eval()
        self.table.keep()

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """New items by text alone, recommendable at once. Returns their item ints.

        Raises:
            DataError: an empty text.
        """
        added = self.text.add(texts)
        self.table.extend(self.text.vectors[int(added[0]) :])
        return added
