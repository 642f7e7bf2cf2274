"""Item and user vectors of a finished run as Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from l2rec.data.vectors import vectors_table
from l2rec.disk import replacing
from l2rec.errors import ConfigError
from l2rec.protocols import Progress
from l2rec.runs.folder import open_run_dataset
from l2rec.runs.predictor import Predictor, load
from l2rec.runs.scoring import with_cold_items


def embed_run(
    run: Path, out: Path, progress: Progress, *, with_users: bool = True, data: Path | None = None
) -> list[tuple[Path, int, int]]:
    """Write OUT/items.parquet and OUT/users.parquet: id, vector [D] float32, version.

    Users are encoded from their whole history, the newest event included; users without events
    are left out.

    Returns:
        (path, rows, D) of each file.

    Raises:
        ConfigError: the method has no vectors.
    """
    dataset = open_run_dataset(run, data) if with_users else None
    predictor = load(run)
    if dataset is not None and dataset.n_cold:
        predictor = with_cold_items(predictor, dataset)
        if not isinstance(predictor, Predictor):
            raise ConfigError(f"{run} takes no new items, and users of {dataset.path} have some")
    out.mkdir(parents=True, exist_ok=True)
    if predictor.vectors is None:
        raise ConfigError(f"{run}: {type(predictor.model).__name__} has no vectors: it only ranks")
    written = [_write_vectors(out / "items.parquet", predictor.ids, predictor.vectors, predictor)]
    if dataset is not None:
        sequences = dataset.sequences
        users = np.flatnonzero(sequences.lengths > 0)
        blocks = []
        for start in range(0, len(users), 1024):
            rows = users[start : start + 1024]
            blocks.append(predictor.model.encode_users(sequences.take(rows)).cpu())
            progress.validating(min(start + 1024, len(users)), len(users))
        ids = dataset.user_ids.take(pa.array(users)).to_pylist()
        written.append(_write_vectors(out / "users.parquet", ids, torch.cat(blocks), predictor))
    return written


def _write_vectors(
    path: Path, ids: Sequence[str], vectors: Tensor, predictor: Predictor
) -> tuple[Path, int, int]:
    """Write vectors [n, D] with their ids; return (path, n, D)."""
    flat = vectors.float().cpu().numpy()
    table = vectors_table(ids, flat, predictor.version)
    with replacing(path, remedy="free some space") as partial:
        pq.write_table(table, partial)
    return path, len(ids), flat.shape[1]
