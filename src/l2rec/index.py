"""Search for the k item vectors with the largest inner product: exact, FAISS, Milvus.

    exact    blocked matmul and top-k, nothing to build; every other kind is measured against it
    flat     FAISS over all rows: exact as well
    hnsw     FAISS graph
    ivf      FAISS inverted lists
    int8     FAISS over all rows, a byte for each number
    binary   FAISS over all rows, a bit for each number (RaBitQ), the best scored once more in int8
    milvus   a Milvus server by URI (token from L2REC_MILVUS_TOKEN), or a file with milvus-lite

Rows are numbered as in the vectors an index was built from. On disk an index is a folder with a
manifest: rows, size, kind, the version of the vectors, and the hash of every file. Renaming the
manifest exchanges it: after a kill at any moment the folder holds the old index or the new one.
"""

from __future__ import annotations

__all__ = ["KINDS", "Attribute", "Index", "build", "build_folder", "load", "recall", "save"]

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import open_dataset
from l2rec.data.vectors import Floats, off_unit, read_vectors, vectors_hash
from l2rec.disk import locked, replacing_folder, write_text
from l2rec.errors import CheckpointError, ConfigError, DataError, L2RecError, StorageError

KINDS = ("exact", "flat", "hnsw", "ivf", "int8", "binary", "milvus")
FORMAT = 2
EXACT_ROWS = 100_000
"""Rows that exact search scores in less time than encoding a history takes:
`benchmarks/indexes.py`."""
BLOCK_SCORES = 1 << 22
"""Scores that exact search computes at once: 16 MB, as in `evaluation`."""
MANIFEST = "index.json"
ASKED, SCORED = 1000, 200_000_000
"""Most queries that recall and speed are measured with, and most inner products for that."""
AT_ONCE = 32
"""Queries of one search when speed is measured: about a batch of the service."""
SMALL = {"int8": "SQ8", "binary": "RaBitQ,Refine(SQ8)"}
"""FAISS's names of the kinds that keep rows in fewer bits."""
RESCORED = 10.0
"""Rows that binary scores once more, for each one that is asked for."""
LINKS, CONSTRUCTION = 32, 200
"""Links of a node of an HNSW graph, and breadth of the search that builds it."""
BREADTH = 128
"""Default breadth of a search in an HNSW graph: ef."""
WIDEST = 1 << 16
"""Largest ef."""
MILVUS_MOST = 16_384
"""Most rows that Milvus returns for a query."""
MILVUS_SECONDS = 10.0
MILVUS_BYTES = 65_535
"""Longest string that Milvus takes."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
"""Names of fields and aliases that Milvus takes."""
LEAST = 0.8
"""Recall that a collection must reach before an alias is moved to it."""

Rows = npt.NDArray[np.int64]
T = TypeVar("T")


class Index(Protocol):
    """Protocol of a searchable index of N rows."""

    kind: str

    def __len__(self) -> int: ...

    @property
    def dim(self) -> int:
        """Size D of a row."""
        ...

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        """Return the k best rows [B, k] int64 for queries [B, D] float32, best first, and their
        inner products [B, k] float32.

        Equal scores are in order of row. Where fewer than k are found: row -1 with score -inf.
        """
        ...


@dataclass(frozen=True)
class Attribute:
    """Attribute of the rows that a search can be confined to: its name, and [N] values."""

    name: str
    values: list[str]


def build(vectors: Floats, kind: str = "auto", **options: Any) -> Index:
    """Build an index of vectors [N, D] float32.

    kind: one of `KINDS`, or ``auto`` for one that suits the number of rows. options: ``uri``,
    ``collection``, ``ef``, ``ids`` and ``attribute`` of Milvus; ``lists`` and ``probes`` of ivf;
    ``ef`` of hnsw.

    Raises:
        ConfigError: an unknown kind or option, a library that is missing.
        DataError: no rows, or numbers that are not finite.
        StorageError: Milvus is away.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or not vectors.size:
        raise DataError(f"vectors of shape {list(vectors.shape)}; an index needs rows [N, D]")
    if not np.isfinite(vectors).all():
        raise DataError(
            "vectors hold numbers that are not finite; the run is torn or badly trained"
        )
    if kind == "auto":
        kind = _fitting(vectors)
    allowed = {
        "ivf": {"lists", "probes"},
        "hnsw": {"ef"},
        "milvus": {"uri", "collection", "ef", "ids", "attribute"},
    }
    odd = options.keys() - allowed.get(kind, set())
    if odd and kind in KINDS:
        raise ConfigError(f"index kind {kind!r} has no option {min(odd)!r}")
    if kind == "exact":
        return Exact(vectors)
    if kind in ("flat", "hnsw", "ivf", *SMALL):
        return Faiss.build(vectors, kind, **options)
    if kind == "milvus":
        return Milvus.build(vectors, **options)
    raise ConfigError(f"index kind {kind!r}: choose auto or one of {', '.join(KINDS)}")


