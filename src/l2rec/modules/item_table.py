"""What methods share whose items are rows of a table and whose users are states after a history."""

from __future__ import annotations

__all__ = ["ItemTable"]

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.batches import Batch
from l2rec.data.ragged import Ragged
from l2rec.modules.encoder import computed_positions
from l2rec.modules.objectives import catalog_loss
from l2rec.modules.sequences import catalog_rows, encode_rows, last_of
from l2rec.protocols import Losses, Scorer, inner_product_scorer


class ItemTable(nn.Module):
    """r_{t,i} = h_t . E[i], with E the weight of ``items`` and h the states that forward gives.

    forward: rows of at most ``config.max_items`` items -> states [B, T, h], and which are real.
    """

    config: Any
    items: nn.Embedding

    @property
    def n_items(self) -> int:
        """N, items of the catalog."""
        return self.items.num_embeddings

    def next_item_loss(self, batch: Batch) -> Losses:
        """Cross-entropy of the next item over the catalog, mean over all positions of the batch."""
        states, real = self(batch.histories)
        users = states[real]  # [P, h], in the order of the flat histories and targets
        targets = torch.from_numpy(batch.targets.astype(np.int64)).to(users.device)
        total = catalog_loss(users @ self.items.weight.T, targets)
        return Losses(total, {"rec": total.detach()}, len(users), computed_positions(real))

    def encode_users(self, histories: Ragged) -> Tensor:
        """[B, h] float32, the state after the newest item."""
        return encode_rows(
            self, histories, lambda rows: last_of(*self(rows)), max_items=self.config.max_items
        )

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """[n, h] float32, of catalog ints.

        Raises:
            DataError: raw texts, which such a method cannot read.
        """
        rows = catalog_rows(items, type(self).__name__, self.items.weight.device)
        return self.items.weight.detach()[rows]

    def scorer(self) -> Scorer:
        """Histories of B users -> [B, N] float32."""
        return inner_product_scorer(self)
