"""Fixtures: private servers, an address for every kind of store, a clean environment."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest

from aque import residency, settings
from aque.store import schema
from aque.store.engine import open_engine
from tests import filesystems
from tests.servers import MissingBinary, PostgreSQL, RabbitMQ, Redis, Server


@pytest.fixture(autouse=True)
def _same_celery_app() -> Iterator[None]:
    """Aque's own app is the current one whenever a test begins: one that is set up takes its place, in a test or by the mere
    import of a module with an app, as pytest imports all of them before the first test."""
    from aque.celery_app import app  # not before the developer's settings are out of the environment

    app.set_current()
    app.set_default()
    yield


AnyServer = TypeVar("AnyServer", bound=Server)

#: Variables that would send a test to somebody's own farm, broker or database.
FOREIGN = ("AQUE_", "CELERY_", "PG")

for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]  # also for the code that tests call in this process


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script: what the tests start would inherit it, and no Ctrl-C would reach it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(server: Callable[[], AnyServer]) -> AnyServer:
    """A new server; where its program is not installed a laptop skips the test and continuous integration fails it."""
    try:
        return server()
    except MissingBinary as missing:
        reason = str(missing)
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(f"{reason} Continuous integration skips nothing for a missing program.", pytrace=False)
    pytest.skip(reason)


# On a busy machine anything may be slow at times.
hypothesis.settings.register_profile("aque", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("aque")

#: Directories with the tests that take long, first: what runs last should be short.
ORDER = ("faults", "brokers", "scenarios", "worker", "transport", "cli", "store", "unit")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `--dist loadgroup` keeps together: tests that share the fixture of a module or a directory, such as a farm on one
    kind of database, those with a RabbitMQ, which takes seconds to start, and the short ones of a file in tests/unit. Any other
    test runs wherever there is time for it."""
    for item in items:
        if (group := _group(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_place)


def _group(item: pytest.Item) -> str | None:
    fixtures: dict[str, Sequence[pytest.FixtureDef[object]]] = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    scopes = {name: found[-1].scope for name, found in fixtures.items()}
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "rabbitmq" in params.values():
        return "rabbitmq"
    if package := sorted(name for name, scope in scopes.items() if scope == "package"):
        return "-".join(f"{name}-{params.get(name)}" for name in package)
    shared = sorted(name for name, scope in scopes.items() if scope == "module")
    by_param = [f"{name}-{params[name]}" for name in shared if name in params]
    if shared or item.path.parent.name == "unit":
        return "-".join([item.path.stem, *(by_param or shared)])
    return None


def _place(item: pytest.Item) -> int:
    directory = item.path.relative_to(Path(__file__).parent).parts[0]
    return ORDER.index(directory) if directory in ORDER else len(ORDER)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """One PostgreSQL for the whole run: do not stop it, ask for `own_postgresql` instead."""
    with start(lambda: PostgreSQL(durable=False)) as server:
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
def redis_server() -> Iterator[Redis]:
    """One Redis for the whole run: whoever uses it takes a `fresh_url` and does not stop it."""
    with start(Redis) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[RabbitMQ]:
    """One RabbitMQ for the whole run: whoever uses it takes a `fresh_url` and does not stop it."""
    with start(RabbitMQ) as server:
        yield server


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


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without tasks, to copy: the migrations take ten times as long."""
    file = tmp_path_factory.mktemp("template") / "aque.db"
    make_tables(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: PostgreSQL) -> str:
    """The name of a database with the tables, to copy."""
    postgresql_server.execute("CREATE DATABASE aque_template")
    make_tables(postgresql_server.database_url("aque_template"))
    return "aque_template"


def make_tables(url: str) -> None:
    engine = open_engine(settings.load({"AQUE_BROKER": url}).store_url)
    schema.upgrade(engine)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def made_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new store with its tables, as AQUE_BROKER names it: the test runs once on each kind."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "aque.db")
        yield f"sqlite:///{tmp_path / 'aque.db'}"
    else:
        server = request.getfixturevalue("postgresql_server")
        with server.database(request.getfixturevalue("postgresql_template")) as url:
            yield url


#: For a test of what no database has a part in (processes, signals, CPUs): one kind is enough, and half of them take each.
ON_SQLITE = pytest.mark.parametrize("made_store_url", ["sqlite"], indirect=True)
ON_POSTGRESQL = pytest.mark.parametrize("made_store_url", ["postgresql"], indirect=True)


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
