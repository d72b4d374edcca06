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
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

from aque.errors import BadStateDirectory
from aque.store import bells
from aque.store.engine import Connection, DatabaseError, Engine

#: Rung by the task store: something is ready to be claimed; somebody asked for a kill; a task has its outcome.
READY, KILL, DONE = "ready", "kill", "done"
#: Something has been submitted that waits for a time.
TIME = "time"


class Doorbell:
    """The listening end. Loses no ring that its carrier delivers, from its construction on.

    Belongs to the process that made it: in a child that was forked it is closed already.
    """

    def __init__(self, engine: Engine, names: Iterable[str] = ()) -> None:
        """Raises SQLAlchemy's errors if PostgreSQL is away, BadStateDirectory if a socket has no safe place."""
        self._line = _Notifications(engine) if engine.dialect.name == "postgresql" else _Socket(_database(engine))
        _open_bells.add(self)
        try:
            self.listen(names)
        except BaseException:
            self.close()
            raise

    def listen(self, names: Iterable[str]) -> None:
        """Listen for these names too. Look at what they stand for once afterwards: it may have rung before.

        ConnectionResetError as `drain`.
        """
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


def ring(connection: Connection, names: Collection[str]) -> None:
    """Wake who listens for any of `names`. Call it after the commit, outside a transaction.

    Never raises, not even if the database has gone away: what was committed stands, and the listeners will look.
    """
    if not names:
        return
    if connection.dialect.name == "postgresql":
        with suppress(DatabaseError):
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

    def __init__(self, engine: Engine) -> None:
        self._error: type[Exception] = engine.dialect.loaded_dbapi.Error
        self._names: dict[str, str] = {}
        self.connection = bells.dedicated_connection(engine)
        # A copy: psycopg2 refuses fileno() on a broken connection, and its number may then belong to somebody else.
        self.fileno = os.dup(self.connection.fileno())
        # psycopg2 closes its own with the connection; threads end, and with them what they have waited with.
        self._close_copy = weakref.finalize(self, os.close, self.fileno)
        self._close_copy.atexit = False

    def listen(self, names: Iterable[str]) -> None:
        new = {bells.channel(name): name for name in names}
        with self._may_break():
            bells.listen(self.connection, new.keys() - self._names.keys())
        self._names |= new

    def drain(self) -> set[str]:
        with self._may_break():
            self.connection.poll()
        rung = {self._names[notice.channel] for notice in self.connection.notifies if notice.channel in self._names}
        self.connection.notifies.clear()
        return rung

    @contextmanager
    def _may_break(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            reason = str(error).partition("\n")[0]
            raise ConnectionResetError(f"the connection that listens to PostgreSQL broke: {reason}") from error

    def close(self) -> None:
        if self.fileno >= 0:
            self.connection.close()
            self._close_copy()
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
        self._close_copy()
        self.fileno = -1


class _Socket:
    """SQLite: a datagram socket; beside its own name it has one link for each name that it listens for.

    The file name tells who listens for what, so that a ring wakes nobody else (a wake-up costs a process more than
    reading the directory costs the one that rings).
    """

    def __init__(self, database: str) -> None:
        self._names: set[str] = set()
        self._files: list[str] = []
        self._token = token_hex(8)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._directory = self._bind(database)
        except BaseException:
            self._socket.close()
            raise
        self._files.append(self._token)
        _sweep_dead(self._directory)

    def _bind(self, database: str) -> str:
        trouble: list[str] = []
        for directory in _directories(database):
            try:
                with suppress(FileExistsError):
                    os.mkdir(directory, 0o700)
                if not _is_private(directory, database):
                    trouble.append(f"{directory} is not a directory that only its owner can write")
                    continue
                with _short_path(directory) as path:
                    self._socket.bind(f"{path}/{self._token}")
                return directory
            except OSError as error:
                trouble.append(f"{directory}: {error.strerror}")
        raise BadStateDirectory(
            f"there is no place for the sockets of {database}: {'; '.join(trouble)}. Nothing was started. Remove what "
            "is in the way, or set AQUE_STATE_DIR to a directory on a local disk."
        )

    @property
    def fileno(self) -> int:
        return self._socket.fileno()

    def listen(self, names: Iterable[str]) -> None:
        for name in set(names) - self._names:
            file = f"{self._token}.{_key(name)}"
            os.link(f"{self._directory}/{self._token}", f"{self._directory}/{file}")
            self._files.append(file)
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
        if not datagrams and not os.path.exists(f"{self._directory}/{self._token}"):
            raise ConnectionResetError(f"the doorbell's socket in {self._directory} was removed")
        return rung & self._names

    def close(self) -> None:
        self._socket.close()
        while self._files:
            with suppress(OSError):
                os.unlink(f"{self._directory}/{self._files.pop()}")

    def forget(self) -> None:
        """In a forked child: the files are the parent's."""
        self._socket.close()
        self._files.clear()


def _queue_length() -> int:
    """How many datagrams the kernel keeps for a socket that nobody reads."""
    try:
        return int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    except (OSError, ValueError):
        return 10


_QUEUE_LENGTH = _queue_length()


def _ring_sockets(database: str, names: Collection[str]) -> None:
    keys = {_key(name): name for name in names}
    # A socket for this ring alone: datagrams that a stopped listener leaves unread count against their sender's buffer.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        for directory in _directories(database):
            with suppress(OSError), _short_path(directory) as path:
                found: dict[str, tuple[str, list[str]]] = {}  # of each listener, one file and the names it listens for
                for file in os.listdir(directory):
                    token, _, key = file.partition(".")
                    if key in keys:
                        found.setdefault(token, (file, []))[1].append(keys[key])
                for token, (file, rung) in found.items():
                    if not _send(sender, f"{path}/{file}", "\0".join(rung)):
                        _remove(directory, token)


def _send(sender: socket.socket, path: str, text: str) -> bool:
    """Send a datagram; False if nobody has this socket any more."""
    try:
        sender.sendto(text.encode(), path)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        pass  # its queue is full: it has been woken, and has yet to look
    return True


def _sweep_dead(directory: str) -> None:
    """Remove the files of listeners that were killed."""
    with _short_path(directory) as path:
        for token in {file.partition(".")[0] for file in os.listdir(directory)}:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
                try:
                    probe.connect(f"{path}/{token}")  # sends nothing: nobody is woken
                except (ConnectionRefusedError, FileNotFoundError):
                    _remove(directory, token)
                except OSError:
                    pass


def _remove(directory: str, token: str) -> None:
    for file in os.listdir(directory):
        if file.partition(".")[0] == token:
            with suppress(OSError):
                os.unlink(f"{directory}/{file}")


def _database(engine: Engine) -> str:
    return os.path.realpath(engine.url.database or "")


def _key(name: str) -> str:
    return sha256(name.encode()).hexdigest()[:16]


def _directories(database: str) -> list[str]:
    """Where listeners of this store may have their sockets, the best place first.

    Beside the database, and not in $XDG_RUNTIME_DIR: who rings need not have the environment of who listens (cron has
    none), and that directory goes when its user logs out while workers go on. /tmp: for file systems without sockets.
    """
    digest = sha256(os.fsencode(database)).hexdigest()[:16]
    return [f"{database}-bells", f"/tmp/aque-{os.geteuid()}-{digest}"]


@contextmanager
def _short_path(directory: str) -> Iterator[str]:
    """Another name for `directory`: a socket's path has 107 bytes, which the path of a state directory may use up."""
    number = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _is_private(directory: str, database: str) -> bool:
    """True if nobody but us, or the owner of the database, can put sockets there."""
    found = os.lstat(directory)  # not stat: in /tmp anybody may leave a link to a directory of ours
    owners = {os.geteuid()}
    with suppress(OSError):
        owners.add(os.stat(database).st_uid)
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not found.st_mode & 0o022


_open_bells: "weakref.WeakSet[Doorbell]" = weakref.WeakSet()


def _forget_in_child() -> None:
    for bell in list(_open_bells):
        bell._line.forget()
    _open_bells.clear()


os.register_at_fork(after_in_child=_forget_in_child)
