"""Other forms of work than a command or a call: a barrier, a reduction, and patterns, which packages bring."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from celery import Celery

from aque import codec, own_tasks, patterns
from aque.celery_app import app_in_use, graph
from aque.celery_options import own_options
from aque.errors import BadInput
from aque.futures import Future
from aque.graphs import submit_or_add
from aque.handles import Handle, backend_of, open_graph, submitter_of
from aque.named_calls import NamedCall, checked, options_with
from aque.options import Options
from aque.submitter import Submitter
from aque.task_options import id_of
from aque.values import OWN_INTERPRETER, Condition, Dependency, TaskSpec

#: In place of an initial value that may be anything.
_NONE_GIVEN: Any = object()


def barrier(tasks: Iterable[Handle | Future | int], *, name: str = "barrier", app: Celery | None = None) -> Handle:
    """A task that only groups: it runs nothing, ends when all of `tasks` have ended, and succeeds if all of them have.

    A hundred tasks that each wait for a hundred others need 10,000 edges, and 200 with a barrier between. Its result is None.
    """
    app = app or app_in_use()
    submitter, job = submitter_of(app), open_graph.get()
    ids = [id_of(task.handle if isinstance(task, Future) else task) for task in tasks]
    place: dict[str, Any] = {} if job is None else job.place()
    new = submitter.next_id() if job is None else job.new_id()
    members = tuple(Dependency(task_id, Condition.ANY) for task_id in ids)
    submit_or_add(submitter, job, submitter.group(new, Options(name=name, dependencies=members, **place)), strict=False)
    return Handle(str(new), app=app, backend=backend_of(app), task_name=name)


def reduce(
    function: Callable[..., Any] | str,
    items: Iterable[Any],
    *,
    initial: Any = _NONE_GIVEN,
    arity: int = 2,
    app: Celery | None = None,
    **options: Any,
) -> Handle:
    """Combine `items`, values or handles of tasks, to one by `function(left, right)`; the task with the result.

    As a tree: neighbours are combined, then neighbours of these, so that 1,000 items take 10 steps and not 999; the order is
    kept, and `function` must be associative. With a larger `arity` it gets up to so many at once, and at least two. `initial`
    comes before the first item, and is the result if there are none; without it that is a BadInput. One item is the result as
    it is. `options` are those of `@aque.task`, for each call. All is submitted in one transaction.
    """
    if arity < 2:
        raise BadInput(f"a reduction combines at least 2 items at a time, not {arity!r}. Nothing was submitted.")
    values = [*([] if initial is _NONE_GIVEN else [initial]), *items]
    if not values:
        raise BadInput(
            "there is nothing to reduce. Nothing was submitted: give items, or `initial` for where there are none."
        )
    app = app or app_in_use()
    if len(values) == 1:
        (only,) = values
        if isinstance(only, Handle):
            return only
        return only.handle if isinstance(only, Future) else NamedCall.of(own_tasks.same, {}).submit(app, [only], {})
    call = NamedCall.of(function, checked(options))
    with nullcontext() if open_graph.get() is not None else graph(f"reduce {call.name}", app):
        return _combined(app, call, values, arity)


def _combined(app: Celery, call: NamedCall, values: list[Any], arity: int) -> Handle:
    """The task with the result; there are at least two values."""
    while len(values) > 1:
        starts = range(0, len(values), arity)
        neighbours = [values[start : start + arity] for start in starts]
        values = [several[0] if len(several) == 1 else call.submit(app, several, {}) for several in neighbours]
    last: Handle = values[0]
    return last


def pattern(name: str, app: Celery | None = None, **options: Any) -> Callable[..., Handle]:
    """What submits tasks of a pattern: `aque.pattern("frames", cpus=4)(script="a.nk", last=24)`.

    `options` are those of `@aque.task`, and stand above the pattern's own. Raises BadInput if it is not installed here. A
    worker on which it is not installed ends the task as `error: cannot_import`.
    """
    found = patterns.load(name)
    given = checked(options)

    def submit(*args: Any, **kwargs: Any) -> Handle:
        parts = patterns.parts_of(found, args, kwargs)
        chosen = {**patterns.options_of(found, parts), **given}
        used = app or app_in_use()
        submitter, job = submitter_of(used), open_graph.get()
        task_id = submitter.next_id() if job is None else job.new_id()
        place: dict[str, Any] = {} if job is None else job.place()
        spec = pattern_spec(submitter, task_id, name, found, parts, chosen, **place)
        submit_or_add(submitter, job, spec, strict=False)
        return Handle(str(task_id), app=used, backend=backend_of(used), task_name=spec.name)

    return submit


def pattern_spec(
    submitter: Submitter,
    task_id: int,
    name: str,
    found: patterns.Pattern,
    parts: Mapping[str, Any],
    options: Mapping[str, Any],
    **place: Any,
) -> TaskSpec:
    """The row of a task of the pattern `found` with what its `prepare` has returned: a plain command or call, if that is all
    that it is. Raises BadInput."""
    chosen = dict(options)
    if type(found) not in patterns.BUILT_IN:
        chosen.setdefault("name", name)
    if isinstance(found, patterns.Python) and "function" in parts:
        call = NamedCall.of(parts["function"], chosen)
        if found.is_plain:
            return call.spec(submitter, task_id, parts["args"], parts["kwargs"], **place)
        chosen = {**own_options(call.task), **chosen}
        every = {"args": [*call.args, *parts["args"]], "kwargs": {**call.kwargs, **parts["kwargs"]}}
        parts = {**parts, "function": call.function, **every}
    arguments, inputs = codec.encode_arguments([], parts)
    env = None
    if isinstance(found, patterns.Shell):
        own = patterns.environment_of(found, parts)
        env = {**os.environb, **own} if own else None
        if found.is_plain and not inputs:
            return submitter.command(
                task_id, patterns.command_of(found, parts), options_with(chosen, (), (), parts, place), env=env
            )
        if chosen.get("io", True) and not chosen.get("io_paths"):
            chosen["io_paths"] = submitter.paths_in(list(_texts(parts)))
    if not found.in_pool:
        chosen.setdefault("interpreter", OWN_INTERPRETER)
    function = f"{patterns.__name__}:named.{name}"
    return submitter.function(
        task_id, function, name, arguments, inputs, options_with(chosen, inputs, (), parts, place), env=env
    )


def _texts(value: Any) -> Iterator[str]:
    """The texts in lists and mappings of any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
