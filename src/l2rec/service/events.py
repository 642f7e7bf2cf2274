"""The event log: exposures, clicks, replies, items that were put or deleted, experiments, on disk.

SQLite in WAL mode by default, PostgreSQL by URL; the same tables. A write is one transaction,
and it is on disk when the call returns: WAL with synchronous=FULL, PostgreSQL without
synchronous_commit=off. Two events of one id are stored once. Threads that append at the same time
share one transaction, since a transaction costs a wait for the disk.

    l2rec_events       seq, id (unique), user, item, type, timestamp, request, experiment, arm
    l2rec_items        item, text, attributes (JSON), deleted
    l2rec_users        user, segment
    l2rec_experiments  name, salt, treatment (share of users), since
    l2rec_arms         experiment, arm, run, version, since: what served an arm, and from when
    l2rec_meta         layout: version of these tables
"""

from __future__ import annotations

__all__ = ["TYPES", "Event", "EventLog", "Plan", "Served", "is_event_log", "shown"]

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa

from l2rec.errors import ConfigError, DataError, StorageError

TYPES = ("exposure", "click", "reply")
POSITIVE = ("click", "reply")
"""Types of the events that make up a history."""
LAYOUT = 1
"""Version of the tables; those of experiments came later, and a log may lack them."""
MAX_ID = 256
"""Characters of an id or a name."""
MAX_TIMESTAMP = 1e11
"""Seconds since 1970: the year 5138. Today's time in milliseconds is beyond it."""
LOCK = 0x12EC
"""Key of PostgreSQL's advisory lock while the tables are created."""
READ_ROWS = 10_000
PRUNE_ROWS = 10_000
GROUP_BATCHES = 256
"""Batches that share one transaction at most."""
BUSY_SECONDS = 10.0
"""Longest wait for another writer, for a connection, or for a server that does not answer, where
nobody waits for an answer of a server.
"""
ATTEMPTS = 3
AGAIN = {"40P01", "40001"}
"""PostgreSQL's error codes of a transaction to try again: a deadlock, a serialization failure."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("user", pa.string()),
        ("item", pa.string()),
        ("type", pa.string()),
        ("timestamp", pa.float64()),
        ("request", pa.string()),
        ("experiment", pa.string()),
        ("arm", pa.string()),
    ]
)

Attributes = Mapping[str, str]
T = TypeVar("T")


def _check(what: str, value: str, longest: int | None = MAX_ID) -> None:
    """Refuse a string that one of the databases could not store."""
    if longest is not None and not 0 < len(value) <= longest:
        raise DataError(f"{what} {value[:40]!r}: 1 to {longest} characters, no NUL")
    if "\0" in value:
        raise DataError(f"{what} {value[:40]!r}: a NUL cannot be stored, leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} {value[:40]!r}: half a surrogate pair is no character") from None


@dataclass(frozen=True)
class Event:
    """An exposure, a click or a reply.

    timestamp: seconds since 1970. request, experiment, arm: those of the recommendation before it.

    Raises:
        DataError: an empty or overlong id or name, an unknown type, an impossible time.
    """

    id: str
    user: str
    item: str
    type: Literal["exposure", "click", "reply"]
    timestamp: float
    request: str | None = None
    experiment: str | None = None
    arm: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "user", "item"):
            _check(f"event {name}", getattr(self, name))
        for name in ("request", "experiment", "arm"):
            if (value := getattr(self, name)) is not None:
                _check(f"event {name}", value)
        if self.type not in TYPES:
            raise DataError(f"event type {self.type!r}: choose one of {', '.join(TYPES)}")
        if not 0 <= self.timestamp <= MAX_TIMESTAMP:  # NaN neither
            raise DataError(
                f"event timestamp {self.timestamp}: seconds since 1970, at most {MAX_TIMESTAMP:g} "
                "(not milliseconds)"
            )


@dataclass(frozen=True)
class Served:
    """A version that served an arm. since: when it first did, in seconds since 1970."""

    arm: str
    run: str
    version: str
    since: float


@dataclass(frozen=True)
class Plan:
    """An experiment as it is served. treatment: share of users. since: seconds since 1970."""

    name: str
    salt: str
    treatment: float
    since: float
    served: tuple[Served, ...] = ()


COLUMNS = tuple(f.name for f in fields(Event))
NETWORK = {
    "connect_timeout": 3,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
}
"""Options of libpq that notice a lost server in seconds instead of a quarter of an hour."""


def is_event_log(source: str) -> bool:
    """Tell whether a source names a database, as a URL or as a file, and not a table of events."""
    if "://" in source:
        return True
    path = Path(source)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def shown(url: Any) -> str:
    """Return the URL of an event log without its password, and without its query, which may have
    one too.
    """
    from sqlalchemy import make_url

    return str(make_url(url).set(query={}).render_as_string(hide_password=True))


class EventLog:
    """Event log in one database. Safe to use from many threads, and by many processes at once.

    A database that is away when the log is opened, or goes away later, is a StorageError of the
    call that needed it; the next call tries again.

    Args:
        url: ``sqlite:///PATH`` or ``postgresql+psycopg://...``.
        create: create the tables where there are none.
        busy: seconds, the longest wait for another writer, for a connection, or for a server that
            does not answer.

    Raises:
        ConfigError: another kind of URL, or a missing library.
        StorageError: a file that is no event log, or a log of another layout.
    """

    def __init__(self, url: str, *, create: bool = True, busy: float = BUSY_SECONDS) -> None:
        self.engine, tables = _open(url, create, busy)
        self._events, self._items, self._users, self._meta, self._experiments, self._arms = tables
        self._create = create
        self._prepared = False
        self._waiting: deque[tuple[list[dict[str, Any]], Future[int]]] = deque()
        # One thread writes for all: they would only wait for each other's commits.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="l2rec-log")
        if self.engine.dialect.name == "sqlite":
            with self._errors():
                self._prepare()

    # -- events ----------------------------------------------------------------------------------

    def append(self, events: Sequence[Event]) -> int:
        """Store events, all or none; on disk when this returns.

        Returns:
            The number of new ones; an id that is stored already is ignored.

        Raises:
            StorageError: nothing was stored; try again, the ids make that safe.
        """
        return self.appending(events).result()

    def appending(self, events: Sequence[Event]) -> Future[int]:
        """Begin to store events; the result, or the error, is that of `append`."""
        stored: Future[int] = Future()
        if events:
            self._waiting.append(([asdict(event) for event in events], stored))
            self._write(self._append_waiting)  # or an earlier call of it takes this batch along
        else:
            stored.set_result(0)
        return stored

    def _append_waiting(self) -> None:
        """Write the batches that wait in one transaction, and give each its result."""
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), GROUP_BATCHES))]
        rows = [row for batch, _ in group for row in batch]
        if not rows:
            return  # another call wrote them
        insert = self._insert(self._events, "id").returning(self._events.c.id)

        def write(connection: Any) -> set[str]:
            return {i for part in _parts(rows) for (i,) in connection.execute(insert, part)}

        try:
            new = self._transaction(write)
        except Exception as error:
            for _, stored in group:
                stored.set_exception(error)
            return
        for batch, stored in group:
            ids = {row["id"] for row in batch} & new
            new -= ids  # an id in two batches is new in the first
            stored.set_result(len(ids))

    def history(self, user: str, limit: int) -> list[str]:
        """Return the newest ``limit`` items that a user clicked or replied to, oldest first.

        Several events in a row about one item are one step of the history.

        Raises:
            DataError: a user id that cannot exist.
        """
        from sqlalchemy import and_, or_, select

        _check("user", user)
        e = self._events.c
        query = (
            select(e.item, e.timestamp, e.seq)
            .where(e.user == user, _positive(e))
            .order_by(e.timestamp.desc(), e.seq.desc())
            .limit(2 * limit)
        )
        steps: list[str] = []
        with self._reading() as connection:
            page = connection.execute(query).all()
            while page:
                for item, _, _ in page:
                    if not steps or steps[-1] != item:
                        steps.append(str(item))
                if len(steps) >= limit or len(page) < 2 * limit:
                    break
                _, at, seq = page[-1]  # many events fell into one step: look further back
                older = or_(e.timestamp < at, and_(e.timestamp == at, e.seq < seq))
                page = connection.execute(query.where(e.timestamp <= at, older)).all()
        return steps[:limit][::-1]

    def seen(self, user: str) -> set[str]:
        """Return all items that a user ever clicked or replied to."""
        from sqlalchemy import select

        _check("user", user)
        e = self._events.c
        query = select(e.item).distinct().where(e.user == user, _positive(e))
        with self._reading() as connection:
            return {str(item) for (item,) in connection.execute(query)}

    def users(self, prefix: str = "", limit: int = 20) -> list[str]:
        """Return users with a history whose id begins with ``prefix``, in order of id."""
        from sqlalchemy import select

        if prefix:
            _check("user", prefix)
        e = self._events.c
        query = select(e.user).where(_positive(e)).distinct().order_by(e.user).limit(limit)
        if prefix:  # a range of the index, in the order of code points
            query = query.where(e.user >= prefix, e.user < prefix + "\U0010ffff")
        with self._reading() as connection:
            return [str(user) for (user,) in connection.execute(query)]

    def began(self, user: str) -> float | None:
        """Return the time of the first click or reply of a user, None without one."""
        from sqlalchemy import func, select

        _check("user", user)
        e = self._events.c
        query = select(func.min(e.timestamp)).where(e.user == user, _positive(e))
        with self._reading() as connection:
            return connection.execute(query).scalar_one()  # type: ignore[no-any-return]

    def counts(self, segment: str | None = None, after: float | None = None) -> dict[str, int]:
        """Count the clicks and replies of each item: by everybody, or by users of a segment; all,
        or those after a time.
        """
        from sqlalchemy import func, select

        e, u = self._events.c, self._users.c
        query = select(e.item, func.count()).where(_positive(e)).group_by(e.item)
        if segment is not None:
            query = query.where(e.user == u.user, u.segment == segment)
        if after is not None:
            query = query.where(e.timestamp > after)
        with self._reading() as connection:
            return {str(item): int(count) for item, count in connection.execute(query)}

    def read(
        self,
        types: Iterable[str] | None = None,
        since: float | None = None,
        experiment: str | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the events in the order in which they were stored, in batches of `SCHEMA`."""
        from sqlalchemy import select

        e = self._events.c
        query = select(e.seq, *(e[name] for name in COLUMNS)).order_by(e.seq).limit(READ_ROWS)
        if types is not None:
            query = query.where(e.type.in_(list(types)))
        if since is not None:
            query = query.where(e.timestamp >= since)
        if experiment is not None:
            query = query.where(e.experiment == experiment)
        last = -1
        while True:  # a transaction for each batch: a long read delays no writer
            with self._reading() as connection:
                rows = connection.execute(query.where(e.seq > last)).all()
            if not rows:
                return
            last = rows[-1][0]
            columns = list(zip(*(row[1:] for row in rows), strict=True))
            yield pa.RecordBatch.from_arrays(
                [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
            )

    def prune(self, before: float) -> int:
        """Delete events older than ``before``, in seconds since 1970, and return their number.

        It uses small transactions, between which others can write; if it is interrupted, a part is
        deleted. Deleted events are in no history, and their ids can be stored again. SQLite keeps
        the space for new events; ``VACUUM`` gives it back to the disk.
        """
        from sqlalchemy import delete, select

        e = self._events.c
        oldest = select(e.seq).where(e.timestamp < before).order_by(e.timestamp).limit(PRUNE_ROWS)
        statement = delete(self._events).where(e.seq.in_(oldest))

        def delete_part(connection: Any) -> int:
            return int(connection.execute(statement).rowcount)

        total = 0
        while True:
            number: int = self._write(self._transaction, delete_part).result()
            total += number
            if number < PRUNE_ROWS:
                return total

    # -- users -----------------------------------------------------------------------------------

    def put_users(self, segments: Mapping[str, str]) -> None:
        """Put users into segments, all or none; on disk when this returns.

        Raises:
            DataError: an id or a name that is empty or too long.
            StorageError: nothing was changed.
        """
        for user, segment in segments.items():
            _check("user", user)
            _check("segment", segment)
        rows = [{"user": user, "segment": segment} for user, segment in segments.items()]
        self._upsert(self._users, "user", rows, ("segment",))

    def segment_of(self, user: str) -> str | None:
        """Return the segment of a user, None where none is known."""
        from sqlalchemy import select

        _check("user", user)
        u = self._users.c
        with self._reading() as connection:
            found = connection.execute(select(u.segment).where(u.user == user)).scalar()
        return None if found is None else str(found)

    def users_in(self, segment: str) -> list[str]:
        """Return the users of a segment."""
        from sqlalchemy import select

        _check("segment", segment)
        u = self._users.c
        query = select(u.user).where(u.segment == segment)
        with self._reading() as connection:
            return [str(user) for (user,) in connection.execute(query)]

    # -- items -----------------------------------------------------------------------------------

    def put_items(self, items: Mapping[str, tuple[str, Attributes]]) -> None:
        """Add or replace items, all or none; on disk when this returns.

        Raises:
            DataError: an id that is empty or too long, a text that cannot be stored.
            StorageError: nothing was changed.
        """
        for item, (text, attributes) in items.items():
            _check("item id", item)
            for part in (text, *attributes, *attributes.values()):
                _check(f"item {item[:40]!r}: text or attribute", part, None)
        rows = [
            {
                "item": item,
                "text": text,
                "attributes": json.dumps(dict(attributes), ensure_ascii=False),
                "deleted": False,
            }
            for item, (text, attributes) in items.items()
        ]
        self._upsert(self._items, "item", rows, ("text", "attributes", "deleted"))

    def delete_items(self, ids: Iterable[str]) -> None:
        """Mark items as deleted, of the run's catalog or put later; on disk when this returns.

        Raises:
            DataError: an id that is empty or too long.
            StorageError: nothing was changed.
        """
        ids = list(ids)
        for item in ids:
            _check("item id", item)
        rows = [{"item": i, "text": "", "attributes": "{}", "deleted": True} for i in ids]
        self._upsert(self._items, "item", rows, ("deleted",))

    def items(self) -> tuple[dict[str, tuple[str, dict[str, str]]], frozenset[str]]:
        """Return the items that were put (id -> text, attributes), and the deleted ids."""
        from sqlalchemy import select

        t = self._items.c
        query = select(t.item, t.text, t.attributes, t.deleted).order_by(t.item)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        put = {r.item: (r.text, json.loads(r.attributes)) for r in rows if not r.deleted}
        return put, frozenset(r.item for r in rows if r.deleted)

    def texts(self) -> dict[str, tuple[str, dict[str, str]]]:
        """Return the items that were ever put (id -> text, attributes), deleted ones included:
        events may name them.
        """
        from sqlalchemy import select

        t = self._items.c
        query = select(t.item, t.text, t.attributes).where(t.text != "").order_by(t.item)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return {r.item: (r.text, json.loads(r.attributes)) for r in rows}

    def _upsert(
        self, table: Any, key: str, rows: list[dict[str, Any]], changed: Sequence[str]
    ) -> None:
        if not rows:
            return
        insert = self._insert(table, None)
        insert = insert.on_conflict_do_update(
            index_elements=[key], set_={name: insert.excluded[name] for name in changed}
        )
        rows = sorted(rows, key=lambda row: str(row[key]))  # one order: no deadlock

        def write(connection: Any) -> None:
            for part in _parts(rows):
                connection.execute(insert, part)

        self._write(self._transaction, write).result()

    # -- experiments -----------------------------------------------------------------------------

    def plan(self, name: str, *, salt: str, treatment: float, at: float) -> None:
        """Store how users are assigned to the arms of an experiment; on disk when this returns.

        at: now, in seconds since 1970; a plan that is stored already keeps its time.

        Raises:
            ConfigError: the experiment has another salt or share. StorageError: nothing was stored.
        """
        from sqlalchemy import select

        t = self._experiments.c
        insert = self._insert(self._experiments, "name")

        def write(connection: Any) -> Any:
            row = {"name": name, "salt": salt, "treatment": treatment, "since": at}
            connection.execute(insert, row)
            return connection.execute(select(t.salt, t.treatment).where(t.name == name)).one()

        known = self._write(self._transaction, write).result()
        if (known.salt, known.treatment) != (salt, treatment):
            raise ConfigError(
                f"experiment {name!r} was served with --treatment-share {known.treatment:g} --salt "
                f"{known.salt!r}: other ones move users between its arms; serve it with these, or "
                "give the experiment another name"
            )

    def serve_arms(self, name: str, served: Iterable[Served]) -> None:
        """Store what serves the arms of an experiment; what is stored already keeps its time.

        Raises:
            StorageError: nothing was stored.
        """
        insert = self._insert(self._arms, None).on_conflict_do_nothing()
        rows = [{"experiment": name, **asdict(each)} for each in served]
        self._write(self._transaction, lambda connection: connection.execute(insert, rows)).result()

    def plans(self) -> dict[str, Plan]:
        """Return the experiments that were served, by name; none of a log from before them."""
        from sqlalchemy import inspect, select

        t, a = self._experiments.c, self._arms.c
        with self._reading() as connection:
            if not inspect(connection).has_table(self._arms.name):
                return {}
            rows = connection.execute(select(t.name, t.salt, t.treatment, t.since)).all()
            query = select(a.experiment, a.arm, a.run, a.version, a.since)
            served = connection.execute(query.order_by(a.since, a.arm)).all()
        return {
            row.name: Plan(
                row.name,
                row.salt,
                row.treatment,
                row.since,
                tuple(Served(*each[1:]) for each in served if each.experiment == row.name),
            )
            for row in rows
        }

    # -- the database ----------------------------------------------------------------------------

    def ping(self) -> None:
        """Read from the database.

        Raises:
            StorageError: it cannot be read.
        """
        from sqlalchemy import text

        with self._reading() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close the log once all writes have ended; later writes are StorageErrors."""
        self._writer.shutdown()
        self.engine.dispose()

    def _write(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Queue a call for the thread that writes."""
        try:
            return self._writer.submit(function, *args)
        except RuntimeError:
            raise StorageError(f"event log {self._name}: closed; open it again") from None

    def _insert(self, table: Any, once: str | None) -> Any:
        """Return an INSERT that skips rows whose value of the column ``once`` exists already."""
        from sqlalchemy.dialects import postgresql, sqlite

        insert = (sqlite if self.engine.dialect.name == "sqlite" else postgresql).insert(table)
        return insert if once is None else insert.on_conflict_do_nothing(index_elements=[once])

    def _transaction(self, work: Callable[[Any], T]) -> T:
        """Return the result of ``work`` on a connection; its changes are on disk then.

        Raises:
            StorageError: nothing was changed.
        """
        for attempt in range(ATTEMPTS):
            try:
                with self._errors():
                    self._prepare()
                    with self.engine.execution_options(writes=True).begin() as connection:
                        result = work(connection)
                return result
            except StorageError as error:
                state = getattr(getattr(error.__cause__, "orig", None), "sqlstate", None)
                if state not in AGAIN or attempt + 1 == ATTEMPTS:
                    raise
        raise AssertionError("not reached")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        with self._errors():
            self._prepare()
            with self.engine.connect() as connection:
                yield connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            reason = " ".join(str(cause).split())[:200]
            raise StorageError(f"event log {self._name}: {reason}") from error

    @property
    def _name(self) -> str:
        """Its URL, as errors name it."""
        return shown(self.engine.url)

    def _prepare(self) -> None:
        """Create the tables, once; later where the database was away when the log was opened."""
        if self._prepared:
            return
        from sqlalchemy import inspect, select, text

        with self.engine.execution_options(writes=True).begin() as connection:
            if self.engine.dialect.name == "postgresql":  # two servers may start at once
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
            names = set(inspect(connection).get_table_names())
            if "l2rec_meta" in names:
                (layout,) = connection.execute(select(self._meta.c.layout)).one()
                if layout != LAYOUT:
                    raise StorageError(
                        f"event log {self._name} has layout {layout}, this l2rec reads {LAYOUT}; "
                        "use the l2rec that wrote it"
                    )
                if self._create and not {self._users.name, self._arms.name} <= set(names):
                    # Logs of earlier versions have no users, experiments, arms.
                    self._meta.metadata.create_all(connection)
            else:
                if self.engine.dialect.name == "sqlite" and names:
                    raise StorageError(
                        f"{self._name} is a database of something else; name another file"
                    )
                if not self._create:
                    raise StorageError(f"{self._name} has no event log; name the server's own")
                self._meta.metadata.create_all(connection)
                connection.execute(self._meta.insert(), {"layout": LAYOUT})
        self._prepared = True


def _parts(rows: list[dict[str, Any]], size: int = 1000) -> Iterator[list[dict[str, Any]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _positive(columns: Any) -> Any:
    """Return the condition for events of a history, word for word as in the index of histories."""
    from sqlalchemy import literal_column

    return columns.type != literal_column("'exposure'")


def _open(url: str, create: bool, busy: float) -> tuple[Any, tuple[Any, ...]]:
    """Create the engine and describe its tables, without a connection yet."""
    try:
        import sqlalchemy as sa
    except ImportError:
        raise ConfigError("the event log needs SQLAlchemy: pip install 'l2rec[serve]'") from None
    try:
        parsed = sa.engine.make_url(url)
    except sa.exc.ArgumentError:
        raise ConfigError(
            "the event log's URL is neither sqlite:///PATH nor postgresql+psycopg://..."
        ) from None
    sqlite = parsed.get_backend_name() == "sqlite"
    if not sqlite and parsed.drivername != "postgresql+psycopg":
        raise ConfigError(
            f"event log: {parsed.drivername} is neither sqlite nor postgresql+psycopg"
        )
    if sqlite:
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError("event log: SQLite's lies in a file: sqlite:///PATH")
        path = Path(parsed.database)
        if not create and not path.exists():  # SQLite would create it
            raise StorageError(f"event log {path}: no such file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if create:  # for its owner alone, as are the files that SQLite puts beside it
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except OSError as error:
            raise StorageError(f"event log {path}: {error}") from error
        options: dict[str, Any] = {"connect_args": {"timeout": busy}}
    else:
        network = NETWORK | {"tcp_user_timeout": int(1000 * busy)}
        given = {name: v for name, v in network.items() if name not in parsed.query}
        options = {"pool_pre_ping": True, "pool_timeout": busy, "connect_args": given}
    try:
        engine = sa.create_engine(parsed, **options)
    except ImportError:
        raise ConfigError("PostgreSQL needs psycopg: pip install 'l2rec[postgres]'") from None
    if sqlite:
        sa.event.listen(engine, "connect", partial(_durable, busy))
        sa.event.listen(engine, "begin", _begin)
    else:
        sa.event.listen(engine, "connect", partial(_patient, busy))
    return engine, _tables(sa)


def _durable(busy: float, connection: Any, _: Any) -> None:
    """Set up SQLite: commits go to disk, readers wait for no writer, transactions are whole."""
    connection.isolation_level = None  # otherwise the driver begins and commits by itself
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={int(1000 * busy)}"):
        connection.execute(f"PRAGMA {pragma}")


def _patient(busy: float, connection: Any, _: Any) -> None:
    """Set up PostgreSQL: waits for a lost writer end, and commits go to disk.

    The latter also holds where the server's default is synchronous_commit=off.
    """
    connection.execute(f"SET lock_timeout = '{int(1000 * busy)}ms'")
    connection.execute(f"SET idle_in_transaction_session_timeout = '{int(1000 * busy)}ms'")
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') = 'off'"
    )
    connection.commit()


def _begin(connection: Any) -> None:
    """Begin a transaction in SQLite; one that will write waits for other writers now.

    Later it could not wait: SQLite refuses a reader that turns writer after another has written.
    """
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _tables(sa: Any) -> tuple[Any, ...]:
    """Describe the tables: events, items, users, meta, experiments, arms."""
    metadata = sa.MetaData()
    # Ids are ordered by code points everywhere, as in SQLite.
    short = sa.String(MAX_ID).with_variant(sa.String(MAX_ID, collation="C"), "postgresql")
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    events = sa.Table(
        "l2rec_events",
        metadata,
        sa.Column("seq", number, primary_key=True, autoincrement=True),
        sa.Column("id", short, nullable=False, unique=True),
        sa.Column("user", short, nullable=False),
        sa.Column("item", short, nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        sa.Column("timestamp", sa.Float(53), nullable=False),
        sa.Column("request", short),
        sa.Column("experiment", short),
        sa.Column("arm", short),
        sa.Index("l2rec_events_experiment", "experiment", "seq"),
        sa.Index("l2rec_events_time", "timestamp"),
    )
    # The index leaves out exposures, which are far more, and answers without the table: item is
    # the result, and SQLite checks the type again.
    e, only = events.c, _positive(events.c)
    columns = (e.user, e.timestamp, e.seq, e.item, e.type)
    sa.Index("l2rec_events_history", *columns, sqlite_where=only, postgresql_where=only)
    items = sa.Table(
        "l2rec_items",
        metadata,
        sa.Column("item", short, primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("attributes", sa.Text, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
    )
    users = sa.Table(
        "l2rec_users",
        metadata,
        sa.Column("user", short, primary_key=True),
        sa.Column("segment", short, nullable=False),
        sa.Index("l2rec_users_segment", "segment"),
    )
    meta = sa.Table("l2rec_meta", metadata, sa.Column("layout", sa.Integer, primary_key=True))
    experiments = sa.Table(
        "l2rec_experiments",
        metadata,
        sa.Column("name", short, primary_key=True),
        sa.Column("salt", sa.Text, nullable=False),
        sa.Column("treatment", sa.Float(53), nullable=False),
        sa.Column("since", sa.Float(53), nullable=False),
    )
    arms = sa.Table(
        "l2rec_arms",
        metadata,
        *(sa.Column(name, short, primary_key=True) for name in ("experiment", "arm")),
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("run", "version")),
        sa.Column("since", sa.Float(53), nullable=False),
    )
    return events, items, users, meta, experiments, arms
