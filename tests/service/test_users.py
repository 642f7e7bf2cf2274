"""Who is recommended what: users of the data set and of the log, unknown ones, and many at once."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from starlette.testclient import TestClient
from tests.support.runs import Finished, Quiet
from tests.support.service import Serve, error, metric_of

from l2rec.config import load_recipe
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.runs.folder import user_history
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run
from l2rec.service.app import create_app
from l2rec.service.audience import Audience
from l2rec.service.events import Event, EventLog
from l2rec.service.live import Live
from l2rec.service.loading import load_version
from l2rec.service.people import People
from l2rec.service.settings import Experiment, Settings


def recommend(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["id"] for item in answer["items"]]


def click(client: TestClient, user: str, *items: str, kind: str = "click") -> None:
    events = [
        {"id": f"{user}-{item}-{kind}", "user": user, "item": item, "type": kind}
        | {"timestamp": 1.7e9 + n}
        for n, item in enumerate(items)
    ]
    assert client.post("/v1/events", json={"events": events}).status_code == 200


# -- users who are known -------------------------------------------------------------------------


def test_users_of_the_data_set_are_known(serve: Serve, catalog_run: Finished) -> None:
    client, predictor = serve(), load(catalog_run.run)
    for user in ("u0", "u7", "u39"):
        history = user_history(catalog_run.run, user)
        answer = recommend(client, user=user, k=7)
        assert ids(answer) == [i["id"] for i in predictor.recommend(history, 7).items]
        assert not answer["fallback"] and answer["segment"] is None


def test_what_is_logged_follows_what_the_data_set_has(serve: Serve, catalog_run: Finished) -> None:
    client = serve()
    past = user_history(catalog_run.run, "u3")
    click(client, "u3", "i20", "i21", "unknown")
    answer = recommend(client, user="u3", k=9)
    assert ids(answer) == ids(recommend(client, history=[*past, "i20", "i21"], k=9))
    assert ids(answer) != ids(recommend(client, history=["i20", "i21"], k=9))
    shown = client.get("/v1/users/u3").json()
    assert shown["source"] == "events" and shown["next"] is None
    assert [item["id"] for item in shown["items"]] == [*past, "i20", "i21"]
    # An exposure alone tells nothing of what a user likes.
    click(client, "u4", "i20", kind="exposure")
    past = user_history(catalog_run.run, "u4")
    assert ids(recommend(client, user="u4")) == ids(recommend(client, history=past))
    assert client.get("/v1/users/u4").json()["source"] == "data"


def test_what_the_data_set_has_from_the_log_does_not_count_twice(
    catalog_run: Finished,
) -> None:
    people = People(catalog_run.run)
    dataset = open_dataset(catalog_run.data)
    row = dataset.user_index("u5")
    whole = user_history(catalog_run.run, "u5")
    start, stop = dataset.offsets[row : row + 2]
    third = float(dataset.timestamps[start:stop][3])
    assert people.history("u5", 100) == whole and people.history("u5", 2) == whole[-2:]
    assert people.history("u5", 100, before=third) == whole[:3]
    assert people.history("u5", 100, before=0.0) == people.history("nobody", 100) == []
    for user in dataset.user_ids.to_pylist():
        assert people.history(user, 100) == user_history(catalog_run.run, user)
    counts = Counter(dataset.item_ids.take(dataset.items.tolist()).to_pylist())
    assert people.counts() == counts
    assert people.counts(["u5", "nobody"]) == Counter(whole)


def test_a_past_in_milliseconds_and_what_is_of_the_log_in_it(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("u", "i1", 1e12), ("u", "i2", 1.7e12), ("v", "i2", 1.7e12 + 500)]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    data = Dataset.from_frames(events, out=tmp_path / "data", progress=False)
    monkeypatch.setattr("l2rec.service.people.open_run_dataset", lambda *_: data)
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    logged = [("u", "i2", 1.7e9), ("v", "i2", 1.7e9 + 0.5), ("v", "i3", 1.7e9 + 1)]
    log.append([Event(f"{n}", u, i, "click", at) for n, (u, i, at) in enumerate(logged)])
    version = load_version(catalog_run.run)

    async def stored(_: str, call: Any, *given: Any) -> Any:
        return call(*given)

    async def counted() -> dict[str, float]:
        popular = await Audience(log, stored).popular(version, None)
        return {item: popular.counts[version.predictor.row_of(item)] for item in ("i1", "i2", "i3")}

    async def history() -> list[str]:
        return (await Audience(log, stored).history(version, "u", 9)).items

    assert asyncio.run(history()) == ["i1", "i2"]
    assert asyncio.run(counted()) == {"i1": 1, "i2": 2, "i3": 1}
    # Times that are later than any of the log: nothing in the data set is of it.
    far = events.with_columns(pl.col("timestamp") * 2)
    data = Dataset.from_frames(far, out=tmp_path / "far", progress=False)
    assert asyncio.run(counted()) == {"i1": 1, "i2": 4, "i3": 1}


@pytest.fixture(scope="module")
def long_run(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run on users with up to 650 events."""
    folder, names = tmp_path_factory.mktemp("long"), ["user_id", "item_id", "timestamp"]
    lengths = {"data": 650, "both": 300, "log": 3, "later": 3}
    rows = [(user, f"i{n}", 1e9 + n) for user, length in lengths.items() for n in range(length)]
    rows += [("later", "i650", 1.8e9), ("others", "i0", 1e9)]
    rows += [(f"u{n}", f"i{n + more}", 1e9 + more) for n in range(0, 700, 5) for more in range(5)]
    events = pl.DataFrame(rows, schema=names, orient="row")
    data = Dataset.from_frames(events, out=folder / "data", progress=False)
    config = load_recipe("sasrec", ["training.max_steps=4"])
    train_run(config, data.path, folder / "run", progress=Quiet(), recipe="sasrec")
    return folder / "run"


