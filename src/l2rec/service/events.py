"""The durable log: exposures, clicks, replies, and the items that were put or deleted.

SQLite in WAL mode by default, PostgreSQL by URL; the same four tables. A write is one transaction,
and it is on disk when the call returns: WAL with synchronous=FULL, PostgreSQL's own default. What
is written twice under one id is stored once.

    events  seq, id (unique), user, item, type, timestamp, request, experiment, arm
    items   item, text, attributes (JSON), deleted
    meta    version of this layout
"""

from __future__ import annotations

__all__ = ["TYPES", "Event", "EventLog", "is_event_log"]

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from l2rec.errors import ConfigError, DataError, StorageError

TYPES = ("exposure", "click", "reply")
POSITIVE = ("click", "reply")
"""What makes a history."""
LAYOUT = 1
MAX_ID = 256
"""Characters of an id or a name."""
LOCK = 0x12EC
READ_ROWS = 10_000
BUSY_SECONDS = 10
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


@dataclass(frozen=True)
class Event:
    """timestamp: seconds since 1970. request, experiment, arm: of the recommendation it follows.

    Raises:
        DataError: an empty or overlong id, an unknown type, a time that is no finite number.
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
            value = getattr(self, name)
            if not value or len(value) > MAX_ID or "\0" in value:
                raise DataError(f"event {name} {value[:40]!r}: 1 to {MAX_ID} characters, no NUL")
        for name in ("request", "experiment", "arm"):
            value = getattr(self, name)
            if value is not None and (len(value) > MAX_ID or "\0" in value):
                raise DataError(f"event {name} {value[:40]!r}: at most {MAX_ID} characters, no NUL")
        if self.type not in TYPES:
            raise DataError(f"event type {self.type!r}: choose one of {', '.join(TYPES)}")
        if not math.isfinite(self.timestamp) or self.timestamp < 0:
            raise DataError(f"timestamp {self.timestamp}: give seconds since 1970")


COLUMNS = tuple(f.name for f in fields(Event))


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

    url: ``sqlite:///PATH`` or ``postgresql+psycopg://...``. A database that is away when the log is
    opened, or goes away later, is a StorageError of the call that needed it; the next call tries
    again.

    Raises:
        ConfigError: another kind of URL, a library that is missing. StorageError: a file that is
            no event log, or one of another layout.
    """

    def __init__(self, url: str) -> None:
        self.engine, self._events, self._items, self._meta = _open(url)
        self._made = False
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
        rows = [asdict(event) for event in events]
        insert = self._insert(self._events, "id").returning(self._events.c.seq)
        with self._writing() as connection:
            return sum(len(connection.execute(insert, part).all()) for part in _parts(rows))

    def history(self, user: str, limit: int) -> list[str]:
        """The newest ``limit`` items that a user clicked or replied to, oldest first.

        Several events in a row about one item are one step of the history.
        """
        from sqlalchemy import select

        e = self._events.c
        query = (
            select(e.item)
            .where(e.user == user, e.type.in_(POSITIVE))
            .order_by(e.timestamp.desc(), e.seq.desc())
            .limit(2 * limit)
        )
        with self._reading() as connection:
            newest = [str(item) for (item,) in connection.execute(query)]
        steps = [item for n, item in enumerate(newest) if n == 0 or newest[n - 1] != item]
        return steps[:limit][::-1]

    def users(self, prefix: str = "", limit: int = 20) -> list[str]:
        """Users with a history whose id begins with ``prefix``, in order of id."""
        from sqlalchemy import select

        e = self._events.c
        query = (
            select(e.user)
            .where(e.type.in_(POSITIVE), e.user.startswith(prefix, autoescape=True))
            .distinct()
            .order_by(e.user)
            .limit(limit)
        )
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
        """Delete events older than ``before``, in seconds since 1970. How many they were."""
        from sqlalchemy import delete

        with self._writing() as connection:
            gone = delete(self._events).where(self._events.c.timestamp < before)
            return int(connection.execute(gone).rowcount)

    # -- items -----------------------------------------------------------------------------------

    def put_items(self, items: Mapping[str, tuple[str, Attributes]]) -> None:
        """Add or replace items; on disk when this returns.

        Raises:
            StorageError: nothing was changed.
        """
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
            StorageError: nothing was changed.
        """
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
        with self._writing() as connection:
            for part in _parts(rows):
                connection.execute(insert, part)

    # -- the database ----------------------------------------------------------------------------

    def ping(self) -> None:
        """Raises StorageError while the database cannot be read."""
        from sqlalchemy import text

        with self._reading() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()

    def _insert(self, table: Any, once: str | None) -> Any:
        """INSERT of this dialect; a row whose column ``once`` is there already is left out."""
        from sqlalchemy.dialects import postgresql, sqlite

        made = (sqlite if self.engine.dialect.name == "sqlite" else postgresql).insert(table)
        return made if once is None else made.on_conflict_do_nothing(index_elements=[once])

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        with self._errors():
            self._prepare()
            with self.engine.execution_options(writes=True).begin() as connection:
                yield connection

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
                self._meta.metadata.create_all(connection)
                connection.execute(self._meta.insert(), {"layout": LAYOUT})
        self._made = True


def _parts(rows: list[dict[str, Any]], size: int = 1000) -> Iterator[list[dict[str, Any]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _open(url: str) -> tuple[Any, Any, Any, Any]:
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
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}}
    else:
        options = {
            "pool_pre_ping": True,
            "pool_timeout": BUSY_SECONDS,
            "connect_args": {"connect_timeout": 3},
        }
    try:
        engine = sa.create_engine(parsed, **options)
    except ImportError:
        raise ConfigError("PostgreSQL needs psycopg: pip install 'l2rec[postgres]'") from None
    if sqlite:
        sa.event.listen(engine, "connect", _durable)
        sa.event.listen(engine, "begin", _begin)
    return engine, *_tables(sa)


def _durable(connection: Any, _: Any) -> None:
    """Every commit is on disk, readers do not wait for writers, and transactions are whole."""
    connection.isolation_level = None  # or the driver begins and commits where it likes
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_SECONDS * 1000}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Any) -> None:
    """Who will write says so at once, and waits for other writers; later it could only fail."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _tables(sa: Any) -> tuple[Any, Any, Any]:
    metadata = sa.MetaData()
    short, number = sa.String(MAX_ID), sa.BigInteger().with_variant(sa.Integer, "sqlite")
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
        sa.Index("l2rec_events_user", "user", "timestamp", "seq"),
        sa.Index("l2rec_events_experiment", "experiment", "seq"),
        sa.Index("l2rec_events_time", "timestamp"),
    )
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
