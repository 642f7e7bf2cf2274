"""LEARN: Knowledge Adaptation from Large Language Model to Recommendation.

Jia, Wang, Li, Chen, Bai, Liu, Zheng, Chen, Li, Gai. AAAI '25, https://arxiv.org/abs/2405.03988

    E^c_i   frozen language model's vector of item i's text         l2rec.modules.frozen_text
    PAL(.)  Linear d -> m, causal Transformer, Linear m -> out      l2rec.modules.encoder
    h       = PAL(history), a state after every item                the user tower
    t       = PAL(what the user did next)                           the item tower, variant a
    r_{h,t} = cos(h, t) / tau

Dense all action: a training sequence is cut at a random event; N_h states of the history and N_t of
what followed are sampled, newer ones more often, and each of the first is contrasted with each of
the second. Negatives are the sampled targets of other users:

    L = mean over users and pairs of -log e^{r_ht} / (e^{r_ht} + sum_{t' of others} e^{r_ht'})

A user is the newest state, an item the item tower's output for that item alone.

No code is public. Read from descriptions of the paper, or chosen here:

- Item towers: ``a`` the PAL of the user tower, causal over the target sequence (the paper's best);
  ``b`` the same PAL, each item alone; ``c`` E^c itself, to which the user tower then maps.
- Recency: the n-th oldest of a row is drawn with weight n, without replacement. The paper weights
  by a formula with alpha=10, beta=10000 that is not known here.
- A target of other users that the user acted on too is no negative.
- Rows are windows of at most ``max_items`` events. Each counts the same, however many pairs it has:
  otherwise the few users with long histories are most of the loss.
- The widths m and out, depth, dropout, tau.

``log_q`` is a named deviation, off by default. Targets of other users are drawn by popularity, so
in-batch softmax ranks by how much likelier an item is for this user than for anyone: where rankings
are judged by what was bought, that costs more than all else. With it, r - log q(t) is trained, and
r, which then holds the popularity too, is ranked (Yi et al., RecSys '19).
"""

from __future__ import annotations

__all__ = ["LEARN", "LEARNConfig", "dense_all_action_loss", "sample_recent"]

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

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
from l2rec.modules.encoder import SequenceEncoder, computed_positions, initialize
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.objectives import cosine
from l2rec.modules.sequences import encode_rows, last_of, pad, sequence_batches
from l2rec.protocols import Losses, Scorer, Stage, decayed, inner_product_scorer

ROWS = 128
"""Histories encoded together: few, so that rows of alike length waste little on padding."""


