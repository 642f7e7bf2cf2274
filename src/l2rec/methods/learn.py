"""LEARN: Knowledge Adaptation from Large Language Model to Recommendation.

Jia, Wang, Li, Chen, Bai, Liu, Zheng, Chen, Li, Gai. AAAI '25, https://arxiv.org/abs/2405.03988

    E^c_i   frozen language model's vector of item i's text         l2rec.modules.frozen_text
    PAL(.)  Linear d -> m, causal Transformer, Linear m -> out      l2rec.modules.encoder
    h       = PAL(history), a state after every item                the user tower
    t       = PAL(events that followed)                             the item tower, variant a
    r_{h,t} = cos(h, t) / tau

Dense all action: a training sequence is cut at a random event; N_h states of the history and N_t
targets among the events that followed are sampled, newer ones more often, and each of the first is
contrasted with each of the second. Negatives are the sampled targets of other users:

    L = mean over users and pairs of -log e^{r_ht} / (e^{r_ht} + sum_{t' of others} e^{r_ht'})

A user is the newest state, an item the item tower's output for that item alone.

No code of the authors is public. Choices where the paper leaves one, and deviations:

- Item towers: ``a`` is the PAL of the user tower, causal over the target sequence (the paper's
  best); ``b`` the same PAL, each item alone; ``c`` E^c itself, to which the user tower then maps.
- Recency: the n-th oldest of a row is drawn with weight n, without replacement. The paper weights
  by a formula with alpha=10, beta=10000, which we do not have.
- A sampled target of other users is no negative for a user who also has it as a target.
- Rows are windows of at most ``max_items`` events. Each counts the same, however many pairs it has:
  otherwise the few users with long histories would be most of the loss.
- The widths m and out, depth, dropout and tau are chosen here.

``log_q`` is a further deviation, off by default. Targets of other users are drawn by popularity, so
that an in-batch softmax ranks an item by how much likelier it is for this user than for anyone,
which costs most where rankings are judged by purchases. With ``log_q`` r - log q(t) is trained and
r is ranked, which then holds the popularity too (Yi et al., RecSys '19).
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
from l2rec.modules.encoder import SequenceEncoder, check_heads, computed_positions, initialize
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.objectives import cosine
from l2rec.modules.processes import everyone
from l2rec.modules.sequences import (
    FEW_ROWS,
    as_index,
    encode_rows,
    last_of,
    one_each,
    pad,
    raw_texts,
    sequence_batches,
)
from l2rec.protocols import Losses, Scorer, Stage, UserEncoder, decayed, inner_product_scorer


class LEARNConfig(BaseModel):
    """Options of LEARN."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""
    dim: int = Field(256, ge=1)
    """m, width of the Transformer."""
    layers: int = Field(4, ge=1)
    """Transformer layers."""
    heads: int = Field(4, ge=1)
    """Attention heads; they divide ``dim``."""
    inner: int = Field(1024, ge=1)
    """Width of the feed-forward part."""
    out: int = Field(64, ge=1)
    """Width of user and item vectors; ignored with ``item_tower=c``, where it is E^c's."""
    max_items: int = Field(50, ge=2)
    """Most items of a history that are read, the newest."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout rate of the embedded inputs and of what each layer adds."""
    attention_dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout rate of attention weights."""
    item_tower: Literal["a", "b", "c"] = "a"
    """Variant of the item tower."""
    history_states: int = Field(10, ge=1)
    """N_h, most states sampled from a history."""
    target_states: int = Field(10, ge=1)
    """N_t, most targets sampled from what followed."""
    temperature: float = Field(0.07, gt=0)
    """tau."""
    log_q: bool = False
    """Correction of the loss for how often each item is a target."""

    @model_validator(mode="after")
    def _consistent(self) -> LEARNConfig:
        check_heads(self.dim, self.heads)
        return self


class LEARN(nn.Module):
    """The recommender. Users and items are unit vectors [out]; scores are their cosines.

    Args:
        config: options.
        catalog: items and their texts.
        backbone: language model that reads the texts; it is not trained.
        cache: folder for text vectors, keyed by content; None stores nothing.
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
        self.encoder = SequenceEncoder.from_config(config, dim=config.dim)
        self.leave = nn.Linear(config.dim, backbone.dim if config.item_tower == "c" else config.out)
        for linear in (self.enter, self.leave):
            linear.apply(initialize)
        self.register_buffer("log_share", torch.zeros(len(catalog)), persistent=False)
        self.log_share: Tensor
        """log q [N], the log share of each item in the training sequences."""

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.text_tokens

    @property
    def n_items(self) -> int:
        """N, number of items, with those added later."""
        return len(self.text)

    def forward(self, rows: Ragged) -> tuple[Tensor, Tensor]:
        """Apply PAL to rows of at most ``max_items`` items: [B, T, out], which are real [B, T]."""
        items, real = pad(rows, self.text.vectors.device)
        states: Tensor = self.leave(self.encoder(self.enter(self.text(items)), real))
        return states, real

    def item_states(self, items: npt.NDArray[np.integer]) -> Tensor:
        """Compute the item tower's output for each item alone: ints [n] -> [n, out]."""
        if self.config.item_tower == "c":
            vectors: Tensor = self.text(as_index(items, self.text.vectors.device))
            return vectors
        states, _ = self(one_each(items))
        first: Tensor = states[:, 0]
        return first

    # -- training --------------------------------------------------------------------------------

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return training sequences in windows of two to ``max_items`` events."""
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
        """Compute dense all action over rows cut at random, mean over rows."""
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

        # The targets of all processes, where a batch is dealt out over several.
        users, first = everyone(torch.from_numpy(batch.users).to(states.device))
        h_row_of_all, t_row = h_row + first, everyone(t_row + first)[0]
        targets, sampled = everyone(targets)[0], everyone(sampled)[0]

        # Which of the sampled items are targets of which users (who may have several rows).
        distinct, column = sampled.unique(return_inverse=True)
        user = users.unique(return_inverse=True)[1]
        targeted = torch.zeros(len(users), len(distinct), dtype=torch.bool, device=states.device)
        targeted[user[t_row], column] = True
        scores = cosine(states[h_row, h_at], targets) / config.temperature
        total = dense_all_action_loss(
            scores - self.log_share[sampled] if config.log_q else scores,
            pairs=h_row_of_all[:, None] == t_row,
            negatives=~targeted[user[h_row_of_all]][:, column],
            rows=h_row,
        )
        computed = computed_positions(h_real) + computed_positions(t_real)
        return Losses(total, {"action": total.detach()}, len(rows.values), computed)

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return unit user vectors [B, out] float32.

        Raises:
            DataError: an empty history.
        """
        return encode_rows(
            self,
            histories,
            lambda rows: F.normalize(last_of(*self(rows)), dim=-1),
            max_items=self.config.max_items,
            max_rows=FEW_ROWS,
        )

    def user_encoder(self) -> UserEncoder:
        """Return unit user vectors as a function of the items' text vectors on PAL's entry."""

        def encode(x: Tensor, real: Tensor) -> Tensor:
            states = self.leave(self.encoder.whole(x, real))
            return F.normalize(last_of(states, real), dim=-1)

        entered = self.enter(self.text.vectors).detach()
        return UserEncoder(entered, encode, self.config.max_items)

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return unit item vectors [n, out] float32 of catalog ints or of raw texts."""
        texts = raw_texts(items)
        if texts is not None:
            with self.text.borrowed(texts) as borrowed:
                return self.encode_items(borrowed)
        chosen = np.asarray(items, dtype=np.int64)
        return encode_rows(
            self,
            one_each(chosen),
            lambda rows: F.normalize(self.item_states(rows.values), dim=-1),
            max_items=1,
        )

    def scorer(self) -> Scorer:
        return inner_product_scorer(self)

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once, and return their item ints.

        Raises:
            DataError: an empty text.
        """
        return self.text.add(texts)


