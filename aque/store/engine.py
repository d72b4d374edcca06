"""Every difference between SQLite and PostgreSQL: connecting, locking, clocks, and sets of rows as one parameter."""

import json
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from aque import hints
from aque.errors import BadInput, BadStateDirectory, StoreUnreachable
from aque.store import forks

T = TypeVar("T")

#: For those outside of this package, which alone imports SQLAlchemy.
Connection: TypeAlias = sa.Connection
Engine: TypeAlias = sa.Engine
#: What the driver raises: the connection or the server failed, or the data was refused.
DatabaseError = sa.exc.DBAPIError

#: SQLSTATEs after which the same transaction may simply be run again: serialization failure, deadlock, a lock that was not
#: free in time (see `lock_table`).
RETRY_STATES = frozenset({"40001", "40P01", "55P03"})

#: How long a connection to SQLite waits for another's transaction.
BUSY_SECONDS = 30
#: How long a change of the whole farm waits for the transactions of workers, which take milliseconds.
LOCK_SECONDS = 2


def open_engine(url: str, **options: Any) -> sa.Engine:
    """An engine for `sqlite:///FILE` or `postgresql+psycopg2://...`; connects lazily.

    Its connections are in autocommit mode, so that a read costs one round trip; writes go through `transaction()`.
    SQLite: WAL, the directory is made 0700 and the file 0600. PostgreSQL: keepalives, so that a dead server is noticed
    in under a minute.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        check_state_directory(Path(parsed.database or ""))
        engine = sa.create_engine(
            parsed, isolation_level="AUTOCOMMIT", connect_args={"timeout": 30, "check_same_thread": False}, **options
        )
        sa.event.listen(engine, "do_connect", lambda dialect, record, args, given: forks.connect(*args, **given))
        sa.event.listen(engine, "connect", _prepare_sqlite)
        return engine
    engine = sa.create_engine(
        parsed,
        isolation_level="AUTOCOMMIT",
        connect_args={
            "connect_timeout": 5,
            "keepalives_idle": 20,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30000,
            "application_name": "aque",
        },
        **options,
    )
    sa.event.listen(engine, "connect", _prepare_postgresql)
    sa.event.listen(engine, "before_cursor_execute", _begin_with_first, retval=True)
    return engine


def _prepare_postgresql(connection: Any, _record: object) -> None:
    """Plan a prepared statement once, and not for each set of parameters: see `hot`. And compile none: such a plan expects a
    LIMIT to be a tenth of all rows, and to compile for that many took 80 ms at each use, where to run it takes 0.2."""
    with connection.cursor() as cursor:
        cursor.execute("SET plan_cache_mode = force_generic_plan; SET jit = off")


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
    _enter_wal(connection)
    for pragma in ("synchronous=FULL", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    connection.create_function("aque_lease_clock", 0, lambda: time.clock_gettime(time.CLOCK_BOOTTIME))
    connection.create_function("aque_wall_clock", 0, time.time)


def _enter_wal(connection: sqlite3.Connection) -> None:
    """A new file changes its journal once, which fails at once, whatever the timeout, while another process does the same."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


@contextmanager
def transaction(connection: sa.Connection) -> Iterator[sa.Connection]:
    """One write transaction on `connection`: commits, or rolls back on an exception.

    BEGIN IMMEDIATE on SQLite: a deferred transaction that reads and then writes fails at once with SQLITE_BUSY_SNAPSHOT
    when another process wrote in between, whatever the timeout.
    """
    if connection.dialect.name == "sqlite":
        with _no_fork:
            run_text(connection, "BEGIN IMMEDIATE")
            yield from _until_end(connection)
    else:
        connection.info[_TO_BEGIN] = True
        yield from _until_end(connection)


@contextmanager
def one_statement(connection: sa.Connection) -> Iterator[sa.Connection]:
    """For a block that writes with one statement on PostgreSQL: there it is a transaction already, and BEGIN and COMMIT of its
    own would be a round trip more. On SQLite, where the same takes several, as `transaction`."""
    if connection.dialect.name == "sqlite":
        with transaction(connection):
            yield connection
    else:
        yield connection


