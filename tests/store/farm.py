"""Short words for the store tests: submit, claim and end tasks by hand, as a worker would."""

from collections.abc import Iterable
from dataclasses import replace

from aque.states import State
from aque.store import Finished, Released, Store
from aque.values import ClaimedTask, Condition, Dependency, Outcome, Pattern, Requirement, TaskSpec, WorkerInfo

COMMAND = Requirement("celery", Pattern.SHELL)
GROUP = Requirement("celery", Pattern.GROUP)
SPEC = TaskSpec(id=0, name="true", requirement=COMMAND, argv=(b"/bin/true",), submitter="someone")


def worker(
    store: Store, name: str = "celery@here", *, lease_seconds: float = 30.0, cpus: str = "1000", host: str = "here"
) -> int:
    with store.begin() as connection:
        (worker_id,) = store.reserve_ids(connection, 1)
        store.register(
            connection,
            WorkerInfo(
                worker_id,
                name,
                host,
                1,
                0.0,
                "boot",
                cpus,
                1 << 40,
                1000,
                1000,
                ("celery",),
                "linux",
                "0",
                lease_seconds,
                "",
                False,
                "subreaper",
            ),
        )
    return worker_id


def submit(store: Store, specs: Iterable[TaskSpec]) -> dict[int, State]:
    specs = list(specs)
    with store.connect() as connection:
        store.intern(connection, specs)
    with store.begin() as connection:
        return store.submit(connection, specs)


def ids(store: Store, count: int) -> list[int]:
    with store.begin() as connection:
        return store.reserve_ids(connection, count)


def after(spec_id: int, *upstream: int, condition: Condition = Condition.OK, spec: TaskSpec = SPEC) -> TaskSpec:
    return replace(spec, id=spec_id, dependencies=tuple(Dependency(u, condition) for u in upstream))


def ready(store: Store) -> list[int]:
    with store.connect() as connection:
        return sorted(t.id for row in store.candidates(connection, [], 1000).values() for t in row)


def claim(
    store: Store, task_ids: Iterable[int], worker_id: int, token: int = 7, state: State = State.RUNNING
) -> list[ClaimedTask]:
    with store.begin() as connection:
        return store.claim(connection, list(task_ids), worker_id, token, state)


def outcome(task: ClaimedTask, state: State = State.SUCCESS) -> Outcome:
    return Outcome(task.id, task.attempt, task.token, state)


def finish(store: Store, *outcomes: Outcome) -> Finished:
    with store.begin() as connection:
        return store.finish(connection, outcomes)


def run(store: Store, worker_id: int, *task_ids: int, state: State = State.SUCCESS) -> Finished:
    return finish(store, *[outcome(t, state) for t in claim(store, task_ids, worker_id)])


def states(store: Store) -> dict[int, str]:
    with store.connect() as connection:
        return {row["id"]: row["state"] for row in store.tasks(connection, fields=["id", "state"])}


def reap(store: Store, worker_id: int, max_lost: int = 3) -> Released | None:
    with store.begin() as connection:
        (row,) = [w for w in store.workers(connection) if w.info.id == worker_id]
        return store.reap(connection, row, max_lost)
