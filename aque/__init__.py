"""Aque: graphs of commands and functions on your machines, on top of Celery.

Public names, imported when they are first used (so that `import aque` costs nothing):
    task, shell, graph, tasks, current_task     submit and ask
    barrier, pattern, reduce                    other forms of work
    execute                                     in this process, without a farm
    Executor                                    functions by name, as concurrent.futures has it
    App, Task, Handle, setup                    Celery apps
    errors, events, patterns, states            modules
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aque.version import __version__

if TYPE_CHECKING:
    from aque import errors, events, patterns, states
    from aque.celery_app import App, Graph, Handle, Task, current_task, graph, setup, shell, task, tasks
    from aque.executor import Executor
    from aque.forms import barrier, pattern, reduce
    from aque.local_run import execute

_FROM_APP = ("App", "Graph", "Handle", "Task", "current_task", "graph", "setup", "shell", "task", "tasks")
_ELSEWHERE = {"Executor": "aque.executor", "execute": "aque.local_run"}
_FROM_FORMS = ("barrier", "pattern", "reduce")

__all__ = [
    "App",
    "Executor",
    "Graph",
    "Handle",
    "Task",
    "__version__",
    "barrier",
    "current_task",
    "errors",
    "events",
    "execute",
    "graph",
    "pattern",
    "patterns",
    "reduce",
    "setup",
    "shell",
    "states",
    "task",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_APP:
        return getattr(import_module("aque.celery_app"), name)
    if name in _ELSEWHERE:
        return getattr(import_module(_ELSEWHERE[name]), name)
    if name in _FROM_FORMS:
        return getattr(import_module("aque.forms"), name)
    if name in ("errors", "events", "patterns", "states"):
        return import_module(f"aque.{name}")
    raise AttributeError(f"module 'aque' has no attribute {name!r}")
