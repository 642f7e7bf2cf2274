"""The durable log: exposures, clicks, replies, and the items that were put or deleted.

SQLite in WAL mode by default, PostgreSQL by URL; the same three tables. A write is one transaction,
and it is on disk when the call returns: WAL with synchronous=FULL, PostgreSQL without
synchronous_commit=off. What is written twice under one id is stored once. Threads that append at
the same time share one transaction, since what costs time is the disk's answer.

    l2rec_events  seq, id (unique), user, item, type, timestamp, request, experiment, arm
    l2rec_items   item, text, attributes (JSON), deleted
    l2rec_meta    layout: version of these tables
"""

from __future__ import annotations

__all__ = ["TYPES", "Event", "EventLog", "is_event_log"]

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa

from l2rec.errors import ConfigError, DataError, StorageError

TYPES = ("exposure", "click", "reply")
POSITIVE = ("click", "reply")
"""What makes a history."""
LAYOUT = 1
MAX_ID = 256
"""Characters of an id or a name."""
MAX_TIMESTAMP = 1e11
"""Seconds. The year 5138; today's time in milliseconds is beyond it."""
LOCK = 0x12EC
READ_ROWS = 10_000
PRUNE_ROWS = 10_000
GROUP_BATCHES = 256
"""Batches that share one transaction at most."""
BUSY_SECONDS = 10
ATTEMPTS = 3
AGAIN = {"40P01", "40001"}
"""PostgreSQL's states of a transaction that another one was in the way of."""
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
    """Raise DataError for what one of the databases could not store."""
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
    """timestamp: seconds since 1970. request, experiment, arm: of the recommendation it follows.

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


COLUMNS = tuple(f.name for f in fields(Event))
NETWORK = {
    "connect_timeout": 3,
    "tcp_user_timeout": 1000 * BUSY_SECONDS,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
}
"""libpq's: a server that went away without a word is noticed in seconds, not in a quarter hour."""


def is_event_log(source: str) -> bool:
    """Whether this names a database, as a URL or as a file, and not a table of events."""
    if "://" in source:
        return True
    path = Path(source)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


