"""The message bus: the tables and statements of the Kombu transport, and which of its owners live.

What lies here is in flight, not state: the tables are made on first use and have no migrations. A message that a
consumer took carries its *owner*, a number for which a process holds a lock that dies with it; so messages of a killed
consumer are found by asking for the lock, without timeouts.
"""

import fcntl
import os
import select
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from secrets import randbelow
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from aque.store.engine import open_engine, sqlstate, transaction, wall_clock

#: First half of every advisory lock of the bus ("aque"); the second is an owner, or 0 while the tables are made.
_LOCKS = 0x61717565

#: A message for a queue that nobody declared is kept this long.
_UNDECLARED_SECONDS = 86400.0

_metadata = sa.MetaData()

queue = sa.Table(
    "aque_bus_queue",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    #: Removed when unused for this long; used means declared, read, or held.
    sa.Column("expires_seconds", sa.Double),
    #: How long a message may wait in it.
    sa.Column("ttl_seconds", sa.Double),
    #: When it was last used, seconds since 1970; of no matter while somebody holds it.
    sa.Column("used_at", sa.Double, nullable=False),
    #: The owner that consumes a queue that can expire.
    sa.Column("holder", sa.BigInteger),
)

binding = sa.Table(
    "aque_bus_binding",
    _metadata,
    sa.Column("exchange", sa.Text, primary_key=True),
    sa.Column("routing_key", sa.Text, primary_key=True),
    sa.Column("queue", sa.Text, primary_key=True, index=True),
    #: What `routing_key` means to a topic exchange, as a regular expression.
    sa.Column("pattern", sa.Text, nullable=False),
)

message = sa.Table(
    "aque_bus_message",
    _metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), sa.Identity(always=True), primary_key=True),
    sa.Column("queue", sa.Text, nullable=False),
    #: 0 to 9, higher first.
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    #: Seconds since 1970; null: never.
    sa.Column("expires_at", sa.Double),
    sa.Column("owner", sa.BigInteger),
    sa.Column("redelivered", sa.Boolean, nullable=False, server_default=sa.false()),
    # Without AUTOINCREMENT SQLite gives the id of a deleted message to the next: a late ack would remove that one.
    sqlite_autoincrement=True,
)
_waits, _owned = message.c.owner.is_(None), message.c.owner.is_not(None)
sa.Index(
    "aque_bus_message_waits",
    message.c.queue,
    message.c.priority.desc(),
    message.c.id,
    postgresql_where=_waits,
    sqlite_where=_waits,
)
sa.Index("aque_bus_message_owned", message.c.owner, postgresql_where=_owned, sqlite_where=_owned)
_can_expire = message.c.expires_at.is_not(None)
sa.Index("aque_bus_message_expires", message.c.expires_at, postgresql_where=_can_expire, sqlite_where=_can_expire)


@dataclass(frozen=True, slots=True)
class Message:
    """A message that was claimed. `body` is the transport's JSON."""

    id: int
    body: str
    redelivered: bool


# Connecting