@contextmanager
def inside_transaction(connection: sa.Connection) -> Iterator[None]:
    """For a block of several statements that belong together: in the transaction that is open, or else in one of its own."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == "sqlite":
        is_open = driver.in_transaction
    else:
        is_open = _TO_BEGIN in connection.info or driver.info.transaction_status != 0  # libpq's PQTRANS_IDLE
    if is_open:
        yield
    else:
        with transaction(connection):
            yield


def lock_table(connection: sa.Connection, table: sa.Table) -> None:
    """Until this transaction ends, let no other one change rows of `table` or lock any: first it waits for those that have, for
    at most LOCK_SECONDS, since who comes later waits behind it. Reading goes on. SQLite: `transaction` does that already."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(
            f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'; LOCK TABLE {table.name} IN EXCLUSIVE MODE"
        )


#: Held during SQLite's transactions and by whoever forks: SQLite keeps its locks in the memory of the process, and a child
#: forked in the middle of a transaction would find the database locked for ever.
_no_fork = threading.RLock()
os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)


def _until_end(connection: sa.Connection) -> Iterator[sa.Connection]:
    try:
        yield connection
        if not connection.info.pop(_TO_BEGIN, False):
            run_text(connection, "COMMIT")
    except BaseException:
        if not connection.invalidated and not connection.info.pop(_TO_BEGIN, False):
            with suppress(sa.exc.DBAPIError):
                connection.exec_driver_sql("ROLLBACK")
        raise


#: In `connection.info`: a transaction is wanted, and BEGIN has not been sent.
_TO_BEGIN = "aque_to_begin"


def _begin_with_first(
    connection: sa.Connection, cursor: Any, statement: str, parameters: Any, _context: Any, executemany: bool
) -> tuple[str, Any]:
    """PostgreSQL: send BEGIN together with the first statement of the transaction, which spares a round trip."""
    if connection.info.pop(_TO_BEGIN, False):
        if executemany:
            cursor.execute("BEGIN")
        else:
            statement = "BEGIN; " + statement
    return statement, parameters


def run_text(connection: sa.Connection, text: str, values: Any = ()) -> Any:
    """Give a statement to the driver, without most of what SQLAlchemy does around it; returns the driver's cursor, and raises
    what SQLAlchemy would. Listeners of others do not hear of it: they could not do without SQLAlchemy's context of it."""
    if not connection.in_transaction():
        connection.begin()  # as SQLAlchemy's own `execute` does: it sends nothing
    dialect = connection.dialect
    cursor = connection.connection.cursor()
    if connection.info.pop(_TO_BEGIN, False):
        text = "BEGIN; " + text
    try:
        _send(cursor, text, values)
    except dialect.loaded_dbapi.Error as error:
        is_lost = dialect.is_disconnect(error, connection.connection.driver_connection, cursor)
        if is_lost:
            connection.invalidate(error)
            connection.engine.dispose()  # the others of the pool are lost, too
        kind = dialect.loaded_dbapi.Error
        raise sa.exc.DBAPIError.instance(
            text, values, error, kind, connection_invalidated=is_lost, dialect=dialect
        ) from error
    return cursor


def _send(cursor: Any, text: str, values: Any) -> None:
    cursor.execute(text, values)


class lease_clock(GenericFunction[float]):
    """Seconds on the clock that leases use: the database's on PostgreSQL (not `now()`, which stands still inside a
    transaction), the time since boot on SQLite (one machine, and a set wall clock must not end a lease)."""

    type = sa.Double()
    inherit_cache = True
    name = "aque_lease_clock"


class wall_clock(GenericFunction[float]):
    """Seconds since 1970, UTC, on the database's clock."""

    type = sa.Double()
    inherit_cache = True
    name = "aque_wall_clock"


