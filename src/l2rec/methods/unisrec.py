"""UniSRec: Towards Universal Sequence Representation Learning for Recommender Systems.

Hou, Mu, Zhao, Li, Ding, Wen. KDD '22, https://arxiv.org/abs/2206.05941

    x_i   frozen language model's vector of item i's text           l2rec.modules.frozen_text
    v_i   = sum_k g_k (x_i - b_k) W_k                               parametric whitening, G experts
    g     = softmax(x_i W_g + eps softplus(x_i W_n))                eps ~ N(0, 1), in training only
    s     = state of a causal Transformer after the newest v_i      l2rec.modules.encoder
    r_i   = cos(s, v_i) / tau

Stage "pretrain", on texts alone (the paper: on five other domains):

    l_S-I   cross-entropy of the next item; negatives are the other next items of the batch
    l_S-S   cross-entropy of the same sequence without some of its items, or with some words of them
            dropped; negatives are the other sequences of the batch
    L       = l_S-I + lambda l_S-S

Stage "finetune", the full softmax over r_i of the catalog, where an item is

    inductive (``transductive=false``)     v_i, which is its text alone
    transductive                           v_i + e_i, with a trained vector e_i

The Transformer and its positions are frozen; the mixture of experts, the norm of the input and e_i
are trained. A new item enters by its text in both, with e_i = 0.

Choices and deviations:

- Every position predicts its next item in one causal pass, where the paper has one example for
  every prefix. l_S-S compares whole rows.
- An item that occurs several times in a batch passes the mixture once, and its x has one dropout
  mask for all experts.
- Other occurrences of the next item, and other rows of the same user, are no negatives.
- Text vectors are means over tokens, which every backbone can give; the paper reads [CLS].
- Pre-training is on the data set at hand, unless ``--init`` names a run on another one. Where both
  stages have the same small data, a frozen Transformer may do harm: ``freeze_encoder=false``.
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
from l2rec.modules.encoder import SequenceEncoder, check_heads, computed_positions, initialize
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.losses import in_batch_loss
from l2rec.modules.objectives import fused_catalog_loss
from l2rec.modules.sequences import (
    FEW_ROWS,
    as_index,
    encode_rows,
    evaluating,
    last_of,
    next_item_batches,
    pad,
    raw_texts,
)
from l2rec.protocols import Losses, Scorer, Stage, UserEncoder, decayed

WORD_SEED = 0
"""Seed of the dropped words: one for all runs, so that these share the cached text vectors."""


class UniSRecConfig(BaseModel):
    """Options of UniSRec; the defaults are the paper's, or its code's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""
    experts: int = Field(8, ge=1)
    """G."""
    adaptor_dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout rate of text vectors before the experts."""
    dim: int = Field(300, ge=1)
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
    temperature: float = Field(0.07, gt=0)
    """tau."""

    pretrain_epochs: int = Field(300, ge=0)
    """Epochs of pre-training; 0 leaves it out, as after ``--init``."""
    sequence_weight: float = Field(1e-3, ge=0)
    """lambda, weight of l_S-S."""
    item_drop: float = Field(0.2, ge=0, lt=1)
    """Share of a row's items that its augmented row lacks, or has with words dropped."""
    item_drop_batches: float = Field(0.9, ge=0, le=1)
    """Share of the batches whose augmented rows lack items; in the others words are dropped."""
    word_drop: float = Field(0.15, ge=0, lt=1)
    """Share of a text's words that are dropped."""

    finetune: bool = True
    """Fine-tuning after pre-training; without it the run is for others to start from."""
    transductive: bool = True
    """A trained vector for each item beside its text."""
    freeze_encoder: bool = True
    """Frozen Transformer in fine-tuning."""

    @model_validator(mode="after")
    def _consistent(self) -> UniSRecConfig:
        check_heads(self.dim, self.heads)
        if not self.finetune and not self.pretrain_epochs:
            raise ValueError("finetune=false with pretrain_epochs=0 trains nothing; set either")
        return self


