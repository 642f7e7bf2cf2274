"""SASRec: Self-Attentive Sequential Recommendation.

Kang, McAuley. ICDM '18, https://arxiv.org/abs/1808.09781

    x_t = LN(E[i_t] + P[t])                         item and position embeddings
    h   = causal Transformer(x)                     l2rec.modules.encoder
    r_{t,i} = h_t . E[i]                            score of item i after position t

Every position predicts its next item. Deviations from the paper, all of them RecBole's, which most
papers compare with:

- Blocks are post-norm and feed forward through GELU; the paper's are pre-norm with ReLU.
- The loss is the full softmax. ``loss=bce`` is the paper's binary cross-entropy with one sampled
  negative a position, ``loss=sampled`` a softmax over the next item and ``negatives`` sampled ones.
  (With equal losses SASRec beats BERT4Rec: Klenitskiy, Vasilev, RecSys '23.)

``from_newest`` and ``item_dropout`` are RecTools' (as in Tikhonovich et al., RecSys '25).
"""

from __future__ import annotations

__all__ = ["SASRec", "SASRecConfig"]

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, check_heads, initialize
from l2rec.modules.item_table import ItemTable
from l2rec.modules.losses import binary_loss, negative_scores, sampled_softmax_loss
from l2rec.modules.sequences import newest_state, next_item_batches, pad
from l2rec.protocols import EpochBatches, Losses, Stage, UserEncoder, decayed


class SASRecConfig(BaseModel):
    """Options of SASRec."""

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
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of the embedded inputs and of what each layer adds."""
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of attention weights."""
    loss: Literal["ce", "bce", "sampled"] = "ce"
    """Full softmax, binary cross-entropy, or softmax over sampled items."""
    negatives: int = Field(1, ge=1)
    """Sampled negatives of a position, for ``loss=bce`` and ``loss=sampled``."""
    share_negatives: bool = False
    """One draw of negatives for a batch, instead of one for each position."""
    from_newest: bool = False
    """Positions count from the newest item of a row."""
    item_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate of item vectors, those of inputs and of scored items alike."""

    @model_validator(mode="after")
    def _consistent(self) -> SASRecConfig:
        check_heads(self.dim, self.heads)
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
        self.encoder = SequenceEncoder.from_config(
            config, dim=config.dim, from_newest=config.from_newest
        )

    def forward(self, histories: Ragged, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode rows of at most ``max_items`` items: states [B, T, h], which are real [B, T].

        table: [N, h], replaces E.
        """
        items, real = pad(histories, self.items.weight.device)
        vectors = F.embedding(items, self.items.weight if table is None else table)
        return self.encoder(vectors, real), real

    def user_encoder(self) -> UserEncoder:
        """Return the states after the newest items as a function of rows of E."""
        return newest_state(self.items.weight.detach(), self.encoder.whole, self.config.max_items)

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        return [
            Stage("train", decayed(self.parameters(), lr, weight_decay), self.batches, self.loss)
        ]

    def for_vectors(self, lr: float, epochs: int) -> Stage:
        """Return a stage of a method that only wants the item vectors, with batches and a patience
        for SASRec, whatever those of the method are.
        """

        def batches(
            sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
        ) -> EpochBatches:
            del batch_users, batch_tokens
            return self.batches(
                sequences, seed=seed, epoch=epoch, batch_users=1024, batch_tokens=16384
            )

        return Stage(
            "SASRec, for its item vectors",
            decayed(self.parameters(), lr, 0.0),
            batches,
            self.loss,
            validates=self,
            epochs=epochs,
            patience=10,
            eval_every=1.0,
        )

    def loss(self, batch: Batch) -> Losses:
        """Compute the next-item loss, mean over all positions of the batch."""
        table = self.dropped(self.config.item_dropout)
        sampled = partial(self._sampled, table=table)
        return self.next_item_loss(batch, None if self.config.loss == "ce" else sampled, table)

    def _sampled(self, users: Tensor, targets: Tensor, table: Tensor) -> Tensor:
        """Compute ``bce`` or ``sampled`` for states [P, h] and their next items [P].

        Negatives are uniform over the catalog; a position's next item is none of its negatives.
        """
        k = self.config.negatives
        shape = (k,) if self.config.share_negatives else (len(users), k)
        drawn = torch.randint(self.n_items, shape, device=users.device)
        positive = (users * F.embedding(targets, table)).sum(-1)
        negative = negative_scores(users, table, drawn)
        negative = negative.masked_fill(drawn == targets[:, None], float("-inf"))
        loss = binary_loss if self.config.loss == "bce" else sampled_softmax_loss
        return loss(positive, negative)
