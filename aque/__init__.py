"""Aque: graphs of commands and functions on your machines, on top of Celery.

Public names, imported when they are first used (so that `import aque` costs nothing):
    task, shell, graph, tasks, current_task     submit and ask
    App, Task, Handle, setup                    Celery apps
    events, errors, states                      modules
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aque.version import __version__

if TYPE_CHECKING:
    from aque import errors, events, states
    from aque.celery_app import App, Graph, Handle, Task, current_task, graph, setup, shell, task, tasks

_FROM_APP = ("App", "Graph", "Handle", "Task", "current_task", "graph", "setup", "shell", "task", "tasks")

__all__ = [
    "App",
    "Graph",
    "Handle",
    "Task",
    "__version__",
    "current_task",
    "errors",
    "events",
    "graph",
    "setup",
    "shell",
    "states",
    "task",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_APP:
        return getattr(import_module("aque.celery_app"), name)
    if name in ("errors", "events", "states"):
        return import_module(f"aque.{name}")
    raise AttributeError(f"module 'aque' has no attribute {name!r}")
