"""UniSRec: Towards Universal Sequence Representation Learning for Recommender Systems.

Hou, Mu, Zhao, Li, Ding, Wen. KDD '22, https://arxiv.org/abs/2206.05941

    x_i   frozen language model's vector of item i's text           l2rec.modules.frozen_text
    v_i   = sum_k g_k (x_i - b_k) W_k                               parametric whitening, G experts
    g     = softmax(x_i W_g + eps softplus(x_i W_n))                eps ~ N(0, 1), in training only
    s     = state of a causal Transformer after the newest v_i      l2rec.modules.encoder
    r_i   = cos(s, v_i) / tau

Stage "pretrain", on texts alone (the paper: on five other domains):

    l_S-I   r of the next item against the next items of the rest of the batch
    l_S-S   the same sequence with some items dropped, or read with some of their words dropped,
            against the other sequences of the batch
    L       = l_S-I + lambda l_S-S

Stage "finetune", the full softmax over r_i of the catalog:

    inductive (``transductive=false``)     v_i as above: an item is its text
    transductive                           v_i + e_i, a trained vector for each item

with the Transformer and its positions frozen; the mixture of experts, the norm of the input (and
e_i) are trained. A new item enters by its text in both, with e_i = 0.

Choices and deviations:

- Every position predicts its next item in one causal pass, where the paper makes one example of
  every prefix. l_S-S compares whole rows.
- An item that occurs several times in a batch is adapted once, and its x has one dropout mask for
  all experts.
- Other occurrences of the next item, and other rows of the same user, are no negatives.
- Text vectors are pooled by the mean over tokens, which every backbone has.
- Pre-training is on the data set at hand, unless ``--init`` names a run on another one. Where both
  stages see the same small data, a frozen Transformer may only cost: ``freeze_encoder=false``.
"""

from __future__ import annotations

__all__ = ["MixtureAdaptor", "UniSRec", "UniSRecConfig", "drop_words"]

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, computed_positions, initialize
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.losses import in_batch_loss
from l2rec.modules.objectives import cosine, fused_catalog_loss
from l2rec.modules.sequences import encode_rows, last_of, next_item_batches, pad
from l2rec.protocols import Losses, Scorer, Stage, decayed

ROWS = 128
"""Histories encoded together: few, so that rows of alike length waste little on padding."""
WORD_SEED = 0
"""Which words are dropped is part of the text cache, not of a run."""


class UniSRecConfig(BaseModel):
    """Options of UniSRec; the defaults are the paper's, or its code's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""
    experts: int = Field(8, ge=1)
    adaptor_dropout: float = Field(0.2, ge=0, lt=1)
    dim: int = Field(300, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    temperature: float = Field(0.07, gt=0)

    pretrain_epochs: int = Field(300, ge=0)
    """0 leaves the stage out, as after ``--init``."""
    sequence_weight: float = Field(1e-3, ge=0)
    """lambda of l_S-S."""
    item_drop: float = Field(0.2, ge=0, lt=1)
    """Share of a row's items that its other view lacks, or reads with words dropped."""
    item_drop_batches: float = Field(0.9, ge=0, le=1)
    """Share of the batches whose other views lack items; the rest drop words."""
    word_drop: float = Field(0.15, ge=0, lt=1)

    finetune: bool = True
    """False: pre-train alone, for a run that others start from."""
    transductive: bool = True
    freeze_encoder: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> UniSRecConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        if not self.finetune and not self.pretrain_epochs:
            raise ValueError("finetune=false with pretrain_epochs=0 trains nothing; set either")
        return self


