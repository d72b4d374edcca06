"""Recording of transitions: triggers on the table of tasks, which write each move that somebody may want to hear of.

Triggers, because every path to a state (workers, kills, reapers, submissions) ends in that table: none can be forgotten, what
is recorded is in the transaction that moved the task, and no path sends another statement. That the triggers are there is the
switch itself, so that a farm without them pays nothing.

The number of a row is drawn while its transaction has the task's row locked, so that the numbers of one task rise in the
order in which it moved. Between tasks, transactions that draw lower numbers may commit later: see `Transitions.writers`.
"""

from collections.abc import Collection

import sqlalchemy as sa

from aque.states import COMPLETE_STATES, Reason, State
from aque.store.engine import LOCK_SECONDS
from aque.store.tables import recording, transition

_FUNCTION = "aque_record_transition"
_MOVED, _ADDED = "aque_task_moved", "aque_task_added"
#: The state of a row that no task has: what follows it has not been recorded.
SWITCHED_OFF = "off"


def _list(states: Collection[State]) -> str:
    return "(" + ", ".join(f"'{state}'" for state in sorted(states)) + ")"


#: What was claimed ahead and has ended before its start was written has started all the same: it has a time of its start, or
#: has left its place to others. What its worker has withdrawn before it started has not.
_STARTED_UNSEEN = (
    f"OLD.state = '{State.CLAIMED}' AND NEW.state <> '{State.RUNNING}' AND (NEW.state = '{State.PENDING}' OR "
    f"NEW.started_at IS NOT NULL AND NOT (NEW.state = '{State.CANCELLED}' AND NEW.reason = '{Reason.REQUEST}'))"
)
#: An attempt has ended, and the task goes on.
_AGAIN = (
    f"NEW.state IN {_list({State.READY, State.PENDING})} AND "
    f"(OLD.state IN {_list({State.RUNNING, State.WAITING} | COMPLETE_STATES)} OR {_STARTED_UNSEEN})"
)
_MOVES = (
    f"OLD.state <> NEW.state AND (NEW.state IN {_list({State.RUNNING, State.WAITING} | COMPLETE_STATES)} OR {_AGAIN})"
)
#: Submitted, and impossible from the start; or a group without members.
_ENDED = f"NEW.state IN {_list(COMPLETE_STATES)}"

_INTO = f"INSERT INTO {transition.name} (task_id, job_id, name, state, reason, attempt, worker_id, at)"


def _started_unseen(clock: str) -> str:
    return (
        f"{_INTO} SELECT NEW.id, NEW.job_id, NEW.name, '{State.RUNNING}', NULL, NEW.attempt, NEW.worker_id, "
        f"coalesce(NEW.started_at, {clock})"
    )


def _moved(clock: str) -> str:
    at = (
        f"CASE WHEN NEW.state = '{State.RUNNING}' THEN NEW.started_at "
        f"WHEN NEW.state IN {_list(COMPLETE_STATES)} THEN NEW.finished_at END"
    )
    return (
        f"{_INTO} VALUES (NEW.id, NEW.job_id, NEW.name, NEW.state, NEW.reason, NEW.attempt, NEW.worker_id, "
        f"coalesce({at}, {clock}))"
    )


def is_on(connection: sa.Connection) -> bool:
    """True if transitions are recorded."""
    return bool(connection.execute(sa.select(recording.c.is_on)).scalar_one())


def switch(connection: sa.Connection, wanted: bool) -> bool:
    """Record transitions, or record none, from the caller's transaction on; False: it was so already.

    On PostgreSQL this waits for the transactions that use the table of tasks, and lets later ones wait: for LOCK_SECONDS, then
    it fails, and `engine.again` tries once more.
    """
    changed = sa.update(recording).where(recording.c.is_on != wanted).values(is_on=wanted).returning(recording.c.id)
    if connection.execute(changed).first() is None:
        return False
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
    _drop_triggers(connection)
    if wanted:
        _create_triggers(connection)
    else:
        # Readers that come here later learn that they miss something.
        off = {"task_id": 0, "job_id": 0, "name": "", "state": SWITCHED_OFF, "attempt": 0}
        connection.execute(sa.insert(transition).values(**off, at=sa.func.aque_wall_clock()))
    return True


def restore(connection: sa.Connection) -> None:
    """After a migration: the triggers of this version, if there are to be any. SQLite drops them with a table that a
    migration makes anew."""
    _drop_triggers(connection)
    if is_on(connection):
        _create_triggers(connection)


def forget(connection: sa.Connection) -> None:
    """After the tables are gone: what PostgreSQL has kept."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"DROP FUNCTION IF EXISTS {_FUNCTION}()")


def _drop_triggers(connection: sa.Connection) -> None:
    on = " ON aque_task" if connection.dialect.name == "postgresql" else ""
    for name in (_MOVED, _ADDED):
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}{on}")


def _create_triggers(connection: sa.Connection) -> None:
    if connection.dialect.name == "sqlite":
        _create_sqlite(connection)
    else:
        _create_postgresql(connection)


def _create_sqlite(connection: sa.Connection) -> None:
    # Not the function `aque_wall_clock`, which only our own connections have: others may write, too.
    clock = "(julianday('now') - 2440587.5) * 86400.0"
    unseen = f"{_started_unseen(clock)} WHERE {_STARTED_UNSEEN}"
    connection.exec_driver_sql(
        f"CREATE TRIGGER {_MOVED} AFTER UPDATE OF state ON aque_task WHEN {_MOVES} BEGIN {unseen}; {_moved(clock)}; END"
    )
    connection.exec_driver_sql(
        f"CREATE TRIGGER {_ADDED} AFTER INSERT ON aque_task WHEN {_ENDED} BEGIN {_moved(clock)}; END"
    )


def _create_postgresql(connection: sa.Connection) -> None:
    clock = "extract(epoch FROM clock_timestamp())"
    connection.exec_driver_sql(
        f"""CREATE OR REPLACE FUNCTION {_FUNCTION}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'UPDATE' THEN
                IF {_STARTED_UNSEEN} THEN
                    {_started_unseen(clock)};
                END IF;
            END IF;
            {_moved(clock)};
            RETURN NULL;
        END $$"""
    )
    for name, event, condition in ((_MOVED, "UPDATE OF state", _MOVES), (_ADDED, "INSERT", _ENDED)):
        connection.exec_driver_sql(
            f"CREATE TRIGGER {name} AFTER {event} ON aque_task FOR EACH ROW WHEN ({condition}) "
            f"EXECUTE FUNCTION {_FUNCTION}()"
        )
