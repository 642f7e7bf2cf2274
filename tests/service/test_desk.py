"""The page as a shop window and an operator's desk, in a real browser: what items look like,
filters, the catalog, live requests, versions, and keys.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from tests.support.browser import LAPTOP, PHONE, Open, Server, contrast
from tests.support.runs import Finished
from tests.support.service import READ_KEY, WRITE_KEY

from l2rec.service.events import EventLog
from l2rec.service.live import deploy

KEYS = {"read_keys": (SecretStr(READ_KEY),), "write_keys": (SecretStr(WRITE_KEY),)}
HEADERS = {"Authorization": f"Bearer {WRITE_KEY}"}
PARTS = ("", "#view=items", "#view=experiments", "#view=live")
Start = Callable[..., Server]


@pytest.fixture
def start(catalog_run: Finished, tmp_path: Path) -> Iterator[Start]:
    """Return a function that serves a run, or a deployment, with a log of its own."""
    opened: list[Server] = []

    def started(target: Path | None = None, **options: Any) -> Server:
        log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
        opened.append(Server(target or catalog_run.run, log, **options))
        return opened[-1]

    yield started
    for server in opened:
        server.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[str]:
    """Serve one picture from another host; its address."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    square = '<rect width="9" height="9"/>'
    (folder / "a.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">{square}</svg>'
    )
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def put(server: Server, *items: dict[str, Any]) -> None:
    done = httpx.put(f"{server.url}/v1/items", json={"items": list(items)}, headers=HEADERS)
    assert done.status_code == 200, done.text


def wait_for_text(page: Any, selector: str, text: str) -> None:
    page.wait_for_function(
        "([at, text]) => document.querySelector(at)?.textContent.includes(text)",
        arg=[selector, text],
    )


def give_write_key(page: Any, key: str) -> None:
    page.fill(".unlock input", key)
    page.click(".unlock button")


# -- shop window ---------------------------------------------------------------------------------


def test_titles_labels_pictures_and_links(visit: Open, start: Start, pictures: str) -> None:
    server = start(images=(pictures,))
    put(
        server,
        {
            "id": "n1",
            "text": "heavy red hat, made of wool",
            "attributes": {
                "title": "Red hat",
                "kind": "Hats|Wool",
                "price": "5",
                "year": "1995",
                "image": f"{pictures}/a.svg",
                "url": "https://example.com/n1",
            },
        },
        {
            "id": "n2",
            "text": "another hat",
            "attributes": {
                "image": "https://elsewhere.example/a.jpg",
                "url": "javascript:alert(1)",
            },
        },
    )
    page = visit("#h=n1&h=n2&k=50", of=server)
    page.wait_for_selector("#results .pick")
    page.click("#history .open >> nth=0")
    page.wait_for_function("() => document.querySelector('#subject .id')?.textContent === 'n1'")
    assert page.inner_text("#subject .text") == "Red hat"
    labels = page.locator("#subject .label").all_inner_texts()
    assert labels == ["Hats", "Wool", "price 5", "1995"]  # a number says nothing without its name
    assert page.inner_text("#subject .reads") == "The model reads: heavy red hat, made of wool"
    assert page.get_attribute("#subject a", "href") == "https://example.com/n1"
    assert page.get_attribute("#subject a", "rel") == "noopener noreferrer"
    page.wait_for_function("() => document.querySelector('#subject img').naturalWidth > 0")
    page.click("#history .open >> nth=1")
    page.wait_for_function("() => document.querySelector('#subject .id').textContent === 'n2'")
    assert page.locator("#subject a").count() == page.locator("#subject img").count() == 0
    assert page.locator("#history img").count() == 1


def test_what_the_page_is_and_what_a_score_means(visit: Open) -> None:
    page = visit()
    wait_for_text(page, "#purpose", "ranks its 30 items")
    said = page.inner_text("#purpose")
    assert "is no probability" in said and len(said) < 260


