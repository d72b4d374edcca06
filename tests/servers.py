"""Private PostgreSQL, Redis and RabbitMQ servers: installed binaries on free loopback ports, ended with whoever started them.

with PostgreSQL() as server:        # or Redis(), RabbitMQ()
    run_something(server.url)
    server.stop("immediate")        # as in a crash
    server.start()                  # same port, same data (Redis keeps nothing, unless it is told to)
    server.pause()                  # a server that hangs: its connections stay open and nothing answers
    server.resume()
"""

import itertools
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import amqp
import psutil
import psycopg2

Result = TypeVar("Result")

#: How many farms may use a Redis, each a database of its own, or a RabbitMQ, each a virtual host.
PLACES = 32
START_SECONDS = 60
STOP_SECONDS = 60


class MissingBinary(Exception):
    """A server's program is not installed; the message names it and says where it comes from."""


class ServerFailed(Exception):
    """A server did not start or did not stop; the message ends with the last lines of its log."""


def wait_until(condition: Callable[[], Result], limit: float = 60, what: str = "") -> Result:
    """The first true value of `condition()`, asked again and again for up to `limit` seconds, then AssertionError.

    The only sleep in the tests: whatever else waits, waits for an event or for this.
    """
    deadline = time.monotonic() + limit
    pause_seconds = 0.005
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit} s: {what or getattr(condition, '__name__', condition)}")
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 1.5, 0.1)
    return value


def text_of(path: Path, limit: float = 60) -> str:
    """What somebody writes to the file, as soon as there is any: a file exists before its first byte is in it."""
    return wait_until(lambda: path.exists() and path.read_text(), limit, f"something is written to {path}")


class Guarded:
    """A process that ends with this one, however this one ends (an interrupt, a time limit, kill -9).

    A small guard process waits for the end of a pipe that only we hold open, then ends the process through its pidfd
    and removes `directory`. PDEATHSIG would not do: it fires when the *thread* that started the process ends, a change
    of user clears it, and a stopped process does not see it.
    """

    GUARD = """if True:
        import contextlib, os, select, shutil, signal, sys
        pid, pidfd, ending, directory = *map(int, sys.argv[1:4]), sys.argv[4]
        if sys.stdin.buffer.read() != b"ended":
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as children:
                    for child in children.read().split():  # a paused PostgreSQL: its processes do not end while stopped
                        os.kill(int(child), signal.SIGCONT)
                signal.pidfd_send_signal(pidfd, ending)
                select.select([pidfd], [], [], 10)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            shutil.rmtree(directory, ignore_errors=True)
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        directory: Path,
        env: Mapping[str, str] | None = None,
        ending: signal.Signals = signal.SIGTERM,
        user: pwd.struct_passwd | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start `argv` in `cwd` (default: `directory`) as `user`; stdout and stderr go to `log` in `directory`."""
        self.ending = ending
        self.log = directory / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                cwd=cwd or directory,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt at the terminal is for the tests; they stop their servers
                **as_user(user),
            )
        pid, pidfd = self.process.pid, os.pidfd_open(self.process.pid)
        try:
            self.guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", self.GUARD, str(pid), str(pidfd), str(int(ending)), str(directory)],
                stdin=subprocess.PIPE,
                pass_fds=[pidfd],
                start_new_session=True,
            )
        finally:
            os.close(pidfd)

    @property
    def pid(self) -> int:
        return self.process.pid

    def running(self) -> bool:
        return self.process.poll() is None

    def tree(self) -> list[psutil.Process]:
        """The process and its descendants, parents first."""
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal_tree(self, number: signal.Signals) -> None:
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self, number: signal.Signals, limit: float = STOP_SECONDS) -> bool:
        """Signal the process and wait until it and its descendants are gone; False if it had to be killed."""
        tree = self.tree()
        obeyed = True
        try:
            self.process.send_signal(number)
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            obeyed = False
        _, left = psutil.wait_procs(tree[1:], timeout=limit if obeyed else 0)
        for process in left if obeyed else [*tree[:1], *left]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.guard.communicate(b"ended")
        return obeyed and not left


