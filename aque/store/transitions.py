"""What has happened to tasks, in order, and how far readers of it have come."""

from dataclasses import dataclass

import sqlalchemy as sa

from aque.store import recording
from aque.store import statements as sql
from aque.store.engine import transaction

#: Deleted in one transaction, and so many of them in one go: under a second.
BATCH = 5000
BATCHES = 20
#: A reader that has not renewed its hold of a cursor for so long has lost it.
LEASE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Transition:
    """One move of a task, as recorded."""

    id: int
    task_id: int
    job_id: int
    name: str
    state: str  #: that it moved to; ready or pending: another attempt follows; recording.SWITCHED_OFF: no task's
    reason: str | None
    attempt: int
    worker_id: int | None
    at: float


@dataclass(frozen=True, slots=True)
class CursorRow:
    """How far a durable reader has come."""

    name: str
    position: int
    behind: int  #: so many transitions it has yet to reach, at most
    holder: str | None  #: who reads it, as it has called itself


class Transitions:
    """The transitions of one farm. Methods take an open connection in autocommit mode, unless they say otherwise."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect

    def are_recorded(self, connection: sa.Connection) -> bool:
        """True unless a person has switched the recording off."""
        return recording.is_on(connection)

    def record(self, connection: sa.Connection, wanted: bool) -> bool:
        """Switch the recording on or off, in a transaction of its own; False: it was so already."""
        with transaction(connection):
            return recording.switch(connection, wanted)

    def after(self, connection: sa.Connection, position: int, limit: int) -> list[Transition]:
        """The first `limit` transitions after this one that can be read now. Where a number is missing see `writers`."""
        rows = connection.execute(sql.transitions_after(), {"position": position, "limit": limit})
        return [Transition(*row) for row in rows]

    def last(self, connection: sa.Connection) -> int:
        """The highest number that a transition has got, committed or not."""
        return int(connection.execute(sa.select(sql.last_transition(self._dialect))).scalar_one())

    def writers(self, connection: sa.Connection) -> frozenset[str]:
        """The transactions in progress that have drawn numbers of transitions.

        A number that is missing below one that can be read was drawn by one of these, or by one that has ended: once all of
        these have ended, a new look shows it, or it never will be there. Empty on SQLite, which has one writer at a time.
        """
        if self._dialect == "sqlite":
            return frozenset()
        return frozenset(connection.execute(sql.writers_of_transitions()).scalars())

    def deleted_up_to(self, connection: sa.Connection) -> int:
        """All transitions up to this one have been deleted."""
        return int(connection.execute(sql.deleted_up_to()).scalar_one())

    def delete_older(self, connection: sa.Connection, before: float) -> int:
        """Delete transitions of before this time (seconds since 1970), the oldest first and up to one that is not, in at most
        BATCHES transactions of at most BATCH; how many. More than that are for the next time."""
        deleted = 0
        for _ in range(BATCHES):
            with transaction(connection):
                row = connection.execute(sql.oldest_to_keep(), {"limit": BATCH, "before": before}).one()
                last = row.last if row.kept is None else row.kept - 1
                known = self.deleted_up_to(connection)
                if last is None or last <= known:
                    return deleted
                count = connection.execute(sql.delete_transitions(), {"last": last}).rowcount
                if not count:
                    return deleted
                connection.execute(sql.note_deleted(), {"last": last})
            deleted += count
            if row.kept is not None:
                break
        return deleted

    # -- cursors ------------------------------------------------------------------------------------------------------

    def find_cursor(self, connection: sa.Connection, name: str) -> CursorRow | None:
        """This cursor; None: there is none."""
        return next((row for row in self.cursors(connection) if row.name == name), None)

    def add_cursor(self, connection: sa.Connection, name: str, position: int) -> None:
        """Make a cursor, unless there is one."""
        connection.execute(sql.add_cursor(self._dialect), {"which": name, "at_first": position})

    def take_cursor(self, connection: sa.Connection, name: str, me: str, gone: str = "") -> int | None:
        """Become the one reader of this cursor for LEASE_SECONDS; its position. None: somebody else is, but for one that is
        known to be `gone`; or there is no such cursor."""
        parameters = {"which": name, "me": me, "gone": gone, "lease": LEASE_SECONDS}
        found = connection.execute(sql.take_cursor(), parameters).scalar()
        return None if found is None else int(found)

    def renew_cursor(self, connection: sa.Connection, name: str, me: str) -> bool:
        """Stay the one reader; False: somebody else is by now."""
        parameters = {"which": name, "me": me, "lease": LEASE_SECONDS}
        return connection.execute(sql.renew_cursor(), parameters).first() is not None

    def move_cursor(self, connection: sa.Connection, name: str, me: str, position: int) -> bool:
        """All up to `position` has been handled; False: somebody else is the reader by now, and nothing was written."""
        parameters = {"which": name, "me": me, "lease": LEASE_SECONDS, "new_position": position}
        return connection.execute(sql.move_cursor(), parameters).first() is not None

    def release_cursor(self, connection: sa.Connection, name: str, me: str) -> None:
        """Let others be the reader."""
        connection.execute(sql.release_cursor(), {"which": name, "me": me})

    def cursors(self, connection: sa.Connection) -> list[CursorRow]:
        """All cursors, by name."""
        rows = connection.execute(sql.cursors(self._dialect))
        return [CursorRow(row.name, row.position, max(row.behind, 0), row.holder) for row in rows]

    def delete_cursor(self, connection: sa.Connection, name: str) -> bool:
        """Forget a cursor; False: there is none."""
        return connection.execute(sql.delete_cursor(), {"which": name}).first() is not None
