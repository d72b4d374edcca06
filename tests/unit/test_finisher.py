"""Whether another host may start what this one could not."""

from dataclasses import replace
from fractions import Fraction

from aque.chooser import Place
from aque.finisher import may_start_elsewhere
from aque.resources import Capacity
from aque.values import Pattern, Requirement

TASK = Requirement("celery", Pattern.SHELL)
BAD = Place("bad", "linux", frozenset({"celery"}), Capacity(Fraction(2), 1 << 30, 2, 32))
GOOD = replace(BAD, host="good")


def test_another_host_that_could_run_it_may_start_it() -> None:
    assert may_start_elsewhere(TASK, {"bad"}, [BAD, GOOD])


def test_another_worker_on_the_same_host_may_not() -> None:
    assert not may_start_elsewhere(TASK, {"bad"}, [BAD, replace(BAD, queues=frozenset({"celery", "other"}))])


def test_a_host_that_has_refused_it_may_not() -> None:
    assert not may_start_elsewhere(TASK, {"bad", "good"}, [BAD, GOOD])


def test_a_worker_that_is_draining_may_not() -> None:
    assert not may_start_elsewhere(TASK, {"bad"}, [BAD, replace(GOOD, draining=True)])


def test_a_worker_that_can_never_run_it_may_not() -> None:
    assert not may_start_elsewhere(replace(TASK, host="bad"), {"bad"}, [BAD, GOOD])
    assert not may_start_elsewhere(replace(TASK, cpus="3"), {"bad"}, [BAD, GOOD])