def open_bus(url: str) -> sa.Engine:
    """An engine for the bus at `url`, whose commits do not wait for the disk unless asked to (`publish(durable=True)`).

    A process that dies loses nothing by that. A machine that dies may lose transient messages of its last half second,
    and acknowledgements, which means that a message comes again.
    """
    engine = open_engine(url, pool_size=5, max_overflow=20, pool_reset_on_return=None)
    fast = _SYNCHRONOUS[engine.dialect.name][False]

    def prepare(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(fast)
        cursor.close()
        if engine.dialect.name == "postgresql" and not connection.autocommit:
            connection.commit()

    sa.event.listen(engine, "connect", prepare)
    if engine.dialect.name == "postgresql":
        sa.event.listen(engine, "checkout", _refuse_broken)
    return engine


def _refuse_broken(connection: Any, _record: object, _proxy: object) -> None:
    """Have the pool replace an idle connection that the server has ended.

    Such a connection has something to read: the server's farewell, or the end. Looking takes 3 us, and the ping that
    SQLAlchemy offers takes a round trip.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        raise sa.exc.DisconnectionError("the server ended this connection")


@contextmanager
def connected(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection to the bus. Besides SQLAlchemy's database errors, ConnectionResetError: the server ended, twice in a row,
    what the pool had just opened."""
    try:
        connection = engine.connect()
    except sa.exc.InvalidRequestError as error:
        raise ConnectionResetError("the server ends each new connection") from error
    with connection:
        yield connection


_SYNCHRONOUS = {
    "sqlite": {False: "PRAGMA synchronous=NORMAL", True: "PRAGMA synchronous=FULL"},
    "postgresql": {False: "SET synchronous_commit = off", True: "SET synchronous_commit = on"},
}


def create_tables(connection: sa.Connection) -> None:
    """Make the tables if they are missing."""
    # Asked first, since CREATE ... IF NOT EXISTS needs the right to create even where the tables exist.
    if sa.inspect(connection).has_table(message.name):
        return
    with transaction(connection):
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCKS, 0)))
        _metadata.create_all(connection, checkfirst=True)


def is_gone(error: sa.exc.DBAPIError) -> bool:
    """True if the server, its connection or the tables are gone, so that connecting again is the remedy."""
    undefined_table = "42P01"
    gone = (sa.exc.OperationalError, sa.exc.InterfaceError)
    return error.connection_invalidated or isinstance(error, gone) or sqlstate(error) == undefined_table


# Queues and bindings


def declare_queue(
    connection: sa.Connection, name: str, expires_seconds: float | None, ttl_seconds: float | None
) -> None:
    """Make a queue, or mark it as used and give it these limits."""
    insert = _insert(connection, queue).values(
        name=name, expires_seconds=expires_seconds, ttl_seconds=ttl_seconds, used_at=wall_clock()
    )
    new = {column: insert.excluded[column] for column in ("expires_seconds", "ttl_seconds", "used_at")}
    connection.execute(insert.on_conflict_do_update(index_elements=[queue.c.name], set_=new))


def touch_queue(connection: sa.Connection, name: str) -> None:
    """Mark a queue that can expire as used."""
    expires = queue.c.expires_seconds.is_not(None)
    connection.execute(sa.update(queue).where(queue.c.name == name, expires).values(used_at=wall_clock()))


def hold_queue(connection: sa.Connection, name: str, owner: int) -> None:
    """Keep a queue that can expire alive for as long as `owner` lives."""
    expires = queue.c.expires_seconds.is_not(None)
    connection.execute(sa.update(queue).where(queue.c.name == name, expires).values(holder=owner))


def let_go_of_queues(connection: sa.Connection, owners: Collection[int], name: str | None = None) -> None:
    """Start the clock of the queues (of the queue `name`) that `owners` hold."""
    update = sa.update(queue).where(queue.c.holder.in_(owners))
    if name is not None:
        update = update.where(queue.c.name == name)
    connection.execute(update.values(holder=None, used_at=wall_clock()))


def has_queue(connection: sa.Connection, name: str) -> bool:
    return connection.scalar(sa.select(sa.exists().where(queue.c.name == name))) or False


def delete_queues(connection: sa.Connection, names: Collection[str]) -> None:
    """Remove queues with their bindings and messages; runs inside the caller's transaction."""
    connection.execute(sa.delete(queue).where(queue.c.name.in_(names)))
    connection.execute(sa.delete(binding).where(binding.c.queue.in_(names)))
    connection.execute(sa.delete(message).where(message.c.queue.in_(names)))


def bind(connection: sa.Connection, exchange: str, routing_key: str, pattern: str, name: str) -> None:
    """Route messages of `exchange` to the queue `name`; nothing happens if they are already."""
    insert = _insert(connection, binding).values(
        exchange=exchange, routing_key=routing_key, pattern=pattern, queue=name
    )
    connection.execute(insert.on_conflict_do_nothing())


