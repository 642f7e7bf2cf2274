"""An index in a Milvus server, or in a file of milvus-lite."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from l2rec.data.vectors import Floats, vectors_hash
from l2rec.errors import CheckpointError, ConfigError, DataError, StorageError
from l2rec.index.protocol import (
    BREADTH,
    CONSTRUCTION,
    LINKS,
    WIDEST,
    Attribute,
    Rows,
    check_range,
    checked_queries,
    no_results,
)

MILVUS_MOST = 16_384
"""Most rows that Milvus returns for a query."""
MILVUS_SECONDS = 10.0
MILVUS_BYTES = 65_535
"""Longest string that Milvus takes."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
"""Names of fields and aliases that Milvus takes."""

T = TypeVar("T")


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
        check_range("ef", ef, WIDEST)
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
        asked = checked_queries(queries, self.dim, k)
        rows, scores = no_results(len(asked), k)
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
