"""One version of what is served: model, texts, tokenizer, index and catalog, never changed.

A request takes one `Version` and uses nothing else. Items that come and go make another one, which
shares the model: its catalog only ever grows, so that rows mean the same in all of them.
"""

from __future__ import annotations

__all__ = [
    "Attributes",
    "ItemState",
    "ItemTexts",
    "Query",
    "Ranked",
    "User",
    "Version",
    "check_version",
    "encode",
    "load_version",
    "rank",
    "score",
]

import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import CheckpointError, DataError, nearest
from l2rec.index import Index, build
from l2rec.index import load as load_index
from l2rec.protocols import TakesNewItems
from l2rec.runs.checkpoint import load_tensors, read_json
from l2rec.runs.train import Predictor, load, read_catalog

logger = logging.getLogger("l2rec.service")

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
ItemTexts = Mapping[str, tuple[str, Mapping[str, str]]]
"""id -> text, attributes."""
ItemState = tuple[ItemTexts, frozenset[str]]
"""Of the event log: items that were put, and those that were deleted."""
_serials = itertools.count(1)


class Attributes:
    """Fields of the catalog by row: what answers can be filtered by.

    Several values of one item stand in its string with ``|`` between them.

    Args:
        rows: N. columns: [N] strings by name.
    """

    MOST = 64

    def __init__(self, rows: int, columns: Mapping[str, pa.Array]) -> None:
        self._rows, self._columns = rows, dict(columns)
        self._parts: dict[str, tuple[pa.Array, Rows]] = {}

    @classmethod
    def of_catalog(cls, catalog: Catalog) -> Attributes:
        """The raw fields of a catalog, empty where they are missing."""
        columns = {name: pa.array(catalog.field(name), pa.string()) for name in catalog.fields}
        return cls(len(catalog), columns)

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return self._rows

    def of(self, row: int) -> dict[str, str]:
        """What is known of one item; empty values are left out."""
        values = {name: column[row].as_py() for name, column in self._columns.items()}
        return {name: value for name, value in values.items() if value}

    def check(self, names: Iterable[str]) -> None:
        """DataError for an attribute that does not exist; those that do are named."""
        for name in names:
            if name not in self._columns:
                known = ", ".join(self.names) or "none"
                raise DataError(
                    f"no attribute {name!r}{nearest(name, self.names)} (the catalog has: {known})"
                )

    def mask(self, filters: Mapping[str, Sequence[str]]) -> Mask:
        """[N] bool: items that have, for every attribute named, one of its values.

        Raises:
            DataError: there is no such attribute.
        """
        self.check(filters)
        found = np.ones(len(self), dtype=np.bool_)
        for name, values in filters.items():
            parts, row = self._split(name)
            hit = pc.is_in(parts, value_set=pa.array(list(values), pa.string()))
            one = np.zeros(len(self), dtype=np.bool_)
            one[row[hit.to_numpy(zero_copy_only=False)]] = True
            found &= one
        return found

    def _split(self, name: str) -> tuple[pa.Array, Rows]:
        """Values of a column, and the row that each is of; split once."""
        if name not in self._parts:
            lists = pc.split_pattern(self._columns[name], "|")
            rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
            self._parts[name] = (pc.list_flatten(lists), rows.astype(np.int64))
        return self._parts[name]

    def extended(self, rows: Sequence[Mapping[str, str]]) -> Attributes:
        """With these rows at the end.

        Raises:
            DataError: more than `MOST` attributes.
        """
        names = list(dict.fromkeys((*self.names, *(name for row in rows for name in row))))
        if len(names) > max(self.MOST, len(self.names)):
            raise DataError(
                f"{len(names)} different attributes; items have at most {self.MOST} in all"
            )
        columns = {}
        for name in names:
            known = self._columns.get(name)
            if known is None:
                known = pa.array([""] * len(self), pa.string())
            fresh = pa.array([row.get(name, "") for row in rows], pa.string())
            columns[name] = pa.concat_arrays([known, fresh])
        return Attributes(len(self) + len(rows), columns)