def test_trackers_do_not_break_it(visit: Open) -> None:
    page = visit("?utm_source=x&fbclid=y%20z#h=i1&h=i2")
    page.wait_for_selector("#results .pick")
    page.click("#clear")
    page.wait_for_selector("#starts button")
    page.click("#to-live")
    page.wait_for_selector("#facts dt")
    assert "?utm_source=x" in page.url and not page.is_visible("#notice")


def test_filters(visit: Open, start: Start) -> None:
    server = start()
    kinds = {"n1": "Hats|Wool", "n2": "Hats", "n3": "Shoes"}
    colours = {"n1": "red", "n2": "blue", "n3": "red"}
    put(
        server,
        *(
            {"id": i, "text": f"thing {i}", "attributes": {"kind": kinds[i], "colour": colours[i]}}
            for i in kinds
        ),
    )
    page = visit("#h=i1&h=i2", of=server)
    page.wait_for_selector("#results .pick")

    def wait_for(*expected: str) -> None:
        page.wait_for_function(
            "wanted => document.querySelector('#answer').ariaBusy !== 'true' && JSON.stringify("
            "[...document.querySelectorAll('#results .pick')].map(n => n.dataset.id).sort())"
            " === JSON.stringify(wanted)",
            arg=sorted(expected),
        )

    page.click("#filter summary")
    assert page.locator("#filter-name option").all_text_contents() == ["kind", "colour"]
    offered = page.eval_on_selector_all("#filter-values option", "all => all.map(n => n.value)")
    assert offered == ["Hats", "Shoes", "Wool"]
    page.fill("#filter-value", "Hats")
    page.keyboard.press("Enter")
    wait_for("n1", "n2")
    page.fill("#filter-value", "Shoes")  # one or the other of an attribute
    page.keyboard.press("Enter")
    wait_for("n1", "n2", "n3")
    page.select_option("#filter-name", "colour")
    page.fill("#filter-value", "red")  # and of each attribute
    page.keyboard.press("Enter")
    wait_for("n1", "n3")
    shared = page.url
    page.click("#filters button >> nth=1")
    wait_for("n1")
    assert page.evaluate("document.activeElement.id") == "filter-value"
    page.go_back()
    wait_for("n1", "n3")
    other = visit(shared[len(server.url) + 1 :], of=server)
    other.wait_for_selector("#results .pick >> nth=1")
    assert other.locator("#filters li").count() == 3
    for name in ("colour", "kind"):
        page.goto(f"{server.url}/#h=i1&f={name}%3Dnone")
        page.wait_for_selector("#none:not([hidden])")
        assert "passes these filters" in page.inner_text("#none")


def test_a_filter_that_the_catalog_lacks_is_said(visit: Open) -> None:
    page = visit("#h=i1&f=genres%3DDrama", quiet=False)
    wait_for_text(page, "#problem", "The server says: no attribute 'genres'")
    page.click("#filters button")
    page.wait_for_selector("#results .pick")
    assert not page.is_visible("#notice")


# -- catalog -------------------------------------------------------------------------------------


