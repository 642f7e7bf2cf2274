"""eSASRec: Enhancing Transformer-based Recommendations in a Modular Fashion.

Tikhonovich, Zelinskiy, Petrov, Spirina, Semenov, Savchenko, Kuliev. RecSys '25,
https://arxiv.org/abs/2508.06450; the layers are LiGR's, Borisyuk et al.,
https://arxiv.org/abs/2502.03417

    x_t     = E[i_t] + P[t]
    x       <- x + sigmoid(G x) * attention(LN(x))      causal
    x       <- x + sigmoid(G' x) * swiglu(LN(x))        swiglu(y) = W3 (silu(W1 y) * W2 y)
    r_{t,i} = x_t . E[i]                                score of item i after position t

As in SASRec every position predicts its next item, under a softmax over that item and
``negatives`` sampled ones. Defaults are the paper's for its smaller Amazon data. Choices and
deviations:

- All positions of a batch share their negatives, so that scores are one product of matrices;
  ``share_negatives=false`` draws for each position, as the authors do.
- A negative that is the position's next item does not count.
- All embeddings start at N(0, 0.02); under the authors' Xavier start the few positions are many
  times larger than the many items and drown them.
- Positions count from the oldest item of a row; the authors count from the newest
  (``from_newest=true``), which in training tells a position how many items are still to come.
- Item vectors have no dropout of their own; the authors' have, as inputs and where they are scored
  (``item_dropout=0.2``). With both, and many shared negatives, the scores on Beauty are those of
  ``recipes/beauty/esasrec.yaml``.

Options beyond the defaults: ``in_batch`` draws a share of the negatives from the next items of the
batch; ``logq`` corrects scores by log Q, the probability of being drawn (Bengio, Senécal. 2008);
``loss=ce`` is the full softmax.
"""

from __future__ import annotations

__all__ = ["ESASRec", "ESASRecConfig", "LiGRLayer"]

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import (
    causal_mask,
    check_heads,
    in_length_groups,
    places,
    self_attention,
)
from l2rec.modules.item_table import ItemTable
from l2rec.modules.losses import negative_scores, sampled_softmax_loss
from l2rec.modules.sequences import newest_state, pad, sequence_batches
from l2rec.protocols import Losses, Stage, UserEncoder, decayed