class EventLog:
    """One database. Safe to use from many threads, and by many processes at once.

    url: ``sqlite:///PATH`` or ``postgresql+psycopg://...``. create: make the tables where there are
    none. A database that is away when the log is opened, or goes away later, is a StorageError of
    the call that needed it; the next call tries again.

    Raises:
        ConfigError: another kind of URL, a library that is missing. StorageError: a file that is
            no event log, or one of another layout.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self.engine, self._events, self._items, self._meta = _open(url, create)
        self._create = create
        self._made = False
        self._waiting: deque[tuple[list[dict[str, Any]], Future[int]]] = deque()
        # One thread writes for all: they would only wait for each other's commits.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="l2rec-log")
        if self.engine.dialect.name == "sqlite":
            with self._errors():
                self._prepare()

    # -- events ----------------------------------------------------------------------------------

    def append(self, events: Sequence[Event]) -> int:
        """Store events, all or none; on disk when this returns. How many were new.

        Raises:
            StorageError: nothing was stored; try again, the ids make that safe.
        """
        if not events:
            return 0
        stored: Future[int] = Future()
        self._waiting.append(([asdict(event) for event in events], stored))
        self._write(self._append_waiting)  # or the call of another who waits too
        return stored.result()

    def _append_waiting(self) -> None:
        """One transaction for the batches that wait; each of them gets its outcome."""
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
            new -= ids  # an id that two of them bring is new to the first
            stored.set_result(len(ids))

    def history(self, user: str, limit: int) -> list[str]:
        """The newest ``limit`` items that a user clicked or replied to, oldest first.

        Several events in a row about one item are one step of the history.

        Raises:
            DataError: no possible user id.
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
                _, at, seq = page[-1]  # many steps were one and the same: look further back
                older = or_(e.timestamp < at, and_(e.timestamp == at, e.seq < seq))
                page = connection.execute(query.where(e.timestamp <= at, older)).all()
        return steps[:limit][::-1]

    def users(self, prefix: str = "", limit: int = 20) -> list[str]:
        """Users with a history whose id begins with ``prefix``, in order of id."""
        from sqlalchemy import select

        if prefix:
            _check("user", prefix)
        e = self._events.c
        query = select(e.user).where(_positive(e)).distinct().order_by(e.user).limit(limit)
        if prefix:  # a range of the index, in the order of code points
            query = query.where(e.user >= prefix, e.user < prefix + "\U0010ffff")
        with self._reading() as connection:
            return [str(user) for (user,) in connection.execute(query)]

    def read(
        self,
        types: Iterable[str] | None = None,
        since: float | None = None,
        experiment: str | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Events in the order in which they were stored, in batches, as `SCHEMA` says."""
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
        while True:  # a transaction for each batch: a long reader holds up nobody
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
        """Delete events older than ``before``, in seconds since 1970. How many they were.

        In small transactions, between which others write; cut off, it has deleted some. What is
        deleted is in no history any more, and its ids would be stored again. SQLite keeps the
        room for new events; ``VACUUM`` gives it back to the disk.
        """
        from sqlalchemy import delete, select

        e = self._events.c
        some = select(e.seq).where(e.timestamp < before).order_by(e.timestamp).limit(PRUNE_ROWS)
        gone = delete(self._events).where(e.seq.in_(some))

        def delete_some(connection: Any) -> int:
            return int(connection.execute(gone).rowcount)

        total = 0
        while True:
            number: int = self._write(self._transaction, delete_some).result()
            total += number
            if number < PRUNE_ROWS:
                return total

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
        self._upsert(rows, ("text", "attributes", "deleted"))

    def delete_items(self, ids: Iterable[str]) -> None:
        """Mark items as deleted, of the run's catalog or put later; on disk when this returns.

        Raises:
            DataError: an id that is empty or too long. StorageError: nothing was changed.
        """
        ids = list(ids)
        for item in ids:
            _check("item id", item)
        rows = [{"item": i, "text": "", "attributes": "{}", "deleted": True} for i in ids]
        self._upsert(rows, ("deleted",))

    def items(self) -> tuple[dict[str, tuple[str, dict[str, str]]], frozenset[str]]:
        """What a restart needs: items that were put (id -> text, attributes), deleted ids."""
        from sqlalchemy import select

        t = self._items.c
        query = select(t.item, t.text, t.attributes, t.deleted).order_by(t.item)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        put = {r.item: (r.text, json.loads(r.attributes)) for r in rows if not r.deleted}
        return put, frozenset(r.item for r in rows if r.deleted)

    def _upsert(self, rows: list[dict[str, Any]], changed: Sequence[str]) -> None:
        if not rows:
            return
        insert = self._insert(self._items, None)
        insert = insert.on_conflict_do_update(
            index_elements=["item"], set_={name: insert.excluded[name] for name in changed}
        )
        rows = sorted(rows, key=lambda row: row["item"])  # one order: no two writers block another

        def write(connection: Any) -> None:
            for part in _parts(rows):
                connection.execute(insert, part)

        self._write(self._transaction, write).result()

    # -- the database ----------------------------------------------------------------------------

    def ping(self) -> None:
        """Raises StorageError while the database cannot be read."""
        from sqlalchemy import text

        with self._reading() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        """After what is being written; later calls that write are StorageErrors."""
        self._writer.shutdown()
        self.engine.dispose()

    def _write(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """A call in the thread that writes, in its turn."""
        try:
            return self._writer.submit(function, *args)
        except RuntimeError:
            raise StorageError(f"event log {self._name}: closed; open it again") from None

    def _insert(self, table: Any, once: str | None) -> Any:
        """INSERT of this dialect; a row whose column ``once`` is there already is left out."""
        from sqlalchemy.dialects import postgresql, sqlite

        made = (sqlite if self.engine.dialect.name == "sqlite" else postgresql).insert(table)
        return made if once is None else made.on_conflict_do_nothing(index_elements=[once])

    def _transaction(self, work: Callable[[Any], T]) -> T:
        """What ``work`` gives, of a connection whose changes are on disk when this returns.

        Raises:
            StorageError: nothing was changed.
        """
        for attempt in range(ATTEMPTS):
            try:
                with self._errors():
                    self._prepare()
                    with self.engine.execution_options(writes=True).begin() as connection:
                        found = work(connection)
                return found
            except StorageError as error:
                state = getattr(getattr(error.__cause__, "orig", None), "sqlstate", None)
                if state not in AGAIN or attempt + 1 == ATTEMPTS:
                    raise
        raise AssertionError("not reached")

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        with self._errors():
            self._prepare()
            with self.engine.connect() as connection:
                yield connection

    @contextmanager
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
        """The URL without its password."""
        return str(self.engine.url.render_as_string(hide_password=True))

    def _prepare(self) -> None:
        """Tables, once; a database that was away when the log was opened gets them later."""
        if self._made:
            return
        from sqlalchemy import inspect, select, text

        with self.engine.execution_options(writes=True).begin() as connection:
            if self.engine.dialect.name == "postgresql":  # two servers that start at once
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
            names = set(inspect(connection).get_table_names())
            if "l2rec_meta" in names:
                (found,) = connection.execute(select(self._meta.c.layout)).one()
                if found != LAYOUT:
                    raise StorageError(
                        f"event log {self._name} has layout {found}, this l2rec reads {LAYOUT}; "
                        "use the l2rec that wrote it"
                    )
            else:
                if self.engine.dialect.name == "sqlite" and names:
                    raise StorageError(
                        f"{self._name} is a database of something else; name another file"
                    )
                if not self._create:
                    raise StorageError(f"{self._name} has no event log; name the server's own")
                self._meta.metadata.create_all(connection)
                connection.execute(self._meta.insert(), {"layout": LAYOUT})
        self._made = True


def _parts(rows: list[dict[str, Any]], size: int = 1000) -> Iterator[list[dict[str, Any]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _positive(columns: Any) -> Any:
    """Events that make a history, said as the index of histories says it."""
    from sqlalchemy import literal_column

    return columns.type != literal_column("'exposure'")


def _open(url: str, create: bool) -> tuple[Any, Any, Any, Any]:
    """The engine and its tables. Nothing is connected to yet."""
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
            raise ConfigError("event log: an event log lies in a file: sqlite:///PATH")
        path = Path(parsed.database)
        if not create and not path.exists():  # SQLite would make it
            raise StorageError(f"event log {path}: no such file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"event log {path}: {error}") from error
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}}
    else:
        given = {name: v for name, v in NETWORK.items() if name not in parsed.query}
        options = {"pool_pre_ping": True, "pool_timeout": BUSY_SECONDS, "connect_args": given}
    try:
        engine = sa.create_engine(parsed, **options)
    except ImportError:
        raise ConfigError("PostgreSQL needs psycopg: pip install 'l2rec[postgres]'") from None
    if sqlite:
        sa.event.listen(engine, "connect", _durable)
        sa.event.listen(engine, "begin", _begin)
    else:
        sa.event.listen(engine, "connect", _patient)
    return engine, *_tables(sa)


def _durable(connection: Any, _: Any) -> None:
    """Every commit is on disk, readers do not wait for writers, and transactions are whole."""
    connection.isolation_level = None  # or the driver begins and commits where it likes
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_SECONDS * 1000}"):
        connection.execute(f"PRAGMA {pragma}")


def _patient(connection: Any, _: Any) -> None:
    """Nobody waits for ever for a writer that is gone, and a commit is on disk whatever the
    server's default is.
    """
    connection.execute(f"SET lock_timeout = '{BUSY_SECONDS}s'")
    connection.execute(f"SET idle_in_transaction_session_timeout = '{BUSY_SECONDS}s'")
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') = 'off'"
    )
    connection.commit()


def _begin(connection: Any) -> None:
    """Who will write says so at once, and waits for other writers; later it could only fail."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _tables(sa: Any) -> tuple[Any, Any, Any]:
    metadata = sa.MetaData()
    # One order of ids everywhere, that of code points, as SQLite has it.
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
    # Histories without the exposures, of which there are many more, and without the table: item
    # is what is asked for, and SQLite looks at the type again.
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
    meta = sa.Table("l2rec_meta", metadata, sa.Column("layout", sa.Integer, primary_key=True))
    return events, items, meta
