"""`aque.submit`: an ordinary Celery message becomes a task of the table, for producers that have only the broker.

    app.send_task("aque.submit", kwargs={"command": ["gzip", "file"], "cpus": 0.5})
    app.send_task("aque.submit", kwargs={"task": "project.tasks.render", "args": [7], "priority": 3})

A worker takes the message where it receives messages, not in its pool: a row costs milliseconds, and must not wait until a CPU
is free. The answer, as Celery's result, is the task's id. A message that is delivered twice makes one task.
"""

import logging
import os
import pwd
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

from celery import Celery
from celery import Task as CeleryTask
from celery.backends.rpc import RPCBackend
from celery.worker.request import Request
from celery.worker.strategy import proto1_to_proto2

from aque import codec
from aque.backend import Backend
from aque.errors import AqueError, BadInput, StoreError
from aque.naming import name_of
from aque.options import Options
from aque.settings import Settings
from aque.store import DatabaseError, is_data_error
from aque.submitter import Submitter
from aque.task_options import DEPENDENCY_OPTIONS, edges_of, known_options
from aque.values import TaskSpec

if TYPE_CHECKING:
    from aque.worker import AqueWorker

logger = logging.getLogger(__name__)

NAME = "aque.submit"
#: Of the ids that tasks get from the ids of their messages.
_IDS = UUID("6f1d9a55-6a35-4c3b-9f0e-0f0a6f6c4c11")
#: While the store is away, a message is kept and tried again after so long.
RETRY_SECONDS = 2.0
#: What a message may say besides the options of any task.
_OF_COMMANDS = ("stdin", "stdout", "stderr", "login", "cwd", "env")
_OF_FUNCTIONS = ("args", "kwargs")


def register(app: Celery) -> None:
    """Let workers of this app take `aque.submit`."""
    app.task(name=NAME, base=_Submission, shared=False)(_submit)


class _Submission(CeleryTask):
    abstract = True
    Strategy = "aque.ingress:strategy"


def _submit(*args: Any, **kwargs: Any) -> None:
    raise BadInput(
        f"{NAME} is for messages: app.send_task({NAME!r}, ...). Nothing was submitted: a process that reaches the store calls "
        "aque.shell, or a task's delay."
    )


def strategy(task: Any, app: Celery, consumer: Any, **_: Any) -> Callable[..., None]:
    """Celery's strategy for the message: it is handled in the thread that has received it."""
    eventer = consumer.event_dispatcher

    def take(request: Request) -> None:
        aque: AqueWorker = consumer.controller.aque
        try:
            number = submit(aque, request)
        except (StoreError, DatabaseError) as error:
            if is_data_error(error):
                return _refuse(request, error)
            logger.warning("%s[%s] is tried again later, the store failed: %s", NAME, request.id, _first_line(error))
            consumer.timer.call_after(RETRY_SECONDS, consumer.call_soon, (take, request))
            return None
        except Exception as error:
            return _refuse(request, error)
        _answer(request, lambda backend, options: backend.mark_as_done(request.id, number, **options))
        request.acknowledge()
        request.send_event("task-succeeded", result=str(number), runtime=0.0)
        return None

    def handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
        if body is None:
            said = {"body": message.body, "headers": message.headers, "decoded": False, "utc": app.uses_utc_timezone()}
        else:
            said = dict(zip(("body", "headers", "decoded", "utc"), proto1_to_proto2(message, body), strict=True))
        request = Request(
            message,
            on_ack=ack,
            on_reject=reject,
            app=app,
            hostname=consumer.hostname,
            eventer=eventer,
            task=task,
            connection_errors=consumer.connection_errors,
            **said,
        )
        if request.revoked():  # or expired: that has acknowledged it
            return
        shows = consumer.controller.aque.settings.event_arguments
        request.send_event(
            "task-received",
            name=request.name,
            args=request.argsrepr if shows else "[hidden]",
            kwargs=request.kwargsrepr if shows else "[hidden]",
            root_id=request.root_id,
            parent_id=request.parent_id,
            retries=0,
            eta=request.eta and request.eta.isoformat(),
            expires=request.expires and request.expires.isoformat(),
        )
        take(request)

    return handle


def _refuse(request: Request, error: Exception) -> None:
    logger.error("%s[%s] is refused: %s", NAME, request.id, _first_line(error))
    # One that a producer's Celery can make again from its text.
    error = BadInput(str(error)) if isinstance(error, AqueError) else error
    _answer(request, lambda backend, options: backend.mark_as_failure(request.id, error, **options))
    request.acknowledge()
    request.send_event("task-failed", exception=f"{type(error).__name__} {error}", traceback="")


