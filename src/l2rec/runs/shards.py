"""Vectors in shards: files of so many rows, that one process encodes or, with Ray Data, many.

    OUT/users/shard-00000.parquet ...    rows in the order in which they came, as `vectors_table`
    OUT/users/vectors.json               the manifest: what is encoded, by which version, shards

A shard is written whole or not at all, so that a command that was killed goes on where it stopped:
it computes the shards that are missing. They are the same whoever encodes them; the manifest says
``complete`` when all are there. Everything lies on a disk that all machines see.
"""

from __future__ import annotations

__all__ = ["ENGINES", "SHARD_ROWS", "Source", "encode_users", "ready", "users_with_events", "write"]

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.vectors import MANIFEST, read_file, scale_of, vectors_table
from l2rec.disk import digest_of, read_json, replacing, working_on, write_json
from l2rec.errors import CheckpointError, ConfigError, DataError, L2RecError
from l2rec.protocols import Progress
from l2rec.runs.folder import open_run_dataset
from l2rec.runs.predictor import Predictor, load
from l2rec.runs.scoring import with_cold_items

FORMAT = 2
ENGINES = ("local", "ray")
BLOCK = 1024
"""Rows that the model is given at once."""
SHARD_ROWS = 16 * BLOCK
"""Default rows of a shard. Of a multiple of `BLOCK`, the model is given the same rows at once as
where all vectors go into one file, and computes the same numbers to the last bit."""
READ_ROWS = 1 << 16
"""Rows of a Parquet file in memory at a time."""
SPACE = "free some space and give the same command again"
COLUMNS = {"histories": ("user_id", "history"), "texts": ("item_id", "text")}


# -- the model -----------------------------------------------------------------------------------


def ready(run: Path, dataset: Dataset | None) -> Predictor:
    """Load a run; with a data set, also the items of it that were held out of training.

    Raises:
        ConfigError: the method has no vectors, or takes no new items where the data set has some.
    """
    predictor: Any = load(run)
    if dataset is not None and dataset.n_cold:
        predictor = with_cold_items(predictor, dataset)
        if not isinstance(predictor, Predictor):
            raise ConfigError(f"{run} takes no new items, and users of {dataset.path} have some")
    assert isinstance(predictor, Predictor)
    if predictor.vectors is None:
        raise ConfigError(f"{run}: {type(predictor.model).__name__} has no vectors: it only ranks")
    return predictor


def users_with_events(dataset: Dataset) -> npt.NDArray[np.int64]:
    """Return the users who are encoded: [n] user ints."""
    return np.flatnonzero(dataset.sequences.lengths > 0)


def encode_users(
    predictor: Predictor, histories: Ragged, done: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Encode histories of item ints, none of them empty, [n, D]; ``done``: called with how many."""
    blocks = [torch.zeros(0, _dim(predictor))]
    for start in range(0, len(histories), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(histories)))
        blocks.append(predictor.model.encode_users(histories.take(rows)).cpu())
        done(int(rows[-1]) + 1)
    return torch.cat(blocks)


def _dim(predictor: Predictor) -> int:
    assert predictor.vectors is not None
    return int(predictor.vectors.shape[1])


# -- what is encoded -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Rows to encode, by the ``kind``.

    ``users``: of the run's data set, who have events. ``histories``: of Parquet files with the
    columns user_id and history, a list of item ids, oldest first; users whose list is empty are
    left out. ``texts``: of Parquet files with the columns item_id and text.

    data: the run's data set, where users are of it or items were held out of training.
    """

    kind: Literal["users", "histories", "texts"]
    run: Path
    data: Path | None = None
    parquet: Path | None = None

    def shards(self, rows: int) -> list[Shard]:
        """Cut the rows; no shard has rows of two files.

        Raises:
            DataError: no such file, or a column is missing.
        """
        if self.parquet is None:
            lengths = [(None, len(users_with_events(open_run_dataset(self.run, self.data))))]
        else:
            files = _parquet_files(self.parquet)
            lengths = [(file, self._rows_of(file)) for file in files]  # type: ignore[misc]
        found: list[Shard] = []
        for file, length in lengths:
            for first in range(0, length, rows):
                found.append(Shard(len(found), file, first, min(first + rows, length)))
        return found

    def facts(self) -> dict[str, Any]:
        """Return what tells these rows from others: the data set's fingerprint, or the files'
        hashes.
        """
        if self.parquet is None:
            return {"dataset": open_run_dataset(self.run, self.data).fingerprint}
        return {"files": {file.name: digest_of(file) for file in _parquet_files(self.parquet)}}

    def check(self) -> None:
        """Read all Parquet files once, for what would stop the encoding or spoil its result.

        Raises:
            DataError: something is null, or of a type that cannot be encoded; an id twice.
        """
        if self.parquet is None:
            return
        ids: list[pa.Array] = []
        for file in _parquet_files(self.parquet):
            first, opened = 0, pq.ParquetFile(file)
            try:
                for batch in opened.iter_batches(READ_ROWS, columns=list(COLUMNS[self.kind])):
                    place = _place(file, first, first + len(batch))
                    table = pa.Table.from_batches([batch])
                    names, values = _columns_of(table, self.kind, place)
                    if self.kind == "histories":  # who has an empty list is left out
                        names = names.filter(pc.greater(pc.list_value_length(values), 0))
                    ids += names.chunks
                    first += len(batch)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
        counts = pc.value_counts(pa.chunked_array(ids, pa.large_string()))
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise DataError(
                f"{self.parquet}: {COLUMNS[self.kind][0]} {twice[0]['values'].as_py()!r} is in "
                f"{twice[0]['counts'].as_py()} rows; every row needs its own"
            )

    def _rows_of(self, file: Path) -> int:
        try:
            schema, rows = pq.read_schema(file), pq.read_metadata(file).num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} is no Parquet file: {str(error).splitlines()[0]}") from error
        names = COLUMNS[self.kind]
        for name in names:
            if name not in schema.names:
                raise DataError(
                    f"{file} has the columns {', '.join(schema.names)}; --{self.kind} needs "
                    f"{' and '.join(names)}"
                )
        if self.kind == "histories" and not _is_list(schema.field("history").type):
            raise DataError(
                f"{file}: history is {schema.field('history').type}; it has to be a list of item "
                "ids, oldest first"
            )
        return int(rows)