@dataclass(frozen=True, eq=False)
class Version:
    """What one request is answered from.

    predictor: the model with the catalog, item ints by id. index: over the first ``indexed`` rows;
    None for a method that only ranks. deleted: rows that are never recommended (deleted, or
    replaced by a newer row of the same id). name: of the run folder. version: short hash of the
    trained tensors. report: report.json. loaded_at: unix seconds. serial: of the loading; with it,
    a row is the same item for as long as the process lives. loaded: rows it was loaded with. run:
    the folder it was loaded from.
    """

    predictor: Predictor
    index: Index | None
    indexed: int
    attributes: Attributes
    deleted: frozenset[int]
    name: str
    report: Mapping[str, Any]
    loaded_at: float
    serial: int
    loaded: int = 0
    run: Path | None = None

    @property
    def version(self) -> str:
        return self.predictor.version

    @property
    def ids(self) -> Sequence[str]:
        """External id of every row."""
        return self.predictor.ids

    @property
    def texts(self) -> Sequence[str]:
        """Text of every row."""
        return self.predictor.texts

    def __len__(self) -> int:
        """Rows, deleted ones included."""
        return len(self.predictor.ids)

    @cached_property
    def matrix(self) -> Tensor | None:
        """[N, D] float32 item vectors in main memory."""
        vectors = self.predictor.vectors
        return None if vectors is None else vectors.float().cpu().contiguous()

    @cached_property
    def hidden(self) -> Mask:
        """[N] bool: rows that are never recommended."""
        mask = np.zeros(len(self), dtype=np.bool_)
        mask[list(self.deleted)] = True
        return mask

    @property
    def added(self) -> int:
        """Rows that the model has beyond those that were loaded, of this version or given up."""
        return int(self.predictor.model.n_items) - self.loaded

    @property
    def takes_new_items(self) -> bool:
        """Whether an item that was not trained on can be ranked, by its text."""
        return isinstance(self.predictor.model, TakesNewItems)

    def serves(self, item: str) -> bool:
        """Whether this id can be recommended."""
        row = self.predictor.row_of(item)
        return row is not None and row not in self.deleted

    def attributes_of(self, row: int) -> dict[str, str]:
        """Attributes of an item; empty ones are left out."""
        return self.attributes.of(row)

    def with_items(self, items: ItemTexts) -> Version:
        """Another version in which these ids have these texts and attributes. In the thread of
        the models.

        An item that has its text already keeps its row, unless its attributes differ.

        Raises:
            ConfigError: the method cannot take new items. DataError: an empty text, or one that
            the model reads nothing in.
        """
        fresh: dict[str, tuple[str, Mapping[str, str]]] = {}
        deleted = set(self.deleted)
        for item, (text, attributes) in items.items():
            row = self.predictor.row_of(item)
            if row is None:
                fresh[item] = (text, attributes)
            elif self.texts[row] != text or self.attributes.of(row) != dict(attributes):
                fresh[item] = (text, attributes)
                deleted.add(row)
            else:
                deleted.discard(row)
        if not fresh:
            return replace(self, deleted=frozenset(deleted))
        predictor = self.predictor.with_items({i: text for i, (text, _) in fresh.items()})
        gap = len(predictor.ids) - len(self) - len(fresh)
        vectors = predictor.vectors
        if vectors is not None:
            good = torch.isfinite(vectors[len(self) + gap :]).all(-1).tolist()
            bad = [item for item, fine in zip(fresh, good, strict=True) if not fine]
            if bad:
                raise DataError(f"item {bad[0]!r}: the model reads nothing in its text")
        deleted.update(range(len(self), len(self) + gap))
        rows: list[Mapping[str, str]] = [{} for _ in range(gap)]
        rows += [attributes for _, attributes in fresh.values()]
        return replace(
            self,
            predictor=predictor,
            attributes=self.attributes.extended(rows),
            deleted=frozenset(deleted),
        )

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[n, D] float32 vectors of raw texts. In the thread of the models.

        Raises:
            DataError: a text that the model reads nothing in.
        """
        vectors = self.predictor.encode_items(texts).float().cpu()
        if not bool(torch.isfinite(vectors).all()):
            raise DataError("the model reads nothing in one of the texts")
        return vectors

    def brought_to(self, state: ItemState) -> Version:
        """This, or another version in which everything that was put is there and everything that
        was deleted is not. In the thread of the models.
        """
        put, gone = state
        version = self
        if put and self.takes_new_items:
            version = version.with_items(put)
        version = version.without_items(gone)
        same = version.predictor is self.predictor and version.deleted == self.deleted
        return self if same else version

    def without_items(self, ids: Iterable[str]) -> Version:
        """Another version that does not recommend these; unknown ids change nothing."""
        rows = [self.predictor.row_of(item) for item in ids]
        return replace(self, deleted=self.deleted | {row for row in rows if row is not None})


def load_version(
    run: Path,
    *,
    index: str = "auto",
    expected: str | None = None,
    items: ItemState | None = None,
) -> Version:
    """A run folder, ready to serve, its index built.

    Args:
        expected: hash that the trained tensors must have.
        items: of the event log, which the run was not trained with.

    Raises:
        L2RecError: whatever is wrong with the folder.
    """
    predictor = load(run)
    if expected is not None and predictor.version != expected:
        raise CheckpointError(
            f"{run}: its weights are {predictor.version}, {expected} was deployed; deploy it again"
        )
    stored = run / "items.safetensors"
    if stored.is_file() and (made := load_tensors(stored)[1].get("model")) != predictor.version:
        raise CheckpointError(
            f"{run}: item vectors of model {made}, weights {predictor.version}: torn or "
            "exchanged; delete items.safetensors if the weights are right"
        )
    predictor.verify()
    report = read_json(run / "report.json") if (run / "report.json").is_file() else {}
    base = len(predictor.ids)
    version = Version(
        predictor=predictor,
        index=None,
        indexed=base,
        attributes=Attributes.of_catalog(read_catalog(run)),
        deleted=frozenset(n for n, item in enumerate(predictor.ids) if not item),
        name=run.resolve().name,
        report=report,
        loaded_at=time.time(),
        serial=next(_serials),
        run=run,
    )
    if items is not None:
        version = version.brought_to(items)
    over, indexed = _index(run, version.predictor, index, base)
    return replace(version, index=over, indexed=indexed, loaded=len(version))


def _index(run: Path, predictor: Predictor, kind: str, base: int) -> tuple[Index | None, int]:
    """An index and how many rows it is over: what `l2rec index` wrote into the run folder, over the
    run's own ``base`` items, or one that is built now, over all.
    """
    if predictor.vectors is None:
        return None, len(predictor.ids)
    if kind == "auto" and (run / INDEX).is_dir():
        index, ids, version = load_index(run / INDEX)
        if version != predictor.version or ids != predictor.ids[:base]:
            raise CheckpointError(
                f"{run / INDEX}: of vectors of model {version}, the run is {predictor.version}; "
                f"build it anew: l2rec embed {run} --out V && l2rec index V/items.parquet --out "
                f"{run / INDEX}"
            )
        return index, base
    return build(predictor.vectors.float().cpu().numpy(), kind), len(predictor.ids)


INDEX = "index"
"""Folder of a run that an index may lie in."""
CHECKED, RECALL = 8, 0.8


def check_version(version: Version) -> None:
    """A real inference: finite scores, vectors of the length they should have, an index that
    finds what exact search finds. In the thread of this version's model.

    Raises:
        CheckpointError: what is wrong.
    """
    served = np.flatnonzero(~version.hidden)
    if not len(served):
        raise CheckpointError(f"{version.name}: no item can be recommended")
    some = served[np.unique(np.linspace(0, len(served) - 1, CHECKED).astype(np.int64))]
    histories = [[version.ids[row]] for row in some] + [[version.ids[row] for row in some]]
    rows = version.predictor.rows(histories)
    users = encode(version, rows)
    vectors = torch.stack([user.vector for user in users])
    if not bool(torch.isfinite(vectors).all()):
        raise CheckpointError(f"{version.name}: scores that are not finite numbers")
    if version.matrix is None:
        return
    lengths = version.matrix.norm(dim=-1)
    unit = bool((lengths - 1).abs().max() < 0.01)
    worst = float((vectors.norm(dim=-1) - 1).abs().max())
    if unit and worst > 0.01:
        raise CheckpointError(f"{version.name}: user vectors off unit length by {worst:.2g}")
    k = min(10, len(served))
    found = rank([Query(version, user, k) for user in users])
    exact = [_exact(Query(version, user, k)) for user in users]
    hits = sum(len(np.intersect1d(a.rows, b.rows)) for a, b in zip(found, exact, strict=True))
    recall = hits / (k * len(found))
    if recall < RECALL:
        raise CheckpointError(
            f"{version.name}: the index finds {recall:.0%} of what exact search finds; build it "
            "with --index exact"
        )


# -- ranking -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class User:
    """A history, encoded.

    vector: [D], or [N] scores of a method that only ranks. gate: of Eq. 7, if there is one.
    rows, added: [n] int64 and [n] float32, what the method adds to the inner products with some
    items, such as counts of what was met together.
    """

    vector: Tensor
    gate: float | None = None
    rows: Rows = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    added: Floats = field(default_factory=lambda: np.zeros(0, dtype=np.float32))


def encode(version: Version, rows: Ragged) -> list[User]:
    """Histories of item ints, encoded. In the thread of the version's model."""
    vectors, gates = version.predictor.users(rows)
    vectors = vectors.float().cpu()
    prior = None if version.matrix is None else version.predictor.prior(rows)
    if prior is None:
        return [User(vector.clone(), gate) for vector, gate in zip(vectors, gates, strict=True)]
    dense = prior.float().cpu().numpy()[:, : len(version)]
    some = [np.flatnonzero(row) for row in dense]
    return [
        User(vector.clone(), gate, found, row[found])
        for vector, gate, found, row in zip(vectors, gates, some, dense, strict=True)
    ]


