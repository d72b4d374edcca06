"""Doorbells: wake-ups, lossy by contract, between processes that share a store.

A ring says "look", never what there is to see: the state is in the store before the ring, and who listens also looks
now and then unasked. The carrier is LISTEN/NOTIFY on PostgreSQL, and one datagram socket per listener on SQLite.
"""

import os
import select
import socket
import stat
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

import sqlalchemy as sa

from aque.errors import BadStateDirectory
from aque.store import bells

#: Rung by the task store: something is ready to be claimed; somebody asked for a kill; a task has its outcome.
READY, KILL, DONE = "ready", "kill", "done"

#: A socket's path has 108 bytes, the last of which is 0; ours end in "/", a token of 16, "." and a key of 16.
_LONGEST_DIRECTORY = 107 - 34


class Doorbell:
    """The listening end. Loses no ring that its carrier delivers, from its construction on.

    Belongs to the process that made it: in a child that was forked it is closed already.
    """

    def __init__(self, engine: sa.Engine, names: Iterable[str] = ()) -> None:
        """Raises SQLAlchemy's errors if PostgreSQL is away, BadStateDirectory if a socket has no safe place."""
        self._line = _Notifications(engine) if engine.dialect.name == "postgresql" else _Socket(_database(engine))
        _open_bells.add(self)
        try:
            self.listen(names)
        except BaseException:
            self.close()
            raise

    def listen(self, names: Iterable[str]) -> None:
        """Listen for these names too. Look at what they stand for once afterwards: it may have rung before."""
        self._line.listen(names)

    def fileno(self) -> int:
        """For poll: readable when something rang or the line broke. The same number until `close`; then -1."""
        return self._line.fileno

    def drain(self) -> set[str]:
        """The names that rang since the last call; never blocks. At times a name that did not ring.

        ConnectionResetError: the line is broken; close this doorbell and make another.
        """
        return self._line.drain()

    def wait(self, timeout: float | None) -> set[str]:
        """As `drain`, but blocks up to `timeout` seconds (None: for ever) for the first ring; then an empty set."""
        end = None if timeout is None else time.monotonic() + timeout
        while not (rung := self.drain()):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            wait_readable([self.fileno()], left)
        return rung

    def close(self) -> None:
        """Stop listening; may be called twice, and does nothing in a forked child."""
        self._line.close()

    @property
    def connection(self) -> Any:
        """PostgreSQL: the psycopg2 connection that listens, for session locks that must live exactly as long."""
        assert isinstance(self._line, _Notifications)
        return self._line.connection


def ring(connection: sa.Connection, names: Collection[str]) -> None:
    """Wake who listens for any of `names`. Call it after the commit, outside a transaction.

    Never raises, not even if the database has gone away: what was committed stands, and the listeners will look.
    """
    if not names:
        return
    if connection.dialect.name == "postgresql":
        with suppress(sa.exc.DBAPIError):
            bells.notify(connection, {bells.channel(name) for name in names})
    else:
        with suppress(OSError):
            _ring_sockets(_database(connection.engine), names)


def wait_readable(files: Iterable[int], timeout: float | None) -> None:
    """Block until one of `files` is readable, or for `timeout` seconds (None: for ever)."""
    poll = select.poll()  # select() refuses descriptors above 1023, which a worker with many tasks has
    for file in files:
        poll.register(file, select.POLLIN)
    poll.poll(None if timeout is None else max(0.0, timeout) * 1000)


class _Notifications:
    """PostgreSQL: a connection that listens and does nothing else."""

    def __init__(self, engine: sa.Engine) -> None:
        self._error: type[Exception] = engine.dialect.loaded_dbapi.Error
        self._names: dict[str, str] = {}
        self.connection = bells.dedicated_connection(engine)
        # A copy: psycopg2 refuses fileno() on a broken connection, and its number may then belong to somebody else.
        self.fileno = os.dup(self.connection.fileno())

    def listen(self, names: Iterable[str]) -> None:
        new = {bells.channel(name): name for name in names}
        bells.listen(self.connection, new.keys() - self._names.keys())
        self._names |= new

    def drain(self) -> set[str]:
        try:
            self.connection.poll()
        except self._error as error:
            raise ConnectionResetError(f"the connection that listens to PostgreSQL broke: {error}") from error
        rung = {self._names[notice.channel] for notice in self.connection.notifies if notice.channel in self._names}
        self.connection.notifies.clear()
        return rung

    def close(self) -> None:
        if self.fileno >= 0:
            self.connection.close()
            os.close(self.fileno)
            self.fileno = -1

    def forget(self) -> None:
        """In a forked child: let go of the connection without a word to the server, whose session is the parent's.

        A child that kept it open would keep the session, and its locks, alive after the parent was killed.
        """
        if self.fileno < 0:
            return
        with suppress(self._error, OSError):
            number = self.connection.fileno()
            if os.path.sameopenfile(number, self.fileno):
                # Not closed but replaced: libpq still owns the number and will close it.
                nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                os.dup2(nothing, number, inheritable=False)
                os.close(nothing)
        os.close(self.fileno)
        self.fileno = -1


