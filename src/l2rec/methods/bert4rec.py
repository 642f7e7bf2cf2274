"""BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations.

Sun, Liu, Wu, Pei, Lin, Ou, Jiang. CIKM '19, https://arxiv.org/abs/1904.06690

    x_t     = LN(E[i_t] + P[t])                         E[mask] for a hidden item
    h       = bidirectional Transformer(x)              l2rec.modules.encoder
    r_{t,i} = LN(gelu(W h_t + b)) . E[i] + b_i          score of item i at the hidden position t

Training hides items of a sequence and asks for them; a user is asked for the item hidden right
after the history. Cross-entropy over the whole catalog, mean over hidden positions.

Choices and deviations:

- Of a row of n items, max(1, round(``mask_ratio`` n)) are hidden; every hidden one is a target.
- In a share ``last_only`` of rows the newest item alone is hidden, as when recommending. The paper
  mixes such rows in; one in two is RecBole's share.
- A hidden item is always replaced by the mask, as in the paper; BERT keeps or swaps some.
- ``max_items`` is the longest history. A row holds one item more, the hidden one, so that no
  history loses an item to the mask.

It needs many epochs, as each asks for few of the items (Petrov, Macdonald. RecSys '22,
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
from l2rec.modules.encoder import SequenceEncoder, check_heads, computed_positions, initialize
from l2rec.modules.objectives import fused_catalog_loss
from l2rec.modules.sequences import catalog_rows, encode_rows, last_of, pad, sequence_batches
from l2rec.protocols import Losses, Scorer, Stage, UserEncoder, decayed, inner_product_scorer


class BERT4RecConfig(BaseModel):
    """Options of BERT4Rec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    """Width of item vectors and states."""
    layers: int = Field(2, ge=1)
    """Transformer layers."""
    heads: int = Field(2, ge=1)
    """Attention heads; they divide ``dim``."""
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout rate of the embedded inputs and of what each layer adds."""
    attention_dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout rate of attention weights."""
    mask_ratio: float = Field(0.2, gt=0, lt=1)
    """Share of a row's items that are hidden."""
    last_only: float = Field(0.5, ge=0, le=1)
    """Share of rows in which the newest item alone is hidden."""

    @model_validator(mode="after")
    def _consistent(self) -> BERT4RecConfig:
        check_heads(self.dim, self.heads)
        return self


class BERT4Rec(nn.Module):
    """The recommender. A user is the head's output at a mask after the newest item, with a one
    appended; an item is its embedding, with its bias appended.
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
        self.encoder = SequenceEncoder.from_config(
            config, dim=config.dim, max_items=config.max_items + 1, causal=False
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
        """Compute the head's outputs [M, h] at the M hidden positions, row by row.

        Args:
            items: [B, T] int64; not read where a position is hidden or not real.
            real, hidden: [B, T] bool.
        """
        x = torch.where(hidden[..., None], self.mask, self.items(items))
        out: Tensor = self.head(self.encoder(x, real)[hidden])
        return out

    # -- training --------------------------------------------------------------------------------

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return whole training sequences; `loss` draws the items to hide."""
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
        """Compute the cross-entropy of the hidden items, mean over the batch."""
        items, real = pad(batch.histories, self.items.weight.device)
        hidden = self.hide(real)
        outputs = F.pad(self(items, real, hidden), (0, 1), value=1.0)  # 1 meets an item's bias
        total = fused_catalog_loss(outputs, self._rows(), items[hidden])
        return Losses(total, {"rec": total.detach()}, int(real.sum()), computed_positions(real))

    def hide(self, real: Tensor) -> Tensor:
        """Draw the positions to hide [B, T] bool: real ones, at least one of each row."""
        device, lengths = real.device, real.sum(1)
        wanted = (self.config.mask_ratio * lengths).round().clamp(min=1)
        noise = torch.rand(real.shape, device=device).masked_fill(~real, 2.0)
        drawn = noise.argsort(1).argsort(1) < wanted[:, None]
        newest = torch.arange(real.shape[1], device=device) == lengths[:, None] - 1
        alone = torch.rand(len(real), 1, device=device) < self.config.last_only
        return torch.where(alone, newest, drawn)

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return user vectors [B, h + 1] float32.

        Raises:
            DataError: an empty history.
        """
        return encode_rows(self, histories, self._next, max_items=self.config.max_items)

    def _next(self, rows: Ragged) -> Tensor:
        """Compute the user vectors [B, h + 1] of rows, at a mask right after each row."""
        items, real = pad(rows, self.items.weight.device)
        x, longer = self._asked(self.items(items), real)
        return self._answers(self.encoder(x, longer), longer)

    def _asked(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Put a mask right after each row: [B, T, h], [B, T] -> [B, T + 1, h], [B, T + 1]."""
        longer = F.pad(real, (1, 0), value=True)
        mask = longer & ~F.pad(real, (0, 1))
        return torch.where(mask[..., None], self.mask, F.pad(x, (0, 0, 0, 1))), longer

    def _answers(self, states: Tensor, real: Tensor) -> Tensor:
        """Return user vectors [B, h + 1] by the states of `_asked` rows; 1 meets an item's bias."""
        return F.pad(self.head(last_of(states, real)), (0, 1), value=1.0)

    def user_encoder(self) -> UserEncoder:
        """Return the outputs at a mask after each row as a function of rows of E."""

        def encode(x: Tensor, real: Tensor) -> Tensor:
            x, longer = self._asked(x, real)
            return self._answers(self.encoder.whole(x, longer), longer)

        return UserEncoder(self.items.weight.detach(), encode, self.config.max_items)

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return item vectors [n, h + 1] float32 of catalog ints.

        Raises:
            DataError: raw texts, which BERT4Rec cannot read.
        """
        rows = catalog_rows(items, "BERT4Rec", self.items.weight.device)
        return self._rows().detach()[rows]

    def _rows(self) -> Tensor:
        """Return the rows of E with their biases, [N, h + 1]."""
        return torch.cat((self.items.weight, self.bias[:, None]), 1)

    def scorer(self) -> Scorer:
        return inner_product_scorer(self)
