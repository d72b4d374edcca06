"""The threads of the pool of processes: they do their work as Celery's and billiard's do, and end when they are told to."""

import threading
from types import SimpleNamespace

from billiard.common import restart_state

from aque.pool import _Supervisor, _Timer
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