class MixtureAdaptor(nn.Module):
    """sum_k g_k(x) (dropout(x) - b_k) W_k; the noise of g and the dropout are for training.

    text_dim: d of texts. dim: h of items. experts: G.
    """

    def __init__(self, text_dim: int, dim: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, text_dim, dim).normal_(std=0.02))
        self.shift = nn.Parameter(torch.zeros(experts, text_dim))
        self.gate = nn.Parameter(torch.zeros(text_dim, experts))
        self.noise = nn.Parameter(torch.zeros(text_dim, experts))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[n, d] -> [n, h]."""
        logits = x @ self.gate
        if self.training:
            # The least noise keeps every expert in play: [M] of the published code.
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.noise) + 0.01)
        experts, _, dim = self.weight.shape
        # All experts in one product: [d, G h], and what their shifts take away, [G, h].
        joined = self.weight.transpose(0, 1).flatten(1)
        away = torch.einsum("gd,gdh->gh", self.shift, self.weight)
        each = (F.dropout(x, self.dropout, self.training) @ joined).view(-1, experts, dim) - away
        return torch.einsum("ng,ngh->nh", logits.softmax(-1), each)


class UniSRec(nn.Module):
    """The recommender. Users and items are unit vectors [h]; scores are their cosines.

    Args:
        config: options. catalog: the items' texts. backbone: reads texts, and is not trained.
        cache: folder for text vectors, keyed by content; None keeps nothing.
    """

    Config = UniSRecConfig
    uses_backbone = True
    item_tensors = frozenset({"items.weight"})

    def __init__(
        self,
        config: UniSRecConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.batches = next_item_batches(len(catalog), config.max_items)
        self._texts = catalog.require_texts("UniSRec")
        self.text = FrozenText(backbone, self._texts, max_tokens=config.text_tokens, cache=cache)
        self.cached = self.text.files
        """Cache entries this model was built from."""
        self.adaptor = MixtureAdaptor(
            backbone.dim, config.dim, config.experts, config.adaptor_dropout
        )
        self.encoder = SequenceEncoder(
            config.dim,
            layers=config.layers,
            heads=config.heads,
            inner=config.inner,
            max_items=config.max_items,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )
        self.items: nn.Embedding | None = None
        if config.transductive:
            self.items = nn.Embedding(len(catalog), config.dim)
            self.items.apply(initialize)

    @property
    def n_items(self) -> int:
        """N, items of the catalog, those added later included."""
        return len(self.text)

    def item_states(self, items: Tensor) -> Tensor:
        """v_i, in the transductive setting + e_i: item ints [n] -> [n, h]."""
        states: Tensor = self.adaptor(self.text(items))
        if self.items is None:
            return states
        trained = self.items.num_embeddings
        own = F.embedding(items.clamp(max=trained - 1), self.items.weight)
        return states + own * (items < trained)[:, None]

    def forward(self, rows: Ragged, table: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, T, h] of at most ``max_items`` rows of ``table`` [n, h]; real ones [B, T]."""
        columns, real = pad(rows, table.device)
        return self.encoder(table[columns], real), real

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Pre-training and fine-tuning, each unless it is left out."""
        config, encoder = self.config, self.encoder
        universal = [*self.adaptor.parameters(), *encoder.parameters()]
        tuned = [*self.adaptor.parameters(), *encoder.norm.parameters()]
        if not config.freeze_encoder:
            tuned = universal
        if self.items is not None:
            tuned = [*tuned, *self.items.parameters()]
        stages = []
        if config.pretrain_epochs:
            groups = decayed(universal, lr, weight_decay)
            stages += [
                Stage(
                    "pretrain",
                    groups,
                    self.batches,
                    self.pretrain_loss,
                    select=False,
                    epochs=config.pretrain_epochs,
                )
            ]
        if config.finetune:
            groups = decayed(tuned, lr, weight_decay)
            stages += [Stage("finetune", groups, self.batches, self.loss)]
        return stages

    def pretrain_loss(self, batch: Batch) -> Losses:
        """L = l_S-I + lambda l_S-S, of texts alone."""
        device, tau = self.text.vectors.device, self.config.temperature
        flat = np.concatenate((batch.histories.values, batch.targets))
        items, columns = np.unique(flat, return_inverse=True)
        rows = Ragged(columns[: len(batch.histories.values)], batch.histories.offsets)
        distinct = torch.from_numpy(items.astype(np.int64)).to(device)
        table = self.adaptor(self.text(distinct))
        states, real = self(rows, table)

        targets = torch.from_numpy(columns[len(rows.values) :]).to(device)
        scores = cosine(states[real], table[targets]) / tau  # [P, P]
        item = in_batch_loss(scores, targets[:, None] == targets)
        total, parts = item, {"item": item.detach()}
        if self.config.sequence_weight:
            users = torch.from_numpy(batch.users).to(device)
            other = self._other_view(rows, distinct, table)
            scores = cosine(last_of(states, real), other) / tau  # [B, B]
            sequence = in_batch_loss(scores, users[:, None] == users)
            total = total + self.config.sequence_weight * sequence
            parts["sequence"] = sequence.detach()
        return Losses(total, parts, len(targets), computed_positions(real))

    def _other_view(self, rows: Ragged, distinct: Tensor, table: Tensor) -> Tensor:
        """[B, h] of ``rows`` that lack some items, or hold them with some words dropped.

        distinct: [n] items of ``table`` [n, h], which ``rows`` are columns of.
        """
        config = self.config
        chosen = (torch.rand(len(rows.values)) < config.item_drop).numpy()
        if float(torch.rand(())) < config.item_drop_batches:
            rows = without(rows, chosen)
        else:
            table = torch.cat((table, self.adaptor(self._with_words_dropped[distinct])))
            rows = Ragged(rows.values + len(distinct) * chosen, rows.offsets)
        return last_of(*self(rows, table))

    @cached_property
    def _with_words_dropped(self) -> Tensor:
        """[N, d] text vectors of the catalog, each text without some of its words."""
        return self.text.read_catalog(drop_words(self._texts, self.config.word_drop, WORD_SEED))[0]

    def loss(self, batch: Batch) -> Losses:
        """Full softmax over the catalog, mean over all positions of the batch."""
        table = self.item_states(torch.arange(self.n_items, device=self.text.vectors.device))
        states, real = self(batch.histories, table)
        targets = torch.from_numpy(batch.targets.astype(np.int64)).to(table.device)
        users = F.normalize(states[real], dim=-1) / self.config.temperature
        total = fused_catalog_loss(
            users, F.normalize(table, dim=-1), targets, dtype=self.text.dtype
        )
        return Losses(total, {"rec": total.detach()}, len(targets), computed_positions(real))

    # -- inference -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _evaluated(self, items: npt.NDArray[np.integer]) -> Tensor:
        """`item_states` in evaluation mode, some thousand at a time: G copies of x are large."""
        training = self.training
        self.eval()
        chosen = torch.from_numpy(items.astype(np.int64)).to(self.text.vectors.device)
        states = torch.cat([self.item_states(part) for part in chosen.split(8192)])
        self.train(training)
        return states

    def _users(self, rows: Ragged, table: Tensor) -> Tensor:
        """Unit vectors [B, h] of rows of ``table``."""
        return encode_rows(
            self,
            rows,
            lambda part: F.normalize(last_of(*self(part, table)), dim=-1),
            max_items=self.config.max_items,
            max_rows=ROWS,
        )

    def encode_users(self, histories: Ragged) -> Tensor:
        """Unit vectors [B, h] float32."""
        recent = histories.tail(self.config.max_items)
        items, columns = np.unique(recent.values, return_inverse=True)
        if not len(items):  # nobody, or an error that `encode_rows` explains
            items = np.zeros(1, dtype=np.int64)
        return self._users(Ragged(columns, recent.offsets), self._evaluated(items))

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Unit vectors [n, h] float32, of catalog ints or of raw texts."""
        if len(items) and isinstance(items[0], str):
            with self.text.borrowed([str(text) for text in items]) as borrowed:
                return self.encode_items(borrowed)
        return F.normalize(self._evaluated(np.asarray(items, dtype=np.int64)), dim=-1)

    def scorer(self) -> Scorer:
        """Histories -> cosines [B, N] float32. Adapts the catalog once."""
        table = self._evaluated(np.arange(self.n_items))
        vectors = F.normalize(table, dim=-1)
        return lambda histories: self._users(histories, table) @ vectors.T

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """New items by text alone, recommendable at once. Returns their item ints.

        Raises:
            DataError: an empty text.
        """
        return self.text.add(texts)


def without(rows: Ragged, dropped: npt.NDArray[np.bool_]) -> Ragged:
    """``rows`` without the values marked in ``dropped``; a row never loses its last one too."""
    kept = ~dropped
    last = rows.offsets[1:] - 1
    counts = np.add.reduceat(kept, rows.offsets[:-1], dtype=np.int64)
    kept[last[counts == 0]] = True
    offsets = np.concatenate(([0], np.cumsum(np.maximum(counts, 1))))
    return Ragged(rows.values[kept], offsets)


def drop_words(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """Each text without about ``share`` of its words, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    words = [text.split() for text in texts]
    kept = [rng.random(len(row)) >= share for row in words]
    return [
        " ".join(np.asarray(row, dtype=object)[keep]) or text
        for text, row, keep in zip(texts, words, kept, strict=True)
    ]
