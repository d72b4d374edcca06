"""A graph that is open: tasks that are submitted together, in one transaction."""

from dataclasses import replace
from typing import Any

from celery import Celery

from aque.errors import BadInput
from aque.handles import Handle, backend_of, submitter_of
from aque.options import Options
from aque.submitter import Submitter
from aque.task_options import condition_of, id_of
from aque.values import Condition, Dependency, TaskSpec


class Ids:
    """Ids for tasks that are submitted later, reserved in growing blocks, so that a large graph asks the store rarely."""

    def __init__(self, submitter: Submitter, first_block: int = 16) -> None:
        self._submitter = submitter
        self._ids: list[int] = []
        self._block = first_block

    def new(self) -> int:
        if not self._ids:
            if self._block == 1:
                self._ids = [self._submitter.next_id()]
            else:
                self._ids = self._submitter.reserve(self._block)[::-1]
            self._block = min(self._block * 4, 4096)
        return self._ids.pop()


class Graph:
    """Tasks that are submitted together, in one transaction; made by `aque.graph()`.

    It is a job: a row of its own, whose id every verb takes, and that is complete when all its tasks are.
    """

    def __init__(self, app: Celery, name: str) -> None:
        self._app = app
        self._name = name
        self._submitter = submitter_of(app)
        self._specs: dict[int, TaskSpec] = {}
        self._spare: set[int] = set()
        self._ids = Ids(self._submitter)
        self.id = self.new_id()

    def new_id(self) -> int:
        """An id for the next task."""
        return self._ids.new()

    def add(self, spec: TaskSpec, is_spare: bool = False) -> None:
        """Add a task to the job. The job succeeds without what `is_spare`, such as error callbacks."""
        self._specs[spec.id] = spec
        if is_spare:
            self._spare.add(spec.id)

    def has(self, celery_id: str) -> bool:
        """True if this is the id of the job, or of one of its tasks, as Celery has it."""
        if celery_id.isdecimal():
            return int(celery_id) == self.id or int(celery_id) in self._specs
        return any(spec.celery_id == celery_id for spec in self._specs.values())

    def place(self) -> dict[str, Any]:
        """The next task's place in the job."""
        return {"job_id": self.id, "seq": len(self._specs)}

    def depend(self, task: Handle | int, *, on: Handle | int, condition: str = "ok") -> None:
        """Let a task of this graph wait for another, in or outside of it. `condition`: "ok", "any" or "failed"."""
        task_id = id_of(task)
        if task_id not in self._specs:
            raise BadInput(f"task {task_id} is not part of this graph, so it cannot get a dependency any more.")
        spec = self._specs[task_id]
        edges = dict.fromkeys((*spec.dependencies, Dependency(id_of(on), condition_of(condition))))
        self._specs[task_id] = replace(spec, dependencies=tuple(edges))

    @property
    def handle(self) -> Handle:
        """The job as a task: `.get()` waits for all of it."""
        return Handle(str(self.id), app=self._app, backend=backend_of(self._app))

    def submit(self) -> None:
        """Write everything; `aque.graph()` calls it at the end of its block."""
        members = tuple(Dependency(task_id, Condition.ANY) for task_id in self._specs if task_id not in self._spare)
        options = Options(name=self._name, dependencies=members, job_id=self.id)
        self._submitter.submit([*self._specs.values(), self._submitter.group(self.id, options)])


def submit_or_add(submitter: Submitter, job: Graph | None, spec: TaskSpec, strict: bool) -> None:
    if strict:
        submitter.check_possible([spec])
    if job is not None:
        job.add(spec)
    else:
        submitter.submit([spec])