def _answer(request: Request, write: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Write the result where the producer looks for it. An app whose results are in the table has no other place for this
    one: it answers by message."""
    if request.ignore_result:
        return
    backend = request._app.backend
    try:
        write(RPCBackend(app=request._app) if isinstance(backend, Backend) else backend, {"request": request._context})
    except (
        Exception
    ) as error:  # the task is in the table: its producer can send the message again, and gets the same id
        logger.warning("the answer to %s[%s] was not written: %s", NAME, request.id, _first_line(error))


def submit(aque: "AqueWorker", request: Any) -> int:
    """The id of the task that the message asks for: a new one, or the one that it made when it came before.

    Raises BadInput for what it asks for, and for a worker that cannot say whose the task would be.
    """
    celery_id = str(uuid5(_IDS, request.id))
    if (before := _existing(aque, celery_id)) is not None:
        return before
    user = user_for(aque.settings, aque.user, aque.switches_user)
    asked = _asked(request)
    _check_priority(aque.settings, user, asked.get("priority", 0))
    submitter = Submitter(aque.store, aque.settings)
    strict = bool(asked.pop("strict", False))
    spec = _spec(submitter, request, asked, user, celery_id)
    if strict:
        submitter.check_possible([spec])
    try:
        submitter.submit([spec])
    except DatabaseError:
        if (before := _existing(aque, celery_id)) is not None:  # by another worker, since we looked
            return before
        raise
    return _existing(aque, celery_id) or spec.id


def user_for(settings: Settings, worker_user: str, switches_user: bool) -> str:
    """As whom tasks run that came through the broker; empty: as the worker itself.

    `worker_user` is empty for a worker of a personal store. A message says nothing of who sent it: root's worker could run it
    as anybody, and refuses (BadInput) unless it was told as whom.
    """
    if not worker_user:
        return ""
    if settings.ingress_user:
        return settings.ingress_user
    if switches_user:
        raise BadInput(
            f"{NAME} is refused by this worker, which is root's: a message does not say whose it is. Nothing was submitted: "
            "set AQUE_INGRESS_USER, for the worker, to the user as whom such tasks are to run."
        )
    return ""


def _existing(aque: "AqueWorker", celery_id: str) -> int | None:
    with aque.store.connect() as connection:
        return aque.store.ids_of(connection, [celery_id]).get(celery_id)


def _asked(request: Any) -> dict[str, Any]:
    """What the message asks for; its own eta and expiry are the task's."""
    args, kwargs = request._args, request._kwargs
    if not isinstance(kwargs, Mapping) or len(args or ()) > 1:
        raise BadInput(
            f"{NAME} takes a command, or keyword arguments: command=[...] or task='name'. Nothing was submitted."
        )
    asked = dict(zip(("command",), args or (), strict=False)) | dict(kwargs)
    for name, given in (("eta", request.eta), ("expires", request.expires)):
        if given is not None:
            asked.setdefault(name, given)
    for name in ("eta", "expires"):
        if isinstance(asked.get(name), str):
            try:
                asked[name] = datetime.fromisoformat(asked[name])
            except ValueError:
                raise BadInput(f"{name} must be a time as in ISO 8601, not {asked[name]!r:.60}.") from None
    return asked


def _check_priority(settings: Settings, user: str, priority: Any) -> None:
    """The worker that submits may do more than the user for whom it does."""
    is_high = isinstance(priority, int) and priority > settings.max_user_priority
    if user and is_high and not settings.is_administrator(user):
        raise BadInput(
            f"a priority above {settings.max_user_priority} needs an administrator, and {user} is none. Nothing was submitted."
        )


def _spec(submitter: Submitter, request: Any, asked: dict[str, Any], user: str, celery_id: str) -> TaskSpec:
    command, called = asked.pop("command", None), asked.pop("task", None)
    if (command is None) == (called is None):
        raise BadInput(f"{NAME} takes either a command or the name of a task. Nothing was submitted.")
    if "user" in asked:
        raise BadInput(f"{NAME} takes no user: a message cannot say whose it is. Nothing was submitted.")
    own = {name: asked.pop(name) for name in (_OF_FUNCTIONS if command is None else _OF_COMMANDS) if name in asked}
    edges = edges_of({name: asked.pop(name) for name in DEPENDENCY_OPTIONS if name in asked})
    options = {**known_options(asked), "celery_id": celery_id, "dependencies": tuple(edges), "user": user}
    cwd, env = _surroundings(user)
    new = submitter.next_id()
    if command is None:
        arguments, inputs = codec.encode_arguments(own.get("args") or (), own.get("kwargs") or {})
        name = str(called)
        chosen = Options(**options)
        spec = submitter.function(new, _function(request._app, name), name, arguments, inputs, chosen, env=env)
        spec = spec if cwd is None else replace(spec, cwd=cwd)
    else:
        if not isinstance(command, (list, tuple)) or not all(isinstance(word, str) for word in command):
            raise BadInput("a command is a list of words, as in command=['gzip', 'file']. Nothing was submitted.")
        if isinstance(given := own.get("env"), Mapping):
            env = {os.fsencode(str(name)): os.fsencode(str(value)) for name, value in given.items()}
        stdin = own.get("stdin")
        spec = submitter.command(
            new,
            command,
            Options(**options),
            stdin=None if stdin is None else str(stdin).encode(),
            redirections=submitter.redirections(None, own.get("stdout"), own.get("stderr")),
            login=bool(own.get("login")),
            cwd=own.get("cwd", cwd),
            env=env,
        )
    return replace(spec, submitter=user) if user else spec


def _surroundings(user: str) -> tuple[bytes | None, dict[bytes, bytes] | None]:
    """Directory and environment of who says nothing of them: the worker's own are for its own user alone."""
    if not user:
        return None, None
    try:
        home = pwd.getpwnam(user).pw_dir
    except KeyError:  # whichever host runs it will know
        home = "/"
    return os.fsencode(home), {
        b"PATH": b"/usr/local/bin:/usr/bin:/bin",
        b"HOME": os.fsencode(home),
        b"USER": user.encode(),
    }


def _function(app: Celery, name: str) -> str:
    """ "module:qualname" of a task's name, or of a function's as in module.function."""
    if name in app.tasks:
        return name_of(app.tasks[name])
    if ":" in name:
        return name
    module, dot, function = name.rpartition(".")
    if not dot:
        raise BadInput(f"there is no task {name!r:.60}, and no module to import it from. Nothing was submitted.")
    return f"{module}:{function}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