def sample_recent(real: Tensor, count: int) -> Tensor:
    """Draw at most ``count`` real positions of each row, later ones more often: [B, T] bool.

    The n-th position has weight n; positions are drawn without replacement, by the largest log
    weights after Gumbel noise.

    Args:
        real: [B, T] bool, padding on the right.
        count: most positions of a row.
    """
    if real.shape[1] <= count:
        return real
    weight = torch.arange(1, real.shape[1] + 1, device=real.device)
    gumbel = -torch.empty(real.shape, device=real.device).exponential_().log()
    keys = (weight.log() + gumbel).masked_fill(~real, float("-inf"))
    drawn = torch.zeros_like(real).scatter_(1, keys.topk(count, dim=1).indices, True)
    return drawn & real


def dense_all_action_loss(scores: Tensor, pairs: Tensor, negatives: Tensor, rows: Tensor) -> Tensor:
    """Compute -log e^r / (e^r + sum of e^r' over a state's negatives), mean over pairs, then rows.

    Args:
        scores: [P, Q] r of history states with targets.
        pairs: [P, Q] bool, the positives.
        negatives: [P, Q] bool.
        rows: [P] int64 from 0, the row of each history state.
    """
    lowest = torch.finfo(scores.dtype).min  # -inf would make the gradient of an empty sum NaN
    rest = scores.masked_fill(~negatives, lowest).logsumexp(1, keepdim=True)
    each = (torch.logaddexp(scores, rest) - scores).masked_fill(~pairs, 0.0).sum(1)
    n_rows = int(rows.max()) + 1
    total = each.new_zeros(n_rows).index_add(0, rows, each)
    return (total / each.new_zeros(n_rows).index_add(0, rows, pairs.sum(1).to(each))).mean()