def test_an_item_is_added_changed_and_deleted(visit: Open, start: Start) -> None:
    server = start(**KEYS)
    page = visit("#view=items", of=server, quiet=False)  # the browser tells of each 401
    page.wait_for_selector("#key:not([hidden])")
    page.fill("#key-field", READ_KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#catalog-list button >> nth=24")
    assert page.inner_text("#catalog-count") == "30"
    page.click("#catalog-more")
    page.wait_for_selector("#catalog-list button >> nth=29")
    assert not page.is_visible("#catalog-more")
    # A read key may look, and no more.
    page.click("#catalog-list [data-id=i3]")
    page.wait_for_function("() => document.querySelector('#item-id')?.value === 'i3'")
    assert page.is_disabled("#item-form .primary") and page.is_disabled("#editor .danger")
    give_write_key(page, "no-such-key-0000000")
    wait_for_text(page, ".unlock .wrong", "does not know that key")
    give_write_key(page, READ_KEY)
    wait_for_text(page, ".unlock .wrong", "That is a read key")
    give_write_key(page, WRITE_KEY)
    page.wait_for_selector(".unlock", state="detached")
    # Added.
    page.click("#catalog-new")
    page.fill("#item-id", "n/1")
    page.fill("#item-text", "warm red lamp")
    page.click("text=Add an attribute")
    page.fill("#item-attributes li:last-child .name", "colour")
    page.fill("#item-attributes li:last-child .value", "red|blue")
    page.click("#item-form .primary")
    wait_for_text(page, "#outcome", "n/1 is new")
    wait_for_text(page, "#catalog-count", "31")
    # Another attribute: kept. Another text: asked first, and then updated.
    page.fill("#item-attributes li:last-child .value", "green")
    page.click("#item-form .primary")
    wait_for_text(page, "#outcome", "n/1 was kept")
    page.fill("#item-text", "warm green lamp")
    page.click("#item-form .primary")
    page.wait_for_selector("#confirm[open]")
    assert page.evaluate("document.activeElement.id") == "confirm-no"
    page.keyboard.press("Escape")
    page.wait_for_selector("#confirm", state="hidden")
    found = httpx.get(f"{server.url}/v1/items/n%2F1", headers=HEADERS).json()
    assert found["text"] == "warm red lamp" and found["attributes"] == {"colour": "green"}
    page.click("#item-form .primary")
    page.click("#confirm-yes")
    wait_for_text(page, "#outcome", "n/1 was updated")
    # Found by its words, and deleted, which is asked too.
    page.fill("#catalog-search", "green lamp")
    wait_for_text(page, "#catalog-count", "1 found")
    page.click("#editor .danger")
    assert "Delete warm green lamp?" in page.inner_text("#confirm")
    page.click("#confirm-no")
    assert httpx.get(f"{server.url}/v1/items/n%2F1", headers=HEADERS).status_code == 200
    page.click("#editor .danger")
    page.click("#confirm-yes")
    wait_for_text(page, "#outcome", "n/1 was deleted")
    wait_for_text(page, "#catalog-count", "0 found")
    assert httpx.get(f"{server.url}/v1/items/n%2F1", headers=HEADERS).status_code == 404


def test_a_refusal_is_said_beside_the_form(visit: Open, start: Start, sasrec_run: Path) -> None:
    page = visit("#view=items", of=start(sasrec_run), quiet=False)
    page.click("#catalog-new")
    page.fill("#item-id", "n1")
    page.fill("#item-text", "something new")
    page.click("#item-form .primary")
    wait_for_text(page, "#outcome", "ranks the items that it was trained on")
    assert page.get_attribute("#outcome", "role") == "alert"
    assert page.input_value("#item-text") == "something new"  # nothing that was typed is lost


# -- keys ----------------------------------------------------------------------------------------


def stored(page: Any) -> str:
    return str(page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }])"))


def test_a_write_key_is_kept_in_memory_alone(visit: Open, start: Start) -> None:
    page = visit("#view=items", of=start(**KEYS), quiet=False)
    page.wait_for_selector("#key:not([hidden])")
    page.fill("#key-field", WRITE_KEY)  # in the form that asks for any key
    page.keyboard.press("Enter")
    page.wait_for_selector("#catalog-list button")
    page.click("#catalog-list button")
    page.wait_for_selector("#editor .danger:enabled")
    assert WRITE_KEY not in stored(page) + page.url + page.content()
    page.reload()
    page.wait_for_selector("#key:not([hidden])")
    page.fill("#key-field", READ_KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".unlock")
    give_write_key(page, WRITE_KEY)
    page.wait_for_selector(".unlock", state="detached")
    assert READ_KEY in stored(page) and WRITE_KEY not in stored(page)


