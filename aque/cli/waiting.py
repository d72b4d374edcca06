"""Waiting for tasks on behalf of a verb: who will run them, until they have ended, and what Ctrl-C means."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from aque.chooser import why_nowhere
from aque.cli.exit_status import INTERRUPTED, exit_status
from aque.cli.farm import Farm, batches
from aque.cli.local_worker import LocalWorker, local_worker
from aque.cli.show import complain
from aque.states import COMPLETE_STATES, State
from aque.store import StoredResult
from aque.values import Pattern, TaskSpec
from aque.waiter import Waiter

NO_WORKER = (
    "no worker is running, so nothing happens until one is: start one with `aque worker` in another terminal, "
    "or let submit, call and xargs start one with --local."
)
ALL_DRAINING = (
    "every running worker is draining, so nothing more is started: `aque workers undrain NAME` lets one go on, "
    "and `aque worker` starts another."
)
#: Live output is looked for so often; workers store it half as often.
LIVE_SECONDS = 0.1


@contextmanager
def someone_to_run(farm: Farm, specs: Sequence[TaskSpec], local: bool) -> Iterator[LocalWorker | None]:
    """A worker of our own with `local`; else a hint if no worker runs, or none that could run what was submitted."""
    requirements = {spec.requirement for spec in specs if spec.requirement.pattern is not Pattern.GROUP}
    if local:
        with local_worker([farm.settings.default_queue, *sorted({r.queue for r in requirements})]) as worker:
            yield worker
        return
    places = farm.places()
    if not places:
        complain(NO_WORKER)
    else:
        for why in sorted({why for r in requirements if (why := why_nowhere(r, places))}):
            complain(f"no running worker can run it: {why}. It waits for one that can.")
    yield None


def hint_if_no_worker(farm: Farm, ids: Iterable[int]) -> None:
    """Say so if these tasks have not all ended and no worker runs."""
    unfinished = any(State(row["state"]) not in COMPLETE_STATES for row in farm.rows(list(ids), ["state"]))
    places = farm.places() if unfinished else []
    if unfinished and not places:
        complain(NO_WORKER)
    elif unfinished and all(place.draining for place in places):
        complain(ALL_DRAINING)


def until_ended(
    farm: Farm,
    ids: Iterable[int],
    *,
    local: LocalWorker | None = None,
    every: float = 1.0,
    timeout: float | None = None,
) -> Iterator[dict[int, State]]:
    """The tasks that have ended since the last time, at least `every` so many seconds, until all have or `timeout` is over.

    Raises AqueError if the local worker ends before them.
    """
    left = dict.fromkeys(ids)
    end = None if timeout is None else time.monotonic() + timeout
    waiter = Waiter(farm.store, farm.store.completed)
    try:
        while left:
            # Before the look: a worker that ends may have finished the last task just then.
            gone = local is not None and local.has_ended()
            step = every if end is None else max(0.0, min(every, end - time.monotonic()))
            for done in waiter.wait(list(left), timeout=step):
                for task_id in done:
                    left.pop(task_id, None)
                yield done
            if left and gone and local is not None:
                raise local.failure()
            if end is not None and time.monotonic() >= end:
                return
    finally:
        waiter.close()


def ends(farm: Farm, ids: Iterable[int]) -> list[StoredResult]:
    """How these tasks ended, in their order."""
    found: list[StoredResult] = []
    with farm.store.connect() as connection:
        for batch in batches(ids):
            results = farm.store.stored_results(connection, batch)
            found += [results[task_id] for task_id in batch if task_id in results]
    return found


def largest_status(farm: Farm, ids: Sequence[int]) -> int:
    """The largest exit status of these tasks; a job's is that of its members."""
    statuses = [exit_status(end) for batch in batches(farm.members(ids)) for end in ends(farm, batch)]
    return max(statuses, default=0)


def interrupted(task_id: int, local: bool) -> int:
    """The exit status of a verb that Ctrl-C took from its waiting, and what that means for the task."""
    goes_on = f"task {task_id} waits for another worker" if local else f"task {task_id} goes on"
    complain(f"interrupted: {goes_on}. `aque kill {task_id}` ends it, `aque wait {task_id}` waits for it.")
    return INTERRUPTED
