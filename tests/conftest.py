"""Fixtures: private servers, an address for every kind of store, a clean environment."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from aque import residency
from tests import filesystems
from tests.servers import MissingBinary, PostgreSQL, RabbitMQ, Redis, Server

AnyServer = TypeVar("AnyServer", bound=Server)

#: Variables that would send a test to somebody's own farm, broker or database.
FOREIGN = ("AQUE_", "CELERY_", "PG")

for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]  # also for the code that tests call in this process


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script: what the tests start would inherit it, and no Ctrl-C would reach it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(server: type[AnyServer]) -> AnyServer:
    """A new server; where its program is not installed a laptop skips the test and continuous integration fails it."""
    try:
        return server()
    except MissingBinary as missing:
        reason = str(missing)
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(f"{reason} Continuous integration skips nothing for a missing program.", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """One PostgreSQL for the whole run: do not stop it, ask for `own_postgresql` instead."""
    with start(PostgreSQL) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_url(postgresql_server: PostgreSQL) -> str:
    """The database `postgres` of the run's server; tests that write take `fresh_postgresql_url`."""
    return postgresql_server.url


@pytest.fixture
def fresh_postgresql_url(postgresql_server: PostgreSQL) -> Iterator[str]:
    """A new, empty database, dropped after the test."""
    with postgresql_server.database() as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """One Redis for the whole run: tests share what is in it, and do not stop it."""
    with start(Redis) as server:
        yield server.url


@pytest.fixture(scope="session")
def rabbitmq_url() -> Iterator[str]:
    """One RabbitMQ for the whole run: tests share what is in it, and do not stop it."""
    with start(RabbitMQ) as server:
        yield server.url


@pytest.fixture
def own_postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL of the test's own, to stop, pause and kill."""
    with start(PostgreSQL) as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """A Redis of the test's own, to stop, pause and kill."""
    with start(Redis) as server:
        yield server


@pytest.fixture
def file_systems(tmp_path: Path) -> Iterator[filesystems.FileSystems]:
    """Mounts, below a directory of the test's own, that are gone after the test; skips the test of who cannot mount."""
    base = tmp_path / "mounts"
    base.mkdir()
    with filesystems.file_systems(base) as found:
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty place for a store, as AQUE_BROKER names it: the test runs once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'aque.db'}"
    return str(request.getfixturevalue("fresh_postgresql_url"))


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment for the processes of one test: no settings of the developer's, directories of the test's own."""
    # A socket's path has at most 108 bytes, and tmp_path (or TMPDIR) may use them up.
    base = tempfile.gettempdir()
    runtime = tempfile.mkdtemp(prefix="aque-", dir=base if len(base) < 50 else "/tmp")
    yield {
        **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "AQUE_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_RUNTIME_DIR": runtime,
    }
    shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A directory whose files the page cache can drop; tmpfs has no other place for them."""
    directory = Path(__file__).parent / f".cache-{os.getpid()}"
    directory.mkdir()
    probe = directory / "probe"
    probe.write_bytes(bytes(1 << 20))
    filesystems.without_cache(probe)
    dropped = residency.pages(bytes(probe))[0] == 0
    probe.unlink()
    try:
        if not dropped:
            pytest.skip("the page cache of this file system cannot be dropped")
        yield directory
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
