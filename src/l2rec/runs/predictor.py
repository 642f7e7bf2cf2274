"""A run folder as a model that recommends: histories of external ids in, ranked items out."""

from __future__ import annotations

__all__ = ["Predictor", "Recommendation", "backbone_of", "load"]

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.config import RunConfig, method_class
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import CheckpointError, ConfigError, DataError, nearest
from l2rec.evaluation.ranking import top_k
from l2rec.modules.backbone import Backbone, load_backbone
from l2rec.protocols import Embedder, Scorer, TakesNewItems
from l2rec.runs.checkpoint import load_tensors, load_trained
from l2rec.runs.folder import check_backbone, file_hash, load_run_config, read_catalog
from l2rec.runs.machine import device

VERIFIED, VERIFIED_WITHIN = 16, 0.02
"""Items encoded anew to verify stored vectors; the precision of bfloat16 is allowed for."""


def build_model(
    config: RunConfig, catalog: Catalog, backbone: Backbone | None, cache: Path | None
) -> Any:
    """The method of a config over a catalog, freshly initialised from the config's seed."""
    torch.manual_seed(config.seed)
    model = method_class(config.method)(config.model, catalog, backbone, cache=cache)
    return model.to(device())


def backbone_of(config: RunConfig) -> Backbone | None:
    """The backbone of a config, or None for a method that has no use for one."""
    if not method_class(config.method).uses_backbone:
        return None
    return load_backbone(config.backbone, device())


def catalog_vectors(model: Any) -> Tensor | None:
    """Vectors of the whole catalog [N, D], None for a method that only ranks."""
    if not isinstance(model, Embedder):
        return None
    return model.encode_items(np.arange(model.n_items, dtype=np.int32))


def users_and_gates(model: Any, histories: Ragged) -> tuple[Tensor, list[float | None]]:
    """User vectors [B, D], and the mean delta of Eq. 7 of each where the method has one."""
    if not hasattr(model, "user_states"):
        return model.encode_users(histories), [None] * len(histories)
    state = model.user_states(histories)
    users = torch.nn.functional.normalize(state.fused.float(), dim=-1)
    if state.delta is None:
        return users, [None] * len(histories)
    return users, [float(x) for x in state.delta.float().mean(-1)]


def _prior(model: Any, histories: Ragged) -> Tensor | None:
    """What a method adds to its inner products [B, N], if it adds anything."""
    prior: Tensor | None = model.prior(histories) if hasattr(model, "prior") else None
    return prior


def with_prior(model: Any, scores: Tensor, histories: Ragged) -> Tensor:
    prior = _prior(model, histories)
    return scores if prior is None else scores + prior


@dataclass(frozen=True)
class Recommendation:
    """items: best first. gate: mean delta of Eq. 7 (1: all behavioural), None with one view."""

    items: list[dict[str, Any]]
    gate: float | None


