"""Item and user vectors as Parquet: id, vector, version of the model they come from.

    float32   as they are
    int8      v = s q, one scale s for all: inner products of q rank as those of v, up to rounding
    binary    signs, eight to a byte, the first the highest bit: for Hamming distances

Databases take all three as they stand in the file; `read_vectors` gives float32 again. More vectors
than one file should hold are a folder of shards, each such a file, and a manifest that names them.
"""

from __future__ import annotations

__all__ = [
    "MANIFEST",
    "PRECISIONS",
    "Vectors",
    "bytes_of",
    "read_file",
    "read_vectors",
    "rounded",
    "scale_of",
    "vectors_table",
]

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from l2rec.disk import read_json
from l2rec.errors import CheckpointError

UNIT_WITHIN = 0.01
"""Largest deviation of a unit vector's length from 1."""

PRECISIONS = ("float32", "int8", "binary")
INT8_MOST = 127

MANIFEST = "vectors.json"
"""Name of the file that says which shards a folder of vectors has, and whether that is all."""

Floats = npt.NDArray[np.float32]


def off_unit(vectors: Floats) -> npt.NDArray[np.bool_]:
    """Mark the rows that are not of unit length: [N]."""
    squares = np.einsum("nd,nd->n", vectors, vectors)
    off: npt.NDArray[np.bool_] = np.abs(np.sqrt(squares) - 1) > UNIT_WITHIN
    return off


@dataclass(frozen=True)
class Vectors:
    """Vectors of N items or users. ``ids``: [N]. ``vectors``: [N, D] float32. ``version``: that of
    the model they come from.
    """

    ids: list[str]
    vectors: Floats
    version: str