def _fitting(vectors: Floats) -> str:
    """Choose the kind that ``auto`` stands for."""
    # With inner products, a graph's searches lead to the longest vectors and miss the others.
    if len(vectors) > EXACT_ROWS and not off_unit(vectors).any():
        with contextlib.suppress(ConfigError):
            _faiss()
            return "hnsw"
    return "exact"


def recall(index: Index, vectors: Floats, queries: Floats, k: int) -> float:
    """Compute the share of the exact k best rows that the index finds, over all queries.

    Any row that ties with the k-th counts, such as those of items with the same text.
    """
    k = min(k, len(vectors))
    return _recall(vectors, queries, index.search(queries, k)[0], Exact(vectors).search(queries, k))


def _recall(vectors: Floats, queries: Floats, found: Rows, exact: tuple[Rows, Floats]) -> float:
    if not len(queries):
        raise DataError("no queries; recall needs some")
    hits = 0
    for query, rows, scores in zip(queries, found, exact[1], strict=True):
        some = np.unique(rows[rows >= 0])
        rounding = 1e-5 * max(1.0, float(np.abs(scores).max()))
        hits += int((vectors[some] @ query >= scores[-1] - rounding).sum())
    return hits / exact[0].size


def _asked(queries: Floats, dim: int, k: int) -> Floats:
    """Check queries and convert them to contiguous float32.

    Raises:
        DataError: of another size than the index, not finite, or k below 1.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise DataError(f"queries of shape {list(queries.shape)}; this index takes [B, {dim}]")
    if not np.isfinite(queries).all():
        raise DataError("queries hold numbers that are not finite")
    if k < 1:
        raise DataError(f"k={k}; choose 1 or more")
    return queries


def _check_range(name: str, value: int | None, most: int) -> None:
    """Refuse an option outside 1..most."""
    if value is not None and not 1 <= value <= most:
        raise ConfigError(f"{name}={value}: choose 1..{most}")


def _nothing(queries: int, k: int) -> tuple[Rows, Floats]:
    """Return rows [B, k] and scores of a search without results, to be filled."""
    return (
        np.full((queries, k), -1, dtype=np.int64),
        np.full((queries, k), -np.inf, dtype=np.float32),
    )


# -- kinds ---------------------------------------------------------------------------------------


class Exact:
    """Exact index: all inner products, a block of queries at a time."""

    kind = "exact"

    def __init__(self, vectors: Floats) -> None:
        import torch

        self.vectors = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        import torch

        from l2rec.data.ragged import Ragged
        from l2rec.evaluation.ranking import top_k

        asked = torch.from_numpy(_asked(queries, self.dim, k))
        rows, scores = _nothing(len(asked), k)
        numbers = Ragged(np.arange(len(asked), dtype=np.int32), np.arange(len(asked) + 1))
        best = top_k(  # each query is a history of one item: its number
            lambda some: asked[torch.from_numpy(some.values)] @ self.vectors.T,
            numbers,
            min(k, len(self)),
            batch_size=max(1, BLOCK_SCORES // len(self)),
        )
        rows[:, : best.items.shape[1]] = best.items
        scores[:, : best.items.shape[1]] = best.scores
        return rows, scores


def _faiss() -> Any:
    """Import FAISS and give it as many threads as torch has in this thread.

    Each has its own OpenMP library, so a setting of one does not reach the other.

    Raises:
        ConfigError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ConfigError("this index needs FAISS: pip install 'l2rec[faiss]'") from None
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class Faiss:
    """FAISS index of kind flat, hnsw, ivf, int8 or binary."""

    def __init__(self, kind: str, index: Any) -> None:
        self.kind, self.index = kind, index

    @classmethod
    def build(
        cls,
        vectors: Floats,
        kind: str,
        lists: int | None = None,
        probes: int | None = None,
        ef: int = BREADTH,
    ) -> Faiss:
        """Build an index of vectors [N, D].

        lists: inverted lists of ivf, by default 4 sqrt(N). probes: lists searched. ef: breadth of
        a search in hnsw.
        """
        faiss = _faiss()
        rows, dim = vectors.shape
        for name, value, most in (
            ("lists", lists, rows),
            ("probes", probes, rows),
            ("ef", ef, WIDEST),
        ):
            _check_range(name, value, most)
        if kind == "flat":
            index = faiss.IndexFlatIP(dim)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = CONSTRUCTION, ef
        elif kind in SMALL:
            index = faiss.index_factory(dim, SMALL[kind], faiss.METRIC_INNER_PRODUCT)
            if kind == "binary":
                index.k_factor = RESCORED
            index.train(vectors)
        else:
            # FAISS warns below 39 rows a list: too few to find its centre.
            lists = lists or max(1, min(rows // 39, round(4 * rows**0.5)))
            index = faiss.IndexIVFFlat(
                faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT
            )
            index.cp.seed = 0
            index.train(vectors)
            index.nprobe = min(lists, probes or max(8, lists // 8))
        index.add(vectors)
        return cls(kind, index)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def dim(self) -> int:
        return int(self.index.d)

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        asked = _asked(queries, self.dim, k)
        rows, scores = _nothing(len(asked), k)
        if not len(asked):
            return rows, scores
        faiss = _faiss()
        # One more than asked for shows whether a tie crosses the cut.
        best, at = self.index.search(asked, min(k + 1, len(self)))
        best = np.where(at < 0, -np.inf, best).astype(np.float32)
        order = np.lexsort((at, -best))  # along the last axis: by score, then by row
        best, at = np.take_along_axis(best, order, 1), np.take_along_axis(at, order, 1)
        wanted = min(k, len(self))
        rows[:, :wanted], scores[:, :wanted] = at[:, :wanted], best[:, :wanted]
        if self.kind == "flat" and best.shape[1] > k:
            cut = np.flatnonzero(best[:, k - 1] == best[:, k])
            if len(cut):
                stored_rows = faiss.rev_swig_ptr(self.index.get_xb(), len(self) * self.dim)
                all_rows = Exact(stored_rows.reshape(len(self), self.dim))
                rows[cut], scores[cut] = all_rows.search(asked[cut], k)
        return rows, scores


class Milvus:
    """A collection of a Milvus server, or of a file (milvus-lite, one process at a time).

    ef: breadth of a search in its HNSW graph. None for a collection of an l2rec that left the type
    of the index to Milvus, and its breadth with it. attribute: name of the field that divides the
    collection into partitions, if one does.
    """

    kind = "milvus"

    def __init__(
        self,
        uri: str,
        collection: str,
        rows: int,
        dim: int,
        ef: int | None = None,
        attribute: str | None = None,
    ) -> None:
        self.uri, self.collection, self.rows, self.dim = _milvus_uri(uri), collection, rows, dim
        self.ef, self.attribute = ef, attribute
        try:
            from pymilvus import MilvusClient
        except ImportError:
            raise ConfigError("this index needs pymilvus: pip install 'l2rec[milvus]'") from None
        token = os.environ.get("L2REC_MILVUS_TOKEN", "")
        self.client = self._ask(
            lambda: MilvusClient(uri=self.uri, token=token, timeout=MILVUS_SECONDS),
            "is it up, and L2REC_MILVUS_TOKEN right"
            if "://" in self.uri
            else "milvus-lite serves one process at a time: does another one hold it",
        )

    def _ask(self, call: Callable[[], T], question: str = "is it up") -> T:
        """Return the result of a call of pymilvus.

        Raises:
            StorageError: the call failed, for whatever reason.
        """
        try:
            return call()
        except Exception as error:  # a hierarchy of pymilvus, gRPC and the file system
            reason = " ".join(str(error).split())[:200]
            if token := os.environ.get("L2REC_MILVUS_TOKEN"):
                reason = reason.replace(token, "***")
            raise StorageError(f"Milvus at {self.uri}: {question}? {reason}") from None

    @classmethod
    def build(
        cls,
        vectors: Floats,
        uri: str | None = None,
        collection: str | None = None,
        ef: int = BREADTH,
        ids: Sequence[str] | None = None,
        attribute: Attribute | None = None,
    ) -> Milvus:
        """Fill a collection, by default named by a hash of the vectors, unless it is complete; then
        count its rows.

        ids: of the rows, for other programs: the field item_id. attribute: the partition key.
        """
        if uri is None:
            raise ConfigError("kind=milvus needs a uri: a server's, or a file ending in .db")
        _check_range("ef", ef, WIDEST)
        if collection is None:
            collection = f"l2rec_{vectors_hash([], vectors, '')[:16]}"
        if "://" not in uri:
            Path(uri).resolve().parent.mkdir(parents=True, exist_ok=True)
        rows, dim = vectors.shape
        columns = _columns(ids, attribute, rows)
        name = None if attribute is None else attribute.name
        index = cls(uri, collection, rows, dim, ef, name)
        if index._ask(index._graph) and index._count() == len(vectors):
            return index
        index._ask(lambda: index._fill(vectors, columns))
        index.check()
        return index

    def _graph(self) -> bool:
        """Tell whether there is such a collection with a graph, and not the index of another."""
        if not self.client.has_collection(self.collection):
            return False
        names = self.client.list_indexes(self.collection)
        kinds = [self.client.describe_index(self.collection, name) for name in names]
        return any(kind.get("index_type") == "HNSW" for kind in kinds)

    def _fill(self, vectors: Floats, columns: Mapping[str, Sequence[str]]) -> None:
        """Write the collection anew, its graph, and load it. ``columns``: of strings, [N] each.

        The rows come first, then the graph, then the loading: milvus-lite builds what it searches
        when a collection is loaded, and compares with every row of one that was loaded before.
        """
        from pymilvus import DataType, MilvusClient

        self.client.drop_collection(self.collection)
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dim)
        for name in columns:
            schema.add_field(
                name,
                DataType.VARCHAR,
                max_length=MILVUS_BYTES,
                is_partition_key=name == self.attribute,
            )
        self.client.create_collection(self.collection, schema=schema, consistency_level="Strong")
        for start in range(0, self.rows, 1000):
            part = vectors[start : start + 1000].tolist()
            self.client.insert(
                self.collection,
                [
                    {"id": n, "vector": vector, **{name: c[n] for name, c in columns.items()}}
                    for n, vector in enumerate(part, start)
                ],
            )
        self.client.flush(self.collection)
        graph = MilvusClient.prepare_index_params()
        graph.add_index(
            "vector",
            index_type="HNSW",
            metric_type="IP",
            params={"M": LINKS, "efConstruction": CONSTRUCTION},
        )
        self.client.create_index(self.collection, graph)  # returns when a server has built it
        self.client.load_collection(self.collection)

    def _count(self) -> int | None:
        """Count the rows of the collection; None where there is no collection."""
        if not self._ask(lambda: self.client.has_collection(self.collection)):
            return None
        self._ask(lambda: self.client.load_collection(self.collection))
        answer = self._ask(lambda: self.client.query(self.collection, output_fields=["count(*)"]))
        return int(answer[0]["count(*)"])

    def check(self) -> None:
        """Check that the collection exists and has all its rows.

        Raises:
            CheckpointError: it is missing or incomplete. StorageError: Milvus is away.
        """
        count = self._count()
        if count != self.rows:
            raise CheckpointError(
                f"collection {self.collection} of Milvus at {self.uri} "
                + ("is missing" if count is None else f"has {count} rows, not {self.rows}")
                + "; build the index again"
            )

    def drop(self) -> None:
        """Delete the collection."""
        self._ask(lambda: self.client.drop_collection(self.collection))

    def take_over(self, earlier: set[str], alias: str | None, prefix: str) -> None:
        """Let an alias, and those of earlier collections, name this collection; delete those.

        Moving an alias is one step for Milvus: a search by it meets the old rows or the new ones.
        The collection that the alias named before is an earlier one too, if it has the prefix: of
        a build that was killed.

        Raises:
            ConfigError: the alias is the name of a collection. StorageError: Milvus is away.
        """
        client = self.client
        collections = self._ask(client.list_collections)
        if alias in collections:
            raise ConfigError(f"--alias {alias}: a collection has this name; choose another")
        known = set(self._ask(client.list_aliases)["aliases"])
        earlier, moved = set(earlier), set()
        if alias is not None:
            moved.add(alias)
            if alias in known:
                target = self._ask(lambda: client.describe_alias(alias))["collection_name"]
                earlier |= {target} if target.startswith(prefix) else set()
        earlier = (earlier & set(collections)) - {self.collection}
        for collection in earlier:
            moved |= set(self._ask(partial(client.list_aliases, collection))["aliases"])
        for name in sorted(moved):
            point = client.alter_alias if name in known else client.create_alias
            self._ask(partial(point, self.collection, name))
        for collection in earlier:
            self._ask(partial(client.drop_collection, collection))

    def __len__(self) -> int:
        return self.rows

    def search(self, queries: Floats, k: int, *, within: Sequence[str] = ()) -> tuple[Rows, Floats]:
        """Search as `Index.search`; returns at most 16,384 rows for a query.

        within: values of the attribute; rows that have another are not found.

        Raises:
            StorageError: Milvus is away. ConfigError: within, of a collection without partitions.
        """
        confined = {}
        if within:
            if self.attribute is None:
                raise ConfigError("this index has no partitions; build it with --partition-by")
            # Written out: milvus-lite has no templates of filters.
            values = json.dumps(list(within), ensure_ascii=False)
            confined = {"filter": f"{self.attribute} in {values}"}
        asked = _asked(queries, self.dim, k)
        rows, scores = _nothing(len(asked), k)
        limit = min(k, self.rows, MILVUS_MOST)
        # A server refuses a search that is narrower than its result is long.
        breadth = {} if self.ef is None else {"params": {"ef": max(self.ef, limit)}}
        for start in range(0, len(asked), 100):
            part = asked[start : start + 100].tolist()
            answers = self._ask(
                partial(
                    self.client.search,
                    self.collection,
                    part,
                    limit=limit,
                    search_params=breadth,
                    timeout=MILVUS_SECONDS,
                    **confined,
                )
            )
            for at, hits in enumerate(answers, start):
                best = sorted((-hit["distance"], hit["id"]) for hit in hits)
                rows[at, : len(best)] = [row for _, row in best]
                scores[at, : len(best)] = [-score for score, _ in best]
        return rows, scores


def _columns(
    ids: Sequence[str] | None, attribute: Attribute | None, rows: int
) -> dict[str, Sequence[str]]:
    """Return the columns of strings that a collection has beside its vectors, [N] each.

    Raises:
        ConfigError: an attribute that cannot be a field. DataError: a string that is too long.
    """
    columns: dict[str, Sequence[str]] = {} if ids is None else {"item_id": ids}
    if attribute is not None:
        if not NAME.fullmatch(attribute.name) or attribute.name in ("id", "vector", "item_id"):
            raise ConfigError(
                f"--partition-by {attribute.name}: Milvus takes letters, digits and _; id, "
                "vector and item_id are taken; rename the field"
            )
        columns[attribute.name] = attribute.values
    for name, strings in columns.items():
        assert len(strings) == rows
        longest = max(strings, key=lambda text: len(text.encode()))
        if len(longest.encode()) > MILVUS_BYTES:
            raise DataError(f"{name} {longest[:40]!r}... is longer than {MILVUS_BYTES} bytes")
    return columns


def searched(index: Index) -> str:
    """Say what a search looks at: the type of the index, and how broad a search in it is."""
    graph = "HNSW graph, {} links, ef {}".format
    if isinstance(index, Milvus):
        return "AUTOINDEX of Milvus" if index.ef is None else graph(LINKS, index.ef)
    if index.kind == "hnsw" and isinstance(index, Faiss):
        return graph(index.index.hnsw.nb_neighbors(1), index.index.hnsw.efSearch)
    if index.kind == "ivf" and isinstance(index, Faiss):
        return f"{index.index.nprobe} of {index.index.nlist} inverted lists"
    return "every row"


def _collection_prefix(folder: Path) -> str:
    """Return the prefix of the names of collections that belong to the index in a folder.

    A hash of the folder's path, so that a copy owns nothing, and of its token.
    """
    text = str(folder.resolve())
    with contextlib.suppress(FileNotFoundError):
        text = f"{_token_of(folder).read_text(encoding='utf-8').strip()} {text}"
    return f"l2rec_{hashlib.sha256(text.encode()).hexdigest()[:16]}_"


def _token_of(folder: Path) -> Path:
    """Return the file that has the random token of an index: a folder of the same path on another
    machine has another one, so that neither deletes the collections of the other.

    It lies beside the folder: a copy of that does not take it along, and a build that fails leaves
    no folder without an index.
    """
    place = folder.resolve()
    return place.parent / f".{place.name}.owner"


def _own_collections(folder: Path) -> None:
    """Write the token of an index before its first collection.

    One that an l2rec without tokens has filled a collection for keeps it, and goes without.
    """
    if not _token_of(folder).exists() and not _collections_of(folder):
        write_text(_token_of(folder), secrets.token_hex(16) + "\n", remedy="free some space")


def _milvus_uri(uri: str) -> str:
    """Check a URI: return a server's address unchanged, a file's path made absolute.

    Raises:
        ConfigError: a secret in the address, or a file that does not end in .db.
    """
    if "://" in uri:
        if "@" in urlsplit(uri).netloc:
            raise ConfigError(
                "a uri with a password in it; put user:password in L2REC_MILVUS_TOKEN"
            )
        return uri
    if not uri.endswith(".db"):
        raise ConfigError(f"uri {uri!r}: a server's, such as http://host:19530, or a file.db")
    return str(Path(uri).resolve())


# -- on disk -------------------------------------------------------------------------------------

FILES = {
    "exact": {"ids": "parquet", "vectors": "npy"},
    "flat": {"ids": "parquet", "index": "faiss"},
    "hnsw": {"ids": "parquet", "index": "faiss"},
    "ivf": {"ids": "parquet", "index": "faiss"},
    "int8": {"ids": "parquet", "index": "faiss"},
    "binary": {"ids": "parquet", "index": "faiss"},
    "milvus": {"ids": "parquet"},
}
"""Files of each kind, by role, with their suffix; a file is named ``ROLE-HASH.SUFFIX``."""


def save(
    index: Index, folder: Path, *, ids: Sequence[str], version: str, alias: str | None = None
) -> None:
    """Write an index with the ids of its rows, whole or not at all.

    A collection of Milvus then takes over from those that the folder had before: aliases of theirs,
    and ``alias``, name it, and they are deleted. The manifest names them until that is done; if it
    fails, saving again goes on with it.

    A new folder is renamed as one. Into a folder that is an index already, the files are moved one
    by one under names of their content, the manifest last.

    Raises:
        CheckpointError: ``folder`` is something else, or cannot be written.
        DataError: ids that do not fit, or one of them twice.
    """
    if len(ids) != len(index):
        raise DataError(f"{len(ids)} ids for an index of {len(index)} rows")
    if len(set(ids)) != len(ids):
        raise DataError("an id twice; every row of an index needs its own")
    _may_hold(folder)
    before = _collections_of(folder)
    if isinstance(index, Milvus):
        before.discard((index.uri, index.collection))
    with replacing_folder(
        folder, manifest=MANIFEST, belongs=_belongs, remedy="free some space"
    ) as staged:
        _write(index, staged, ids, version, before)
    if isinstance(index, Milvus):
        earlier = {collection for uri, collection in before if uri == index.uri}
        index.take_over(earlier, alias, _collection_prefix(folder))
    for uri, collection in before:
        if not isinstance(index, Milvus) or uri != index.uri:
            with contextlib.suppress(L2RecError):
                Milvus(uri, collection, 0, 0).drop()
    if before:
        _forget(folder, before)


def _may_hold(folder: Path) -> None:
    """Refuse a folder that holds something else than an index."""
    if (folder / MANIFEST).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not an index; choose another folder")


def _forget(folder: Path, replaced: set[tuple[str, str]]) -> None:
    """Take collections that were replaced out of the manifest of an index."""
    with locked(folder.parent):  # as an exchange of the folder by another writer
        manifest = _manifest(folder)
        waiting = {(uri, name) for uri, name in manifest.pop("replaces", [])}
        if waiting & replaced:
            if waiting - replaced:
                manifest["replaces"] = sorted(waiting - replaced)
            _write_manifest(folder / MANIFEST, manifest)


def _write(
    index: Index, folder: Path, ids: Sequence[str], version: str, before: set[tuple[str, str]]
) -> None:
    """Write the files of an index and its manifest into an empty folder. ``before``: (uri, name) of
    the collections that it replaces.
    """
    written = {}

    def write(role: str, to: Callable[[Any], object]) -> None:
        suffix = FILES[index.kind][role]
        # All writing goes through Python: FAISS and NumPy have their own buffers and do not report
        # a disk that is full when the last bytes are written.
        with (folder / role).open("wb") as file:
            to(file)
        digest = _sha256(folder / role)
        name = f"{role}-{digest[:16]}.{suffix}"
        (folder / role).rename(folder / name)
        written[role] = {"name": name, "bytes": (folder / name).stat().st_size, "sha256": digest}

    table = pa.table({"id": pa.array(ids, pa.string())})
    write("ids", lambda file: pq.write_table(table, file))
    options: dict[str, Any] = {}
    if isinstance(index, Exact):
        vectors = index.vectors.numpy()
        write(
            "vectors",
            lambda file: np.save(SimpleNamespace(write=file.write), vectors, allow_pickle=False),
        )
    elif isinstance(index, Faiss):
        faiss = _faiss()
        write(
            "index",
            lambda file: faiss.write_index(
                index.index, faiss.PyCallbackIOWriter(file.write, 1 << 20)
            ),
        )
    else:
        assert isinstance(index, Milvus)
        options = {"uri": index.uri, "collection": index.collection, "ef": index.ef}
        if index.attribute is not None:
            options["attribute"] = index.attribute
    manifest = {
        "format": FORMAT,
        "kind": index.kind,
        "rows": len(index),
        "dim": index.dim,
        "version": version,
        "options": options,
        "files": written,
    }
    if before:
        manifest["replaces"] = sorted(before)
    _write_manifest(folder / MANIFEST, manifest)


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1) + "\n"
    write_text(path, text, remedy="free some space")


def _belongs(file: Path) -> bool:
    """Tell whether a file is of an index, by its name."""
    known = {(role, f".{suffix}") for kind in FILES.values() for role, suffix in kind.items()}
    return (file.name.partition("-")[0], file.suffix) in known


def _seal(manifest: Mapping[str, Any]) -> str:
    """Hash everything in a manifest but the hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _collections_of(folder: Path) -> set[tuple[str, str]]:
    """Return (uri, name) of the Milvus collections that were filled for the index in a folder: its
    own, and those that it was to replace when a save was killed.
    """
    with contextlib.suppress(L2RecError):
        manifest = _manifest(folder)
        found = {(uri, collection) for uri, collection in manifest.get("replaces", [])}
        if manifest["kind"] == "milvus":
            found.add((manifest["options"]["uri"], manifest["options"]["collection"]))
        prefix = _collection_prefix(folder)  # a copy has the manifest of another folder
        return {(uri, collection) for uri, collection in found if collection.startswith(prefix)}
    return set()


def load(folder: Path) -> tuple[Index, list[str], str]:
    """Read an index that `save` wrote: (index, ids of its rows, version of its vectors).

    Raises:
        CheckpointError: no index, torn, edited, or of another format.
        StorageError: its Milvus is away.
    """
    while True:
        manifest = _manifest(folder)
        try:
            return _read(folder, manifest)
        except CheckpointError:
            # If the index was exchanged between manifest and files, read the new one.
            if _manifest(folder) == manifest:
                raise


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no index: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {' '.join(str(error).split())}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: not a manifest; build the index again")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: index of format {manifest.get('format')}, this l2rec reads {FORMAT}; "
            "build it again"
        )
    if manifest.get("sha256") != _seal(manifest):
        raise CheckpointError(f"{path} was edited; build the index again")
    return manifest


def _read(folder: Path, manifest: Mapping[str, Any]) -> tuple[Index, list[str], str]:
    kind, rows, dim = manifest["kind"], manifest["rows"], manifest["dim"]
    if kind not in FILES:
        raise CheckpointError(f"{folder}: index kind {kind!r} is not known here")
    paths = {role: folder / file["name"] for role, file in manifest["files"].items()}
    for path in paths.values():
        if path.parent != folder:  # whoever wrote the manifest may have sealed any name
            raise CheckpointError(f"{folder}: {path} is outside of it; build the index again")
    for role, path in paths.items():
        try:
            whole = _sha256(path) == manifest["files"][role]["sha256"]
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; build the index again") from error
        if not whole:
            raise CheckpointError(f"{path} is torn or was edited; build the index again")
    try:
        ids: list[str] = pq.ParquetFile(paths["ids"]).read()["id"].to_pylist()
        index: Exact | Faiss | Milvus
        if kind == "exact":
            index = Exact(np.load(paths["vectors"], allow_pickle=False))
        elif kind == "milvus":
            options = manifest["options"]
            if "://" not in options["uri"] and not Path(options["uri"]).exists():
                raise CheckpointError(f"{folder}: its Milvus file {options['uri']} is missing")
            index = Milvus(rows=rows, dim=dim, **options)
            index.check()
        else:
            index = Faiss(kind, _faiss().read_index(str(paths["index"])))
    except (OSError, KeyError, RuntimeError, pa.ArrowException) as error:
        # The hash is right, so other versions of these libraries wrote the file.
        raise CheckpointError(
            f"{folder} cannot be read, build it again: {' '.join(str(error).split())[:200]}"
        ) from error
    if (len(index), index.dim, len(ids)) != (rows, dim, rows):
        raise CheckpointError(
            f"{folder}: {len(ids)} ids and an index of {len(index)} rows of {index.dim}, its "
            f"manifest says {rows} of {dim}; build it again"
        )
    return index, ids, manifest["version"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- `l2rec index` -------------------------------------------------------------------------------


def build_folder(
    source: Path,
    out: Path,
    *,
    kind: str = "auto",
    queries: Path | None = None,
    k: int = 10,
    uri: str | None = None,
    alias: str | None = None,
    partition_by: str | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """Read vectors, build an index, measure and save it; return the facts to print.

    Of Milvus: ``alias``, a name that the collection has from then on, and ``partition_by``, a field
    of the items in the data set ``data`` that divides it into partitions.

    Raises:
        CheckpointError: vectors that are not whole, a folder that is no index, or too low a recall
            for the alias.
        ConfigError: an unknown kind, k below 1. DataError: queries of another model, a field that
            the items do not have.
        StorageError: Milvus is away.
    """
    if k < 1:
        raise ConfigError(f"k={k}; choose 1 or more")
    for name, option in (("a uri", uri), ("an alias", alias), ("--partition-by", partition_by)):
        if option is not None and kind != "milvus":
            raise ConfigError(f"{name} is for --kind milvus, not {kind}")
    if alias is not None and not NAME.fullmatch(alias):
        raise ConfigError(f"--alias {alias}: Milvus takes letters, digits and _, no digit first")
    if (partition_by is None) != (data is None):
        raise ConfigError("--partition-by FIELD and --data DATA, which has the field, go together")
    _may_hold(out)  # before hours of work
    given = read_vectors(source)
    asked = given if queries is None else read_vectors(queries)
    if asked.version != given.version:
        raise DataError(f"{queries} is of model {asked.version}, {source} of {given.version}")
    if not given.ids or not asked.ids:
        raise DataError(f"{queries if given.ids else source} has no rows")
    options: dict[str, Any] = {}
    attribute = None
    if kind == "milvus":
        if partition_by is not None and data is not None:
            attribute = _attribute(data, partition_by, given.ids)
        _own_collections(out)
        # For this folder alone, and the same name when a killed build is tried again.
        content = [vectors_hash(given.ids, given.vectors, given.version), "item_id"]
        content += [] if attribute is None else [attribute.name, *attribute.values]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        options = {"uri": uri, "collection": _collection_prefix(out) + name}
        options |= {"ids": given.ids, "attribute": attribute}
    started = time.monotonic()
    index = build(given.vectors, kind, **options)
    built = time.monotonic() - started
    wanted = min(k, len(index))
    most = min(ASKED, max(10, SCORED // len(index)))
    some = asked.vectors[np.unique(np.linspace(0, len(asked.ids) - 1, most).astype(np.int64))]
    results, speed = _timed(index, some, wanted)
    exact, exact_speed = _timed(Exact(given.vectors), some, wanted)
    found = _recall(given.vectors, some, results[0], exact)
    if alias is not None and found < LEAST:
        raise CheckpointError(
            f"the collection finds {found:.0%} of what exact search finds, {LEAST:.0%} are needed "
            f"to give it the alias {alias}, which stays as it was"
        )
    facts: dict[str, Any] = {}
    if isinstance(index, Milvus):
        facts["collection"] = index.collection
        if alias is not None:
            facts["alias"] = alias
        if attribute is not None:
            best = exact[0][:, 0]
            inside = _recall_within(index, given.vectors, attribute, some, best, wanted)
            facts[f"recall@{wanted} within one {attribute.name}"] = round(inside, 4)
    save(index, out, ids=given.ids, version=given.version, alias=alias)
    written = _manifest(out)["files"].values()
    return {
        "kind": index.kind,
        "search": searched(index),
        "rows": len(index),
        "dim": given.vectors.shape[1],
        "version": given.version,
        f"recall@{wanted}": round(found, 4),
        **facts,
        "queries": len(some),
        "queries per second": round(speed, 1),
        "exact queries per second": round(exact_speed, 1),
        "build seconds": round(built, 2),
        "megabytes": round(sum(file["bytes"] for file in written) / 1e6, 1),
    }


def _timed(index: Index, queries: Floats, k: int) -> tuple[tuple[Rows, Floats], float]:
    """Search in batches; return (rows, scores) and the number of queries per second."""
    index.search(queries[:1], k)
    started = time.monotonic()
    parts = [
        index.search(queries[start : start + AT_ONCE], k)
        for start in range(0, len(queries), AT_ONCE)
    ]
    seconds = max(time.monotonic() - started, 1e-9)
    rows, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
    return (rows, scores), len(queries) / seconds


def _attribute(data: Path, name: str, ids: Sequence[str]) -> Attribute:
    """Read an attribute of items from a data set's catalog.

    Raises:
        DataError: no such field, one of several values, or items that the catalog does not have.
    """
    catalog = Catalog(open_dataset(data).catalog)
    values = dict(zip(catalog.table["item_id"].to_pylist(), catalog.field(name), strict=True))
    if name in catalog.separators:
        raise DataError(
            f"{name} has several values of one item, and a row lies in one partition; choose a "
            "field of one value"
        )
    unknown = [item for item in ids if item not in values]
    if unknown:
        raise DataError(f"{len(unknown)} items, such as {unknown[0]!r}, are not in {data}")
    return Attribute(name, [values[item] for item in ids])


def _recall_within(
    index: Milvus, vectors: Floats, attribute: Attribute, queries: Floats, best: Rows, k: int
) -> float:
    """Compute the recall of searches that are confined to one value: that of each query's ``best``
    row, [B].
    """
    values = np.array(attribute.values, dtype=object)
    hits, wanted = 0.0, 0
    for value in dict.fromkeys(values[best].tolist()):
        asked, rows = queries[values[best] == value], np.flatnonzero(values == value)
        of_value, scores = Exact(vectors[rows]).search(asked, min(k, len(rows)))
        found = index.search(asked, of_value.shape[1], within=[value])[0]
        found = np.where(np.isin(found, rows), found, -1)  # what is outside is no hit
        hits += _recall(vectors, asked, found, (rows[of_value], scores)) * of_value.size
        wanted += of_value.size
    return hits / wanted
