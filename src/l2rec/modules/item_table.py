"""Base of methods whose items are rows of a table and whose users are states after a history."""

from __future__ import annotations

__all__ = ["ItemTable"]

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.ragged import Ragged
from l2rec.modules.encoder import computed_positions
from l2rec.modules.objectives import fused_catalog_loss
from l2rec.modules.sequences import as_index, catalog_rows, encode_rows, last_of
from l2rec.protocols import Losses, Scorer, inner_product_scorer


class ItemTable(nn.Module):
    """Recommender with scores r_{t,i} = h_t . E[i].

    E is the weight of ``items``. h_t are states of `forward`, which a method defines: rows of at
    most ``config.max_items`` items -> states [B, T, h], and which positions are real [B, T] bool.
    """

    config: Any
    items: nn.Embedding

    @property
    def n_items(self) -> int:
        """N, number of catalog items."""
        return self.items.num_embeddings

    def dropped(self, rate: float) -> Tensor:
        """Return E [N, h], in training with dropout: one draw for inputs and scored items alike."""
        weight: Tensor = self.items.weight
        return F.dropout(weight, rate) if rate and self.training else weight

    def next_item_loss(
        self,
        batch: Batch,
        sampled: Callable[[Tensor, Tensor], Tensor] | None = None,
        table: Tensor | None = None,
    ) -> Losses:
        """Compute the loss of every position's next item, mean over the batch.

        Args:
            batch: rows with a target at every position.
            sampled: loss of states [P, h] with their next items [P]; by default the cross-entropy
                over the whole catalog.
            table: [N, h], replaces E in `forward`, which then takes it, and in the cross-entropy.
        """
        states, real = self(batch.histories) if table is None else self(batch.histories, table)
        users = states[real]  # [P, h], in the order of the flat histories and targets
        targets = as_index(batch.targets, users.device)
        if sampled is None:
            items = self.items.weight if table is None else table
            total = fused_catalog_loss(users, items, targets)
        else:
            total = sampled(users, targets)
        return Losses(total, {"rec": total.detach()}, len(users), computed_positions(real))

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return user vectors [B, h] float32, the states after the newest items.

        Raises:
            DataError: an empty history.
        """
        return encode_rows(
            self, histories, lambda rows: last_of(*self(rows)), max_items=self.config.max_items
        )

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return item vectors [n, h] float32 of catalog ints.

        Raises:
            DataError: raw texts, which such a method cannot read.
        """
        rows = catalog_rows(items, type(self).__name__, self.items.weight.device)
        return self.items.weight.detach()[rows]

    def scorer(self) -> Scorer:
        """Return a scorer: histories of B users -> scores [B, N] float32."""
        return inner_product_scorer(self)