# -- operations ----------------------------------------------------------------------------------


def test_requests_are_those_of_the_metrics(visit: Open, start: Start) -> None:
    server = start()
    for n in range(7):
        httpx.post(f"{server.url}/v1/recommend", json={"history": [f"i{n}"]})
    for _ in range(3):
        httpx.post(f"{server.url}/v1/recommend", json={"history": ["sold-out"]})
    page = visit("#view=live", of=server)
    page.wait_for_selector("#requests tbody tr")
    row = "#requests tbody tr:has(code:text-is('/v1/recommend'))"
    cells = page.locator(f"{row} > *").all_inner_texts()
    assert cells[0] == "/v1/recommend POST"
    assert re.sub(r"\s+", " ", cells[1]) == "200 7 422 3" and cells[2] == "10"
    assert all(re.fullmatch(r"[\d.]+ m?s", cell) for cell in cells[4:])
    assert "since " in page.inner_text("#since")
    tiles = page.inner_text("#tiles")
    assert "Answered with an error\n3\n" in tiles
    failure = page.inner_text("#failures tbody tr >> nth=0")
    assert "422" in failure and "unknown item ids: 'sold-out'" in failure
    assert page.locator("#failures tbody tr").count() == 3
    # It looks again, by itself.
    httpx.post(f"{server.url}/v1/recommend", json={"history": ["i9"]})
    page.wait_for_function(
        "at => [...document.querySelectorAll(at)].some(n => n.textContent === '11')",
        arg="#requests td",
    )
    page.wait_for_selector("#traffic svg")
    assert page.inner_text("#versions").startswith("One run folder is served")
    page.click("#to-recommend")
    page.wait_for_selector("#starts button")
    assert not page.is_visible("#operations")


def test_quantiles_are_prometheus_s(visit: Open) -> None:
    page = visit()
    found = page.evaluate(
        """async () => {
          const { buckets, parse, quantile } = await import("/static/metrics.js");
          const text = [
            "# HELP x y", 'x_bucket{le="0.1",route="/a"} 2.0', 'x_bucket{le="1.0",route="/a"} 6.0',
            'x_bucket{le="+Inf",route="/a"} 8.0', 'x_bucket{le="+Inf",route="/b"} 9.0',
            'y_total{name="a\\\\"b\\\\\\\\c,}"} 1e+03', "z 4",
          ].join("\\n");
          const samples = parse(text), some = buckets(samples, "x", { route: "/a" });
          return {
            samples: samples.length, y: samples[4], z: samples[5].value,
            quantiles: [0.125, 0.25, 0.5, 0.75, 0.99].map((q) => String(quantile(q, some))),
            none: quantile(0.5, []), since: buckets(samples, "x", { route: "/a" }, samples),
          };
        }"""
    )
    assert found["samples"] == 6 and found["z"] == 4 and found["none"] is None
    assert found["y"] == {"name": "y_total", "labels": {"name": 'a"b\\c,}'}, "value": 1000}
    # By hand: a half is the fourth of eight, two of the four between 0.1 and 1.
    assert [float(q) for q in found["quantiles"][:4]] == pytest.approx([0.05, 0.1, 0.55, 1.0])
    assert found["quantiles"][4] == "Infinity"
    assert [bucket["count"] for bucket in found["since"]] == [0, 0, 0]


