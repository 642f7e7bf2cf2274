"""TIGER: Recommender Systems with Generative Retrieval.

Rajput et al. NeurIPS '23, https://arxiv.org/abs/2305.05065

    1. semantic ids: a residual quantiser turns each text vector into codes, coarse to fine; one
       more code tells items apart that share them              l2rec.modules.quantizer
    2. a T5, trained from nothing, reads the codes of a history and says those of the next item
                                                                l2rec.modules.code_generator
    3. ranking: beam search among the codes of the catalog      l2rec.modules.beam

Deviations:

- Text vectors are those of the recipe's backbone; the paper's are Sentence-T5's.
- No token of the user: our users are their histories, so that a new one is no special case.
- Codes that nothing is nearest to are put where a vector stands, at the start of each epoch of the
  quantiser but those of its last tenth.
- The quantiser's epochs and the T5's are those of a processor, not the paper's 20,000 and 200,000
  steps. The quantiser learns by AdamW at 1e-3; the paper's by Adagrad at 0.4.

Items that the beam does not reach tie behind it, each at the mean of the ranks that are left: of
MRR they have next to nothing. Items of one code (only where more than ``codes`` share the others)
tie.
"""

from __future__ import annotations

__all__ = ["TIGER", "TIGERConfig"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.code_generator import CodeGenerator, GeneratorConfig
from l2rec.modules.frozen_text import FrozenText
from l2rec.modules.quantizer import ResidualQuantizer, usage
from l2rec.modules.sequences import ItemBatches, as_index
from l2rec.protocols import CodeUsage, Losses, Scorer, Stage, decayed


class TIGERConfig(GeneratorConfig):
    """Options of TIGER."""

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


class TIGER(nn.Module):
    """The recommender."""

    Config = TIGERConfig
    uses_backbone = True
    one_catalog = True
    """Items are codes of one catalog: a run is not trained on with more items."""
    item_tensors = frozenset({"generator.codes"})
    counts = True
    """Whether one more code tells items apart that share the quantiser's."""
    sinkhorn = 0.0
    """Epsilon of a balanced last level in the quantiser's training; 0: each takes the nearest."""

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
            sinkhorn=self.sinkhorn,
        )
        self.generator = CodeGenerator(
            config,
            len(texts),
            width=config.levels + self.counts,
            codes=config.codes,
            dtype=backbone.dtype,
        )
        if backbone.device.type != "meta":
            self.quantizer.fill(self.text.vectors, int(torch.randint(2**31, ())))
            self._take_codes(0)

    @property
    def n_items(self) -> int:
        """N, number of items, with those added later."""
        return len(self.generator)

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.text_tokens

    def code_usage(self) -> CodeUsage:
        """Describe how the catalog uses the codes of the quantiser."""
        return usage(self.generator.codes[:, : self.config.levels], self.config.codes)

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
                self.generator.batches,
                self.generator.loss,
                begin_epoch=self._take_codes,
            ),
        ]

    def item_batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> ItemBatches:
        """Return the items, several times over; no event is read."""
        return ItemBatches(
            np.ones(len(self.text), dtype=np.int64),
            batch_items=self.config.code_batch,
            batch_tokens=self.config.code_batch,
            seed=seed,
            epoch=epoch,
            passes=self.config.code_passes,
        )

    def code_loss(self, batch: Batch) -> Losses:
        """Compute the quantiser's loss of a batch of items."""
        parts = self._code_parts(as_index(batch.users, self.text.vectors.device))
        total, count = torch.stack(list(parts.values())).sum(), len(batch.users)
        return Losses(total, {name: part.detach() for name, part in parts.items()}, count, count)

    def _code_parts(self, items: Tensor) -> dict[str, Tensor]:
        """Compute the parts of the quantiser's loss of items [n], by name."""
        _, _, parts = self.quantizer(self.text(items))
        return dict(parts)

    def _revive(self, epoch: int) -> None:
        if 0 < epoch < 0.9 * self.config.code_epochs:
            self.quantizer.revive(self.text.vectors)

    def _take_codes(self, epoch: int) -> None:
        """Give every item its codes, before the first epoch of the T5."""
        if epoch == 0:
            codes = self.quantizer.codes(self.text.vectors)
            self.generator.codes.copy_(self._told_apart(codes, 0))

    def _told_apart(self, codes: Tensor, known: int) -> Tensor:
        """Return codes [N, width] of items with these of the quantiser [N, L], of which the first
        ``known`` are in use already.
        """
        return told_apart(codes, self.config.codes)

    # -- inference -------------------------------------------------------------------------------

    def scorer(self) -> Scorer:
        """Return histories -> log-probabilities [B, N] float32 of what the beam found, -inf for all
        other items.
        """
        return self.generator.scorer()

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once, and return their item ints.

        Raises:
            DataError: an empty text.
        """
        added = self.text.add(texts)
        codes = self.generator.codes[:, : self.config.levels]
        new = self.quantizer.codes(self.text(as_index(added, codes.device)))
        self.generator.codes = self._told_apart(torch.cat((codes, new)), len(codes))
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
