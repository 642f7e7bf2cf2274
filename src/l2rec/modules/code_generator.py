"""A small T5, trained from nothing, that reads the codes of a history and says the next item's.

    encoder: codes of the newest items, one token each    decoder: the codes of the next item
    score of an item: log-probability of its codes, by beam search in the trie of the catalog

Legend: B users, N items, L codes of an item, K codes
of a level, S tokens of a history.
"""

from __future__ import annotations

__all__ = ["CodeGenerator"]

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.ragged import Ragged
from l2rec.modules.beam import Seq2SeqDecoder, beam_search, item_scores
from l2rec.modules.sequences import as_index, evaluating, in_batches
from l2rec.modules.trie import Trie
from l2rec.protocols import Losses, Scorer

PAD = 0
SEARCHED = 64
"""Histories whose beams are searched at once."""


class CodeGenerator(nn.Module):
    """Codes of the catalog, ``codes`` [N, L] int64, and the T5 on them.

    Args:
        items: N. width: L. codes: K. dim, layers, heads, head_dim, inner, dropout: of the T5,
            layers of the encoder and as many of the decoder.
        max_items: most items of a history that are read. targets_per_user: positions of a sequence
            that are predicted in an epoch, drawn anew in each. beams: codes kept while searching.
        dtype: of matrix products in training. own_tokens: every level of a code has tokens of its
            own. whole_words: tokens of one item share a vector, by its place in the history.
    """

    def __init__(
        self,
        items: int,
        *,
        width: int,
        codes: int,
        dim: int,
        layers: int,
        heads: int,
        head_dim: int,
        inner: int,
        dropout: float,
        max_items: int,
        targets_per_user: int,
        beams: int,
        dtype: torch.dtype,
        own_tokens: bool = True,
        whole_words: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(items, width, dtype=torch.int64))
        self.codes: Tensor
        self._max_items, self._beams = max_items, beams
        shifts = torch.arange(width) * codes * own_tokens
        self.register_buffer("shifts", shifts, persistent=False)
        self.shifts: Tensor
        self._targets_per_user, self._dtype = targets_per_user, dtype
        config = T5Config(
            vocab_size=1 + codes + int(shifts[-1]),
            d_model=dim,
            d_kv=head_dim,
            d_ff=inner,
            num_layers=layers,
            num_heads=heads,
            dropout_rate=dropout,
            feed_forward_proj="relu",
            pad_token_id=PAD,
            eos_token_id=None,
        )
        config.decoder_start_token_id = PAD
        self.t5 = T5ForConditionalGeneration(config)
        self.words = nn.Embedding(max_items, dim) if whole_words else None

    def __len__(self) -> int:
        return len(self.codes)

    def tokens(self, items: Tensor) -> Tensor:
        """Return the tokens of items [n]: [n, L] int64."""
        return 1 + self.shifts + self.codes[items]

    def read(self, histories: Ragged) -> tuple[Tensor, Tensor]:
        """Return the prompts of histories, padded on the right: tokens [B, S] int64 or, with whole
        words, vectors [B, S, dim]; and which are real, [B, S], 1 or 0.
        """
        width = self.codes.shape[1]
        lengths = torch.from_numpy(histories.lengths * width).to(self.codes.device)
        real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        flat = self.tokens(as_index(histories.values, self.codes.device)).flatten()
        ids = real.new_full(real.shape, PAD, dtype=torch.int64).masked_scatter(real, flat)
        if self.words is None:
            return ids, real.long()
        place = torch.arange(real.shape[1], device=ids.device) // width
        return self.t5.shared(ids) + self.words(place), real.long()

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return prefixes, each with the item after it, in batches of like length."""
        return TrainingBatches(
            sequences,
            supervision="last",
            max_items=self._max_items,
            negatives=0,
            item_costs=np.full(len(self), self.codes.shape[1]),
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
            targets_per_user=self._targets_per_user,
        )

    def loss(self, batch: Batch) -> Losses:
        """Compute the cross-entropy of the next item's tokens, mean over all of them."""
        prompts, real = self.read(batch.histories)
        said = self.tokens(as_index(batch.targets, real.device))
        given = "input_ids" if self.words is None else "inputs_embeds"
        with torch.autocast(real.device.type, self._dtype, self._dtype != torch.float32):
            found = self.t5(
                **{given: prompts},
                attention_mask=real,
                decoder_input_ids=F.pad(said[:, :-1], (1, 0), value=PAD),
            )
        total = F.cross_entropy(found.logits.float().flatten(0, 1), said.flatten())
        return Losses(total, {"next": total.detach()}, int(real.sum()), real.numel())

    def scorer(self) -> Scorer:
        """Return histories -> log-probabilities [B, N] float32 of what the beam found, -inf for all
        other items.
        """
        tokens = self.tokens(torch.arange(len(self), device=self.codes.device)).cpu().numpy()
        trie = Trie.of(Ragged.from_rows(tokens), self.codes.device)

        def search(rows: Ragged) -> Tensor:
            decoder = Seq2SeqDecoder(self.t5, *self.read(rows))
            return item_scores(beam_search(decoder, trie, self._beams, len(rows)), trie)

        def score(histories: Ragged) -> Tensor:
            recent = histories.tail(self._max_items)
            with evaluating(self):
                parts, order = in_batches(
                    recent, recent.lengths, search, max_rows=SEARCHED, max_cost=2**15
                )
            return torch.cat(parts)[order.to(parts[0].device)]

        return score
