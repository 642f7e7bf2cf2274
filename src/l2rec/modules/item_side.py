"""The item side of L2Rec: what the behavioural view reads, and what users are compared with.

    EncodedItems   the paper: an item is a history of one item through the same pipeline; the loss
                   compares users with the items of the batch (Eq. 8)
    CatalogItems   ours: the same pipeline, but the loss compares users with the whole catalog, and
                   an item may have a free residual r_i beside its text

Legend: P predictions, N items, n distinct items of a batch, D hidden size.
"""

from __future__ import annotations

__all__ = ["CatalogItems", "Comparison", "EncodedItems", "ItemSide"]

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.ragged import IntArray, Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.entry import Entry
from l2rec.modules.experts import Routing
from l2rec.modules.fusion import AdaptiveFusion
from l2rec.modules.item_text import catalog_vectors, text_vectors
from l2rec.modules.objectives import Cells, contrastive_loss, cosine, fused_catalog_loss
from l2rec.modules.processes import Part, everyone, from_first
from l2rec.modules.room import Room
from l2rec.modules.sequences import as_index, history_cells, one_each
from l2rec.modules.text_table import TextTable
from l2rec.modules.views import View

RESIDUAL_DROPOUT = 0.5
"""Dropout of r_i of `CatalogItems`."""


class Encoded(Protocol):
    """Items that passed the pipeline as histories of one: h^F [n, D]."""

    @property
    def fused(self) -> Tensor: ...
    @property
    def routing(self) -> Routing | None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def computed_tokens(self) -> int: ...


LookUp = Callable[[IntArray], Tensor]
"""Item ints [n] -> what the behavioural view reads of them, [n, D] float32."""
Views = tuple[View, ...]
Encode = Callable[[Ragged, Views], Encoded]
"""Histories of one item, and the views to read -> their encoding."""


@dataclass(frozen=True)
class Comparison:
    """One batch's users against items, Eq. 8.

    rec: L_Rec, a scalar.
    routings, tokens, computed_tokens: of items that were encoded for it.
    """

    rec: Tensor
    routings: list[Routing] = field(default_factory=list)
    tokens: int = 0
    computed_tokens: int = 0


class ItemSide(Protocol):
    """Item vectors of L2Rec. Item ints count the catalog first, then what `add` was given."""

    @property
    def cached(self) -> list[Path]:
        """Cache entries it was built from."""
        ...

    @property
    def rows(self) -> Tensor:
        """What the behavioural view reads of every item, [N, D] float32.

        Computed at each call, in training with noise.
        """
        ...

    def look_up(self) -> LookUp:
        """Return a function that takes `rows`: of one call for a step or an evaluation."""
        ...

    def place(self, view: View, h: Tensor) -> Tensor:
        """Return h^v [P, D] of a view's output h [P, D], as it enters Eq. 7."""
        ...

    def compare(
        self,
        batch: Batch,
        users: Tensor,
        position: IntArray,
        targets: npt.NDArray[np.integer],
        temperature: Tensor,
        views: Views,
        encode: Encode,
    ) -> Comparison:
        """Compare the users of a batch, h^F [P, D], with items.

        position: [P] place in the batch's flat items of the newest that each prediction has seen.
        targets: [P] items to predict. views: those that are trained.
        """
        ...

    def add(self, tokens: Ragged) -> None:
        """Add items by the token ids of their texts, after the entry did."""
        ...

    def shrink(self, count: int) -> None:
        """Forget all items after the first ``count``."""
        ...

    def restrict(self, items: npt.NDArray[np.integer]) -> None:
        """Take note of the items that training holds, one for each event."""
        ...

    def prior(self) -> Tensor | None:
        """Return what the loss adds for an item's own parameters, a scalar; None for nothing."""
        ...

    def refresh(self, encode: Callable[[Ragged], Tensor]) -> None:
        """Compute anew what is kept for an epoch. encode: histories -> h^S [B, D], no gradient."""
        ...

    def freeze(self) -> None:
        """Compute once what no history changes, until training or loading ends it."""
        ...


