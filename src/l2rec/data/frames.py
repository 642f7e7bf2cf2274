"""A data set from tables in memory: polars, pandas, pyarrow, or any that speak Arrow's C interface.

The tables are written to temporary Parquet files and read like any others, so that they get every
check that files get.
"""

from __future__ import annotations

__all__ = ["prepare_frames"]

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from l2rec.data.dataset import Dataset
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.prepare import PrepareConfig, build
from l2rec.errors import ConfigError, DataError, nearest

NAME = "frames"
"""Name of a data set without a folder of its own, and of the format and origin of each."""
UNNAMED_INDEX = re.compile(r"__index_level_\d+__")
"""Column that pyarrow makes of a pandas index without a name."""


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
    with tempfile.TemporaryDirectory(prefix="l2rec-") as folder:
        log = _write(events, Path(folder) / "events.parquet")
        catalog = None if items is None else _write(items, Path(folder) / "items.parquet")
        try:
            source = open_source(log, items=catalog, format="parquet", columns=columns)
            source = replace(source, format=NAME)
            return build(source, out, config, origin=NAME, progress=progress)
        except DataError as error:
            files = [file for file in (log, catalog) if file is not None]
            raise DataError(_as_arguments(str(error), files)) from error


def _as_arguments(text: str, files: Sequence[Path]) -> str:
    """Put an error into words of the arguments, not of temporary files and command-line flags."""
    for file in files:
        text = text.replace(str(file), file.stem).replace(file.name, file.stem)
    for option in ("items", *PrepareConfig.model_fields):
        text = re.sub(rf"--{option.replace('_', '-')}\b(?!-)", option, text)
    return text


def _write(frame: Any, file: Path) -> Path:
    """Write a table as Parquet, and return the file."""
    name = file.stem
    try:
        table = _as_arrow(frame)
        double = {column for column in table.column_names if table.column_names.count(column) > 1}
        if double:
            raise ValueError(f"two columns are called {min(double)!r}")
        pq.write_table(table, file)
    except (pa.ArrowException, pl.exceptions.PolarsError, TypeError, ValueError) as error:
        reason = " ".join(" ".join(map(str, error.args)).split())
        raise DataError(
            f"{name} cannot be read as a table: {reason}; give a polars, pandas or pyarrow table "
            "with one type in each column"
        ) from error
    except OSError as error:
        raise DataError(f"{file.parent} cannot be written: {error}") from error
    return file


def _as_arrow(frame: Any) -> pa.Table:
    """Turn a table of any library into an Arrow table. Raises TypeError for anything else."""
    if isinstance(frame, pl.LazyFrame):
        frame = frame.collect()
    if isinstance(frame, pl.DataFrame):
        objects = [name for name, dtype in frame.schema.items() if dtype == pl.Object]
        if objects:
            raise TypeError(f"its column {objects[0]!r} holds Python objects")
        return frame.to_arrow()
    if isinstance(frame, pa.RecordBatch):
        return pa.Table.from_batches([frame])
    # Older versions of pandas have the second of these alone.
    if not hasattr(frame, "__arrow_c_stream__") and not hasattr(frame, "__dataframe__"):
        raise TypeError(f"it is a {type(frame).__name__}")
    table = pa.table(frame)
    return table.drop_columns([c for c in table.column_names if UNNAMED_INDEX.fullmatch(c)])
