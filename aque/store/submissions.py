"""submit: tasks, their edges, and what they share."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from aque import deps
from aque.errors import BadInput, UnknownTask
from aque.states import COMPLETE_STATES, Reason, State
from aque.store import hot
from aque.store import statements as sql
from aque.store.base import EDGE_COLUMNS, Base
from aque.store.retention import KNOWN_SECONDS, environment_id
from aque.store.rows import Inherited, KnownCall, digest_of, join, requirement_key, split, to_json, to_json_list
from aque.store.tables import edge, payload, task
from aque.values import Children, Dependency, Pattern, Requirement, TaskSpec

#: See `Store.is_crowded`.
MOST_CLASSES = 256
_TASK_COLUMNS = (
    "id", "state", "requirement_id", "priority", "rank", "duration", "not_before", "expires_at", "io_bytes", "unmet",
    "dependents", "attempt", "failed", "lost", "tokens", "max_attempts", "requeue", "truncated", "name", "pattern", "job_id",
    "layer", "parent_id", "children", "children_left", "children_failed", "blocked", "seq", "submitter", "celery_id", "reason",
    "submitted_at", "ready_at", "finished_at",
)  # fmt: skip
_PAYLOAD_COLUMNS = (
    "task_id", "function", "arguments", "inputs", "argv", "stdin", "stdin_path", "stdout_path", "stderr_path", "login",
    "cwd", "umask", "environment_id", "import_path", "io_paths", "time_limit_seconds", "soft_time_limit_seconds",
    "strict_lease", "extra",
)  # fmt: skip
#: Columns of a task that its submission leaves empty.
_NOTHING_YET = {f"t_{column.name}": None for column in task.c if column.name not in _TASK_COLUMNS}


class Submissions(Base):
    """What a submitter writes."""

    def submit(
        self, connection: sa.Connection, specs: Sequence[TaskSpec], durations: Mapping[int, float] | None = None
    ) -> dict[int, State]:
        """Insert these tasks and their edges, all or nothing, inside the caller's transaction; their first states.
        `durations` are expected seconds by id, in place of what the specs say.

        Raises Cycle or UnknownTask, and then nothing has been written.
        """
        graph: dict[int, Sequence[Dependency]] = {spec.id: spec.dependencies for spec in specs}
        dependents = Counter(d.upstream for spec in specs for d in spec.dependencies)
        states = self._add_dependents(connection, {i: n for i, n in dependents.items() if i not in graph})
        groups = [s.id for s in specs if s.requirement.pattern is Pattern.GROUP]
        starts = deps.starts(graph, groups, states, [s.id for s in specs if s.not_before is not None])
        # One that is skipped from the start never ends, and nobody is to wait for that.
        open_specs = [spec for spec in specs if starts[spec.id].state not in COMPLETE_STATES]
        children = Counter(spec.parent_id for spec in open_specs if spec.parent_id is not None)
        self._add_children(connection, {i: n for i, n in children.items() if i not in graph})
        everything = {**states, **{task_id: start.state for task_id, start in starts.items()}}
        now = self._wall(connection, time.monotonic())
        task_rows, payload_rows, edge_rows = [], [], []
        durations = durations or {}
        for spec in specs:
            start = starts[spec.id]
            duration = durations.get(spec.id, spec.duration)
            task_rows.append(self._task_row(spec, start, dependents[spec.id], children[spec.id], duration, now))
            if spec.requirement.pattern is not Pattern.GROUP or spec.inputs:
                payload_rows.append(self._payload_row(spec))
            edge_rows += [
                (d.upstream, spec.id, str(d.condition), deps.is_satisfied(d.condition, everything[d.upstream]))
                for d in spec.dependencies
            ]
        if self.is_one_statement(specs):
            values = dict(zip((f"t_{name}" for name in _TASK_COLUMNS), task_rows[0], strict=True))
            values |= zip((f"p_{name}" for name in _PAYLOAD_COLUMNS), payload_rows[0], strict=True)
            hot.run(connection, sql.add_task(), _NOTHING_YET | values)
            return {specs[0].id: starts[specs[0].id].state}
        self._insert(connection, task, _TASK_COLUMNS, task_rows)
        self._insert(connection, payload, _PAYLOAD_COLUMNS, payload_rows)
        self._insert(connection, edge, EDGE_COLUMNS, edge_rows)
        return {task_id: start.state for task_id, start in starts.items()}

    def is_one_statement(self, specs: Sequence[TaskSpec]) -> bool:
        """True if `submit` sends one statement for these: it needs no transaction around it, which is two round trips."""
        if len(specs) != 1 or self.dialect != "postgresql":
            return False
        spec = specs[0]
        return not spec.dependencies and spec.parent_id is None and spec.requirement.pattern is not Pattern.GROUP

    def intern(self, connection: sa.Connection, specs: Iterable[TaskSpec]) -> None:
        """Make sure that the requirement classes and environments of `specs` have rows. Outside of the submission's own
        transaction, so that two submitters of the same class never wait for each other."""
        wanted = {spec.requirement for spec in specs if spec.requirement.pattern is not Pattern.GROUP}
        self.requirement_ids(connection, wanted)
        for content in {spec.environment for spec in specs if spec.environment}:
            digest = digest_of(content)
            new = environment_id(digest, self.now(connection))
            if self._environment_ids.get(digest) != new:
                connection.execute(sql.add_environment(self.dialect), {"id": new, "content": content})
                self._environment_ids[digest] = new

    def requirement_ids(self, connection: sa.Connection, wanted: Iterable[Requirement]) -> dict[Requirement, int]:
        """The classes of these requirements, made if there are none, outside of any transaction: see `intern`."""
        known = self._requirement_ids
        found = {}
        for requirement in wanted:
            # Not for ever: one that nobody has used for long may have been removed, see `retention`. By the wall clock,
            # which goes on while the machine sleeps.
            now = time.time()
            if not 0 <= now - self._looked_up.get(requirement, -math.inf) < KNOWN_SECONDS:
                known[requirement] = self._requirement_id(connection, requirement)
                self._looked_up[requirement] = now
            found[requirement] = known[requirement]
        return found

    def is_crowded(self, connection: sa.Connection, requirements: Iterable[Requirement]) -> bool:
        """True if some of these classes have places and are new, while so many classes with places have ready tasks that
        more of them would make every claim slower."""
        new = {r for r in requirements if r.places and r not in self._requirement_ids}
        digests = [requirement_key(requirement)["digest"] for requirement in new]
        if not new or connection.execute(sql.known_digests(), {"digests": digests}).scalar_one() == len(new):
            return False
        return bool(connection.execute(sql.ready_classes_with_places(self.dialect)).scalar_one() > MOST_CLASSES)

    def _requirement_id(self, connection: sa.Connection, requirement: Requirement) -> int:
        key = requirement_key(requirement)
        found = connection.execute(sql.find_requirement(), key).scalar()
        if found is None:
            (new,) = self.reserve_ids(connection, 1)
            connection.execute(sql.add_requirement(self.dialect), {"id": new, **key})
            found = connection.execute(sql.find_requirement(), key).scalar_one()
        return int(found)

    def _add_dependents(self, connection: sa.Connection, counts: Mapping[int, int]) -> dict[int, State]:
        if not counts:
            return {}
        rows = json.dumps([{"id": i, "n": n} for i, n in sorted(counts.items())])
        found = connection.execute(sql.add_dependents(self.dialect), {"rows": rows})
        states = {row.id: State(row.state) for row in found}
        if missing := [i for i in sorted(counts) if i not in states]:
            raise UnknownTask(missing)
        return states

    def _add_children(self, connection: sa.Connection, counts: Mapping[int, int]) -> None:
        """Tasks get so many more children. Raises BadInput for those that have ended."""
        if not counts:
            return
        rows = json.dumps([{"id": i, "n": n} for i, n in sorted(counts.items())])
        found = set(connection.execute(sql.add_children(self.dialect), {"rows": rows}).scalars())
        if missing := [i for i in counts if i not in found]:
            raise BadInput(
                f"task {missing[0]}, whose child this would be, has ended or is being killed. Nothing was submitted."
            )

    def _task_row(
        self, spec: TaskSpec, start: deps.Start, dependents: int, children: int, duration: float, now: Any
    ) -> tuple[Any, ...]:
        is_group = spec.requirement.pattern is Pattern.GROUP
        reason = {State.SKIPPED: Reason.DEPENDENCY, State.ERROR: Reason.DEPENDENCY}.get(start.state)
        return (
            spec.id,
            str(start.state),
            None if is_group else self._requirement_ids[spec.requirement],
            spec.priority,
            spec.priority + spec.age_rank,
            duration,
            spec.not_before if start.state is State.PENDING else None,
            spec.expires_at if start.state not in COMPLETE_STATES else None,
            spec.io_bytes,
            start.unmet,
            dependents,
            0,
            0,
            0,
            0,
            spec.max_attempts,
            spec.requeue,
            False,
            spec.name,
            str(spec.requirement.pattern),
            spec.id if spec.job_id is None else spec.job_id,
            spec.layer or spec.name,
            spec.parent_id,
            str(spec.children),
            0 if spec.children is Children.DETACH else children,
            0,
            False,
            spec.seq,
            spec.submitter,
            spec.celery_id,
            None if reason is None else str(reason),
            now,
            now if start.state is State.READY else None,
            now if start.state in COMPLETE_STATES else None,
        )

    def _payload_row(self, spec: TaskSpec) -> tuple[Any, ...]:
        return (
            spec.id,
            spec.function,
            spec.arguments,
            to_json(spec.inputs) if spec.inputs else b"",
            join(spec.argv),
            spec.stdin,
            spec.redirections.stdin,
            spec.redirections.stdout,
            spec.redirections.stderr,
            spec.login,
            spec.cwd,
            spec.umask,
            self._environment_ids[digest_of(spec.environment)] if spec.environment else None,
            to_json_list(spec.import_path) if spec.import_path else b"",
            join(spec.io_paths or ()),
            spec.time_limit_seconds,
            spec.soft_time_limit_seconds,
            spec.strict_lease,
            to_json(spec.extra) if spec.extra else b"",
        )

    def ids_of(self, connection: sa.Connection, celery_ids: Sequence[str]) -> dict[str, int]:
        """The tasks that Celery knows by these ids: decimal ones, and those that a caller brought."""
        brought = [i for i in celery_ids if not i.isdecimal()]
        found = {i: int(i) for i in celery_ids if i.isdecimal() and len(i) < 19}
        if brought:
            found.update(dict(connection.execute(sql.ids_of_celery_ids(), {"celery_ids": brought}).all()))
        return found

    def calls_of(self, connection: sa.Connection, celery_ids: Sequence[str]) -> dict[str, KnownCall]:
        """What was submitted under these Celery ids."""
        if not celery_ids:
            return {}
        rows = connection.execute(sql.calls_of(), {"celery_ids": list(celery_ids)})
        return {
            row.celery_id: KnownCall(
                row.id, State(row.state), row.function or "", bytes(row.arguments or b""), split(row.argv or b"")
            )
            for row in rows
        }

    def inherited(self, connection: sa.Connection, task_id: int) -> Inherited | None:
        """What children of this task have of it; None if there is no such task, or it needs no worker."""
        row = connection.execute(sql.inherited(), {"which": task_id}).first()
        if row is None:
            return None
        return Inherited(self.requirements(connection, [row.requirement_id])[row.requirement_id], row.priority)
