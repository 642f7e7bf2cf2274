"""Histories as padded grids of item ints, and encoding of any number of them in batches."""

from __future__ import annotations

__all__ = [
    "catalog_rows",
    "encode_rows",
    "evaluating",
    "in_batches",
    "last_of",
    "next_item_batches",
    "pad",
    "sequence_batches",
]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.batches import TrainingBatches, plan_batches
from l2rec.data.ragged import Ragged
from l2rec.errors import DataError
from l2rec.protocols import MakeBatches

T = TypeVar("T")


def pad(histories: Ragged, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Item ints [B, T] int64, oldest first, zeros on the right; and which are real, [B, T] bool.

    A zero is also an item: whoever reads a grid has to look at the second tensor.
    """
    lengths = histories.lengths
    real = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    items = np.zeros(real.shape, dtype=np.int64)
    items[real] = histories.values
    return torch.from_numpy(items).to(device), torch.from_numpy(real).to(device)


def last_of(states: Tensor, real: Tensor) -> Tensor:
    """States [B, T, D] at the newest real position of each row: [B, D]."""
    last = real.sum(1) - 1
    return states[torch.arange(len(states), device=states.device), last]


def encode_rows(
    model: nn.Module,
    histories: Ragged,
    encode: Callable[[Ragged], Tensor],
    *,
    max_items: int,
    max_rows: int = 1024,
    max_cost: int = 32768,
) -> Tensor:
    """``encode`` over any number of histories, alike lengths together: [B, D] float32 in order.

    ``encode`` gets rows of at most ``max_items`` newest items, in evaluation mode and without
    gradients, and returns one vector for each.

    Raises:
        DataError: an empty history.
    """
    recent = histories.tail(max_items)
    with evaluating(model), torch.inference_mode():
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode within; touch nothing where it is on already."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


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


def catalog_rows(
    items: npt.NDArray[np.integer] | Sequence[str], method: str, device: torch.device | str
) -> Tensor:
    """Catalog ints as an int64 tensor; DataError for raw texts, which ``method`` cannot read."""
    if len(items) and isinstance(items[0], str):
        raise DataError(
            f"{method} has a vector for each item it was trained on and none for a text; use a "
            "method that reads item texts"
        )
    return torch.from_numpy(np.asarray(items, dtype=np.int64)).to(device)


def next_item_batches(n_items: int, max_items: int) -> MakeBatches:
    """Every next item of every training sequence is a target once an epoch."""
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
    """Batches in which every item counts as one token."""
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