def test_rolling_back_by_a_click(
    visit: Open, start: Start, catalog_run: Finished, other_run: Finished, tmp_path: Path
) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)
    deploy(other_run.run, folder)
    server = start(folder, **KEYS)
    page = visit("#view=live", of=server, quiet=False)
    page.wait_for_selector("#key:not([hidden])")
    page.fill("#key-field", READ_KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#versions tbody tr >> nth=1")
    steps = page.locator("#versions tbody tr").all_inner_texts()
    assert "deployed" in steps[0] and "other" in steps[0] and "catalog" in steps[1]
    page.click("text=Roll back to catalog")
    give_write_key(page, WRITE_KEY)
    page.wait_for_selector("#confirm[open]")
    assert "Serve catalog again?" in page.inner_text("#confirm")
    page.keyboard.press("Enter")  # on Cancel
    page.wait_for_selector("#confirm", state="hidden")
    assert server.app.state.live.current().name == "other"
    page.click("text=Roll back to catalog")
    page.click("#confirm-yes")
    wait_for_text(page, "#live b", "catalog")
    assert server.app.state.live.current().name == "catalog"
    page.wait_for_function(
        "() => document.querySelector('#versions tbody tr').innerText.includes('rolled back to')"
    )
    assert "write key 1" in page.inner_text("#versions tbody tr >> nth=0")
    assert "no way back" in page.inner_text("#versions")


def test_a_refused_run_is_said(
    visit: Open, start: Start, catalog_run: Finished, other_run: Finished, tmp_path: Path
) -> None:
    folder, run = tmp_path / "serving", tmp_path / "catalog"
    shutil.copytree(catalog_run.run, run)
    deploy(run, folder)
    deploy(other_run.run, folder)
    (run / "index").mkdir()  # of nothing, which is found when it is loaded
    server = start(folder)
    page = visit("#view=live", of=server)
    page.click("text=Roll back to catalog")
    page.click("#confirm-yes")
    wait_for_text(page, "#versions .alarm", "catalog was refused")
    assert "catalog is deployed, and other is live" in page.inner_text("#versions")


# -- every part, on every screen -----------------------------------------------------------------


@pytest.mark.parametrize("at", PARTS)
def test_parts_fit_a_phone_and_have_contrast(at: str, visit: Open) -> None:
    for options in (PHONE, LAPTOP | {"color_scheme": "dark"}):
        page = visit(at, **options)
        page.wait_for_selector("#live b")
        page.wait_for_selector("nav [aria-current]")
        width = options["viewport"]["width"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, options
        for part in ("main .quiet", "main .label", "nav a", "main button", "main code"):
            if page.locator(part).locator("visible=true").count():
                assert contrast(page, part) >= 4.5, (at, part, options)


def test_parts_by_keyboard(visit: Open) -> None:
    page = visit("#h=i1&h=i2")
    page.wait_for_selector("#results .pick")
    asked = page.url
    for name, title in (("items", "Items"), ("experiments", "Experiments"), ("live", "Live")):
        page.focus(f"#to-{name}")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#to-{name}[aria-current=page]")
        assert page.title() == f"{title} · l2rec"
        assert page.locator(".view:not([hidden])").count() == 1
        page.focus(".skip")
        page.keyboard.press("Enter")
        inside = "document.querySelector('.view:not([hidden])').contains(document.activeElement)"
        assert page.evaluate(inside)
    page.go_back()
    page.go_back()
    page.wait_for_selector("#catalog-list button")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "catalog-search"
    page.focus("#to-recommend")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results .pick")
    assert page.url == asked  # the history is as it was
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, a")]
          .filter((n) => n.id !== "confirm-yes")  // named when it asks
          .filter((n) => !n.textContent.trim() && !n.ariaLabel && !n.labels?.length && !n.title)
          .map((n) => n.outerHTML)"""
    )
    assert not unnamed


def test_an_editor_on_a_phone(visit: Open) -> None:
    page = visit("#view=items", **PHONE)
    page.wait_for_selector("#catalog-list button")
    assert not page.is_visible("#editor")
    page.tap("#catalog-list [data-id=i2]")
    page.wait_for_function("() => document.querySelector('#item-id')?.value === 'i2'")
    assert page.is_visible("#editor") and not page.is_visible("#catalog")
    page.tap("#catalog-back")
    assert page.is_visible("#catalog") and not page.is_visible("#editor")
    assert page.evaluate("document.activeElement.dataset.id") == "i2"
