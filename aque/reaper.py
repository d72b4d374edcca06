"""The heartbeat: renew this worker's lease, and free the tasks of workers that are gone. A thread and connection of its own,
so that nothing the scheduler does can make a healthy worker look dead."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from aque import doorbell, machine
from aque.errors import StoreError
from aque.processes import lease_clock
from aque.store import DatabaseError, Store, WorkerRow

logger = logging.getLogger(__name__)


def may_reap(row: WorkerRow, own_id: int, is_here: bool, is_alive: bool) -> bool:
    """True if this worker's tasks may be freed: its process on this host is gone, or its lease has ended elsewhere.

    A process that lives on this host keeps its tasks however late it is: a stopped process, a closed lid.
    """
    if row.info.id == own_id or row.state != "live":
        return False
    return not is_alive if is_here else row.expired_seconds > 0


def is_of_earlier_boot(row: WorkerRow, host: str, host_id: str, up_seconds: float) -> bool:
    """True if this worker ran on this machine (`host`, `host_id`) before it was booted, `up_seconds` ago: it is gone.

    The machine is known by its name and by its machine id; copies of one disk image may share both. But a copy that lives
    renews its lease, and what this boot ended has not renewed it since.
    """
    boot, _, machine_id = machine.parts(host_id)
    row_boot, _, row_machine_id = machine.parts(row.info.boot_id)
    same = row.info.host == host and row_machine_id == machine_id != ""
    return same and row_boot != boot and row.unseen_seconds > up_seconds


class Heartbeat:
    """Beats three times per lease. `on_lost` is called when this worker has been declared lost itself; `on_renewed` with the
    connection and the moment of `lease_clock` until which the lease surely holds; `on_beat` every time, whether or not there
    is a store."""

    def __init__(
        self,
        store: Store,
        worker_id: int,
        lease_seconds: float,
        max_lost: int,
        on_lost: Callable[[], int],
        on_renewed: Callable[[Any, float], None],
        on_beat: Callable[[], None],
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._period = lease_seconds / 3
        self._lease_seconds = lease_seconds
        self._max_lost = max_lost
        self._on_lost = on_lost
        self._on_renewed = on_renewed
        self._on_beat = on_beat
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._host = machine.host_id()
        self._host_name = socket.gethostname()
        self._patience_until = 0.0
        self._thread = threading.Thread(target=self._run, name="aque-heartbeat", daemon=True)

    def start(self) -> None:
        """Beat from now on."""
        self._thread.start()

    def stop(self) -> None:
        """The last beat has been."""
        self._stop.set()
        self._wake.set()
        self._thread.join(5)

    def soon(self) -> None:
        """Beat now: there is something to tell."""
        self._wake.set()

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            try:
                if time.monotonic() - last > 2 * self._period:
                    self._be_patient()  # this process stood still: perhaps the whole machine did
                self._beat()
                last = time.monotonic()
            except Exception as error:
                if not isinstance(error, (StoreError, DatabaseError)):
                    logger.exception("the heartbeat failed")
                self._be_patient()
            try:
                self._on_beat()
            except Exception:
                logger.exception("looking after this worker's processes failed")
            self._wake.wait(self._period)
            self._wake.clear()
            if self._stop.is_set():
                return

    def _be_patient(self) -> None:
        """After an outage every lease has ended: let everybody renew before anybody is declared lost."""
        self._patience_until = time.monotonic() + self._lease_seconds

    def _beat(self) -> None:
        with self._store.connect() as connection:
            before = lease_clock()  # the lease in the table begins later
            if self._store.renew(connection, self._worker_id, self._lease_seconds):
                self._on_renewed(connection, before + self._lease_seconds)
            else:
                self._worker_id = self._on_lost()
            rows = self._store.live_workers(connection)
            for row in rows:
                here = row.info.boot_id == self._host or self._is_of_earlier_boot(row)
                alive = row.info.boot_id == self._host and machine.is_alive(row.info.pid, row.info.pid_started)
                if (here or time.monotonic() > self._patience_until) and may_reap(row, self._worker_id, here, alive):
                    self._reap(row)

    def _is_of_earlier_boot(self, row: WorkerRow) -> bool:
        """On SQLite, which is one machine, by the boot alone: its leases are on the clock of an earlier boot, and say
        nothing now."""
        if self._store.dialect == "sqlite":
            return machine.parts(row.info.boot_id)[0] != machine.parts(self._host)[0]
        return is_of_earlier_boot(row, self._host_name, self._host, lease_clock())

    def _reap(self, row: WorkerRow) -> None:
        with self._store.begin() as connection:
            released = self._store.reap(connection, row, self._max_lost)
        if released is not None:
            logger.warning(
                "worker %s (pid %s on %s) is gone: its tasks are free", row.info.name, row.info.pid, row.info.host
            )
            with self._store.connect() as connection:
                killed = {doorbell.KILL} if released.signalled else set()
                doorbell.ring(connection, {doorbell.READY, doorbell.DONE} | killed)
