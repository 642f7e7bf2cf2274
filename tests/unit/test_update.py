"""A run brought up to date: newer events, users and items, from its weights, without leakage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from tests.support import runs
from tests.support.command import Call
from tests.support.errors import one_line
from tests.support.runs import Finished, Quiet

from l2rec.config import load_recipe, method_class
from l2rec.data.catalog import Catalog
from l2rec.data.cold import hold_out_items
from l2rec.data.dataset import Dataset
from l2rec.data.extend import Known, extend
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import chain_dataset, simple_text
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.methods.p5 import P5
from l2rec.runs.checkpoint import load_tensors
from l2rec.runs.predictor import load
from l2rec.runs.start import refuse_of_one_catalog, start_from
from l2rec.runs.train import evaluate_run
from l2rec.studies.blend import blend_run
from l2rec.studies.update import _few_epochs, update_run

pytestmark = pytest.mark.usefixtures("one_thread")

Row = tuple[str, str, float]


def log(folder: Path, rows: list[Row], items: list[str]) -> tuple[Path, Path]:
    """Write a log of newer events and the catalog of its items."""
    folder.mkdir(exist_ok=True)
    events, catalog = folder / "new.parquet", folder / "items.parquet"
    columns = ("user_id", "item_id", "timestamp")
    pl.DataFrame(rows, schema=list(columns), orient="row").write_parquet(events)
    texts = [simple_text(1000 + n) for n in range(len(items))]
    pl.DataFrame({"item_id": items, "text": texts}).write_parquet(catalog)
    return events, catalog


def newer(dataset: Dataset, tmp_path: Path) -> tuple[Path, Path]:
    """Give every second user a known and a new item, and let a new user begin."""
    users, items = dataset.user_ids.to_pylist(), dataset.item_ids.to_pylist()
    late = float(dataset.timestamps.max()) + 10
    rows = [(u, items[n % 7], late + 1) for n, u in enumerate(users[::2])]
    rows += [(u, "new", late + 2) for u in users[::2]]
    rows += [("anna", items[3], late), ("anna", "new", late + 1), ("anna", items[4], late + 3)]
    return log(tmp_path / "log", rows, ["new", "newer", items[0]])


def test_a_data_set_grows(chains: Dataset, tmp_path: Path) -> None:
    events, catalog = newer(chains, tmp_path)
    source = open_source(events, items=catalog, columns=Columns())
    grown = extend(chains, source, tmp_path / "grown", progress=False)
    before = chains.n_items
    assert grown.item_ids.to_pylist() == [*chains.item_ids.to_pylist(), "new", "newer"]
    assert grown.texts()[:before] == chains.texts(), "a known item keeps its text"
    assert grown.texts()[before] == simple_text(1000)
    assert grown.n_users == chains.n_users + 1 and grown.user_ids[-1].as_py() == "anna"
    for user in range(chains.n_users):
        added = 2 * (user % 2 == 0)
        old, now = chains.sequences[user], grown.sequences[user]
        assert now[: len(old)].tolist() == old.tolist() and len(now) == len(old) + added


def test_events_that_are_there_already_are_not_added_again(chains: Dataset, tmp_path: Path) -> None:
    events, catalog = newer(chains, tmp_path)
    source = open_source(events, items=catalog, columns=Columns())
    grown = extend(chains, source, tmp_path / "grown", progress=False)
    rows = pl.read_parquet(events)
    later = rows.head(1).with_columns(pl.col("timestamp") + 10)
    pl.concat([rows, rows.head(1), later]).write_parquet(events)  # the first now twice, one newer
    source = open_source(events, items=catalog, columns=Columns())
    again = extend(grown, source, tmp_path / "again", progress=False)
    assert again.n_events == grown.n_events + 2
    assert f"{len(rows)} events of the log were there already; left out" in again.meta["notes"]


def test_small_batches_are_joined_before_they_are_looked_up(
    chains: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look-up goes through all ids and events of the data set."""
    calls, find = [], pc.index_in

    def found(values: Any, *, value_set: pa.Array) -> Any:
        calls.append(value_set.type)
        return find(values, value_set=value_set)

    [events] = chains.event_batches()
    later = pa.array([0.5 + time for time in events["timestamp"].to_pylist()])
    columns = [events["user_id"], events["item_id"], later]
    rows = pa.RecordBatch.from_arrays(columns, schema=events.schema)
    batches = [one.slice(n, 3) for n in range(0, len(events), 3) for one in (events, rows)]
    monkeypatch.setattr(pc, "index_in", found)
    known = Known(chains)
    left = pa.Table.from_batches(known.without(batches))
    assert calls == 2 * [pa.large_string()], "of users and items, of any number of bytes"
    assert known.found == len(events) and left.equals(pa.Table.from_batches([rows]))


