"""The k best items of many users in a Parquet file: `l2rec recommend --out`.

Rows are those of `l2rec.runs.frames`, in the order of the users. They are ranked and written block
by block, so that memory holds one block of users, however many there are.
"""

from __future__ import annotations

__all__ = ["Asked", "of_dataset", "of_parquet", "user_table", "write_lists"]

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from l2rec.data.ragged import Ragged
from l2rec.disk import replacing
from l2rec.errors import DataError
from l2rec.protocols import Progress
from l2rec.runs import shards
from l2rec.runs.folder import open_run_dataset
from l2rec.runs.frames import BLOCK, COLUMNS, table_of
from l2rec.runs.predictor import Predictor

if TYPE_CHECKING:
    import polars as pl

ROWS = 4 * BLOCK
"""Users whose lists are written at once."""
SCHEMA = pa.schema(
    dict(zip(COLUMNS, (pa.string(), pa.string(), pa.float32(), pa.int64()), strict=True))
)


@dataclass(frozen=True)
class Asked:
    """Who gets a list. ``users``: how many at most. ``blocks``: user ids, and what each has had as
    item ints of a predictor, oldest first, none of them empty.
    """

    users: int
    blocks: Callable[[Predictor], Iterator[tuple[list[str], Ragged]]]


def of_dataset(run: Path, data: Path | None = None, users: Path | None = None) -> Asked:
    """Ask for users of the run's data set: of a table (`user_table`), or all who have events.

    Raises:
        DataError: a user of the table who is none of the data set, or has cold items alone.
    """
    dataset = open_run_dataset(run, data)
    if users is None:
        chosen: npt.NDArray[np.integer] = shards.users_with_events(dataset)
    else:
        try:
            chosen = dataset.user_indices(user_table(users)["user_id"].to_list())
        except DataError as error:
            raise DataError(f"--users {users}: {error}") from None

    def blocks(_: Predictor) -> Iterator[tuple[list[str], Ragged]]:  # whose ints are the data set's
        for start in range(0, len(chosen), ROWS):
            some = chosen[start : start + ROWS]
            names = dataset.user_ids.take(pa.array(some)).to_pylist()
            rows = dataset.warm(some)
            warm = np.flatnonzero(rows.lengths)
            if users is not None and len(warm) < len(names):
                cold = names[int(np.flatnonzero(rows.lengths == 0)[0])]
                raise DataError(
                    f"--users {users}: user {cold!r} has no items that {run} knows; leave it out"
                )
            yield [names[row] for row in warm], rows.take(warm)

    return Asked(len(chosen), blocks)


def of_parquet(run: Path, histories: Path) -> Asked:
    """Ask for anybody's histories, of Parquet files as `l2rec embed --histories` reads them.

    Raises:
        DataError: no such file, a column is missing, a user is there twice, something is null.
    """
    source = shards.Source("histories", run, parquet=histories)
    parts = source.shards(ROWS)
    source.check()

    def blocks(predictor: Predictor) -> Iterator[tuple[list[str], Ragged]]:
        for part in parts:
            names, items = part.columns("histories")
            try:
                rows = predictor.rows([row for row in items if row])
            except DataError as error:
                raise DataError(f"{part.place}: {error}") from error
            yield [name for name, row in zip(names, items, strict=True) if row], rows

    return Asked(sum(part.last - part.first for part in parts), blocks)


def write_lists(
    predictor: Predictor,
    asked: Asked,
    out: Path,
    k: int,
    *,
    exclude_seen: bool,
    progress: Progress,
) -> tuple[int, int]:
    """Write the k best items of each user to a Parquet file, whole or not at all; return the
    numbers of users and of rows.

    Raises:
        DataError: unknown item ids, or k outside 1..N. CheckpointError: it cannot be written.
    """
    predictor.check_k(k)
    users = rows = done = 0
    with (
        replacing(out, remedy="free some space") as partial,
        pq.ParquetWriter(partial, SCHEMA) as writer,
    ):
        for names, histories in asked.blocks(predictor):
            table = table_of(predictor, names, histories, k, filter_viewed=exclude_seen)
            writer.write_table(table.cast(SCHEMA))
            users, rows = users + len(names), rows + len(table)
            done = min(done + ROWS, asked.users)
            progress.validating(done, asked.users)
    return users, rows


def user_table(path: Path) -> pl.DataFrame:
    """Read a table of users, CSV or Parquet: columns of text, of which ``user_id`` has no null.

    Raises:
        DataError: it cannot be read, has no column user_id, or a user twice.
    """
    import polars as pl

    try:
        if path.suffix == ".parquet":
            table = pl.read_parquet(path)
        else:
            table = pl.read_csv(path, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"--users {path}: not readable: {str(error).splitlines()[0]}") from error
    if "user_id" not in table.columns:
        raise DataError(
            f"--users {path}: no column user_id (it has: {', '.join(table.columns)}); name the "
            "column of the users' ids so"
        )
    table = table.cast(pl.String, strict=False).drop_nulls("user_id")
    if table["user_id"].n_unique() < len(table):
        raise DataError(f"--users {path}: a user has two rows; give one row each")
    return table
