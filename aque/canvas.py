"""Celery's signatures as a graph: every task of a canvas becomes a row, what follows what an edge, in one submission."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from celery import Celery
from celery import Task as CeleryTask
from celery.canvas import Signature, _basemap, _chain, _chord, chunks, group
from celery.local import Proxy
from celery.utils.functional import maybe_list
from kombu.utils.uuid import uuid

from aque.announcements import Announcement
from aque.calls import check_id, is_ours, spec_of_call, takes_all
from aque.codec import Failure, Reference
from aque.errors import BadInput
from aque.graphs import Ids
from aque.handles import GroupHandle, Handle, backend_of, open_graph, submitter_of
from aque.options import Options
from aque.signatures import (
    copy_of,
    ends_in_group,
    errbacks_of,
    members_of,
    merged,
    signature_of,
    steps_of,
    taken,
    takes_exception,
    task_of,
)
from aque.submitter import Submitter
from aque.values import Condition, Dependency, TaskSpec


@dataclass(frozen=True, slots=True)
class Lead:
    """What a part of a canvas waits for, and gets in front of its own arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[tuple[int, Condition], ...] = ()
    parent: Any = None  #: Celery's result of what is before it


@dataclass(frozen=True, slots=True)
class Where:
    """A part's place: its job or group, the position there, and whether a job succeeds without it."""

    job_id: int | None = None
    seq: int = 0
    is_spare: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """What a part of a canvas has become: the row whose end is the part's, and Celery's result for it."""

    id: int
    result: Any


@dataclass(slots=True)
class Node:
    """A task of a canvas, or a group with `members`, before it is a row."""

    id: int
    name: str
    where: Where
    celery_id: str | None
    task: CeleryTask | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    after: dict[int, Condition] = field(default_factory=dict)
    members: list[int] | None = None
    errbacks: list[Mapping[str, Any]] = field(default_factory=list)


#: A walk that asks for parts to be placed by yielding (signature, lead, options, where): see `Builder.place`.
Walk = Generator[tuple[Any, Lead, Mapping[str, Any], Where], Placed | None, Placed | None]