@pytest.mark.parametrize("user", ["data", "log", "both", "later"])
def test_what_a_user_ever_had_is_left_out(user: str, serve: Serve, long_run: Path) -> None:
    client, predictor = serve(long_run), load(long_run)
    more = {"log": 620, "both": 300, "later": 20}.get(user, 0)
    click(client, user, *[f"i{n}" for n in range(640 - more, 640)], "unknown")
    past, logged = user_history(long_run, user), [f"i{n}" for n in range(640 - more, 640)]
    # What the data set has from after the first event of the log is seen, and not read.
    read = [*(past[:3] if user == "later" else past), *logged]
    seen = {*past, *logged}
    body: dict[str, Any] = {"user": user, "k": 50}
    answer = recommend(client, **body)
    batch = client.post("/v1/recommend/batch", json={"requests": [body]}).json()["answers"]
    assert not set(ids(answer)) & seen
    ranked = [i["id"] for i in predictor.recommend(read, len(predictor.ids) - len({*read})).items]
    best = [item for item in ranked if item not in seen][:50]
    assert ids(answer) == ids(batch[0]) == best
    assert client.post("/v1/explain", json={"user": user}).json()["item"]["id"] == best[0]
    assert set(ids(recommend(client, exclude_seen=False, **body))) & seen


def test_a_shadow_leaves_out_what_was_left_out(
    serve: Serve, long_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, offered = serve(long_run), []
    shadow = client.app.state.shadow  # type: ignore[attr-defined]
    monkeypatch.setattr(shadow, "offer", lambda *given: offered.append(given))
    recommend(client, user="data", deny=["i660"])
    ((history, without, _),) = offered
    assert history == user_history(long_run, "data")[-500:]
    assert set(without) == {"i660", *user_history(long_run, "data")}


def test_without_its_data_set_a_run_knows_the_log_alone(
    serve: Serve, catalog_run: Finished, tmp_path: Path
) -> None:
    shutil.copytree(catalog_run.run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(catalog_run.data.resolve()), "/nowhere"))
    client = serve(tmp_path / "run")
    assert recommend(client, user="u3")["fallback"]
    click(client, "u3", "i20")
    assert not recommend(client, user="u3")["fallback"]


