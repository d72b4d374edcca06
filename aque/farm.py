"""The farm as this process sees it: its settings and its store, opened once, and anew in a forked child."""

import os
import threading
from dataclasses import dataclass

from celery import Celery

from aque.machine import settings_here
from aque.settings import Settings
from aque.store import Store, open_store


@dataclass(frozen=True, slots=True)
class Farm:
    """An open farm."""

    settings: Settings
    store: Store


_lock = threading.Lock()
_open: dict[tuple[int, int, str | None, str | None], Farm] = {}


def settings_of(app: Celery) -> Settings:
    """The settings of an app: its configuration's `aque_...` names count too. Raises BadSetting."""
    return settings_here(app.conf.get)


def farm_of(app: Celery) -> Farm:
    """The farm that this app uses. Raises BadSetting or StoreError."""
    # By pid: a child must not use its parent's connections. The parent's farm stays referenced, so that the child's garbage
    # collector does not say goodbye on them either.
    key = (os.getpid(), id(app), os.environ.get("AQUE_BROKER"), os.environ.get("AQUE_STATE_DIR"))
    with _lock:
        if key not in _open:
            settings = settings_of(app)
            _open[key] = Farm(settings, open_store(settings))
        return _open[key]


def _fresh_lock() -> None:
    global _lock  # noqa: PLW0603  another thread of the parent may have held it at the fork
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_fresh_lock)
