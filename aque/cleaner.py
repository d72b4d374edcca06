"""The cleaner: removes what is old from the store, once a minute, a little at a time. A thread and connections of its own,
since neither tasks nor the heartbeat may wait for it."""

import logging
import random
import threading
import time

from aque.errors import StoreError
from aque.store import Ages, DatabaseError, Store

logger = logging.getLogger(__name__)

#: Between two walks.
PERIOD_SECONDS = 60.0
#: What tasks share is looked through so seldom: it means to read all tasks.
SHARED_SECONDS = 86400.0
#: After a batch, a pause of so many times what it took: the others have the store to themselves for most of the time.
REST = 4


class Cleaner:
    """Of all live workers of a farm the one with the lowest id cleans. If two of them believe to be it, they take turns at
    the rows: nothing more is lost than time."""

    def __init__(self, store: Store, worker_id: int, ages: Ages) -> None:
        self.worker_id = worker_id  #: changes if the worker has been declared lost
        self._store = store
        self._ages = ages
        self._stop = threading.Event()
        self._shared_at = time.monotonic() - SHARED_SECONDS * random.random()
        self._thread = threading.Thread(target=self._run, name="aque-cleaner", daemon=True)

    def start(self) -> None:
        """Clean from now on, the first time within a minute."""
        self._thread.start()

    def stop(self) -> None:
        """The batch at hand is the last."""
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS * random.uniform(0.5, 1.0)):
            try:
                if self._is_mine():
                    self._clean()
            except (StoreError, DatabaseError) as error:
                logger.debug("cleaning was put off: %s", error)
            except Exception:
                logger.exception("cleaning failed")

    def _is_mine(self) -> bool:
        with self._store.connect() as connection:
            live = [row.info.id for row in self._store.live_workers(connection) if row.is_live]
        return bool(live) and min(live) == self.worker_id

    def _clean(self) -> None:
        removed = self._store.retention.clean(self._ages, self._rest)
        if removed:
            logger.info(
                "removed %s old tasks, the output of %s others and the results of %s",
                removed.tasks, removed.outputs, removed.values,
            )  # fmt: skip
        if time.monotonic() - self._shared_at > SHARED_SECONDS and not self._stop.is_set():
            self._store.retention.clean_shared(self._ages)
            self._shared_at = time.monotonic()

    def _rest(self, seconds: float) -> bool:
        return not self._stop.wait(REST * seconds)
