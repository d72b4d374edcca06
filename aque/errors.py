"""Every error that Aque raises on purpose.

    AqueError
    ├── BadInput (ValueError)         the caller can mend it; command line exit 2
    │   ├── BadReservation            cpus or memory that cannot be read
    │   ├── BadSetting                a setting with a wrong type or value
    │   ├── NotSubmittable            a function or argument that no worker could load
    │   └── BadGraph
    │       ├── Cycle                 carries the path of the cycle
    │       └── UnknownTask           carries the ids that do not exist
    ├── StoreError                    nothing was done; command line exit 69
    │   ├── StoreUnreachable
    │   ├── WrongSchema
    │   ├── BadStateDirectory
    │   └── NotRecorded               what happens to tasks is not recorded, so that nobody can listen to it
    └── TaskError                     what `.get()` raises of a task that did not succeed; carries the id and the reason
        ├── CommandFailed             a command exited with a status other than 0
        ├── RemoteError               a Python task raised an exception that cannot be rebuilt here
        ├── TaskKilled
        ├── TaskCancelled
        ├── TaskSkipped
        └── TaskLost                  its workers died too often

A message says what happened, what was not done, and what to do.
"""

from collections.abc import Sequence
from typing import ClassVar


class AqueError(Exception):
    """Base of all errors of Aque."""

    #: Of a command, or a worker, that ends with it.
    exit_status: ClassVar[int] = 1


class BadInput(AqueError, ValueError):
    """The caller gave something that cannot work; nothing was done."""

    exit_status = 2


class BadReservation(BadInput):
    """A CPU or memory request that cannot be read."""


class BadSetting(BadInput):
    """A setting whose value cannot be read, or that contradicts another."""


class NotSubmittable(BadInput):
    """A function or an argument that no worker could load by name or from JSON."""


class BadGraph(BadInput):
    """Dependencies that cannot be met; nothing of the graph was submitted."""


class Cycle(BadGraph):
    """Tasks that wait for each other. `path` starts and ends with the same task."""

    def __init__(self, path: Sequence[object]) -> None:
        self.path = list(path)
        shown = [str(step) for step in self.path]
        if len(shown) > 12:
            shown = [*shown[:6], f"... {len(shown) - 12} more ...", *shown[-6:]]
        super().__init__(
            f"the dependencies form a cycle: {' -> '.join(shown)} (each waits for the next). "
            "Nothing was submitted: remove one of these dependencies."
        )


class UnknownTask(BadGraph):
    """Ids that are not in the table."""

    def __init__(self, ids: Sequence[object], consequence: str = "Nothing was submitted.") -> None:
        self.ids = list(ids)
        shown = ", ".join(str(i) for i in self.ids[:10]) + (", ..." if len(self.ids) > 10 else "")
        noun = "task" if len(self.ids) == 1 else "tasks"
        super().__init__(f"there is no {noun} {shown}. {consequence} `aque status` lists the tasks there are.")


class StoreError(AqueError):
    """The store could not be used; nothing was done."""

    exit_status = 69


class StoreUnreachable(StoreError):
    """The database does not answer."""


class WrongSchema(StoreError):
    """The database holds another version of the tables than this version of Aque uses."""


class BadStateDirectory(StoreError):
    """The state directory cannot be written, or lies on a network file system."""


class NotRecorded(StoreError):
    """The farm does not record what happens to tasks."""


class TaskError(AqueError):
    """A task did not succeed. `task_id` is its id; `reason` one of `aque.states.Reason`."""

    def __init__(self, message: str, task_id: int | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.task_id, self.reason)


class CommandFailed(TaskError):
    """A command ended with a status other than 0, by a signal, or could not be started."""


class RemoteError(TaskError):
    """A Python task raised; the message holds the type and text of its exception."""


class TaskKilled(TaskError):
    """A person ended the task while it ran."""


class TaskCancelled(TaskError):
    """A person withdrew the task before it ran."""


class TaskSkipped(TaskError):
    """A dependency ended in a way that made the task impossible."""


class TaskLost(TaskError):
    """The workers that ran the task died, as often as is allowed."""


class RemoteTraceback(Exception):
    """The cause of an exception that was raised elsewhere: the traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
