"""Histories and items on their way into a model: padded grids, index tensors, batches of rows."""

from __future__ import annotations

__all__ = [
    "FEW_ROWS",
    "ItemBatches",
    "as_index",
    "catalog_rows",
    "check_new_texts",
    "encode_rows",
    "evaluating",
    "history_cells",
    "in_batches",
    "last_of",
    "newest_state",
    "next_item_batches",
    "one_each",
    "pad",
    "raw_texts",
    "sequence_batches",
    "stacked",
]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.batches import Batch, TrainingBatches, plan_batches
from l2rec.data.ragged import Ragged, flat_index
from l2rec.errors import DataError
from l2rec.protocols import MakeBatches, UserEncoder

T = TypeVar("T")

FEW_ROWS = 128
"""``max_rows`` of `encode_rows` for wide item vectors: rows of so few histories are alike in length
and waste little on padding.
"""


def as_index(values: npt.NDArray[np.integer], device: torch.device | str) -> Tensor:
    """Copy ints of any width to an int64 tensor on a device."""
    return torch.from_numpy(values.astype(np.int64)).to(device)


def one_each(items: npt.NDArray[np.integer]) -> Ragged:
    """Return rows of one item each, in the given order."""
    return Ragged(items, np.arange(len(items) + 1))


def stacked(a: Ragged, b: Ragged) -> Ragged:
    """Return the rows of ``a``, then those of ``b``."""
    return Ragged(
        np.concatenate((a.values, b.values)),
        np.concatenate((a.offsets, a.offsets[-1] + b.offsets[1:])),
    )


def pad(histories: Ragged, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Arrange histories as a grid: item ints [B, T] int64, and which are real [B, T] bool.

    Items stand oldest first, padding on the right. Padding is the int 0, which is also an item:
    only the second tensor tells them apart.
    """
    lengths = histories.lengths
    real = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    items = np.zeros(real.shape, dtype=np.int64)
    items[real] = histories.values
    return torch.from_numpy(items).to(device), torch.from_numpy(real).to(device)


def last_of(states: Tensor, real: Tensor) -> Tensor:
    """Select the states [B, T, D] at the newest real position of each row: [B, D]."""
    last = real.sum(1) - 1
    return states[torch.arange(states.shape[0], device=states.device), last]


def newest_state(
    items: Tensor, states: Callable[[Tensor, Tensor], Tensor], max_items: int
) -> UserEncoder:
    """Build the `UserEncoder` whose users are the states after their newest items.

    states: item vectors [B, T, h] and which are real [B, T] -> states [B, T, D], of the whole grid.
    """
    return UserEncoder(items, lambda x, real: last_of(states(x, real), real), max_items)


def history_cells(
    histories: Ragged, ends: npt.NDArray[np.integer], n_items: int
) -> tuple[Tensor, Tensor]:
    """Return the cells of scores [P, n_items] whose items a prefix holds: rows, ascending, and
    columns, int64.

    ends: [P] positions in the histories' flat items of the newest item of each prefix.
    """
    starts = histories.offsets[np.searchsorted(histories.offsets, ends, side="right") - 1]
    counts = ends - starts + 1
    rows = np.repeat(np.arange(len(ends)), counts)
    cells = np.unique(rows * n_items + histories.values[flat_index(starts, counts)])
    row, column = (torch.from_numpy(part.astype(np.int64)) for part in divmod(cells, n_items))
    return row, column


class ItemBatches:
    """Batches of one epoch of a stage that learns from items, not from events.

    A batch has the items as its ``users`` and as its ``histories`` of one item each.

    Args:
        lengths: [N] int64 tokens of each item; one without any is left out.
        batch_items: most items of a batch.
        batch_tokens: most tokens of a batch.
        seed, epoch: of the order.
        passes: over the items, each in an order of its own.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        *,
        batch_items: int,
        batch_tokens: int,
        seed: int,
        epoch: int,
        passes: int = 1,
    ) -> None:
        self._items = np.flatnonzero(lengths)
        rng = np.random.default_rng([seed, epoch])
        self._plan = [
            rows
            for _ in range(passes)
            for rows in plan_batches(
                lengths[self._items], rng, max_rows=batch_items, max_cost=batch_tokens
            )
        ]

    def __len__(self) -> int:
        return len(self._plan)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches ``start``, ``start + 1``, ... of the epoch."""
        for rows in self._plan[start:]:
            items = self._items[rows]
            no_negatives = np.zeros((len(items), 0), dtype=np.int32)
            yield Batch(items, one_each(items), items[:0], no_negatives)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, without gradients; afterwards it is in the mode it was in.

    A model that is in evaluation mode is not touched: to switch all modules costs a server time.
    """
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def encode_rows(
    model: nn.Module,
    histories: Ragged,
    encode: Callable[[Ragged], Tensor],
    *,
    max_items: int,
    max_rows: int = 1024,
    max_cost: int = 32768,
) -> Tensor:
    """Encode any number of histories, those of like length together: [B, D] float32, in order.

    Args:
        model: put in evaluation mode meanwhile.
        histories: B of them.
        encode: maps some rows, without gradients, to one vector each [b, D].
        max_items: most items of a history that are read, the newest.
        max_rows: most rows of one call of ``encode``.
        max_cost: most items of one call, padding included.

    Raises:
        DataError: an empty history.
    """
    recent = histories.tail(max_items)
    with evaluating(model):
        parts, order = in_batches(
            recent,
            recent.lengths,
            lambda rows: encode(rows).float(),
            max_rows=max_rows,
            max_cost=max_cost,
        )
        if not parts:
            return encode(Ragged.from_rows([[0]])).float()[:0]
        return torch.cat(parts)[order.to(parts[0].device)]


