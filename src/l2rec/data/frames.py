"""A data set from tables in memory: polars, pandas, pyarrow, or any that speak Arrow's C interface.

The tables are written to temporary Parquet files and read like any others, so that they get every
check that files get.
"""

from __future__ import annotations

__all__ = ["prepare_frames"]

import io
import re
import shutil
import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from l2rec.data.dataset import Dataset
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.preparation.texts import parse_template
from l2rec.data.prepare import PrepareConfig, build
from l2rec.errors import ConfigError, DataError, as_arguments, nearest

NAME = "frames"
"""Name of a data set without a folder of its own, and of the format and origin of each."""
UNNAMED_INDEX = re.compile(r"__index_level_\d+__")
"""Column that pyarrow makes of a pandas index without a name."""
UNREADABLE = (pa.ArrowException, pl.exceptions.PolarsError, TypeError, ValueError)
"""What is raised by columns that are no Arrow arrays, or that Parquet has no type for."""


def prepare_frames(
    events: Any, items: Any, out: Path | None, options: Mapping[str, Any], *, progress: bool
) -> Dataset:
    """Prepare a data set as `Dataset.from_frames` says, which has the arguments and the errors."""
    config = _config(options)
    if out is not None:
        return _prepare(events, items, out, config, progress)
    folder = Path(tempfile.mkdtemp(prefix="l2rec-"))
    try:
        dataset = _prepare(events, items, folder / NAME, config, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(dataset, shutil.rmtree, folder, ignore_errors=True)
    return dataset


def _config(options: Mapping[str, Any]) -> PrepareConfig:
    try:
        return PrepareConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name not in PrepareConfig.model_fields:
            known = nearest(name, PrepareConfig.model_fields)
            raise ConfigError(f"from_frames has no option {name!r}{known}") from None
        raise ConfigError(f"{name}={first['input']!r}: {first['msg']}") from None


def _prepare(events: Any, items: Any, out: Path, config: PrepareConfig, progress: bool) -> Dataset:
    columns = Columns(
        user=config.user,
        item=config.item,
        timestamp=config.timestamp,
        event_type=config.event_type,
    )
    of_text = [] if config.text is None else [name for _, name in parse_template(config.text)]
    with tempfile.TemporaryDirectory(prefix="l2rec-") as folder:
        log, catalog = Path(folder) / "events.parquet", None
        of_events = (config.user, config.item, config.timestamp, config.event_type or "event_type")
        _write(events, log, of_events)
        left: list[str] = []
        if items is not None:
            catalog = Path(folder) / "items.parquet"
            left = _write(items, catalog, [config.item, *of_text])
        words = partial(_as_arguments, files=[file for file in (log, catalog) if file])
        try:
            source = open_source(log, items=catalog, format="parquet", columns=columns)
            source = replace(source, format=NAME)
            if left:
                source.notes.append(
                    f"items: left out, as their values have no one type that a file can hold: "
                    f"{', '.join(map(repr, left))}"
                )
            return build(source, out, config, origin=NAME, progress=progress, reworded=words)
        except DataError as error:
            raise DataError(words(str(error))) from error


def _as_arguments(text: str, files: Sequence[Path]) -> str:
    """Put a message into words of the arguments, not of temporary files and command-line flags."""
    for file in files:
        text = text.replace(str(file), file.stem).replace(file.name, file.stem)
    return as_arguments(text, ("items", *PrepareConfig.model_fields))


def _write(frame: Any, file: Path, needed: Collection[str | None]) -> list[str]:
    """Write a table as Parquet, without columns that cannot be written unless they are ``needed``;
    return the names of those left out.
    """
    left: list[str] = []
    try:
        frame = _of_columns(frame)
        try:
            pq.write_table(_as_arrow(frame), file)
        except UNREADABLE:
            kept, left = _writable(frame, needed)
            if not left:
                raise
            pq.write_table(_as_arrow(_only(frame, kept)), file)
    except UNREADABLE as error:
        reason = " ".join(" ".join(map(str, error.args)).split())
        raise DataError(
            f"{file.stem} cannot be read as a table: {reason}; give a polars, pandas or pyarrow "
            "table with one type in each column"
        ) from error
    except OSError as error:
        raise DataError(f"{file.parent} cannot be written: {error}") from error
    return left


def _writable(frame: Any, needed: Collection[str | None]) -> tuple[list[int], list[str]]:
    """Return the places of the columns that are needed or can be written, and the names of the
    others.
    """
    names = _column_names(frame)
    kept, left = [], []
    for place, name in enumerate(names):
        if name not in needed:
            try:
                if names.count(name) > 1:
                    raise ValueError("two of one name")
                pq.write_table(_as_arrow(_only(frame, [place])), io.BytesIO())
            except UNREADABLE:
                left.append(name)
                continue
        kept.append(place)
    return kept, list(dict.fromkeys(left))


def _of_columns(frame: Any) -> Any:
    """Return a table of any library as one of polars, pandas or pyarrow.

    Raises:
        TypeError: it is no table.
    """
    if isinstance(frame, pl.LazyFrame):
        return frame.collect()
    if isinstance(frame, pa.RecordBatch):
        return pa.Table.from_batches([frame])
    # Older versions of pandas have the second of these alone.
    if not hasattr(frame, "__arrow_c_stream__") and not hasattr(frame, "__dataframe__"):
        raise TypeError(f"it is a {type(frame).__name__}")
    known = isinstance(frame, pl.DataFrame | pa.Table) or hasattr(frame, "iloc")
    return frame if known else pa.table(frame)


def _column_names(frame: Any) -> list[str]:
    """Return the names of a table's columns, without those of pandas' index."""
    return frame.column_names if isinstance(frame, pa.Table) else [str(n) for n in frame.columns]


def _only(frame: Any, places: list[int]) -> Any:
    """Return a table of some of the columns, by their places."""
    if isinstance(frame, pa.Table):
        return frame.select(places)
    return frame[:, places] if isinstance(frame, pl.DataFrame) else frame.iloc[:, places]


def _as_arrow(frame: Any) -> pa.Table:
    """Turn a table of polars, pandas or pyarrow into an Arrow table.

    Raises:
        TypeError, ValueError: a column that holds Python objects, two of one name.
    """
    if isinstance(frame, pl.DataFrame):
        objects = [name for name, dtype in frame.schema.items() if dtype == pl.Object]
        if objects:
            raise TypeError(f"its column {objects[0]!r} holds Python objects")
        return frame.to_arrow()
    table = frame if isinstance(frame, pa.Table) else pa.table(frame)
    names = table.column_names
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise ValueError(f"two columns are called {min(double)!r}")
    return table.drop_columns([name for name in names if UNNAMED_INDEX.fullmatch(name)])
