"""What a worker leaves to others after its host could not start it, and when it tries again."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from aque.backoff import NOTHING_AVOIDED, Avoided, Backoff

WHY = "cannot enter /shots/a: No such file or directory"
NOON = 1_800_014_400.0  # 12:00 UTC


def refuse(backoff: Backoff, *tasks: int, job: int = 100, class_id: int = 1, now: float = 0.0) -> None:
    for task in tasks:
        backoff.refused(class_id, job, task, WHY, now)


def test_a_refused_task_is_left_alone_and_its_job_goes_on() -> None:
    backoff = Backoff(60)
    refuse(backoff, 1, 2)
    assert backoff.avoided(59.9) == Avoided(tasks=frozenset({1, 2}))
    assert backoff.avoided(60) == NOTHING_AVOIDED


def test_a_job_of_which_three_tasks_were_refused_is_left_alone_as_a_whole() -> None:
    backoff = Backoff(60)
    refuse(backoff, 1, 2, 3)
    assert backoff.avoided(0) == Avoided(jobs=frozenset({100}))


def test_the_same_task_three_times_is_not_three_tasks() -> None:
    backoff = Backoff(1)
    for now in (0, 10, 20):
        refuse(backoff, 1, now=now)
    assert backoff.avoided(20).jobs == frozenset()


def test_a_class_of_which_tasks_of_three_jobs_were_refused_is_left_alone_as_a_whole() -> None:
    backoff = Backoff(60)
    for job in (1, 2):
        refuse(backoff, job, job=job)
    assert backoff.avoided(0).classes == frozenset()
    refuse(backoff, 3, job=3)
    assert backoff.avoided(0).classes == frozenset({1})


def lengths_of_probes(seconds: float, probes: int) -> list[float]:
    """How long a job is left alone before each of these probes, all of which are refused."""
    backoff, now, found = Backoff(seconds), 0.0, []
    refuse(backoff, -1, -2, -3)
    for task in range(probes):
        began = now
        while backoff.avoided(now).jobs:
            change = backoff.next_change(now)
            assert change is not None
            now = change
        found.append(now - began)
        refuse(backoff, task, now=now)
    return found


def test_the_times_between_probes_double_up_to_sixteen_times() -> None:
    assert lengths_of_probes(60, 7) == [60, 120, 240, 480, 960, 960, 960]


def test_what_ran_beside_the_third_refused_task_makes_the_back_off_no_longer() -> None:
    backoff = Backoff(60)
    refuse(backoff, *range(20))
    assert backoff.avoided(59).jobs == frozenset({100})
    assert backoff.avoided(60) == NOTHING_AVOIDED


def test_one_success_takes_back_what_was_held_against_a_job_and_a_class() -> None:
    backoff = Backoff(60)
    for job in (1, 2, 3):
        refuse(backoff, 10 * job, 10 * job + 1, 10 * job + 2, job=job)
    backoff.succeeded(1, 2)
    avoided = backoff.avoided(0)
    assert (avoided.classes, avoided.jobs) == (frozenset(), {1, 3})
    assert avoided.tasks == {20, 21, 22}, "the tasks themselves were refused: others have them first"
    refuse(backoff, 23, 24, job=2)
    assert backoff.avoided(0).jobs == {1, 3}, "it takes three again"


def test_the_same_answer_is_the_same_object_until_something_changes() -> None:
    backoff = Backoff(60)
    assert backoff.avoided(0) is backoff.avoided(10**9)
    refuse(backoff, 1)
    first = backoff.avoided(0)
    assert backoff.avoided(59) is first
    assert backoff.avoided(60) is not first


def test_the_next_change_is_the_end_of_the_next_back_off() -> None:
    backoff = Backoff(60)
    assert backoff.next_change(0) is None
    refuse(backoff, 1)
    refuse(backoff, 2, now=30)
    assert [backoff.next_change(now) for now in (30, 60, 90)] == [60, 90, None]


def test_sentences_say_what_is_avoided_why_and_until_when() -> None:
    backoff = Backoff(60)
    refuse(backoff, 1, 2, 3, job=40)
    refuse(backoff, 4, 5, 6, job=12)
    backoff.refused(2, 70, 70, "cannot run 'true' as its user: there is no user 'x' on this host", 0)
    assert backoff.sentences(0, NOON) == (
        f"jobs 12, 40: {WHY} (until 12:01 UTC)",
        "task 70: cannot run 'true' as its user: there is no user 'x' on this host (until 12:01 UTC)",
    )
    assert backoff.sentences(60, NOON) == ()


def test_a_class_is_told_by_the_jobs_that_were_refused() -> None:
    backoff = Backoff(60)
    for job in range(1, 8):
        refuse(backoff, job, job=job)
    sentence = f"all that needs the same as jobs 1, 2, 3, 4, 5 and 2 more: {WHY} (until 12:01 UTC)"
    assert backoff.sentences(0, NOON) == (sentence,)


def test_the_list_of_sentences_has_an_end() -> None:
    backoff = Backoff(60)
    for job in range(1, 40):
        backoff.refused(job, job, job, f"cannot enter /{job}: No such file or directory", 0)
    assert len(backoff.sentences(0, NOON)) == 11
    assert backoff.sentences(0, NOON)[-1] == "and 29 more"


def test_what_was_refused_long_ago_is_forgotten() -> None:
    backoff = Backoff(1)
    refuse(backoff, 1, 2, 3)
    refuse(backoff, 4, job=200, class_id=2, now=1000)
    refuse(backoff, 5, now=1000)
    assert backoff.avoided(1000) == Avoided(tasks=frozenset({4, 5}))
    assert backoff.next_change(1000) == 1001


@dataclass
class Host:
    """One that can start nothing of a job, with so many places; whatever it may try it tries."""

    backoff: Backoff
    places: int
    left: list[int]
    tries: int = 0

    def try_all_it_may(self, now: float) -> None:
        while True:
            avoided = self.backoff.avoided(now)
            claimed = [t for t in self.left if not avoided.includes(1, 100, t)][: self.places]
            if not claimed:
                return
            for task in claimed:
                self.backoff.refused(1, 100, task, WHY, now)
            self.tries += len(claimed)


@given(places=st.integers(1, 64), seconds=st.integers(1, 600))
def test_a_job_of_10_000_tasks_costs_a_bad_host_a_bounded_number_of_tries(places: int, seconds: int) -> None:
    host = Host(Backoff(seconds), places, list(range(10_000)))
    host.try_all_it_may(0)
    assert host.tries <= 2 + places, "three, and what ran beside the third"
    now, probes = 0.0, 0
    while (change := host.backoff.next_change(now)) is not None and change <= 100 * seconds:
        now, before = change, host.tries
        host.try_all_it_may(now)
        assert host.tries - before <= places, "probes on all places at once, and no more"
        probes += host.tries > before
    assert probes <= 9, "after 1, 3, 7, 15, 31, 47, 63, 79 and 95 first back-offs"