def in_batches(
    histories: Ragged,
    costs: npt.NDArray[np.integer],
    encode: Callable[[Ragged], T],
    *,
    max_rows: int,
    max_cost: int,
) -> tuple[list[T], Tensor]:
    """Run ``encode`` over any number of histories, alike costs together.

    Returns:
        The result of each batch, and where each history went, [B] int64: of results with a row for
        each history, ``torch.cat(results)[order]`` is in the order given.

    Raises:
        DataError: an empty history.
    """
    if len(histories) and int(histories.lengths.min()) == 0:
        raise DataError("an empty history: give at least one item")
    plan = plan_batches(costs, None, max_rows=max_rows, max_cost=max_cost)
    order = np.argsort(np.concatenate(plan)) if plan else np.zeros(0, dtype=np.int64)
    return [encode(histories.take(rows)) for rows in plan], torch.from_numpy(order)


def raw_texts(items: npt.NDArray[np.integer] | Sequence[str]) -> list[str] | None:
    """Return the items as texts if that is what they are; None for catalog ints."""
    if len(items) and isinstance(items[0], str):
        return [str(text) for text in items]
    return None


def catalog_rows(
    items: npt.NDArray[np.integer] | Sequence[str], method: str, device: torch.device | str
) -> Tensor:
    """Return catalog ints as an int64 tensor.

    Raises:
        DataError: raw texts, which ``method`` (the name of the class) cannot read.
    """
    if raw_texts(items) is not None:
        raise DataError(
            f"{method} has a vector for each item it was trained on and none for a text; use a "
            "method that reads item texts"
        )
    return torch.from_numpy(np.asarray(items, dtype=np.int64)).to(device)


def check_new_texts(texts: Sequence[object]) -> None:
    """Refuse new items that have no text.

    Raises:
        DataError: an empty text, or what is no text.
    """
    # What stands for a missing text in a table, None or nan, is none either.
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError("a new item needs a text: it is all that is known of it")


def next_item_batches(n_items: int, max_items: int) -> MakeBatches:
    """Return batches in which every next item of every sequence is a target once an epoch."""
    return partial(sequence_batches, supervision="all", n_items=n_items, max_items=max_items)


def sequence_batches(
    sequences: Ragged,
    *,
    supervision: Literal["last", "all", "sequence"],
    n_items: int,
    max_items: int,
    seed: int,
    epoch: int,
    batch_users: int,
    batch_tokens: int,
    negatives: int = 0,
    targets_per_user: int = 1,
) -> TrainingBatches:
    """Return the batches of one epoch, where every item counts as one token.

    The arguments are those of `TrainingBatches`, with a window of ``max_items``.
    """
    return TrainingBatches(
        sequences,
        supervision=supervision,
        max_items=max_items,
        window=max_items,
        negatives=negatives,
        item_costs=np.ones(n_items, dtype=np.int64),
        targets_per_user=targets_per_user,
        batch_users=batch_users,
        batch_tokens=batch_tokens,
        seed=seed,
        epoch=epoch,
    )
