"""`aque.Executor`: the farm behind the interface of `concurrent.futures`."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import closing
from itertools import islice
from typing import Any

from celery import Celery

from aque.celery_app import app_in_use
from aque.errors import BadInput
from aque.futures import Collector, Future
from aque.handles import stand_in, submitter_of
from aque.named_calls import NamedCall, checked
from aque.options import Options
from aque.values import Condition, Dependency, TaskSpec

#: So many calls of a `map` are written in one transaction, as one job.
BATCH = 10_000


class Executor(futures.Executor):
    """Runs calls of functions on the farm: `aque.Executor(cpus=0.5, queue="tests")`.

    A call is a task like any other: it outlives this process, and `aque status` shows it. Functions, classes and builtins are
    given as such or as "module:qualname", tasks of `@aque.task` as such; what no worker could find by name raises
    NotSubmittable. Arguments and results are JSON. Where tasks are submitted, an open `aque.graph()` changes nothing: what an
    executor is given starts at once.
    """

    def __init__(self, app: Celery | None = None, **options: Any) -> None:
        """The options are those of `@aque.task`, and `depends_on after_any after_failed`; a task's own are used where
        nothing is given here. Raises BadInput."""
        self._app = app or app_in_use()
        self._options = checked(options)
        self._collector = Collector(self._app)
        self._stopped: list[bool] = []

    def options(self, **options: Any) -> "Executor":
        """The same executor, whose calls get these options besides: `executor.options(cpus=4).submit(render, 7)`."""
        other = Executor.__new__(Executor)
        other.__dict__.update(self.__dict__, _options={**self._options, **checked(options)})
        return other

    def submit(self, fn: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Future:
        """Submit one call. Raises NotSubmittable, BadInput or a StoreError, and then nothing was submitted."""
        self._check_open()
        call = NamedCall.of(fn, self._options)
        submitter = submitter_of(self._app)
        future = Future(submitter.next_id(), self._collector)
        spec = call.spec(submitter, future.task_id, args, kwargs)
        self._send([future], [spec])
        return future

    def map(
        self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[Any]:
        """The results of `fn` for each set of arguments, in their order, as they come.

        All calls are submitted before this returns, in one transaction for 10,000 of them; each such batch is a job.
        `chunksize` calls are one task, which saves most of the cost of short ones; an exception in one of them then stands for
        all. When the iteration ends early, by an exception, `timeout` or `close`, what has not started is cancelled.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        self._check_open()
        end = None if timeout is None else time.monotonic() + timeout
        call = NamedCall.of(fn, self._options)
        arguments: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        if chunksize == 1:
            return self._results(self._send_all(call, arguments), end)
        chunks = ((chunk,) for chunk in iter(lambda: list(islice(arguments, chunksize)), []))
        return _flat(self._results(self._send_all(call.several(chunksize), chunks), end))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more. `cancel_futures`: withdraw what has not started; `wait`: until everything has ended."""
        self._stopped.append(True)
        if cancel_futures:
            self._collector.withdraw(self._collector.pending())
        if wait:
            futures.wait(self._collector.pending())

    def _check_open(self) -> None:
        if self._stopped:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if stand_in.get() is not None:
            raise BadInput("an executor needs the farm: inside aque.execute submit with .delay(), and use .get().")

    def _send_all(self, call: NamedCall, arguments: Iterator[tuple[Any, ...]]) -> list[Future]:
        sent: list[Future] = []
        try:
            while batch := list(islice(arguments, BATCH)):
                sent += self._send_batch(call, batch)
        except BaseException:
            self._collector.withdraw(sent)
            raise
        return sent

    def _send_batch(self, call: NamedCall, batch: Sequence[tuple[Any, ...]]) -> list[Future]:
        submitter = submitter_of(self._app)
        job_id, *ids = submitter.reserve(len(batch) + 1)
        new = [Future(task_id, self._collector) for task_id in ids]
        specs = [
            call.spec(submitter, task_id, args, {}, job_id=job_id, seq=seq)
            for seq, (task_id, args) in enumerate(zip(ids, batch, strict=True))
        ]
        members = tuple(Dependency(task_id, Condition.ANY) for task_id in ids)
        job = submitter.group(job_id, Options(name=call.name, dependencies=members, job_id=job_id))
        self._send(new, [*specs, job])
        return new

    def _send(self, new: Sequence[Future], specs: Sequence[TaskSpec]) -> None:
        self._collector.add(new)
        try:
            submitter_of(self._app).submit(specs)
        except BaseException:
            self._collector.forget(new)
            raise

    def _results(self, expected: list[Future], end: float | None) -> Iterator[Any]:
        expected.reverse()  # what has been read can be freed
        try:
            while expected:
                value = expected[-1].result(None if end is None else end - time.monotonic())
                expected.pop()
                yield value
        finally:
            self._collector.withdraw([future for future in expected if not future.done()])


def _flat(results: Iterator[list[Any]]) -> Iterator[Any]:
    """The items of the lists; closing it closes `results`, where leaving a loop over it would not."""
    with closing(results):  # type: ignore[type-var]
        for several in results:
            yield from several
