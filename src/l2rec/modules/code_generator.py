"""A small T5, trained from nothing, that reads the codes of a history and says the next item's.

    encoder: codes of the newest items, one token each    decoder: the codes of the next item
    score of an item: log-probability of its codes, by beam search in the trie of the catalog

Legend: B users, N items, L codes of an item, K codes of a level, S tokens of a history. An item may
have fewer codes than L: the rest are `END`, which is neither read nor said. None may have the
beginning of another's codes for all of its own.
"""

from __future__ import annotations

__all__ = ["PRETRAINED", "CodeGenerator", "GeneratorConfig"]

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.ragged import Ragged, flat_index
from l2rec.modules.beam import Seq2SeqDecoder, as_inputs, beam_remark, beam_search, item_scores
from l2rec.modules.sequences import as_index, evaluating, in_batches
from l2rec.modules.trie import END, Trie
from l2rec.protocols import Losses, Scorer

PRETRAINED = "the paper's T5 is pretrained"
"""Remark on a method of which that is so."""
PAD = 0
SEARCHED = 64
"""Histories whose beams are searched at once."""
PASSES = 4
"""Passes of a batch: rows of like length in each, padded to its own longest. In one pass, most of
the tokens would be padding."""


class GeneratorConfig(BaseModel):
    """Options of the T5, for the methods that have one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(128, ge=1)
    """Width of the T5's states."""
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

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know beside the scores."""
        return beam_remark(self.beams, "codes"), "its T5 is trained from nothing"


class CodeGenerator(nn.Module):
    """Codes of the catalog, ``codes`` [N, L] int64 (to be written before they are read), and the T5
    on them.

    Args:
        config: options. items: N. width: L; without ``own_tokens`` other codes may have another.
            codes: K.
        dtype: of matrix products in training. own_tokens: every level of a code has tokens of its
            own. whole_words: tokens of one item share a vector, by its place in the history.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        items: int,
        *,
        width: int,
        codes: int,
        dtype: torch.dtype,
        own_tokens: bool = True,
        whole_words: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(items, width, dtype=torch.int64))
        self.codes: Tensor
        self._config, self._dtype = config, dtype
        shifts = torch.arange(width if own_tokens else 1) * codes
        self.register_buffer("shifts", shifts, persistent=False)
        self.shifts: Tensor
        t5 = T5Config(
            vocab_size=1 + codes + int(shifts[-1]),
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
        t5.decoder_start_token_id = PAD
        self.t5 = T5ForConditionalGeneration(t5)
        self.words = nn.Embedding(config.max_items, config.dim) if whole_words else None

    def __len__(self) -> int:
        return len(self.codes)

    def write(self, codes: Sequence[Sequence[int]]) -> None:
        """Give the items these codes, N rows of one or more each; N may be another than before."""
        rows = Ragged.from_rows(codes)
        grid = np.full((len(rows), int(rows.lengths.max())), END, dtype=np.int64)
        grid[np.arange(grid.shape[1]) < rows.lengths[:, None]] = rows.values
        self.codes = torch.from_numpy(grid).to(self.codes.device)

    def tokens(self, items: Tensor) -> Tensor:
        """Return the tokens of items [n]: [n, L] int64, padded on the right."""
        codes = self.codes[items]
        return (1 + self.shifts + codes).masked_fill(codes == END, PAD)

    def rows(self) -> list[tuple[int, ...]]:
        """Return the codes of all items, each as many as it has."""
        rows = zip(self.codes.tolist(), self.lengths().tolist(), strict=True)
        return [tuple(codes[:length]) for codes, length in rows]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return how many codes each item has, [N] int64."""
        lengths: npt.NDArray[np.int64] = (self.codes != END).sum(1).cpu().numpy()
        return lengths

    def read(self, histories: Ragged) -> tuple[Tensor, Tensor]:
        """Return the prompts of histories, padded on the right: tokens [B, S] int64 or, with whole
        words, vectors [B, S, dim]; and which are real, [B, S], 1 or 0.
        """
        device = self.codes.device
        tokens = self.tokens(as_index(histories.values, device))
        has = tokens != PAD  # [items of all histories, L]
        ends = F.pad(has.sum(1).cumsum(0), (1, 0))[as_index(histories.offsets, device)]
        lengths = ends.diff()
        real = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        nothing = real.new_full(real.shape, PAD, dtype=torch.int64)
        ids = nothing.masked_scatter(real, tokens[has])
        if self.words is None:
            return ids, real.long()
        place = flat_index(np.zeros_like(histories.lengths), histories.lengths)
        place_of_tokens = as_index(place, device)[:, None].expand_as(has)[has]
        words = self.words(nothing.masked_scatter(real, place_of_tokens))
        return self.t5.shared(ids) + words, real.long()

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return prefixes, each with the item after it, in batches of like length."""
        return TrainingBatches(
            sequences,
            supervision="last",
            max_items=self._config.max_items,
            negatives=0,
            item_costs=self.lengths(),
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
            targets_per_user=self._config.targets_per_user,
        )

    def loss(self, batch: Batch) -> Losses:
        """Compute the cross-entropy of the next item's tokens, mean over all of them."""
        return self.loss_of(*self.read(batch.histories), batch)

    def loss_of(self, prompts: Tensor, real: Tensor, batch: Batch) -> Losses:
        """Compute the same from prompts, which are as `read` returns them."""
        lengths = real.sum(1)
        order = lengths.argsort(stable=True)
        said = self.tokens(as_index(batch.targets, real.device))
        starts = F.pad(said[:, :-1], (1, 0), value=PAD)
        logits, computed = [], 0
        for rows in order.chunk(PASSES):
            width = int(lengths[rows].max())
            with torch.autocast(real.device.type, self._dtype, self._dtype != torch.float32):
                found = self.t5(
                    **as_inputs(prompts[rows, :width]),
                    attention_mask=real[rows, :width],
                    decoder_input_ids=starts[rows],
                )
            logits.append(found.logits.float().flatten(0, 1))
            computed += len(rows) * width
        total = F.cross_entropy(torch.cat(logits), said[order].flatten(), ignore_index=PAD)
        return Losses(total, {"next": total.detach()}, int(real.sum()), computed)

    def scorer(self) -> Scorer:
        """Return histories -> log-probabilities [B, N] float32 of what the beam found, -inf for all
        other items.
        """
        tokens = self.tokens(torch.arange(len(self), device=self.codes.device)).cpu().numpy()
        ends = np.concatenate(([0], self.lengths().cumsum()))
        trie = Trie.of(Ragged(tokens[tokens != PAD], ends), self.codes.device)

        def search(rows: Ragged) -> Tensor:
            decoder = Seq2SeqDecoder(self.t5, *self.read(rows))
            return item_scores(beam_search(decoder, trie, self._config.beams, len(rows)), trie)

        def score(histories: Ragged) -> Tensor:
            recent = histories.tail(self._config.max_items)
            with evaluating(self):
                parts, order = in_batches(
                    recent, recent.lengths, search, max_rows=SEARCHED, max_cost=2**15
                )
            return torch.cat(parts)[order.to(parts[0].device)]

        return score
