"""Which hosts could not start which tasks, and what workers therefore leave to others for a while."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from aque.states import Reason
from aque.store import statements as sql
from aque.values import HostFailure


@dataclass(frozen=True, slots=True)
class Refusal:
    """A host could not start a task, which went back for others to run."""

    task_id: int
    host: str
    job_id: int
    reason: Reason
    message: str  #: a sentence part
    refused_at: float  #: in seconds since 1970


class Refusals:
    """The table of refusals. Methods take an open connection, as those of the Store do."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect

    def add(self, connection: sa.Connection, task_id: int, host: str, failure: HostFailure) -> None:
        """A task could not be started on this host; of several times the latest is kept."""
        row = {"task_id": task_id, "host": host, "job_id": failure.job_id, "reason": str(failure.reason)}
        connection.execute(sql.add_refusal(self._dialect), row | {"message": failure.why})

    def of(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, list[Refusal]]:
        """The refusals of these tasks, the latest of each last; tasks without any are left out."""
        found: dict[int, list[Refusal]] = {}
        for row in connection.execute(sql.refusals(self._dialect), {"ids": list(ids)}):
            refusal = Refusal(row.task_id, row.host, row.job_id, Reason(row.reason), row.message, row.refused_at)
            found.setdefault(row.task_id, []).append(refusal)
        return found

    def set_avoids(
        self, connection: sa.Connection, worker_id: int, sentences: Sequence[str], missing_paths: Mapping[bytes, str]
    ) -> None:
        """What this worker does not claim for a while, for people, and what its host has not of what tasks require."""
        missing = {os.fsdecode(path): why for path, why in missing_paths.items()}
        parameters = {
            "which_worker": worker_id,
            "new_avoids": json.dumps(list(sentences)),
            "new_missing": json.dumps(missing),
        }
        connection.execute(sql.set_avoids(), parameters)
