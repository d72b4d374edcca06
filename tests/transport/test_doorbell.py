"""The doorbell, on both carriers."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from aque.doorbell import DONE, KILL, READY, Doorbell, _directories, ring, wait_readable
from aque.store.engine import open_engine
from tests.servers import PostgreSQL, wait_until

LIMIT = 20  # seconds; nothing here takes a fraction of one


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        yield connection


def test_a_ring_wakes_who_listens_for_it(engine: sa.Engine, connection: sa.Connection) -> None:
    with closing(Doorbell(engine, [READY, KILL])) as bell:
        ring_soon = threading.Timer(0.05, ring, [connection, [READY]])
        ring_soon.start()
        assert bell.wait(LIMIT) == {READY}
        ring_soon.join()


def test_a_ring_before_the_wait_is_not_lost(engine: sa.Engine, connection: sa.Connection) -> None:
    with closing(Doorbell(engine, [READY, KILL, DONE])) as bell:
        ring(connection, [READY])
        ring(connection, [KILL, READY])
        heard: set[str] = set()
        while heard != {READY, KILL}:
            heard |= bell.wait(LIMIT)
        assert bell.drain() == set()


def test_a_rung_bell_is_readable_for_poll(engine: sa.Engine, connection: sa.Connection) -> None:
    with closing(Doorbell(engine, [READY])) as bell:
        ring(connection, [READY])
        wait_readable([bell.fileno()], LIMIT)
        assert bell.drain() == {READY}


def test_a_ring_for_another_name_wakes_nobody(engine: sa.Engine, connection: sa.Connection) -> None:
    with closing(Doorbell(engine, [READY])) as one, closing(Doorbell(engine, [KILL])) as other:
        ring(connection, [KILL])
        assert other.wait(LIMIT) == {KILL}
        assert one.drain() == set()


def test_a_name_can_be_added_and_may_be_long_and_odd(engine: sa.Engine, connection: sa.Connection) -> None:
    name = 'x"; -- ' + "ü" * 200
    with closing(Doorbell(engine)) as bell:
        bell.listen([name])
        ring(connection, [name])
        assert bell.wait(LIMIT) == {name}


def test_waiting_ends_without_a_ring(engine: sa.Engine) -> None:
    with closing(Doorbell(engine, [READY])) as bell:
        assert bell.wait(0.01) == set()


def test_a_ring_reaches_a_process_with_another_environment(engine: sa.Engine, connection: sa.Connection) -> None:
    url = engine.url.render_as_string(hide_password=False)
    listen = "from aque.store.engine import open_engine; from aque.doorbell import Doorbell; import sys\n" + (
        "bell = Doorbell(open_engine(sys.argv[1]), ['ready']); print('up', flush=True); print(*bell.wait(20))"
    )
    command = [sys.executable, "-c", listen, url]
    env = {"XDG_RUNTIME_DIR": "/run", "PATH": os.environ["PATH"]}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        ring(connection, [READY])
        assert process.communicate(timeout=LIMIT)[0] == "ready\n"


def test_a_forked_child_leaves_its_parents_doorbell_alone(engine: sa.Engine, connection: sa.Connection) -> None:
    with closing(Doorbell(engine, [READY])) as bell:
        child = os.fork()
        if child == 0:
            closed = bell.fileno() == -1
            bell.close()
            os._exit(0 if closed else 1)
        assert os.waitpid(child, 0)[1] == 0
        ring(connection, [READY])
        assert bell.wait(LIMIT) == {READY}


def test_ringing_is_silent_when_the_database_has_gone(own_postgresql: PostgreSQL) -> None:
    engine = open_engine(own_postgresql.url.replace("postgresql:", "postgresql+psycopg2:"))
    with engine.connect() as connection, closing(Doorbell(engine, [READY])) as bell:
        own_postgresql.stop("immediate")
        ring(connection, [READY])
        with pytest.raises(ConnectionResetError):
            bell.wait(LIMIT)


def test_a_broken_line_says_so_and_a_new_one_works(engine: sa.Engine, connection: sa.Connection) -> None:
    with closing(Doorbell(engine, [READY])) as bell:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_terminate_backend(bell.connection.get_backend_pid())))
        else:
            for file in bells_of(engine).iterdir():
                file.unlink()
        with pytest.raises(ConnectionResetError):
            bell.wait(LIMIT)
    with closing(Doorbell(engine, [READY])) as bell:
        ring(connection, [READY])
        assert bell.wait(LIMIT) == {READY}


# Sockets only


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> sa.Engine:
    engine = open_engine(f"sqlite:///{tmp_path}/{'deep/' * 40}aque.db")  # a path that no socket could have
    engine.connect().close()
    return engine


def bells_of(engine: sa.Engine) -> Path:
    return Path(f"{engine.url.database}-bells")


def test_the_socket_of_a_killed_listener_is_removed(sqlite_engine: sa.Engine) -> None:
    child = os.fork()
    if child == 0:
        Doorbell(sqlite_engine, [READY, KILL])
        signal.pause()
    wait_until(lambda: bells_of(sqlite_engine).exists() and len(os.listdir(bells_of(sqlite_engine))) == 3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with sqlite_engine.connect() as connection:
        ring(connection, [KILL])
    assert os.listdir(bells_of(sqlite_engine)) == []


def test_who_does_not_read_its_doorbell_stops_nobody_and_misses_no_name(sqlite_engine: sa.Engine) -> None:
    length = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    with closing(Doorbell(sqlite_engine, [READY, KILL])) as bell, sqlite_engine.connect() as connection:
        for _ in range(length + 10):
            ring(connection, [READY])
        ring(connection, [KILL])
        assert bell.wait(LIMIT) == {READY, KILL}


def test_no_socket_is_made_where_others_can_write(sqlite_engine: sa.Engine) -> None:
    bells_of(sqlite_engine).mkdir()
    bells_of(sqlite_engine).chmod(0o777)
    with closing(Doorbell(sqlite_engine, [READY])) as bell, sqlite_engine.connect() as connection:
        assert os.listdir(bells_of(sqlite_engine)) == []
        ring(connection, [READY])
        assert bell.wait(LIMIT) == {READY}
    Path(_directories(str(sqlite_engine.url.database))[1]).rmdir()