def score(version: Version, user: User, rows: Rows) -> Floats:
    """[n] float32 scores of some rows."""
    if version.matrix is None:
        found: Floats = user.vector.numpy()[rows]
        return found
    if len(rows) * 2 < len(version):
        scores = (version.matrix[torch.from_numpy(rows)] @ user.vector).numpy()
    else:
        scores = (version.matrix @ user.vector).numpy()[rows]
    if len(user.rows):
        everywhere = np.zeros(len(version), dtype=np.float32)
        everywhere[user.rows] = user.added
        scores = scores + everywhere[rows]
    return scores


@dataclass(frozen=True, eq=False)
class Query:
    """without: rows that are not listed. only: [N] bool, nothing else is listed."""

    version: Version
    user: User
    k: int
    without: Rows = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    only: Mask | None = None


@dataclass(frozen=True, eq=False)
class Ranked:
    """Best first; fewer than k where fewer are left. rows: int64. scores: float32."""

    rows: Rows
    scores: Floats


HEADROOM = 4
"""Rows beyond k that are fetched for deleted ones among them, in units of k."""


def rank(queries: Sequence[Query]) -> list[Ranked]:
    """The k best rows of each query that may be listed.

    Those without a filter are searched together, with as many rows to spare as may be taken out;
    where that was not enough, and where there is a filter, all rows are scored.
    """
    found: list[Ranked | None] = [None] * len(queries)
    together: dict[int, list[int]] = {}
    for number, query in enumerate(queries):
        if query.only is None and query.version.index is not None:
            together.setdefault(id(query.version), []).append(number)
    for numbers in together.values():
        try:
            searched = _searched([queries[n] for n in numbers])
        except Exception:  # such as of a server that is away: exact search needs nobody
            logger.exception("the index failed; all rows are scored")
            continue
        for number, ranked in zip(numbers, searched, strict=True):
            found[number] = ranked
    return [
        _exact(query) if ranked is None else ranked
        for query, ranked in zip(queries, found, strict=True)
    ]


