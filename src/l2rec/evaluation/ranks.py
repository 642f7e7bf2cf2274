"""Per-user ranks on disk, and the ranks of two runs in one order of users."""

from __future__ import annotations

__all__ = [
    "LEAVE_ONE_OUT",
    "Ranks",
    "aligned",
    "aligned_ranks",
    "protocol_of",
    "read_ranks",
    "write_ranks",
]

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from l2rec.disk import replacing
from l2rec.errors import CheckpointError, DataError
from l2rec.evaluation.ranking import Evaluation, target_rows, targets_taken
from l2rec.metrics import rank_values


def protocol_of(split: str) -> str:
    """Return the name of the protocol that is stored with ranks. ``split``: in words."""
    return f"{split}, full ranking, expected rank on ties"


LEAVE_ONE_OUT = protocol_of("leave-one-out")
"""Default name of the protocol."""


@dataclass(frozen=True)
class Ranks:
    """Content of ``ranks.parquet``: one row per evaluated history.

    ``users``: [M] external ids. ``ranks``, ``ranks_masked``: [T] float64. ``targets``: [T] int64.
    ``top``: [M, min(20, N)] int32 best items, history not masked, -1 = no item; None in a file
    of a version that did not store them. ``offsets``: [M + 1], as `Evaluation` has them.
    ``warm``: items from this one on were held out of training; None: none were.
    """

    users: list[str]
    ranks: npt.NDArray[np.float64]
    ranks_masked: npt.NDArray[np.float64]
    targets: npt.NDArray[np.int64]
    fingerprint: str
    protocol: str
    top: npt.NDArray[np.int32] | None = None
    offsets: npt.NDArray[np.int64] | None = None
    warm: int | None = None

    def values(self, metric: str, *, masked: bool = False) -> npt.NDArray[np.float64]:
        """Compute what each row adds to the mean of a metric: [M] float64, as `rank_values`."""
        return rank_values(self.ranks_masked if masked else self.ranks, metric, self.offsets)

    def targets_of(self) -> list[tuple[int, ...]]:
        """Return the targets of each row."""
        targets = self.targets.tolist()
        if self.offsets is None:
            return [(target,) for target in targets]
        return [tuple(targets[a:b]) for a, b in pairwise(self.offsets.tolist())]

    def take(self, rows: npt.NDArray[np.int64]) -> Ranks:
        """Select rows, in the given order."""
        return self._selected(rows, *target_rows(rows, self.offsets))

    def of_targets(self, which: npt.NDArray[np.bool_]) -> Ranks:
        """Select targets ([T] bool): what is left of the rows that have one of them."""
        rows, offsets = targets_taken(which, self.offsets)
        return self._selected(rows, np.flatnonzero(which), offsets)

    def _selected(
        self,
        rows: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64] | None,
    ) -> Ranks:
        return replace(
            self,
            users=[self.users[row] for row in rows.tolist()],
            ranks=self.ranks[targets],
            ranks_masked=self.ranks_masked[targets],
            targets=self.targets[targets],
            top=None if self.top is None else self.top[rows],
            offsets=offsets,
        )


def write_ranks(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    user_ids: Sequence[str],
    *,
    fingerprint: str = "",
    protocol: str = LEAVE_ONE_OUT,
    warm: int | None = None,
) -> None:
    """Write per-user ranks and best items as Parquet, whole or not at all.

    ``user_ids[u]`` is the external id of dense user u, so row i is ``user_ids[users[i]]``. Where
    histories have sets of targets, a cell holds a list.
    ``fingerprint`` and ``protocol`` say which data set was ranked how; ``warm``: `Ranks.warm`.

    Raises:
        DataError: a user has no id. CheckpointError: the file cannot be written.
    """
    users = evaluation.users
    if len(users) and (int(users.min()) < 0 or int(users.max()) >= len(user_ids)):
        raise DataError(
            f"user int {int(users.max())} for {len(user_ids)} user ids; pass the ids of all users"
        )
    table = pa.table(
        {
            "user": pa.array([str(user_ids[user]) for user in users.tolist()], pa.string()),
            "rank": _cells(evaluation.ranks, evaluation.offsets),
            "rank_masked": _cells(evaluation.ranks_masked, evaluation.offsets),
            "target": _cells(evaluation.targets, evaluation.offsets),
            "top": pa.FixedSizeListArray.from_arrays(
                pa.array(evaluation.top.reshape(-1)), evaluation.top.shape[1]
            ),
        }
    )
    facts = {"l2rec.fingerprint": fingerprint, "l2rec.protocol": protocol}
    if warm is not None:
        facts["l2rec.warm"] = str(warm)
    table = table.replace_schema_metadata(facts)
    with replacing(Path(path)) as partial:
        pq.write_table(table, partial)


