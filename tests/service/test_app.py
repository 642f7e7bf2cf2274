"""Every route, by what it answers: ranked, filtered, stored, refused, and what is counted."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import torch
from pydantic import SecretStr
from starlette.testclient import TestClient
from tests.support.runs import Finished
from tests.support.service import Serve, error, metric_of

from l2rec.data.ragged import Ragged
from l2rec.errors import StorageError
from l2rec.runs.predictor import Encoded, load
from l2rec.service.app import create_app
from l2rec.service.cache import Users
from l2rec.service.events import EventLog
from l2rec.service.live import Live
from l2rec.service.loading import load_version
from l2rec.service.ranking import User
from l2rec.service.serving import Service
from l2rec.service.settings import Experiment, Settings
from l2rec.service.version import Version
from l2rec.studies.abtest.analysis import analyze
from l2rec.studies.arms import arm as assign


def recommend(client: TestClient, **body: Any) -> list[str]:
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["items"]]


def metric(client: TestClient, name: str, /, **labels: str) -> float:
    return metric_of(client.app.state.metrics, name, **labels)  # type: ignore[attr-defined]


# -- recommend -----------------------------------------------------------------------------------


@pytest.mark.parametrize("items", ["catalog", "paper", "blended"])
def test_recommends_what_the_library_does(
    items: str, serve: Serve, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(f"{items}_run").run
    client, predictor = serve(run), load(run)
    for history in (["i1"], ["i1", "i2", "i3"], ["i7"] * 20):
        for seen in (True, False):
            answer = client.post(
                "/v1/recommend", json={"history": history, "k": 7, "exclude_seen": seen}
            ).json()
            expected = predictor.recommend(history, 7, exclude_seen=seen)
            assert [i["id"] for i in answer["items"]] == [i["id"] for i in expected.items]
            assert [i["text"] for i in answer["items"]] == [i["text"] for i in expected.items]
            scores = [i["score"] for i in expected.items]
            assert [i["score"] for i in answer["items"]] == pytest.approx(scores, abs=1e-5)
            assert answer["gate"] == pytest.approx(expected.gate, abs=1e-5)
            assert answer["version"] == predictor.version and answer["experiment"] is None


def test_an_id_of_each_request(serve: Serve) -> None:
    client = serve()
    answers = [client.post("/v1/recommend", json={"history": ["i1"]}) for _ in range(2)]
    ids = [answer.json()["request"] for answer in answers]
    assert ids == [answer.headers["x-request-id"] for answer in answers] and ids[0] != ids[1]


def test_allow_deny_filters(serve: Serve, catalog_run: Finished) -> None:
    client = serve()
    every = recommend(client, history=["i1", "i2"], k=40)
    assert len(every) == 28 and not {"i1", "i2"} & set(every)
    assert recommend(client, history=["i1", "i2"], k=5, deny=every[:3]) == every[3:8]
    allow = [every[20], "i1", every[4], "nobody", every[9]]
    assert recommend(client, history=["i1", "i2"], allow=allow) == [every[n] for n in (4, 9, 20)]
    assert recommend(client, history=["i1"], allow=[]) == []
    title = load_version(catalog_run.run).attributes_of(5)["title"]
    found = recommend(client, history=["i1"], filters={"title": [title]}, exclude_seen=False)
    assert "i5" in found and len(found) < 28
    message = error(
        client.post("/v1/recommend", json={"history": ["i1"], "filters": {"titel": ["x"]}}), 422
    )
    assert message == "no attribute 'titel'; did you mean 'title'? (the catalog has: title)"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, "give a user or a history"),
        ({"history": []}, 422, "history: List should have at least 1 item"),
        ({"history": ["i1"], "k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ({"history": ["i1"], "k": 501}, 422, "k: Input should be less than or equal to 500"),
        ({"history": ["i1"] * 501}, 422, "history: List should have at most 500 items"),
        ({"history": ["i1", "zz", "i2", "yy"]}, 422, "unknown item ids: 'zz', 'yy'"),
        ({"history": ["i1"], "seen": 1}, 422, "seen: Extra inputs are not permitted"),
        ({"history": ["\u0000"]}, 422, "history.0: a control character; leave it out"),
        ({"history": ["i1\n"]}, 422, "history.0: a control character; leave it out"),
        ({"history": ["i1"], "k": True}, 422, "k: Input should be a valid integer"),
        ({"history": ["i1"], "k": "5"}, 422, "k: Input should be a valid integer"),
        ({"history": ["i1"], "k": 5.5}, 422, "k: Input should be a valid integer"),
        ({"history": ["i1"], "exclude_seen": 1}, 422, "exclude_seen: Input should be a valid bool"),
        ({"history": ["i1"], "exclude_seen": "no"}, 422, "exclude_seen: Input should be a valid"),
        ({"history": "i1"}, 422, "history: Input should be a valid list"),
        ({"history": ["i1"], "unknown": "drop"}, 422, "unknown: Input should be 'fail' or 'skip'"),
        ({"history": ["x" * 257]}, 422, "history.0: String should have at most 256 characters"),
        ({"user": "u", "experiment": "e"}, 404, "no experiment 'e' (none runs)"),
    ],
)
def test_what_is_refused(body: dict[str, Any], status: int, message: str, serve: Serve) -> None:
    assert error(serve().post("/v1/recommend", json=body), status).startswith(message)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 422, "Field required"),
        (b"{", 400, "not JSON"),
        (b'"\\ud800"', 422, "Input should be a valid dictionary"),
        (b'{"history": ["\\ud800"]}', 422, "history.0: Input should be a valid string"),
        (b'{"k": 1e999, "history": ["i1"]}', 422, "k: "),
        (b'{"k": NaN, "history": ["i1"]}', 422, "k: "),
        (b'{"k": ' + b"9" * 5000 + b"}", 400, ""),
        (b"[" * 17, 400, "JSON deeper than 16 levels"),
        (b'{"history": ["' + b"x" * 2**20 + b'"]}', 413, "a body of 1048593 bytes; send at most"),
        (b"\xff\xfe", 400, ""),
    ],
)
def test_bodies_that_are_not_requests(
    content: bytes, status: int, message: str, serve: Serve
) -> None:
    headers = {"content-type": "application/json"}
    answer = serve().post("/v1/recommend", content=content, headers=headers)
    assert error(answer, status).startswith(message)


def test_a_body_in_chunks_is_measured_while_it_comes(serve: Serve) -> None:
    client = serve(body_bytes=2048)
    sent = 0

    def chunks() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 1000

    answer = client.post(
        "/v1/recommend", content=chunks(), headers={"content-type": "application/json"}
    )
    assert error(answer, 413) == "a body of more than 2048 bytes"


def test_only_json(serve: Serve) -> None:
    answer = serve().post("/v1/recommend", content=b"{}", headers={"content-type": "text/plain"})
    assert error(answer, 415) == "send application/json"


def test_unknown_routes_and_methods(serve: Serve) -> None:
    client = serve()
    assert error(client.get("/v1/nothing"), 404) == "Not Found"
    assert error(client.get("/v1/recommend"), 405) == "Method Not Allowed"
    assert error(client.get("/docs"), 404) and error(client.get("/livez/"), 404)


def test_unknown_parameters(serve: Serve) -> None:
    client = serve()
    answer = client.get("/v1/items", params={"limt": 3})
    assert error(answer, 422) == "'limt': no such parameter; did you mean 'limit'?"
    assert error(client.get("/metrics?x=1"), 422) == "'x': no such parameter"
    for address in ("/?utm_source=x", "/livez?x=1", "/readyz?x=1", "/static/app.js?v=2"):
        assert client.get(address).status_code == 200, address


def test_a_failure_that_nobody_foresaw(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(client.app.state.live.version.predictor, "encode", fail)  # type: ignore[attr-defined]
    message = error(client.post("/v1/recommend", json={"history": ["i1"]}), 500)
    assert message.startswith("internal error; see the log at ") and "secret" not in message


# -- users, batches, the cache -------------------------------------------------------------------


def test_a_user_is_what_was_clicked(serve: Serve) -> None:
    client = serve()
    events = [
        {"id": f"e{n}", "user": "u", "item": item, "type": kind, "timestamp": 1e9 + n}
        for n, (item, kind) in enumerate(
            [("i1", "click"), ("i9", "exposure"), ("unknown", "click"), ("i2", "reply")]
        )
    ]
    stored = client.post("/v1/events", json={"events": events})
    assert stored.json() == {"stored": 4, "ignored": 0}
    again = client.post("/v1/events", json={"events": [*events, events[1] | {"id": "new"}]})
    assert again.json() == {"stored": 1, "ignored": 4}
    assert recommend(client, user="u") == recommend(client, history=["i1", "i2"])
    only = client.post(
        "/v1/events", json={"events": [{"id": "x", "user": "v", "item": "gone", "type": "click"}]}
    )
    assert only.status_code == 200
    assert client.post("/v1/recommend", json={"user": "v"}).json()["fallback"]
    assert metric(client, "l2rec_events_total", result="stored") == 6
    assert metric(client, "l2rec_events_total", result="ignored") == 4


@pytest.mark.parametrize("items", ["catalog", "paper"])
def test_a_batch_answers_as_single_requests_do(
    items: str, request: pytest.FixtureRequest, log_url: str
) -> None:
    run = request.getfixturevalue(f"{items}_run").run
    draw = np.random.default_rng(0)
    histories = [
        [f"i{n}" for n in draw.integers(0, 30, length)] for length in draw.integers(1, 9, 40)
    ]

    async def main() -> tuple[list[Any], list[Any], float]:
        async with running(run, log_url, cache=0, slice_tokens=4096) as (app, client):
            single = [await embed(client, [history]) for history in histories]
            together = await asyncio.gather(*(embed(client, [history]) for history in histories))
            all_at_once = await embed(client, histories)
            batches = app.state.metrics.batch_jobs.collect()[0].samples
            count = next(s.value for s in batches if s.name.endswith("_count"))
            return single, [*together, all_at_once], count

    single, together, batches = asyncio.run(main())
    expected = np.concatenate(single)
    assert batches < 2 * len(histories)  # some ran together
    np.testing.assert_allclose(np.concatenate(together[:-1]), expected, atol=2e-5)
    np.testing.assert_allclose(together[-1], expected, atol=2e-5)


class running:
    """An app with its lifespan and an asynchronous client."""

    def __init__(self, run: Any, log_url: str, **settings: Any) -> None:
        log = EventLog(log_url)
        live = Live(load_version(run, items=log.items()))
        self.app = create_app(Settings(**{"rate": 0, **settings}), live, log)

    async def __aenter__(self) -> tuple[Any, httpx.AsyncClient]:
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        transport = httpx.ASGITransport(self.app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
        return self.app, self._client

    async def __aexit__(self, *_: Any) -> None:
        await self._client.aclose()
        await self._lifespan.__aexit__(None, None, None)


async def embed(client: httpx.AsyncClient, histories: list[list[str]]) -> Any:
    answer = await client.post("/v1/embed/users", json={"histories": histories})
    assert answer.status_code == 200, answer.text
    return np.asarray(answer.json()["vectors"])


def test_repeated_histories_are_not_encoded_again(serve: Serve) -> None:
    client = serve(cache=2)
    for history in (["i1"], ["i1"], ["i2"], ["i1"], ["i3"], ["i1"], ["i2"]):
        recommend(client, history=history)
    assert metric(client, "l2rec_user_cache_total", found="hit") == 3
    assert metric(client, "l2rec_user_cache_total", found="miss") == 4
    assert metric(client, "l2rec_user_cache_entries") == 2
    assert metric(client, "l2rec_batch_histories_count") == 4


def test_the_cache_is_bounded_by_all_that_it_keeps() -> None:
    cache = Users(most=100, within=10_000)
    draw = np.random.default_rng(0)
    for n in range(200):
        prior = int(draw.integers(0, 300)) if n % 3 else 0
        rows, added = np.arange(prior), np.zeros(prior, dtype=np.float32)
        key = (n % 2, 0, bytes([n % 10] * 40))
        user = User(torch.zeros(64), None, rows, added)
        cache.keep(key, user)
        assert cache.get(key) is user
        kept = cache._users.items()
        held = [len(k[2]) + 256 + 12 * len(u.rows) for k, u in kept]
        assert sum(held) == cache.nbytes <= 10_000 and len(held) == len(cache)
    before = cache.nbytes
    cache.keep((0, 0, b"whole"), User(torch.zeros(2501)))
    assert cache.nbytes == before, "one that is too large by itself"
    for n in range(200):
        cache.keep((n % 2, 0, bytes([n])), User(torch.zeros(1)))
    assert len(cache) == 100 and cache.nbytes == 500
    cache.keep_only({1})
    assert len(cache) == 50 and cache.nbytes == 250
    cache.keep_only(set())
    assert len(cache) == cache.nbytes == 0
    nothing = Users(most=0, within=10_000)
    nothing.keep((0, 0, b""), User(torch.zeros(1)))
    assert len(nothing) == 0


def test_embeddings(serve: Serve, catalog_run: Finished) -> None:
    client, predictor = serve(), load(catalog_run.run)
    users = client.post("/v1/embed/users", json={"histories": [["i1"], ["i2", "i3"]]}).json()
    expected = predictor.encode_users([["i1"], ["i2", "i3"]])
    np.testing.assert_allclose(users["vectors"], expected, atol=1e-5)
    items = client.post("/v1/embed/items", json={"texts": ["red hat"]}).json()
    np.testing.assert_allclose(items["vectors"], predictor.encode_items(["red hat"]), atol=1e-5)
    assert users["version"] == items["version"] == predictor.version
    bad = {"histories": [["i1"], ["zz"]]}
    message = error(client.post("/v1/embed/users", json=bad), 422)
    assert message.startswith("unknown item ids: 'zz'")
    assert metric(client, "l2rec_batch_histories_sum") == 2
    assert error(client.post("/v1/embed/items", json={"texts": ["  "]}), 422)


# -- items ---------------------------------------------------------------------------------------


def test_an_item_is_recommended_in_the_next_request_and_after_a_restart(serve: Serve) -> None:
    client = serve()
    item = {"id": "n1", "text": "heavy red hat", "attributes": {"color": "red|blue", "size": ""}}
    answer = client.put("/v1/items", json={"items": [item, {"id": "i3", "text": "cold door"}]})
    assert answer.status_code == 200 and answer.json()["items"] == 2
    deleted = client.delete("/v1/items", params={"id": ["i4", "i5", "i4"]})
    assert deleted.status_code == 200

    def as_it_is_now(client: TestClient) -> list[str]:
        every = recommend(client, history=["n1", "i5"], k=40, exclude_seen=False)
        assert {"n1", "i3"} <= set(every) and not {"i4", "i5"} & set(every) and len(every) == 29
        assert recommend(client, history=["i1"], filters={"color": ["blue"]}) == ["n1"]
        answer = client.post("/v1/recommend", json={"history": ["i1"], "allow": ["i3"]}).json()
        assert answer["items"][0]["text"] == "cold door"
        return every

    assert as_it_is_now(client) == as_it_is_now(serve())
    assert client.delete("/v1/items", params={"id": "n1"}).status_code == 200
    assert "n1" not in recommend(serve(), history=["i1"], k=40)
    assert metric(client, "l2rec_item_changes_total", change="new") == 1
    assert metric(client, "l2rec_item_changes_total", change="updated") == 1
    assert metric(client, "l2rec_item_changes_total", change="deleted") == 3
    assert error(client.delete("/v1/items", params={"id": ["zz", "i1"]}), 404) == (
        "unknown item ids: 'zz'"
    )


@pytest.mark.parametrize(
    ("items", "status", "message"),
    [
        ([], 422, "items: List should have at least 1 item"),
        ([{"id": "a", "text": "x"}] * 2, 422, "item 'a' is given twice"),
        ([{"id": "a", "text": " \n"}], 422, "items.0.text: a blank text"),
        (
            [{"id": "a", "text": "x", "attributes": {"text": "y"}}],
            422,
            "items.0: an attribute 'text': this is a column of every catalog",
        ),
        ([{"id": "a", "text": "x" * 10_001}], 422, "items.0.text: String should have at most"),
        ([{"id": str(n), "text": "x"} for n in range(101)], 422, "items: List should have at most"),
        (
            [{"id": str(n), "text": "x"} for n in range(6)],
            409,
            "0 rows were added since catalog was loaded, at most 5 may be; restart or deploy",
        ),
    ],
)
def test_items_that_are_refused(items: Any, status: int, message: str, serve: Serve) -> None:
    client = serve(new_items=5)
    assert error(client.put("/v1/items", json={"items": items}), status).startswith(message)


def test_another_server_of_the_same_database_takes_items_over(serve: Serve) -> None:
    first, second = serve(sync=0.02), serve(sync=0.02)
    first.put("/v1/items", json={"items": [{"id": "n1", "text": "heavy red hat"}]})
    first.delete("/v1/items", params={"id": "i4"})
    deadline = time.monotonic() + 20
    while "n1" not in (now := recommend(second, history=["i1"], k=40)) or "i4" in now:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("deletes", [True, False])
def test_what_another_server_undoes_before_the_next_sync_is_undone_here(
    deletes: bool, catalog_run: Finished, log_url: str
) -> None:
    log, other = EventLog(log_url), EventLog(log_url)
    item = {"n1": ("heavy red hat", {})}
    other.put_items(item)
    if not deletes:
        other.delete_items(["n1"])

    async def main() -> None:
        service = Service(Settings(), Live(load_version(catalog_run.run)), log)
        assert await service.sync() is deletes
        if deletes:
            await service.delete(["n1"])
            other.put_items(item)
        else:
            await service.put(item)
            other.delete_items(["n1"])
        assert await service.sync()
        assert service.live.current().serves("n1") is deletes
        assert not await service.sync()
        await service.close()

    asyncio.run(main())


class Broken:
    """A log whose writes, or everything, fail as on a full disk or a database that is away."""

    def __init__(self, log: EventLog) -> None:
        self._log, self.writes, self.reads = log, False, False

    def __getattr__(self, name: str) -> Any:
        writing = name in ("appending", "put_items", "delete_items")
        if self.writes and (writing or self.reads) and name != "close":
            return _full
        return getattr(self._log, name)


def _full(*_: Any) -> Any:
    raise StorageError("the disk is full; free some space")


def test_storage_that_fails_leaves_reads_and_recovers(
    serve: Serve, log_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = Broken(EventLog(log_url))
    client = serve(log=log)
    event = {"id": "a", "user": "u", "item": "i1", "type": "click"}
    item = {"items": [{"id": "n1", "text": "heavy red hat"}]}
    log.writes = True
    for answer in (
        client.post("/v1/events", json={"events": [event]}),
        client.put("/v1/items", json=item),
        client.delete("/v1/items", params={"id": "i4"}),
    ):
        assert error(answer, 503) == "the disk is full; free some space"
        assert answer.headers["retry-after"] == "5"
    every = recommend(client, history=["i1"], k=40)
    assert "n1" not in every and "i4" in every
    assert client.get("/readyz").status_code == 200
    assert metric(client, "l2rec_storage_failures_total") == 3
    log.reads = True
    client.app.state.service._ready = None  # type: ignore[attr-defined]  # not the one of before
    # Whoever asks has no key: what the database says, and where it lies, is in the log alone.
    assert error(client.get("/readyz"), 503) == "the event log is away"
    assert "not ready: the disk is full; free some space" in caplog.text
    assert error(client.post("/v1/recommend", json={"user": "u"}), 503)
    assert recommend(client, history=["i1"], k=40) == every
    log.writes = log.reads = False
    assert client.put("/v1/items", json=item).status_code == 200
    assert client.post("/v1/events", json={"events": [event]}).json()["stored"] == 1
    assert "n1" in recommend(client, history=["i1"], k=40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "treatment"}, "events.0: an arm without its experiment; give both"),
        ({"experiment": "x"}, "events.0: an experiment without the arm; give both"),
        ({"timestamp": time.time() + 90_000}, "events.0.timestamp: "),
        ({"timestamp": 1e10}, "events.0.timestamp: 10000000000 is more than a day ahead of"),
        ({"timestamp": "5"}, "events.0.timestamp: Input should be a valid number"),
        ({"timestamp": True}, "events.0.timestamp: Input should be a valid number"),
        ({"id": 5}, "events.0.id: Input should be a valid string"),
        ({"id": "a\tb"}, "events.0.id: a control character; leave it out"),
    ],
)
def test_events_that_are_refused(change: Any, message: str, serve: Serve) -> None:
    event = {"id": "a", "user": "u", "item": "i1", "type": "click", **change}
    client = serve()
    answer = client.post("/v1/events", json={"events": [event]})
    assert error(answer, 422).startswith(message)
    fine = event | {"id": "b", "experiment": None, "arm": None, "timestamp": int(time.time()) + 60}
    assert client.post("/v1/events", json={"events": [fine]}).json()["stored"] == 1


# -- limits --------------------------------------------------------------------------------------


class HeldUp:
    """The thread of the models does not go on until the end."""

    def __init__(self, client_or_app: Any) -> None:
        self._app = getattr(client_or_app, "app", client_or_app)
        self._go = threading.Event()

    def __enter__(self) -> None:
        started = threading.Event()

        def wait() -> None:
            started.set()
            assert self._go.wait(30)

        self._app.state.worker.put(wait)
        assert started.wait(30)

    def __exit__(self, *_: Any) -> None:
        self._go.set()


def test_overload_is_refused_at_once_and_ends(catalog_run: Finished, log_url: str) -> None:
    async def main() -> None:
        async with running(catalog_run.run, log_url, queue=0.2) as (app, client):

            async def ask(number: int) -> httpx.Response:
                body = {"history": [f"i{number % 30}", f"i{number % 7}"]}
                return await client.post("/v1/recommend", json=body)

            with HeldUp(app):
                early = [asyncio.ensure_future(ask(n)) for n in range(4)]
                await asyncio.sleep(0.5)  # a batch that takes so long says what the next would
                late = await asyncio.gather(*(ask(n) for n in range(5, 60)))
                assert {answer.status_code for answer in late} == {503}
                for answer in late:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert "s of work wait for the model thread; try again in" in answer.text
            answers = await asyncio.gather(*early)
            assert [answer.status_code for answer in answers] == [200] * 4
            again = await asyncio.gather(*(ask(n) for n in range(4)))
            assert [answer.status_code for answer in again] == [200] * 4
            assert not app.state.service.encoding.busy

    asyncio.run(main())


def test_embeddings_and_explanations_yield_to_recommendations(
    catalog_run: Finished, log_url: str
) -> None:
    """Slices of at most so many tokens; a recommendation comes before the next one."""

    async def main() -> None:
        async with running(catalog_run.run, log_url, slice_tokens=24, rate=0) as (app, client):
            service = app.state.service
            ran: list[tuple[str, int]] = []

            def watch(kind: str, batcher: Any) -> None:
                plain = batcher._run

                def run(jobs: Any) -> Any:
                    ran.append((kind, len(jobs)))
                    return plain(jobs)

                batcher._run = run

            watch("recommend", service.encoding)
            watch("history", service.encoding_later)
            watch("text", service.embedding)
            texts = ["heavy red hat " * 700] * 9
            histories = [[f"i{n}", f"i{n + 1}"] for n in range(20)]
            asked = [
                ("/v1/embed/items", {"texts": texts}),
                ("/v1/embed/users", {"histories": histories}),
                ("/v1/explain", {"history": [f"i{n}" for n in range(12)], "item": "i20"}),
            ]
            with HeldUp(app):
                long = [asyncio.ensure_future(client.post(p, json=b)) for p, b in asked]
                await asyncio.sleep(0.1)
                short = asyncio.ensure_future(
                    client.post("/v1/recommend", json={"history": ["i3"]})
                )
                await asyncio.sleep(0.1)
                assert not ran
            assert (await short).status_code == 200
            assert [(await answer).status_code for answer in long] == [200] * 3
            # The thread was held up before the first slice: the recommendation comes first.
            assert ran[0] == ("recommend", 1)
            assert {("text", 1)} == {one for one in ran if one[0] == "text"}  # a slice each
            assert sum(n for kind, n in ran if kind == "text") == 9
            assert sum(n for kind, n in ran if kind == "history") == 20 + 13
            most = max(n for kind, n in ran if kind == "history")
            assert most < 13  # of two items each, or of eleven

    asyncio.run(main())


def slices_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Watch how many items are embedded at once."""
    made: list[int] = []
    plain = Version.with_items

    def with_items(self: Version, items: Any) -> Version:
        made.append(len(items))
        return plain(self, items)

    monkeypatch.setattr(Version, "with_items", with_items)
    return made