class Builder:
    """Collects the rows of one canvas. `submit` writes them: all of them or, with an error, none."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.submitter: Submitter = submitter_of(app)
        self.nodes: dict[int, Node] = {}
        self.root = Where()
        self._backend = backend_of(app)
        self._job = open_graph.get()
        self._new_id = Ids(self.submitter, first_block=1).new if self._job is None else self._job.new_id
        #: By the id that `freeze` gave it: a task that is in several places of a canvas is one row.
        self._frozen: dict[str, Placed] = {}
        #: A row that is there already: the task with this id takes it over; and the error callbacks that it keeps.
        self._takes_over: dict[str, int] = {}
        self._kept_errbacks: list[Any] = []
        self._announced: list[Announcement] = []
        #: Handles of tasks whose ids a caller brought.
        self._named: list[Handle] = []

    def place(self, sig: Any, lead: Lead | None = None, options: Mapping[str, Any] | None = None) -> Placed | None:
        """Add a signature with all that is in it; None if there is nothing. `options` are added to its own."""
        return self._walk(self._part(sig, lead or Lead(), options or {}, self._place()))

    def call(self, sig: Signature, options: Mapping[str, Any]) -> Placed | None:
        """Add a task."""
        return self._walk(self._task(sig, Lead(), options, self._place()))

    def _place(self) -> Where:
        return self.root if self._job is None else dataclasses.replace(self.root, **self._job.place())

    def take_over(self, celery_id: str, task_id: int, errbacks: list[Any], where: Where) -> None:
        """The task with the first id gets the row with the second, which keeps its own error callbacks; all others are put
        where that row is."""
        self._takes_over[celery_id] = task_id
        self._kept_errbacks = errbacks
        self.root = where

    def submit(self, strict: bool = False, joins: tuple[int, int] | None = None) -> None:
        """Write everything, or add it to the graph that is open."""
        specs = [self.spec(node) for node in self.nodes.values()]
        if strict or any(node.options.get("strict") for node in self.nodes.values()):
            self.submitter.check_possible(specs)
        if self._job is not None and joins is None:
            for spec, node in zip(specs, self.nodes.values(), strict=True):
                self._job.add(spec, node.where.is_spare)
        elif specs:
            self.submitter.submit(specs, joins)
            for handle in self._named:  # who repeats a submission gets the task that is there: see `Submitter.submit`
                del handle.number
        for announcement in self._announced:
            announcement.after()

    def spec(self, node: Node) -> TaskSpec:
        """The row of a node."""
        place: dict[str, Any] = {"job_id": node.where.job_id, "seq": node.where.seq}
        if node.members is not None:
            edges = tuple(Dependency(i, Condition.ANY) for i in dict.fromkeys(node.members))
            options = Options(name="group", dependencies=edges, celery_id=node.celery_id, **place)
            return self.submitter.group(node.id, options, node.members)
        return spec_of_call(
            self.app,
            self.submitter,
            node.id,
            node.name,
            node.task,
            node.args,
            node.kwargs,
            node.options,
            after=node.after,
            celery_id=node.celery_id,
            place=place,
            errbacks=node.errbacks,
            announced=self._announced,
        )

    # -- the walk -----------------------------------------------------------------------------------------------------

    def _walk(self, first: Walk) -> Placed | None:
        """Run a walk and all that it asks for: a stack of our own, since a canvas may be nested deeper than Python's."""
        stack, answer = [first], None
        while stack:
            try:
                asked = stack[-1].send(answer)
            except StopIteration as done:
                stack.pop()
                answer = done.value
            else:
                stack.append(self._part(*asked))
                answer = None
        return answer

    def _part(self, sig: Any, lead: Lead, options: Mapping[str, Any], where: Where) -> Walk:
        sig = signature_of(sig, self.app)
        if isinstance(sig, _chain):
            return self._chain(sig, lead, options, where)
        if isinstance(sig, chunks):
            return self._group(sig.group(), lead, merged(sig.options, options), where)
        if isinstance(sig, group):
            return self._group(sig, lead, options, where)
        if isinstance(sig, _chord):
            return self._chord(sig, lead, options, where)
        return self._task(sig, lead, options, where)

    def _task(self, sig: Signature, lead: Lead, options: Mapping[str, Any], where: Where) -> Walk:
        wanted = merged(sig.options, options)
        celery_id = wanted.pop("task_id", None)
        row = self._takes_over.get(celery_id)
        celery_id = check_id(celery_id) if row is None else celery_id
        callbacks = maybe_list(wanted.pop("link", None)) or []
        errbacks = maybe_list(wanted.pop("link_error", None)) or []
        args, kwargs = tuple(sig.args or ()), dict(sig.kwargs or {})
        if isinstance(sig, _basemap):
            kwargs["it"] = list(kwargs["it"])
        if not sig.immutable:
            args, kwargs = lead.args + args, kwargs | dict(lead.kwargs)
        if celery_id is not None and (known := self._frozen.get(celery_id)) is not None:
            self._meet(self.nodes[known.id], lead, sig)
            return known
        if row is not None:
            errbacks = [errback for errback in errbacks if errback not in self._kept_errbacks]
        node = Node(
            self._new_id() if row is None else row,
            sig["task"],
            where,
            celery_id,
            task_of(sig),
            args,
            kwargs,
            wanted,
            dict(lead.after),
            errbacks=[dict(signature_of(errback, self.app)) for errback in errbacks],
        )
        self.nodes[node.id] = node
        handle = self._handle(node, lead.parent)
        placed = Placed(node.id, handle)
        if celery_id is not None:
            self._frozen[celery_id] = placed
        for callback in callbacks:
            yield callback, Lead((Reference(node.id),), {}, ((node.id, Condition.OK),)), {}, where
        failed = ((node.id, Condition.ERROR),)
        for errback in errbacks:
            yield self._errback(errback, node.id, failed, handle.id, node.name, where)
        return placed

    def _handle(self, node: Node, parent: Any) -> Handle:
        handle = Handle(
            node.celery_id or str(node.id), app=self.app, backend=self._backend, task_name=node.name, parent=parent
        )
        handle.number = node.id
        if node.celery_id is not None:
            self._named.append(handle)
        ignored = node.options.get("ignore_result")
        handle.ignored = bool(getattr(node.task, "ignore_result", False) if ignored is None else ignored)
        return handle

    def _meet(self, node: Node, lead: Lead, sig: Signature) -> None:
        """A task comes up again, behind something else: it waits for that, too, and gets its result behind those it has."""
        new = [(task_id, condition) for task_id, condition in lead.after if task_id not in node.after]
        node.after |= dict(new)
        if not sig.immutable:
            ids = {task_id for task_id, _ in new}
            more = tuple(arg for arg in lead.args if isinstance(arg, Reference) and arg.task_id in ids)
            own = len(node.args) - len(sig.args or ())
            node.args = node.args[:own] + more + node.args[own:]

    def _errback(
        self, errback: Any, failed: int, after: tuple[tuple[int, Condition], ...], shown: str, name: str, where: Where
    ) -> tuple[Any, Lead, Mapping[str, Any], Where]:
        """An error callback, as a part to place: it is told of the failure of `failed`, which Celery knows as `shown`."""
        sig = signature_of(errback, self.app)
        if "task_id" in sig.options:  # a callback of many tasks is a row for each of them
            sig = sig.clone()
            del sig.options["task_id"]
        parts = ("request", "exception", "traceback")
        if takes_exception(sig):
            args: tuple[Any, ...] = tuple(Failure(failed, part, shown, name) for part in parts)
        else:
            args = (shown,)
        return sig, Lead(args, {}, after), {}, dataclasses.replace(where, is_spare=True)

    def _chain(self, sig: Any, lead: Lead, options: Mapping[str, Any], where: Where) -> Walk:
        wanted = merged(sig.options, options)
        at_end = taken(wanted, "task_id", "link")
        everywhere = taken(wanted, "link_error")
        steps = steps_of(sig, self.app)
        if not sig.immutable:
            lead = dataclasses.replace(lead, args=lead.args + tuple(sig.args or ()))
        placed: Placed | None = None
        for position, step in enumerate(steps):
            of_step = {**everywhere}
            if position == 0:
                of_step |= wanted
            if position == len(steps) - 1:
                of_step |= at_end
            got = yield step, lead, of_step, where
            if got is not None:
                placed = got
                lead = Lead((Reference(got.id),), {}, ((got.id, Condition.OK),), got.result)
        return placed

    def _group(self, sig: Any, lead: Lead, options: Mapping[str, Any], where: Where) -> Walk:
        wanted = merged(sig.options, options)
        celery_id = check_id(wanted.pop("task_id", None))
        return (yield from self._barrier(members_of(sig.tasks, self.app), lead, wanted, where, celery_id))

    def _barrier(
        self,
        members: Sequence[tuple[Any, Mapping[str, Any]]],
        lead: Lead,
        options: Mapping[str, Any],
        where: Where,
        celery_id: str | None,
    ) -> Walk:
        """A group's row: it ends when its members have, and its value is the list of theirs. None without members."""
        if not members:
            return None
        if celery_id is not None and (known := self._frozen.get(celery_id)) is not None:
            return known
        node = Node(self._new_id(), "group", where, celery_id, members=[])
        self.nodes[node.id] = node
        results = []
        for seq, (member, own) in enumerate(members):
            place = dataclasses.replace(where, job_id=node.id, seq=seq)
            placed = yield member, dataclasses.replace(lead, parent=None), merged(own, options), place
            if placed is not None:
                node.members.append(placed.id)  # type: ignore[union-attr]
                results.append(placed.result)
        group_id = celery_id or str(node.id)
        handle = GroupHandle(group_id, results, parent=lead.parent, app=self.app)
        handle.number = node.id
        placed = Placed(node.id, handle)
        if celery_id is not None:
            self._frozen[celery_id] = placed
        return placed

    def _chord(self, sig: Any, lead: Lead, options: Mapping[str, Any], where: Where) -> Walk:
        wanted = merged(sig.options, options)
        body = sig.kwargs.get("body")
        if body is None:
            raise BadInput("a chord needs a body: chord(header)(body). Nothing was submitted.")
        body = signature_of(body, self.app)
        header = sig.kwargs["header"]
        own_id, own_body_id = wanted.pop("task_id", None), body.options.get("task_id")
        # A frozen chord has its header's id, and its body one of its own.
        body_id = options.get("task_id") or own_body_id or own_id
        header_id = header.options.get("task_id") if isinstance(header, group) else None
        header_id = header_id or (own_id if own_id != body_id else None)
        at_end = taken(wanted, "link", "link_error")
        at_start = taken(wanted, "countdown", "eta")
        args = lead.args if sig.immutable else lead.args + tuple(sig.args or ())
        first = dataclasses.replace(lead, args=args, kwargs={**(sig.kwargs.get("kwargs") or {}), **lead.kwargs})
        tasks = header.tasks if isinstance(header, (group, _chain)) else header
        members = members_of(tasks, self.app)
        barrier = yield from self._barrier(members, first, {**wanted, **at_start}, where, header_id)
        if barrier is None:
            after = Lead(([],), {}, lead.after, lead.parent or GroupHandle(header_id or uuid(), [], app=self.app))
        else:
            after = Lead((Reference(barrier.id),), {}, ((barrier.id, Condition.OK),), barrier.result)
        of_body = wanted | at_end | ({"task_id": body_id} if body_id else {})
        placed = yield body, after, of_body, where
        if placed is not None and barrier is not None:
            # A header that fails is a failure of its body, which then never runs. What the header itself waited for
            # must have succeeded: that it did not is told to others.
            failed = ((barrier.id, Condition.FAILED), *((i, c) for i, c in lead.after if c is Condition.OK))
            for errback in errbacks_of(body, at_end.get("link_error"), self.app):
                yield self._errback(errback, barrier.id, failed, placed.result.id, body["task"], where)
        return placed


