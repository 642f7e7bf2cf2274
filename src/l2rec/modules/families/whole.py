"""What models make for all tokens at once, made for packed rows.

Each function stands for the method ``plain`` of a module ``self``; rows: the `Packing`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def narrow(self: Any, plain: Any, rows: Any, first: Any, *more: Any, **kwargs: Any) -> Any:
    """Make a bias for the longest row: T5 is told lengths, MPNet hidden states [1, N, D]."""
    if isinstance(first, Tensor):
        return plain(first[:, : rows.longest])
    lengths = [rows.longest] * 2 if more else [first]  # LongT5: of blocks
    return plain(*lengths, **kwargs)


def mpt_alibi(
    self: Any, plain: Any, rows: Any, heads: int, _: int, *args: Any, **kwargs: Any
) -> Tensor:
    """Make slope times distance, [H, W, W] float32: exact where it is small, in any dtype."""
    to_end: Tensor = plain(heads, rows.longest, *args, **kwargs)  # [H, 1, W]
    return to_end - to_end.transpose(1, 2)


def positions(self: Any, plain: Any, rows: Any, shape: Any, *_: Any, **kwargs: Any) -> Any:
    """Embed positions from 0 in each row, where the model would count all tokens."""
    place = kwargs.get("position_ids")
    return plain(shape, position_ids=rows.positions if place is None else place)


def places(self: Any, plain: Any, rows: Any, *_: Any, **__: Any) -> Tensor:
    """Do as `positions`, for a table that would grow to the number of all tokens."""
    place = rows.positions + self.padding_idx + 1
    return self.weights.index_select(0, place)[None]  # type: ignore[no-any-return]


def nothing(*_: Any, **__: Any) -> None:
    """Make nothing instead of [N, N]: led attention does not read it."""
