"""Item and user vectors of a finished run as Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from l2rec.data.vectors import PRECISIONS, vectors_table
from l2rec.disk import replacing
from l2rec.errors import ConfigError
from l2rec.protocols import Progress
from l2rec.runs.folder import load_run_config, open_run_dataset, split_of
from l2rec.runs.precision import precision_losses
from l2rec.runs.predictor import Predictor, load
from l2rec.runs.scoring import with_cold_items


@dataclass(frozen=True)
class Embedded:
    """What was written: (path, rows, D) of each file; and what the precision loses, by
    precision, empty for float32 and without users.
    """

    files: list[tuple[Path, int, int]]
    losses: dict[str, dict[str, float]]


def embed_run(
    run: Path,
    out: Path,
    progress: Progress,
    *,
    with_users: bool = True,
    data: Path | None = None,
    precision: str = "float32",
) -> Embedded:
    """Write OUT/items.parquet and OUT/users.parquet: id, vector [D], version.

    Users are encoded from their whole history, the newest event included; users without events
    are left out. ``precision``: of the vectors of both, one of `PRECISIONS`.

    Raises:
        ConfigError: the method has no vectors, or an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    dataset = open_run_dataset(run, data) if with_users else None
    predictor = load(run)
    if dataset is not None and dataset.n_cold:
        predictor = with_cold_items(predictor, dataset)
        if not isinstance(predictor, Predictor):
            raise ConfigError(f"{run} takes no new items, and users of {dataset.path} have some")
    out.mkdir(parents=True, exist_ok=True)
    if predictor.vectors is None:
        raise ConfigError(f"{run}: {type(predictor.model).__name__} has no vectors: it only ranks")
    written = [
        _write_vectors(
            out / "items.parquet", predictor.ids, predictor.vectors, predictor, precision
        )
    ]
    losses: dict[str, dict[str, float]] = {}
    if dataset is not None:
        sequences = dataset.sequences
        users = np.flatnonzero(sequences.lengths > 0)
        blocks = []
        for start in range(0, len(users), 1024):
            rows = users[start : start + 1024]
            blocks.append(predictor.model.encode_users(sequences.take(rows)).cpu())
            progress.validating(min(start + 1024, len(users)), len(users))
        ids = dataset.user_ids.take(pa.array(users)).to_pylist()
        vectors = torch.cat(blocks)
        path = out / "users.parquet"
        written.append(_write_vectors(path, ids, vectors, predictor, precision))
        if precision != "float32":
            split = split_of(load_run_config(run)[0], dataset)
            losses = precision_losses(predictor, split.test, progress)
    return Embedded(written, losses)


def _write_vectors(
    path: Path, ids: Sequence[str], vectors: Tensor, predictor: Predictor, precision: str
) -> tuple[Path, int, int]:
    """Write vectors [n, D] with their ids; return (path, n, D)."""
    flat = vectors.float().cpu().numpy()
    table = vectors_table(ids, flat, predictor.version, precision)
    with replacing(path, remedy="free some space") as partial:
        pq.write_table(table, partial)
    return path, len(ids), flat.shape[1]