def _searched(queries: Sequence[Query]) -> list[Ranked | None]:
    """By the index, and newer rows beside it; None where too few were left.

    Rows that a method adds something to are scored one by one, and do not count as found.
    """
    version = queries[0].version
    matrix, index = version.matrix, version.index
    assert matrix is not None and index is not None
    spare = min(len(version.deleted), HEADROOM * max(query.k for query in queries))
    wanted = max(query.k + len(query.without) + len(query.user.rows) for query in queries)
    wanted = min(wanted + spare, len(version))
    users = torch.stack([query.user.vector for query in queries])
    positions, scores = index.search(users.numpy(), min(wanted, version.indexed))
    if len(matrix) > version.indexed:
        newer = (users @ matrix[version.indexed :].T).numpy()
        rows = np.arange(version.indexed, len(matrix), dtype=np.int64)
        positions = np.concatenate((positions, np.tile(rows, (len(users), 1))), axis=1)
        scores = np.concatenate((scores, newer), axis=1)
    found: list[Ranked | None] = []
    for query, some, their in zip(queries, positions, scores, strict=True):
        user = query.user
        keep = (some >= 0) & ~version.hidden[some]
        keep &= ~np.isin(some, np.concatenate((query.without, user.rows)))
        some, their = some[keep], their[keep]
        complete = len(some) >= query.k or wanted >= len(version)
        if len(user.rows):
            more = user.rows[~version.hidden[user.rows] & ~np.isin(user.rows, query.without)]
            some = np.concatenate((some, more))
            their = np.concatenate((their, score(version, user, more)))
        found.append(_best(some, their, query.k) if complete else None)
    return found


def _exact(query: Query) -> Ranked:
    """All rows that may be listed are scored."""
    allowed = ~query.version.hidden
    allowed[query.without] = False
    if query.only is not None:
        allowed &= query.only
    rows = np.flatnonzero(allowed)
    return _best(rows, score(query.version, query.user, rows), query.k)


def _best(rows: Rows, scores: npt.NDArray[np.float32], k: int) -> Ranked:
    """Best first; equal scores in order of rows."""
    if len(rows) > 4 * k:
        some = np.argpartition(-scores, k)[: k + 1]
        some = np.flatnonzero(scores >= scores[some].min())  # with all that tie with the last
        rows, scores = rows[some], scores[some]
    order = np.lexsort((rows, -scores))[:k]
    return Ranked(rows[order].astype(np.int64), scores[order].astype(np.float32))
