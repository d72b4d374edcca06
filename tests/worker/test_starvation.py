"""A task that does not fit gets its turn, though smaller ones never stop coming."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import aque
from tests.servers import wait_until
from tests.worker.farm import LIMIT_SECONDS, Farm

LIMIT = LIMIT_SECONDS


@contextmanager
def a_stream(farm: Farm, seconds: float, width: int) -> Iterator[list[aque.Handle]]:
    """Commands of one CPU that never stop coming, `width` of them waiting at any time, as long as the block lasts."""
    over, submitted = threading.Event(), []

    def feed() -> None:
        while not over.wait(0.02):
            waiting = farm.counts().get("ready", 0)
            for _ in range(width - waiting):
                submitted.append(aque.shell(["sleep", str(seconds)], duration=seconds))

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield submitted
    finally:
        over.set()
        thread.join()


def test_a_whole_machine_task_starts_under_an_endless_stream_of_small_ones(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=3, reserve_after_seconds=1)
    with a_stream(own_farm, 0.4, 6) as stream:
        wait_until(lambda: own_farm.counts().get("running") == 3, LIMIT, "the machine is full")
        big = aque.shell(["true"], cpus="all")
        assert big.get(timeout=LIMIT)["exit_code"] == 0
        wait_until(lambda: own_farm.counts().get("running") == 3, LIMIT, "the small ones go on")
    before = [task for task in stream if own_farm.row(task)["submitted_at"] < own_farm.row(big)["submitted_at"]]
    assert own_farm.state(before[0]) == "success"


def test_two_whole_machine_tasks_on_two_workers_both_start(own_farm: Farm) -> None:
    for name in ("one", "two"):
        own_farm.start_worker("-c", "1", name=name, cpus=2, reserve_after_seconds=0.5)
    with a_stream(own_farm, 0.3, 8):
        wait_until(lambda: own_farm.counts().get("running") == 4, LIMIT, "both machines are full")
        big = [aque.shell(["sleep", "0.2"], cpus="all") for _ in range(4)]
        assert [task.get(timeout=LIMIT)["exit_code"] for task in big] == [0] * 4


def test_another_worker_keeps_room_when_the_one_that_did_is_killed(own_farm: Farm) -> None:
    holder = own_farm.start_worker("-c", "1", name="first", cpus=2, reserve_after_seconds=0.5)
    long = aque.shell(["sleep", "600"], duration=600, requeue=False)
    wait_until(lambda: own_farm.counts().get("running") == 1, LIMIT, "half of the machine is taken for long")
    with a_stream(own_farm, 0.3, 4):
        big = aque.shell(["true"], cpus="all", max_attempts=1)

        def holds() -> list[int]:
            with own_farm.store.connect() as connection:
                return [row.task_id for row in own_farm.store.reservations.rows(connection)]

        wait_until(lambda: holds() == [int(big.id)], LIMIT, "the first keeps room")
        own_farm.start_worker("-c", "1", name="second", cpus=2, reserve_after_seconds=0.5)
        holder.kill()
        assert big.get(timeout=LIMIT)["exit_code"] == 0
    assert own_farm.row(long)["reason"] == "worker_lost"