def bytes_of(dim: int, precision: str) -> int:
    """Return the bytes of a vector of ``dim`` numbers."""
    return {"float32": 4 * dim, "int8": dim, "binary": -(-dim // 8)}[precision]


def rounded(vectors: Floats, precision: str) -> Floats:
    """Return what a precision leaves of vectors [N, D], as float32; of binary the signs, at unit
    length.
    """
    stored, scale = _stored(vectors, precision, None)
    return _restored(stored, precision, scale, vectors.shape[1])


def scale_of(vectors: Floats) -> float:
    """Return the scale of vectors [N, D] in int8: that of their largest number."""
    return float(np.abs(vectors).max(initial=0.0)) / INT8_MOST or 1.0


def _stored(
    vectors: Floats, precision: str, scale: float | None
) -> tuple[npt.NDArray[np.generic], float]:
    """Return the rows that are written, [N, bytes or numbers of a row], and their scale."""
    if precision == "int8":
        scale = scale_of(vectors) if scale is None else scale
        return np.rint(vectors / np.float32(scale)).clip(-127, 127).astype(np.int8), scale
    if precision == "binary":
        return np.packbits(vectors > 0, axis=1), 1.0
    assert precision == "float32", precision
    return np.ascontiguousarray(vectors, dtype=np.float32), 1.0


def _restored(stored: npt.NDArray[np.generic], precision: str, scale: float, dim: int) -> Floats:
    """Return stored rows as float32 [N, D]."""
    if precision == "binary":
        bits = np.unpackbits(stored.astype(np.uint8), axis=1, count=dim)
        return (2 * bits.astype(np.float32) - 1) / np.float32(dim**0.5)
    found: Floats = stored.astype(np.float32)
    return found * np.float32(scale) if precision == "int8" else found


def vectors_table(
    ids: Sequence[str],
    vectors: Floats,
    version: str,
    precision: str = "float32",
    scale: float | None = None,
) -> pa.Table:
    """Build the table that `l2rec embed` writes: id, vector, version.

    scale: of int8, where other vectors have it already; numbers beyond it are cut to it.

    A vector is [D] float32 or int8, or of binary [bytes] uint8. Its metadata has the number of
    rows, D, the precision with its scale, and a hash of ids, vectors (as `read_vectors` returns
    them) and version together.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    rows, dim = vectors.shape
    assert len(ids) == rows
    stored, scale = _stored(vectors, precision, scale)
    metadata = {
        "l2rec.version": version,
        "l2rec.rows": str(rows),
        "l2rec.dim": str(dim),
        "l2rec.sha256": vectors_hash(ids, _restored(stored, precision, scale, dim), version),
    }
    if precision != "float32":
        metadata |= {"l2rec.precision": precision, "l2rec.scale": repr(scale)}
    flat, width = pa.array(stored.reshape(-1)), stored.shape[1]
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(flat, width),
            "version": pa.array([version] * rows, pa.string()),
        },
        metadata=metadata,
    )


def _width(dim: int, precision: str) -> int:
    """Return how many numbers a stored row of D has. Raises ValueError for another precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"vectors of precision {precision!r}")
    return bytes_of(dim, precision) if precision == "binary" else dim


def vectors_hash(ids: Sequence[str], vectors: Floats, version: str) -> str:
    digest = hashlib.sha256(json.dumps([version, list(vectors.shape), list(ids)]).encode())
    digest.update(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
    return digest.hexdigest()


def read_vectors(path: Path) -> Vectors:
    """Read vectors that `l2rec embed` wrote, a file or a folder of shards, of any precision, and
    check that they are complete and unchanged.

    Raises:
        CheckpointError: another file, rows missing or edited, several versions, an id twice,
            numbers that are not finite, or some vectors of unit length and others not.
    """
    found = _read_shards(path) if path.is_dir() else read_file(path)[0]
    ids, vectors, rows = found.ids, found.vectors, len(found.ids)
    if len(set(ids)) != rows:
        raise CheckpointError(f"{path}: an id twice; embed the run again")
    if not np.isfinite(vectors).all():
        raise CheckpointError(f"{path}: numbers that are not finite; the run is badly trained")
    off = np.flatnonzero(off_unit(vectors))
    if 0 < len(off) < rows / 2:  # some methods have vectors of any length, but then most are off
        length = float(np.linalg.norm(vectors[off[0]]))
        raise CheckpointError(
            f"{path}: {len(off)} of {rows} vectors are not of unit length, such as that of "
            f"{ids[off[0]]!r} ({length:.3g}); the run is torn or badly trained"
        )
    return found


def _read_shards(folder: Path) -> Vectors:
    """Read the shards of a folder in their order. Raises as `read_vectors`."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} holds no vectors of `l2rec embed`: no {MANIFEST} in it")
    manifest = read_json(folder / MANIFEST)
    if not manifest.get("complete"):
        raise CheckpointError(f"{folder} is not complete; give the same `l2rec embed` again")
    parts = []
    for shard in manifest["shards"]:
        if Path(shard["name"]).name != shard["name"]:
            raise CheckpointError(f"{folder / MANIFEST} names a file that is not in the folder")
        part, digest = read_file(folder / shard["name"])
        if digest != shard["sha256"] or part.version != manifest["version"]:
            raise CheckpointError(
                f"{folder / shard['name']} is not the shard that {MANIFEST} names; embed the run "
                "again"
            )
        parts.append(part)
    ids = [name for part in parts for name in part.ids]
    return Vectors(ids, np.concatenate([part.vectors for part in parts]), manifest["version"])


def read_file(path: Path) -> tuple[Vectors, str]:
    """Read the vectors of one file, and their hash.

    Raises:
        CheckpointError: another file, rows missing or edited, several versions.
    """
    try:
        table = pq.ParquetFile(path).read()
        stored = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        version, digest = stored["l2rec.version"], stored["l2rec.sha256"]
        rows, dim = int(stored["l2rec.rows"]), int(stored["l2rec.dim"])
        ids, versions = table["id"].to_pylist(), set(table["version"].to_pylist())
        precision = stored.get("l2rec.precision", "float32")
        scale, width = float(stored.get("l2rec.scale", 1.0)), _width(dim, precision)
        # A copy, since arrays of Arrow are read-only and torch warns about those.
        flat = np.array(table["vector"].combine_chunks().flatten())
    except (OSError, KeyError, ValueError, AttributeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} holds no vectors of `l2rec embed`: {reason}") from error
    if len(ids) != rows or flat.size != rows * width:
        raise CheckpointError(
            f"{path}: {len(ids)} rows and {flat.size} numbers, {rows} of {width} were written; "
            "embed the run again"
        )
    vectors = _restored(flat.reshape(rows, width), precision, scale, dim)
    if versions - {version}:
        raise CheckpointError(f"{path}: vectors of several versions; embed the run again")
    if digest != vectors_hash(ids, vectors, version):
        raise CheckpointError(f"{path} was changed after it was written; embed the run again")
    return Vectors(ids, vectors, version), digest