def test_newer_events_are_of_the_types_that_the_data_set_was_made_of(tmp_path: Path) -> None:
    rows = [("u", item, 1e9 + n) for n, item in enumerate("abc")]
    events = pl.DataFrame(rows, schema=["user", "item_id", "timestamp"], orient="row")
    events = events.with_columns(kind=pl.Series(["click", "exposure", "click"]))
    names = {"user": "user", "event_type": "kind"}
    base = Dataset.from_frames(
        events, out=tmp_path / "base", progress=False, only=("click",), **names
    )
    later = events.with_columns(pl.col("timestamp") + 10)
    later.write_csv(tmp_path / "later.csv")
    source = open_source(tmp_path / "later.csv", columns=Columns(**names))
    grown = extend(base, source, tmp_path / "grown", progress=False)
    assert grown.n_events == 4 and grown.item_ids.to_pylist() == ["a", "c"]
    note = "1 events of the log are not of the types that the data set was made of (click); left"
    assert any(line.startswith(note) for line in grown.meta["notes"])
    last = later.with_columns(pl.col("timestamp") + 10)
    last.write_csv(tmp_path / "last.csv")
    source = open_source(tmp_path / "last.csv", columns=Columns(**names))
    again = extend(grown, source, tmp_path / "again", progress=False)  # its columns and types too
    assert again.n_events == 6
    assert all(again.meta["options"][k] == base.meta["options"][k] for k in ("only", *names))
    chosen = replace(source, chosen=True)
    whole = extend(grown, chosen, tmp_path / "whole", drop_unknown_items=True, progress=False)
    assert whole.n_events == 7
    last.filter(pl.col("kind") != "click").write_csv(tmp_path / "shown.csv")
    for file, columns, message in (
        ("last.csv", Columns(user="user"), r"has no event types, and .* was made of click only"),
        ("shown.csv", Columns(**names), "none of its 1 events is of the types"),
    ):
        source = open_source(tmp_path / file, columns=columns)
        with pytest.raises(DataError, match=message) as error:
            extend(grown, source, tmp_path / "refused", progress=False)
        one_line(error)


def test_texts_are_made_as_the_first_were_at_every_update(tmp_path: Path) -> None:
    events = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1e9]})
    items = pl.DataFrame({"item_id": ["a"], "title": ["A"], "brand": ["x"]})
    data = Dataset.from_frames(
        events, items, tmp_path / "0", progress=False, text="{title} by {brand}"
    )
    for n, item in enumerate("bc"):
        folder = tmp_path / f"log{item}"
        folder.mkdir()
        events.with_columns(item_id=pl.lit(item), timestamp=2e9 + n).write_csv(folder / "new.csv")
        items.with_columns(item_id=pl.lit(item), brand=pl.lit(item)).write_csv(folder / "items.csv")
        source = open_source(folder / "new.csv", items=folder / "items.csv", columns=Columns())
        data = extend(data, source, tmp_path / f"{n + 1}", progress=False)
    assert data.texts() == ["A by x", "A by b", "A by c"]


def test_an_item_that_no_catalog_has_is_refused_or_dropped(chains: Dataset, tmp_path: Path) -> None:
    late = float(chains.timestamps.max()) + 1
    user, item = chains.user_ids[0].as_py(), chains.item_ids[0].as_py()
    events, _ = log(tmp_path / "log", [(user, item, late), (user, "x", late + 1)], [])
    source = open_source(events, columns=Columns())
    with pytest.raises(DataError, match="--drop-unknown-items"):
        extend(chains, source, tmp_path / "grown", progress=False)
    grown = extend(chains, source, tmp_path / "grown", drop_unknown_items=True, progress=False)
    assert grown.n_events == chains.n_events + 1


def test_data_with_cold_items_do_not_grow(chains: Dataset, tmp_path: Path) -> None:
    held = hold_out_items(chains.path, tmp_path / "cold", 0.2)
    events, catalog = newer(chains, tmp_path)
    source = open_source(events, items=catalog, columns=Columns())
    with pytest.raises(DataError, match="has cold items, which newer events would make warm"):
        extend(held, source, tmp_path / "grown", progress=False)


def test_another_unit_of_time_is_noticed(chains: Dataset, tmp_path: Path) -> None:
    user, item = chains.user_ids[0].as_py(), chains.item_ids[0].as_py()
    events, _ = log(tmp_path / "log", [(user, item, float(chains.timestamps.min()) - 1)], [])
    with pytest.raises(DataError, match="one unit of time") as error:
        extend(chains, open_source(events, columns=Columns()), tmp_path / "x", progress=False)
    one_line(error)
    assert not (tmp_path / "x").exists()


