"""A run as a model that recommends: histories of external ids in, ranked items out.

The scoring rule stands here, once: inner products of user and item vectors, plus a prior where the
run is blended; or, for a method that only ranks, its scores. `Predictor.encode` and
`Predictor.scores`.
"""

from __future__ import annotations

__all__ = [
    "Encoded",
    "Predictor",
    "Recommendation",
    "backbone_of",
    "build_model",
    "catalog_vectors",
    "load",
    "load_folder",
]

import copy
import logging
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.config import BackboneConfig, RunConfig, method_class
from l2rec.data.catalog import Catalog
from l2rec.data.ids import as_ids, as_list
from l2rec.data.ragged import Ragged
from l2rec.errors import CheckpointError, ConfigError, DataError, nearest, shown
from l2rec.evaluation.ranking import top_k
from l2rec.modules import processes
from l2rec.modules.backbone import Backbone, load_backbone, load_tokenizer
from l2rec.modules.cooccurrence import Blend
from l2rec.modules.room import Room
from l2rec.modules.sequences import check_new_texts
from l2rec.protocols import (
    Costed,
    Embedder,
    Freezable,
    Inspectable,
    Scorer,
    TakesNewItems,
)
from l2rec.runs import hub
from l2rec.runs.checkpoint import load_tensors, load_trained
from l2rec.runs.folder import (
    MODEL,
    TOKENIZER,
    RunFolder,
    Sample,
    check_backbone,
    find_backbone,
    read_catalog,
    read_run,
    unfinished,
)
from l2rec.runs.machine import device
from l2rec.runs.numbers import PRETRAINED, UNTRAINED

logger = logging.getLogger("l2rec")

VERIFIED, VERIFIED_WITHIN = 16, 0.02
"""Items encoded anew to verify stored vectors; the precision of bfloat16 is allowed for."""


def build_model(
    config: RunConfig, catalog: Catalog, backbone: Backbone | None, cache: Path | None
) -> Any:
    """Build the method of a config over a catalog, initialised from the config's seed."""
    torch.manual_seed(config.seed)
    model = method_class(config.method)(config.model, catalog, backbone, cache=cache)
    return model.to(device())


def backbone_of(config: RunConfig) -> Backbone | None:
    """Load the backbone of a config, or None for a method that has no use for one."""
    if not method_class(config.method).uses_backbone:
        return None
    world = processes.current()
    if config.training.shard and world.size > 1:
        from l2rec.modules.sharding import shard  # slow to import, and rarely asked for

        backbone = load_backbone(config.backbone, "cpu")
        shard(backbone, world, torch.device(device()))
    else:
        backbone = load_backbone(config.backbone, device())
    if config.training.checkpointing:
        backbone.recompute()
    return backbone


def catalog_vectors(model: Any) -> Tensor | None:
    """Encode the whole catalog, [N, D] float32; None for a method that only ranks."""
    if not isinstance(model, Embedder):
        return None
    return model.encode_items(np.arange(model.n_items, dtype=np.int32))


@dataclass(frozen=True)
class Encoded:
    """B histories, ready to be scored.

    vectors: [B, D] float32 user vectors; or, of a method that only ranks, scores [B, N].
    gates: of Eq. 7, None where the method has none. prior: [B, N] float32, what is added to the
    inner products with item vectors: co-occurrence, repeats; None where nothing is.
    """

    vectors: Tensor
    gates: list[float | None]
    prior: Tensor | None = None


@dataclass(frozen=True)
class Recommendation:
    """items: best first. gate: mean delta of Eq. 7 (1: all behavioural), None with one view."""

    items: list[dict[str, Any]]
    gate: float | None