class Predictor:
    """A trained model with its catalog: everything by external ids.

    Attributes:
        model: the method. ids: external item ids by item int. texts: their texts.
        vectors: [N, D] item vectors, None for a method that only ranks. version: short hash of
        the trained tensors.
    """

    def __init__(
        self, model: Any, ids: list[str], texts: list[str], vectors: Tensor | None, version: str
    ) -> None:
        self.model = model
        self.ids, self.texts, self.vectors, self.version = ids, texts, vectors, version
        self._index = {item: n for n, item in enumerate(ids)}
        self._scorer: Scorer | None = None

    def text_of(self, item: str) -> str:
        """The text of an item id."""
        return self.texts[int(self._ints([item])[0])]

    def _ints(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        unknown = [i for i in ids if i not in self._index]
        if unknown:
            named = ", ".join(repr(i) for i in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise DataError(f"unknown item ids: {named}{more}{nearest(unknown[0], self._index)}")
        return np.asarray([self._index[i] for i in ids], dtype=np.int32)

    def recommend(
        self, history: Sequence[str], k: int = 10, *, exclude_seen: bool = True
    ) -> Recommendation:
        """The k best next items for a user who is this history, oldest first.

        Raises:
            DataError: an empty history, unknown ids (all are named), k outside 1..N.
        """
        if not history:
            raise DataError("an empty history: give at least one item id")
        rows = Ragged.from_rows([self._ints(history)])
        scores, gate = self._scores(rows)
        best = top_k(
            lambda _: scores, rows, self._check_k(k), exclude=rows if exclude_seen else None
        )
        items = [
            {"id": self.ids[i], "score": float(s), "text": self.texts[i]}
            for i, s in zip(best.items[0], best.scores[0], strict=True)
            if i >= 0
        ]
        return Recommendation(items, gate)

    def _scores(self, row: Ragged) -> tuple[Tensor, float | None]:
        """Scores [1, N] of one history, and its gate if the method has one."""
        if self.vectors is None:
            return self.model.scorer()(row), None
        users, gates = users_and_gates(self.model, row)
        return with_prior(self.model, users @ self.vectors.T, row), gates[0]

    def rows(self, histories: Sequence[Sequence[str]]) -> Ragged:
        """Histories of external ids as item ints.

        Raises:
            DataError: unknown ids, all of them named.
        """
        return Ragged.from_rows([self._ints(history) for history in histories])

    def row_of(self, item: str) -> int | None:
        """The item int of an id, or None."""
        return self._index.get(item)

    def costs(self, rows: Ragged) -> npt.NDArray[np.int64]:
        """[B] what it takes to encode each history: tokens for a method that reads texts, else
        items.
        """
        if hasattr(self.model, "costs"):
            found: npt.NDArray[np.int64] = self.model.costs(rows)
            return found
        return rows.lengths

    def users(self, rows: Ragged) -> tuple[Tensor, list[float | None]]:
        """What histories of item ints are scored by, and their gates (None where there is none).

        [B, D] float32 user vectors, scored by their inner products with ``vectors``; or, for a
        method that only ranks, the scores [B, N] themselves.
        """
        with torch.inference_mode():
            if self.vectors is not None:
                return users_and_gates(self.model, rows)
            if self._scorer is None:
                self._scorer = self.model.scorer()
            return self._scorer(rows).float(), [None] * len(rows)

    def prior(self, rows: Ragged) -> Tensor | None:
        """What the method adds to the inner products of `users` and ``vectors`` [B, N], if it adds
        anything: co-occurrence counts, a bias for items of the history.
        """
        return _prior(self.model, rows)

    def with_items(self, items: Mapping[str, str]) -> Predictor:
        """Another predictor that also knows these items; this one stays as it is.

        Both share the model, whose catalog only ever grows: item ints stay what they were. An id
        that is known already gets a new row with the new text, and its old row remains in ``ids``.
        Of the two, and with whatever else runs the model, only one call may be made at a time.

        Raises:
            DataError: an empty text. ConfigError: the method cannot take new items.
        """
        self._require(TakesNewItems, "ranks the items it was trained on; train it again for others")
        with torch.inference_mode():
            added = self.model.add_items(list(items.values()))
            # Rows of a predictor that was given up may lie in between: they have no id.
            gap = int(added[0]) - len(self.ids) if len(added) else 0
            vectors = self.vectors
            if vectors is not None:
                last = int(added[-1]) + 1 if len(added) else len(vectors)
                fresh = np.arange(len(vectors), last, dtype=np.int32)
                vectors = torch.cat((vectors, self.model.encode_items(fresh)))
        ids = [*self.ids, *[""] * gap, *items]
        texts = [*self.texts, *[""] * gap, *items.values()]
        found = Predictor(self.model, ids, texts, vectors, self.version)
        found._index.pop("", None)
        return found

    def verify(self) -> None:
        """Item vectors are finite, and (a sample) what the model makes of its items.

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

    def _require(self, protocol: Any, otherwise: str) -> None:
        if not isinstance(self.model, protocol):
            raise ConfigError(f"{type(self.model).__name__} {otherwise}")

    def _check_k(self, k: int) -> int:
        if not 1 <= k <= len(self.ids):
            raise DataError(
                f"k={k}: the catalog has {len(self.ids)} items; choose 1..{len(self.ids)}"
            )
        return k

    def encode_users(self, histories: Sequence[Sequence[str]]) -> Tensor:
        """[B, D] float32 unit vectors of histories of external ids."""
        self._require(Embedder, "has no user vectors: it only ranks")
        rows: Tensor = self.model.encode_users(Ragged.from_rows([self._ints(h) for h in histories]))
        return rows

    def encode_items(self, texts: Sequence[str]) -> Tensor:
        """[n, D] float32 unit vectors of raw texts; the catalog stays as it is."""
        self._require(Embedder, "has no item vectors: it only ranks")
        rows: Tensor = self.model.encode_items(list(texts))
        return rows

    def add_items(self, items: Mapping[str, str]) -> None:
        """New items by id and text alone: from now on ranked and allowed in histories.

        Raises:
            DataError: an id that is in the catalog already, or an empty text.
        """
        known = [i for i in items if i in self._index]
        if known:
            raise DataError(f"item {known[0]!r} is in the catalog already")
        self._require(TakesNewItems, "ranks the items it was trained on; train it again for others")
        added = self.model.add_items(list(items.values()))
        self._scorer = None
        if self.vectors is not None:
            self.vectors = torch.cat((self.vectors, self.model.encode_items(added)))
        for item, text in items.items():
            self._index[item] = len(self.ids)
            self.ids.append(item)
            self.texts.append(text)


def load(run: str | Path) -> Predictor:
    """The model of a run folder, ready to recommend; needs neither the data set nor a GPU.

    Raises:
        CheckpointError: missing or torn files, another backbone than the run was made on, or
            tensors that do not fit.
    """
    run = Path(run)
    config, identity = load_run_config(run)
    tensors, _ = load_tensors(run / "model.safetensors")
    catalog = read_catalog(run)
    backbone = backbone_of(config)
    check_backbone(run, identity, backbone)
    # A run that lies on a read-only disk can be used; its texts are then read anew.
    model = build_model(
        config, catalog, backbone, run / "cache" if os.access(run, os.W_OK) else None
    )
    load_trained(model, tensors, str(run / "model.safetensors"))
    model.eval()
    if hasattr(model, "freeze"):
        model.freeze()
    version = file_hash(run / "model.safetensors")
    vectors = _stored_vectors(run, version, len(catalog))
    if vectors is None:
        vectors = catalog_vectors(model)
    if vectors is not None:
        vectors = vectors.to(device())
    ids = catalog.table["item_id"].to_pylist()
    return Predictor(model, ids, list(catalog.texts), vectors, version)


def _stored_vectors(run: Path, version: str, items: int) -> Tensor | None:
    """Vectors written with this very model, or None."""
    path = run / "items.safetensors"
    if not path.is_file():
        return None
    tensors, metadata = load_tensors(path)
    vectors = tensors.get("vectors")
    if vectors is None or metadata.get("model") != version or len(vectors) != items:
        return None
    return vectors