def read_ranks(
    path: str | os.PathLike[str],
    everyone: Callable[[], tuple[list[str], npt.NDArray[np.int64]]] | None = None,
) -> Ranks:
    """Read ranks that `write_ranks` wrote.

    Args:
        everyone: returns ids [M] and targets [M] of all evaluated users in the data set's order;
            needed for a file that stores ranks alone, in that order.

    Raises:
        CheckpointError: a missing, torn or other file, or one of ranks alone without ``everyone``.
    """
    try:
        table = pq.ParquetFile(path).read()
        stored = table.schema.metadata or {}
        if "user" not in table.column_names and "rank" in table.column_names:
            users, targets = ([], np.empty(0, np.int64)) if everyone is None else everyone()
            if len(users) != len(table):
                raise CheckpointError(
                    f"{os.fspath(path)} keeps ranks alone, not whose; name their data set (--data)"
                )
        else:
            users, targets = table["user"].to_pylist(), _flat(table["target"])
        return Ranks(
            users=users,
            ranks=_flat(table["rank"]).astype(np.float64),
            ranks_masked=_flat(table["rank_masked"]).astype(np.float64),
            targets=targets,
            fingerprint=stored[b"l2rec.fingerprint"].decode(),
            protocol=stored[b"l2rec.protocol"].decode(),
            top=_lists(table["top"]) if "top" in table.column_names else None,
            offsets=_offsets(table["rank"]),
            warm=int(stored[b"l2rec.warm"]) if b"l2rec.warm" in stored else None,
        )
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{os.fspath(path)} holds no ranks ({reason}); evaluate the run again"
        ) from error


def _cells(values: npt.NDArray[Any], offsets: npt.NDArray[np.int64] | None) -> pa.Array:
    cells = pa.array(values)
    if offsets is None:
        return cells
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), cells)


def _flat(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    array = column.combine_chunks()
    return np.asarray(array.flatten() if pa.types.is_list(array.type) else array)


def _offsets(column: pa.ChunkedArray) -> npt.NDArray[np.int64] | None:
    if not pa.types.is_list(column.type):
        return None
    sizes = pc.list_value_length(column).to_numpy()
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def _lists(column: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Convert a column of lists of one length to [M, k] int32."""
    flat = np.asarray(column.combine_chunks().flatten(), dtype=np.int32)
    return flat.reshape(len(column), column.type.list_size)


def aligned(a: Ranks, b: Ranks) -> Ranks:
    """Sort the rows of ``b`` in the order of ``a``.

    Raises:
        DataError: they did not rank the same (user, target) pairs of the same data by the same
            protocol.
    """
    for what in ("fingerprint", "protocol"):
        if getattr(a, what) != getattr(b, what):
            raise DataError(
                f"{what} {getattr(a, what)!r} against {getattr(b, what)!r}:"
                " only runs on the same data and protocol can be paired"
            )
    pairs = list(zip(a.users, a.targets_of(), strict=True))
    if pairs == (theirs := list(zip(b.users, b.targets_of(), strict=True))):
        return b
    place = {pair: row for row, pair in enumerate(theirs)}
    if len(place) != len(b.users) or len(set(pairs)) != len(pairs):
        raise DataError("a user is ranked twice for one target; ranks cannot be paired")
    if place.keys() != set(pairs):
        raise DataError(
            f"{len(pairs)} and {len(place)} ranked users, {len(place.keys() & set(pairs))} in"
            " common; only evaluations of the same users can be paired"
        )
    return b.take(np.array([place[pair] for pair in pairs], dtype=np.int64))


def aligned_ranks(
    a: Ranks, b: Ranks, *, masked: bool = False
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the ranks of two runs in one order of users: two [M] float64, for `paired_test`.

    Raises:
        DataError: as `aligned`.
    """
    b = aligned(a, b)
    return (a.ranks_masked, b.ranks_masked) if masked else (a.ranks, b.ranks)
