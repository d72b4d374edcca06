"""What people and programs ask of the tables. Nothing here writes."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import sqlalchemy as sa

from aque.chooser import weight
from aque.errors import BadInput
from aque.moments import utc
from aque.resources import CpuRequest
from aque.states import COMPLETE_STATES, State
from aque.store import hot
from aque.store import statements as sql
from aque.store.base import Base
from aque.store.groups import in_turn
from aque.store.rows import Call, Finding, StoredResult, optional_bytes, split, stored_results
from aque.values import Pattern

#: Complete, and no success.
_ENDED_BADLY = frozenset(str(state) for state in COMPLETE_STATES - {State.SUCCESS})
#: Of a command's stdout, as dependents and `.get()` see it.
STDOUT_LIMIT = 64 << 10
#: So many pieces of captured output are read at a time.
PIECES = 64


class Questions(Base):
    """What can be asked."""

    def tasks(
        self,
        connection: sa.Connection,
        where: Mapping[str, Any] | None = None,
        fields: Sequence[str] | None = None,
        newest: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Tasks that match `where` (field -> value or list of values) in id order, as dictionaries of `fields`; only the
        `newest` so many of them if given.

        Times are datetimes (UTC), memory is in bytes, `depends_on` is a list of ids. Raises BadInput, naming the fields
        there are.
        """
        wanted = tuple(fields) if fields is not None else (*sql.FIELDS, "depends_on")
        for name in {*wanted, *(where or {})} - set(sql.FIELDS) - {"depends_on"}:
            raise BadInput(f"there is no field {name!r}; there are: {', '.join([*sql.FIELDS, 'depends_on'])}.")
        if "depends_on" in (where or {}):
            raise BadInput("depends_on can be shown, not asked for.")
        columns = tuple(dict.fromkeys(("id", *(name for name in wanted if name != "depends_on"))))
        rows = sorted(connection.execute(sql.tasks(columns, dict(where or {}), newest)), key=lambda row: row.id)
        upstream: dict[int, list[int]] = {}
        if "depends_on" in wanted:
            for edge_row in connection.execute(sql.dependencies(self.dialect), {"ids": [r.id for r in rows]}):
                upstream.setdefault(edge_row.downstream, []).append(edge_row.upstream)
        for row in rows:
            found = dict(row._mapping)
            for name in ("submitted_at", "not_before", "expires_at", "started_at", "finished_at"):
                if found.get(name) is not None:
                    found[name] = utc(found[name])
            for name in ("requires_paths", "places"):
                if found.get(name) is not None:
                    found[name] = split(found[name])
            found["depends_on"] = upstream.get(row.id, [])
            yield {name: found[name] for name in wanted}

    def counts(self, connection: sa.Connection) -> dict[State, int]:
        """How many tasks are in each state that has any."""
        return {State(state): count for state, count in connection.execute(sql.counts())}

    def existing(self, connection: sa.Connection, ids: Iterable[int]) -> set[int]:
        """Those of `ids` that are tasks."""
        return {row.id for row in hot.run(connection, sql.existing(self.dialect), {"ids": list(ids)})}

    def completed(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, State]:
        """Those of `ids` that are complete, and how."""
        rows = hot.run(connection, sql.completed(self.dialect), {"ids": list(ids)})
        return {row.id: State(row.state) for row in rows}

    def stored_results(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, StoredResult]:
        """State, result and error of each of these tasks that there is."""
        return stored_results(hot.run(connection, sql.results(self.dialect), {"ids": list(ids)}))

    def ended_results(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, StoredResult]:
        """The same of those that are complete."""
        return stored_results(hot.run(connection, sql.ended_results(self.dialect), {"ids": list(ids)}))

    def children_of(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, list[tuple[int, str | None]]]:
        """The children of these tasks, as (id, Celery's id where a caller brought one)."""
        found: dict[int, list[tuple[int, str | None]]] = {}
        for row in connection.execute(sql.children_of(self.dialect), {"ids": list(ids)}):
            found.setdefault(row.parent_id, []).append((row.id, row.celery_id))
        return found

    def told(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, tuple[str, bytes]]:
        """The states of their own, with their JSON, that those of these tasks that run have told."""
        rows = connection.execute(sql.told(self.dialect), {"ids": list(ids)})
        return {row.task_id: (row.state, bytes(row.meta)) for row in rows}

    def calls(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, Call]:
        """What these tasks are calls of, and where they ran."""
        rows = connection.execute(sql.calls(self.dialect), {"ids": list(ids)})
        return {row.id: Call(optional_bytes(row.arguments), row.queue, row.worker) for row in rows}

    def last_id(self, connection: sa.Connection, submitter: str) -> int | None:
        """The newest task or job of this submitter: `@last` on the command line."""
        found = connection.execute(sql.last_id(), {"submitter": submitter}).scalar()
        return None if found is None else int(found)

    def values(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, bytes]:
        """The results of these tasks as JSON: `null` where there is none, a command's end and stdout for a command, the list
        of its members' for a group of a canvas. Of one that did not succeed: what is known of its failure, an object."""
        wanted = list(ids)
        found: dict[int, bytes] = {}
        order: dict[int, list[int]] = {}
        asked: Collection[int] = wanted
        while asked:
            groups = []
            for row in hot.run(connection, sql.results(self.dialect), {"ids": list(asked)}):
                if row.state in _ENDED_BADLY:
                    found[row.id] = self._failure(connection, row)
                elif row.pattern == Pattern.SHELL:
                    found[row.id] = self._command_result(connection, row)
                elif row.pattern == Pattern.GROUP:
                    groups.append(row.id)
                else:
                    found[row.id] = b"null" if row.value is None else bytes(row.value)
            members = self.groups.members(connection, groups) if groups else {}
            found |= {i: b"null" for i in groups if i not in members}
            order |= members
            asked = {i for group in members.values() for i in group if i not in found and i not in order}
        for group in in_turn(order):
            found[group] = b"[" + b",".join(found.get(i, b"null") for i in order[group]) + b"]"
        return {i: found[i] for i in wanted if i in found}

    def _failure(self, connection: sa.Connection, row: Any) -> bytes:
        """{"state", "reason", "type", "message", "traceback"}; of a group, or a skipped task, the failure that caused it,
        and the id of the task that failed as "cause"."""
        cause = None
        if row.pattern == Pattern.GROUP or row.state == State.SKIPPED:
            cause = self.groups.cause(connection, row.id)
            if cause is not None:
                row = connection.execute(sql.results(self.dialect), {"ids": [cause]}).one()
        fields = json.loads(row.error) if row.error else {}
        shown = {"state": row.state, "reason": row.reason, "name": row.name, "cause": row.celery_id or str(row.id)}
        return json.dumps(fields | shown).encode()

    def _command_result(self, connection: sa.Connection, row: Any) -> bytes:
        """{"exit_code", "stdout", "truncated"}: what dependents see of a command; stdout up to 64 KiB as text."""
        stream, last, stdout = (row.id, row.attempt, 1), -1, b""
        while len(stdout) <= STDOUT_LIMIT and (found := self.output_after(connection, {stream: last})):
            stdout += b"".join(data for _, _, data in found)
            last = found[-1][1]
        shown = stdout[:STDOUT_LIMIT].decode(errors="backslashreplace")
        result = {"exit_code": row.exit_code, "stdout": shown, "truncated": len(stdout) > STDOUT_LIMIT}
        return json.dumps(result).encode()

    def output_after(
        self, connection: sa.Connection, streams: Mapping[tuple[int, int, int], int]
    ) -> list[tuple[tuple[int, int, int], int, bytes]]:
        """The next pieces of captured streams, as (stream, offset, bytes), in order within each; call again until there are
        none. A stream is (task, attempt, fd); its value is the offset of the last piece that was read, -1 before the first.

        An offset may be greater than the end of the piece before: what was between has been cut out.
        """
        if not streams:
            return []
        rows = [
            {"task_id": task_id, "attempt": number, "fd": fd, "after": after}
            for (task_id, number, fd), after in streams.items()
        ]
        # Of one stream many, of many a few of each, so that none waits long for the others.
        parameters = {"rows": json.dumps(rows), "limit": max(PIECES // len(rows), 4)}
        found = connection.execute(sql.output_after(self.dialect), parameters)
        return [((row.task_id, row.attempt, row.fd), row.offset, bytes(row.data)) for row in found]

    def output_sizes(self, connection: sa.Connection, ids: Iterable[int]) -> dict[tuple[int, int, int], int]:
        """Bytes captured of the latest attempts of these tasks, by (task, attempt, fd); streams without any are left out."""
        rows = connection.execute(sql.output_sizes(self.dialect), {"ids": list(ids)})
        return {(task_id, attempt, fd): int(size) for task_id, attempt, fd, size in rows}

    def outputs(self, connection: sa.Connection, ids: Iterable[int]) -> dict[tuple[int, int], bytes]:
        """All that was captured of the latest attempts of these tasks, by (task, fd): ask `output_sizes` before."""
        pieces: dict[tuple[int, int], list[bytes]] = {}
        for row in connection.execute(sql.outputs(self.dialect), {"ids": list(ids)}):
            pieces.setdefault((row.task_id, row.fd), []).append(bytes(row.data))
        return {stream: b"".join(data) for stream, data in pieces.items()}

    def running(self, connection: sa.Connection) -> dict[int, tuple[int, Fraction]]:
        """How many tasks each worker runs, and the CPUs that they reserve of it; workers that run none are left out."""
        found: dict[int, tuple[int, Fraction]] = {}
        for row in connection.execute(sql.reservations()):
            count, cpus = found.get(row.id, (0, Fraction(0)))
            found[row.id] = count + 1, cpus + CpuRequest.parse(row.cpus).share(Fraction(row.worker_cpus))
        return found

    def usage(self, connection: sa.Connection) -> dict[str, Fraction]:
        """The CPUs that run for each user on the whole farm, as `chooser.weight` counts them."""
        found: dict[str, Fraction] = {}
        for row in connection.execute(sql.usage()):
            cpus = weight(CpuRequest.parse(row.cpus).share(Fraction(row.worker_cpus))) * row.n
            found[row.user] = found.get(row.user, Fraction(0)) + cpus
        return found

    def doctor(self, connection: sa.Connection) -> list[Finding]:
        """The invariants that this store breaks; empty for a sound one."""
        findings = []
        for rule, statement in sql.checks(self.dialect).items():
            if ids := connection.execute(statement.distinct().limit(100)).scalars().all():
                findings.append(Finding(rule, tuple(ids)))
        reserved: dict[int, tuple[Fraction, Fraction, int, int]] = {}
        for row in connection.execute(sql.reservations()):
            whole = Fraction(row.worker_cpus)
            cpus, _, memory, _ = reserved.get(row.id, (Fraction(0), whole, 0, 0))
            cpus += CpuRequest.parse(row.cpus).share(whole)
            reserved[row.id] = (cpus, whole, memory + row.memory_bytes, row.worker_memory)
        if over := [i for i, (cpus, whole, memory, total) in reserved.items() if cpus > whole or memory > total]:
            findings.append(Finding("I8 reservations on a worker do not exceed its capacity", tuple(over)))
        return findings