class MixtureAdaptor(nn.Module):
    """Mixture of parametric whitenings, sum_k g_k(x) (dropout(x) - b_k) W_k.

    The noise of g and the dropout are for training alone.

    Args:
        text_dim: d, width of text vectors.
        dim: h, width of item vectors.
        experts: G.
        dropout: rate for x before the experts.
    """

    def __init__(self, text_dim: int, dim: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, text_dim, dim).normal_(std=0.02))
        self.shift = nn.Parameter(torch.zeros(experts, text_dim))
        self.gate = nn.Parameter(torch.zeros(text_dim, experts))
        self.noise = nn.Parameter(torch.zeros(text_dim, experts))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Adapt text vectors [n, d] to item vectors [n, h]."""
        logits = x @ self.gate
        if self.training:
            # As in the authors' code, 0.01 is the least noise: every expert is chosen at times.
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.noise) + 0.01)
        experts, _, dim = self.weight.shape
        # All experts in one product, [d, G h], less their shifts through W, [G, h].
        joined = self.weight.transpose(0, 1).flatten(1)
        shifts = torch.einsum("gd,gdh->gh", self.shift, self.weight)
        each = (F.dropout(x, self.dropout, self.training) @ joined).view(-1, experts, dim) - shifts
        return torch.einsum("ng,ngh->nh", logits.softmax(-1), each)


class UniSRec(nn.Module):
    """The recommender. Users and items are unit vectors [h]; scores are their cosines.

    Args:
        config: options.
        catalog: items and their texts.
        backbone: language model that reads the texts; it is not trained.
        cache: folder for text vectors, keyed by content; None stores nothing.
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
        self.encoder = SequenceEncoder.from_config(config, dim=config.dim)
        self.items: nn.Embedding | None = None
        if config.transductive:
            self.items = nn.Embedding(len(catalog), config.dim)
            self.items.apply(initialize)
            if not config.finetune:  # no stage trains e_i: items are their texts
                nn.init.zeros_(self.items.weight)

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.text_tokens

    @property
    def n_items(self) -> int:
        """N, number of items, with those added later."""
        return len(self.text)

    def item_states(self, items: Tensor) -> Tensor:
        """Compute v_i, or v_i + e_i in the transductive setting: item ints [n] -> [n, h]."""
        states: Tensor = self.adaptor(self.text(items))
        if self.items is None:
            return states
        trained = self.items.num_embeddings
        vectors = F.embedding(items.clamp(max=trained - 1), self.items.weight)
        return states + vectors * (items < trained)[:, None]

    def forward(self, rows: Ragged, table: Tensor) -> tuple[Tensor, Tensor]:
        """Encode rows of at most ``max_items`` items: states [B, T, h], which are real [B, T].

        ``rows`` holds row ints of ``table`` [n, h].
        """
        columns, real = pad(rows, table.device)
        return self.encoder(table[columns], real), real

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return pre-training and fine-tuning, without what the options leave out."""
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
        """Compute L = l_S-I + lambda l_S-S, from texts alone."""
        device, tau = self.text.vectors.device, self.config.temperature
        flat = np.concatenate((batch.histories.values, batch.targets))
        items, columns = np.unique(flat, return_inverse=True)
        rows = Ragged(columns[: len(batch.histories.values)], batch.histories.offsets)
        distinct = as_index(items, device)
        table = self.adaptor(self.text(distinct))
        states, real = self(rows, table)

        targets = torch.from_numpy(columns[len(rows.values) :]).to(device)
        wanted = as_index(batch.targets, device)
        item = in_batch_loss(states[real], table[targets], wanted, temperature=tau)
        total, parts = item, {"item": item.detach()}
        if self.config.sequence_weight:
            users = torch.from_numpy(batch.users).to(device)
            other = self._other_view(rows, distinct, table)
            sequence = in_batch_loss(last_of(states, real), other, users, temperature=tau)
            total = total + self.config.sequence_weight * sequence
            parts["sequence"] = sequence.detach()
        return Losses(total, parts, len(targets), computed_positions(real))

    def _other_view(self, rows: Ragged, distinct: Tensor, table: Tensor) -> Tensor:
        """Encode augmented rows, without some items or with some words of these dropped: [B, h].

        Args:
            rows: histories as row ints of ``table``.
            distinct: [n] the items of the table's rows.
            table: [n, h] their vectors.
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
        """Text vectors of the catalog [N, d], each text without some of its words."""
        return self.text.read_catalog(drop_words(self._texts, self.config.word_drop, WORD_SEED))[0]

    def loss(self, batch: Batch) -> Losses:
        """Compute the full softmax over the catalog, mean over all positions of the batch."""
        table = self.item_states(torch.arange(self.n_items, device=self.text.vectors.device))
        states, real = self(batch.histories, table)
        targets = as_index(batch.targets, table.device)
        users = F.normalize(states[real], dim=-1) / self.config.temperature
        total = fused_catalog_loss(
            users, F.normalize(table, dim=-1), targets, dtype=self.text.dtype
        )
        return Losses(total, {"rec": total.detach()}, len(targets), computed_positions(real))

    # -- inference -------------------------------------------------------------------------------

    def _evaluated(self, items: npt.NDArray[np.integer]) -> Tensor:
        """Compute `item_states` in evaluation mode, a part at a time: G copies of x are large."""
        chosen = as_index(items, self.text.vectors.device)
        with evaluating(self):
            return torch.cat([self.item_states(part) for part in chosen.split(8192)])

    def _users(self, rows: Ragged, table: Tensor) -> Tensor:
        """Encode rows of row ints of ``table`` to unit vectors [B, h]."""
        return encode_rows(
            self,
            rows,
            lambda part: F.normalize(last_of(*self(part, table)), dim=-1),
            max_items=self.config.max_items,
            max_rows=FEW_ROWS,
        )

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return unit user vectors [B, h] float32.

        Raises:
            DataError: an empty history.
        """
        recent = histories.tail(self.config.max_items)
        items, columns = np.unique(recent.values, return_inverse=True)
        if not len(items):  # no users, or an error that `encode_rows` raises
            items = np.zeros(1, dtype=np.int64)
        return self._users(Ragged(columns, recent.offsets), self._evaluated(items))

    def user_encoder(self) -> UserEncoder:
        """Return unit user vectors as a function of `item_states`."""
        return UserEncoder(
            self._evaluated(np.arange(self.n_items)),
            lambda x, real: F.normalize(last_of(self.encoder.whole(x, real), real), dim=-1),
            self.config.max_items,
        )

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return unit item vectors [n, h] float32 of catalog ints or of raw texts."""
        texts = raw_texts(items)
        if texts is not None:
            with self.text.borrowed(texts) as borrowed:
                return self.encode_items(borrowed)
        return F.normalize(self._evaluated(np.asarray(items, dtype=np.int64)), dim=-1)

    def scorer(self) -> Scorer:
        """Return a scorer: histories -> cosines [B, N] float32. The catalog is adapted once."""
        table = self._evaluated(np.arange(self.n_items))
        vectors = F.normalize(table, dim=-1)
        return lambda histories: self._users(histories, table) @ vectors.T

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once, and return their item ints.

        Raises:
            DataError: an empty text.
        """
        return self.text.add(texts)


def without(rows: Ragged, dropped: npt.NDArray[np.bool_]) -> Ragged:
    """Drop the marked values; a row that would lose all of them keeps its last."""
    stays = ~dropped
    last = rows.offsets[1:] - 1
    counts = np.add.reduceat(stays, rows.offsets[:-1], dtype=np.int64)
    stays[last[counts == 0]] = True
    offsets = np.concatenate(([0], np.cumsum(np.maximum(counts, 1))))
    return Ragged(rows.values[stays], offsets)


def drop_words(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """Drop about ``share`` of the words of each text, the same ones for the same seed.

    A text that would lose all of them stays whole.
    """
    rng = np.random.default_rng(seed)
    words = [text.split() for text in texts]
    stays = [rng.random(len(row)) >= share for row in words]
    return [
        " ".join(np.asarray(row, dtype=object)[stay]) or text
        for text, row, stay in zip(texts, words, stays, strict=True)
    ]
