"""Item vectors -> the k best by inner product: exact, FAISS, Milvus; one small protocol.

    exact    blocked matmul and top-k, nothing to build; every other kind is measured against it
    flat     FAISS, exact as well, faster on many rows
    hnsw     FAISS graph
    ivf      FAISS inverted lists
    milvus   a Milvus server by URI (token from L2REC_MILVUS_TOKEN), or a file with milvus-lite

Rows are numbered as in the vectors an index was built from. On disk an index is a folder with a
manifest: rows, size, kind, the version of the vectors, and the hash of every file.
"""

from __future__ import annotations

__all__ = [
    "KINDS",
    "Index",
    "Vectors",
    "build",
    "build_folder",
    "load",
    "read_vectors",
    "recall",
    "save",
    "vectors_digest",
]

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from l2rec.errors import CheckpointError, ConfigError, DataError, L2RecError

KINDS = ("exact", "flat", "hnsw", "ivf", "milvus")
FORMAT = 1
EXACT_ROWS, FLAT_ROWS = 20_000, 500_000
"""``auto``: exact up to the first, FAISS flat up to the second, HNSW beyond; and exact wherever
FAISS is not installed. To measure anew: ``l2rec index VECTORS --kind ... --queries USERS``."""
BLOCK_SCORES = 1 << 22
MANIFEST = "index.json"
ASKED = 1000
"""Queries that recall and speed are measured with."""
LINKS, CONSTRUCTION = 32, 200
"""Of an HNSW graph."""

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Index(Protocol):
    """N rows that can be searched."""

    kind: str

    def __len__(self) -> int: ...

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        """[B, D] float32 -> rows [B, k] int64, best first, and their inner products [B, k].

        Where fewer than k are found: row -1 with score -inf.
        """
        ...


