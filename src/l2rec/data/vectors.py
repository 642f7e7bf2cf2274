"""Item and user vectors as Parquet: id, vector, version of the model they come from."""

from __future__ import annotations

__all__ = ["Vectors", "read_vectors", "vectors_table"]

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from l2rec.errors import CheckpointError

UNIT_WITHIN = 0.01
"""Largest deviation of a unit vector's length from 1."""

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


def vectors_table(ids: Sequence[str], vectors: Floats, version: str) -> pa.Table:
    """Build the table that `l2rec embed` writes: id, vector [D] float32, version.

    Its metadata has the number of rows, D, and a hash of ids, vectors and version together.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    rows, dim = vectors.shape
    assert len(ids) == rows
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim),
            "version": pa.array([version] * rows, pa.string()),
        },
        metadata={
            "l2rec.version": version,
            "l2rec.rows": str(rows),
            "l2rec.dim": str(dim),
            "l2rec.sha256": vectors_hash(ids, vectors, version),
        },
    )


def vectors_hash(ids: Sequence[str], vectors: Floats, version: str) -> str:
    digest = hashlib.sha256(json.dumps([version, list(vectors.shape), list(ids)]).encode())
    digest.update(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
    return digest.hexdigest()


def read_vectors(path: Path) -> Vectors:
    """Read vectors that `l2rec embed` wrote, and check that they are complete and unchanged.

    Raises:
        CheckpointError: another file, rows missing or edited, several versions, an id twice,
            numbers that are not finite, or some vectors of unit length and others not.
    """
    try:
        table = pq.ParquetFile(path).read()
        stored = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        version, digest = stored["l2rec.version"], stored["l2rec.sha256"]
        rows, dim = int(stored["l2rec.rows"]), int(stored["l2rec.dim"])
        ids, versions = table["id"].to_pylist(), set(table["version"].to_pylist())
        # A copy, since arrays of Arrow are read-only and torch warns about those.
        flat = np.array(table["vector"].combine_chunks().flatten(), dtype=np.float32)
    except (OSError, KeyError, ValueError, AttributeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} holds no vectors of `l2rec embed`: {reason}") from error
    if len(ids) != rows or flat.size != rows * dim:
        raise CheckpointError(
            f"{path}: {len(ids)} rows and {flat.size} numbers, {rows} of {dim} were written; "
            "embed the run again"
        )
    vectors = flat.reshape(rows, dim)
    if versions - {version}:
        raise CheckpointError(f"{path}: vectors of several versions; embed the run again")
    if digest != vectors_hash(ids, vectors, version):
        raise CheckpointError(f"{path} was changed after it was written; embed the run again")
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
    return Vectors(ids, vectors, version)