@dataclass(frozen=True)
class Shard:
    """Rows ``first`` to ``last`` of a Parquet file, or of the data set's users."""

    number: int
    file: Path | None
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}.parquet"

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Read columns of the rows from the Parquet file, and no more of it than is needed."""
        assert self.file is not None
        file = pq.ParquetFile(self.file)
        groups: list[int] = []
        at = start = 0
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if at + rows > self.first and at < self.last:
                start = at if not groups else start
                groups.append(number)
            at += rows
        taken = []
        for batch in file.iter_batches(READ_ROWS, row_groups=groups, columns=list(columns)):
            low, high = max(self.first - start, 0), min(self.last - start, len(batch))
            if low < high:
                taken.append(batch.slice(low, high - low))
            start += len(batch)
            if start >= self.last:
                break
        return pa.Table.from_batches(taken)

    def columns(self, kind: str) -> tuple[list[str], list[Any]]:
        """Read ids and what is encoded of them, as `COLUMNS` names them, none of them null.

        Raises:
            DataError: something is null, or of a type that cannot be encoded.
        """
        ids, values = _columns_of(self.read(COLUMNS[kind]), kind, self.place)
        return ids.to_pylist(), values.to_pylist()

    @property
    def place(self) -> str:
        """Where its rows lie, for an error."""
        return _place(self.file, self.first, self.last)


def _parquet_files(path: Path) -> list[Path]:
    """Return a file, or the Parquet files of a folder by their names."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise DataError(f"{path}: no Parquet file there; give one, or a folder of *.parquet")
    return files


def _place(file: Path | None, first: int, last: int) -> str:
    """Say where rows lie, for an error."""
    return f"{file}, rows {first:,} to {last - 1:,}"


