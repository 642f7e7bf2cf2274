"""The contract: everything that training, evaluation, runs and the service touch of a method.

A method is a torch module that satisfies `Method` and `Trainable`; `Embedder` too, where its scores
are inner products. The other protocols are optional abilities, asked for with ``isinstance``:

    Method          what a recipe names: Config, uses_backbone, item_tensors, how it is built
    Recommender     n_items, scorer                          evaluation
    Trainable       stages                                   training
    Embedder        encode_users, encode_items               embeddings, indexes, the service
    Calibrated      calibrate       what is taken from the training sequences, not by gradient
    TakesNewItems   add_items       an item is its text
    Inspectable     users_and_gates, expert_load, has_gate, has_experts
    Coded           code_usage      an item is a few codes, whose use is reported
    Costed          costs           histories differ in what they cost to encode
    Freezable       freeze          something can be computed once for a model that no longer learns
    Cached          cached          cache entries that travel with a run
    SizedByData     sized_by_data   tensors whose length is that of the data
    OfOneCatalog    one_catalog     items have codes or words that are made for one catalog
    ReadsTexts      text_tokens     texts longer than a limit are cut
    Exportable      user_encoder    users are a function of stored vectors of their items
    Remarked        remarks         its options: what scores alone do not say
    MayLeak         leaks           it and its options: a published leak, to be reproduced
    Leaky           leak            it is given held-out items where its options say so

Evaluation, runs and the service read no other attribute of a method.
Shapes: B histories (users), N catalog items, D embedding size.
"""

from __future__ import annotations

__all__ = [
    "Cached",
    "Calibrated",
    "CodeUsage",
    "Coded",
    "Costed",
    "Embedder",
    "EpochBatches",
    "ExpertLoad",
    "Exportable",
    "Freezable",
    "Inspectable",
    "Leaky",
    "Losses",
    "MakeBatches",
    "MayLeak",
    "Method",
    "OfOneCatalog",
    "ParameterGroup",
    "Progress",
    "ReadsTexts",
    "Recommender",
    "Remarked",
    "Scorer",
    "SizedByData",
    "Stage",
    "TakesNewItems",
    "TopK",
    "Trainable",
    "UserEncoder",
    "decayed",
    "inner_product_scorer",
    "updates",
]

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel
from torch import Tensor, nn

from l2rec.data.batches import Batch
from l2rec.data.ragged import Ragged

Scorer = Callable[[Ragged], Tensor]
"""Histories of B users -> scores [B, N] float32 over the whole catalog, higher is better."""


# -- what training passes around -----------------------------------------------------------------


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

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches ``start``, ``start + 1``, ... of the epoch."""
        ...


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
    ``epochs``, ``patience``, ``eval_every``: instead of those of ``training``.
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
    patience: int | None = None
    eval_every: float | None = None
    begin_epoch: Callable[[int], None] | None = None


@dataclass(frozen=True)
class TopK:
    """``items``: [B, k] int64 item ints, -1 where fewer are left. ``scores``: [B, k] float32."""

    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


class Progress(Protocol):
    """Whoever watches a training, an evaluation or a search."""

    def training(self, epoch: float, step: int, total: int, text: str) -> None:
        """Show that ``step`` of ``total`` steps are done, ``epoch`` epochs, and a line of text."""
        ...

    def validating(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` users are ranked."""
        ...

    def line(self, text: str) -> None:
        """Show one line that stays."""
        ...


# -- what a method is ----------------------------------------------------------------------------


@runtime_checkable
class Method(Protocol):
    """The class that a recipe names: ``method: package.module:Name``.

    It is called as ``Name(config, catalog, backbone, cache=folder)``: its parsed options, the
    items' texts (`l2rec.data.catalog.Catalog`), the frozen language model
    (`l2rec.modules.backbone.Backbone`, None unless ``uses_backbone``) and a folder for what may be
    computed once for a catalog (None: keep nothing). Weights are initialised from torch's seed.
    Parameters of a submodule named ``backbone`` are frozen and never saved.
    """

    Config: ClassVar[type[BaseModel]]
    """Options, every default in one place: a frozen pydantic model that forbids unknown keys."""
    uses_backbone: ClassVar[bool]
    item_tensors: ClassVar[frozenset[str]]
    """Names of trained tensors with one row for each item, which another data set cannot use."""


