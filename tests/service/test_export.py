"""The loop closes: what the service logged is prepared as a data set again."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from tests.support import runs
from tests.support.runs import Finished
from tests.support.service import Serve
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.data.dataset import open_dataset
from l2rec.errors import ConfigError, DataError, StorageError
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run
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
    assert done.exit_code == 0 and "2 users, 5 items, 8 events" in done.stdout
    dataset = open_dataset(tmp_path / "data")
    ids = dataset.item_ids.to_pylist()
    assert ids == ["i0", "i1", "i2", "i3", "i4"]  # in the order of the catalog, i0 without events
    assert dataset.catalog.column_names == ["item_id", "kind", "text"]
    texts = dict(zip(ids, dataset.texts(), strict=True))
    assert texts["i1"] == "b" and texts["i3"] == "a new text" and texts["i4"] == "put later"
    for user in ("ann", "bob"):  # clicks and replies in order of time, no exposure
        row = dataset.sequences[dataset.user_index(user)]
        assert [ids[int(i)] for i in row] == ["i4", "i3", "i2", "i1"]
    assert set(dataset.event_type_names) == {"click", "reply"}


def test_a_catalog_of_numbers(log: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.parquet"
    pl.DataFrame({"item_id": [7, 8], "text": ["a", "b"]}).write_parquet(path)
    _, items = export_log(f"sqlite:///{log}", tmp_path, catalog=path)
    assert pl.read_parquet(items)["item_id"].to_list() == ["7", "8", "i3", "i4"]


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
    lists = tmp_path / "lists.parquet"
    pl.DataFrame({"item_id": ["x"], "text": ["x"], "kind": [["a"]]}).write_parquet(lists)
    with pytest.raises(DataError, match="no column for the attributes of items put"):
        export_log(url, tmp_path, catalog=lists)
    with pytest.raises(DataError, match="neither Parquet nor CSV"):
        export_log(url, tmp_path, catalog=log)
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


def test_from_postgresql_as_from_sqlite(log: Path, tmp_path: Path, postgres_url: str) -> None:
    theirs, ours = EventLog(postgres_url), EventLog(f"sqlite:///{log}")
    theirs.prune(1e11)
    theirs.append([Event(**row) for batch in ours.read() for row in batch.to_pylist()])
    theirs.put_items(ours.items()[0])
    theirs.close()
    ours.close()
    prints = []
    for source in (str(log), postgres_url):
        out = tmp_path / f"data{len(prints)}"
        options = ["--items", str(catalog(tmp_path)), "--out", str(out)]
        done = CliRunner().invoke(app, ["prepare", source, *options], catch_exceptions=False)
        assert done.exit_code == 0
        prints.append(open_dataset(out).fingerprint)
    assert prints[0] == prints[1]


def test_the_loop_closes(serve: Serve, catalog_run: Finished, log_url: str, tmp_path: Path) -> None:
    """Serve a run, put an item, click; what was clicked trains the next run, which is served."""
    client = serve()
    put = {"items": [{"id": "n1", "text": "heavy red hat"}, {"id": "i1", "text": "renamed lamp"}]}
    assert client.put("/v1/items", json=put).status_code == 200
    events = [
        {"id": f"{user}-{n}-{kind}", "user": user, "item": item, "type": kind}
        for user in (f"u{k}" for k in range(12))
        for n, item in enumerate(("i1", "i2", "i3", "i4", "n1"))
        for kind in ("exposure", "click")
    ]
    stored = client.post("/v1/events", json={"events": events})
    assert stored.json() == {"stored": 120, "ignored": 0}
    known = load(catalog_run.run)
    data, run = tmp_path / "served", tmp_path / "again"
    command = ["prepare", log_url, "--items", str(catalog_run.run / "catalog.parquet")]
    command += ["--out", str(data)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and "12 users" in done.stdout and "60 events" in done.stdout
    dataset = open_dataset(data)
    texts = dict(zip(dataset.item_ids.to_pylist(), dataset.texts(), strict=True))
    assert texts.pop("n1") == "heavy red hat" and texts.pop("i1") == "renamed lamp"
    before = dict(zip(known.ids, known.texts, strict=True))
    assert texts == {item: before[item] for item in texts} and len(texts) == len(before) - 1
    config = runs.config(catalog_run.backbone, "catalog")
    train_run(config, data, run, progress=runs.Quiet(), recipe="tiny", command="test")
    again = serve(run)
    answer = again.post("/v1/recommend", json={"user": "u1", "k": 40, "exclude_seen": False}).json()
    assert "n1" in [item["id"] for item in answer["items"]]
