"""The loop closes: what the service logged is prepared as a data set again."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.data.dataset import open_dataset
from l2rec.errors import ConfigError, DataError, StorageError
from l2rec.service.events import Event, EventLog
from l2rec.service.export import export_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "events.db"
    made = EventLog(f"sqlite:///{path}")
    kinds = ["exposure", "click", "click", "reply", "click"]
    made.append(
        [
            Event(f"{user}{n}", user, f"i{n}", kind, 100.0 - n)  # type: ignore[arg-type]
            for user in ("ann", "bob")
            for n, kind in enumerate(kinds)
        ]
    )
    made.put_items({"i3": ("a new text", {"kind": "lamp"}), "i4": ("put later", {})})
    made.close()
    return path


def catalog(folder: Path) -> Path:
    table = pl.DataFrame({"item_id": [f"i{n}" for n in range(4)], "text": list("abcd")})
    table.write_parquet(folder / "catalog.parquet")
    table.write_csv(folder / "catalog.csv")
    return folder / "catalog.parquet"


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_what_was_served_is_a_data_set(log: Path, tmp_path: Path, ending: str) -> None:
    items = catalog(tmp_path).with_suffix(f".{ending}")
    arguments = ["prepare", str(log), "--items", str(items), "--out", str(tmp_path / "data")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "2 users, 4 items, 8 events" in done.stdout
    dataset = open_dataset(tmp_path / "data")
    ids = dataset.item_ids.to_pylist()
    texts = dict(zip(ids, dataset.texts(), strict=True))
    assert texts["i1"] == "b" and texts["i3"] == "a new text" and texts["i4"] == "put later"
    for user in ("ann", "bob"):  # clicks and replies in order of time, no exposure
        row = dataset.sequences[dataset.user_index(user)]
        assert [ids[int(i)] for i in row] == ["i4", "i3", "i2", "i1"]
    assert set(dataset.event_type_names) == {"click", "reply"}


def test_all_types_for_those_who_want_exposures(log: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{log}"
    events, _ = export_log(url, tmp_path, types=("exposure", "click"), catalog=catalog(tmp_path))
    table = pl.read_parquet(events)
    assert table["event_type"].value_counts().sort("event_type")["count"].to_list() == [6, 2]


def test_what_cannot_be_exported(log: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{log}"
    with pytest.raises(ConfigError, match=r"\['view'\]: choose from exposure, click, reply"):
        export_log(url, tmp_path, types=("view",))
    bare = tmp_path / "bare.parquet"
    pl.DataFrame({"item_id": ["x"]}).write_parquet(bare)
    with pytest.raises(DataError, match="has no column 'text'"):
        export_log(url, tmp_path, catalog=bare)
    empty = f"sqlite:///{tmp_path / 'empty.db'}"
    with pytest.raises(StorageError, match="no such file"):
        export_log(empty, tmp_path)
    EventLog(empty).close()
    with pytest.raises(DataError, match="has no click or reply yet"):
        export_log(empty, tmp_path)
    only = EventLog(f"sqlite:///{tmp_path / 'only.db'}")
    only.append([Event("e", "u", "i", "click", 1.0)])
    only.close()
    with pytest.raises(DataError, match="knows no item texts; give the catalog with --items"):
        export_log(f"sqlite:///{tmp_path / 'only.db'}", tmp_path)