class Server:
    """What the servers share: a directory, a port that stays the same over restarts, start, stop and pause."""

    #: How a server is told to end; "fast" is orderly, "kill" is kill -9.
    STOP: ClassVar[dict[str, signal.Signals]]

    def __init__(self) -> None:
        self.user: pwd.struct_passwd | None = None
        self.directory = Path()
        self.port = 0
        self._child: Guarded | None = None

    def argv(self) -> list[str | Path]:
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether *this* server, not another one that took the port, answers."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Fill the new directory."""

    def environment(self) -> dict[str, str]:
        """The environment of the server's process."""
        return server_environment()

    @property
    def pid(self) -> int:
        """The process id; it changes when the server is started again."""
        if self._child is None:
            raise ServerFailed(f"{type(self).__name__} is stopped: it has no process id.")
        return self._child.pid

    def __enter__(self) -> Self:
        self.directory = private_directory(type(self).__name__.lower(), self.user)
        try:
            self.prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._child is not None:
                self.resume()
                self.stop("fast")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start, or start again on the same port, and return when the server answers."""
        if self._child is not None:
            raise ServerFailed(f"{type(self).__name__} is running already.")
        chosen = self.port
        for _ in range(5):
            self.port = chosen or free_port()
            child = self._child = Guarded(
                self.argv(),
                directory=self.directory,
                env=self.environment(),
                ending=self.STOP["fast"],
                user=self.user,
            )
            try:
                wait_until(lambda child=child: self.answers() or not child.running(), START_SECONDS)  # type: ignore[misc]
            except AssertionError:
                pass
            else:
                if child.running():
                    return
            self.stop("kill")  # most likely somebody else took the port in between: once more
        raise ServerFailed(f"{type(self).__name__} does not start. The end of its log:\n{self.log_tail()}")

    def stop(self, mode: str = "fast") -> None:
        """End the server and wait until all of its processes are gone; the modes are the keys of `STOP`."""
        child, self._child = self._child, None
        if child is None:
            raise ServerFailed(f"{type(self).__name__} is stopped already.")
        if not child.end(self.STOP[mode]):
            raise ServerFailed(
                f"{type(self).__name__} did not stop in {STOP_SECONDS} s and was killed. "
                f"The end of its log:\n{self.log_tail()}"
            )

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def pause(self) -> None:
        """SIGSTOP every process of the server: the kernel still accepts connections, and nothing answers on them."""
        if self._child is not None:
            self._child.signal_tree(signal.SIGSTOP)

    def resume(self) -> None:
        if self._child is not None:
            self._child.signal_tree(signal.SIGCONT)

    def log_tail(self) -> str:
        log = self.directory / "log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "(no log)"


class PostgreSQL(Server):
    """A PostgreSQL cluster as durable as a real one, unless `durable` is false: then what is committed survives a crash of the
    server, not one of the machine. Whoever connects is its superuser `postgres`."""

    STOP: ClassVar = {
        "smart": signal.SIGTERM,  # waits until the clients have gone
        "fast": signal.SIGINT,
        "immediate": signal.SIGQUIT,  # no checkpoint: the next start recovers from the log, as after a crash
        "kill": signal.SIGKILL,
    }

    def __init__(self, durable: bool = True) -> None:
        super().__init__()
        self.durable = durable
        self.binaries = postgresql_binaries()
        self.user = unprivileged_user() if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return self.database_url("postgres")

    def database_url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    @contextmanager
    def database(self, template: str = "template1") -> Iterator[str]:
        """The URL of a new database, empty or a copy of `template`, dropped afterwards whoever is still connected."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.database_url(name)
        finally:
            self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        """Run one statement outside of a transaction block, in the database `postgres`."""
        with closing(psycopg2.connect(self.url, connect_timeout=START_SECONDS)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []

    def prepare(self) -> None:
        who = ["--username", "postgres", "--auth", "trust"]
        what = ["--encoding", "UTF8", "--no-locale", "--no-sync"]  # no-sync: initdb itself; the server does sync
        made = subprocess.run(
            [self.binaries / "initdb", "--pgdata", self.directory / "data", *who, *what],
            check=False,
            cwd=self.directory,
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **as_user(self.user),
        )
        if made.returncode:
            raise ServerFailed(f"initdb made no PostgreSQL cluster:\n{made.stdout}{made.stderr}")

    def argv(self) -> list[str | Path]:
        settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200"]
        settings += [] if self.durable else ["fsync=off", "full_page_writes=off"]
        options = [word for setting in settings for word in ("-c", setting)]
        return [self.binaries / "postgres", "-D", self.directory / "data", "-p", str(self.port), *options]

    def answers(self) -> bool:
        try:
            return self.execute("SHOW data_directory") == [(str(self.directory / "data"),)]
        except psycopg2.OperationalError:
            return False


class Redis(Server):
    """A Redis server that keeps its data in memory only: stopping it loses everything in it, unless it is `durable`."""

    STOP: ClassVar = {"fast": signal.SIGTERM, "kill": signal.SIGKILL}

    def __init__(self, durable: bool = False) -> None:
        super().__init__()
        self.durable = durable
        self._numbers = itertools.count(1)
        self.binary = find_binary("redis-server")
        if self.binary is None:
            raise MissingBinary("redis-server is not installed (Debian's package: redis-server).")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def fresh_url(self) -> str:
        """The URL of a database that nobody has used yet: queues of the same names are others there."""
        return f"redis://127.0.0.1:{self.port}/{next(self._numbers)}"

    def argv(self) -> list[str | Path]:
        network = ["--bind", "127.0.0.1", "--port", str(self.port), "--databases", str(PLACES)]
        kept = ["--appendonly", "yes", "--appendfsync", "always"] if self.durable else ["--appendonly", "no"]
        return [str(self.binary), *network, "--save", "", *kept, "--dir", str(self.directory)]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"INFO server\r\n")
                return b"process_id:%d\r\n" % self.pid in connection.recv(65536)
        except OSError:
            return False