def test_a_run_goes_on_from_its_weights(
    catalog_run: Finished, chains: Dataset, tmp_path: Path, call: Call
) -> None:
    events, catalog = newer(chains, tmp_path)
    out = tmp_path / "monday"
    done = call(
        "update", catalog_run.run, "training.max_steps=2", "--events", events, "--items", catalog,
        "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "(before fine-tuning)" in done.err and "untrained" not in done.err
    page = " ".join((out / "report.html").read_text().split())
    assert "Step 0 is the model before fine-tuning." in page and "untrained" not in page
    assert "2 items are new" in done.err and "next: l2rec deploy" in done.err
    start = load_tensors(out / "state/start.safetensors")[0]
    earlier = load_tensors(catalog_run.run / "model.safetensors")[0]
    assert start.keys() == earlier.keys()
    for name, tensor in earlier.items():
        if name.endswith(("table.residual", "items.semantic")):
            assert torch.equal(start[name][: chains.n_items], tensor), name
            assert len(start[name]) == chains.n_items + 2
        elif not name.endswith(("table.held", "table.mean")):
            assert torch.equal(start[name], tensor), name
    report = json.loads((out / "report.json").read_text())
    assert report["dataset"]["items"] == chains.n_items + 2
    assert report["users_tested"] == chains.n_users + 1
    assert "before fine-tuning" in report["scores"]
    history = chains.item_ids.to_pylist()[:3]
    assert len(load(out).recommend([*history, "new"], k=5).items) == 5
    tuesday = tmp_path / "tuesday.parquet"
    pl.concat([pl.read_parquet(events)] * 2).write_parquet(tuesday)
    other = call(
        "update", catalog_run.run, "training.max_steps=2", "--events", tuesday, "--items", catalog,
        "--out", out, "--resume",
    )  # fmt: skip
    assert other.code == 2 and "monday-data was not made of these newer events" in other.err


def test_a_blended_run_is_blended_again(
    catalog_run: Finished, chains: Dataset, tmp_path: Path
) -> None:
    blended = tmp_path / "blended"
    blend_run(catalog_run.run, blended, progress=Quiet())
    events, catalog = newer(chains, tmp_path)
    source = open_source(events, items=catalog, columns=Columns())
    out = tmp_path / "out"
    report = update_run(blended, source, out, progress=Quiet(), overrides=["training.max_steps=1"])
    assert report["method"] == "L2Rec + co-occurrence"
    counts = load_tensors(out / "blend.safetensors")[0]
    assert len(counts["together.offsets"]) == chains.n_items + 3  # of the new items too
    quiet = Quiet()
    again = update_run(
        blended, source, out, progress=quiet, overrides=["training.max_steps=1"], resume=True
    )
    assert again == report and quiet.lines == [f"{out} is finished: these are its scores"]


def short(tmp_path: Path, backbone: Path) -> tuple[Finished, float]:
    """Train on users of six events, and one who has two: both are trained on."""
    items = [f"i{n}" for n in range(8)]
    rows = [(f"u{n}", items[(n + t) % 8], float(t)) for n in range(12) for t in range(6)]
    rows += [("few", items[0], 1.0), ("few", items[1], 3.0)]
    catalog = pl.DataFrame({"item_id": items, "text": [simple_text(n) for n in range(8)]})
    schema = ["user_id", "item_id", "timestamp"]
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    data = Dataset.from_frames(frame, catalog, tmp_path / "short", progress=False)
    config = runs.config(backbone, "catalog", max_steps=1)
    return runs.finished(config, data.path, tmp_path / "short-run"), 7.0


def test_what_was_trained_on_does_not_validate(tmp_path: Path, backbone_folder: Path) -> None:
    run, late = short(tmp_path, backbone_folder)
    events, _ = log(tmp_path / "log", [("few", "i2", late), ("u0", "i3", late)], [])
    quiet = Quiet()
    update_run(
        run.run,
        open_source(events, columns=Columns()),
        tmp_path / "out",
        progress=quiet,
        overrides=["training.max_steps=1"],
    )
    assert any(line.startswith("1 users do not validate") for line in quiet.lines)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["users_tested"] == 13
    first = runs.log(tmp_path / "out", "valid")[0]
    assert first["recall@10"] == 1.0  # of eight items


def test_what_an_earlier_start_was_trained_on_does_not_validate(
    tmp_path: Path, backbone_folder: Path
) -> None:
    """The update of an update, its blend and an evaluation leave the user out as well."""
    run, late = short(tmp_path, backbone_folder)
    blend_run(run.run, tmp_path / "0", progress=Quiet())
    for n, row in enumerate([("few", "i2", late), ("u0", "i3", late + 1)]):
        events, _ = log(tmp_path / f"log{n}", [row], [])
        quiet = Quiet()
        update_run(
            tmp_path / str(n),
            open_source(events, columns=Columns()),
            tmp_path / str(n + 1),
            progress=quiet,
            overrides=["training.max_steps=1"],
        )
        out = " ".join(quiet.lines)
        assert out.count("1 users do not validate") == 2  # in training and for the weights
        assert "chosen on 12 validation users" in out
    quiet = Quiet()
    assert evaluate_run(tmp_path / "2", "valid", quiet)["users"] == 12
    shutil.rmtree(run.run)
    shutil.rmtree(tmp_path / "0")
    assert evaluate_run(tmp_path / "2", "valid", quiet)["users"] == 13
    assert "goes on from, or its data set is gone" in quiet.lines[-1]


def test_a_test_event_that_was_trained_on_is_refused(tmp_path: Path, backbone_folder: Path) -> None:
    run, _ = short(tmp_path, backbone_folder)
    events, _ = log(tmp_path / "log", [("few", "i2", 2.0)], [])  # before the last event of few
    source = open_source(events, columns=Columns())
    with pytest.raises(CheckpointError, match="such as 'few'") as error:
        update_run(run.run, source, tmp_path / "out", progress=Quiet())
    one_line(error)


def test_a_run_whose_data_were_moved_is_updated(tmp_path: Path, backbone_folder: Path) -> None:
    run, late = short(tmp_path, backbone_folder)
    moved = tmp_path / "moved"
    (tmp_path / "short").rename(moved)
    events, _ = log(tmp_path / "log", [("few", "i2", late), ("u0", "i3", late)], [])
    source = open_source(events, columns=Columns())
    with pytest.raises(CheckpointError, match="give its folder with --data"):
        update_run(run.run, source, tmp_path / "out", progress=Quiet())
    assert not (tmp_path / "out-data").exists()
    steps = ["training.max_steps=1"]
    report = update_run(
        run.run, source, tmp_path / "out", progress=Quiet(), data=moved, overrides=steps
    )
    assert report["steps"] == 1


def test_a_misspelt_option_of_an_update_is_named(
    catalog_run: Finished, chains: Dataset, tmp_path: Path
) -> None:
    source = open_source(newer(chains, tmp_path)[0], columns=Columns())
    with pytest.raises(ConfigError, match=r"'train'; did you mean 'training'"):
        update_run(
            catalog_run.run,
            source,
            tmp_path / "out",
            progress=Quiet(),
            overrides=["train.epochs=3"],
        )


def test_another_split_is_refused(catalog_run: Finished, chains: Dataset, tmp_path: Path) -> None:
    events, catalog = newer(chains, tmp_path)
    source = open_source(events, items=catalog, columns=Columns())
    with pytest.raises(CheckpointError, match="was trained with the split leave-one-out"):
        update_run(
            catalog_run.run,
            source,
            tmp_path / "out",
            progress=Quiet(),
            overrides=["split.kind=tied-day"],
        )


def test_a_backbone_for_a_method_of_ids_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^update: backbone\.name changes nothing: SASRec reads"):
        _few_epochs(load_recipe("sasrec"), ["backbone.name=x"])
    assert _few_epochs(load_recipe("sasrec"), ["training.lr=0.5"]).training.lr == 0.5


@pytest.mark.parametrize("method", ["p5", "tiger", "letter", "idgenrec"])
def test_items_that_are_codes_of_one_catalog_do_not_grow(method: str) -> None:
    found = method_class(load_recipe(method, []).method)
    with pytest.raises(CheckpointError, match="codes or words to the items of one catalog"):
        refuse_of_one_catalog(found, Path("run"))


def test_such_a_run_is_refused_before_anything_is_written(
    beam_run: Path, chains: Dataset, tmp_path: Path
) -> None:
    events, catalog = newer(chains, tmp_path)
    source = open_source(events, items=catalog, columns=Columns())
    with pytest.raises(CheckpointError, match="P5 gives codes or words"):
        update_run(beam_run, source, tmp_path / "out", progress=Quiet(), data=chains.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_a_start_elsewhere_leaves_the_numbers_of_items_to_the_data_at_hand(
    beam_run: Path, tmp_path: Path
) -> None:
    """Numbers are those of this data's sequences, not of chance."""
    config = load(beam_run).model.config
    other = chain_dataset(tmp_path / "other", 40, 25, 8, seed=1)
    fresh, started = (P5(config, Catalog(other.catalog)) for _ in range(2))
    start_from(started, beam_run, other)
    nothing = Ragged.from_rows([])
    for model in (fresh, started):
        model.calibrate(other.sequences, nothing, nothing.values)
    assert torch.equal(started.generator.codes, fresh.generator.codes)