class Predictor:
    """A trained model with its catalog: everything by external ids.

    Attributes:
        run: folder it was loaded from, None for one that was made of another predictor.
        model: the method.
        ids: external item ids by item int.
        texts: their texts.
        vectors: [N, D] item vectors, None for a method that only ranks.
        version: short hash of the trained tensors.
        blend: co-occurrence and repeats beside the method, None without.
        sample: users as the trained model gave them, None if nobody wrote them down.
    """

    def __init__(
        self,
        model: Any,
        ids: list[str],
        texts: list[str],
        vectors: Tensor | None,
        version: str,
        blend: Blend | None = None,
        sample: Sample | None = None,
    ) -> None:
        self.model, self.version = model, version
        self.blend, self.sample = blend, sample
        self.run: Path | None = None
        # Rows of the model; one without an id is no item of this catalog.
        self.ids, self.texts, self.vectors = ids, texts, vectors
        self._room = Room()  # behind the vectors
        self._first = {item: n for n, item in enumerate(ids)}
        self._later: dict[str, int] = {}  # beside the first, which are too many to copy
        gaps = self._first.pop("", None) is not None
        self._gaps = [n for n, item in enumerate(ids) if not item] if gaps else []
        self._scorer: Scorer | None = None

    # -- the hub ---------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, run: str | Path, **options: Any) -> Predictor:
        """Load a run from its folder or from the hub: `load`, as Hugging Face calls it."""
        return load(run, **options)

    def save_pretrained(self, out: str | Path, **options: Any) -> Path:
        """Write the run as a folder that can be published: `l2rec.runs.hub.save_pretrained`, which
        has the options and the errors.
        """
        return hub.save_pretrained(self._published(), Path(out), **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the run on the hub: `l2rec.runs.hub.push_to_hub`, which has the options and the
        errors. Return its address.
        """
        return hub.push_to_hub(self._published(), repo_id, **options)

    def _published(self) -> Path:
        """Return the run that is this predictor."""
        if self.run is None:
            raise ConfigError("this predictor is no run as it was trained; load the run's folder")
        known = read_catalog(self.run)
        if len(known) != len(self.ids):
            raise ConfigError(
                f"{len(self.ids) - len(known)} items were added since {self.run} was loaded, which "
                "would not be published; load it again"
            )
        return self.run

    # -- scores ----------------------------------------------------------------------------------

    @property
    def n_items(self) -> int:
        """N, rows of this predictor's catalog, those added later included."""
        return len(self.ids)

    def scorer(self) -> Scorer:
        """Return the scorer of the method, blended where it is: what is evaluated. It ranks as
        `scores` does, on a scale of its own.
        """
        scorer = self.model.scorer() if self.blend is None else self.blend.scorer(self.model)
        return lambda histories: self._own(scorer(histories))

    def _own(self, scores: Tensor) -> Tensor:
        """Cut scores of the model's rows, which other predictors may have added to, to those that
        are known here, [B, N]: -inf for gaps among them.
        """
        scores = scores[:, : len(self.ids)]
        if not self._gaps:
            return scores
        return scores.index_fill(1, torch.tensor(self._gaps, device=scores.device), -math.inf)

    @torch.inference_mode()
    def encode(self, rows: Ragged) -> Encoded:
        """Encode histories of item ints.

        Raises:
            DataError: an empty history.
        """
        if self.vectors is None:
            if self._scorer is None:
                self._scorer = self.scorer()
            return Encoded(self._scorer(rows).float(), [None] * len(rows))
        gates: list[float | None] = [None] * len(rows)
        if isinstance(self.model, Inspectable):
            users, gate = self.model.users_and_gates(rows)
            if gate is not None:
                gates = [float(x) for x in gate]
        else:
            users = self.model.encode_users(rows)
        if self.blend is None:
            return Encoded(users, gates)
        prior = self.blend.prior(self.scores(Encoded(users, gates)), rows)
        return Encoded(users, gates, prior)

    @torch.inference_mode()
    def scores(self, encoded: Encoded) -> Tensor:
        """Score all items, [B, N] float32, higher is better."""
        if self.vectors is None:
            return encoded.vectors
        products = encoded.vectors @ self.vectors.T
        return self._own(products if encoded.prior is None else products + encoded.prior)

    def costs(self, rows: Ragged) -> npt.NDArray[np.int64]:
        """Return what it takes to encode each history, [B]: tokens for a method that reads texts,
        else items.
        """
        return self.model.costs(rows) if isinstance(self.model, Costed) else rows.lengths

    def text_of(self, item: str) -> str:
        """Return the text of an item id."""
        return self.texts[int(self._ints([item])[0])]

    def _ints(self, history: Sequence[str]) -> npt.NDArray[np.int32]:
        ids = as_ids(history, "history", "item ids")
        rows = [self.row_of(item) for item in ids]
        unknown = [item for item, row in zip(ids, rows, strict=True) if row is None]
        if unknown:
            named = ", ".join(repr(i) for i in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise DataError(f"unknown item ids: {named}{more}{nearest(unknown[0], self.ids)}")
        return np.asarray(rows, dtype=np.int32)

    def recommend(
        self, history: Sequence[str], k: int = 10, *, exclude_seen: bool = True
    ) -> Recommendation:
        """Return the k best next items for a user who is this history, oldest first.

        Raises:
            DataError: an empty history, unknown ids (all are named), k outside 1..N.
        """
        rows = self.rows([history])
        if not len(rows.values):
            raise DataError("an empty history: give at least one item id")
        encoded = self.encode(rows)
        best = top_k(
            lambda _: self.scores(encoded),
            rows,
            self.check_k(k),
            exclude=rows if exclude_seen else None,
        )
        items = [
            {"id": self.ids[i], "score": float(s), "text": self.texts[i]}
            for i, s in zip(best.items[0], best.scores[0], strict=True)
            if i >= 0
        ]
        return Recommendation(items, encoded.gates[0])

    def rows(self, histories: Sequence[Sequence[str]]) -> Ragged:
        """Turn histories of external ids into item ints.

        Raises:
            DataError: unknown ids, all of them named; a string where a list of them belongs.
        """
        given = as_list(histories, "histories", "histories, each a list of item ids")
        return Ragged.from_rows([self._ints(history) for history in given])

    def row_of(self, item: str) -> int | None:
        """Return the item int of an id, or None."""
        known = str(item)
        row = self._later.get(known)
        return self._first.get(known) if row is None else row

    def with_items(self, items: Mapping[str, str]) -> Predictor:
        """Return another predictor that also knows these items; this one stays as it is.

        Both share the model, whose catalog only ever grows: item ints stay what they were. An id
        that is known already gets a new row with the new text, and its old row remains in ``ids``.
        Of the two, and with whatever else runs the model, only one call may be made at a time.

        Raises:
            DataError: an empty text or id, or two that are the same id. ConfigError: the method
                cannot take new items.
        """
        new, grown = texts_by_id(items), copy.copy(self)
        # Two that grow of this one must not write behind the same vectors: the first gets the room.
        grown.run, self._room = None, Room()
        grown._add(new)
        return grown

    def _add(self, items: Mapping[str, str]) -> None:
        """Add rows to the model and know them; what others know of it is replaced, not changed."""
        self._require(TakesNewItems, "ranks the items it was trained on; train it again for others")
        if not items:
            return
        known, texts = len(self.ids), list(items.values())
        with torch.inference_mode():
            added = self.model.add_items(texts)
            if self.vectors is not None:
                fresh = np.arange(known, int(added[-1]) + 1, dtype=np.int32)
                self.vectors = self._room.followed(self.vectors, self.model.encode_items(fresh))
        # Rows of another predictor, or of one that was given up, may lie in between.
        first = int(added[0])
        gap = [""] * (first - known)
        self._gaps = [*self._gaps, *range(known, first)]
        self.ids, self.texts = [*self.ids, *gap, *items], [*self.texts, *gap, *texts]
        self._later = self._later | {item: first + n for n, item in enumerate(items)}
        self._scorer = None

    def blended(self, blend: Blend, version: str) -> Predictor:
        """Return this predictor with co-occurrence and repeats beside its scores."""
        return Predictor(
            self.model, self.ids, self.texts, self.vectors, version, blend, self.sample
        )

    def verify(self) -> None:
        """Check that item vectors are finite, and (a sample) what the model makes of its items.

        Raises:
            CheckpointError: they are not; the files of the run are torn or were exchanged.
        """
        if self.vectors is None:
            return
        if not bool(torch.isfinite(self.vectors).all()):
            raise CheckpointError("item vectors that are not finite numbers: torn or badly trained")
        sample = np.unique(np.linspace(0, len(self.ids) - 1, VERIFIED).astype(np.int32))
        with torch.inference_mode():
            again = self.model.encode_items(sample)
        stored = self.vectors[torch.from_numpy(sample.astype(np.int64)).to(self.vectors.device)]
        scale = float(stored.norm(dim=-1).mean()) + 1e-6
        worst = float((again - stored).norm(dim=-1).max()) / scale
        if not worst < VERIFIED_WITHIN:
            raise CheckpointError(
                f"stored item vectors differ from the model's by {worst:.2g} of their length: "
                "items.safetensors is torn or of another model; delete it to encode them anew"
            )
        self.verify_users()

    def verify_users(self, most: int | None = None) -> None:
        """Check that the model gives the users of the sample (or ``most`` of them) the vectors that
        it gave when it was trained. Item vectors may be those of a table, which no adapter has part
        in.

        Raises:
            CheckpointError: it does not; its adapters are not applied, or not all of it was loaded.
        """
        if self.sample is None:
            return
        histories, stored = self.sample.histories, self.sample.vectors[:most]
        again = self.encode(histories.take(np.arange(len(stored)))).vectors.float().cpu()
        scale = float(stored.norm(dim=-1).mean()) + 1e-6
        worst = float((again - stored).norm(dim=-1).max()) / scale
        if not worst <= self.sample.within:
            raise CheckpointError(
                f"user vectors differ from those of the trained model by {worst:.2g} of their "
                "length: its adapters are not applied, or it is not the model that was trained"
            )

    def _require(self, protocol: Any, otherwise: str) -> None:
        if not isinstance(self.model, protocol):
            raise ConfigError(f"{type(self.model).__name__} {otherwise}")

    def check_k(self, k: int) -> int:
        """Return a number of items to recommend.

        Raises:
            DataError: the catalog has fewer, or it is below 1 or no whole number.
        """
        try:
            count = operator.index(k)
        except TypeError:
            raise DataError(f"k={shown(k)} is no whole number; choose 1..{len(self.ids)}") from None
        if not 1 <= count <= len(self.ids):
            raise DataError(
                f"k={k}: the catalog has {len(self.ids)} items; choose 1..{len(self.ids)}"
            )
        return count

    def encode_users(self, histories: Sequence[Sequence[str]]) -> Tensor:
        """Return user vectors [B, D] float32 of histories of external ids.

        Raises:
            ConfigError: the method only ranks. DataError: an empty history, unknown ids.
        """
        self._require(Embedder, "has no user vectors: it only ranks")
        rows: Tensor = self.model.encode_users(self.rows(histories))
        return rows

    def encode_items(self, texts: Sequence[str]) -> Tensor:
        """Return item vectors [n, D] float32 of raw texts; the catalog stays as it is.

        Raises:
            ConfigError: the method only ranks. DataError: an empty text.
        """
        self._require(Embedder, "has no item vectors: it only ranks")
        given = as_list(texts, "texts", "texts")
        check_new_texts(given)
        rows: Tensor = self.model.encode_items(given)
        return rows

    def add_items(self, items: Mapping[str, str]) -> None:
        """Add items by id and text alone: from now on ranked and allowed in histories.

        Raises:
            DataError: an id that is in the catalog already, and as `with_items`.
        """
        new = texts_by_id(items)
        known = [item for item in new if self.row_of(item) is not None]
        if known:
            raise DataError(f"item {known[0]!r} is in the catalog already")
        self._add(new)


def texts_by_id(items: Mapping[str, str]) -> dict[str, str]:
    """Return new items as texts by their ids.

    Raises:
        DataError: an empty id, two that are the same, an item without a text.
    """
    if not isinstance(items, Mapping):
        raise DataError(f"items={shown(items)}: give a dictionary of texts by item id")
    ids, texts = as_ids(items, "items", "item ids"), list(items.values())
    if "" in ids:
        raise DataError("an item with an empty id; give it one")
    new = dict(zip(ids, texts, strict=True))
    if len(new) < len(items):  # such as 3 and "3"
        twice = next(item for item in new if ids.count(item) > 1)
        raise DataError(f"two items with the id {twice!r}; give each its own")
    check_new_texts(texts)
    return new


def load(
    run: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Predictor:
    """Load a run, ready to recommend; needs neither its data set nor a GPU.

    A run that is not finished is loaded with its best weights so far, and a warning is logged.

    Args:
        run: its folder, or ``org/name`` of one that was published on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        trust_remote_code: load a run of the hub whose method is not one of l2rec's, or whose
            backbone brings code of its own. Such code can do anything.

    Raises:
        CheckpointError: missing or torn files, another backbone than the run was made on, or
            tensors that do not fit.
        BackboneError: its backbone is gone or cannot be loaded.
        ConfigError: a run of the hub that needs ``trust_remote_code``.
    """
    place = hub.located(run, revision=revision, trust_remote_code=trust_remote_code)
    folder = read_run(place)
    if unfinished(folder.path):
        step = load_tensors(folder.path / MODEL)[1].get("step", "0")
        at_0 = UNTRAINED if folder.identity.get("init") is None else PRETRAINED
        shown = at_0 if step == "0" else f"of step {step}"
        logger.warning(
            "note: %s is not finished: this is its best model so far, %s", folder.path, shown
        )
    return load_folder(folder)


def load_folder(folder: RunFolder) -> Predictor:
    """Build the model of a run that was read; raises as `load`."""
    # First weights are drawn, and then replaced: that is no reason to set the caller's own draws.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        return _built(folder)


def _built(folder: RunFolder) -> Predictor:
    run, catalog = folder.path, folder.catalog
    backbone = backbone_of(find_backbone(run, folder.config, folder.identity))
    check_backbone(run, folder.identity, backbone)
    if backbone is not None and (run / TOKENIZER).is_dir():
        backbone.tokenizer = load_tokenizer(BackboneConfig(name=str(run / TOKENIZER)))
    # A run on a read-only disk can be used, and one that was published stays as it is; their texts
    # are then read anew.
    kept = os.access(run, os.W_OK) and not folder.identity.get("published")
    cache = run / "cache" if kept else None
    model = build_model(folder.config, catalog, backbone, cache)
    load_trained(model, folder.tensors, str(run / "model.safetensors"))
    model.eval()
    if isinstance(model, Freezable):
        model.freeze()
    blend = None
    if folder.blend is not None:
        blend = Blend(len(catalog))
        load_trained(blend, folder.blend, str(run / "blend.safetensors"))
        blend = blend.to(device())
    vectors = folder.current_vectors
    if vectors is None:
        vectors = catalog_vectors(model)
    if vectors is not None:
        vectors = vectors.to(device())
    ids = catalog.table["item_id"].to_pylist()
    predictor = Predictor(
        model, ids, list(catalog.texts), vectors, folder.version, blend, folder.sample
    )
    predictor.run = run
    return predictor