class RabbitMQ(Server):
    """A RabbitMQ node of one's own, with a port mapper (epmd) of its own: two take five seconds to start together."""

    STOP: ClassVar = {"fast": signal.SIGTERM, "kill": signal.SIGKILL}

    def __init__(self) -> None:
        super().__init__()
        # Debian's program in PATH is a wrapper that insists on the user rabbitmq and its directories.
        wrapped = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
        self.binary = wrapped if wrapped.exists() else find_binary("rabbitmq-server")
        self.mapper_binary = find_binary("epmd")
        if self.binary is None or self.mapper_binary is None:
            raise MissingBinary("rabbitmq-server and its epmd are not installed (Debian's package: rabbitmq-server).")
        self.mapper_port = free_port()
        self.between_nodes = free_port()
        self._mapper: Guarded | None = None
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def fresh_url(self) -> str:
        """The URL of a virtual host that nobody has used yet: queues of the same names are others there."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{next(self._numbers)}"

    @property
    def node(self) -> str:
        return f"{self.directory.name}@localhost"

    def prepare(self) -> None:
        (self.directory / "plugins").write_text("[].")
        (self.directory / "rabbitmq.conf").write_text(
            "disk_free_limit.absolute = 1MB\n"  # a machine that is nearly full would silently block who publishes
            f"cluster_name = {self.directory.name}\n"
            "log.console = true\nlog.console.level = warning\nlog.file = false\n"
            f"load_definitions = {self.directory / 'definitions'}\n"
        )
        hosts = ["/", *map(str, range(1, PLACES))]  # each `rabbitmqctl add_vhost` would start another Erlang
        may = {"user": "guest", "configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "users": [{"name": "guest", "password": "guest", "tags": "administrator"}],
            "vhosts": [{"name": host} for host in hosts],
            "permissions": [{**may, "vhost": host} for host in hosts],
        }
        (self.directory / "definitions").write_text(json.dumps(definitions))
        mapper_directory = self.directory / "epmd"
        mapper_directory.mkdir()
        # The node would start one that outlives it, on the port that all of the machine's Erlang programs share.
        command = [self.mapper_binary, "-port", str(self.mapper_port), "-address", "127.0.0.1"]
        self._mapper = Guarded([str(word) for word in command], directory=mapper_directory, env=server_environment())

    def __exit__(self, *_: object) -> None:
        try:
            if self._mapper is not None and self._child is None:
                self._mapper.end(signal.SIGTERM)
        finally:
            super().__exit__()
            if self._mapper is not None and self._mapper.running():
                self._mapper.end(signal.SIGTERM)

    def argv(self) -> list[str | Path]:
        return [str(self.binary)]

    def environment(self) -> dict[str, str]:
        here = str(self.directory)
        return {
            **server_environment(),
            "HOME": here,  # of .erlang.cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.mapper_port),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.between_nodes),
            "RABBITMQ_MNESIA_BASE": f"{here}/mnesia",
            "RABBITMQ_LOG_BASE": f"{here}/logs",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{here}/generated",
            "RABBITMQ_PID_FILE": f"{here}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{here}/plugins",
            "RABBITMQ_CONFIG_FILE": f"{here}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{here}/none",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none",
            # Of its three ways to start, the one that becomes the node instead of keeping a shell as its parent.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def answers(self) -> bool:
        try:
            with amqp.Connection(host=f"127.0.0.1:{self.port}", connect_timeout=1, read_timeout=2) as connection:
                return bool(connection.server_properties["cluster_name"] == self.directory.name)
        except (OSError, amqp.AMQPError):
            return False


def free_port() -> int:
    """A TCP port of the loopback that is free now, below the range that the kernel hands to outgoing connections:
    a stopped server finds its port free when it starts again."""
    choose = random.SystemRandom()
    while True:
        port = choose.randrange(15_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def find_binary(name: str) -> Path | None:
    """Where a server program is; /usr/sbin and friends are not in everybody's PATH."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
    return Path(found) if found else None