class ESASRecConfig(BaseModel):
    """Options of eSASRec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    """Width of item vectors and states."""
    layers: int = Field(1, ge=1)
    """Transformer layers."""
    heads: int = Field(1, ge=1)
    """Attention heads; they divide ``dim``."""
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout rate of embedded inputs, attention weights and what the layers add."""
    loss: Literal["sampled", "ce"] = "sampled"
    """Softmax over sampled items, or over the whole catalog."""
    negatives: int = Field(256, ge=1)
    """Sampled items, of a batch or of a position."""
    share_negatives: bool = True
    """One draw of negatives for a batch, instead of one for each position."""
    in_batch: float = Field(0.0, ge=0, le=1)
    """Share of negatives that are next items of the batch; the others are uniform."""
    from_newest: bool = False
    """Positions count from the newest item of a row."""
    item_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate of item vectors, those of inputs and of scored items alike."""
    logq: bool = False
    """Correction of scores for how often an item is drawn; it needs ``in_batch``."""

    @model_validator(mode="after")
    def _consistent(self) -> ESASRecConfig:
        check_heads(self.dim, self.heads)
        if self.logq and not self.in_batch:
            raise ValueError("logq=true changes nothing for uniform negatives; set in_batch too")
        return self


class LiGRLayer(nn.Module):
    """LiGR layer: pre-norm attention and SwiGLU, each through a gate that reads its input."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.inner = nn.Linear(dim, 2 * inner, bias=False)
        self.outer = nn.Linear(inner, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Apply the layer to x [B, T, h]; hidden: [1, 1, T, T] bool, True where not to look."""
        x = x + self.gates[0](x).sigmoid() * self.dropout(self._attend(self.norms[0](x), hidden))
        out: Tensor = x + self.gates[1](x).sigmoid() * self.dropout(self._feed(self.norms[1](x)))
        return out

    def _attend(self, x: Tensor, hidden: Tensor) -> Tensor:
        dropout = self.dropout.p if self.training else 0.0
        out: Tensor = self.out(self_attention(self.qkv(x), self.heads, hidden, dropout))
        return out

    def _feed(self, x: Tensor) -> Tensor:
        gate, value = self.inner(x).chunk(2, dim=-1)
        out: Tensor = self.outer(self.dropout(F.silu(gate) * value))
        return out


class ESASRec(ItemTable):
    """The recommender. A user is the state after the newest item, an item its embedding."""

    Config = ESASRecConfig
    uses_backbone = False
    item_tensors = frozenset({"items.weight"})

    def __init__(
        self,
        config: ESASRecConfig,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(len(catalog), config.dim)
        self.positions = nn.Embedding(config.max_items, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            LiGRLayer(config.dim, config.heads, config.inner, config.dropout)
            for _ in range(config.layers)
        )
        for parameter in self.layers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_normal_(parameter)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.log_q: Tensor
        self.register_buffer("log_q", torch.zeros(len(catalog)), persistent=False)

    def forward(self, histories: Ragged, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode rows of at most ``max_items`` items: states [B, T, h], which are real [B, T].

        Padding is on the right, where no real position looks. table: [N, h], replaces E.
        """
        items, real = pad(histories, self.items.weight.device)
        vectors = F.embedding(items, self.items.weight if table is None else table)
        return in_length_groups(self._read, self._placed(vectors, real), real), real

    def _placed(self, vectors: Tensor, real: Tensor) -> Tensor:
        """Add positions to item vectors: [B, T, h]."""
        at = places(real, from_newest=self.config.from_newest)
        placed: Tensor = self.dropout(vectors + self.positions(at))
        return placed

    def _read(self, x: Tensor, real: Tensor) -> Tensor:
        hidden = causal_mask(real.shape[1], real.device)
        for layer in self.layers:
            x = layer(x, hidden)
        return x

    def user_encoder(self) -> UserEncoder:
        """Return the states after the newest items as a function of rows of E."""
        return newest_state(
            self.items.weight.detach(),
            lambda x, real: self._read(self._placed(x, real), real),
            self.config.max_items,
        )

    # -- training --------------------------------------------------------------------------------

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return batches in which every next item of every sequence is a target once an epoch."""
        if self.config.logq:
            self.log_q.copy_(self._odds(sequences).log())
        return sequence_batches(
            sequences,
            supervision="all",
            n_items=self.n_items,
            max_items=self.config.max_items,
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
        """Compute the next-item loss, mean over all positions of the batch."""
        table = self.dropped(self.config.item_dropout)
        sampled = partial(self._sampled, table=table)
        return self.next_item_loss(batch, None if self.config.loss == "ce" else sampled, table)

    def _sampled(self, users: Tensor, targets: Tensor, table: Tensor) -> Tensor:
        """Compute the sampled softmax of states [P, h] and their next items [P]."""
        drawn = self._negatives(targets)
        positive = (users * F.embedding(targets, table)).sum(-1)
        negative = negative_scores(users, table, drawn)
        if self.config.logq:
            positive, negative = positive - self.log_q[targets], negative - self.log_q[drawn]
        return sampled_softmax_loss(
            positive, negative.masked_fill(drawn == targets[:, None], float("-inf"))
        )

    def _negatives(self, targets: Tensor) -> Tensor:
        """Draw negatives: [k] for all of the targets [P] together, or [P, k]."""
        k, device = self.config.negatives, targets.device
        shape = (k,) if self.config.share_negatives else (len(targets), k)
        uniform = torch.randint(self.n_items, shape, device=device)
        of_batch = targets[torch.randint(len(targets), shape, device=device)]
        return torch.where(
            torch.arange(k, device=device) < round(self.config.in_batch * k), of_batch, uniform
        )

    def _odds(self, sequences: Ragged) -> Tensor:
        """Compute Q [N], the probability that a draw is an item, in training on ``sequences``."""
        counts = np.bincount(sequences.values, minlength=self.n_items)
        share = self.config.in_batch
        odds = share * counts / counts.sum() + (1 - share) / self.n_items
        return torch.from_numpy(np.maximum(odds, np.finfo(np.float32).tiny))
