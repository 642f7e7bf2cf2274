"""The loop closes: what the service logged is prepared as a data set again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from tests.support import runs
from tests.support.command import Call
from tests.support.runs import Finished
from tests.support.service import Serve
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.data.cold import hold_out_items
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.extend import Known, extend
from l2rec.data.formats.open import open_source
from l2rec.data.prepare import PrepareConfig, prepare
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


def clicks(path: Path, *rows: tuple[str, str, float]) -> str:
    log = EventLog(f"sqlite:///{path}")
    log.append([Event(f"{n}", u, i, "click", at) for n, (u, i, at) in enumerate(rows)])
    log.close()
    return f"sqlite:///{path}"


def past(out: Path, scale: float = 1.0, **options: Any) -> Dataset:
    columns = ["user_id", "item_id", "timestamp"]
    rows = [("u", item, scale * (1e9 + n)) for n, item in enumerate("abc")]
    items = pl.DataFrame({"item_id": list("abc"), "text": list("abc")})
    events = pl.DataFrame(rows, schema=columns, orient="row")
    return Dataset.from_frames(events, items, out, progress=False, **options)


def turn(url: str, after: Path, folder: Path) -> Dataset:
    """Prepare the events of a log after a data set."""
    folder.mkdir()
    events, items = export_log(url, folder, after=after)
    config = PrepareConfig(text="{text}", keep_all_items=True)
    return prepare(events, folder / "data", config, items=items, progress=False)


def test_what_a_data_set_has_of_the_log_is_left_out_one_for_one(tmp_path: Path) -> None:
    first = [("u", "a", 1.7e9), ("u", "a", 1.7e9), ("u", "b", 1.7e9 + 1)]
    url = clicks(tmp_path / "a.db", *first)
    more = clicks(tmp_path / "b.db", *first, first[0], ("u", "c", 1.7e9 + 2))
    base = past(tmp_path / "base")
    served = turn(url, base.path, tmp_path / "served")
    newer = open_source(tmp_path / "served/events.parquet", items=tmp_path / "served/items.parquet")
    grown = extend(base, newer, tmp_path / "grown", progress=False)
    assert served.event_types is not None and grown.event_types is None
    for name, dataset in (("served", served), ("grown", grown)):
        assert dataset.n_events == 6
        assert turn(url, dataset.path, tmp_path / f"{name}-same").n_events == 6
        again = turn(more, dataset.path, tmp_path / f"{name}-more")
        assert again.n_events == 8
        assert turn(more, again.path, tmp_path / f"{name}-last").n_events == 8


def test_a_log_read_in_small_parts_is_looked_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    unknown = Known._unknown

    def counted(known: Known, table: pa.Table) -> Any:
        calls.append(len(table))
        return unknown(known, table)

    monkeypatch.setattr("l2rec.service.events.READ_ROWS", 2)
    monkeypatch.setattr(Known, "_unknown", counted)
    base = past(tmp_path / "base")
    url = clicks(tmp_path / "a.db", *[("u", "a", 1.7e9 + n) for n in range(5)])
    assert turn(url, base.path, tmp_path / "served").n_events == 3 + 5 and calls == [5]


def test_clicks_follow_a_past_in_milliseconds(tmp_path: Path) -> None:
    url = clicks(tmp_path / "events.db", ("u", "c", 1.7e9), ("u", "a", 1.7e9 + 0.25))
    served = turn(url, past(tmp_path / "base", 1000.0).path, tmp_path / "served")
    assert served.timestamps.tolist()[2:] == [1e12 + 2000, 1.7e12, 1.7e12 + 250]
    assert turn(url, served.path, tmp_path / "again").n_events == 5


def prepared(source: str, base: Dataset, *options: str) -> Any:
    out = base.path.with_name("out")
    arguments = ["prepare", source, "--after", str(base.path), "--out", str(out), *options]
    return CliRunner().invoke(app, arguments)


def test_a_data_set_of_a_log_says_what_it_is_of(tmp_path: Path, postgres_url: str) -> None:
    clicks(tmp_path / "events.db", ("u", "b", 1.7e9), ("u", "a", 1.7e9 + 1))
    base, out = past(tmp_path / "base"), tmp_path / "out"
    secret = postgres_url.replace("postgres:@", "postgres:hunter2@")
    assert "hunter2" in secret
    theirs = EventLog(secret)
    theirs.prune(1e11)
    theirs.append([Event("e", "u", "b", "click", 1.7e9)])
    theirs.close()
    shown = "postgresql+psycopg://postgres:***@/postgres"
    for source, name in ((str(tmp_path / "events.db"), "events.db"), (secret, shown)):
        assert prepared(source, base).exit_code == 0
        described = CliRunner().invoke(app, ["describe", str(out), "--json"]).stdout
        origin = f"event log {name} (click,reply) after base {base.fingerprint}"
        assert json.loads(described)["source"]["origin"] == origin
        assert tempfile.gettempdir() not in described.replace(str(tmp_path), "")
        assert "hunter2" not in (out / "dataset.json").read_text()


def test_types_are_chosen_where_all_events_have_one(call: Call, tmp_path: Path) -> None:
    clicks(tmp_path / "events.db", ("u", "b", 1.7e9), ("u", "a", 1.7e9 + 1))
    log, base = str(tmp_path / "events.db"), past(tmp_path / "base")
    served = turn(f"sqlite:///{log}", base.path, tmp_path / "served")
    for data in (base, served):  # of the latter, some have a type
        out = ["--out", str(tmp_path / "refused")]
        refused = call("prepare", log, "--after", str(data.path), "--only", "click", *out)
        assert refused.code == 2 and "has events without a type" in refused.err
        assert "--events click" in refused.err and not (tmp_path / "refused").exists()
    rows = [
        ("u", item, 1e9 + n, kind)
        for n, (item, kind) in enumerate(zip("ab", ("view", "click"), strict=True))
    ]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "kind"], orient="row")
    items = pl.DataFrame({"item_id": ["a", "b"], "text": ["a", "b"]})
    typed = Dataset.from_frames(
        events, items, tmp_path / "typed", progress=False, event_type="kind"
    )
    done = prepared(log, typed, "--only", "click")
    assert done.exit_code == 0 and "1 of 4 events are left out by only=click" in done.output
    assert open_dataset(tmp_path / "out").n_events == 3


def test_what_the_log_cannot_come_after(tmp_path: Path) -> None:
    url = clicks(tmp_path / "events.db", ("u", "a", 1.7e9))
    ordered = past(tmp_path / "ordered", timestamp=None)
    hold_out_items(past(tmp_path / "base").path, tmp_path / "cold", 0.34)
    for folder, message in ((ordered.path, "has no times"), (tmp_path / "cold", "has cold items")):
        with pytest.raises(DataError, match=message):
            export_log(url, tmp_path, after=folder)


def test_a_run_of_a_log_with_other_columns_and_times_is_updated_by_an_event_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pl.DataFrame({"who": ["u"], "item_id": ["a"], "timestamp": [1e12], "kind": ["buy"]})
    items = pl.DataFrame({"item_id": ["a"], "text": ["a"]})
    names = {"user": "who", "event_type": "kind", "only": ("buy",)}
    base = Dataset.from_frames(events, items, tmp_path / "base", progress=False, **names)
    clicks(tmp_path / "events.db", ("u", "a", 1.7e9))
    found = []

    def update(_: Path, newer: Any, *__: Any, **___: Any) -> dict[str, Any]:
        found.extend(extend(base, newer, tmp_path / "grown", progress=False).timestamps.tolist())
        raise DataError("no run")

    monkeypatch.setattr("l2rec.runs.folder.open_run_dataset", lambda *_: base)
    monkeypatch.setattr("l2rec.studies.update.update_run", update)
    arguments = ["update", str(tmp_path), "--events", str(tmp_path / "events.db")]
    arguments += ["--items", str(base.path / "catalog.parquet"), "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match="no run"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert found == [1e12, 1.7e12]


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