class EncodedItems:
    """The paper's item side: pooled texts in, the pipeline's own output to compare with.

    Args:
        backbone: the frozen language model. tokens: token ids of the N texts.
        entry: where the views enter the backbone, of as many items.
        pool: ``embeddings``, pool(Embed(c_i)) of Eq. 2, or of the states at layer K; or
            ``encoder``, the frozen backbone's text vectors. None: nobody reads items as vectors.
        text_tokens: most tokens of a text for ``encoder``.
        share_negatives: contrast users with the sampled items of the whole batch.
        normalize_views: scale h^v to unit length.
        cache: folder for text vectors; None keeps nothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Ragged,
        entry: Entry,
        *,
        pool: Literal["embeddings", "encoder"] | None,
        text_tokens: int,
        share_negatives: bool,
        normalize_views: bool,
        cache: Path | None,
    ) -> None:
        self._backbone, self._entry = backbone, entry
        self._pool, self._text_tokens = pool, text_tokens
        self._share_negatives, self._normalize_views = share_negatives, normalize_views
        self.cached: list[Path] = []
        if pool == "encoder":
            self.rows, self.cached = catalog_vectors(backbone, tokens, text_tokens, cache)
        elif pool == "embeddings":
            self.rows = entry.pooled()
        else:
            self.rows = torch.empty(0, entry.width, device=backbone.device)
        self._room = Room()

    def look_up(self) -> LookUp:
        """Return a function that takes the rows."""
        return rows_of(self.rows)

    def place(self, view: View, h: Tensor) -> Tensor:
        """Return h itself, or at unit length."""
        return F.normalize(h, dim=-1) if self._normalize_views else h

    def compare(
        self,
        batch: Batch,
        users: Tensor,
        position: IntArray,
        targets: npt.NDArray[np.integer],
        temperature: Tensor,
        views: Views,
        encode: Encode,
    ) -> Comparison:
        """Contrast with the positives of the batch and each user's sampled items, encoded once.

        Of a batch that is dealt out over processes, each encodes a part of the items of all.
        """
        device = self._backbone.device
        wanted, _ = everyone(as_index(targets, device))
        sampled, _ = everyone(as_index(batch.negatives.reshape(-1), device))
        distinct = torch.cat((wanted, sampled)).unique().cpu().numpy()
        part = Part.of(len(distinct))
        encoded = encode(one_each(distinct[part.rows]), views)
        positive = torch.from_numpy(np.searchsorted(distinct, targets)).to(device)
        positives = torch.from_numpy(np.searchsorted(distinct, wanted.cpu().numpy())).to(device)
        scores = cosine(users, part.joined(encoded.fused)) / temperature
        rec = contrastive_loss(scores, positive, self._negatives(batch, distinct, positives))
        return _comparison(rec, encoded)

    def _negatives(
        self, batch: Batch, distinct: npt.NDArray[np.integer], positives: Tensor
    ) -> Tensor:
        """Mark the negatives [B, n] bool: the ``positives`` of the batch (columns, int64), and each
        user's own sampled items (or, with ``share_negatives``, everybody's). The column of the
        row's own positive is set by the loss.
        """
        device = positives.device
        if self._share_negatives:
            return torch.ones(len(batch), len(distinct), dtype=torch.bool, device=device)
        allowed = torch.zeros(len(batch.users), len(distinct), dtype=torch.bool, device=device)
        sampled = torch.from_numpy(np.searchsorted(distinct, batch.negatives)).to(device)
        allowed.scatter_(1, sampled, True)
        allowed[:, positives.unique()] = True
        return allowed

    def add(self, tokens: Ragged) -> None:
        """Pool the new texts."""
        with torch.no_grad():
            if self._pool == "encoder":
                new = text_vectors(self._backbone, tokens, self._text_tokens)
            else:
                new = self._entry.pooled(len(self.rows)) if self._pool else self.rows[:0]
            self.rows = self._room.followed(self.rows, new)

    def shrink(self, count: int) -> None:
        """Cut the rows."""
        self.rows = self.rows[:count]

    def restrict(self, items: npt.NDArray[np.integer]) -> None:
        """Do nothing: no item has parameters of its own."""

    def prior(self) -> Tensor | None:
        """Return None: there is nothing to hold back."""
        return None

    def refresh(self, encode: Callable[[Ragged], Tensor]) -> None:
        """Do nothing: items are encoded in every step."""

    def freeze(self) -> None:
        """Do nothing: rows are computed already."""


class CatalogItems(nn.Module):
    """The paper's item side for a loss over the whole catalog, every position a target.

    An item is a history of one through the pipeline, E^B = P_U(norm(e_i + r_i)). The behavioural
    vectors of the catalog are one token an item and are computed in every step, with gradient. The
    semantic ones are h^S as the weights were when the epoch began (`refresh`): from there gradients
    reach the gate alone, and P_S where items have one.

    With ``sampled`` items a step compares with the items to predict and so many others, drawn
    uniformly; each of these stands for as many as were left out, in the sum under Eq. 8.

    Args:
        backbone: the frozen language model. tokens: token ids of the N texts.
        text_tokens: most tokens of a text. text_dropout: dropout of the text vectors in training.
        residual: a trained r_i, zero at the start, for the items that training holds.
        prior: kappa of `prior`; 0 is none.
        sampled: most other items that a step compares with; 0: all. fusion: ACF, the users' own.
        project: P_v of Eq. 7 for items too. semantic: the semantic view is read.
        cache: folder for text vectors; None keeps nothing.
    """

    _backbone: Backbone
    _fusion: AdaptiveFusion

    def __init__(
        self,
        backbone: Backbone,
        tokens: Ragged,
        *,
        text_tokens: int,
        text_dropout: float,
        residual: bool,
        prior: float,
        sampled: int,
        project: bool,
        semantic: bool,
        fusion: AdaptiveFusion,
        cache: Path | None,
    ) -> None:
        super().__init__()
        # The model's own: not registered here, or they would be saved twice.
        object.__setattr__(self, "_backbone", backbone)
        object.__setattr__(self, "_fusion", fusion)
        self._text_tokens, self._sampled, self._project = text_tokens, sampled, project
        vectors, self.cached = catalog_vectors(backbone, tokens, text_tokens, cache)
        self.table = TextTable(
            vectors, RESIDUAL_DROPOUT, text_dropout, linear=False, residual=residual
        ).to(backbone.device)
        self._known: IntArray = np.arange(len(vectors))
        self._prior, self._events = prior, 1
        self.semantic: Tensor | None
        self.register_buffer("semantic", torch.zeros_like(vectors) if semantic else None)

    @property
    def count(self) -> int:
        """Items of the catalog that training knows."""
        return len(self.table.held)

    @property
    def device(self) -> torch.device:
        """Where the items are."""
        return self.table.mean.device

    @property
    def rows(self) -> Tensor:
        """norm(e_i + r_i) [N, D] float32."""
        table: Tensor = self.table()
        return table

    def look_up(self) -> LookUp:
        """Return a function that takes the rows; with a sample, in training, one that computes them
        for the items that are asked for, in each call with noise of its own.
        """
        if not (self.training and self._sampled):
            return rows_of(self.rows)

        def some(items: IntArray) -> Tensor:
            distinct, place = np.unique(items, return_inverse=True)
            rows: Tensor = self.table(as_index(distinct, self.device))
            return rows.index_select(0, as_index(place, self.device))

        return some

    def place(self, view: View, h: Tensor) -> Tensor:
        """Return h at unit length; the semantic one centred as the texts are."""
        h = F.normalize(h, dim=-1)
        return F.normalize(h - self.table.mean, dim=-1) if view == "semantic" else h

    def refresh(self, encode: Callable[[Ragged], Tensor]) -> None:
        """Compute the semantic vectors anew."""
        assert self.semantic is not None
        self.semantic.copy_(encode(one_each(np.arange(self.count, dtype=np.int32))))

    def _compared(self, targets: npt.NDArray[np.integer]) -> tuple[IntArray, Tensor | None]:
        """Return the items that a step compares with, ascending [n], and the log of how many each
        of them stands for [n, 1] float32; None where these are all that training holds. Another
        item, which is never to be predicted, would only be pushed away by its text.
        """
        device, known, count = self.device, self._known, len(self._known)
        wanted = everyone(as_index(targets, device))[0].unique().cpu().numpy()
        if not self._sampled or len(wanted) + self._sampled >= count:
            return known, None
        drawn = from_first(torch.randperm(count)[: self._sampled].to(device))
        items = np.union1d(wanted, known[drawn.cpu().numpy()])
        others = len(items) - len(wanted)
        stands_for = np.where(np.isin(items, wanted), 1.0, (count - len(wanted)) / max(1, others))
        log = torch.from_numpy(np.log(stands_for)).float()
        return items, log[:, None].to(device)

    def compare(
        self,
        batch: Batch,
        users: Tensor,
        position: IntArray,
        targets: npt.NDArray[np.integer],
        temperature: Tensor,
        views: Views,
        encode: Encode,
    ) -> Comparison:
        """Compare with all items that training holds, or with a sample of them.

        Of a batch that is dealt out over processes, each encodes a part of these items.
        """
        device = self.device
        chosen, log = self._compared(targets)
        without = self._held(batch.histories, position, targets)
        if len(chosen) < self.count:
            without = _among(without, chosen)
            targets = np.searchsorted(chosen, targets)
        encoded: Encoded | None = None
        if "behavioral" in views:
            part = Part.of(len(chosen))
            encoded = encode(one_each(chosen[part.rows]), ("behavioral",))
            fused = of_behavior = part.joined(encoded.fused)
        if "semantic" in views:
            assert self.semantic is not None
            semantic = self.semantic.index_select(0, as_index(chosen, device))
            _, _, semantic, _ = self._fusion(None, semantic, project=self._project)
            fused = semantic if encoded is None else self._fusion.fuse(of_behavior, semantic)[0]
        scaled = F.normalize(users.float(), dim=-1) / temperature
        items = F.normalize(fused.float(), dim=-1)
        if log is not None:  # as one more dimension of the inner product
            scaled = torch.cat((scaled, scaled.new_ones(len(scaled), 1)), dim=1)
            items = torch.cat((items, log), dim=1)
        rec = fused_catalog_loss(
            scaled, items, as_index(targets, device), without=without, dtype=self._backbone.dtype
        )
        return _comparison(rec, encoded)

    def _held(
        self, histories: Ragged, position: IntArray, targets: npt.NDArray[np.integer]
    ) -> Cells:
        """Return the scores that the loss leaves out: what a prefix holds, but for its target."""
        row, column = history_cells(histories, position, self.count)
        other = column != torch.from_numpy(targets.astype(np.int64))[row]
        return Cells(row[other].to(self.device), column[other].to(self.device))

    def add(self, tokens: Ragged) -> None:
        """Add rows that are their texts alone."""
        self.table.extend(text_vectors(self._backbone, tokens, self._text_tokens))

    def shrink(self, count: int) -> None:
        """Cut the rows."""
        self.table.shrink(count)

    def restrict(self, items: npt.NDArray[np.integer]) -> None:
        """Give a free residual to the items that training holds, and to no others, and compare with
        them alone.
        """
        self.table.restrict(items)
        self._known, self._events = np.unique(items), len(items)

    def prior(self) -> Tensor | None:
        """Return kappa / 2E sum_i |r_i|^2, of E events of training: beside a mean over these, r_i ~
        N(0, 1/kappa), so that an item of few events stays near its text.
        """
        residual = self.table.residual
        if residual is None or not self._prior:
            return None
        return self._prior / (2 * self._events) * residual.square().sum()

    def freeze(self) -> None:
        """Compute the rows once."""
        self.table.keep()


def rows_of(rows: Tensor) -> LookUp:
    """Return a function that takes rows [N, D] that are there already."""
    return lambda items: rows.index_select(0, as_index(items, rows.device))


def _comparison(rec: Tensor, encoded: Encoded | None) -> Comparison:
    """Return the loss with what the items took that were encoded for it."""
    if encoded is None:
        return Comparison(rec)
    routings = [] if encoded.routing is None else [encoded.routing]
    return Comparison(rec, routings, encoded.tokens, encoded.computed_tokens)


def _among(cells: Cells, chosen: IntArray) -> Cells:
    """Return the cells whose columns are chosen, ascending, as cells of these columns alone."""
    kept = torch.from_numpy(chosen).to(cells.columns)
    place = torch.searchsorted(kept, cells.columns).clamp_max(len(kept) - 1)
    found = kept[place] == cells.columns
    return Cells(cells.rows[found], place[found])
