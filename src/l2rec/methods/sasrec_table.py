"""SASRec over a table of items that starts at their texts: no language model on the user's side.

    T   = norm(E + E L + R)                           l2rec.modules.text_table
    x_t = LN(sqrt(D) T[i_t] + P[t])                   items and positions
    h   = causal Transformer(x), from random weights  l2rec.modules.encoder
    u_t = norm(h_t / (2 |h_t|) + s T[i_t])            the newest item added (skip); s starts at 1
    r_{t,i} = u_t . T[i] / tau

It shows what texts, ids and the skip are worth by themselves, so L2Rec with ``form=catalog`` has to
beat it: the full softmax at every position, with a small Transformer in place of the adapted
backbone. Not a published method; SASRec is Kang, McAuley, ICDM '18.
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
from l2rec.modules.sequences import (
    as_index,
    encode_rows,
    evaluating,
    last_of,
    newest_state,
    next_item_batches,
    pad,
    raw_texts,
)
from l2rec.modules.text_table import TextTable
from l2rec.protocols import Losses, ParameterGroup, Scorer, Stage, UserEncoder, decayed


class SASRecTableConfig(BaseModel):
    """Options of SASRecTable; those of the encoder are SASRec's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""
    layers: int = Field(2, ge=1)
    """Transformer layers."""
    heads: int = Field(2, ge=1)
    """Attention heads; they divide the width of the backbone."""
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of the embedded inputs and of what each layer adds."""
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of attention weights."""
    temperature: float = Field(0.07, gt=0)
    """tau."""
    table_dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout rate of R in training."""
    text_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate of E in training."""
    table_lr: float = Field(2e-4, gt=0)
    """Learning rate of R, whose rows are rarely read."""


class SASRecTable(nn.Module):
    """The recommender. Users and items are unit vectors [D]; scores are their cosines.

    Args:
        config: options.
        catalog: items and their texts.
        backbone: language model that reads the texts; it is not trained.
        cache: folder for text vectors, keyed by content; None stores nothing.

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
        self.encoder = SequenceEncoder.from_config(config, dim=backbone.dim)
        self.skip = nn.Parameter(torch.tensor(1.0))

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.text_tokens

    @property
    def n_items(self) -> int:
        """N, number of items, with those added later."""
        return len(self.text)

    def forward(self, histories: Ragged, table: Tensor) -> tuple[Tensor, Tensor]:
        """Encode rows of at most ``max_items`` items: u [B, T, D], which are real [B, T].

        ``table``: T [N, D], computed once for many calls.
        """
        items, real = pad(histories, table.device)
        rows = table[items]
        return self._skipped(self.encoder(self._entered(rows), real), rows), real

    def _entered(self, rows: Tensor) -> Tensor:
        """Scale rows of T [B, T, D] to what the encoder reads."""
        entered: Tensor = rows * rows.shape[-1] ** 0.5
        return entered

    def _skipped(self, states: Tensor, rows: Tensor) -> Tensor:
        """Add rows of T to the encoder's states: u [B, T, D]."""
        users: Tensor = 0.5 * F.normalize(states, dim=-1) + self.skip * rows
        return F.normalize(users, dim=-1)

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return the one stage, in which the table's residual R has a learning rate of its own."""
        residual = self.table.residual
        assert residual is not None
        rest = [p for p in self.parameters() if p is not residual]
        table = ParameterGroup("table", [residual], self.config.table_lr, 0.0)
        groups = [*decayed(rest, lr, weight_decay), table]
        return [Stage("train", groups, self.batches, self.loss)]

    def loss(self, batch: Batch) -> Losses:
        """Compute the full softmax over the catalog, mean over all positions of the batch."""
        table = self.table()
        users, real = self(batch.histories, table)
        targets = as_index(batch.targets, table.device)
        total = fused_catalog_loss(
            users[real] / self.config.temperature, table, targets, dtype=self.text.dtype
        )
        return Losses(total, {"rec": total.detach()}, len(targets), computed_positions(real))

    def calibrate(
        self, sequences: Ragged, histories: Ragged, targets: npt.NDArray[np.integer]
    ) -> None:
        """Give the table the items of the training sequences: others have no residual."""
        self.table.restrict(sequences.values)

    # -- inference -------------------------------------------------------------------------------

    def _items(self) -> Tensor:
        """Compute T [N, D] in evaluation mode."""
        with evaluating(self):
            table: Tensor = self.table()
        return table

    def _users(self, histories: Ragged, table: Tensor) -> Tensor:
        """Encode histories [B] over T to unit vectors [B, D] float32."""
        return encode_rows(
            self,
            histories,
            lambda rows: last_of(*self(rows, table)),
            max_items=self.config.max_items,
        )

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return unit user vectors [B, D] float32.

        Raises:
            DataError: an empty history.
        """
        return self._users(histories, self._items())

    def user_encoder(self) -> UserEncoder:
        """Return u after the newest items as a function of rows of T."""

        def users(rows: Tensor, real: Tensor) -> Tensor:
            return self._skipped(self.encoder.whole(self._entered(rows), real), rows)

        return newest_state(self._items(), users, self.config.max_items)

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return unit item vectors [n, D] float32 of catalog ints or of raw texts."""
        texts = raw_texts(items)
        if texts is not None:
            with self.text.borrowed(texts) as borrowed, torch.inference_mode():
                rows = as_index(borrowed, self.text.vectors.device)
                return self.table.of_text(self.text(rows))
        table = self._items()
        return table[torch.from_numpy(np.asarray(items, dtype=np.int64)).to(table.device)]

    def scorer(self) -> Scorer:
        """Return a scorer: histories -> cosines [B, N] float32. The table is computed once."""
        table = self._items()
        return lambda histories: self._users(histories, table) @ table.T

    def freeze(self) -> None:
        """Compute the table once and for all, in a model that will not be trained further."""
        self.eval()
        self.table.keep()

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once, and return their item ints.

        Raises:
            DataError: an empty text.
        """
        added = self.text.add(texts)
        self.table.extend(self.text.vectors[int(added[0]) :])
        return added