class LEARNConfig(BaseModel):
    """Options of LEARN."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""
    dim: int = Field(256, ge=1)
    """m, width of the Transformer."""
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    inner: int = Field(1024, ge=1)
    """Width of the feed-forward part."""
    out: int = Field(64, ge=1)
    """Width of user and item vectors; that of the texts with ``item_tower=c``."""
    max_items: int = Field(50, ge=2)
    dropout: float = Field(0.2, ge=0, lt=1)
    attention_dropout: float = Field(0.2, ge=0, lt=1)
    item_tower: Literal["a", "b", "c"] = "a"
    history_states: int = Field(10, ge=1)
    """N_h."""
    target_states: int = Field(10, ge=1)
    """N_t."""
    temperature: float = Field(0.07, gt=0)
    log_q: bool = False
    """Correct the loss for how often each item is a target."""

    @model_validator(mode="after")
    def _consistent(self) -> LEARNConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        return self


class LEARN(nn.Module):
    """The recommender. Users and items are unit vectors [out]; scores are their cosines.

    Args:
        config: options. catalog: the items' texts. backbone: reads texts, and is not trained.
        cache: folder for text vectors, keyed by content; None keeps nothing.
    """

    Config = LEARNConfig
    uses_backbone = True
    item_tensors: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        config: LEARNConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.text = FrozenText(
            backbone, catalog.require_texts("LEARN"), max_tokens=config.text_tokens, cache=cache
        )
        self.cached = self.text.files
        """Cache entries this model was built from."""
        self.enter = nn.Linear(backbone.dim, config.dim)
        self.encoder = SequenceEncoder(
            config.dim,
            layers=config.layers,
            heads=config.heads,
            inner=config.inner,
            max_items=config.max_items,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )
        self.leave = nn.Linear(config.dim, backbone.dim if config.item_tower == "c" else config.out)
        for linear in (self.enter, self.leave):
            linear.apply(initialize)
        self.register_buffer("log_share", torch.zeros(len(catalog)), persistent=False)
        self.log_share: Tensor
        """log q, of the training sequences."""

    @property
    def n_items(self) -> int:
        """N, items of the catalog, those added later included."""
        return len(self.text)

    def forward(self, rows: Ragged) -> tuple[Tensor, Tensor]:
        """PAL over rows of at most ``max_items`` items: [B, T, out], and which are real [B, T]."""
        items, real = pad(rows, self.text.vectors.device)
        states: Tensor = self.leave(self.encoder(self.enter(self.text(items)), real))
        return states, real

    def item_states(self, items: npt.NDArray[np.integer]) -> Tensor:
        """The item tower's output for each item alone: [n, out]."""
        if self.config.item_tower == "c":
            found: Tensor = self.text(torch.from_numpy(items.astype(np.int64)))
            return found
        states, _ = self(Ragged(items, np.arange(len(items) + 1)))
        alone: Tensor = states[:, 0]
        return alone

    # -- training --------------------------------------------------------------------------------

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Whole training sequences, in windows of ``max_items`` events and of at least two."""
        counts = torch.from_numpy(np.bincount(sequences.values, minlength=len(self.log_share)))
        self.log_share.copy_(counts.clamp(min=1).log() - np.log(max(1, len(sequences.values))))
        # The oldest event of a long sequence may be left alone in a window, with nothing to cut.
        alone = (sequences.lengths > 1) & (sequences.lengths % self.config.max_items == 1)
        lengths = sequences.lengths - alone
        return sequence_batches(
            sequences.gather(sequences.offsets[1:] - lengths, lengths),
            supervision="sequence",
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
        """Dense all action over every row, cut at random."""
        rows, config = batch.histories, self.config
        lengths = rows.lengths
        cut = 1 + (torch.rand(len(rows)).numpy() * (lengths - 1)).astype(np.int64)  # 1..n-1
        history = rows.gather(rows.offsets[:-1], cut)
        future = rows.gather(rows.offsets[:-1] + cut, lengths - cut)

        states, h_real = self(history)
        h_row, h_at = sample_recent(h_real, config.history_states).nonzero(as_tuple=True)
        items, t_real = pad(future, states.device)
        t_row, t_at = sample_recent(t_real, config.target_states).nonzero(as_tuple=True)
        sampled = items[t_row, t_at]
        if config.item_tower == "a":
            targets = self(future)[0][t_row, t_at]
        else:
            targets = self.item_states(sampled.cpu().numpy())

        # Which of the sampled items are targets of which users (who may have several rows).
        distinct, column = sampled.unique(return_inverse=True)
        owner = torch.from_numpy(np.unique(batch.users, return_inverse=True)[1]).to(states.device)
        own = torch.zeros(len(rows), len(distinct), dtype=torch.bool, device=states.device)
        own[owner[t_row], column] = True
        scores = cosine(states[h_row, h_at], targets) / config.temperature
        total = dense_all_action_loss(
            scores - self.log_share[sampled] if config.log_q else scores,
            pairs=h_row[:, None] == t_row,
            negatives=~own[owner[h_row]][:, column],
            rows=h_row,
        )
        computed = computed_positions(h_real) + computed_positions(t_real)
        return Losses(total, {"action": total.detach()}, len(rows.values), computed)

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """Unit vectors [B, out] float32."""
        return encode_rows(
            self,
            histories,
            lambda rows: F.normalize(last_of(*self(rows)), dim=-1),
            max_items=self.config.max_items,
            max_rows=ROWS,
        )

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Unit vectors [n, out] float32, of catalog ints or of raw texts."""
        if len(items) and isinstance(items[0], str):
            with self.text.borrowed([str(text) for text in items]) as borrowed:
                return self.encode_items(borrowed)
        chosen = np.asarray(items, dtype=np.int64)
        return encode_rows(
            self,
            Ragged(chosen, np.arange(len(chosen) + 1)),
            lambda rows: F.normalize(self.item_states(rows.values), dim=-1),
            max_items=1,
        )

    def scorer(self) -> Scorer:
        return inner_product_scorer(self)

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """New items by text alone, recommendable at once. Returns their item ints.

        Raises:
            DataError: an empty text.
        """
        return self.text.add(texts)


def sample_recent(real: Tensor, count: int) -> Tensor:
    """At most ``count`` real positions of each row, later ones more often: [B, T] bool.

    The n-th position has weight n; drawn without replacement, by the largest perturbed log
    weights (Gumbel). real: [B, T] bool, padding on the right.
    """
    if real.shape[1] <= count:
        return real
    weight = torch.arange(1, real.shape[1] + 1, device=real.device)
    gumbel = -torch.empty(real.shape, device=real.device).exponential_().log()
    keys = (weight.log() + gumbel).masked_fill(~real, float("-inf"))
    drawn = torch.zeros_like(real).scatter_(1, keys.topk(count, dim=1).indices, True)
    return drawn & real


def dense_all_action_loss(scores: Tensor, pairs: Tensor, negatives: Tensor, rows: Tensor) -> Tensor:
    """-log e^r / (e^r + sum of the state's negatives' e^r'), mean over pairs of a row, then rows.

    scores: [P, Q] of history states with target states. pairs: [P, Q] bool, the positives.
    negatives: [P, Q] bool. rows: [P] int64 from 0, the row of each history state.
    """
    lowest = torch.finfo(scores.dtype).min  # -inf would make the gradient of an empty sum NaN
    rest = scores.masked_fill(~negatives, lowest).logsumexp(1, keepdim=True)
    each = (torch.logaddexp(scores, rest) - scores).masked_fill(~pairs, 0.0).sum(1)
    n_rows = int(rows.max()) + 1
    total = each.new_zeros(n_rows).index_add(0, rows, each)
    return (total / each.new_zeros(n_rows).index_add(0, rows, pairs.sum(1).to(each))).mean()
