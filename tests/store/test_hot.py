"""Statements that run for each task: the same as by SQLAlchemy, but prepared, on both databases."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from farm import SPEC, claim, finish, ids, outcome, submit, worker
from statements import counted

from aque.errors import StoreUnreachable
from aque.store import DatabaseError, Store, engine, hot
from aque.store import statements as sql
from aque.store.engine import transaction


def submitted(store: Store, count: int) -> list[int]:
    return list(submit(store, [replace(SPEC, id=i) for i in ids(store, count)]))


def ask(connection: sa.Connection, store: Store, *ids: int) -> list[Any]:
    return hot.run(connection, sql.results(store.dialect), {"ids": list(ids)})


def test_the_rows_have_the_names_and_types_that_sqlalchemy_gives_them(store: Store) -> None:
    here, (task,) = worker(store), submitted(store, 1)
    claim(store, [task], here)
    statement, parameters = sql.claimed_tasks(store.dialect), {"ids": [task]}
    with store.connect() as connection:
        (usual,) = connection.execute(statement, parameters).all()
        for _ in range(hot.PREPARE_FROM + 1):
            (found,) = hot.run(connection, statement, parameters)
            assert found._asdict() == usual._asdict()
            assert [type(value) for value in found] == [type(value) for value in usual]


def test_a_statement_is_prepared_for_its_third_use_on_a_connection(store: Store) -> None:
    (task,) = submitted(store, 1)
    with store.connect() as connection:
        connection.info.pop(hot.SESSION, None)
        with counted(store) as seen:
            for _ in range(4):
                assert [row.id for row in ask(connection, store, task)] == [task]
    words = [text.split()[0] for text in seen]
    prepared = ["SELECT", "SELECT", "PREPARE", "DISCARD", "EXECUTE"]  # the first plan is made anew, which costs nothing
    assert words == (prepared if store.dialect == "postgresql" else ["SELECT"] * 4)


def test_a_plan_is_made_anew_after_a_while(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    if store.dialect == "sqlite":
        pytest.skip("SQLite's driver keeps compiled statements by itself")
    (task,) = submitted(store, 1)
    with store.connect() as connection:
        for _ in range(4):
            ask(connection, store, task)
        monkeypatch.setattr(hot, "PLAN_SECONDS", 0.0)
        with counted(store) as seen:
            assert len(ask(connection, store, task)) == 1
    assert seen[0].startswith("DISCARD PLANS; EXECUTE")


def test_one_plan_serves_all_parameters(store: Store) -> None:
    if store.dialect == "sqlite":
        pytest.skip("SQLite has no plans for single parameters")
    with store.connect() as connection:
        assert connection.exec_driver_sql("SHOW plan_cache_mode").scalar_one() == "force_generic_plan"
        assert connection.exec_driver_sql("SHOW jit").scalar_one() == "off"
        for _ in range(4):
            ask(connection, store, 1)
        plans = "SELECT sum(generic_plans), sum(custom_plans) FROM pg_prepared_statements"
        assert tuple(connection.exec_driver_sql(plans).one()) == (2, 0)


def test_what_was_prepared_in_a_transaction_that_was_rolled_back_goes_on(store: Store) -> None:
    here, tasks = worker(store), submitted(store, 6)
    statement = sql.existing(store.dialect)
    with store.connect() as connection:
        for _ in range(4):
            with suppress(ZeroDivisionError), transaction(connection):
                connection.execute(sql.stop_worker(), {"which_worker": here})
                assert len(hot.run(connection, statement, {"ids": tasks})) == 6
                raise ZeroDivisionError
        assert len(hot.run(connection, statement, {"ids": tasks})) == 6
    finish(store, *[outcome(task) for task in claim(store, tasks, here)])  # it was not stopped


def test_what_a_database_refuses_is_told_as_sqlalchemy_tells_it(store: Store) -> None:
    (task,) = submitted(store, 1)
    with store.connect() as connection, pytest.raises(DatabaseError) as usual:
        connection.exec_driver_sql("SELECT nothing FROM nowhere")
    with store.connect() as connection, pytest.raises(DatabaseError) as direct:
        hot.run_text(connection, "SELECT nothing FROM nowhere")
    assert type(direct.value) is type(usual.value)
    with store.connect() as connection:
        assert [row.id for row in ask(connection, store, task)] == [task]


def test_a_connection_that_broke_is_replaced_by_one_that_knows_no_statement_yet(store: Store) -> None:
    if store.dialect == "sqlite":
        pytest.skip("a file does not break the connection")
    (task,) = submitted(store, 1)
    with pytest.raises(StoreUnreachable), store.connect() as connection:
        for _ in range(4):
            ask(connection, store, task)
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        with store.engine.connect() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 10000)")
        ask(connection, store, task)
    with store.connect() as connection:
        assert [row.id for row in ask(connection, store, task)] == [task]


def test_listeners_of_others_who_want_sqlalchemys_context_are_left_alone(store: Store) -> None:
    def listen(_connection: Any, _cursor: Any, _statement: str, _values: Any, context: Any, _many: bool) -> None:
        context.traced = True  # as those who trace programs do

    sa.event.listen(store.engine, "before_cursor_execute", listen)
    try:
        (task,) = submitted(store, 1)
        with store.begin() as connection:
            assert [row.id for row in ask(connection, store, task)] == [task]
    finally:
        sa.event.remove(store.engine, "before_cursor_execute", listen)


def test_of_connections_that_broke_together_only_the_first_use_fails(store: Store) -> None:
    if store.dialect == "sqlite":
        pytest.skip("a file does not break the connection")
    (task,) = submitted(store, 1)
    store.engine.dispose()
    with store.engine.connect() as other:
        several = [store.engine.connect() for _ in range(3)]
        pids = [connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() for connection in several]
        for connection in several:
            connection.close()
        for pid in pids:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 10000)")
        other.invalidate()
    with pytest.raises(StoreUnreachable), store.connect() as connection:
        ask(connection, store, task)
    for _ in pids:
        with store.connect() as connection:
            assert [row.id for row in ask(connection, store, task)] == [task]


def test_who_was_interrupted_while_a_statement_was_prepared_prepares_it_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.dialect == "sqlite":
        pytest.skip("nothing is prepared")
    (task,) = submitted(store, 1)
    send = engine._send

    def send_and_interrupt(cursor: Any, text: str, values: Any) -> None:
        send(cursor, text, values)
        if text.startswith("PREPARE"):
            raise KeyboardInterrupt

    with store.connect() as connection:
        connection.info.pop(hot.SESSION, None)
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(engine, "_send", send_and_interrupt)
            for _ in range(4):
                ask(connection, store, task)
        assert [row.id for row in ask(connection, store, task)] == [task]


def test_a_session_that_has_forgotten_what_was_prepared_is_prepared_anew_after_one_failure(store: Store) -> None:
    if store.dialect == "sqlite":
        pytest.skip("nothing is prepared")
    (task,) = submitted(store, 1)
    with store.connect() as connection:
        for _ in range(4):
            ask(connection, store, task)
        connection.exec_driver_sql("DEALLOCATE ALL")
        with pytest.raises(DatabaseError):
            ask(connection, store, task)
        for _ in range(4):
            assert [row.id for row in ask(connection, store, task)] == [task]
