"""Room behind the rows of a tensor, so that adding a few does not copy all."""

from __future__ import annotations

__all__ = ["Room"]

import torch
from torch import Tensor

SPARE = 8
"""An eighth of the rows is left free behind them, and some at least."""


class Room:
    """Memory of rows that are added to again and again.

    Rows that were returned stay as they are while others follow them: those are written behind.
    """

    def __init__(self) -> None:
        self._room: Tensor | None = None

    @torch.no_grad()
    def followed(self, rows: Tensor, more: Tensor) -> Tensor:
        """Return ``rows`` [n, ...] and ``more`` [m, ...] as one tensor: torch.cat, which copies
        ``rows`` only where they do not lie in this room, or fill it.

        Rows that followed ``rows`` in the room are given up.
        """
        known, both = len(rows), len(rows) + len(more)
        room = self._room
        if room is None or len(room) < both or not _lie_in(rows, room):
            room = rows.new_empty((both + max(both // SPARE, 16), *rows.shape[1:]))
            room[:known] = rows
            self._room = room
        room[known:both] = more
        return room[:both]


def _lie_in(rows: Tensor, room: Tensor) -> bool:
    """Say whether rows are the first of a room that may be written to."""
    writable = torch.is_inference_mode_enabled() or not room.is_inference()
    return writable and rows.data_ptr() == room.data_ptr()
