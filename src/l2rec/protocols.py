"""What training, evaluation and the service know of a method: three small protocols."""

from __future__ import annotations

__all__ = [
    "Calibrated",
    "Embedder",
    "EpochBatches",
    "Losses",
    "MakeBatches",
    "ParameterGroup",
    "Progress",
    "Recommender",
    "Scorer",
    "Stage",
    "TakesNewItems",
    "TopK",
    "Trainable",
    "decayed",
    "inner_product_scorer",
    "updates",
]

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from l2rec.data.batches import Batch
from l2rec.data.ragged import Ragged

Scorer = Callable[[Ragged], Tensor]
"""Histories of B users -> scores [B, N] float32 over the whole catalog, higher is better."""


@dataclass(frozen=True)
class Losses:
    """``total``: scalar to differentiate. ``parts``: named scalars for the log, detached."""

    total: Tensor
    parts: dict[str, Tensor]
    tokens: int = 0
    """Real tokens this batch passed through the backbone."""
    computed_tokens: int = 0
    """Tokens computed, padding included."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    name: str
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float


class EpochBatches(Protocol):
    """The batches of one epoch; the same for the same (seed, epoch), cheap to enter anywhere."""

    def __len__(self) -> int: ...

    def iterate(self, start: int = 0) -> Iterator[Batch]: ...


class MakeBatches(Protocol):
    """The batches of one epoch over training prefixes, user int = row of ``sequences``."""

    def __call__(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> EpochBatches: ...


@dataclass(frozen=True)
class Stage:
    """One stretch of training with its own parameters, batches and loss.

    Only ``groups`` are trained; everything else needs no gradient meanwhile.
    ``select``: validate, keep the best weights and stop by patience. False is for pre-training,
    whose weights do not rank well yet: it runs its epochs and keeps the last.
    ``loss`` of a batch: one update, or several, one after the other: each is computed with the
    weights that the one before has left, and moves only the parameters it has a gradient for.
    ``validates``: what is ranked to validate this stage, if not the method itself.
    ``epochs``: instead of ``training.epochs``.
    ``begin_epoch``: called before each epoch. What it changes must be part of the model's state,
    or a run resumed within the epoch would lack it.
    """

    name: str
    groups: list[ParameterGroup]
    batches: MakeBatches
    loss: Callable[[Batch], Losses | Iterator[Losses]]
    select: bool = True
    validates: Recommender | None = None
    epochs: int | None = None
    begin_epoch: Callable[[int], None] | None = None


@dataclass(frozen=True)
class TopK:
    """``items``: [B, k] int64 item ints, -1 where fewer are left. ``scores``: [B, k] float32."""

    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@runtime_checkable
class Recommender(Protocol):
    """Anything that can be ranked by the one evaluator."""

    @property
    def n_items(self) -> int:
        """N, the number of catalog items that are scored."""
        ...

    def scorer(self) -> Scorer:
        """A function of histories with everything that does not depend on them (the encoded
        catalog, counts, ...) computed once. Valid until the model's weights or catalog change.
        """
        ...


@runtime_checkable
class Trainable(Recommender, Protocol):
    """What the training loop asks of a method; methods are torch modules besides."""

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """In order; empty for a method that is not trained."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A method with a few things in it that no gradient chooses."""

    def calibrate(
        self, sequences: Ragged, histories: Ragged, targets: npt.NDArray[np.integer]
    ) -> None:
        """Choose them by the training's sequences and validation's histories and targets [B].

        Called before each validation, the first of which comes before the first step. What is
        chosen must be part of the model's state, and what validation chooses must not change what
        the losses are.
        """
        ...


@runtime_checkable
class Embedder(Recommender, Protocol):
    """A recommender whose scores are inner products of vectors: what can be indexed."""

    def encode_users(self, histories: Ragged) -> Tensor:
        """[B, D] float32."""
        ...

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Catalog ints or raw texts -> [n, D] float32."""
        ...


@runtime_checkable
class TakesNewItems(Protocol):
    """A method for which an item is its text: one that was never trained on can be ranked."""

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """New items by text alone, recommendable at once. Returns their item ints.

        Raises:
            DataError: an empty text.
        """
        ...


def updates(made: Losses | Iterator[Losses]) -> Iterable[Losses]:
    """The updates that a stage's loss asks for, one after the other."""
    return (made,) if isinstance(made, Losses) else made


def inner_product_scorer(model: Embedder) -> Scorer:
    """Scores as inner products of user vectors with those of the whole catalog, encoded once."""
    items = model.encode_items(np.arange(model.n_items, dtype=np.int32))
    return lambda histories: model.encode_users(histories) @ items.T


def decayed(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> list[ParameterGroup]:
    """Weight decay for matrices alone: biases, norms and scalars have none."""
    kept = [p for p in parameters if p.requires_grad]
    groups = [
        ParameterGroup("matrices", [p for p in kept if p.ndim >= 2], lr, weight_decay),
        ParameterGroup("vectors", [p for p in kept if p.ndim < 2], lr, 0.0),
    ]
    return [group for group in groups if group.parameters]


class Progress(Protocol):
    """What the loop tells whoever watches."""

    def training(self, epoch: float, step: int, total: int, text: str) -> None: ...
    def validating(self, done: int, total: int) -> None: ...
    def line(self, text: str) -> None: ...
