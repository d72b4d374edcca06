"""The threads of the pool of processes: they do their work as Celery's and billiard's do, and end when they are told to."""

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import billiard
import pytest
from billiard.common import restart_state
from billiard.exceptions import WorkerLostError

from aque.pool import _Child, _Pool, _Supervisor, _Timer
from tests.servers import wait_until


def test_a_timer_runs_what_is_due_and_waits_for_what_is_not() -> None:
    timer = _Timer(max_interval=0.01)
    early, late = threading.Event(), threading.Event()
    timer.call_after(1000, late.set)
    timer.call_after(0.05, early.set)
    assert early.wait(60)
    assert not late.is_set()
    timer.stop()


def test_a_timer_ends_when_it_is_told_to_however_long_it_has_to_wait() -> None:
    for entries in (0, 1):
        timer = _Timer(max_interval=1000)
        timer.ensure_started()
        for _ in range(entries):
            timer.call_after(1000, print)
        timer.stop()
        assert not timer.is_alive()


class Pool(SimpleNamespace):
    """As much of a pool as its supervisor looks at."""

    def __init__(self) -> None:
        self.restart_state = self.usual = restart_state(1, 1)
        self.states: list[object] = []
        super().__init__(_processes=1)

    def _maintain_pool(self) -> None:
        self.states.append(self.restart_state)


def test_the_supervisor_is_lenient_with_the_first_children_and_usual_with_later_ones() -> None:
    pool = Pool()
    supervisor = _Supervisor(pool)
    supervisor.start()
    wait_until(lambda: len(pool.states) > 10, what="it has looked eleven times")
    supervisor.close()
    supervisor.stop()
    assert [state is pool.usual for state in pool.states[:11]] == [False] * 10 + [True]


def test_a_supervisor_that_is_told_to_end_looks_no_more() -> None:
    pool = Pool()
    supervisor = _Supervisor(pool)
    supervisor.start()
    supervisor.terminate()
    supervisor.stop()
    assert pool.states == []


class Forgetful(_Child):
    """A child that dies of the first task of all as soon as it has taken it, before it says so."""

    def _make_protected_receive(self, conn: Any) -> Any:
        receive = super()._make_protected_receive(conn)

        def receive_and_die() -> Any:
            task = receive()
            if task and not DIED.is_set():
                DIED.set()
                os.kill(os.getpid(), signal.SIGKILL)
            return task

        return receive_and_die


class ForgetfulPool(_Pool):
    Worker = Forgetful


DIED = billiard.Event()


def test_a_task_that_a_child_has_taken_along_is_lost_and_others_are_not() -> None:
    DIED.clear()
    pool = ForgetfulPool(2, threads=True)
    try:
        lost, done = pool.apply_async(abs, (-1,)), pool.apply_async(abs, (-2,))
        assert done.get(60) == 2
        with pytest.raises(Exception, match="exited prematurely") as raised:
            lost.get(60)
        assert isinstance(raised.value.exc, WorkerLostError)
        assert pool.apply_async(abs, (-3,)).get(60) == 3
    finally:
        pool.terminate()
        pool.join()