def unbind(connection: sa.Connection, exchange: str, routing_key: str, name: str) -> None:
    this = (binding.c.exchange == exchange) & (binding.c.routing_key == routing_key) & (binding.c.queue == name)
    connection.execute(sa.delete(binding).where(this))


def bindings(connection: sa.Connection, exchange: str) -> list[tuple[str, str, str]]:
    """(routing key, pattern, queue) of every binding of `exchange`."""
    found = sa.select(binding.c.routing_key, binding.c.pattern, binding.c.queue).where(binding.c.exchange == exchange)
    return [row._tuple() for row in connection.execute(found)]


def count_waiting(connection: sa.Connection, name: str) -> int:
    """How many messages wait in a queue, not counting those that a consumer has."""
    return connection.scalar(sa.select(sa.func.count()).where(message.c.queue == name, _waits)) or 0


def purge(connection: sa.Connection, name: str) -> int:
    """Remove the messages that wait in a queue; returns how many there were."""
    return connection.execute(sa.delete(message).where(message.c.queue == name, _waits)).rowcount


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    return (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(table)


# Publishing


def bell_name(queue_name: str) -> str:
    """The doorbell of a queue. `_send` computes the same in SQL, on PostgreSQL."""
    return "bus " + sha256(queue_name.encode()).hexdigest()[:32]


def publish(
    connection: sa.Connection,
    exchange_type: str,
    exchange: str,
    routing_key: str,
    priority: int,
    body: str,
    lifetime_seconds: float | None,
    durable: bool,
) -> set[str]:
    """Put a message into every queue that the exchange routes it to, in one statement.

    The exchange "" routes to the queue named by `routing_key`, whether or not it was declared. Returns the queues
    whose doorbell is still to be rung: on PostgreSQL none, since the statement rings.
    """
    on_postgresql = connection.dialect.name == "postgresql"
    values = {
        "exchange": exchange,
        "routing_key": routing_key,
        "priority": priority,
        "body": body,
        "lifetime": lifetime_seconds,
        "synchronous": "on" if durable else "off",
    }
    statement = _send("queue" if not exchange else exchange_type, on_postgresql)
    if on_postgresql:
        connection.execute(statement, values)
        return set()
    if not durable:
        return set(connection.scalars(statement, values))
    wait, fast = _SYNCHRONOUS["sqlite"][True], _SYNCHRONOUS["sqlite"][False]
    connection.exec_driver_sql(wait)
    try:
        return set(connection.scalars(statement, values))
    finally:
        connection.exec_driver_sql(fast)


@cache
def _send(exchange_type: str, on_postgresql: bool) -> Any:
    """The statement of `publish`: insert .. select from the queues that match, and on PostgreSQL ring in the same."""
    target = sa.bindparam("routing_key", type_=sa.Text)
    lifetime = sa.bindparam("lifetime", type_=sa.Double)
    seconds = sa.case((lifetime.is_(None) | (queue.c.ttl_seconds < lifetime), queue.c.ttl_seconds), else_=lifetime)
    if exchange_type == "queue":
        seconds = sa.case((queue.c.name.is_(None), _UNDECLARED_SECONDS), else_=seconds)
        name: Any = target
        one = sa.select(sa.literal(1).label("one")).subquery()
        source: Any = one.outerjoin(queue, queue.c.name == target)
        matches: Any = sa.true()
    else:
        routed = sa.select(binding.c.queue).where(binding.c.exchange == sa.bindparam("exchange", type_=sa.Text))
        if exchange_type == "direct":
            routed = routed.where(binding.c.routing_key == target)
        elif exchange_type == "topic":
            routed = routed.where(target.regexp_match(binding.c.pattern))
        name, source, matches = queue.c.name, queue, queue.c.name.in_(routed)
    row = sa.select(
        name,
        sa.bindparam("priority", type_=sa.SmallInteger),
        sa.bindparam("body", type_=sa.Text),
        wall_clock() + seconds,
    )
    columns = [message.c.queue, message.c.priority, message.c.body, message.c.expires_at]
    insert = sa.insert(message).from_select(columns, row.select_from(source).where(matches)).returning(message.c.queue)
    if not on_postgresql:
        return insert
    sent = insert.cte("sent")
    digest = sa.func.encode(sa.func.sha256(sa.func.convert_to(sent.c.queue, "UTF8")), "hex")
    # The setting lasts until the end of this statement's own transaction: only what must outlive a crash of the server
    # waits for its disk.
    return sa.select(
        sa.func.pg_notify("aque bus " + sa.func.left(digest, 32), ""),
        sa.func.set_config("synchronous_commit", sa.bindparam("synchronous", type_=sa.Text), True),
    ).select_from(sent)


# Consuming


def claim(connection: sa.Connection, name: str, owner: int, limit: int) -> list[Message]:
    """Give up to `limit` messages that wait in a queue to `owner`, in the order in which they are due."""
    rows = connection.execute(_CLAIM, {"name": name, "owner": owner, "limit": limit}).all()
    ordered = sorted(rows, key=lambda row: (-row.priority, row.id))  # RETURNING promises no order
    return [Message(row.id, row.body, row.redelivered) for row in ordered]


def _claim_statement() -> Any:
    alive = message.c.expires_at.is_(None) | (message.c.expires_at > wall_clock())
    # A CTE, not a subquery: PostgreSQL may run a subquery again and lock more than `limit` rows.
    picked = (
        sa.select(message.c.id)
        .where(message.c.queue == sa.bindparam("name", type_=sa.Text), _waits, alive)
        .order_by(message.c.priority.desc(), message.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer))
        .with_for_update(skip_locked=True)  # left out by SQLite, which has one writer at a time
        .cte("picked")
    )
    return (
        sa.update(message)
        .where(message.c.id.in_(sa.select(picked.c.id)))
        .values(owner=sa.bindparam("owner", type_=sa.BigInteger))
        .returning(message.c.id, message.c.priority, message.c.body, message.c.redelivered)
    )