# -- entry points -----------------------------------------------------------------------------------------------------------


def submit(
    sig: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    app: Celery,
    **options: Any,
) -> Any:
    """Submit a canvas as a graph, in one transaction; Celery's result for it, None if nothing is in it. `options` replace those
    that it has. Raises what `Task.apply_async` raises, and then nothing was submitted."""
    app = _itself(app)
    sig = signature_of(sig, app)
    builder = Builder(app)
    lead = Lead(tuple(args or ()), dict(kwargs or {}))
    chosen = {name: value for name, value in options.items() if value is not None}
    if chosen:
        own = sig._merge((), None, chosen)[2]
        # What is given replaces what the signature has, its callbacks included.
        sig = copy_of(sig, options={**own})
    placed = builder.place(sig, lead)
    if placed is None:
        return GroupHandle(str(sig.options.get("task_id") or uuid()), [], app=app) if ends_in_group(sig, app) else None
    builder.submit()
    result = placed.result
    if isinstance(sig, group) and len(result.results) == 1 and isinstance(result.results[0], GroupHandle):
        return result.results[0]  # as Celery does
    return result


def submit_call(
    app: Celery,
    name: str,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    *,
    task: CeleryTask | None = None,
    strict: bool = False,
) -> Handle:
    """Submit a call of one task, by its name, with the callbacks in its options. `task`: if this process knows it."""
    sig = Signature(name, tuple(args or ()), dict(kwargs or {}), app=app)
    sig._type = task
    if task is None:
        task_of(sig)
    builder = Builder(app)
    placed = builder.call(sig, {key: value for key, value in options.items() if value is not None})
    builder.submit(strict)
    assert placed is not None
    handle: Handle = placed.result
    return handle


