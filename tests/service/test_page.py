"""The page: its routes by what they answer, and a real browser that uses it as people do."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient
from tests.support.browser import PHONE, TABLET, Open, Server, contrast
from tests.support.runs import Finished
from tests.support.service import READ_KEY, Serve, error

from l2rec.data.dataset import Dataset
from l2rec.errors import StorageError
from l2rec.runs.predictor import load
from l2rec.service import explain
from l2rec.service.events import Event, EventLog
from l2rec.service.experiments import record_arms, record_plan
from l2rec.service.live import Live
from l2rec.service.loading import load_version
from l2rec.service.routes.page import FILES
from l2rec.service.search import Items, plain
from l2rec.service.settings import Experiment
from l2rec.studies.abtest.analysis import conclude
from l2rec.studies.abtest.simulate import events_of, simulate


def get(client: TestClient, path: str, **params: Any) -> Any:
    answer = client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(found: Any) -> list[str]:
    return [item["id"] for item in found["items"]]


def put(client: TestClient, **texts: str) -> None:
    body = {"items": [{"id": i, "text": text} for i, text in texts.items()]}
    assert client.put("/v1/items", json=body).status_code == 200


# -- files ---------------------------------------------------------------------------------------


def test_the_page_and_its_files(serve: Serve) -> None:
    client = serve(read_keys=(SecretStr(READ_KEY),))
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    kinds = {f.name: types[f.suffix] for f in FILES.iterdir() if f.suffix in types}
    assert {"app.js", "style.css", "icon.svg"} <= set(kinds)
    files = {"/": "text/html"} | {f"/static/{name}": kind for name, kind in kinds.items()}
    for path, kind in files.items():
        file = client.get(path)
        assert file.headers["content-type"] == f"{kind}; charset=utf-8"
        assert file.headers["cache-control"] == "no-cache"
        assert "unsafe" not in file.headers["content-security-policy"]
        same = client.get(path, headers={"if-none-match": file.headers["etag"]})
        assert same.status_code == 304 and not same.content
        head = client.head(path)
        assert head.status_code == 200 and not head.content
    for name in kinds:
        assert f"static/{name}" in page.text  # no other place
    for inline in ("<script>", "<style", "style=", "onclick=", "http://", "https://"):
        assert inline not in page.text
    for path in ("/static/../page.py", "/static/%2e%2e/page.py", "/static/", "/static/none.js"):
        assert client.get(path).status_code in (401, 404), path


# -- live ----------------------------------------------------------------------------------------


def test_what_is_live(serve: Serve, catalog_run: Finished) -> None:
    version = load_version(catalog_run.run)
    client = serve(experiment=Experiment(name="plus", treatment=0.25))
    live = get(client, "/v1/live")
    assert live["name"] == catalog_run.run.name and live["version"] == version.version
    assert live["method"] == "L2Rec" and live["recipe"] == "tiny" and live["index"] == "exact"
    assert live["data"]["fingerprint"] == version.report["dataset"]["fingerprint"]
    assert live["data"]["users"] == 40 and live["items"] == 30 and live["added"] == 0
    assert next(iter(live["scores"])) == "L2Rec" and "popularity" in live["scores"]
    assert live["scores"]["L2Rec"]["recall@10"] == version.report["scores"]["L2Rec"]["recall@10"]
    assert live["can"] == {"gate": True, "experts": True, "neighbours": True}
    assert live["experiment"] == {"name": "plus", "treatment": 0.25}
    assert live["shadow"] is live["control"] is live["refused"] is None
    put(client, n1="something new")
    client.request("DELETE", "/v1/items", params={"id": ["i1", "i2"]})
    live = get(client, "/v1/live")
    assert live["items"] == 29 and live["added"] == 1


def test_what_is_held_beside_it(serve: Serve, catalog_run: Finished, other_run: Finished) -> None:
    client = serve()
    held: Live = client.app.state.live  # type: ignore[attr-defined]
    held.shadow = load_version(other_run.run)
    held.refuse(Path("/somewhere/bad"), "/somewhere/bad/model.safetensors: torn")
    live = get(client, "/v1/live")
    assert live["shadow"] == {"name": "other", "version": held.shadow.version}
    assert live["refused"]["run"] == "bad"
    assert live["refused"]["reason"] == "bad/model.safetensors: torn"


def test_a_method_that_has_neither_gate_nor_experts(serve: Serve, sasrec_run: Path) -> None:
    client = serve(sasrec_run)
    can = get(client, "/v1/live")["can"]
    assert can["gate"] is False and can["experts"] is False
    found = client.post("/v1/explain", json={"history": ["i1", "i2"], "item": "i7"}).json()
    assert found["gate"] is None and found["experts"] is None and found["added"] is None
    assert all(one["score"] is not None for one in found["history"])


# -- items ---------------------------------------------------------------------------------------


def test_items_by_words(serve: Serve) -> None:
    client = serve()
    put(
        client,
        c1="Cooking salmon at home",
        c2="Salmon, whole",
        c3="The book of Pokémon",
        c4="Salmonella: a handbook",
        c5="Atlas of rivers, with the whole of the salmon's way",
    )
    assert ids(get(client, "/v1/items", q="salmon")) == ["c2", "c1", "c5", "c4"]
    assert ids(get(client, "/v1/items", q="whole SALMON")) == ["c2", "c5"]
    assert ids(get(client, "/v1/items", q="monella")) == ["c4"]  # within a word, too
    assert ids(get(client, "/v1/items", q="pokemon")) == ["c3"]
    assert ids(get(client, "/v1/items", q="C3"))[0] == "c3"
    assert get(client, "/v1/items", q="salmon nowhere") == {"items": [], "total": 0}
    found = get(client, "/v1/items", q="salmon", limit=2, offset=1)
    assert ids(found) == ["c1", "c5"] and found["total"] == 4


def test_all_items_and_those_of_some_ids(serve: Serve) -> None:
    client = serve()
    assert get(client, "/v1/items")["total"] == get(client, "/v1/items", q=" .,-")["total"] == 30
    pages = [ids(get(client, "/v1/items", limit=20, offset=n)) for n in (0, 20, 40)]
    assert [len(page) for page in pages] == [20, 10, 0]
    assert len({i for page in pages for i in page}) == 30
    assert ids(get(client, "/v1/items", id=["i9", "nobody", "i2"])) == ["i9", "i2"]
    client.request("DELETE", "/v1/items", params={"id": "i9"})
    assert ids(get(client, "/v1/items", id=["i9", "i2"])) == ["i2"]
    assert "i9" not in ids(get(client, "/v1/items", q="i9"))
    assert get(client, "/v1/items")["total"] == 29
    text = get(client, "/v1/items/i2")["text"]
    put(client, i2="quite another text")
    assert get(client, "/v1/items/i2")["text"] == "quite another text" != text
    assert ids(get(client, "/v1/items", q="quite another")) == ["i2"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "offset=-1", "k=1&limit=x", "q=" + "x" * 201, "id="]
)
def test_limits_of_a_search(query: str, serve: Serve) -> None:
    error(serve().get(f"/v1/items?{query}"), 422)


def test_an_item(serve: Serve, catalog_run: Finished) -> None:
    client, version = serve(), load_version(catalog_run.run)
    found = get(client, "/v1/items/i5")
    assert found == {
        "id": "i5",
        "text": version.texts[5],
        "title": version.attributes_of(5)["title"],
        "labels": [],
        "image": None,
        "link": None,
        "attributes": version.attributes_of(5),
    }
    put(client, **{"a/b": "an id with a slash"})
    assert get(client, "/v1/items/a%2Fb")["id"] == "a/b"
    assert len(get(client, "/v1/items/a%2Fb/neighbours", k=3)["items"]) == 3
    for path in ("/v1/items/none", "/v1/items/none/neighbours"):
        assert error(client.get(path), 404) == "no item 'none' in catalog"


@pytest.mark.parametrize("name", ["catalog", "sasrec"])
def test_neighbours_are_nearest_by_cosine(
    name: str, serve: Serve, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(f"{name}_run")
    client = serve(getattr(run, "run", run))
    version = client.app.state.live.current()  # type: ignore[attr-defined]
    matrix = version.matrix.numpy()
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    cosines = unit @ unit[3]
    best = [n for n in np.argsort(-cosines, kind="stable") if n != 3]
    found = get(client, "/v1/items/i3/neighbours", k=6)
    assert ids(found) == [version.ids[n] for n in best[:6]] and found["version"] == version.version
    scores = [item["score"] for item in found["items"]]
    assert scores == pytest.approx(cosines[best[:6]].tolist(), abs=1e-5)
    client.request("DELETE", "/v1/items", params={"id": ids(found)[0]})
    assert ids(get(client, "/v1/items/i3/neighbours", k=5)) == ids(found)[1:]
    assert len(get(client, "/v1/items/i3/neighbours", k=100)["items"]) == 28
    error(client.get("/v1/items/i3/neighbours?k=101"), 422)


def test_a_method_without_vectors_has_no_neighbours(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    version = client.app.state.live.current()  # type: ignore[attr-defined]
    version.__dict__["matrix"] = None
    message = error(client.get("/v1/items/i3/neighbours"), 409)
    assert message == "catalog has no item vectors: its method only ranks"
    assert get(client, "/v1/live")["can"]["neighbours"] is False


def test_words_are_compared_plainly() -> None:
    assert plain("  Pokémon — Go! (2016)") == "pokemon go 2016"
    assert plain("Straße_ΑΣ") == "strasse ασ"
    assert plain("¡!") == ""


def test_a_search_grows_with_the_catalog(catalog_run: Finished) -> None:
    version = load_version(catalog_run.run)
    index = Items(version.serial)
    index.extend(version)
    more = version.with_items({"n": ("a walrus", {})})
    index.extend(more)
    assert len(index) == len(more) == 31
    assert index.find(more, "walrus").tolist() == [30]
    assert index.find(version, "walrus").tolist() == []  # of the version before


# -- users ---------------------------------------------------------------------------------------


def test_users_of_the_log_and_of_the_data(serve: Serve, log_url: str, chains: Dataset) -> None:
    client, log = serve(), EventLog(log_url)
    some = [Event(f"e{n}", "u1", f"i{n}", "click", float(n)) for n in range(3)]
    log.append([*some, Event("x", "u1", "gone", "click", 9.0), Event("y", "v", "no", "click", 1.0)])
    log.close()
    found = get(client, "/v1/users", q="u1", limit=100)
    assert found["incomplete"] is None
    assert found["users"][0] == {"id": "u1", "source": "events", "events": None}
    others = {u["id"]: u["events"] for u in found["users"][1:]}
    assert "u1" not in others and others["u10"] == len(chains.sequences[chains.user_index("u10")])
    assert len(get(client, "/v1/users", limit=7)["users"]) == 7
    logged = get(client, "/v1/users/u1")
    assert logged["source"] == "events" and ids(logged) == ["i0", "i1", "i2"]
    assert logged["next"] is None
    data = get(client, "/v1/users/u10")
    events = [chains.item_ids[int(i)].as_py() for i in chains.sequences[chains.user_index("u10")]]
    assert data["source"] == "data" and ids(data) == events[:-1]
    assert data["next"]["id"] == events[-1]
    assert error(client.get("/v1/users/nobody"), 404) == "user 'nobody' has no history here"
    error(client.get("/v1/users/v"), 404)  # nothing of it is in the catalog


def test_the_log_is_away(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()

    def away(*_: Any) -> Any:
        raise StorageError("event log x: away")

    log = client.app.state.log  # type: ignore[attr-defined]
    monkeypatch.setattr(log, "users", away)
    monkeypatch.setattr(log, "history", away)
    found = get(client, "/v1/users", q="u1")
    assert found["incomplete"] == "the event log is away: its users are missing"
    assert found["users"] and all(user["source"] == "data" for user in found["users"])
    assert get(client, "/v1/users/u10")["source"] == "data"
    assert error(client.get("/v1/users/nobody"), 503) == "event log x: away"


def test_the_data_set_is_gone(serve: Serve, catalog_run: Finished, tmp_path: Path) -> None:
    run = shutil.copytree(catalog_run.run, tmp_path / "moved")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(catalog_run.data), str(tmp_path / "none")))
    client = serve(run)
    assert get(client, "/v1/users") == {"users": [], "incomplete": None}
    error(client.get("/v1/users/u10"), 404)


# -- reasons -------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", ["catalog", "blended"])
def test_reasons_are_those_of_the_library(
    items: str, serve: Serve, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(f"{items}_run").run
    client, predictor = serve(run), load(run)
    history = [f"i{n % 29}" for n in range(20)]  # more than wait for the model at a time
    for item in ("i29", "i7", None):
        expected = explain.explain(predictor, history, item)
        body = {"history": history} | ({} if item is None else {"item": item})
        answer = client.post("/v1/explain", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["item"]["id"] == expected.item and found["version"] == predictor.version
        assert found["score"] == pytest.approx(expected.score, abs=1e-5)
        assert found["gate"] == pytest.approx(expected.gate, abs=1e-5)
        assert found["added"] == pytest.approx(expected.added, abs=1e-5)
        assert [one["id"] for one in found["history"]] == history
        scores = [one["score"] for one in found["history"]]
        assert scores == pytest.approx(expected.without, abs=1e-5)
        assert expected.experts is not None
        assert found["experts"]["shares"] == expected.experts.shares
        assert found["experts"]["matrices"] == expected.experts.matrices
        assert found["experts"]["labels"] == ["1 q", "1 v", "2 q", "2 v"]


def test_of_a_long_history_the_newest_items_are_left_out(serve: Serve) -> None:
    history = [f"i{n % 30}" for n in range(70)]
    found = serve().post("/v1/explain", json={"history": history, "item": "i5"}).json()
    known = [one["score"] is not None for one in found["history"]]
    assert known == [False] * (70 - explain.MOST) + [True] * explain.MOST


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"history": []}, 422, "history: List should have at least 1 item"),
        ({"history": ["i1"] * 501}, 422, "history: List should have at most 500 items"),
        ({"history": ["i1"], "item": "zz"}, 422, "unknown item ids: 'zz'"),
        ({"history": ["yy"], "item": "i1"}, 422, "unknown item ids: 'yy'"),
        ({"history": ["i1"], "k": 1}, 422, "k: Extra inputs are not permitted"),
        ({"history": [f"i{n}" for n in range(30)]}, 404, "nothing is left to recommend"),
    ],
)
def test_what_cannot_be_explained(body: Any, status: int, message: str, serve: Serve) -> None:
    assert error(serve().post("/v1/explain", json=body), status).startswith(message)


# -- a real browser ------------------------------------------------------------------------------


def chips(page: Any) -> list[str]:
    return [
        str(i)
        for i in page.eval_on_selector_all("#history .open", "all => all.map(n => n.dataset.id)")
    ]


def wait_for_chips(page: Any, expected: list[str]) -> None:
    page.wait_for_function(
        "wanted => JSON.stringify([...document.querySelectorAll('#history .open')]"
        ".map(n => n.dataset.id)) === JSON.stringify(wanted)",
        arg=expected,
    )


def wait_for_ranking(page: Any, rows: int = 10) -> None:
    page.wait_for_selector("#answer[aria-busy=false] #results .pick")
    page.wait_for_function(f"() => document.querySelectorAll('#results .pick').length === {rows}")


def type_and_enter(page: Any, words: str) -> None:
    page.fill("#search", words)
    page.wait_for_selector("#found [role=option]")
    page.keyboard.press("Enter")


def test_by_keyboard_from_nothing_to_reasons(visit: Open, server: Server) -> None:
    page, version = visit(), server.app.state.live.current()
    page.wait_for_selector("#starts button")
    assert "Whose next items?" in page.inner_text("#answer")
    assert page.evaluate("document.activeElement.id") == "search"
    # Two items, found by what they are called; the second with the arrow keys.
    page.keyboard.type(version.texts[3])
    page.wait_for_selector("#found [aria-selected=true]")
    assert page.get_attribute("#search", "aria-expanded") == "true"
    page.keyboard.press("Enter")
    wait_for_chips(page, ["i3"])
    wait_for_ranking(page)
    page.fill("#search", "i1")
    # The options of the search before stay in the list, hidden, until those of this one are there.
    page.wait_for_selector("#found:not([hidden]) [role=option]:nth-of-type(3)")
    found = page.eval_on_selector_all("#found .id", "all => all.map(n => n.textContent)")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    chosen = page.get_attribute("#search", "aria-activedescendant")
    assert chosen == "option-1" and page.get_attribute(f"#{chosen}", "aria-selected") == "true"
    page.keyboard.press("Enter")
    wait_for_chips(page, ["i3", found[1]])
    wait_for_ranking(page)
    expected = server_ranks(server, ["i3", found[1]])
    assert ranked(page) == expected
    assert "First:" in page.inner_text("#status") or "10 recommendations" in page.text_content(
        "#status"
    )
    # Down into the list; the reasons follow.
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.wait_for_function(
        "id => document.querySelector('.chosen .pick').dataset.id === id", arg=expected[1]
    )
    page.wait_for_function(
        "id => document.querySelector('#subject .id').textContent === id", arg=expected[1]
    )
    page.wait_for_selector("#why[aria-busy=false] .gate")
    reasons = explain.explain(server.reference, ["i3", found[1]], expected[1])
    page.wait_for_function(
        "text => document.querySelector('#why').innerText.includes(text)",
        arg=f"Score {reasons.score:.3f}".replace("-", "−"),
    )
    assert f"δ = {reasons.gate:.2f}" in page.inner_text("#why")
    assert page.locator("#why .effects li").count() == 2
    effects = [reasons.score - without for without in reasons.without if without is not None]
    shown = page.locator("#why .value").all_inner_texts()
    signed = [f"{effect:+.3f}".replace("-", "−") for effect in reversed(effects)]
    assert shown == [text.replace("+0.000", "0.000").replace("−0.000", "0.000") for text in signed]
    assert page.locator("#why table").count() == 2
    assert (
        page.locator("#why tbody tr").count() == 8 and page.locator("#why tbody td").count() == 24
    )
    assert "by co-occurrence with the history" in page.inner_text("#why")
    # Add it, with one key; the focus stays in the list.
    page.keyboard.press("a")
    wait_for_chips(page, ["i3", found[1], expected[1]])
    wait_for_ranking(page)
    assert page.evaluate("document.activeElement.className") == "pick"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


def ranked(page: Any) -> list[str]:
    return [
        str(i)
        for i in page.eval_on_selector_all("#results .pick", "all => all.map(n => n.dataset.id)")
    ]


def server_ranks(server: Server, history: list[str], k: int = 10) -> list[str]:
    return [item["id"] for item in server.reference.recommend(history, k).items]


def test_a_history_is_changed_by_keyboard(visit: Open) -> None:
    page = visit("#h=i1&h=i2&h=i3&k=5")
    wait_for_chips(page, ["i1", "i2", "i3"])
    wait_for_ranking(page, 5)
    assert page.input_value("#k") == "5"
    page.focus("#history .open")
    page.keyboard.press("Alt+ArrowDown")
    wait_for_chips(page, ["i2", "i1", "i3"])
    assert page.evaluate("document.activeElement.dataset.id") == "i1"
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("Alt+ArrowDown")  # it is the last already
    wait_for_chips(page, ["i2", "i3", "i1"])
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.dataset.id") == "i3"
    page.keyboard.press("Delete")
    wait_for_chips(page, ["i2", "i1"])
    assert page.evaluate("document.activeElement.dataset.id") == "i1"
    assert page.text_content("#status").startswith(("Removed: ", "5 recommendations"))
    page.go_back()
    wait_for_chips(page, ["i2", "i3", "i1"])
    page.go_forward()
    wait_for_chips(page, ["i2", "i1"])
    page.click("#clear")
    wait_for_chips(page, [])
    assert page.is_visible("#empty") and not page.is_visible("#clear")
    assert "h=" not in page.url


def test_a_history_is_changed_by_mouse(visit: Open) -> None:
    page = visit("#h=i1&h=i2&h=i3")
    wait_for_chips(page, ["i1", "i2", "i3"])
    wait_for_ranking(page)
    page.hover(".chip >> nth=2")
    page.click(".chip >> nth=2 >> [title='Move up']")
    wait_for_chips(page, ["i1", "i3", "i2"])
    page.drag_and_drop(".chip >> nth=0 >> .open", ".chip >> nth=2 >> .open")
    wait_for_chips(page, ["i3", "i2", "i1"])
    page.click(".chip >> nth=1 >> [title=Remove]")
    wait_for_chips(page, ["i3", "i1"])
    wait_for_ranking(page)
    first = ranked(page)[0]
    page.click("#results .plus >> nth=0")
    wait_for_chips(page, ["i3", "i1", first])
    page.select_option("#k", "20")
    wait_for_ranking(page, 20)
    assert "k=20" in page.url


def test_a_view_can_be_shared(visit: Open, server: Server) -> None:
    page = visit("#h=i4&h=gone%2F%26&h=i8&k=7&item=" + server_ranks(server, ["i4", "i8"])[2])
    wait_for_chips(page, ["i4", "gone/&", "i8"])
    wait_for_ranking(page, 7)
    assert ranked(page) == server_ranks(server, ["i4", "i8"], 7)
    assert "gone/& (not in this catalog)" in page.inner_text("#history")
    assert page.input_value("#k") == "7"
    page.wait_for_function(
        "id => document.querySelector('#subject .id').textContent === id", arg=ranked(page)[2]
    )
    shared = page.url
    other = visit(shared.partition("/#")[2] and "#" + shared.partition("#")[2])
    wait_for_chips(other, ["i4", "gone/&", "i8"])
    wait_for_ranking(other, 7)
    assert ranked(other) == ranked(page)


def test_users_bring_their_histories(visit: Open, chains: Dataset) -> None:
    page = visit()
    type_and_enter(page, "walt")
    wait_for_chips(page, ["i4", "i5", "i6"])
    assert not page.is_visible("#next")
    type_and_enter(page, "u12")
    events = [chains.item_ids[int(i)].as_py() for i in chains.sequences[chains.user_index("u12")]]
    wait_for_chips(page, events[:-1])
    wait_for_ranking(page)
    assert page.is_visible("#next") and "Taken next by this user" in page.inner_text("#next")
    rows = ranked(page)
    said = f"ranked {rows.index(events[-1]) + 1}." if events[-1] in rows else "not among these 10."
    assert said in page.inner_text("#next")
    assert page.locator("#results .tag").count() == (events[-1] in rows)
    page.reload()
    wait_for_chips(page, events[:-1])
    page.wait_for_selector("#next:not([hidden])")
    page.click(".chip >> nth=0 >> [title=Remove]")
    page.wait_for_selector("#next", state="hidden")  # it is this user's history no longer


def test_neighbours(visit: Open, server: Server) -> None:
    page = visit("#h=i1&h=i2")
    wait_for_ranking(page)
    page.focus("#results .pick")
    page.keyboard.press("n")
    page.wait_for_selector("#near[aria-busy=false] .nearby .pick")
    assert page.get_attribute("#tab-near", "aria-selected") == "true"
    near = "#near .nearby .pick"
    version = server.app.state.live.current()
    row = version.predictor.row_of(ranked(page)[0])
    cosines = (version.matrix @ version.matrix[row]).numpy()
    expected = [version.ids[n] for n in np.argsort(-cosines, kind="stable") if n != row][:12]
    shown = page.eval_on_selector_all(near, "all => all.map(n => n.dataset.id)")
    assert shown == expected
    # On to the neighbours of a neighbour, and back.
    page.keyboard.press("Tab")
    page.focus(near)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "id => document.querySelector('#subject .id').textContent === id", arg=expected[1]
    )
    page.wait_for_selector("#back")
    page.click("#back")
    page.wait_for_function(
        "id => document.querySelector('#near .pick').dataset.id === id", arg=expected[0]
    )
    page.focus("#tab-near")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#why:not([hidden]) .block")
    assert page.evaluate("document.activeElement.id") == "tab-why"
    # Of an item of the history, too.
    page.click("#history .open >> nth=1")
    page.wait_for_function("() => document.querySelector('#subject .id').textContent === 'i2'")
    page.wait_for_selector("#near:not([hidden]) .pick")


def test_what_is_around(visit: Open, server: Server) -> None:
    page, version = visit("#view=live"), server.app.state.live.current()
    page.wait_for_selector("#facts dt")
    scores = version.report["scores"][version.report["method"]]
    assert page.inner_text("#live b") == version.name
    assert f"recall@10 {scores['recall@10']:.4f}" in page.inner_text("#headline")
    facts = page.inner_text("#facts")
    assert version.version in facts and version.report["dataset"]["fingerprint"] in facts
    assert "30" in facts and "none: all items are scored" in facts and "40 users" in facts
    assert "popularity" in page.inner_text("#scores")
    page.click("#to-experiments")
    page.wait_for_function("() => document.querySelector('#experiment').innerText.includes('plus')")
    page.wait_for_selector("#experiment .quiet")
    assert "6%" in page.inner_text("#experiment")
    assert "No result yet: no events of it yet" in page.inner_text("#experiment")


@pytest.fixture
def running(catalog_run: Finished, tmp_path: Path) -> Iterator[Callable[[float], Server]]:
    """Return a function that serves an experiment of two weeks, planned with this share."""
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    users = simulate(450, lift=0.4, seed=3, treatment=0.3)
    conclude(users)  # what it imports may take longer than a request on a busy machine
    log.append([Event(**row) for row in events_of(users, "plus").to_dicts()])
    opened: list[Server] = []

    def start(share: float) -> Server:
        plan = Experiment(name="plus", treatment=share)
        made = Server(catalog_run.run, log, experiment=plan)
        opened.append(made)
        version = made.app.state.live.version
        record_plan(log, plan)
        record_arms(log, plan, {"live": version})
        record_arms(log, plan, {"live": replace(version, name="newer"), "control": version})
        return made

    yield start
    for made in opened:
        made.close()


def test_an_experiment_with_a_result(visit: Open, running: Callable[[float], Server]) -> None:
    page = visit("#view=experiments", of=running(0.3))
    page.wait_for_selector("#experiment tbody tr")
    found = page.evaluate("fetch('v1/experiments/plus').then((answer) => answer.json())")
    shown, one = page.inner_text("#experiment"), found["result"]["metrics"]["ctr"]
    assert "30% of the users" in shown and "clicks" in shown and "replies" in shown
    assert f"{one['control']:.2%}" in shown and f"{one['treatment']:.2%}" in shown
    for reading in (one, one["any_time"]):
        assert f"+{100 * reading['lift_high']:.1f}%" in shown
    assert "The arms are as planned" in shown and "30.00% planned" in shown
    assert "The treatment arm was served by 2 versions" in shown and "catalog, newer" in shown
    assert "The control arm was served" not in shown
    # Both plots, of every period, and drawn again where the page is narrower.
    periods = found["result"]["over_time"]["periods"]
    page.wait_for_selector("#experiment svg >> nth=1")
    assert page.locator("#experiment svg").count() == 2
    assert page.locator("#experiment svg >> nth=0").locator("circle").count() == 2 * len(periods)
    wide = page.locator("#experiment svg >> nth=0").get_attribute("width")
    for width in (390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function(
            "old => document.querySelector('#experiment svg').getAttribute('width') !== old",
            arg=wide,
        )
        page.wait_for_function("() => document.documentElement.scrollWidth <= innerWidth")
        broken = page.evaluate(BROKEN_WORDS)
        assert broken == [], "words that are broken in two"
    last = page.locator("#experiment svg >> nth=0").get_attribute("aria-label")
    assert f"{periods[-1]['treatment']['ctr']:.2%} in the treatment" in last


BROKEN_WORDS = """
[...document.querySelectorAll('#experiments .table th, #experiments .table td')].flatMap((cell) => {
  const node = cell.firstChild;
  if (!node || node.nodeType !== 3) return [];
  return [...node.data.matchAll(/[^\\s-]+/g)].filter(({ 0: word, index }) => {
    const range = document.createRange();
    range.setStart(node, index);
    range.setEnd(node, index + word.length);
    return range.getClientRects().length > 1;
  }).map(([word]) => word);
})
"""


def test_arms_that_are_not_as_planned(visit: Open, running: Callable[[float], Server]) -> None:
    page = visit("#view=experiments", of=running(0.5))
    page.wait_for_selector("#experiment tbody tr")
    alarms = page.locator("#experiment .alarm").all_inner_texts()
    assert any("The arms are not as planned" in alarm and "50.00%" in alarm for alarm in alarms)


def test_a_key_is_asked_for(
    visit: Open, catalog_run: Finished, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    other = Server(catalog_run.run, log, read_keys=(SecretStr(READ_KEY),))
    request.addfinalizer(other.close)
    page = visit("#h=i1&h=i2", of=other, quiet=False)  # a browser says of each 401 that it was one
    page.wait_for_selector("#key:not([hidden])")
    assert "asks for a key" in page.inner_text("#key")
    page.fill("#key-field", "a-wrong-key-0000000")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('#key').innerText.includes('does not know')"
    )
    page.fill("#key-field", READ_KEY)
    page.keyboard.press("Enter")
    wait_for_ranking(page)
    assert not page.is_visible("#key") and not page.is_visible("#notice")
    assert page.evaluate("Object.values(sessionStorage)") == [READ_KEY]
    assert READ_KEY not in page.url and page.evaluate("localStorage.length") == 0
    page.reload()
    wait_for_ranking(page)


def answered(route: Any, *, status: int | None, body: str) -> None:
    if status is None:
        route.abort()
    else:
        route.fulfill(status=status, body=body, headers={"retry-after": "3"})


def test_what_goes_wrong_is_said_and_can_be_tried_again(visit: Open) -> None:
    page = visit("#h=i1", quiet=False)
    wait_for_ranking(page)
    cases: list[tuple[str, int | None, str]] = [
        ("cannot be reached", None, ""),
        (
            "busy; try again in 3 s. It says: 256 requests wait",
            503,
            '{"detail": "256 requests wait"}',
        ),
        ("answered 500", 500, ""),
        ("cannot be read", 200, "<html>"),
    ]
    for expected, status, body in cases:
        answer = functools.partial(answered, status=status, body=body)
        page.route("**/v1/recommend", answer)
        page.select_option("#k", "20" if page.input_value("#k") == "10" else "10")
        page.wait_for_selector("#notice:not([hidden])")
        assert expected in page.inner_text("#problem")
        page.unroute("**/v1/recommend")
        page.click("#retry")
        page.wait_for_selector("#results .pick")
        assert not page.is_visible("#notice")
    page.focus("#search")
    page.keyboard.type("nothing is called this")
    page.wait_for_selector("#found .group")
    assert "Nothing has all these words" in page.inner_text("#found")
    page.keyboard.press("Escape")
    assert not page.is_visible("#found") and page.input_value("#search") == ""


def test_on_a_phone(visit: Open) -> None:
    page = visit(**PHONE)
    page.wait_for_selector("#starts button")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.tap("#starts button")
    wait_for_ranking(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert not page.is_visible("#detail")
    page.tap("#results .pick >> nth=1")
    page.wait_for_selector("#why[aria-busy=false] .gate")
    page.wait_for_timeout(300)  # it slides in
    box = page.locator("#detail").bounding_box()
    assert box["x"] == 0 and box["width"] == 360
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for part in ("#why", "#detail"):
        widths = page.eval_on_selector(part, "node => [node.scrollWidth, node.clientWidth]")
        assert widths[0] <= widths[1], part
    assert page.get_attribute("#detail", "role") == "dialog"
    page.tap("#close")
    page.wait_for_selector("#detail", state="hidden")
    small = page.eval_on_selector_all(
        "button:not([tabindex='-1'])",
        "all => all.filter(n => n.offsetHeight && n.offsetHeight < 28).map(n => n.outerHTML)",
    )
    assert not small


def test_a_panel_over_the_page(visit: Open) -> None:
    page = visit("#h=i1&h=i2", **TABLET)
    wait_for_ranking(page)
    page.focus("#results .pick")
    page.keyboard.press("Enter")
    page.wait_for_selector("#why[aria-busy=false] .gate")
    assert page.evaluate("document.activeElement.id") == "tab-why"
    assert page.evaluate("document.querySelector('#answer').inert") is True
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")
    assert page.evaluate("document.activeElement.className") == "pick"
    assert page.evaluate("document.querySelectorAll('[inert]').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme: str, visit: Open) -> None:
    page = visit("#h=i1&h=i2", viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    wait_for_ranking(page)
    page.wait_for_selector("#why .gate")

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    system = ground()
    for part in ("#results .text", "#results .id", "#live code", "#why p.quiet", ".chosen .id"):
        assert contrast(page, part) >= 4.5, part
    seen = {}
    for name in ("light", "dark", "auto"):
        page.click("#theme")
        assert page.inner_text("#theme") == f"Theme: {name}"
        seen[name] = ground()
    assert seen["light"] != seen["dark"] and seen["auto"] == system == seen[scheme]
    other = "dark" if scheme == "light" else "light"
    while page.inner_text("#theme") != f"Theme: {other}":
        page.click("#theme")
    page.reload()
    wait_for_ranking(page)
    assert ground() == seen[other]  # it is remembered


def test_nothing_shifts_and_the_focus_is_seen(visit: Open) -> None:
    page = visit("#h=i1&h=i2")
    wait_for_ranking(page)
    page.wait_for_selector("#why .gate")
    assert page.evaluate("window.shifts") < 0.02
    page.focus(".skip")
    stops: list[str] = []
    while len(stops) < 30:
        stop, outline = page.evaluate(
            """() => {
              const node = document.activeElement;
              const name = node.id || node.className || node.tagName;
              return [name, getComputedStyle(node).outlineStyle];
            }"""
        )
        if stop == "BODY":
            break
        stops.append(stop)
        assert outline != "none", stop
        page.keyboard.press("Tab")
    # Lists are one stop each; arrows move within.
    assert {"skip", "theme", "search", "open", "k", "pick", "tab-why", "why"} <= set(stops)
    assert stops.count("pick") == stops.count("open") == 1 and len(stops) < 18
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className") == "pick"


def test_another_version_is_noticed(
    visit: Open,
    catalog_run: Finished,
    other_run: Finished,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    other = Server(catalog_run.run, EventLog(f"sqlite:///{tmp_path / 'events.db'}"))
    request.addfinalizer(other.close)
    page = visit("#h=i1&h=i2", of=other)
    wait_for_ranking(page)
    page.wait_for_function("() => document.querySelector('#live b')?.textContent === 'catalog'")
    other.app.state.live.swap("live", load_version(other_run.run))
    page.select_option("#k", "20")
    page.wait_for_function("() => document.querySelector('#live b').textContent === 'other'")
