"""What Celery's signatures say: their steps, members, options and callbacks, as Celery would read them."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from celery import Celery
from celery import Task as CeleryTask
from celery.canvas import Signature, _chain, _chord, chunks, group
from celery.utils.functional import arity_greater, maybe_list

from aque.errors import BadInput


def signature_of(sig: Any, app: Celery) -> Any:
    """A signature, also of one that is a plain dictionary."""
    if isinstance(sig, Signature):
        return sig
    if isinstance(sig, Mapping) and "task" in sig:
        return Signature.from_dict(sig, app=app)
    raise BadInput(f"a canvas is made of signatures, not of {sig!r:.60}. Nothing was submitted.")


def copy_of(sig: Any, **fields: Any) -> Any:
    """The same signature but for these fields; unlike Celery's clone it copies nothing that is inside."""
    kind: Any = type(sig)
    copy = kind.__new__(kind)
    dict.update(copy, sig, **fields)
    copy.__dict__.update(sig.__dict__)
    return copy


def task_of(sig: Signature) -> CeleryTask | None:
    """The task of a signature; None if this process does not know it."""
    try:
        return sig.type
    except KeyError:
        return None


def taken(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of these options that there are, out of the others."""
    return {name: options.pop(name) for name in names if name in options}


def merged(own: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a part and what is said of it from outside, which wins; callbacks are called by both. None says nothing."""
    both = {**own, **{name: value for name, value in more.items() if value is not None}}
    for name in ("link", "link_error"):
        if name in own and name in more:
            both[name] = [*(maybe_list(own[name]) or ()), *(maybe_list(more[name]) or ())]
    return both


def steps_of(chain: Any, app: Celery) -> list[Any]:
    """The steps of a chain. A group of one is a step like another, and one of none is no step unless it is all there is."""
    steps: list[Any] = []
    empty: list[Any] = []
    for step in chain.tasks or ():
        sig = signature_of(step, app)
        if isinstance(sig, group):
            tasks = list(sig.tasks)
            if not tasks:
                empty = [sig]
                continue
            if len(tasks) == 1:
                sig = signature_of(tasks[0], app)
        if isinstance(sig, _chain) and not sig.tasks:
            continue
        steps.append(sig)
    return steps or empty


def members_of(tasks: Iterable[Any], app: Celery) -> list[tuple[Any, Mapping[str, Any]]]:
    """The members of a group, each with the options of the groups inside that it was in: those are opened up."""
    found: list[tuple[Any, Mapping[str, Any]]] = []
    nothing: Mapping[str, Any] = {}
    look = [(task, nothing) for task in tasks][::-1]
    while look:
        task, options = look.pop()
        sig = signature_of(task, app)
        if isinstance(sig, group):
            inner = {name: value for name, value in merged(sig.options, options).items() if name != "task_id"}
            look += [(member, inner) for member in sig.tasks][::-1]
        elif not (isinstance(sig, _chain) and not sig.tasks):
            found.append((sig, options))
    return found


def errbacks_of(body: Any, more: Any, app: Celery) -> list[Any]:
    """What is to be called if a chord's header fails: the error callbacks of its body, each once."""
    found: list[Any] = list(maybe_list(more) or ())
    look = [body]
    while look:
        sig = signature_of(look.pop(), app)
        found += maybe_list(sig.options.get("link_error")) or ()
        if isinstance(sig, _chain):
            look += sig.tasks[:1]
        elif isinstance(sig, group):
            look += list(sig.tasks)[::-1]
        elif isinstance(sig, _chord):
            look.append(sig.kwargs["body"])
    each: list[Any] = []
    for errback in found:
        if errback not in each:
            each.append(errback)
    return each


def takes_exception(errback: Any) -> bool:
    """True if Celery would call it with (request, exception, traceback), and not with the id of the task that failed."""
    task = task_of(errback)
    header = getattr(task, "__header__", None)
    is_canvas = isinstance(errback, (_chain, _chord, group, chunks))
    if header is None or isinstance(header, partial) or is_canvas:
        return False
    if not errback.immutable and (errback.args or errback.kwargs):
        try:
            return bool(arity_greater(partial(header, *errback.args, **errback.kwargs), 1))
        except (TypeError, ValueError):
            pass
    return bool(arity_greater(header, 1))


def ends_in_group(sig: Any, app: Celery) -> bool:
    """True if what follows this signature would get a list."""
    while True:
        sig = signature_of(sig, app)
        if isinstance(sig, (group, chunks)):
            return True
        if isinstance(sig, _chain):
            steps = steps_of(sig, app)
            if not steps:
                return False
            sig = steps[-1]
        elif isinstance(sig, _chord):
            sig = sig.kwargs["body"]
        else:
            return False
