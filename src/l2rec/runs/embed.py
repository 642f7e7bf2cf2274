"""Item and user vectors of a finished run as Parquet files, or as shards of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from l2rec.data.dataset import Dataset
from l2rec.data.vectors import PRECISIONS, vectors_table
from l2rec.disk import replacing
from l2rec.errors import ConfigError
from l2rec.protocols import Progress
from l2rec.runs import shards
from l2rec.runs.folder import load_run_config, open_run_dataset, split_of
from l2rec.runs.precision import precision_losses
from l2rec.runs.predictor import Predictor


@dataclass(frozen=True)
class Sharding:
    """How shards are made: by which of `shards.ENGINES`, of how many rows, and with Ray, how many
    cores a process takes.
    """

    engine: str = "local"
    rows: int = shards.SHARD_ROWS
    cpus: int = 1

    def __post_init__(self) -> None:
        if self.engine not in shards.ENGINES:
            raise ConfigError(f"--engine {self.engine}: choose one of {', '.join(shards.ENGINES)}")
        for option, value in (("shard-rows", self.rows), ("cpus", self.cpus)):
            if value < 1:
                raise ConfigError(f"--{option} {value}: choose 1 or more")


@dataclass(frozen=True)
class Embedded:
    """What was written: (path, rows, D) of each file or folder of shards; and what the precision
    loses, by precision, empty for float32 and without users of the data set, whose identity is
    ``dataset``.
    """

    files: list[tuple[Path, int, int]]
    losses: dict[str, dict[str, float]]
    dataset: dict[str, Any] | None


def embed_run(
    run: Path,
    out: Path,
    progress: Progress,
    *,
    with_users: bool = True,
    data: Path | None = None,
    precision: str = "float32",
    histories: Path | None = None,
    texts: Path | None = None,
    sharding: Sharding | None = None,
) -> Embedded:
    """Write OUT/items.parquet and OUT/users.parquet: id, vector [D], version.

    Users are encoded from their whole history, the newest event included; users without events
    are left out. ``precision``: of the vectors of both, one of `PRECISIONS`.

    With ``sharding``, users go into a folder of shards, OUT/users, instead of one file. So do those
    of ``histories``, Parquet files, who take the place of the data set's users; and items of
    ``texts``, into OUT/items, who take the place of the run's: `shards.Source` has the columns.

    Raises:
        ConfigError: the method has no vectors, or an unknown precision.
        CheckpointError, DataError: as `shards.write`.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if histories is not None and not with_users:
        raise ConfigError("--histories with --no-users: leave one of them out")
    if sharding is not None and not with_users and texts is None:
        raise ConfigError("shards are for users and --texts; --no-users leaves nothing to cut")
    of_data = with_users and histories is None
    dataset = open_run_dataset(run, data) if of_data or data is not None else None
    predictor = shards.ready(run, dataset)
    how = sharding or Sharding()

    def sharded(kind: str, name: str, parquet: Path | None) -> tuple[Path, int, int]:
        place = None if dataset is None else dataset.path
        source = shards.Source(kind, run, place, parquet)  # type: ignore[arg-type]
        return shards.write(
            source,
            out / name,
            predictor,
            progress,
            precision=precision,
            engine=how.engine,
            rows=how.rows,
            cpus=how.cpus,
        )

    out.mkdir(parents=True, exist_ok=True)
    if texts is not None:
        written = [sharded("texts", "items", texts)]
    else:
        assert predictor.vectors is not None
        path = out / "items.parquet"
        written = [_write_vectors(path, predictor.ids, predictor.vectors, predictor, precision)]
    if histories is not None:
        written.append(sharded("histories", "users", histories))
    elif of_data and sharding is not None:
        written.append(sharded("users", "users", None))
    elif of_data:
        assert dataset is not None
        written.append(_write_users(out / "users.parquet", dataset, predictor, precision, progress))
    losses: dict[str, dict[str, float]] = {}
    if dataset is not None and with_users and precision != "float32":
        split = split_of(load_run_config(run)[0], dataset)
        losses = precision_losses(predictor, split.test, progress)
    return Embedded(written, losses, None if dataset is None else dataset.identity)


def _write_users(
    path: Path, dataset: Dataset, predictor: Predictor, precision: str, progress: Progress
) -> tuple[Path, int, int]:
    """Encode the users of a data set and write one file; return (path, n, D)."""
    users = shards.users_with_events(dataset)
    vectors = shards.encode_users(
        predictor,
        dataset.sequences.take(users),
        lambda done: progress.validating(done, len(users)),
    )
    ids = dataset.user_ids.take(pa.array(users)).to_pylist()
    return _write_vectors(path, ids, vectors, predictor, precision)


def _write_vectors(
    path: Path, ids: Sequence[str], vectors: Tensor, predictor: Predictor, precision: str
) -> tuple[Path, int, int]:
    """Write vectors [n, D] with their ids; return (path, n, D)."""
    flat = vectors.float().cpu().numpy()
    table = vectors_table(ids, flat, predictor.version, precision)
    with replacing(path, remedy="free some space") as partial:
        pq.write_table(table, partial)
    return path, len(ids), flat.shape[1]