def test_items_are_put_in_slices(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(slice_tokens=8)
    made = slices_made(monkeypatch)
    items = [{"id": f"n{n}", "text": "heavy red hat"} for n in range(7)]
    assert client.put("/v1/items", json={"items": items}).status_code == 200
    assert made == [2, 2, 2, 1]
    assert {f"n{n}" for n in range(7)} <= set(recommend(client, history=["i1"], k=100))


def test_items_of_other_servers_are_taken_over_in_slices(
    catalog_run: Finished, log_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, other = EventLog(log_url), EventLog(log_url)
    made = slices_made(monkeypatch)

    async def main() -> None:
        live = Live(load_version(catalog_run.run))
        service = Service(Settings(slice_tokens=8), live, log)
        other.put_items({f"n{n}": ("heavy red hat", {}) for n in range(7)})
        other.delete_items(["i4"])
        assert await service.sync() and made == [2, 2, 2, 1]
        assert live.version.serves("n6") and not live.version.serves("i4")
        made.clear()
        other.put_items({"n7": ("heavy red hat", {})})
        assert await service.sync() and made == [1], "what it has already is no work"
        await service.replace("live", load_version(catalog_run.run))
        assert made == [1, 2, 2, 2, 2] and live.version.serves("n7")
        await service.close()

    asyncio.run(main())


def test_items_that_storage_refused_take_room_once(serve: Serve, log_url: str) -> None:
    log = Broken(EventLog(log_url))
    client = serve(log=log, new_items=3, sync=0.01)
    items = {"items": [{"id": f"n{n}", "text": "heavy red hat"} for n in range(3)]}
    log.writes = True
    for _ in range(3):
        assert error(client.put("/v1/items", json=items), 503)
        time.sleep(0.05)  # what other servers have stored is looked for meanwhile
    log.writes = False
    assert client.put("/v1/items", json=items).json()["changes"] == dict.fromkeys(
        ("n0", "n1", "n2"), "new"
    )
    assert {"n0", "n1", "n2"} <= set(recommend(client, history=["i1"], k=40))
    assert client.get("/v1/live").json()["added"] == 3
    more = {"items": [{"id": "n3", "text": "heavy red hat"}]}
    assert error(client.put("/v1/items", json=more), 409).startswith("3 rows were added")


def test_one_key_leaves_room_for_others(catalog_run: Finished, log_url: str) -> None:
    keys = (SecretStr("a" * 16), SecretStr("b" * 16))

    async def main() -> None:
        async with running(catalog_run.run, log_url, inflight=4, read_keys=keys) as (app, client):

            async def ask(key: str) -> httpx.Response:
                headers = {"Authorization": f"Bearer {key * 16}"}
                body = {"history": ["i1"]}
                return await client.post("/v1/recommend", json=body, headers=headers)

            with HeldUp(app):
                many = [asyncio.ensure_future(ask("a")) for _ in range(2)]
                await asyncio.sleep(0.05)
                assert error(await ask("a"), 503) == (
                    "2 requests of this key are being answered already"
                )
                other = asyncio.ensure_future(ask("b"))
                await asyncio.sleep(0.05)
                assert not other.done()
            assert [(await one).status_code for one in (*many, other)] == [200] * 3
            assert (await ask("a")).status_code == 200

    asyncio.run(main())


def test_more_requests_than_may_be_in_flight(catalog_run: Finished, log_url: str) -> None:
    async def main() -> None:
        async with running(catalog_run.run, log_url, inflight=3) as (app, client):

            async def ask(path: str) -> httpx.Response:
                return await client.post(path, json={"history": ["i1"]})

            with HeldUp(app):
                waiting = [asyncio.ensure_future(ask("/v1/recommend")) for _ in range(3)]
                await asyncio.sleep(0.05)
                for path in ("/v1/recommend", "/v1/events"):
                    answer = await ask(path)
                    assert error(answer, 503) == "3 requests are being answered already"
                    assert answer.headers["retry-after"] == "1"
                assert (await client.get("/livez")).status_code == 200  # probes come through
            assert [a.status_code for a in await asyncio.gather(*waiting)] == [200] * 3
            assert (await ask("/v1/recommend")).status_code == 200

    asyncio.run(main())


def test_a_request_that_takes_too_long(serve: Serve) -> None:
    client = serve(timeout=0.05)
    with HeldUp(client):
        answer = client.post("/v1/recommend", json={"history": ["i1"]})
        assert error(answer, 503) == "no answer within 0.05 s; try again"
        assert answer.headers["retry-after"] == "1"
    assert metric(client, "l2rec_refused_total", reason="timeout") == 1


def test_rate_of_a_key(serve: Serve) -> None:
    client = serve(rate=60)
    # 64 texts cost what the model reads of them, on top of their bytes.
    texts = ["heavy red hat " * 20] * 64
    assert client.post("/v1/embed/items", json={"texts": texts}).status_code == 200
    answer = client.post("/v1/recommend", json={"history": ["i1"]})
    assert error(answer, 429) == "more than 60 tokens a minute"
    read = 64 * (1 + len(texts[0]) // 4)
    assert read < int(answer.headers["retry-after"]) < 2 * read
    assert client.get("/livez").status_code == 200  # probes have no rate


def test_a_cached_history_costs_next_to_nothing(serve: Serve) -> None:
    client = serve(rate=10_000)
    bucket = []
    for _ in range(3):
        client.post("/v1/recommend", json={"history": [f"i{n}" for n in range(6)]})
        guard: Any = client.app.middleware_stack  # type: ignore[attr-defined]
        while not hasattr(guard, "_limit"):
            guard = guard.app
        bucket.append(guard._limit._bucket(0).tokens)
    first, second = bucket[0] - bucket[1], 10_000 - bucket[0]
    assert first < 20 < second


def test_a_locked_database_is_named_before_the_request_is_given_up(
    serve: Serve, log_url: str
) -> None:
    log = EventLog(log_url, busy=0.3)
    client = serve(log=log, timeout=30)
    event = {"id": "e0", "user": "u", "item": "i1", "type": "click"}
    assert client.post("/v1/events", json={"events": [event]}).status_code == 200
    with sqlite3.connect(log_url.removeprefix("sqlite:///")) as other:
        other.execute("BEGIN IMMEDIATE")
        # More writers than there are threads for storage, and none of them keeps a reader waiting.
        with ThreadPoolExecutor(12) as threads:
            writes = [
                threads.submit(
                    client.post, "/v1/events", json={"events": [event | {"id": f"e{n + 1}"}]}
                )
                for n in range(12)
            ]
            assert recommend(client, user="u", k=3)
            for write in writes:
                answer = write.result()
                assert "database is locked" in error(answer, 503)
                assert answer.headers["retry-after"] == "5"
    assert client.post("/v1/events", json={"events": [event | {"id": "e99"}]}).status_code == 200
    assert metric(client, "l2rec_storage_failures_total", call="append") == 12


# -- probes and headers --------------------------------------------------------------------------


def test_ready_is_a_real_inference(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    assert client.get("/readyz").json()["status"] == "ready"
    service: Any = client.app.state.service  # type: ignore[attr-defined]

    def fresh() -> Any:
        service._ready = None
        return client.get("/readyz")

    with monkeypatch.context() as patch:
        patch.setattr("l2rec.service.serving.READY_SECONDS", 0.05)
        with HeldUp(client):
            assert error(fresh(), 503) == "the model gave no answer within 0.05 s"
            assert client.get("/livez").status_code == 200
    assert fresh().status_code == 200
    predictor = service.live.version.predictor
    encode = predictor.encode

    def broken(rows: Ragged) -> Encoded:
        encoded = encode(rows)
        return replace(encoded, vectors=encoded.vectors * float("nan"))

    monkeypatch.setattr(predictor, "encode", broken)
    assert error(fresh(), 503) == "the model cannot infer: ArithmeticError"
    assert client.get("/livez").json()["status"] == "alive"


def test_ready_is_the_model_that_was_trained(
    serve: Serve, catalog_run: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(catalog_run.run)
    assert client.get("/readyz").status_code == 200
    service: Any = client.app.state.service  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in service.live.version.predictor.model.named_parameters():
            if name.startswith("experts."):
                parameter.zero_()
    service._ready = None
    message = error(client.get("/readyz"), 503)
    assert message == "the model is not the one that was trained"
    assert "not ready: user vectors differ" in caplog.text
    assert client.post("/v1/recommend", json={"history": ["i1"]}).status_code == 200


def test_a_second_probe_shares_the_answer_of_the_first(serve: Serve) -> None:
    client = serve()
    calls = 0
    worker: Any = client.app.state.worker  # type: ignore[attr-defined]
    run = worker.run

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return await run(*args, **kwargs)

    worker.run = counted
    for _ in range(20):
        assert client.get("/readyz").status_code == 200
    assert calls == 1


def test_headers_of_every_answer(serve: Serve) -> None:
    client = serve()
    for answer in (client.get("/livez"), client.get("/nothing"), client.post("/v1/recommend")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "server" not in answer.headers


def test_labels_of_metrics_are_few(serve: Serve) -> None:
    client = serve()
    for n in range(30):
        client.get(f"/v1/nothing/{n}")
        client.request(f"METHOD{n}", "/livez")
        client.delete("/v1/items", params={"id": f"x{n}"})
        client.get(f"/v1/experiments/e{n}")
    recommend(client, history=["i1"])
    page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    lines = page.text.splitlines()
    requests = [line for line in lines if line.startswith("l2rec_requests_total")]
    assert len(requests) < 12
    assert metric(client, "l2rec_requests_total", route="other", status="404") == 30
    assert metric(client, "l2rec_requests_total", route="/v1/recommend", status="200") == 1
    assert metric(client, "l2rec_recommendations_total", arm="none") == 1
    assert metric(client, "l2rec_version_info", role="live", name="catalog") == 1


# -- experiments ---------------------------------------------------------------------------------


def test_arms(catalog_run: Finished, other_run: Finished, log_url: str) -> None:
    log = EventLog(log_url)
    live = Live(load_version(catalog_run.run), control=load_version(other_run.run))
    assert live.control is not None
    running_now = Experiment(name="exp", treatment=0.4, salt="s")
    app = create_app(Settings(rate=0, experiment=running_now), live, log)
    versions = {"treatment": live.version.version, "control": live.control.version}
    with TestClient(app, base_url="http://localhost") as client:
        for n in range(30):
            body = {"user": f"u{n}", "history": ["i1", "i2"], "k": 5}
            answer = client.post("/v1/recommend", json=body).json()
            arm = assign(f"u{n}", "exp", salt="s", treatment=0.4)
            assert answer["experiment"] == {"name": "exp", "arm": arm}
            assert answer["version"] == versions[arm]
            run = catalog_run if arm == "treatment" else other_run
            expected = load(run.run).recommend(["i1", "i2"], 5) if n < 6 else None
            if expected is not None:
                assert [i["id"] for i in answer["items"]] == [i["id"] for i in expected.items]
        nobody = client.post("/v1/recommend", json={"history": ["i1"]}).json()
        assert nobody["experiment"] is None and nobody["version"] == versions["treatment"]
        named = {"history": ["i1"], "experiment": "exp"}
        assert error(client.post("/v1/recommend", json=named), 422).startswith("experiment: arms")
        other = {"user": "u1", "history": ["i1"], "experiment": "no"}
        assert error(client.post("/v1/recommend", json=other), 404) == (
            "no experiment 'no' ('exp' runs)"
        )
        arms = {
            arm: metric(client, "l2rec_recommendations_total", arm=arm)
            for arm in ("treatment", "control", "none")
        }
        assert arms["none"] == 1 and arms["treatment"] > 3 and arms["control"] > 3
        # A new item enters both arms.
        client.put("/v1/items", json={"items": [{"id": "n1", "text": "heavy red hat"}]})
        for n in range(8):
            assert "n1" in recommend(client, user=f"u{n}", history=["i1"], k=40)


def test_a_summary_that_failed_is_made_anew(serve: Serve, log_url: str) -> None:
    log = Broken(EventLog(log_url))
    client = serve(log=log, experiment=Experiment(name="exp", treatment=0.3))
    log.writes = log.reads = True
    assert error(client.get("/v1/experiments/exp"), 503)
    log.writes = log.reads = False
    assert client.get("/v1/experiments/exp").json()["reason"] == "no events of it yet"


def test_an_experiment_is_summed_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2rec.service.routes.events.SUMMARY_SECONDS", 0.0)
    client = serve(experiment=Experiment(name="exp", treatment=0.3))
    empty = client.get("/v1/experiments/exp").json()
    assert empty["running"] and empty["treatment"] == 0.3 and empty["events"] == 0
    assert empty["result"] is None and empty["reason"] == "no events of it yet"
    assert error(client.get("/v1/experiments/other"), 404).startswith("no experiment 'other': ")
    events = []
    for n in range(40):
        answer = client.post("/v1/recommend", json={"user": f"u{n}", "history": ["i1"]}).json()
        common = {"user": f"u{n}", "request": answer["request"], "experiment": "exp"}
        common |= {"arm": answer["experiment"]["arm"], "item": answer["items"][0]["id"]}
        events.append(common | {"id": f"x{n}", "type": "exposure"})
        if n % 3 == 0:
            events.append(common | {"id": f"c{n}", "type": "click"})
    # One user alone is too few to conclude anything.
    client.post("/v1/events", json={"events": events[:1]})
    few = client.get("/v1/experiments/exp").json()
    assert few["events"] == 1 and few["result"] is None and few["reason"]
    client.post("/v1/events", json={"events": events})
    found = client.get("/v1/experiments/exp").json()
    assert found["events"] == len(events) and found["reason"] is None
    log: EventLog = client.app.state.log  # type: ignore[attr-defined]
    table = pl.concat([pl.from_arrow(batch) for batch in log.read()])  # type: ignore[type-var]
    expected = analyze(table, "exp", treatment=0.3)
    assert found["result"]["metrics"].keys() == expected["metrics"].keys()
    assert found["result"]["experiment"] == "exp"
    # Of an experiment that no longer runs, the events still tell.
    past = serve().get("/v1/experiments/exp").json()
    assert not past["running"] and past["events"] == len(events) and past["result"]
    assert past["treatment"] is None and past["result"]["sample_ratio"]["mismatch"] is None
    log.plan("exp", salt="", treatment=0.3, at=1.0)  # as `l2rec serve` does when it starts
    known = serve().get("/v1/experiments/exp").json()
    assert known["treatment"] == known["result"]["sample_ratio"]["planned"] == 0.3