def postgresql_binaries() -> Path:
    """The directory that holds both initdb and postgres: the newest of Debian's, else the one in PATH."""
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    newest_first = sorted(debian, key=lambda path: [int(n) for n in path.parent.name.split(".") if n.isdigit()])[::-1]
    on_path = find_binary("initdb")
    for directory in [*newest_first, *([on_path.resolve().parent] if on_path else [])]:
        if all(os.access(directory / program, os.X_OK) for program in ("initdb", "postgres")):
            return directory
    raise MissingBinary("PostgreSQL's initdb and postgres are not installed (Debian's package: postgresql).")


def unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise MissingBinary("PostgreSQL does not run as root, and there is no user postgres or nobody to run it.")


def as_user(user: pwd.struct_passwd | None) -> dict[str, Any]:
    """The arguments of Popen that make a process run as `user` with no group but its own."""
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def private_directory(name: str, user: pwd.struct_passwd | None) -> Path:
    """A new directory of mode 0700 that `user` owns and can reach; root's TMPDIR may lie where only root may go."""
    for base in [tempfile.gettempdir(), "/tmp", "/var/tmp"]:
        directory = Path(tempfile.mkdtemp(prefix=f"aque-{name}-", dir=base)).resolve()
        if user is None:
            return directory
        os.chown(directory, user.pw_uid, user.pw_gid)
        if subprocess.run(["test", "-w", directory], cwd="/", check=False, **as_user(user)).returncode == 0:
            return directory
        directory.rmdir()
    raise ServerFailed(f"found no directory for temporary files that user {user.pw_name if user else ''} can reach.")


def server_environment() -> dict[str, str]:
    """What a server sees of our environment: nothing that sets its port, its data or its language."""
    kept = {name: value for name, value in os.environ.items() if name in {"PATH", "LD_LIBRARY_PATH"}}
    return {**kept, "LC_ALL": "C"}