def test_a_run_that_was_trained_anew_in_its_folder_knows_its_own_users(
    catalog_run: Finished, tmp_path: Path, log_url: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(catalog_run.run, run)
    audience = Audience(EventLog(log_url), lambda *_: None)  # type: ignore[arg-type]
    first = load_version(run)
    assert audience.people(first).history("u3", 9)
    assert audience.people(replace(first, name="derived")) is audience.people(first)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(catalog_run.data.resolve()), "/nowhere"))
    second = load_version(run)
    audience.forget_others([second])
    assert not audience.people(second).history("u3", 9)


def test_each_arm_knows_the_users_of_its_own_run(
    catalog_run: Finished, other_run: Finished, log_url: str
) -> None:
    live = Live(load_version(catalog_run.run), control=load_version(other_run.run))
    experiment = Experiment(name="exp", treatment=0.5)
    app = create_app(Settings(rate=0, experiment=experiment), live, EventLog(log_url))
    arms = set()
    with TestClient(app, base_url="http://localhost") as client:
        for user in ("u0", "u1", "u2", "u3", "u4", "u5"):
            answer = recommend(client, user=user, k=5)
            arm = answer["experiment"]["arm"]
            run = catalog_run.run if arm == "treatment" else other_run.run
            expected = load(run).recommend(user_history(run, user), 5)
            assert ids(answer) == [i["id"] for i in expected.items]
            arms.add(arm)
        assert recommend(client, user="nobody")["fallback"]
    assert arms == {"treatment", "control"}


# -- users who are not ---------------------------------------------------------------------------


def popular(catalog_run: Finished, *more: str) -> list[tuple[str, int]]:
    """Count what is popular in the data set and these, most first, equals as in the catalog."""
    dataset = open_dataset(catalog_run.data)
    names = dataset.item_ids.to_pylist()
    counts = Counter([names[item] for item in dataset.items.tolist()])
    counts.update(more)
    return sorted(counts.items(), key=lambda pair: (-pair[1], names.index(pair[0])))