_CLAIM = _claim_statement()


def acknowledge(connection: sa.Connection, owner: int, ids: Collection[int]) -> None:
    """Remove messages that are done; leaves those that belong to another owner by now.

    One that was freed and still waits is removed too: the acknowledgement came after its consumer had reconnected.
    """
    connection.execute(_ACKNOWLEDGE, {"owner": owner, "ids": list(ids)})


_ACKNOWLEDGE = sa.delete(message).where(
    message.c.id.in_(sa.bindparam("ids", expanding=True)),
    (message.c.owner == sa.bindparam("owner", type_=sa.BigInteger)) | _waits,
)


def give_back(connection: sa.Connection, owner: int, ids: Collection[int], redelivered: bool) -> set[str]:
    """Let messages of `owner` wait again. Returns their queues, whose doorbells are to be rung."""
    update = sa.update(message).where(message.c.id.in_(ids), message.c.owner == owner)
    values: dict[str, Any] = {"owner": None, "redelivered": True} if redelivered else {"owner": None}
    return set(connection.scalars(update.values(values).returning(message.c.queue)))


def free(connection: sa.Connection, owners: Collection[int]) -> set[str]:
    """Let all messages of these owners wait again. Returns their queues, whose doorbells are to be rung."""
    update = sa.update(message).where(message.c.owner.in_(owners)).values(owner=None, redelivered=True)
    return set(connection.scalars(update.returning(message.c.queue)))


# Upkeep


def owners(connection: sa.Connection) -> set[int]:
    """Everybody who has messages or holds queues."""
    of_messages = sa.select(message.c.owner).where(_owned)
    of_queues = sa.select(queue.c.holder).where(queue.c.holder.is_not(None))
    return set(connection.scalars(of_messages.union(of_queues)))


