"""The page: its routes, exact reasons, and a real browser that uses it with the keyboard alone."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from tests.unit.conftest import Finished

from l2rec.errors import DataError
from l2rec.runs import load
from l2rec.service.app import create_app
from l2rec.service.events import Event, EventLog
from l2rec.service.explain import explain
from l2rec.service.live import Live
from l2rec.service.settings import Settings
from l2rec.service.version import Version, load_version

Serve = Callable[..., TestClient]


@pytest.fixture(scope="module")
def version(prior_run: Finished) -> Version:
    return load_version(prior_run.run)


# ------------------------------------------------------------------------------- reasons


def test_what_is_left_out_is_as_if_it_had_never_been(version: Version, prior_run: Finished) -> None:
    history, item = list(version.ids[:4]), version.ids[9]
    found = explain(version, history, item)
    predictor = load(prior_run.run)

    def score(of: list[str]) -> float:
        ranked = predictor.recommend(of, len(version), exclude_seen=False)
        return float(next(i["score"] for i in ranked.items if i["id"] == item))

    assert found["score"] == pytest.approx(score(history), abs=1e-4)
    for place, one in enumerate(found["without"]):
        assert one["id"] == history[place]
        left = history[:place] + history[place + 1 :]
        assert one["score"] == pytest.approx(score(left), abs=1e-4)
    assert 0 <= found["gate"] <= 1
    assert found["experts"].keys() == {"semantic", "behavioral"}
    for loads in found["experts"].values():
        assert len(loads) == len(found["matrices"])
        np.testing.assert_allclose(np.sum(loads, axis=1), 1.0, atol=0.01)


def test_a_history_of_one_and_a_method_without_experts(
    version: Version, chains: Any, tmp_path: Path
) -> None:
    (only,) = explain(version, [version.ids[3]], version.ids[4])["without"]
    assert only["id"] == version.ids[3] and only["score"] is None
    with pytest.raises(DataError, match="unknown item id: 'nothing'"):
        explain(version, [version.ids[3]], "nothing")
    from tests.unit.tiny_run import Quiet

    from l2rec.config import load_recipe
    from l2rec.runs import train_run

    config = load_recipe("sasrec", ["training.max_steps=2"])
    train_run(config, chains.path, tmp_path / "sasrec", progress=Quiet())
    other = load_version(tmp_path / "sasrec")
    found = explain(other, list(other.ids[:3]), other.ids[5])
    assert found["gate"] is None and found["experts"] == {} and len(found["without"]) == 3


# ------------------------------------------------------------------------------- routes


def test_search_items_and_neighbours(serve: Serve, version: Version) -> None:
    client = serve()
    text = version.texts[3]
    found = client.get("/v1/items", params={"q": text.upper()}).json()
    assert version.ids[3] in [item["id"] for item in found["items"]] and found["total"] >= 1
    assert client.get("/v1/items", params={"q": "no such words"}).json()["total"] == 0
    pages = [client.get("/v1/items", params={"limit": 5, "offset": n}).json() for n in (0, 5)]
    ids = [item["id"] for page in pages for item in page["items"]]
    assert len(set(ids)) == 10 and pages[0]["total"] == len(version)
    assert client.get(f"/v1/items/{version.ids[3]}").json()["text"] == text
    near = client.get(f"/v1/items/{version.ids[3]}/neighbours", params={"k": 4}).json()["items"]
    matrix = client.app.state.live.current().matrix  # type: ignore[attr-defined]
    cosines = (matrix @ matrix[3]).numpy()
    best = [version.ids[r] for r in np.argsort(-cosines, kind="stable") if r != 3][:4]
    assert [item["id"] for item in near] == best
    client.request("DELETE", "/v1/items", params={"id": best[0]})
    again = client.get(f"/v1/items/{version.ids[3]}/neighbours", params={"k": 4}).json()["items"]
    assert best[0] not in [item["id"] for item in again]
    assert client.get(f"/v1/items/{best[0]}").status_code == 404
    assert client.get("/v1/items", params={"q": best[0]}).json()["total"] == 0
    for path in ("/v1/items/none", "/v1/items/none/neighbours", "/v1/users/none"):
        assert client.get(path).status_code == 404 and "error" in client.get(path).json()
    for query in ("limit=0", "limit=101", "offset=-1", "q=" + "x" * 300):
        assert client.get(f"/v1/items?{query}").status_code == 422


def test_users_come_from_the_log(serve: Serve, version: Version, log_url: str) -> None:
    client, log = serve(), EventLog(log_url)
    log.append(
        [Event(f"e{n}", "ann", item, "click", float(n)) for n, item in enumerate(version.ids[:3])]
    )
    log.close()
    assert client.get("/v1/users", params={"q": "a"}).json() == {"users": ["ann"]}
    found = client.get("/v1/users/ann").json()
    assert [item["id"] for item in found["items"]] == list(version.ids[:3])


def test_what_is_live(serve: Serve, table_run: Finished) -> None:
    live = serve().get("/v1/live").json()
    assert live["method"] == "L2Rec" and live["recipe"] == "tiny" and live["gate"] is True
    assert set(live["scores"]) >= {"recall@10", "ndcg@10"} and live["index"] == "exact"
    assert live["name"] == table_run.run.name and live["fingerprint"]


def test_reasons_by_route(serve: Serve, version: Version) -> None:
    client = serve()
    body = {"history": list(version.ids[:3]), "item": version.ids[7]}
    found = client.post("/v1/explain", json=body).json()
    assert len(found["without"]) == 3 and found["version"]
    for wrong in ({"item": "x"}, {"history": []}, {"more": 1}):
        answer = client.post("/v1/explain", json=body | wrong)
        assert answer.status_code == 422 and "error" in answer.json()


def test_files_and_keys(serve: Serve) -> None:
    client = serve(read_keys=("r",), write_keys=("w",))
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith(
        "default-src 'none'; script-src 'self'"
    )
    for name, kind in (("app.js", "javascript"), ("style.css", "text/css")):
        file = client.get(f"/static/{name}")
        assert file.status_code == 200 and kind in file.headers["content-type"]
        again = client.get(f"/static/{name}", headers={"if-none-match": file.headers["etag"]})
        assert again.status_code == 304
    assert "<script>" not in page.text and "style=" not in page.text
    assert client.get("/static/../page.py").status_code in (401, 404)
    for path in ("/v1/live", "/v1/items", "/v1/users"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"authorization": "Bearer r"}).status_code == 200


# ------------------------------------------------------------------------------- a real browser

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def address(prior_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server in a thread."""
    import uvicorn

    version = load_version(prior_run.run)
    log = EventLog(f"sqlite:///{tmp_path_factory.mktemp('log') / 'events.db'}")
    log.append([Event("e", "walter", version.ids[1], "click", 1.0)])
    app = create_app(Settings(rate=0), Live(version), log)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=chromium, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An open page; what its console says, a broken policy included, fails the test."""
    options = getattr(request, "param", {"viewport": {"width": 1280, "height": 900}})
    context = browser.new_context(**options)
    made, said = context.new_page(), []
    made.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    made.goto(address)
    made.wait_for_selector("#live:not(:empty)")
    yield made
    assert not said
    context.close()


def add(page: Any, words: str) -> None:
    before = page.locator("#history li").count()
    page.fill("#search", words)
    page.wait_for_selector("#found li[role=option]")
    page.keyboard.press("Enter")
    page.wait_for_function("n => document.querySelectorAll('#history li').length > n", arg=before)
    page.wait_for_selector("#results .row")


def test_from_nothing_to_reasons_by_keyboard(page: Any, version: Version) -> None:
    assert page.locator("#empty").is_visible()
    add(page, version.texts[2])
    add(page, version.texts[5])
    assert page.locator("#history li").count() == 2
    page.focus("#results .row")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#why:not([hidden])")
    why = page.locator("#why")
    assert "δ" in why.inner_text() and why.locator("svg.heat").count() == 2
    assert why.locator(".effects .side").count() == 2 and why.locator(".near li").count() == 6
    page.focus("#results .row")
    page.keyboard.press("a")
    page.wait_for_function("document.querySelectorAll('#history li').length === 3")
    page.focus("#history li")
    page.keyboard.press("Alt+ArrowDown")
    first = page.locator("#history li .id").all_inner_texts()
    page.keyboard.press("Delete")
    page.wait_for_function("document.querySelectorAll('#history li').length === 2")
    assert page.locator("#history li .id").all_inner_texts() == [first[0], first[2]]
    shared = page.url
    page.goto("about:blank")
    page.goto(shared)  # what is seen can be shared
    page.wait_for_selector("#results .row")
    assert page.locator("#history li .id").all_inner_texts() == [first[0], first[2]]
    page.focus("#search")
    page.keyboard.press("Backspace")
    page.wait_for_function("document.querySelectorAll('#history li').length === 1")


def test_a_user_brings_a_history(page: Any, version: Version) -> None:
    page.keyboard.press("/")
    add(page, "walt")
    assert page.locator("#history li .id").all_inner_texts() == [version.ids[1]]


@pytest.mark.parametrize(
    "page",
    [
        {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
        {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"},
    ],
    indirect=True,
    ids=["light", "dark"],
)
def test_on_a_phone_in_light_and_dark(page: Any, version: Version) -> None:
    add(page, version.texts[2])
    page.locator("#results .row").first.click()
    page.wait_for_selector("#why:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    other = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert {ground, other} == {"rgb(251, 251, 250)", "rgb(20, 21, 24)"}