def test_who_is_unknown_gets_what_is_popular(
    serve: Serve, catalog_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l2rec.service.audience.POPULAR_SECONDS", 0.0)
    client = serve()
    answer = recommend(client, user="nobody", k=12)
    assert answer["fallback"] and answer["gate"] is None and answer["segment"] is None
    listed = [(item["id"], item["score"]) for item in answer["items"]]
    assert listed == popular(catalog_run)[:12]
    for user in ("a", "b", "c", "d"):
        click(client, user, "i29", "unknown")
        click(client, user, "i28", kind="exposure")
    expected = popular(catalog_run, *["i29"] * 4)
    every = [item for item, _ in expected]
    answer = recommend(client, user="nobody", k=12)
    assert [(item["id"], item["score"]) for item in answer["items"]] == expected[:12]
    # Whatever may be left out of a ranking may be left out of this one.
    answer = recommend(client, user="nobody", k=3, deny=every[:2])
    assert ids(answer) == every[2:5]
    assert ids(recommend(client, user="nobody", allow=[every[9], every[4]])) == [every[4], every[9]]
    text = client.get(f"/v1/items/{every[6]}").json()["attributes"]["title"]
    filtered = ids(recommend(client, user="nobody", filters={"title": [text]}))
    assert every[6] in filtered and len(filtered) < 29
    client.delete("/v1/items", params={"id": every[0]})
    assert ids(recommend(client, user="nobody", k=3)) == every[1:4]
    client.put("/v1/items", json={"items": [{"id": "n1", "text": "hat"}]})
    assert ids(recommend(client, user="nobody", k=100))[-1] == "n1"
    metrics: Any = client.app.state.metrics  # type: ignore[attr-defined]
    assert metric_of(metrics, "l2rec_fallbacks_total", segment="catalog") == 7


def test_who_is_in_a_segment_gets_what_is_popular_there(
    serve: Serve, catalog_run: Finished
) -> None:
    client = serve()
    put = {"users": [{"id": u, "segment": "de"} for u in ("a", "new", "u3")]}
    put["users"].append({"id": "lost", "segment": "empty"})
    assert client.put("/v1/users", json=put).json() == {"users": 4}
    click(client, "a", "i9", "i8")
    click(client, "b", "i7")
    of_data = Counter(user_history(catalog_run.run, "u3"))
    counts = of_data + Counter(["i9", "i8"])
    for body in ({"user": "new"}, {"user": "nobody", "segment": "de"}):
        answer = recommend(client, k=5, **body)
        assert answer["fallback"] and answer["segment"] == "de"
        assert all(item["score"] == counts[item["id"]] for item in answer["items"])
        assert answer["items"][0]["score"] == max(counts.values())
    everywhere = recommend(client, user="nobody", k=5)
    for body in ({"user": "lost"}, {"user": "nobody", "segment": "it"}):
        answer = recommend(client, k=5, **body)
        assert answer["fallback"] and answer["segment"] is None
        assert answer["items"] == everywhere["items"]
    assert not recommend(client, user="a", segment="fr")["fallback"]  # who has a history has a rank


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ([], "users: List should have at least 1 item"),
        ([{"id": "a"}], "users.0.segment: Field required"),
        ([{"id": "a", "segment": "\n"}], "users.0.segment: a control character; leave it out"),
        ([{"id": "a", "segment": 1}], "users.0.segment: Input should be a valid string"),
    ],
)
def test_segments_that_are_refused(users: Any, message: str, serve: Serve) -> None:
    assert error(serve().put("/v1/users", json={"users": users}), 422).startswith(message)


# -- unknown items -------------------------------------------------------------------------------


def test_unknown_items_of_a_history_are_skipped_if_wished(
    serve: Serve, catalog_run: Finished
) -> None:
    client = serve()
    answer = recommend(client, history=["i1", "zz", "i2", "yy", "zz"], unknown="skip", k=5)
    assert answer["unknown"] == ["zz", "yy"] and not answer["fallback"]
    known = recommend(client, history=["i1", "i2"], k=5)
    assert answer["items"] == known["items"] and known["unknown"] == []
    nothing = recommend(client, history=["zz"], unknown="skip", k=5)
    assert nothing["fallback"] and nothing["unknown"] == ["zz"] and len(nothing["items"]) == 5
    refused = client.post("/v1/recommend", json={"history": ["i1", "zz"], "unknown": "fail"})
    remedy = '("unknown": "skip" reads the others)'
    assert error(refused, 422) == f"unknown item ids: 'zz' {remedy}"

    def explained(**body: Any) -> Any:
        found = client.post("/v1/explain", json=body)
        value = found.json()
        assert "detail" in value or value.pop("unknown") == [
            item for item in body.get("history", ()) if item in ("zz", "yy")
        ]
        return found if "detail" in value else value

    skipped = explained(history=["i1", "zz", "i2", "yy"], unknown="skip")
    assert skipped == explained(history=["i1", "i2"]) and len(skipped["history"]) == 2
    refused = explained(history=["i1", "zz"])
    assert error(refused, 422) == f"unknown item ids: 'zz' {remedy}"
    assert explained(user="u3") == explained(history=user_history(catalog_run.run, "u3"))
    for whose, body in {
        "this history": {"history": ["zz"]},
        "user 'nobody'": {"user": "nobody"},
    }.items():
        refused = explained(**body, unknown="skip")
        message = f"nothing is known of {whose}, so there is no rank to explain"
        assert error(refused, 404) == message

    def embedded(**body: Any) -> Any:
        return client.post("/v1/embed/users", json=body)

    histories = [["i1", "zz"], ["yy", "zz"], ["i2"]]
    found = embedded(histories=histories, unknown="skip").json()
    assert found["unknown"] == ["zz", "yy"] and found["vectors"][1] is None
    known = embedded(histories=[["i1"], ["i2"]]).json()
    assert found["vectors"][::2] == known["vectors"] and known["unknown"] == []
    message = f"unknown item ids: 'zz', 'yy' {remedy}"
    assert error(embedded(histories=histories), 422) == message
    found = embedded(users=["u3", "nobody"], unknown="skip").json()
    known = embedded(histories=[user_history(catalog_run.run, "u3")]).json()
    assert found["vectors"] == [*known["vectors"], None] and found["unknown"] == []
    message = f"nothing is known of users 'nobody' {remedy}"
    assert error(embedded(users=["u3", "nobody"]), 404) == message
    for body in ({}, {"users": ["u3"], "histories": [["i1"]]}):
        assert error(embedded(**body), 422) == "give either users or histories"