@compiles(lease_clock, "postgresql")
@compiles(wall_clock, "postgresql")
def _postgresql_clock(element: Any, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


def check_state_directory(file: Path) -> None:
    """Make the directory of an embedded store (0700) and its file (0600); BadStateDirectory if that cannot work."""
    directory = file.parent
    advice = (
        "Set AQUE_STATE_DIR to a directory on a local disk that you can write, or AQUE_BROKER to a PostgreSQL server."
    )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadStateDirectory(f"cannot create the state directory {directory}: {error.strerror}. {advice}") from error
    kind = file_system(directory)
    if kind in hints.NETWORK_FILE_SYSTEMS:
        raise BadStateDirectory(
            f"the state directory {directory} is on a network file system ({kind}), where SQLite cannot be shared. {advice}"
        )
    try:
        # Only a new file is opened here: to close any descriptor of a database would drop all locks that SQLite holds on it in
        # this process, and then another process, believing to be the last, removes the write-ahead log under us.
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if not os.access(file, os.R_OK | os.W_OK):
            raise BadStateDirectory(f"cannot write {file}: permission denied. {advice}") from None
    except OSError as error:
        raise BadStateDirectory(f"cannot write {file}: {error.strerror}. {advice}") from error


def why_not_personal(file: Path) -> str | None:
    """Why an embedded store is not this user's alone, as a sentence part; None if it is. Who can write it, or put another in
    its place, says what its worker runs."""
    for path in (file, file.parent):
        found = path.stat()
        if found.st_uid != os.geteuid():
            return f"{path} belongs to uid {found.st_uid}, this process to uid {os.geteuid()}"
        sticky = path is not file and found.st_mode & stat.S_ISVTX
        if found.st_mode & 0o022 and not sticky:
            return f"others can write {path}"
    return None


def file_system(path: Path, mountinfo: bytes | None = None) -> str:
    """The type of the file system that holds `path`, as in /proc/self/mountinfo; "" where that cannot be told."""
    if mountinfo is None:
        try:
            mountinfo = Path("/proc/self/mountinfo").read_bytes()
        except OSError:
            return ""
    mount = hints.mount_of(os.path.realpath(os.fsencode(path)), hints.parse_mounts(mountinfo))
    return mount.kind if mount else ""


def shown_url(url: str | sa.URL) -> str:
    """A database URL for people: without its password."""
    return sa.make_url(url).render_as_string(hide_password=True)


def sqlstate(error: sa.exc.DBAPIError) -> str:
    """The five-letter SQLSTATE of a PostgreSQL error; "" for anything else."""
    return getattr(error.orig, "pgcode", None) or ""


def can_run_again(error: BaseException | None) -> bool:
    """True for a deadlock, a serialization failure, or an SQLite lock that was not free in time, raised by SQLAlchemy or by
    its driver."""
    of_driver = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    if isinstance(of_driver, sqlite3.OperationalError):
        return "database is locked" in str(of_driver)
    return getattr(of_driver, "pgcode", None) in RETRY_STATES


def again(work: Callable[[], T], tries: int = 10) -> T:
    """Run a transaction, and once more whenever the database took it back for the sake of another."""
    for n in range(tries):
        try:
            return work()
        except Exception as error:
            if n == tries - 1 or not can_run_again(error.__cause__ or error):
                raise
            time.sleep(0.01 * (n + 1))
    raise AssertionError


def is_data_error(error: Exception) -> bool:
    """True if the database refused what was to be written: to try the same again is useless."""
    return isinstance(error, (sa.exc.DataError, sa.exc.IntegrityError, sa.exc.StatementError)) and not isinstance(
        error, (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.ProgrammingError)
    )


def is_conflict(error: Exception) -> bool:
    """True if what was to be inserted is there already, or something with the same key."""
    return isinstance(error, sa.exc.IntegrityError)


def attempt_write(connection: sa.Connection, work: Callable[[], T]) -> T | None:
    """Run `work` under a savepoint of the open transaction; None, with nothing written, if the database refused its data, or
    they make no sense."""
    connection.exec_driver_sql("SAVEPOINT attempt")
    try:
        result = work()
    except (sa.exc.StatementError, BadInput, ValueError) as error:
        if isinstance(error, sa.exc.StatementError) and not is_data_error(error):
            raise
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT attempt")
        return None
    connection.exec_driver_sql("RELEASE SAVEPOINT attempt")
    return result


@contextmanager
def reachable(engine: sa.Engine) -> Iterator[None]:
    """Turn connection failures inside the block into StoreUnreachable, with the server but not the password."""
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.DatabaseError) as error:
        if type(error) not in (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.DatabaseError):
            raise  # the database answers; it is the statement or the data
        where = engine.url.render_as_string(hide_password=True)
        first = str(error.orig).strip().splitlines()[0] if error.orig else str(error)
        raise StoreUnreachable(
            f"cannot use the store {where}: {first}. Nothing was done; what was submitted before goes on. Check "
            "AQUE_BROKER and that the server is up, and ask again."
        ) from driver_error(error)


