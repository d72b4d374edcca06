"""A call of a Celery task as a row: its function by name, its arguments, and Celery's options as Aque's."""

from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery
from celery import Task as CeleryTask

from aque import codec
from aque.announcements import Announcement, is_wanted
from aque.celery_options import options_of
from aque.errors import BadInput, NotSubmittable
from aque.naming import name_of
from aque.options import Options
from aque.submitter import Submitter
from aque.task_options import DEPENDENCY_OPTIONS, edges_of
from aque.values import Children, Condition, Dependency, TaskSpec


def goes_through_table(app: Celery, task: Any) -> bool:
    """Whether a call of this Celery task, or of the task that has this name, becomes a row and not a message. Nothing does
    while `task_always_eager`, which is for calls that never leave their process."""
    if app.conf.task_always_eager:
        return False
    return takes_all(app) or is_ours(app._tasks.get(task) if isinstance(task, str) else task)


def is_ours(task: Any) -> bool:
    """True for a task that goes through the table: an `aque.Task`, or any task of an app of which all do."""
    return bool(getattr(task, "goes_through_table", False)) or takes_all(getattr(task, "app", None))


def takes_all(app: Any) -> bool:
    """True if all tasks of this app go through the table, also those that it knows by name only: `aque.setup` was told so."""
    return getattr(app, "aque_tasks", None) == "all"


def spec_of_call(
    app: Celery,
    submitter: Submitter,
    task_id: int,
    name: str,
    task: CeleryTask | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    after: Mapping[int, Condition] | None = None,
    celery_id: str | None = None,
    place: Mapping[str, Any] | None = None,
    announced: list[Announcement] | None = None,
    errbacks: Sequence[Mapping[str, Any]] = (),
) -> TaskSpec:
    """A call of the task with this name, None: not known in this process, as a row. `after`: edges; `place`: fields of
    `options.Options` that say where in a job it is. `announced` gets what is to be told once the row is written;
    `errbacks` is what `self.replace` has to know of.

    Raises NotSubmittable for what no worker could load, BadInput for an option that cannot work, TypeError for arguments that
    do not fit.
    """
    after = after or {}
    if task is not None and getattr(task, "typing", False) and hasattr(task, "__header__"):
        task.__header__(*args, **kwargs)  # the signature, checked as Celery does
    waits_for = {option: options[option] for option in DEPENDENCY_OPTIONS if option in options}
    given = options_of(app, name, options, task, args, kwargs)
    if given["queue"] is None:
        raise BadInput(
            f"{name} goes to every worker, which a task of a graph cannot. Nothing was submitted: send it alone."
        )
    if errbacks:
        given["extra"] = {**given.get("extra", {}), "errbacks": codec.plain("an error callback", list(errbacks))}
    if callable(given.get("io_paths")):
        given["io_paths"] = given["io_paths"](*args, **kwargs)
    if not getattr(task, "goes_through_table", False):
        # As Celery's: a task ends when its function does, whatever it has called.
        given.setdefault("children", Children.DETACH)
    if announced is not None and is_wanted(app):
        announcement = Announcement(app, celery_id or str(task_id), name, args, kwargs, given)
        if headers := announcement.before():
            given["extra"] = {**given.get("extra", {}), "headers": codec.plain("the headers", headers)}
        args, kwargs = announcement.arguments
        announced.append(announcement)
    dump_models = getattr(task, "_dump_pydantic_arguments", None)
    if dump_models is not None:
        args, kwargs = dump_models(args, kwargs)
    arguments, inputs = codec.encode_arguments(args, kwargs)
    edges = [*edges_of(waits_for), *(Dependency(i, condition) for i, condition in after.items())]
    edges += [Dependency(i) for i in inputs if i not in after and Dependency(i) not in edges]
    shown = given.pop("name", None) or name
    wanted = Options(**given, dependencies=tuple(edges), celery_id=celery_id, **(place or {}))
    return submitter.function(task_id, function_of(task, name), shown, arguments, inputs, wanted)


def check_id(celery_id: Any) -> str | None:
    """An id that a caller brings. Raises BadInput."""
    if celery_id is not None and str(celery_id).isdecimal():
        raise BadInput("a task_id of digits only would be taken for an id of the table: bring another, or none.")
    return None if celery_id is None else str(celery_id)


# -- functions by name ------------------------------------------------------------------------------------------------------


def function_of(task: CeleryTask | None, name: str) -> str:
    """How a worker finds the task: "module:qualname", or for what is not found by that "@name", the name under which the
    worker's app must have it. Raises NotSubmittable for an Aque task that no worker could find."""
    if task is None or name.startswith("celery."):
        return f"@{name}"
    known = vars(task).get("aque_function")
    if known is None:
        try:
            known = name_of(task)
            if not getattr(task, "goes_through_table", False) and known.replace(":", ".") != name:
                known = f"@{name}"  # who gives a task a name may have another function by it on the workers
        except NotSubmittable:
            if getattr(task, "goes_through_table", False):
                raise
            known = f"@{name}"
        vars(task)["aque_function"] = known
    return str(known)
