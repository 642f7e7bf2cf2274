"""LETTER: Learnable Item Tokenization for Generative Recommendation.

Wang, Bao, Lin, Zhang, Ge, Wu, Chua. CIKM '24, https://arxiv.org/abs/2405.07314

    TIGER (`l2rec.methods.tiger`) with another quantiser:
    L_cf   in-batch softmax of z^ . e^cf: codes of items that the same users choose are near;
           e^cf are the item vectors of a SASRec that is trained first, of the width of a code
    L_div  at each level, of the other codes in the cluster of an item's code one is drawn, and
           predicted from the code: softmax of E_{c_l} . E over all codes but itself
    L      = L_RQ-VAE + alpha L_cf + beta L_div

The last level is balanced in training (Sinkhorn), and items that share all codes afterwards get
others at that level, so that no further code is needed to tell them apart.

Deviations:

- Clusters have one size: codes are assigned at the least cost to centres of k-means. The paper has
  constrained k-means (at least ten codes a cluster).
- Items that share all codes get others at the least cost; the authors' code draws on Sinkhorn for
  up to twenty rounds, which may leave some together.
- SASRec sees training prefixes alone. The authors' vectors come from a model of whole sequences,
  test items included: ``vectors=leaky`` is there to reproduce that; it prints a warning, and stands
  beside the scores wherever they are shown.
- The ranking loss of the T5 has temperature 1, where it is the cross-entropy, as in their script.
- Clusters are made anew once in fifty passes; the authors' code makes them at each. The coder's
  layers are TIGER's, narrower than theirs.
- As for TIGER: text vectors of the recipe's backbone, codes that nothing is nearest to are moved
  (the authors' code has no such step), AdamW, a processor's number of steps.
"""

from __future__ import annotations

__all__ = ["LETTER", "LETTERConfig"]

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.methods.sasrec import SASRec, SASRecConfig
from l2rec.methods.tiger import TIGER, TIGERConfig
from l2rec.modules.backbone import Backbone
from l2rec.modules.quantizer import centres
from l2rec.protocols import EpochBatches, Stage


class LETTERConfig(TIGERConfig):
    """Options of LETTER, beside TIGER's."""

    levels: int = Field(4, ge=1)
    """Codes of an item."""
    collaborative: float = Field(0.01, ge=0)
    """alpha, weight of L_cf."""
    diversity: float = Field(1e-4, ge=0)
    """beta, weight of L_div."""
    clusters: int = Field(10, ge=1)
    """Clusters of the codes of a level."""
    sasrec_epochs: int = Field(60, ge=1)
    """Most epochs of SASRec."""
    sasrec_lr: float = Field(1e-3, gt=0)
    """Learning rate of SASRec."""
    vectors: Literal["training", "leaky"] = "training"
    """What SASRec is trained on: training sequences or, ``leaky``, whole ones with test items."""

    @property
    def leaks(self) -> str:
        """What is made of held-out items."""
        whole = "vectors=leaky draws codes to item vectors of whole sequences"
        return whole * (self.vectors == "leaky")


class LETTER(TIGER):
    """The recommender."""

    Config = LETTERConfig
    item_tensors = frozenset({"generator.codes", "sasrec.items.weight"})
    counts = False
    sinkhorn = 0.003
    config: LETTERConfig

    def __init__(
        self,
        config: LETTERConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__(config, catalog, backbone, cache=cache)
        self.sasrec = SASRec(SASRecConfig(dim=config.code_dim), catalog)
        clusters = torch.zeros(config.levels, config.codes, dtype=torch.int64)
        self.register_buffer("clusters", clusters)
        self.clusters: Tensor
        self._whole: Ragged | None = None

    @property
    def leaks(self) -> str:
        """What is made of held-out items."""
        return self.config.leaks

    def leak(self, sequences: Ragged) -> None:
        """Train SASRec on whole sequences."""
        self._whole = sequences

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return SASRec's stage, then TIGER's two."""
        sasrec = self.sasrec.for_vectors(self.config.sasrec_lr, self.config.sasrec_epochs)
        read = sasrec.batches

        def batches(sequences: Ragged, **options: int) -> EpochBatches:
            return read(sequences if self._whole is None else self._whole, **options)

        return [replace(sasrec, batches=batches), *super().stages(lr, weight_decay)]

    def _revive(self, epoch: int) -> None:
        super()._revive(epoch)
        for level, book in enumerate(self.quantizer.codebooks.detach()):
            self.clusters[level] = alike_in_size(book, self.config.clusters, seed=level)

    def _code_parts(self, items: Tensor) -> dict[str, Tensor]:
        """Compute TIGER's parts, L_cf and L_div."""
        whole, found, parts = self.quantizer(self.text(items))
        vectors = F.embedding(items, self.sasrec.items.weight.detach())
        own = torch.arange(len(items), device=items.device)
        parts["collaborative"] = self.config.collaborative * F.cross_entropy(whole @ vectors.T, own)
        parts["diversity"] = self.config.diversity * self._diversity(found.codes)
        return dict(parts)

    def _diversity(self, codes: Tensor) -> Tensor:
        """Compute L_div of items with these codes [n, L], mean over items and levels."""
        terms = []
        for level, book in enumerate(self.quantizer.codebooks):
            code, cluster = codes[:, level], self.clusters[level]
            alike = cluster[code][:, None] == cluster  # [n, K]
            alike = alike.scatter(1, code[:, None], False)
            some = alike.any(1)  # a cluster of one has no other code
            if not bool(some.any()):
                continue
            positive = torch.multinomial(alike[some].float(), 1).squeeze(1)
            logits = (F.embedding(code[some], book) @ book.T).scatter(
                1, code[some][:, None], float("-inf")
            )
            terms.append(F.cross_entropy(logits, positive))
        return torch.stack(terms).mean() if terms else codes.new_zeros((), dtype=torch.float32)

    @torch.no_grad()
    def _told_apart(self, codes: Tensor, known: int) -> Tensor:
        """Give items that share all but the last code different ones there, at the least squared
        distance in all, where two of them have the same; those that are known keep theirs.
        """
        codes, book = codes.clone(), self.quantizer.codebooks[-1]
        before = self.quantizer.residuals(self.text.vectors)[:, -1]
        _, group = codes[:, :-1].unique(dim=0, return_inverse=True)
        _, which, sizes = codes.unique(dim=0, return_inverse=True, return_counts=True)
        for number in group[sizes[which] > 1].unique().tolist():
            items = (group == number).nonzero().flatten()
            taken = codes[items[items < known], -1]
            free = torch.ones(len(book), dtype=torch.bool, device=codes.device)
            free[taken] = False
            left, open_codes = items[items >= known], free.nonzero().flatten()
            cost = torch.cdist(before[left], book[open_codes]).square()
            # More items than codes: those that find none keep the nearest, and collide.
            row, column = linear_sum_assignment(cost.cpu().numpy())
            codes[left[torch.from_numpy(row)], -1] = open_codes[torch.from_numpy(column)]
        return codes


def alike_in_size(vectors: Tensor, count: int, *, seed: int) -> Tensor:
    """Cluster vectors [K, w] around ``count`` centres of k-means, of K / count each (rounded up or
    down), at the least squared distance in all: [K] int64.
    """
    places = torch.arange(len(vectors), device=vectors.device) % count
    cost = torch.cdist(vectors, centres(vectors, count, seed=seed)).square()[:, places]
    _, column = linear_sum_assignment(cost.cpu().numpy())
    return places[torch.from_numpy(column).to(places.device)]