# -- many at once --------------------------------------------------------------------------------


def test_many_at_once_are_answered_as_one_by_one(serve: Serve) -> None:
    client = serve()
    click(client, "a", "i9", "i8")
    requests: list[dict[str, Any]] = [
        {"user": "u3", "k": 4},
        {"history": ["i1", "i2"], "k": 3},
        {"history": ["i1", "zz"]},
        {"user": "nobody", "k": 2},
        {"user": "a", "deny": ["i1"], "k": 6},
        {"history": ["i1"], "filters": {"titel": ["x"]}},
        {"history": ["i1", "zz"], "unknown": "skip"},
        {"user": "a", "experiment": "e"},
    ]
    answer = client.post("/v1/recommend/batch", json={"requests": requests})
    assert answer.status_code == 200
    answers = answer.json()["answers"]
    assert len(answers) == len(requests)
    for request, found in zip(requests, answers, strict=True):
        single = client.post("/v1/recommend", json=request)
        alone = single.json()
        assert found.pop("request") == answer.headers["x-request-id"]
        del alone["request"]
        if single.status_code == 200:
            for ours, theirs in zip(found["items"], alone["items"], strict=True):
                assert ours.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-5)
            assert found.pop("gate") == pytest.approx(alone.pop("gate"), abs=1e-5)
        assert found == alone
    assert [found.get("status") for found in answers] == [
        None,
        None,
        422,
        None,
        None,
        422,
        None,
        404,
    ]


def test_many_at_once_that_are_refused(serve: Serve) -> None:
    client = serve()
    one = {"history": ["i1"]}
    for requests, message in [
        ([], "requests: List should have at least 1 item"),
        ([one] * 65, "requests: List should have at most 64 items"),
        ([one, {"history": ["i1"], "k": "5"}], "requests.1.k: Input should be a valid integer"),
        ([one, {}], "requests.1: give a user or a history"),
    ]:
        answer = client.post("/v1/recommend/batch", json={"requests": requests})
        assert error(answer, 422).startswith(message)


def test_histories_of_many_users_are_one_batch(serve: Serve) -> None:
    client = serve(batch_ms=50, cache=0)
    requests = [{"user": f"u{n}"} for n in range(40)]
    answers = client.post("/v1/recommend/batch", json={"requests": requests}).json()["answers"]
    assert len(answers) == 40 and not any(answer["fallback"] for answer in answers)
    metrics: Any = client.app.state.metrics  # type: ignore[attr-defined]
    assert metric_of(metrics, "l2rec_batch_histories_count") < 20
    assert np.isfinite([item["score"] for answer in answers for item in answer["items"]]).all()
