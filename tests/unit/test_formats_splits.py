"""Three files of events, named as the train, valid and test split of one log, are read as it."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.errors import one_line

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.errors import DataError

SPLITS = ("train", "valid", "test")
ROWS = ([("u", "a", 1), ("v", "b", 2)], [("u", "b", 3)], [("u", "c", 4), ("v", "a", 5)])
EVENTS = [("u", "a", 1.0, 0), ("v", "b", 2.0, 0), ("u", "b", 3.0, 1), ("u", "c", 4.0, 2)]
EVENTS = [*EVENTS, ("v", "a", 5.0, 2)]


def events_of(source: Source) -> list[tuple[str, str, float, int]]:
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    return [(r["user_id"], r["item_id"], r["timestamp"], r["split"]) for r in rows]


def csv(path: Path, rows: list[tuple[Any, ...]], header: str = "user_id,item_id,timestamp") -> None:
    text = "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def inter(path: Path, rows: list[tuple[Any, ...]]) -> None:
    csv(path, rows, "user_id:token,item_id:token,timestamp:float")
    path.write_text(path.read_text().replace(",", "\t"))


def parquet(path: Path, rows: list[tuple[Any, ...]]) -> None:
    columns = zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True)
    pq.write_table(pa.table({name: list(values) for name, values in columns}), path)


FORMS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "named": ("csv", "x.{}.csv", csv),
    "bare": ("csv", "{}.csv", csv),
    "gzipped": ("csv", "x_{}.csv.gz", csv),
    "recbole": ("recbole", "x.{}.inter", inter),
    "parquet": ("parquet", "x-{}.parquet", parquet),
    "hugging face": ("parquet", "{}-00000-of-00001.parquet", parquet),
}


@pytest.mark.parametrize("form", FORMS)
def test_three_splits_are_one_log(tmp_path: Path, form: str) -> None:
    format, name, write = FORMS[form]
    folder = tmp_path / "log"
    folder.mkdir()
    for split, rows in zip(SPLITS, ROWS, strict=True):
        write(folder / name.format(split), rows)
    archive = tmp_path / "log.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"log/{path.name}")
    for source in (open_source(folder), open_source(folder, format=format), open_source(archive)):
        assert source.format == format
        assert events_of(source) == EVENTS
        names = ", ".join(name.format(split).removesuffix(".gz") for split in SPLITS)
        assert source.notes == [
            f"read as one log whose splits are given: {names} (train, valid, test)"
        ]


@pytest.mark.parametrize("valid", ["val", "dev", "validation"])
def test_other_words_for_valid(tmp_path: Path, valid: str) -> None:
    for split, rows in zip(("train", valid, "test"), ROWS, strict=True):
        csv(tmp_path / f"{split}.csv", rows)
    assert events_of(open_source(tmp_path)) == EVENTS


def test_splits_without_times_with_other_columns_and_a_catalog(tmp_path: Path) -> None:
    for split, rows in zip(SPLITS, ROWS, strict=True):
        csv(tmp_path / f"{split}.csv", [row[:2] for row in rows], "who,what")
    (tmp_path / "items.csv").write_text("what,title\na,A\n")
    source = open_source(tmp_path, columns=Columns("who", "what", None))
    assert events_of(source) == [(u, i, float(at), s) for at, (u, i, _, s) in enumerate(EVENTS)]
    assert source.fields == ("title",)


def test_the_catalog_beside_the_splits_of_recbole(tmp_path: Path) -> None:
    for split, rows in zip(SPLITS, ROWS, strict=True):
        inter(tmp_path / f"x.{split}.inter", rows)
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\na\tA\n")
    source = open_source(tmp_path)
    assert events_of(source) == EVENTS
    assert source.files[-1].name == "x.item"


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_splits_of_other_columns(tmp_path: Path, ending: str) -> None:
    write = csv if ending == "csv" else parquet
    for split, rows in zip(SPLITS, ROWS, strict=True):
        write(tmp_path / f"{split}.{ending}", rows)
    if ending == "csv":
        csv(tmp_path / "test.csv", [("u", "c", 4, 5)], "user_id,item_id,timestamp,rating")
    else:
        pq.write_table(
            pa.table({"user_id": ["u"], "item_id": ["c"], "timestamp": [4], "x": [1]}),
            tmp_path / "test.parquet",
        )
    with pytest.raises(DataError, match="different columns") as error:
        open_source(tmp_path)
    assert one_line(error).endswith("give the path of the file")


def test_more_files_than_the_splits_of_one_log(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for split, rows in zip(SPLITS, ROWS, strict=True):
            csv(tmp_path / f"{name}.{split}.csv", rows)
    with pytest.raises(DataError, match=r"has 6 \.csv or \.tsv files") as error:
        open_source(tmp_path)
    message = one_line(error)
    assert message.endswith("give a folder with the train, valid and test files of one log alone")


def test_splits_whose_rows_are_samples(tmp_path: Path) -> None:
    for split in SPLITS:
        csv(tmp_path / f"{split}.csv", [("u", "a b", "c", 1)], "user_id,history,item_id,timestamp")
    with pytest.raises(DataError, match=r"train\.csv has samples, not events: column 'history'"):
        open_source(tmp_path)


def test_the_line_of_a_wrong_row(tmp_path: Path) -> None:
    for split, rows in zip(SPLITS, ROWS, strict=True):
        csv(tmp_path / f"{split}.csv", rows)
    csv(tmp_path / "valid.csv", [("u", "a", 1), ("u", "b", "soon")])
    with pytest.raises(DataError, match=r"valid\.csv, line 3: timestamp 'soon' is not a number"):
        events_of(open_source(tmp_path))