@runtime_checkable
class Recommender(Protocol):
    """Anything that can be ranked by the one evaluator."""

    @property
    def n_items(self) -> int:
        """N, the number of catalog items that are scored."""
        ...

    def scorer(self) -> Scorer:
        """Return a function of histories, with everything that does not depend on them (the
        encoded catalog, counts, ...) computed once. Valid until the weights or the catalog change.
        """
        ...


@runtime_checkable
class Trainable(Recommender, Protocol):
    """A recommender that the training loop can train; methods are torch modules besides."""

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return the stages in order; none for a method that is not trained."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A method that takes something from the training sequences, or chooses something on
    validation, not by gradient.
    """

    def calibrate(
        self, sequences: Ragged, histories: Ragged, targets: npt.NDArray[np.integer]
    ) -> None:
        """Do so, by the training sequences, and validation's histories and targets [B].

        Called before each validation, the first of which comes before the first step, and when a
        training is resumed, with the weights of its state: what is called twice must change nothing
        more. What is chosen must be part of the model's state, and what validation chooses must not
        change what the losses are.
        """
        ...


@runtime_checkable
class Embedder(Recommender, Protocol):
    """A recommender whose scores are inner products of vectors: what can be indexed."""

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return user vectors [B, D] float32.

        Raises:
            DataError: an empty history.
        """
        ...

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return vectors [n, D] float32 of catalog ints or, without adding them, of raw texts.

        Raises:
            DataError: an empty text, or texts for a method that has a row for each item instead.
        """
        ...


@runtime_checkable
class TakesNewItems(Protocol):
    """A method for which an item is its text: one that was never trained on can be ranked."""

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once; return their item ints.

        Raises:
            DataError: an empty text.
        """
        ...


@dataclass(frozen=True)
class ExpertLoad:
    """Share of the tokens' choices that each of E experts received, in J adapted matrices.

    ``matrices``: [J] names. ``experts``: by view, J lists of E shares; each adds up to 1.
    ``user``: by view, [J] the user's share, 0 to 1, in what the routers decide by; empty where they
    do not know the user.
    """

    matrices: list[str]
    experts: dict[str, list[list[float]]]
    user: dict[str, list[float]] = field(default_factory=dict)


@runtime_checkable
class Inspectable(Protocol):
    """A method of two views, or of experts, that shows what it did with a history."""

    @property
    def has_gate(self) -> bool:
        """Whether two views are read, and weighed for each user."""
        ...

    @property
    def has_experts(self) -> bool:
        """Whether tokens are routed to experts."""
        ...

    def users_and_gates(self, histories: Ragged) -> tuple[Tensor, Tensor | None]:
        """Return user vectors [B, D] float32 as `Embedder.encode_users` does, and each user's mean
        gate [B] float32 (1: all behavioural, 0: all semantic), None without a gate.
        """
        ...

    def expert_load(self, histories: Ragged) -> ExpertLoad | None:
        """Return where the tokens of these histories went; None without experts."""
        ...


@dataclass(frozen=True)
class CodeUsage:
    """How N items use the codes that a quantiser gave them.

    used: share of the codes of each level that some item has. perplexity: exp of the entropy of
    each level, the number of its codes where all are used alike. collisions: share of the items
    that share their codes up to each level with another; of the last level, all of them.
    """

    used: list[float]
    perplexity: list[float]
    collisions: list[float]


@runtime_checkable
class Coded(Protocol):
    """A method to which an item is a few codes."""

    def code_usage(self) -> CodeUsage:
        """Return how the catalog uses the codes."""
        ...


