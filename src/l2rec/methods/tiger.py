"""TIGER: Recommender Systems with Generative Retrieval.

Rajput et al. NeurIPS '23, https://arxiv.org/abs/2305.05065

    1. semantic ids: a residual quantiser turns each text vector into codes, coarse to fine; one
       more code tells items apart that share them              l2rec.modules.quantizer
    2. a T5, trained from nothing, reads the codes of a history and says those of the next item
    3. ranking: beam search among the codes of the catalog      l2rec.modules.beam

Deviations:

- Text vectors are those of the recipe's backbone; the paper's are Sentence-T5's.
- No token of the user: our users are their histories, so that a new one is no special case.
- Codes that nothing is nearest to are put where a vector stands, at the start of each epoch of the
  quantiser but those of its last tenth.
- The quantiser's epochs and the T5's are those of a processor, not the paper's 20,000 and 200,000
  steps.

Items that the beam does not reach have no score: beyond ``beams`` the ranking ends, so MRR is that
of the beam. Items of one code (only where more than ``codes`` share the others) tie.
"""

from __future__ import annotations

__all__ = ["TIGER", "TIGERConfig"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.beam import Seq2SeqDecoder, beam_search, item_scores
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.quantizer import ResidualQuantizer, Usage, usage
from l2rec.modules.sequences import ItemBatches, as_index, evaluating, in_batches
from l2rec.modules.trie import Trie
from l2rec.protocols import Losses, Scorer, Stage, decayed

PAD = 0
SEARCHED = 64
"""Histories whose beams are searched at once."""


class TIGERConfig(BaseModel):
    """Options of TIGER."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # semantic ids
    text_tokens: int = Field(128, ge=1)
    """Most tokens of a text."""
    levels: int = Field(3, ge=1)
    """Codes of an item before the one that tells it from others."""
    codes: int = Field(256, ge=2)
    """Codes of each level."""
    code_dim: int = Field(32, ge=1)
    """Width of a code."""
    code_hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the quantiser's encoder; its decoder has them in reverse."""
    commitment: float = Field(0.25, ge=0)
    """Weight of the encoder's part of the quantiser's loss."""
    code_epochs: int = Field(20, ge=1)
    """Epochs of the quantiser."""
    code_passes: int = Field(50, ge=1)
    """Passes over the catalog in each of them."""
    code_batch: int = Field(1024, ge=1)
    """Most items of its batches."""
    code_lr: float = Field(1e-3, gt=0)
    """Learning rate of the quantiser."""

    # the T5
    dim: int = Field(128, ge=1)
    """Width of its states."""
    layers: int = Field(4, ge=1)
    """Layers of its encoder, and of its decoder."""
    heads: int = Field(6, ge=1)
    """Attention heads."""
    head_dim: int = Field(64, ge=1)
    """Width of a head."""
    inner: int = Field(1024, ge=1)
    """Width of its feed-forward parts."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout rate."""
    max_items: int = Field(20, ge=1)
    """Most items of a history that are read, the newest."""
    targets_per_user: int = Field(1, ge=1)
    """Positions of a user's sequence that are predicted in an epoch, drawn anew in each."""
    beams: int = Field(50, ge=1)
    """Codes that are kept while searching, and items that are ranked at the end."""


class TIGER(nn.Module):
    """The recommender."""

    Config = TIGERConfig
    uses_backbone = True
    item_tensors = frozenset({"codes"})

    def __init__(
        self,
        config: TIGERConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        texts = catalog.require_texts("TIGER")
        self.text = FrozenText(backbone, texts, max_tokens=config.text_tokens, cache=cache)
        self.cached = self.text.files
        """Cache entries this model was built from."""
        self.quantizer = ResidualQuantizer(
            backbone.dim,
            hidden=config.code_hidden,
            width=config.code_dim,
            levels=config.levels,
            codes=config.codes,
            commitment=config.commitment,
        )
        self.generator = T5ForConditionalGeneration(
            T5Config(
                vocab_size=1 + (config.levels + 1) * config.codes,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.inner,
                num_layers=config.layers,
                num_heads=config.heads,
                dropout_rate=config.dropout,
                feed_forward_proj="relu",
                pad_token_id=PAD,
                eos_token_id=None,
            )
        )
        self.generator.config.decoder_start_token_id = PAD
        self.register_buffer("codes", torch.zeros(len(texts), config.levels + 1, dtype=torch.int64))
        self.codes: Tensor
        if backbone.device.type != "meta":
            self.quantizer.fill(self.text.vectors, int(torch.randint(2**31, ())))
            self._take_codes(0)

    @property
    def n_items(self) -> int:
        """N, number of items, with those added later."""
        return len(self.codes)

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.text_tokens

    def code_usage(self) -> Usage:
        """Describe how the catalog uses the codes of the quantiser."""
        return usage(self.codes[:, :-1], self.config.codes)

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return the quantiser, then the T5 on its codes."""
        config = self.config
        return [
            Stage(
                "codes",
                decayed(self.quantizer.parameters(), config.code_lr, weight_decay),
                self.item_batches,
                self.code_loss,
                select=False,
                epochs=config.code_epochs,
                begin_epoch=self._revive,
            ),
            Stage(
                "generator",
                decayed(self.generator.parameters(), lr, weight_decay),
                self.batches,
                self.loss,
                begin_epoch=self._take_codes,
            ),
        ]

    def item_batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> ItemBatches:
        """Return the items, several times over; no event is read."""
        return ItemBatches(
            np.ones(len(self.codes), dtype=np.int64),
            batch_items=self.config.code_batch,
            batch_tokens=self.config.code_batch,
            seed=seed,
            epoch=epoch,
            passes=self.config.code_passes,
        )

    def code_loss(self, batch: Batch) -> Losses:
        """Compute the quantiser's loss of a batch of items."""
        _, _, parts = self.quantizer(self.text(as_index(batch.users, self.codes.device)))
        total = torch.stack(list(parts.values())).sum()
        count = len(batch.users)
        return Losses(total, {name: part.detach() for name, part in parts.items()}, count, count)

    def _revive(self, epoch: int) -> None:
        if 0 < epoch < 0.9 * self.config.code_epochs:
            self.quantizer.revive(self.text.vectors)

    @torch.no_grad()
    def _take_codes(self, epoch: int) -> None:
        """Give every item its codes, before the first epoch of the T5."""
        if epoch == 0:
            self.codes.copy_(told_apart(self.quantizer.codes(self.text.vectors), self.config.codes))

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return prefixes, each with the item after it, in batches of like length."""
        return TrainingBatches(
            sequences,
            supervision="last",
            max_items=self.config.max_items,
            negatives=0,
            item_costs=np.full(self.n_items, self.codes.shape[1]),
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
            targets_per_user=self.config.targets_per_user,
        )

    def tokens(self, items: Tensor) -> Tensor:
        """Return the tokens of items [n]: [n, L + 1]. Every level has tokens of its own."""
        levels = torch.arange(self.codes.shape[1], device=items.device)
        return 1 + levels * self.config.codes + self.codes[items]

    def read(self, histories: Ragged) -> tuple[Tensor, Tensor]:
        """Return the tokens of histories of at most ``max_items`` items, padded on the right:
        [B, S], and which are real, alike, 1 or 0.
        """
        width = self.codes.shape[1]
        lengths = torch.from_numpy(histories.lengths * width).to(self.codes.device)
        real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        flat = self.tokens(as_index(histories.values, self.codes.device)).flatten()
        ids = real.new_full(real.shape, PAD, dtype=torch.int64).masked_scatter(real, flat)
        return ids, real.long()

    def loss(self, batch: Batch) -> Losses:
        """Compute the cross-entropy of the next item's tokens, mean over all of them."""
        ids, real = self.read(batch.histories)
        said = self.tokens(as_index(batch.targets, ids.device))
        with torch.autocast(ids.device.type, self.text.dtype, self.text.dtype != torch.float32):
            found = self.generator(
                input_ids=ids,
                attention_mask=real,
                decoder_input_ids=F.pad(said[:, :-1], (1, 0), value=PAD),
            )
        total = F.cross_entropy(found.logits.float().flatten(0, 1), said.flatten())
        return Losses(total, {"next": total.detach()}, int(real.sum()), real.numel())

    # -- inference -------------------------------------------------------------------------------

    def scorer(self) -> Scorer:
        """Return histories -> log-probabilities [B, N] float32 of what the beam found, -inf for all
        other items.
        """
        tokens = self.tokens(torch.arange(self.n_items, device=self.codes.device)).cpu().numpy()
        trie = Trie.of(Ragged.from_rows(tokens), self.codes.device)

        def search(rows: Ragged) -> Tensor:
            decoder = Seq2SeqDecoder(self.generator, *self.read(rows))
            return item_scores(beam_search(decoder, trie, self.config.beams, len(rows)), trie)

        def score(histories: Ragged) -> Tensor:
            recent = histories.tail(self.config.max_items)
            with evaluating(self):
                parts, order = in_batches(
                    recent, recent.lengths, search, max_rows=SEARCHED, max_cost=2**15
                )
            return torch.cat(parts)[order.to(parts[0].device)]

        return score

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once, and return their item ints.

        Raises:
            DataError: an empty text.
        """
        added = self.text.add(texts)
        new = self.quantizer.codes(self.text(as_index(added, self.codes.device)))
        self.codes = told_apart(torch.cat((self.codes[:, :-1], new)), self.config.codes)
        return added


def told_apart(codes: Tensor, count: int) -> Tensor:
    """Add one more code to codes [N, L]: how many items before one have all the same, at most
    ``count`` - 1. [N, L + 1] int64.
    """
    _, which = codes.unique(dim=0, return_inverse=True)
    order = which.argsort(stable=True)
    sizes = torch.bincount(which)
    first = sizes.cumsum(0) - sizes
    place = torch.arange(len(codes), device=codes.device) - first[which[order]]
    last = torch.empty_like(which).scatter_(0, order, place)
    return torch.cat((codes, last.clamp_max(count - 1)[:, None]), dim=1)