def driver_error(error: sa.exc.DBAPIError) -> BaseException | None:
    """What the driver said, as the cause of a sentence: without SQLAlchemy's hundred lines on the way there, which hide the
    sentence when a traceback is printed. (They are still the sentence's `__context__`.)"""
    return None if error.orig is None else error.orig.with_traceback(None)


def row_set(dialect: str, parameter: str, **columns: sa.types.TypeEngine[Any]) -> Any:
    """A parameter as a table: a JSON list of objects with these columns, so that one statement takes any number of rows.

    The statement's text does not depend on how many there are, and is compiled once.
    """
    if dialect == "sqlite":
        each = sa.func.json_each(sa.bindparam(parameter, type_=sa.Text)).table_valued("value")
        fields = [
            sa.type_coerce(sa.func.json_extract(each.c.value, f"$.{name}"), kind).label(name)
            for name, kind in columns.items()
        ]
        return sa.select(*fields).select_from(each).subquery(parameter)
    function = sa.func.json_to_recordset(sa.cast(sa.bindparam(parameter, type_=sa.Text), sa.JSON))
    return function.table_valued(*(sa.column(n, k) for n, k in columns.items()), name=parameter).render_derived(
        with_types=True
    )


class _IdList(sa.types.TypeDecorator[list[int]]):
    """A list of ids as one parameter: an array on PostgreSQL, JSON on SQLite."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        return dialect.type_descriptor(postgresql.ARRAY(sa.BigInteger) if dialect.name == "postgresql" else sa.Text())

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return list(value) if dialect.name == "postgresql" else json.dumps(list(value))


def one_of(dialect: str, column: Any, parameter: str) -> sa.ColumnElement[bool]:
    """True if `column` is one of the ids in the parameter, a list of any length; planned as cheaply as for one id."""
    ids = sa.bindparam(parameter, type_=_IdList())
    if dialect == "sqlite":
        return column.in_(sa.select(sa.func.json_each(ids).table_valued("value").c.value))  # type: ignore[no-any-return]
    return column == sa.func.any(ids)  # type: ignore[no-any-return]


def per_class(
    dialect: str,
    wanted: Any,
    table: sa.Table,
    class_column: sa.Column[Any],
    where: Any,
    order: Sequence[Any],
    limit: str,
) -> sa.Select[Any]:
    """The first `limit` rows of `table` in `order` for each class id in `wanted`, a CTE whose column is `id`.

    PostgreSQL: LATERAL, one index range per class. SQLite has no LATERAL, but runs a correlated IN as the same loop;
    PostgreSQL would not.
    """
    count = sa.bindparam(limit, type_=sa.Integer)
    if dialect == "sqlite":
        inner = table.alias("inner_row")
        columns = {column.key: inner.c[column.key] for column in table.c}

        def moved(clause: Any) -> Any:
            traverse: Any = sa.sql.visitors.replacement_traverse
            return traverse(
                clause,
                {},
                lambda part, **_: (
                    columns.get(part.key) if isinstance(part, sa.Column) and part.table is table else None
                ),
            )

        first = (
            sa.select(inner.c.id)
            .where(moved(class_column) == wanted.c.id, moved(where))
            .order_by(*[moved(column) for column in order])
            .limit(count)
            .correlate(wanted)
        )
        return sa.select(table).select_from(wanted.join(table, table.c.id.in_(first)))
    lateral: Any = (
        sa.select(table).where(class_column == wanted.c.id, where).order_by(*order).limit(count).lateral("first")
    )
    return sa.select(lateral).select_from(wanted.join(lateral, sa.true()))


def first_of_each(
    dialect: str, wanted: Any, table: sa.Table, same: Sequence[Any], number: Any, after: Any, limit: str
) -> sa.Select[Any]:
    """For each row of `wanted` the first `limit` rows of `table` for which `same` holds and whose `number` is greater than
    `after`, a column of `wanted`. `same` and `number` are the table's primary key.

    PostgreSQL: LATERAL, as in `per_class`. SQLite bounds the numbers by the last of the first so many.
    """
    count = sa.bindparam(limit, type_=sa.Integer)
    chosen = sa.and_(*same, number > after)
    if dialect == "sqlite":
        inner = table.alias("inner_row")
        adapt: Any = sa.sql.util.ClauseAdapter(inner).traverse
        first = sa.select(inner.c[number.key]).where(adapt(chosen)).order_by(inner.c[number.key]).limit(count)
        last = sa.select(sa.func.max(first.correlate(wanted).subquery().c[number.key])).correlate(wanted)
        return (
            sa.select(table)
            .select_from(wanted.join(table, chosen))
            .where(number <= last.scalar_subquery())
            .order_by(number)
        )
    lateral: Any = sa.select(table).where(chosen).order_by(number).limit(count).correlate(wanted).lateral("first")
    return sa.select(lateral).select_from(wanted.join(lateral, sa.true())).order_by(lateral.c[number.key])


def first_unlocked(
    dialect: str, wanted: Any, table: sa.Table, key: sa.Column[Any], where: Any, number: sa.Column[Any]
) -> sa.Select[Any]:
    """For each row of `wanted` (columns `name`, `n`, `below`) the `n` rows of `table` with the lowest `number`, under `below`,
    whose `key` is the name and for which `where` holds, as (name, number); one with null if there is none.

    PostgreSQL: rows that others have locked are passed over, the others are locked, both while it counts to `n`. SQLite, where
    nobody else writes meanwhile, numbers them: its LIMIT takes no column.
    """
    columns = wanted.c
    if dialect == "sqlite":
        place = sa.func.row_number().over(partition_by=key, order_by=number).label("place")
        asked = key.in_(sa.select(columns.name))
        first: Any = sa.select(key, number, place).where(where, asked).subquery("first")
        rows = first.c
        joined = sa.and_(rows[key.name] == columns.name, rows[number.name] < columns.below, rows.place <= columns.n)
    else:
        first = (
            sa.select(number)
            .where(key == columns.name, where, number < columns.below)
            .order_by(number)
            .limit(columns.n)
            .with_for_update(skip_locked=True, of=table)
            .correlate(wanted)
            .lateral("first")
        )
        joined = sa.true()
    return sa.select(columns.name, first.c[number.name]).select_from(wanted.outerjoin(first, joined))


def closure(dialect: str, first: Any, links: Sequence[tuple[Any, Any, Any]], per_row: bool = False) -> sa.CTE:
    """The ids in `first` and all that `links` lead to from there, as a recursive CTE with the column `id`. A link is a
    source column, a target column, and what must be true of its row. `per_row`: `first` is correlated, so that the CTE stays
    inside the subquery that selects from it.

    SQLite takes a recursive step per link, PostgreSQL a single one. There it is LATERAL behind an OFFSET, which leaves no
    choice but to look up each id in an index: joined in any other way, the step may read the whole table of edges for each
    level of the graph (a chain of 10,000 in tables without statistics: 33 s against 0.1 s).
    """
    found: sa.CTE = first.cte("found", recursive=True, nesting=per_row)
    if dialect == "sqlite":
        return found.union(*[sa.select(target).where(source == found.c.id, where) for source, target, where in links])
    ways = [
        sa.select(target.label("target")).where(source == found.c.id, where).correlate(found)
        for source, target, where in links
    ]
    reached: Any = sa.union_all(*ways).offset(sa.literal_column("0")).lateral("reached")
    return found.union(sa.select(reached.c.target).select_from(found.join(reached, sa.true())))


def table_bytes(connection: sa.Connection, only: str | None = None) -> tuple[dict[str, int], int]:
    """Bytes on disk, with indexes: of each of our tables, or of one of them, and their sum. SQLite tells it of the whole file
    only, unless it was built to tell more."""
    if connection.dialect.name == "postgresql":
        sized = connection.exec_driver_sql(
            "SELECT c.relname, pg_total_relation_size(c.oid) FROM pg_class c JOIN pg_class t"
            " ON t.oid = to_regclass('aque_task') AND t.relnamespace = c.relnamespace"
            " WHERE c.relkind = 'r' AND c.relname LIKE 'aque%%'"
        )
        tables = {name: int(size) for name, size in sized if only in (None, name)}
        return tables, sum(tables.values())
    pages, free, page_bytes = (
        int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
        for name in ("page_count", "freelist_count", "page_size")
    )
    total = (pages - free) * page_bytes
    if only is not None:
        return {}, total
    try:
        sized = connection.exec_driver_sql(
            "SELECT m.tbl_name, sum(s.pgsize) FROM dbstat s JOIN sqlite_schema m ON m.name = s.name GROUP BY m.tbl_name"
        )
        return {name: int(size) for name, size in sized}, total
    except sa.exc.OperationalError:  # no such table: dbstat
        return {}, total


def copy_rows(
    connection: sa.Connection, table: sa.Table, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Insert many rows the fastest way there is: COPY on PostgreSQL (six times executemany), executemany on SQLite."""
    try:
        _copy_rows(connection, table, columns, rows)
    except connection.dialect.loaded_dbapi.Error as error:  # as SQLAlchemy reports those of its own statements
        dbapi_error = connection.dialect.loaded_dbapi.Error
        raise sa.exc.DBAPIError.instance(f"COPY {table.name}", None, error, dbapi_error) from error