@runtime_checkable
class Costed(Protocol):
    """A method whose histories differ in what they cost to encode."""

    def costs(self, histories: Ragged) -> npt.NDArray[np.int64]:
        """Return about how many tokens each history takes in the backbone, [B] int64."""
        ...


@runtime_checkable
class Freezable(Protocol):
    """A method that saves work once it no longer learns."""

    def freeze(self) -> None:
        """Switch to evaluation mode and compute once what no history changes."""
        ...


@runtime_checkable
class Cached(Protocol):
    """A method built from cache entries."""

    @property
    def cached(self) -> Sequence[Path]:
        """Paths of the entries this model was built from; a run takes a copy of each."""
        ...


@runtime_checkable
class ReadsTexts(Protocol):
    """A method that reads item texts, each up to a limit."""

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        ...


@runtime_checkable
class OfOneCatalog(Protocol):
    """A method whose items have codes or words that are made for one catalog."""

    one_catalog: ClassVar[bool]
    """Whether they are: with other items they would be others, so that `l2rec update` refuses it.
    """


@runtime_checkable
class SizedByData(Protocol):
    """A module with buffers whose length is that of the data, not of the options."""

    sized_by_data: ClassVar[frozenset[str]]
    """Names of the buffers; loading gives them the length they were saved with."""


@dataclass(frozen=True)
class UserEncoder:
    """User vectors as a function of vectors that are stored for the items, and of nothing else.

    items: [N, h] float32, what is read of each item. encode: vectors of rows' items [B, T, h],
    oldest first, and which are real [B, T] bool, padding on the right -> user vectors [B, D]. It
    computes the whole grid, without a step that depends on values, so that it can be traced.
    max_items: T at most.
    """

    items: Tensor
    encode: Callable[[Tensor, Tensor], Tensor]
    max_items: int


@runtime_checkable
class Exportable(Protocol):
    """An embedder that reads a stored vector of each item and no text: what can run without it."""

    def user_encoder(self) -> UserEncoder:
        """Return what `Embedder.encode_users` computes, as one function of the model's weights and
        of item vectors in evaluation mode.
        """
        ...


@runtime_checkable
class Remarked(Protocol):
    """Options of a method about whose scores a reader must know something. It is asked of the
    options, not of the model, so that kept results, which have no model, say it as well.
    """

    @property
    def remarks(self) -> Sequence[str]:
        """Return what to know beside the scores, each without a subject, such as "ranks ..."."""
        ...


@runtime_checkable
class MayLeak(Protocol):
    """A method with an option to be given held-out items, as in published results, and the options
    of such a method.
    """

    @property
    def leaks(self) -> str:
        """Say what is made of held-out items, such as "numbers are ..."; empty: nothing."""
        ...


@runtime_checkable
class Leaky(MayLeak, Protocol):
    """A method that takes held-out items where `leaks` says so. All others are given none."""

    def leak(self, sequences: Ragged) -> None:
        """Take the whole sequences of all users that are tested, test items included.

        Called once, before the first step and whenever a training is resumed.
        """
        ...


# -- helpers -------------------------------------------------------------------------------------


def updates(losses: Losses | Iterator[Losses]) -> Iterable[Losses]:
    """Return the updates that a stage's loss asks for, one after the other."""
    return (losses,) if isinstance(losses, Losses) else losses


def inner_product_scorer(model: Embedder) -> Scorer:
    """Score by inner products of user vectors with those of the whole catalog, encoded once."""
    items = model.encode_items(np.arange(model.n_items, dtype=np.int32))
    return lambda histories: model.encode_users(histories) @ items.T


def decayed(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> list[ParameterGroup]:
    """Group parameters so that only matrices have weight decay: no biases, norms and scalars."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        ParameterGroup("matrices", [p for p in trained if p.ndim >= 2], lr, weight_decay),
        ParameterGroup("vectors", [p for p in trained if p.ndim < 2], lr, 0.0),
    ]
    return [group for group in groups if group.parameters]
