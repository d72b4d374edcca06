"""Which task the running code is part of: the variables AQUE_TASK_ID, AQUE_ATTEMPT and so on, wherever they are kept.

A command, and a function in a process of its own, has them in the environment. Functions in threads of one process share
that, so each has them in its context.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_of_thread: ContextVar[Mapping[str, str] | None] = ContextVar("aque_variables", default=None)


def variables() -> Mapping[str, str]:
    """Those of the task that calls this; outside of one there is no AQUE_TASK_ID among them."""
    found = _of_thread.get()
    return os.environ if found is None else found


@contextmanager
def in_thread(own: Mapping[str, str]) -> Iterator[None]:
    """What this thread does here is part of the task that has these variables."""
    token = _of_thread.set(own)
    try:
        yield
    finally:
        _of_thread.reset(token)
