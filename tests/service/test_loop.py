"""The loop: what is served is logged, prepared, trained on, deployed and served again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.support import runs
from tests.support.command import Call
from tests.support.runs import Finished
from tests.support.service import Serve, error

from l2rec.data.dataset import open_dataset
from l2rec.errors import CheckpointError
from l2rec.runs.folder import read_catalog
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run
from l2rec.service.events import Event, EventLog
from l2rec.service.live import deploy, read_deployment


def ranked(client: TestClient, **body: Any) -> list[tuple[str, float]]:
    body = {"k": 100, "exclude_seen": False, **body}
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return [(item["id"], item["score"]) for item in answer.json()["items"]]


def does(call: Call, *arguments: object) -> str:
    """Return what a command prints, which has to succeed."""
    done = call(*arguments)
    assert done.code == 0, done.err
    return done.out


def fails(call: Call, *arguments: object) -> str:
    """Return the error of a command, which has to fail."""
    done = call(*arguments)
    assert done.code == 2, done.out
    return done.err


def clicks(users: int, items: list[str], name: str, at: float) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}-{user}-{n}", "user": f"s{user}", "item": item, "type": "click"}
        | {"timestamp": at + n}
        for user in range(users)
        for n, item in enumerate(items)
    ]


# -- the catalog and the model stay together -----------------------------------------------------


@pytest.mark.parametrize("kind", ["paper", "catalog", "blended"])
def test_an_item_that_is_put_again_keeps_what_was_learned(
    kind: str, serve: Serve, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(f"{kind}_run").run
    client, known = serve(run), load(run)
    before = ranked(client, history=["i1", "i2"])
    for attributes in ({}, {"price": "5"}, {"price": "6", "title": "x"}):
        items = [
            {"id": item, "text": f" {text}\n", "attributes": attributes}
            for item, text in zip(known.ids[:9], known.texts, strict=False)
        ]
        answer = client.put("/v1/items", json={"items": items}).json()
        assert answer["changes"] == dict.fromkeys(known.ids[:9], "kept")
        assert client.get(f"/v1/items/{known.ids[0]}").json()["attributes"] == attributes
        assert ranked(client, history=["i1", "i2"]) == before
    # Deleted and put again: as if nothing had been.
    client.delete("/v1/items", params={"id": known.ids[:3]})
    assert len(ranked(client, history=["i1", "i2"])) == len(before) - 3
    client.put("/v1/items", json={"items": items})
    assert ranked(client, history=["i1", "i2"]) == before
    live: Any = client.app.state.live  # type: ignore[attr-defined]
    assert live.current().added == 0
    changed = {"items": [{"id": "i1", "text": "heavy red hat"}, {"id": "n1", "text": "cold hat"}]}
    answer = client.put("/v1/items", json=changed).json()
    assert answer["changes"] == {"i1": "updated", "n1": "new"} and live.current().added == 2
    # After a restart as well.
    assert dict(ranked(serve(run), history=["i2"])) == pytest.approx(
        dict(ranked(client, history=["i2"])), abs=1e-5
    )


def test_what_is_kept_needs_no_room(serve: Serve, catalog_run: Finished) -> None:
    client, known = serve(new_items=0), load(catalog_run.run)
    item = {"id": "i1", "text": known.text_of("i1"), "attributes": {"price": "5"}}
    assert client.put("/v1/items", json={"items": [item]}).status_code == 200
    new = {"items": [item, {"id": "n1", "text": "hat"}]}
    assert error(client.put("/v1/items", json=new), 409).startswith("0 rows were added")
    assert client.get("/v1/items/i1").json()["attributes"] == {"price": "5"}


def test_a_price_of_an_item_that_only_ids_know(serve: Serve, sasrec_run: Path) -> None:
    client = serve(sasrec_run)
    text = client.get("/v1/items/i1").json()["text"]
    item = {"id": "i1", "text": text, "attributes": {"price": "5"}}
    before = ranked(client, history=["i2"])
    assert client.put("/v1/items", json={"items": [item]}).json()["changes"] == {"i1": "kept"}
    for now in (client, serve(sasrec_run)):
        assert now.get("/v1/items/i1").json()["attributes"] == {"price": "5"}
        assert ranked(now, history=["i2"]) == before
    other = {"items": [{"id": "i1", "text": "hat"}]}
    assert "was trained on" in error(client.put("/v1/items", json=other), 409)


def test_three_turns(
    serve: Serve, catalog_run: Finished, log_url: str, tmp_path: Path, call: Call
) -> None:
    folder, data, run = tmp_path / "serving", catalog_run.data, catalog_run.run
    deploy(run, folder)
    deleted: set[str] = set()
    users = open_dataset(data).n_users
    for turn in range(3):
        client, known = serve(run), load(run)
        items = [
            {"id": f"n{turn}", "text": " heavy red hat ", "attributes": {"price": "1"}},
            {"id": f"m{turn}", "text": f"cold door {turn}"},
            {"id": "i1", "text": known.text_of("i1"), "attributes": {"price": str(turn)}},
            {"id": "i2", "text": known.text_of("i2"), "attributes": {"color": "red|blue"}},
            {"id": "i3", "text": f"lamp {turn}"},
        ]
        changes = client.put("/v1/items", json={"items": items}).json()["changes"]
        wanted = {f"n{turn}": "new", f"m{turn}": "new", "i1": "kept", "i2": "kept"}
        assert changes == wanted | {"i3": "updated"}
        visited = ["i1", f"n{turn}", f"m{turn}", "i2", "i3", f"i{10 + turn}"]
        sent = {"events": clicks(12, visited, str(turn), 2e9 - 1e8 * (turn + 5))}
        assert client.post("/v1/events", json=sent).status_code == 200
        gone = [f"m{turn}", f"i{10 + turn}"]  # one of the log alone, one of the data set
        client.delete("/v1/items", params={"id": gone})
        deleted |= set(gone)

        before, turned = open_dataset(data), tmp_path / f"data{turn}"
        does(call, "prepare", log_url, "--after", str(data), "--out", str(turned))
        data = turned
        dataset = open_dataset(data)
        assert set(before.item_ids.to_pylist()) < set(dataset.item_ids.to_pylist())
        assert dataset.n_items == before.n_items + 2
        assert dataset.n_events == before.n_events + 12 * len(visited)  # none of them twice
        assert dataset.n_users == users + 12
        columns = {"item_id", "title", "color", "price", "text"}
        assert set(dataset.catalog.column_names) == columns
        run = tmp_path / f"run{turn}"
        config = runs.config(catalog_run.backbone, "catalog", epochs=1)
        train_run(config, data, run, progress=runs.Quiet(), recipe="tiny", command="test")
        said: list[str] = []
        deploy(run, folder, say=said.append)
        assert said[0] == f"items {before.n_items} -> {before.n_items + 2} (2 gained, 0 lost)"
        assert said[1].endswith(f"({12 if turn == 0 else 0} gained, 0 lost)")

        served, library = serve(run), load(run)
        live: Any = served.app.state.live.current()  # type: ignore[attr-defined]
        assert len(live) == live.loaded == library.n_items  # no row but the trained ones
        for history in (["i1"], [f"n{turn}", "i2"], ["i5", "i6", f"m{turn}", f"i{10 + turn}"]):
            expected = library.recommend(history, library.n_items, exclude_seen=False).items
            found = ranked(served, history=history)
            there = [(i["id"], i["score"]) for i in expected if i["id"] not in deleted]
            assert [item for item, _ in found] == [item for item, _ in there]
            assert [score for _, score in found] == pytest.approx([s for _, s in there], abs=1e-5)
        attributes = served.get("/v1/items/i1").json()["attributes"]
        assert attributes == {"price": str(turn)}
        assert "i2" in dict(ranked(served, history=["i1"], filters={"color": ["blue"]}))


# -- prepare -------------------------------------------------------------------------------------


def logged(path: Path, *events: Event) -> EventLog:
    log = EventLog(f"sqlite:///{path}")
    log.append(list(events))
    return log


def test_all_items_stay_whatever_was_clicked(
    catalog_run: Finished, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [Event(f"e{n}", "u", f"i{n}", "click", 1e9 + n) for n in range(4)]
    logged(tmp_path / "events.db", *events).close()
    items = str(catalog_run.run / "catalog.parquet")
    command = ["prepare", str(tmp_path / "events.db"), "--items", items, "--out"]
    does(call, *command, str(tmp_path / "all"))
    whole = open_dataset(tmp_path / "all")
    assert whole.item_ids.to_pylist() == load(catalog_run.run).ids
    note = "26 items without events are kept; --no-keep-all-items leaves them out"
    assert note in whole.meta["notes"]
    does(call, *command, str(tmp_path / "some"), "--no-keep-all-items")
    assert open_dataset(tmp_path / "some").n_items == 4
    # From its own catalog, as often as one likes.
    for turn in range(2):
        command[3] = str(tmp_path / "all" / "catalog.parquet")
        does(call, *command, str(tmp_path / "all"))
        again = open_dataset(tmp_path / "all")
        assert again.catalog.column_names == whole.catalog.column_names, turn
        assert again.fingerprint == whole.fingerprint


def test_an_item_that_was_put_clicked_and_deleted(
    catalog_run: Finished, tmp_path: Path, call: Call
) -> None:
    events = [Event(f"e{n}", "u", f"n{n % 2}", "click", 1e9 + n) for n in range(4)]
    log = logged(tmp_path / "events.db", *events)
    log.put_items({"n0": ("a hat", {"kind": "hat"}), "n1": ("a door", {})})
    log.delete_items(["n0", "i3"])
    log.close()
    out = tmp_path / "out"
    does(
        call,
        "prepare",
        str(tmp_path / "events.db"),
        "--after",
        str(catalog_run.data),
        "--out",
        str(out),
    )
    dataset = open_dataset(out)
    texts = dict(zip(dataset.item_ids.to_pylist(), dataset.texts(), strict=True))
    assert texts["n0"] == "a hat" and texts["n1"] == "a door" and len(texts) == 32
    assert texts["i3"] == load(catalog_run.run).text_of("i3")


def test_what_prepare_refuses_of_a_log(tmp_path: Path, call: Call, catalog_run: Finished) -> None:
    logged(tmp_path / "events.db", Event("e", "u", "i1", "click", 1e9)).close()
    out = ["--out", str(tmp_path / "out")]
    assert "items of an event log have the texts that they are served with" in fails(
        call, "prepare", str(tmp_path / "events.db"), "--text", "{title}", *out
    )
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,a,1\n")
    after = ["--after", str(catalog_run.data)]
    assert "is no event log; l2rec merge joins data sets" in fails(
        call, "prepare", str(tmp_path / "log.csv"), *after, *out
    )


# -- deploy --------------------------------------------------------------------------------------


@pytest.fixture
def smaller(catalog_run: Finished, tmp_path: Path) -> Path:
    """Train a run on the log alone, without the items that nobody clicked."""
    events = [
        Event(f"{user}-{n}", f"u{user}", f"i{n}", "click", 1e9 + n)
        for user in range(8)
        for n in range(6)
    ]
    logged(tmp_path / "events.db", *events).close()
    from typer.testing import CliRunner

    from l2rec.cli import app

    items = str(catalog_run.run / "catalog.parquet")
    command = ["prepare", str(tmp_path / "events.db"), "--items", items, "--no-keep-all-items"]
    CliRunner().invoke(app, [*command, "--out", str(tmp_path / "data")], catch_exceptions=False)
    config = runs.config(catalog_run.backbone, "catalog", epochs=1)
    return runs.finished(config, tmp_path / "data", tmp_path / "smaller").run


def test_a_shrunk_catalog_is_not_deployed(
    catalog_run: Finished, smaller: Path, tmp_path: Path, call: Call
) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)
    said: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"smaller lacks 24 items of .*catalog \(such as 'i6'\)"
    ):
        deploy(smaller, folder, say=said.append)
    assert said == [
        "items 30 -> 6 (0 gained, 24 lost)",
        "users 40 -> 8 (0 gained, 32 lost)",
        f"events {open_dataset(catalog_run.data).n_events} -> 48 "
        f"({48 - open_dataset(catalog_run.data).n_events:+,})",
        "lost items: 'i6', 'i7', 'i8', 'i9', 'i10' and 19 more",
    ]
    assert read_deployment(folder).current == catalog_run.run.resolve()
    deploy(smaller, folder, shadow=True)  # which serves nobody
    assert "deploy with --allow-loss" in fails(call, "deploy", str(smaller), "--to", str(folder))
    out = does(call, "deploy", str(smaller), "--to", str(folder), "--allow-loss")
    assert "items 30 -> 6 (0 gained, 24 lost)" in out
    assert read_deployment(folder).current == smaller.resolve()
    does(call, "rollback", str(folder))


def test_a_current_run_that_is_gone_is_not_compared_with(
    catalog_run: Finished, other_run: Finished, tmp_path: Path
) -> None:
    import shutil

    folder, run = tmp_path / "serving", tmp_path / "run"
    shutil.copytree(catalog_run.run, run)
    deploy(run, folder)
    shutil.rmtree(run)
    said: list[str] = []
    deploy(other_run.run, folder, say=said.append)
    assert len(said) == 1 and said[0].startswith("not compared with") and "catalog" in said[0]


def test_a_torn_live_json_says_what_to_do(catalog_run: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    folder.mkdir()
    for text in ("", "{", '{"current": 1}', "[]"):
        (folder / "live.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"live\.json.*; delete it, and name what is serv"
        ):
            deploy(catalog_run.run, folder)


def test_catalogs_of_runs_keep_what_stands_between_values(
    catalog_run: Finished, tmp_path: Path
) -> None:
    assert read_catalog(catalog_run.run).separators == {}