def _columns_of(table: pa.Table, kind: str, place: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Return ids and what is encoded of them, as `COLUMNS` names them, none of them null.

    Raises:
        DataError: something is null, or of a type that cannot be encoded.
    """
    names = COLUMNS[kind]
    text = pa.large_string()
    try:
        ids = table[names[0]].cast(text)
        values = table[names[1]].cast(pa.large_list(text) if kind == "histories" else text)
    except pa.ArrowException as error:
        raise DataError(f"{place}: {str(error).splitlines()[0]}") from error
    for name, column in zip(names, (ids, values), strict=True):
        if column.null_count:
            raise DataError(f"{place}: {column.null_count} rows have no {name}")
    if kind == "histories" and (nulls := pc.list_flatten(values).null_count):
        raise DataError(f"{place}: {nulls} item ids in {names[1]} are null")
    return ids, values


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


# -- encoding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a process needs to encode any shard; paths are absolute. ``version``: that of the run
    that every shard is to be of.
    """

    source: Source
    folder: Path
    precision: str
    version: str


class Encoder:
    """A run in this process, that encodes shards and writes them.

    Raises:
        CheckpointError: the run is another than when the command began.
    """

    def __init__(self, job: Job) -> None:
        source = job.source
        needed = source.kind == "users" or source.data is not None
        self.dataset = open_run_dataset(source.run, source.data) if needed else None
        self.job, self.predictor = job, ready(source.run, self.dataset)
        if self.predictor.version != job.version:
            raise CheckpointError(
                f"{source.run} is of version {self.predictor.version} now, and was of "
                f"{job.version} when this began; give another --out"
            )
        self._read = getattr(self, f"_{source.kind}")

    def __call__(self, shard: Shard) -> None:
        """Encode a shard and write its file.

        Raises:
            DataError: unknown item ids, an empty text. CheckpointError: it cannot be written.
        """
        ids, vectors, scale = self._read(shard)
        flat = vectors.float().cpu().numpy()
        version, precision = self.predictor.version, self.job.precision
        table = vectors_table(ids, flat, version, precision, scale)
        with replacing(self.job.folder / shard.name, remedy=SPACE) as partial:
            pq.write_table(table, partial)

    @cached_property
    def _everybody(self) -> npt.NDArray[np.int64]:
        assert self.dataset is not None
        return users_with_events(self.dataset)

    @cached_property
    def _scale(self) -> float:
        assert self.predictor.vectors is not None
        return scale_of(self.predictor.vectors.float().cpu().numpy())

    def _users(self, shard: Shard) -> tuple[list[str], Tensor, None]:
        assert self.dataset is not None
        users = self._everybody[shard.first : shard.last]
        ids: list[str] = self.dataset.user_ids.take(pa.array(users)).to_pylist()
        return ids, encode_users(self.predictor, self.dataset.sequences.take(users)), None

    def _histories(self, shard: Shard) -> tuple[list[str], Tensor, None]:
        ids, histories = shard.columns("histories")
        known = [n for n, history in enumerate(histories) if history]
        try:
            rows = self.predictor.rows([histories[n] for n in known])
        except DataError as error:
            raise DataError(f"{shard.place}: {error}") from error
        return [ids[n] for n in known], encode_users(self.predictor, rows), None

    def _texts(self, shard: Shard) -> tuple[list[str], Tensor, float]:
        """Encode texts; in int8, with the scale of the run's own items."""
        ids, texts = shard.columns("texts")
        blocks = [torch.zeros(0, _dim(self.predictor))]
        try:
            for start in range(0, len(texts), BLOCK):
                blocks.append(self.predictor.encode_items(texts[start : start + BLOCK]).cpu())
        except DataError as error:
            raise DataError(f"{shard.place}: {error}") from error
        return ids, torch.cat(blocks), self._scale


def _locally(job: Job, shards: Sequence[Shard]) -> Iterator[int]:
    """Encode shards in this process; yield the rows of each."""
    encoder = Encoder(job)
    for shard in shards:
        encoder(shard)
        yield shard.last - shard.first


# -- Ray -----------------------------------------------------------------------------------------


class _Worker:
    """An `Encoder` in a process of Ray, which loads the run once, and returns errors: raised, they
    would come back inside of Ray's own.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder: Encoder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = Shard(row["number"], row["file"] and Path(row["file"]), row["first"], row["last"])
        try:
            if self._encoder is None:
                self._encoder = Encoder(self._job)
            self._encoder(shard)
        except (L2RecError, OSError) as error:
            return {"rows": 0, "error": str(error)}
        return {"rows": shard.last - shard.first, "error": ""}


def _by_ray(job: Job, shards: Sequence[Shard], cpus: int) -> Iterator[int]:
    """Encode shards by Ray Data, a card or ``cpus`` cores for each process; yield their rows.

    Joins the cluster that RAY_ADDRESS names or `ray start` began on this machine, or else begins
    one of this machine alone. Ray gives the shards of a node that dies to the others.

    Raises:
        ConfigError: Ray is not installed, or no node has so many cores.
        DataError: what a process could not encode. CheckpointError: Ray itself failed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--engine ray needs Ray Data: pip install 'l2rec[ray]'") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    began = not ray.is_initialized()
    if began:
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cores = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
        if max(cores) < cpus:
            raise ConfigError(f"--cpus {cpus}: no node of the cluster has more than {max(cores)}")
        workers = min(gpus or sum(count // cpus for count in cores), len(shards))
        rows = [{**asdict(s), "file": None if s.file is None else str(s.file)} for s in shards]
        encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=(job,),
            num_cpus=cpus,
            num_gpus=1 if gpus else None,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        )
        for row in encoded.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            yield int(row["rows"])
    except ray.exceptions.RayError as error:
        raise CheckpointError(
            f"Ray: {str(error).splitlines()[0]}; shards that are finished are kept, give the same "
            "command again"
        ) from error
    finally:
        if began:
            ray.shutdown()


# -- the folder ----------------------------------------------------------------------------------


def write(
    source: Source,
    folder: Path,
    predictor: Predictor,
    progress: Progress,
    *,
    precision: str,
    engine: str = "local",
    rows: int = SHARD_ROWS,
    cpus: int = 1,
) -> tuple[Path, int, int]:
    """Encode a source into a folder of shards, but for those that are there and whole; return the
    folder, the rows and D.

    predictor: the run, whose version is written; processes load it again.

    Raises:
        CheckpointError: the folder is something else, of other rows or another version, or in use.
        ConfigError: as `_by_ray`. DataError: rows that cannot be encoded.
    """
    folder = folder.resolve()
    job = Job(_absolute(source), folder, precision, predictor.version)
    plan = {
        "format": FORMAT,
        "kind": source.kind,
        "source": job.source.facts(),
        "version": predictor.version,
        "precision": precision,
        "dim": _dim(predictor),
        "shard_rows": rows,
    }
    shards = job.source.shards(rows)
    if not shards:
        raise DataError(f"{source.parquet or source.data}: no rows to encode")
    source.check()
    with working_on(folder):
        named = _claim(folder, plan)
        kept = {
            shard.name: facts
            for shard in shards
            if (facts := _facts_of(folder / shard.name, plan))
            and facts["sha256"] == named.get(shard.name, facts["sha256"])
        }
        missing = [shard for shard in shards if shard.name not in kept]
        if len(missing) < len(shards):
            progress.line(f"{folder}: {len(kept):,} of {len(shards):,} shards are there already")
        done, wanted = 0, sum(shard.last - shard.first for shard in missing)
        encoded = _by_ray(job, missing, cpus) if engine == "ray" else _locally(job, missing)
        if missing:
            for count in encoded:
                done += count
                progress.validating(done, wanted)
        for shard in missing:
            facts = _facts_of(folder / shard.name, plan)
            if facts is None:
                raise CheckpointError(
                    f"{folder / shard.name} was written and is not there, or not whole: is "
                    f"{folder} on a disk that all machines see?"
                )
            kept[shard.name] = facts
        total = sum(each["rows"] for each in kept.values())
        entries = [{"name": shard.name, **kept[shard.name]} for shard in shards]
        manifest = {**plan, "complete": True, "rows": total, "shards": entries}
        write_json(folder / MANIFEST, manifest, remedy=SPACE)
        for leftover in folder.glob(".shard-*.part"):  # of processes that died
            with suppress(OSError):
                leftover.unlink()
    return folder, total, _dim(predictor)


def _absolute(source: Source) -> Source:
    """Return the source with paths that hold in any folder."""
    places = {
        name: None if path is None else path.resolve()
        for name, path in (("data", source.data), ("parquet", source.parquet))
    }
    return Source(source.kind, source.run.resolve(), **places)


def _claim(folder: Path, plan: dict[str, Any]) -> dict[str, str]:
    """Begin a manifest in an empty folder, or compare that of an earlier command; return the hash
    of each shard that it names.

    Raises:
        CheckpointError: the folder is something else, or of something else.
    """
    if not (folder / MANIFEST).is_file():
        if any(not file.name.startswith(".") for file in folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty and has no {MANIFEST}; choose another")
        write_json(folder / MANIFEST, {**plan, "complete": False}, remedy=SPACE)
        return {}
    found = read_json(folder / MANIFEST)
    for name, value in plan.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{folder} has vectors of {name} {found.get(name)}, not {value}; delete it, or "
                "choose another --out"
            )
    return {shard["name"]: shard["sha256"] for shard in found.get("shards", [])}


def _facts_of(path: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Read a whole shard and return its rows and hash; None where it is not there, damaged, or not
    of the plan.
    """
    try:
        found, digest = read_file(path)
        precision = pq.read_metadata(path).metadata.get(b"l2rec.precision", b"float32").decode()
    except (CheckpointError, OSError):
        return None
    facts = (found.version, precision, found.vectors.shape[1])
    if facts != (plan["version"], plan["precision"], plan["dim"]):
        return None
    return {"rows": len(found.ids), "sha256": digest}
