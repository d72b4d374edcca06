"""What a running task does to the canvas that it is in: a signature takes its place, or becomes another member of its group."""

from dataclasses import dataclass
from typing import Any

from celery import Task as CeleryTask
from celery.canvas import _chain
from celery.exceptions import ImproperlyConfigured

from aque import codec, within
from aque.canvas import Builder, Lead, Where
from aque.codec import Reference
from aque.errors import BadInput
from aque.handles import stand_in
from aque.signatures import ends_in_group
from aque.values import Condition, Replacement

#: The task that passes on what it gets: Celery has it in every app.
ACCUMULATE = "celery.accumulate"


def replace(task: CeleryTask, sig: Any) -> Any:
    """Celery's `self.replace`: leave the running task's row, with its id, what waits for it and its callbacks, to a signature.
    Never returns."""
    if (row := _row(task)) is None:
        return CeleryTask.replace(task, sig)
    raise within.Replaced(replacement(task, row, sig))


def add_to_chord(task: CeleryTask, sig: Any, lazy: bool = False) -> Any:
    """Celery's `self.add_to_chord`: what follows the group or chord that the running task is a member of waits for this
    signature, too, and gets its result at the end of the list. It is submitted at once: `lazy` is refused."""
    if (row := _row(task)) is None:
        return CeleryTask.add_to_chord(task, sig, lazy)
    if lazy:
        raise BadInput("add_to_chord submits at once: lazy=True is not supported. Nothing was submitted.")
    return add_to_group(task, row, sig)


within.WAYS.extend((replace, add_to_chord))


@dataclass(frozen=True, slots=True)
class _Row:
    """The row whose attempt is running."""

    id: int
    errbacks: Any
    where: Where  #: the job or group that it is in


def _row(task: CeleryTask) -> _Row | None:
    """That of a task which was claimed from the table, or runs in `aque.execute`; None: it was called, eager or sent."""
    request = task.request
    if within.is_from_table(task):
        job = str(request.root_id or "")
        is_member = job.isdecimal() and int(job) != request.aque_id
        return _Row(request.aque_id, request.aque_errbacks, Where(int(job)) if is_member else Where())
    instead = stand_in.get()
    spec = None if instead is None else instead.running.get(request.id)
    return None if spec is None else _Row(spec.id, spec.extra.get("errbacks"), Where())


def replacement(task: CeleryTask, row: _Row, sig: Any) -> Replacement:
    """Submit what replaces the running `task`, but for its last task: that is what the row of `task` is to run next."""
    app, request = task.app, task.request
    if "chord" in sig.options:
        raise ImproperlyConfigured("A signature replacing a task must not be part of a chord")
    if isinstance(sig, _chain) and not sig.tasks:
        raise ImproperlyConfigured("Cannot replace with an empty chain")
    errbacks = codec.decode_result(codec.encode_result(row.errbacks or [], 1 << 62)) or []
    builder = Builder(app)
    builder.take_over(request.id, row.id, errbacks, row.where)
    more = {"link_error": errbacks} if errbacks else {}
    if ends_in_group(sig, app):
        whole = builder.place(sig, None, more)
        last = app.signature(ACCUMULATE, kwargs={"index": 0})
        lead = Lead(([],)) if whole is None else Lead((Reference(whole.id),), {}, ((whole.id, Condition.OK),))
        builder.place(last, lead, {"task_id": request.id})
    else:
        builder.place(sig, None, {**more, "task_id": request.id})
    spec = builder.spec(builder.nodes.pop(row.id))
    builder.submit()
    class_id = builder.submitter.class_of(spec)
    return Replacement(spec.name, spec.function, spec.arguments, spec.inputs, spec.dependencies, class_id)


def add_to_group(task: CeleryTask, row: _Row, sig: Any) -> Any:
    """Submit a signature as another member of the group that the running `task` is a member of."""
    builder = Builder(task.app)
    builder.root = row.where
    placed = builder.place(sig)
    if placed is None:
        raise BadInput("there is nothing in this canvas to add to the group. Nothing was submitted.")
    builder.submit(joins=(placed.id, row.id))
    return placed.result
