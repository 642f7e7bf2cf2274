"""Building an index of vectors, and `l2rec index`: build, measure, save."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import open_dataset
from l2rec.data.vectors import Floats, off_unit, read_vectors, vectors_hash
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.index.exact import Exact
from l2rec.index.faiss import SMALL, Faiss, import_faiss
from l2rec.index.folder import collection_prefix, may_hold, own_collections, read_manifest, save
from l2rec.index.milvus import NAME, Milvus
from l2rec.index.protocol import KINDS, LINKS, Attribute, Index, Rows

EXACT_ROWS = 100_000
"""Rows that exact search scores in less time than encoding a history takes:
`benchmarks/indexes.py`."""
ASKED, SCORED = 1000, 200_000_000
"""Most queries that recall and speed are measured with, and most inner products for that."""
AT_ONCE = 32
"""Queries of one search when speed is measured: about a batch of the service."""
LEAST = 0.8
"""Recall that a collection must reach before an alias is moved to it."""


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
            import_faiss()
            return "hnsw"
    return "exact"


def recall(index: Index, vectors: Floats, queries: Floats, k: int) -> float:
    """Compute the share of the exact k best rows that the index finds, over all queries.

    Any row that ties with the k-th counts, such as those of items with the same text.
    """
    k = min(k, len(vectors))
    return _recall(vectors, queries, index.search(queries, k)[0], Exact(vectors).search(queries, k))


def _recall(vectors: Floats, queries: Floats, found: Rows, exact: tuple[Rows, Floats]) -> float:
    """Compute the share of what exact search found that other rows found too.

    Raises:
        DataError: no queries.
    """
    if not len(queries):
        raise DataError("no queries; recall needs some")
    hits = 0
    for query, rows, scores in zip(queries, found, exact[1], strict=True):
        some = np.unique(rows[rows >= 0])
        rounding = 1e-5 * max(1.0, float(np.abs(scores).max()))
        hits += int((vectors[some] @ query >= scores[-1] - rounding).sum())
    return hits / exact[0].size


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


def build_folder(
    source: str | Path,
    out: str | Path,
    *,
    kind: str = "auto",
    queries: str | Path | None = None,
    k: int = 10,
    uri: str | None = None,
    alias: str | None = None,
    partition_by: str | None = None,
    data: str | Path | None = None,
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
    out = Path(out)
    may_hold(out)  # before hours of work
    given = read_vectors(Path(source))
    asked = given if queries is None else read_vectors(Path(queries))
    if asked.version != given.version:
        raise DataError(f"{queries} is of model {asked.version}, {source} of {given.version}")
    if not given.ids or not asked.ids:
        raise DataError(f"{queries if given.ids else source} has no rows")
    options: dict[str, Any] = {}
    attribute = None
    if kind == "milvus":
        if partition_by is not None and data is not None:
            attribute = _attribute(Path(data), partition_by, given.ids)
        own_collections(out)
        # For this folder alone, and the same name when a killed build is tried again.
        content = [vectors_hash(given.ids, given.vectors, given.version), "item_id"]
        content += [] if attribute is None else [attribute.name, *attribute.values]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        options = {"uri": uri, "collection": collection_prefix(out) + name}
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
    written = read_manifest(out)["files"].values()
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