def _copy_rows(
    connection: sa.Connection, table: sa.Table, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    if connection.dialect.name == "sqlite":
        marks = ", ".join("?" for _ in columns)
        names = ", ".join(f'"{column}"' for column in columns)
        cursor = connection.connection.cursor()
        cursor.executemany(f"INSERT INTO {table.name} ({names}) VALUES ({marks})", rows)  # type: ignore[arg-type]
        return
    names = ", ".join(f'"{column}"' for column in columns)
    driver = connection.connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor:
        if connection.info.pop(_TO_BEGIN, False):
            cursor.execute("BEGIN")
        cursor.copy_expert(f"COPY {table.name} ({names}) FROM STDIN", _CopySource(rows))


class _CopySource:
    """A file of COPY text lines made as they are read, so that 100,000 rows are never in memory twice."""

    def __init__(self, rows: Iterable[Sequence[Any]]) -> None:
        self._lines = (("\t".join(map(_copy_text, row)) + "\n").encode() for row in rows)
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts, length = [self._rest], len(self._rest)
        while length < size:
            line = next(self._lines, None)
            if line is None:
                break
            parts.append(line)
            length += len(line)
        whole = b"".join(parts)
        self._rest = whole[size:]
        return whole[:size]


_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _copy_text(value: Any) -> str:
    if value is None:
        return "\\N"
    if isinstance(value, bytes):
        return "\\\\x" + value.hex()
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, str):
        return value.translate(_COPY_ESCAPES)
    return str(value)
