"""The migrations make exactly the tables that the code uses, once, and others are refused."""

import os
from pathlib import Path
from threading import Thread

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from aque import settings
from aque.errors import BadStateDirectory, StoreUnreachable, WrongSchema
from aque.states import State
from aque.store import Store, open_store, schema, tables
from aque.store.engine import Connection, check_state_directory, file_system, open_engine, transaction, why_not_personal
from tests.store.farm import claim, finish, outcome, run, worker


def test_the_migrations_make_the_tables_of_the_code(store: Store) -> None:
    with store.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE})
        differences = [
            difference
            for difference in compare_metadata(context, tables.metadata)
            if "aque_bus" not in str(difference) and schema.VERSION_TABLE not in str(difference)
        ]
    assert differences == []


def test_the_migrations_make_the_indexes_of_the_code_with_their_order(store: Store) -> None:
    """SQLAlchemy's comparison does not see on SQLite whether an index descends."""
    if store.dialect == "postgresql":
        made = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()"
    else:
        made = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    with store.begin() as connection:
        migrated = dict(connection.exec_driver_sql(made).all())
    names = {index.name for table in tables.metadata.tables.values() for index in table.indexes}
    with store.connect() as connection:  # made again by the code, in a transaction that is rolled back
        connection.exec_driver_sql("BEGIN")
        for table in tables.metadata.tables.values():
            for index in table.indexes:
                connection.exec_driver_sql(f"DROP INDEX {index.name}")
                connection.execute(sa.schema.CreateIndex(index))
        expected = dict(connection.exec_driver_sql(made).all())
        connection.exec_driver_sql("ROLLBACK")
    assert {name: migrated[name] for name in names} == {name: expected[name] for name in names}


def test_the_version_that_the_code_asks_for_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == schema.HEAD


def test_many_may_create_the_tables_at_once(store_url: str) -> None:
    configured = settings.load({"AQUE_BROKER": store_url})
    failures: list[Exception] = []

    def create() -> None:
        try:
            schema.upgrade(open_engine(configured.store_url))
        except Exception as error:
            failures.append(error)

    threads = [Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    open_store(configured).close()


@pytest.mark.parametrize(("found", "advice"), [("0000", "aque init"), ("9999", "upgrade Aque")])
def test_tables_of_another_version_are_refused_with_what_to_do(store: Store, found: str, advice: str) -> None:
    def put(version: str) -> None:
        with store.begin() as connection:
            connection.exec_driver_sql(f"UPDATE {schema.VERSION_TABLE} SET version_num = '{version}'")

    put(found)
    with pytest.raises(WrongSchema, match=advice), store.connect() as connection:
        schema.check(connection)
    put(schema.HEAD)


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(StoreUnreachable) as refused:
        open_store(settings.load({"AQUE_BROKER": "postgresql://someone:secret@127.0.0.1:1/aque"}))
    assert "127.0.0.1:1/aque" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "what was submitted before goes on" in str(refused.value)


def test_a_state_directory_that_cannot_be_made_is_refused_with_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadStateDirectory, match="AQUE_STATE_DIR"):
        check_state_directory(tmp_path / "file" / "aque.db")


def test_the_file_system_of_a_path_is_that_of_its_longest_mount_point() -> None:
    mountinfo = (
        b"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        b"2 1 0:9 / /home rw - nfs4 server:/home rw\n"
        b"3 2 8:2 / /home/with\\040blank rw - xfs /dev/sdb1 rw\n"
    )
    assert file_system(Path("/etc"), mountinfo) == "ext4"
    assert file_system(Path("/home/someone/x"), mountinfo) == "nfs4"
    assert file_system(Path("/home/with blank/x"), mountinfo) == "xfs"
    assert file_system(Path("/homes"), mountinfo) == "ext4"


def upgrade_to(connection: Connection, version: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, version)


def add(connection: Connection, table: str, **values: object) -> None:
    """A row of a table as it is now, with something empty in every other column that needs a value."""
    found = sa.Table(table, sa.MetaData(), autoload_with=connection)
    empty = {c.name: c.type.python_type() for c in found.c if not c.nullable}
    connection.execute(sa.insert(found).values({**empty, **values}))


def test_the_rows_of_the_first_version_are_kept_by_the_upgrade(store_url: str) -> None:
    configured = settings.load({"AQUE_BROKER": store_url})
    engine = open_engine(configured.store_url)
    with engine.connect() as connection, transaction(connection):
        upgrade_to(connection, "0001")
        connection.exec_driver_sql(
            "INSERT INTO aque_requirement (id, queue, pattern, cpus, memory_bytes, host, platform) "
            "VALUES (1, 'celery', 'shell', '1', 0, '', '')"
        )
        connection.exec_driver_sql(
            "INSERT INTO aque_task (id, state, requirement_id, priority, duration, unmet, dependents, attempt, failed, lost, "
            "max_attempts, name, pattern, job_id, layer, seq, submitter, submitted_at) "
            "VALUES (2, 'ready', 1, 0, 0, 0, 0, 0, 0, 0, 1, 'old', 'shell', 2, 'old', 0, 'someone', 1)"
        )
        payload = "(task_id, function, arguments, inputs, argv, cwd, umask, import_path, io_paths, extra)"
        connection.exec_driver_sql(
            f"INSERT INTO aque_payload {payload} VALUES (2, '', '', '', 'true', '/', 18, '', '', '')"
        )
    assert schema.upgrade(engine) == "0001"
    opened = open_store(configured)
    with opened.connect() as connection:
        (old,) = opened.tasks(connection, fields=["id", "name", "user", "interpreter", "truncated"])
        assert opened.doctor(connection) == []
    assert old == {"id": 2, "name": "old", "user": "", "interpreter": "", "truncated": False}
    opened.close()
    engine.dispose()


def test_the_children_of_older_tasks_are_nothing_to_them_as_before(store_url: str) -> None:
    engine = open_engine(settings.load({"AQUE_BROKER": store_url}).store_url)
    with engine.connect() as connection, transaction(connection):
        upgrade_to(connection, "0003")
        add(connection, "aque_requirement", id=1, pattern="shell", cpus="1")
        for task_id, parent in ((2, None), (3, 2)):
            own = {"id": task_id, "job_id": task_id, "parent_id": parent, "name": "old", "state": "ready"}
            add(connection, "aque_task", requirement_id=1, pattern="shell", max_attempts=1, requeue=True, **own)
            add(connection, "aque_payload", task_id=task_id, umask=18)
    assert schema.upgrade(engine) == "0003"
    opened = Store(engine)
    by = worker(opened)
    (parent,) = claim(opened, [2], by)
    run(opened, by, 3, state=State.ERROR)
    assert finish(opened, outcome(parent)).ended == {2: State.SUCCESS}
    with opened.connect() as connection:
        assert opened.doctor(connection) == []
    opened.close()


def test_a_store_that_others_can_write_or_own_is_not_its_users_alone(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    check_state_directory(directory / "aque.db")
    file = directory / "aque.db"
    assert why_not_personal(file) is None
    file.chmod(0o666)
    assert why_not_personal(file) == f"others can write {file}"
    file.chmod(0o600)
    directory.chmod(0o770)
    assert why_not_personal(file) == f"others can write {directory}"
    directory.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(file, 1, -1)
        assert "belongs to uid 1" in str(why_not_personal(file))
