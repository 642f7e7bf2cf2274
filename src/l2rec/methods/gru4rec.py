"""GRU4Rec: Session-based Recommendations with Recurrent Neural Networks.

Hidasi, Karatzoglou, Baltrunas, Tikk. ICLR '16, https://arxiv.org/abs/1511.06939
Losses with more samples: Hidasi, Karatzoglou. CIKM '18, https://arxiv.org/abs/1706.03847

    h_t     = GRU(dropout(E[i_t]), h_{t-1})
    u_t     = W h_t
    r_{t,i} = u_t . E[i]                            score of item i after position t

Deviations, in the defaults those of RecBole, which most papers compare with:

- Every position of a row predicts its next item; the paper walks through sessions in parallel, with
  the same targets.
- Items have embeddings, which also score (the paper: one-hot inputs and an output layer); one
  layer of 128 without biases.
- The loss is the full softmax. The papers' losses are options. Their negatives are the next items
  of other examples of the batch, so that an item is drawn as often as it is bought; here
  ``negatives`` of them are shared by the batch, and a position's next item does not count.

    bpr       -mean_j log sigmoid(r+ - r_j)
    top1      mean_j sigmoid(r_j - r+) + sigmoid(r_j^2)
    bpr-max   -log sum_j s_j sigmoid(r+ - r_j) + penalty sum_j s_j r_j^2,   s = softmax_j(r_j)
"""

from __future__ import annotations

__all__ = ["GRU4Rec", "GRU4RecConfig", "ranking_loss"]

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import in_length_groups
from l2rec.modules.item_table import ItemTable
from l2rec.modules.sequences import newest_state, next_item_batches, pad
from l2rec.protocols import Losses, Stage, UserEncoder, decayed

Loss = Literal["ce", "bpr", "top1", "bpr-max"]


class GRU4RecConfig(BaseModel):
    """Options of GRU4Rec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    """Width of item embeddings."""
    hidden: int = Field(128, ge=1)
    """Width of the recurrent state."""
    layers: int = Field(1, ge=1)
    """Recurrent layers."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    dropout: float = Field(0.3, ge=0, lt=1)
    """Dropout rate of the embedded inputs."""
    loss: Loss = "ce"
    """Full softmax, or one of the papers' losses."""
    negatives: int = Field(128, ge=1)
    """Next items drawn from the batch for a loss other than ``ce``."""
    penalty: float = Field(1.0, ge=0)
    """Weight of the penalty on large scores of negatives, for ``loss=bpr-max``."""


class GRU4Rec(ItemTable):
    """The recommender. A user is the state after the newest item, an item its embedding."""

    Config = GRU4RecConfig
    uses_backbone = False
    item_tensors = frozenset({"items.weight"})

    def __init__(
        self,
        config: GRU4RecConfig,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.batches = next_item_batches(len(catalog), config.max_items)
        self.items = nn.Embedding(len(catalog), config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(config.dim, config.hidden, config.layers, bias=False, batch_first=True)
        self.out = nn.Linear(config.hidden, config.dim)
        nn.init.xavier_normal_(self.items.weight)
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, histories: Ragged) -> tuple[Tensor, Tensor]:
        """Encode rows of at most ``max_items`` items: u [B, T, dim], which are real [B, T].

        Padding is on the right, after all that a real position has read.
        """
        items, real = pad(histories, self.items.weight.device)
        x = self.dropout(self.items(items))
        return self.out(in_length_groups(lambda part, _: self.gru(part)[0], x, real)), real

    def user_encoder(self) -> UserEncoder:
        """Return the states after the newest items as a function of rows of E."""
        return newest_state(
            self.items.weight.detach(),
            lambda x, _: self.out(self.gru(self.dropout(x))[0]),
            self.config.max_items,
        )

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        return [
            Stage("train", decayed(self.parameters(), lr, weight_decay), self.batches, self.loss)
        ]

    def loss(self, batch: Batch) -> Losses:
        """Compute the next-item loss, mean over all positions of the batch."""
        return self.next_item_loss(batch, None if self.config.loss == "ce" else self._sampled)

    def _sampled(self, users: Tensor, targets: Tensor) -> Tensor:
        """Compute one of the papers' losses for states [P, dim] and their next items [P]."""
        assert self.config.loss != "ce"
        drawn = targets[torch.randint(len(targets), (self.config.negatives,))]
        return ranking_loss(
            self.config.loss,
            (users * self.items(targets)).sum(-1),
            users @ self.items(drawn).T,
            drawn != targets[:, None],
            self.config.penalty,
        )


def ranking_loss(
    kind: Literal["bpr", "top1", "bpr-max"],
    positive: Tensor,
    negative: Tensor,
    counts: Tensor,
    penalty: float,
) -> Tensor:
    """Compute a loss of the papers, mean over rows; a row without negatives adds zero.

    Args:
        kind: which of them.
        positive: [P] scores of the next items.
        negative: [P, k] scores of the negatives.
        counts: [P, k] bool, False where a negative is the row's next item.
        penalty: weight of the negatives' squared scores, for ``bpr-max``.
    """
    ahead = positive[:, None] - negative
    if kind == "bpr-max":
        lowest = torch.finfo(negative.dtype).min
        share = negative.masked_fill(~counts, lowest).softmax(1) * counts
        beaten = (share * ahead.sigmoid()).sum(1)
        lost = penalty * (share * negative.square()).sum(1) - (beaten + 1e-24).log()
        return (lost * counts.any(1)).mean()
    each = (
        -F.logsigmoid(ahead) if kind == "bpr" else (-ahead).sigmoid() + negative.square().sigmoid()
    )
    return ((each * counts).sum(1) / counts.sum(1).clamp(min=1)).mean()