class _Socket:
    """SQLite: a datagram socket; beside its own name it has one link for each name that it listens for.

    The file name tells who listens for what, so that a ring wakes nobody else (a wake-up costs a process more than
    reading the directory costs the one that rings).
    """

    def __init__(self, database: Path) -> None:
        self._directory = _own_directory(database)
        self._token = token_hex(8)
        self._paths: list[Path] = []
        self._names: set[str] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(str(self._directory / self._token))
        except BaseException:
            self._socket.close()
            raise
        self._paths.append(self._directory / self._token)

    @property
    def fileno(self) -> int:
        return self._socket.fileno()

    def listen(self, names: Iterable[str]) -> None:
        for name in set(names) - self._names:
            path = self._directory / f"{self._token}.{_key(name)}"
            os.link(self._paths[0], path)
            self._paths.append(path)
            self._names.add(name)

    def drain(self) -> set[str]:
        rung: set[str] = set()
        datagrams = 0
        with suppress(BlockingIOError):
            while True:
                rung.update(self._socket.recv(65536).decode().split("\0"))
                datagrams += 1
        if datagrams > _QUEUE_LENGTH:
            return set(self._names)  # it was full: others may have been turned away
        if not datagrams and not self._paths[0].exists():
            # E.g. XDG_RUNTIME_DIR, which goes when its user's last session ends.
            raise ConnectionResetError(f"the doorbell socket {self._paths[0]} was removed")
        return rung & self._names

    def close(self) -> None:
        self._socket.close()
        while self._paths:
            with suppress(OSError):
                self._paths.pop().unlink()

    def forget(self) -> None:
        """In a forked child: the files are the parent's."""
        self._socket.close()
        self._paths.clear()


def _queue_length() -> int:
    """How many datagrams the kernel keeps for a socket that nobody reads."""
    try:
        return int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    except (OSError, ValueError):
        return 10


_QUEUE_LENGTH = _queue_length()


def _ring_sockets(database: Path, names: Collection[str]) -> None:
    keys = {_key(name): name for name in names}
    # A socket for this ring alone: datagrams that a stopped listener leaves unread count against their sender's buffer.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        for directory in _directories(database):
            for path, rung in _listeners(directory, keys):
                try:
                    sender.sendto("\0".join(rung).encode(), path)
                except (ConnectionRefusedError, FileNotFoundError):
                    _sweep(path)
                except OSError:
                    pass  # its queue is full: it has been woken and has yet to look


def _listeners(directory: Path, keys: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """One path for every socket in `directory` that listens for any of `keys`, with the names it listens for."""
    try:
        files = os.listdir(directory)
    except OSError:
        return
    found: dict[str, tuple[str, list[str]]] = {}
    for file in files:
        token, _, key = file.partition(".")
        if key in keys:
            found.setdefault(token, (f"{directory}/{file}", []))[1].append(keys[key])
    yield from found.values()


def _sweep(path: str) -> None:
    """Remove the files of a listener that died without closing."""
    directory, _, file = path.rpartition("/")
    if os.lstat(directory).st_uid != os.geteuid():
        return
    token = file.partition(".")[0]
    with suppress(OSError):
        for other in os.listdir(directory):
            if other.partition(".")[0] == token:
                with suppress(OSError):
                    os.unlink(f"{directory}/{other}")


def _database(engine: sa.Engine) -> Path:
    return Path(os.path.realpath(engine.url.database or ""))


def _key(name: str) -> str:
    return sha256(name.encode()).hexdigest()[:16]


def _directories(database: Path) -> list[Path]:
    """Where listeners of this store may have their sockets, the best place first.

    More than one, because who rings need not have the environment of who listens (cron has no XDG_RUNTIME_DIR). Root
    also rings the owner of the database; it listens in its own place, where only root can ring it.
    """
    digest = sha256(os.fsencode(database)).hexdigest()[:16]
    users = {os.geteuid()}
    with suppress(OSError):
        users.add(database.stat().st_uid)
    runtime = [os.environ.get("XDG_RUNTIME_DIR", ""), *(f"/run/user/{uid}" for uid in users)]
    found = [Path(place) / f"aque-{digest}" for place in dict.fromkeys(runtime) if place.startswith("/")]
    found = [place for place in found if len(os.fsencode(place)) <= _LONGEST_DIRECTORY]
    return found + [Path(f"/tmp/aque-{uid}-{digest}") for uid in users]


def _own_directory(database: Path) -> Path:
    """Make, or check, the directory in which this process binds its sockets."""
    uid = os.geteuid()
    candidates = _directories(database)
    fallback = Path(f"/tmp/aque-{uid}-{candidates[0].name.rpartition('-')[2]}")
    chosen = next((c for c in candidates if c.parent != Path("/tmp") and _is_private(c.parent, uid)), fallback)
    with suppress(FileExistsError):
        chosen.mkdir(mode=0o700)
    if not _is_private(chosen, uid):
        raise BadStateDirectory(
            f"{chosen} should be a directory that only user {uid} can write, and is not; no socket was made in it. "
            "Remove it, or set XDG_RUNTIME_DIR to a directory of your own."
        )
    return chosen


def _is_private(directory: Path, uid: int) -> bool:
    try:
        found = os.lstat(directory)  # not stat: in /tmp anybody may leave a link to a directory of ours
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & 0o022


_open_bells: "weakref.WeakSet[Doorbell]" = weakref.WeakSet()


def _forget_in_child() -> None:
    for bell in list(_open_bells):
        bell._line.forget()
    _open_bells.clear()


os.register_at_fork(after_in_child=_forget_in_child)
