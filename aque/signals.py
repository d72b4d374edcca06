"""The signals of a worker: HUP restarts it, TERM ends it, TERM again or QUIT ends it at once.

Celery's own handlers stay and do Celery's part. Its handler of HUP is replaced: it closes every descriptor and execs while
threads run, and there is none at all on a terminal.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from celery.platforms import EX_OK
from celery.worker import state as celery_state

logger = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], Any]


class WorkerSignals:
    """What the signals have asked of this worker.

    `on_stop` is called when it should stop, `on_restart` when it should restart, and before that `why_not`: a sentence if the
    new image could not start, and then there is no restart.
    """

    def __init__(
        self, on_stop: Callable[[], None], on_restart: Callable[[], None], why_not: Callable[[], str | None]
    ) -> None:
        #: What runs should be killed and given back now.
        self.is_urgent = False
        self._on_stop = on_stop
        self._on_restart = on_restart
        self._why_not = why_not
        self._asked = self._stopping = self._leaving = False
        self._wake_fd = -1
        self._pid = os.getpid()
        self._had_terminal = os.isatty(0)
        self._celery: dict[int, Handler] = {}

    @property
    def restart_wanted(self) -> bool:
        """It should be replaced by a new image of itself, once what cannot go on across that has ended."""
        return self._asked and not self._stopping

    def install(self) -> None:
        """Call it in the main thread, after Celery has installed its handlers."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            handler = signal.getsignal(number)
            if callable(handler):
                self._celery[number] = handler
                signal.signal(number, self._end)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        # A handler may interrupt anything, also what holds the locks of logging or of threading: it wakes this thread, which
        # does what takes longer.
        threading.Thread(target=self._restart_when_asked, name="aque-restart", daemon=True).start()
        signal.signal(signal.SIGHUP, self._hang_up)

    def leave(self) -> bool:
        """From now on a signal to stop is for the new image; false if there has been one. Hold the signals first."""
        self._leaving = self.restart_wanted
        return self._leaving

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a child of the pool, a moment after the fork
        if self._had_terminal and not os.isatty(0):
            self._end(signal.SIGTERM, frame)  # the terminal is gone, and with it whoever started this
        else:
            os.eventfd_write(self._wake_fd, 1)

    def _restart_when_asked(self) -> None:
        while not self._asked:
            os.eventfd_read(self._wake_fd)
            try:
                if not self._stopping:
                    self._restart()
            except Exception:
                logger.exception("the restart failed, this worker goes on as it is")

    def _restart(self) -> None:
        if problem := self._why_not():
            logger.error("this worker does not restart, and goes on as it is: %s", problem)
            return
        logger.warning("restarting: commands go on, Python tasks end first")
        self._asked = True
        celery_state.should_stop = EX_OK
        self._on_restart()

    def _end(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._celery[number](number, frame)
            return
        if self._leaving:
            # Another thread let it through. This one holds it back, so that the new image gets it.
            signal.pthread_kill(threading.get_ident(), number)
            return
        again, self._stopping = self._stopping, True
        if number == signal.SIGTERM and again:
            number = signal.SIGQUIT  # Celery ignores it
        self.is_urgent = self.is_urgent or number == signal.SIGQUIT
        self._on_stop()
        self._celery[number](number, frame)