# -- Celery's own way in ----------------------------------------------------------------------------------------------------


def install() -> None:
    """Let Celery's canvases with a task of ours become graphs: they are the only thing of Celery's that Aque replaces."""
    for kind in (group, _chain, _chord, _basemap):
        if not hasattr(kind.apply_async, "celerys"):
            kind.apply_async = _graph_or(kind.apply_async)


def is_graph(sig: Any, app: Celery) -> bool:
    """True if a canvas goes through the table: it has a task that does, or all of its app do."""
    if takes_all(app):
        return True
    look = [sig]
    while look:
        part = look.pop()
        if part is None:
            continue
        part = signature_of(part, app)
        kwargs = part.kwargs or {}
        if isinstance(part, (_chain, group)):
            look += list(part.tasks)
        elif isinstance(part, _chord):
            header = kwargs.get("header")
            look += [*(header.tasks if isinstance(header, (group, _chain)) else header or ()), kwargs.get("body")]
        elif is_ours(task_of(part)):
            return True
        elif isinstance(part, (_basemap, chunks)):
            look.append(kwargs["task"])
    return False


def _graph_or(celerys: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(celerys)
    def apply_async(self: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        app = _itself(self.app)
        refused = isinstance(self, group) and (options.get("link") or options.get("link_error"))
        if app.conf.task_always_eager or refused:
            return celerys(self, args, kwargs, **options)
        sig = self
        if isinstance(self, _chord) and kwargs and kwargs.get("body") is not None:
            kwargs = dict(kwargs)
            sig = copy_of(self, kwargs={**self.kwargs, "body": kwargs.pop("body")})
        if not is_graph(sig, app):
            return celerys(self, args, kwargs, **options)
        return submit(sig, args, kwargs, app=app, **options)

    apply_async.celerys = celerys  # type: ignore[attr-defined]
    return apply_async


def _itself(app: Any) -> Celery:
    """An app that may be given as Celery's `current_app`: the app of a canvas with nothing in it."""
    found: Celery = app._get_current_object() if isinstance(app, Proxy) else app
    return found