def build(vectors: Floats, kind: str = "auto", **options: Any) -> Index:
    """An index of vectors [N, D] float32.

    options: ``uri`` and ``collection`` of Milvus; ``lists`` and ``probes`` of ivf; ``ef`` of hnsw.

    Raises:
        ConfigError: an unknown kind or option, a library that is missing.
        DataError: no rows, or numbers that are not finite.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or not len(vectors):
        raise DataError(f"vectors of shape {list(vectors.shape)}; an index needs rows [N, D]")
    if not np.isfinite(vectors).all():
        raise DataError(
            "vectors hold numbers that are not finite; the run is torn or badly trained"
        )
    if kind == "auto":
        kind = _fitting(len(vectors))
    allowed = {"ivf": {"lists", "probes"}, "hnsw": {"ef"}, "milvus": {"uri", "collection"}}
    odd = options.keys() - allowed.get(kind, set())
    if odd:
        raise ConfigError(f"index kind {kind!r} has no option {min(odd)!r}")
    if kind == "exact":
        return Exact(vectors)
    if kind in ("flat", "hnsw", "ivf"):
        return Faiss.build(vectors, kind, **options)
    if kind == "milvus":
        return Milvus.build(vectors, **options)
    raise ConfigError(f"index kind {kind!r}: choose auto or one of {', '.join(KINDS)}")


def _fitting(rows: int) -> str:
    if rows <= EXACT_ROWS:
        return "exact"
    with contextlib.suppress(ConfigError):
        _faiss()
        return "flat" if rows <= FLAT_ROWS else "hnsw"
    return "exact"


def recall(index: Index, vectors: Floats, queries: Floats, k: int) -> float:
    """Share of the exact k best rows that the index finds, over all queries."""
    k = min(k, len(vectors))
    found, _ = index.search(queries, k)
    best, _ = Exact(vectors).search(queries, k)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, best, strict=True))
    return hits / best.size


# -- kinds ---------------------------------------------------------------------------------------


class Exact:
    """All inner products, some queries at a time; equal scores in order of row."""

    kind = "exact"

    def __init__(self, vectors: Floats) -> None:
        import torch

        self.vectors = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        import torch

        wanted = min(k, len(self))
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        block = max(1, BLOCK_SCORES // len(self))
        asked = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        for start in range(0, len(queries), block):
            part = asked[start : start + block] @ self.vectors.T
            top = part.topk(wanted, dim=1)
            best, at = top.values.numpy(), top.indices.numpy()
            order = np.lexsort((at, -best))  # along the last axis: by score, then by row
            end = start + len(best)
            rows[start:end, :wanted] = np.take_along_axis(at, order, 1)
            scores[start:end, :wanted] = np.take_along_axis(best, order, 1)
        return rows, scores


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("this index needs FAISS: pip install 'l2rec[faiss]'") from None
    return faiss


class Faiss:
    """flat, hnsw or ivf."""

    def __init__(self, kind: str, index: Any) -> None:
        self.kind, self.index = kind, index

    @classmethod
    def build(
        cls,
        vectors: Floats,
        kind: str,
        lists: int | None = None,
        probes: int | None = None,
        ef: int = 128,
    ) -> Faiss:
        """lists: of ivf, by default 4 sqrt(N). probes: lists searched. ef: breadth of a search."""
        faiss = _faiss()
        rows, dim = vectors.shape
        if kind == "flat":
            index = faiss.IndexFlatIP(dim)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = CONSTRUCTION, ef
        else:
            lists = lists or max(1, min(rows // 39, round(4 * rows**0.5)))
            index = faiss.IndexIVFFlat(
                faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT
            )
            index.cp.seed = 0
            index.train(vectors)
            index.nprobe = probes or min(lists, max(8, lists // 8))
        index.add(vectors)
        return cls(kind, index)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        asked = np.ascontiguousarray(queries, dtype=np.float32)
        if not len(asked):
            return np.zeros((0, k), dtype=np.int64), np.zeros((0, k), dtype=np.float32)
        scores, rows = self.index.search(asked, min(k, len(self)))
        scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
        short = ((0, 0), (0, k - rows.shape[1]))
        return (
            np.pad(rows.astype(np.int64), short, constant_values=-1),
            np.pad(scores, short, constant_values=-np.inf),
        )


class Milvus:
    """A collection of a Milvus server, or of a file (milvus-lite)."""

    kind = "milvus"

    def __init__(self, uri: str, collection: str, rows: int) -> None:
        self.uri, self.collection, self.rows = uri, collection, rows
        try:
            from pymilvus import MilvusClient
        except ImportError:
            raise ConfigError("this index needs pymilvus: pip install 'l2rec[milvus]'") from None
        token = os.environ.get("L2REC_MILVUS_TOKEN", "")
        try:
            self.client = MilvusClient(uri=uri, token=token)
        except Exception as error:  # a hierarchy of pymilvus, gRPC and the file system
            reason = " ".join(str(error).split())[:200].replace(token or "\0", "***")
            raise CheckpointError(f"Milvus at {uri} cannot be opened: {reason}") from error

    @classmethod
    def build(
        cls, vectors: Floats, uri: str | None = None, collection: str = "l2rec_items"
    ) -> Milvus:
        """Fills the collection anew."""
        if uri is None:
            raise ConfigError("kind=milvus needs a uri: a server's, or a file ending in .db")
        made = cls(uri, collection, len(vectors))
        if made.client.has_collection(collection):
            made.client.drop_collection(collection)
        made.client.create_collection(
            collection, dimension=vectors.shape[1], metric_type="IP", consistency_level="Strong"
        )
        for start in range(0, len(vectors), 1000):
            part = vectors[start : start + 1000].tolist()
            made.client.insert(
                collection, [{"id": start + n, "vector": vector} for n, vector in enumerate(part)]
            )
        made.client.flush(collection)
        return made

    def __len__(self) -> int:
        return self.rows

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for start in range(0, len(queries), 100):
            part = queries[start : start + 100].tolist()
            answers = self.client.search(self.collection, part, limit=min(k, self.rows))
            for at, hits in enumerate(answers, start):
                rows[at, : len(hits)] = [hit["id"] for hit in hits]
                scores[at, : len(hits)] = [hit["distance"] for hit in hits]
        return rows, scores


# -- on disk -------------------------------------------------------------------------------------


def save(index: Index, folder: Path, *, ids: Sequence[str], version: str) -> None:
    """Write an index with the ids of its rows, whole or not at all: beside the folder, then
    exchanged with it. A folder that was an index before stays one at any moment but that of the
    exchange, when it is `folder` with ``.old`` behind its name.

    Raises:
        CheckpointError: ``folder`` is something else, or cannot be written.
    """
    if len(ids) != len(index):
        raise DataError(f"{len(ids)} ids for an index of {len(index)} rows")
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is not an index; choose another folder")
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), partial / "ids.parquet")
        options = _write(index, partial)
        files = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
        manifest = {
            "format": FORMAT,
            "kind": index.kind,
            "rows": len(index),
            "version": version,
            "options": options,
            "files": files,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _to_disk(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def _write(index: Index, folder: Path) -> dict[str, Any]:
    if isinstance(index, Exact):
        np.save(folder / "vectors.npy", index.vectors.numpy(), allow_pickle=False)
        return {}
    if isinstance(index, Faiss):
        _faiss().write_index(index.index, str(folder / "index.faiss"))
        return {}
    assert isinstance(index, Milvus)
    return {"uri": index.uri, "collection": index.collection}


def load(folder: Path) -> tuple[Index, list[str], str]:
    """(index, ids of its rows, version of its vectors) of what `save` wrote.

    Raises:
        CheckpointError: no index, torn, edited, or of another format.
    """
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and (old / MANIFEST).is_file():
        folder = old  # a kill between the two renames
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder}: index of format {manifest.get('format')}, this l2rec reads {FORMAT}; "
                "build it again"
            )
        for name, digest in dict(manifest["files"]).items():
            if Path(name).name != name or _sha256(folder / name) != digest:
                raise CheckpointError(f"{folder}/{name} is torn or was edited; build it again")
        ids = pq.ParquetFile(folder / "ids.parquet").read()["id"].to_pylist()
        index = _read(folder, manifest)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no index: {Path(error.filename).name} is missing"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException) as error:
        if isinstance(error, L2RecError):
            raise
        raise CheckpointError(
            f"{folder}: torn or edited: {' '.join(str(error).split())}"
        ) from error
    if len(index) != manifest["rows"] or len(ids) != len(index):
        raise CheckpointError(f"{folder}: {len(index)} rows and {len(ids)} ids; build it again")
    return index, ids, manifest["version"]


def _read(folder: Path, manifest: dict[str, Any]) -> Index:
    kind = manifest["kind"]
    if kind == "exact":
        return Exact(np.load(folder / "vectors.npy", allow_pickle=False))
    if kind in ("flat", "hnsw", "ivf"):
        return Faiss(kind, _faiss().read_index(str(folder / "index.faiss")))
    if kind == "milvus":
        return Milvus(rows=manifest["rows"], **manifest["options"])
    raise CheckpointError(f"{folder}: index kind {kind!r} is not known here")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- what `l2rec embed` writes ---------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """ids: [N]. vectors: [N, D] float32. version: of the model they come from."""

    ids: list[str]
    vectors: Floats
    version: str


def vectors_digest(ids: Sequence[str], vectors: Floats) -> str:
    """A hash of ids and vectors together, stored beside them by `l2rec embed`."""
    digest = hashlib.sha256("\0".join(ids).encode())
    digest.update(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
    return digest.hexdigest()


def read_vectors(path: Path) -> Vectors:
    """What `l2rec embed` wrote, after a check that it is all of it and nothing else.

    Raises:
        CheckpointError: another file, rows missing, edited, several versions, or no numbers.
    """
    try:
        table = pq.ParquetFile(path).read()
        stored = table.schema.metadata or {}
        ids = table["id"].to_pylist()
        column = table["vector"].combine_chunks()
        # A copy: what Arrow hands out cannot be written to, and torch insists on it.
        vectors = np.array(column.flatten(), dtype=np.float32).reshape(len(ids), -1)
        versions = set(table["version"].to_pylist())
        digest, version = stored[b"l2rec.digest"].decode(), stored[b"l2rec.version"].decode()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds no vectors of `l2rec embed`: {reason}") from error
    if versions != {version}:
        raise CheckpointError(f"{path}: vectors of {len(versions)} versions; embed the run again")
    if digest != vectors_digest(ids, vectors):
        raise CheckpointError(f"{path} was changed after it was written; embed the run again")
    if not np.isfinite(vectors).all():
        raise CheckpointError(f"{path}: numbers that are not finite; embed the run again")
    return Vectors(ids, vectors, version)


def build_folder(
    source: Path,
    out: Path,
    *,
    kind: str = "auto",
    queries: Path | None = None,
    k: int = 10,
    uri: str | None = None,
) -> dict[str, Any]:
    """`l2rec index`: read vectors, build, measure, save. Returns what is printed.

    Raises:
        CheckpointError: vectors that are not whole, or a folder that is no index.
        ConfigError: an unknown kind, k below 1. DataError: queries of another model.
    """
    if k < 1:
        raise ConfigError(f"k={k}; choose 1 or more")
    given = read_vectors(source)
    asked = given if queries is None else read_vectors(queries)
    if asked.version != given.version:
        raise DataError(f"{queries} is of model {asked.version}, {source} of {given.version}")
    started = time.monotonic()
    index = build(given.vectors, kind, **({} if uri is None else {"uri": uri}))
    built = time.monotonic() - started
    some = np.unique(np.linspace(0, len(asked.ids) - 1, ASKED).astype(np.int64))
    started = time.monotonic()
    index.search(asked.vectors[some], min(k, len(index)))
    searched = time.monotonic() - started
    found = recall(index, given.vectors, asked.vectors[some], k)
    save(index, out, ids=given.ids, version=given.version)
    return {
        "kind": index.kind,
        "rows": len(index),
        "dim": given.vectors.shape[1],
        "version": given.version,
        f"recall@{k} of exact": round(found, 4),
        "queries": len(some),
        "queries per second": round(len(some) / max(searched, 1e-9), 1),
        "build seconds": round(built, 2),
        "megabytes": round(sum(p.stat().st_size for p in out.iterdir()) / 1e6, 1),
    }
