"""No fork while a thread of this process is inside SQLite, or in a transaction of it.

SQLite keeps in memory which locks this process has on a file. A child that is forked meanwhile inherits that, without the
locks: what it takes for its own lock is never released, and all that it wants of the file is refused as busy. And a child
that is forked while another thread holds one of SQLite's mutexes waits for it for ever. A worker forks while it works: for
a pool child that died, in place of a function that waits for a task.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Gate:
    """Many threads may be inside at once; a fork waits until no other is, and lets none in meanwhile."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside: dict[int, int] = {}  #: thread -> how often
        self._is_forking = False

    def enter(self) -> None:
        me = threading.get_ident()
        with self._changed:
            while self._is_forking and me not in self._inside:
                self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self._changed:
            left = self._inside.pop(me, 1) - 1
            if left:
                self._inside[me] = left
            self._changed.notify_all()

    def close(self) -> None:
        me = threading.get_ident()
        with self._changed:
            while self._is_forking:
                self._changed.wait()
            self._is_forking = True
            while self._inside.keys() - {me}:
                self._changed.wait()

    def open(self) -> None:
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()


_gate = _Gate()


def _reset() -> None:
    global _gate  # noqa: PLW0603  the threads that were inside are not in this process
    _gate = _Gate()


# Asked for when it happens: a child has another gate.
os.register_at_fork(before=lambda: _gate.close(), after_in_parent=lambda: _gate.open(), after_in_child=_reset)  # noqa: PLW0108


class Connection(sqlite3.Connection):
    """SQLite's connection. It stays inside the gate from the begin of a transaction to its end."""

    _is_inside = False  #: for the sake of a transaction

    def run(self, work: Callable[..., Result], *args: Any) -> Result:
        """Call into SQLite."""
        _gate.enter()
        try:
            return work(*args)
        finally:
            before, self._is_inside = self._is_inside, self.in_transaction
            for _ in range(1 + before - self._is_inside):
                _gate.leave()

    def cursor(self, *_: Any) -> Any:
        return super().cursor(Cursor)

    def execute(self, *args: Any) -> Any:
        return self.cursor().execute(*args)

    def commit(self) -> None:
        self.run(super().commit)

    def rollback(self) -> None:
        self.run(super().rollback)

    def close(self) -> None:
        _gate.enter()
        try:
            super().close()
        finally:
            before, self._is_inside = self._is_inside, False
            for _ in range(1 + before):
                _gate.leave()


class Cursor(sqlite3.Cursor):
    """SQLite's cursor, inside the gate. It reads all rows at once: a statement that returns some (UPDATE ... RETURNING) holds
    its locks, of the file and in memory, until the last has been read."""

    connection: Connection
    _rows: Iterator[Any] = iter(())

    def execute(self, *args: Any) -> Any:
        self._rows = iter(self.connection.run(self._execute, *args))
        return self

    def _execute(self, *args: Any) -> list[Any]:
        super().execute(*args)
        return super().fetchall() if self.description is not None else []

    def executemany(self, *args: Any) -> Any:
        return self.connection.run(super().executemany, *args)

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchmany(self, size: int | None = None) -> list[Any]:
        return list(islice(self._rows, self.arraysize if size is None else size))

    def fetchall(self) -> list[Any]:
        return list(self._rows)


def connect(*args: Any, **options: Any) -> sqlite3.Connection:
    """As `sqlite3.connect`."""
    _gate.enter()
    try:
        return sqlite3.connect(*args, factory=Connection, **options)
    finally:
        _gate.leave()
