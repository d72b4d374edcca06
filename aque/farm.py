"""The farm as an app of this process sees it: its settings and its store, opened once, and anew in a forked child."""

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from celery import Celery

from aque.machine import settings_here
from aque.settings import Settings
from aque.store import Store, StoredResult, open_store
from aque.waiter import Waiter

#: Before the URL of a store: that of Celery's result backend in it.
RESULT_SCHEME = "aque+"


@dataclass(frozen=True, slots=True)
class Farm:
    """An open farm."""

    settings: Settings
    store: Store
    waiter: Waiter[StoredResult]  #: a process has one listener for an app, however many of its threads wait


@dataclass(frozen=True, slots=True)
class _Opened:
    """A farm, and for whom it was opened: another process, and another environment, has another one."""

    farm: Farm
    pid: int
    environment: tuple[str | None, ...]
    close: Callable[[], object]


_lock = threading.Lock()
#: With each app what it has open, which ends with the app: tests make many.
_open: "weakref.WeakKeyDictionary[Celery, _Opened]" = weakref.WeakKeyDictionary()
#: Of the process that this one was forked from. They stay referenced, so that the garbage collector does not say goodbye on
#: the parent's connections.
_parents: list[Farm] = []


def settings_of(app: Celery) -> Settings:
    """The settings of an app: its configuration's `aque_...` names count too, and a result backend `aque+URL` names the store
    if nothing else does. Raises BadSetting."""
    settings = settings_here(app.conf.get)
    backend = app.conf.result_backend
    if not settings.broker and isinstance(backend, str) and backend.startswith(RESULT_SCHEME):
        url = backend.removeprefix(RESULT_SCHEME)
        if url != settings.to_url():  # the default one is made where it is missing, one that was named is not
            return settings_here(app.conf.get, broker=url)
    return settings


def farm_of(app: Celery) -> Farm:
    """The farm that this app uses. Raises BadSetting or StoreError."""
    pid, environment = os.getpid(), tuple(os.environ.get(name) for name in ("AQUE_BROKER", "AQUE_STATE_DIR"))
    with _lock:
        found = _open.get(app)
        if found is None or (found.pid, found.environment) != (pid, environment):
            settings = settings_of(app)
            store = open_store(settings)
            farm = Farm(settings, store, Waiter(store, store.ended_results))
            close = weakref.finalize(app, _close, farm, pid)
            close.atexit = False
            _open[app] = _Opened(farm, pid, environment, close)
            if found is not None:
                found.close()
            return farm
        return found.farm


def _close(farm: Farm, pid: int) -> None:
    """Close what is not in use; what another thread uses just now is closed after that."""
    if pid == os.getpid():
        farm.waiter.give_up()
        farm.store.close()
    else:
        _parents.append(farm)


def _fresh_lock() -> None:
    global _lock  # noqa: PLW0603  another thread of the parent may have held it at the fork
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_fresh_lock)
