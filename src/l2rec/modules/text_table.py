"""A trained table of items that starts at the backbone's vectors of their texts."""

from __future__ import annotations

__all__ = ["TextTable"]

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.ragged import IntArray
from l2rec.modules.kept import Keeps
from l2rec.modules.room import Room


class TextTable(Keeps):
    """T = norm(E + E L + R), rows of unit length.

    E: [N, D] the backbone's text vectors, centred and normalised, frozen. L: [D, D] and R: [N, D]
    start at zero. Items added after training have no row of R: norm(e + e L). Neither have items
    that training does not hold (`restrict`): negatives in every step and never a target, their rows
    would sink below everything.

    Args:
        text: [N, D] the backbone's text vectors. dropout: of R in training.
        text_dropout: of E in training. linear: False leaves L out. residual: False leaves R out.
    """

    _kept: Tensor | None

    def __init__(
        self,
        text: Tensor,
        dropout: float,
        text_dropout: float = 0.0,
        *,
        linear: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", text.mean(0), persistent=True)
        self.text: Tensor
        self.mean: Tensor
        self.register_buffer("text", F.normalize(text - self.mean, dim=-1), persistent=False)
        dim = text.shape[-1]
        self.linear = nn.Parameter(torch.zeros(dim, dim)) if linear else None
        self.residual = nn.Parameter(torch.zeros_like(text)) if residual else None
        self.register_buffer("held", torch.ones(len(text), 1))  # 0: no row of R
        self.held: Tensor
        self.dropout, self.text_dropout = dropout, text_dropout
        self._without_text = 0
        self._room = Room()

    def keep(self) -> None:
        """Compute T once, for weights that no longer change; training or loading ends it."""
        self._kept = None
        if not self.training:
            with torch.inference_mode():
                self._kept = self()

    @torch.no_grad()
    def restrict(self, items: IntArray) -> None:
        """Give rows of R to the items that training holds: ``items``, in any order, repeated or
        not. Call it before the first step, since it changes T.
        """
        self._kept = None
        often = np.bincount(items, minlength=len(self.held))
        self.held.copy_(torch.from_numpy(often > 0)[:, None])

    @torch.no_grad()
    def extend(self, text: Tensor) -> None:
        """Add items by their backbone text vectors [n, D] alone. Of a table that was kept, their
        rows of T are all that is kept of them, and it cannot be trained any more.
        """
        if self._kept is None:
            self.text = torch.cat((self.text, F.normalize(text - self.mean, dim=-1)))
        else:
            self._kept = self._room.followed(self._kept, self.of_text(text))
            self._without_text += len(text)

    def of_text(self, text: Tensor) -> Tensor:
        """Return rows [n, D] of items that were not trained on, by their text vectors [n, D]."""
        added = F.normalize(text - self.mean, dim=-1)
        return F.normalize(self._adapted(added), dim=-1)

    def _adapted(self, text: Tensor) -> Tensor:
        return text if self.linear is None else text + text @ self.linear

    def shrink(self, count: int) -> None:
        """Undo `extend`: keep the first ``count`` items."""
        left = min(count, len(self.text) + self._without_text)
        self._without_text = max(0, left - len(self.text))
        self.text = self.text[:count]
        if self._kept is not None:
            self._kept = self._kept[:count]

    def forward(self, items: Tensor | None = None) -> Tensor:
        """Return T [N, D] float32, or the rows of ``items`` [n] int64 alone, none of them added
        after training: where they are few, noise and gradients of all would be most of a step.
        """
        if self._kept is not None:
            return self._kept if items is None else self._kept.index_select(0, items)
        if self._without_text:
            raise RuntimeError(
                f"{self._without_text} items were added to a model that no longer learns; load the "
                "run again to train it"
            )
        text, held = self.text, self.held
        residual: Tensor | None = self.residual
        if items is not None:
            text = text.index_select(0, items)
            if residual is not None:
                residual, held = residual.index_select(0, items), held.index_select(0, items)
        rows = self._adapted(F.dropout(text, self.text_dropout, self.training))
        if residual is not None:
            trained = len(residual)
            own = torch.addcmul(
                rows[:trained], F.dropout(residual, self.dropout, self.training), held
            )
            rows = torch.cat((own, rows[trained:]))
        return F.normalize(rows, dim=-1)
