"""What a person sets of waiting tasks counts at once on a worker that runs."""

import aque
from aque import control
from aque.machine import settings_here
from tests.servers import wait_until
from tests.worker.farm import LIMIT_SECONDS, Farm

LIMIT = LIMIT_SECONDS


def test_a_priority_reorders_waiting_work(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=1)
    gate = own_farm.directory / "gate"
    first = aque.shell(["sh", "-c", 'until [ -e "$1" ]; do sleep 0.05; done', "sh", str(gate)], priority=9)
    own_farm.wait_for_state(first, "running")
    waiting = [aque.shell(["true"], duration=1) for _ in range(6)]
    control.change(own_farm.store, settings_here(), [waiting[4].number, waiting[2].number], priority=5)
    control.change(own_farm.store, settings_here(), [waiting[5].number], duration=100)
    gate.touch()
    for task in waiting:
        own_farm.wait_for_state(task, "success")
    started = sorted(waiting, key=lambda task: own_farm.row(task)["started_at"])
    assert started == [waiting[i] for i in (2, 4, 5, 0, 1, 3)]


def test_a_task_for_which_no_worker_had_room_starts_when_it_asks_for_less(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=1)
    task = aque.shell(["true"], cpus=8)
    wait_until(lambda: own_farm.state(task) == "ready", LIMIT, "it waits")
    control.change(own_farm.store, settings_here(), [task.number], requirement={"cpus": "1/2"})
    assert task.get(timeout=LIMIT)["exit_code"] == 0