def expired_queues(connection: sa.Connection) -> list[str]:
    """The queues that nobody holds and nobody used for as long as they are kept; locked, in order of their names."""
    expired = queue.c.holder.is_(None) & (queue.c.used_at + queue.c.expires_seconds < wall_clock())
    return list(connection.scalars(sa.select(queue.c.name).where(expired).order_by(queue.c.name).with_for_update()))


def has_expired(connection: sa.Connection) -> bool:
    """True if there are messages or queues whose time is over."""
    queues = sa.exists().where(queue.c.holder.is_(None), queue.c.used_at + queue.c.expires_seconds < wall_clock())
    messages = sa.exists().where(message.c.expires_at < wall_clock(), _waits)
    return connection.scalar(sa.select(queues | messages)) or False


def delete_expired_messages(connection: sa.Connection) -> None:
    connection.execute(sa.delete(message).where(message.c.expires_at < wall_clock(), _waits))


# Owners


def become_owner(engine: sa.Engine, listening: Any) -> int:
    """A new owner that lives as long as this process, or on PostgreSQL as long as the connection `listening`.

    `listening` is psycopg2's, and not used on SQLite. ConnectionResetError if it broke.
    """
    if engine.dialect.name == "sqlite":
        return _owner_file(engine).take()
    try:
        while True:
            owner = 1 + randbelow(2**31 - 1)
            with listening.cursor() as cursor:
                cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", (_LOCKS, owner))
                if cursor.fetchone()[0]:
                    return owner
    except engine.dialect.loaded_dbapi.Error as error:
        raise ConnectionResetError(str(error).partition("\n")[0]) from error


def retire(engine: sa.Engine, owner: int) -> None:
    """End an owner before its process ends. On PostgreSQL it ends with its connection."""
    if engine.dialect.name == "sqlite":
        _owner_file(engine).release(owner)


def dead(connection: sa.Connection, owners: Collection[int]) -> set[int]:
    """Those of `owners` that do not live any more; read `owners` first, in a statement before."""
    if not owners:
        return set()
    if connection.dialect.name == "sqlite":
        return _owner_file(connection.engine).dead(owners)
    return set(owners) - set(connection.scalars(_LIVING, {"locks": _LOCKS}))


_LIVING = sa.text(
    "SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND classid = :locks AND objsubid = 2 AND granted "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class _OwnerFile:
    """SQLite: an owner is a locked byte of a file beside the database.

    POSIX locks: the kernel drops them when the process dies, and a forked child, which may outlive it, does not have
    them. They also go when the process closes *any* descriptor of the file, so there is one, and it stays open.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._mine: set[int] = set()
        self._guard = threading.Lock()

    def take(self) -> int:
        with self._guard:
            while True:
                owner = 1 + randbelow(2**31 - 1)
                with suppress(BlockingIOError):
                    if owner not in self._mine:
                        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, owner)
                        self._mine.add(owner)
                        return owner

    def release(self, owner: int) -> None:
        with self._guard:
            if owner in self._mine:
                self._mine.remove(owner)
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, owner)

    def dead(self, owners: Iterable[int]) -> set[int]:
        with self._guard:
            return {owner for owner in owners if owner not in self._mine and self._is_free(owner)}

    def _is_free(self, owner: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, owner)
        except BlockingIOError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, owner)
        return True


_owner_files: dict[str, _OwnerFile] = {}
_owner_files_guard = threading.Lock()


def _owner_file(engine: sa.Engine) -> _OwnerFile:
    path = os.path.realpath(engine.url.database or "") + "-owners"
    with _owner_files_guard:
        if path not in _owner_files:
            _owner_files[path] = _OwnerFile(path)
        return _owner_files[path]


def _forget_in_child() -> None:
    global _owner_files_guard  # noqa: PLW0603 (another thread may have held it while this one forked)
    _owner_files_guard = threading.Lock()
    _owner_files.clear()


os.register_at_fork(after_in_child=_forget_in_child)
