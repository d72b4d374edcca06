"""What `aque.explain` must know of tasks and their dependencies. Methods take an open connection."""

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from aque.explain import Link, Subject
from aque.states import State
from aque.store.statements import explanations as sql
from aque.values import Condition, Pattern


class Explanations:
    """Questions about why tasks do not run."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect

    def subjects(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, Subject]:
        """Those of `ids` that are tasks."""
        rows = connection.execute(sql.subjects(self._dialect), {"ids": list(ids)})
        return {row.id: _subject(row) for row in rows}

    def members(self, connection: sa.Connection, job_ids: Iterable[int]) -> dict[int, list[Subject]]:
        """The members of these jobs, by job, in order of their ids."""
        found: dict[int, list[Subject]] = {}
        for row in connection.execute(sql.member_subjects(self._dialect), {"ids": list(job_ids)}):
            found.setdefault(row.job_id, []).append(_subject(row))
        return found

    def links(self, connection: sa.Connection, ids: Iterable[int]) -> Mapping[int, list[Link]]:
        """The dependencies of these tasks."""
        found: dict[int, list[Link]] = {}
        for row in connection.execute(sql.links(self._dialect), {"ids": list(ids)}):
            found.setdefault(row.downstream, []).append(
                Link(
                    row.downstream,
                    row.upstream,
                    Condition(row.condition),
                    row.satisfied,
                    row.name,
                    State(row.state),
                    row.reason,
                    row.exit_code,
                    row.signal,
                    row.duration,
                    row.started_at,
                )
            )
        return found

    def blamed(self, connection: sa.Connection, ids: Iterable[int]) -> list[int]:
        """These tasks and all that made them impossible, up to the first failures."""
        return list(connection.execute(sql.blamed(self._dialect), {"ids": list(ids)}).scalars())


def _subject(row: Any) -> Subject:
    return Subject(
        row.id,
        row.name,
        State(row.state),
        row.reason,
        Pattern(row.pattern),
        row.requirement_id,
        row.rank,
        row.duration,
        row.unmet,
        row.attempt,
        row.job_id,
        row.submitter,
        row.near_host or "",
        row.exit_code,
        row.signal,
        row.ready_at,
        row.started_at,
        row.finished_at,
        row.worker,
        row.not_before,
    )
