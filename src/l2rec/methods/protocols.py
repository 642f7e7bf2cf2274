"""What training, evaluation and the service know of a method: three small protocols."""

from __future__ import annotations

__all__ = [
    "Embedder",
    "EpochBatches",
    "Losses",
    "ParameterGroup",
    "Recommender",
    "Scorer",
    "Stage",
    "TopK",
    "Trainable",
]

from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class Stage:
    """One stretch of training with its own parameters."""

    name: str
    groups: list[ParameterGroup]


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


class EpochBatches(Protocol):
    """The batches of one epoch; the same for the same (seed, epoch), cheap to enter anywhere."""

    def __len__(self) -> int: ...

    def iterate(self, start: int = 0) -> Iterator[Batch]: ...


@runtime_checkable
class Trainable(Recommender, Protocol):
    """What the training loop asks of a method; methods are torch modules besides."""

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """In order; empty for a method that is not trained."""
        ...

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> EpochBatches: ...

    def loss(self, batch: Batch) -> Losses: ...


@runtime_checkable
class Embedder(Recommender, Protocol):
    """A recommender whose scores are inner products of vectors: what can be indexed."""

    def encode_users(self, histories: Ragged) -> Tensor:
        """[B, D] float32."""
        ...

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Catalog ints or raw texts -> [n, D] float32."""
        ...
