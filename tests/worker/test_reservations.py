"""Reservations in real workers: never more than the budget, whoever asks, and never less than can be had."""

import random
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import pytest

import aque
from aque.resources import CpuRequest
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, Farm

LIMIT = LIMIT_SECONDS
BUDGET = Fraction(2)
WRITE = 'echo "start $AQUE_TASK_ID $2" >>"$1"; sleep "$3"; echo "end $AQUE_TASK_ID $2" >>"$1"'


def peak(lines: Iterable[str], budget: Fraction = BUDGET) -> Fraction:
    """The most that ran at once by the tasks' own records, each of them written while the task had its reservation."""
    used = most = Fraction(0)
    for line in lines:
        what, _, cpus = line.split()
        amount = CpuRequest.parse(cpus).share(budget)
        used += amount if what == "start" else -amount
        most = max(most, used)
    assert used == 0
    return most


def reserved(farm: Farm) -> Fraction:
    """What the table says that the workers have reserved."""
    with farm.store.connect() as connection:
        return max((cpus for _, cpus in farm.store.running(connection).values()), default=Fraction(0))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_mix_never_reserves_more_than_the_worker_has_and_at_times_all_of_it(
    own_farm: Farm, tmp_path: Path, seed: int
) -> None:
    own_farm.start_worker("-c", "6", cpus=2)
    choose, path = random.Random(seed), str(tmp_path / "log")
    submitted = []
    with aque.graph():
        for number in range(80):
            cpus = choose.choice(["0.25", "0.5", "1", "1/3", "25%", "0", "all" if number % 8 == 0 else "1/4"])
            seconds = choose.uniform(0, 0.06)
            earlier = choose.sample(submitted, min(len(submitted), choose.choice([0, 0, 1])))
            if choose.random() < 0.5:
                task = tasks.reserve.apply_async((path, cpus, seconds), cpus=cpus, depends_on=earlier)
            else:
                task = aque.shell(
                    ["sh", "-c", WRITE, "sh", path, cpus, f"{seconds:.3f}"], cpus=cpus, depends_on=earlier
                )
            submitted.append(task)
    sampled = []
    wait_until(
        lambda: sampled.append(reserved(own_farm)) or own_farm.counts().get("success") == 81, LIMIT, "all is done"
    )
    lines = Path(path).read_text().splitlines()
    assert len(lines) == 160
    assert peak(lines) == BUDGET
    assert max(sampled) <= BUDGET


def test_n_tasks_of_one_nth_of_the_worker_run_at_once_and_no_more(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "1", cpus="1.9")
    path, gate = tmp_path / "log", tmp_path / "gate"
    text = 'echo "start $AQUE_TASK_ID 1/7" >>"$1"; until [ -e "$2" ]; do sleep 0.05; done; echo "end $AQUE_TASK_ID 1/7" >>"$1"'
    with aque.graph() as job:
        for _ in range(10):
            aque.shell(["sh", "-c", text, "sh", str(path), str(gate)], cpus="1/7")
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) == 7, LIMIT, "seven run")
    assert own_farm.counts() == {"running": 7, "ready": 3, "pending": 1}
    gate.touch()
    job.handle.get(timeout=LIMIT)
    assert peak(path.read_text().splitlines(), Fraction(1)) == 1


def test_memory_is_reserved_too(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "1", cpus=8, memory="1G")
    path = str(tmp_path / "log")
    with aque.graph() as job:
        for _ in range(12):
            aque.shell(["sh", "-c", WRITE, "sh", path, "1/3", "0.05"], cpus="0.1", memory="341M")
    job.handle.get(timeout=LIMIT)
    assert peak(Path(path).read_text().splitlines(), Fraction(1)) == 1


def test_python_tasks_that_reserve_nothing_never_outnumber_the_pools_children(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "2", cpus=1)
    path = str(tmp_path / "log")
    with aque.graph() as job:
        for _ in range(20):
            tasks.reserve.apply_async((path, "1/2", 0.03), cpus=0)
    job.handle.get(timeout=LIMIT)
    assert peak(Path(path).read_text().splitlines(), Fraction(1)) == 1


def test_a_task_that_wants_more_than_any_worker_has_stays_ready_and_harms_nobody(farm: Farm) -> None:
    giant = aque.shell(["true"], cpus=5)
    forgetful = aque.shell(["true"], memory="2G")
    elsewhere = aque.shell(["true"], host="no-such-host-*")
    unserved = aque.shell(["true"], queue="nobody")
    assert [tasks.add.delay(n, 1).get(timeout=LIMIT) for n in range(5)] == [1, 2, 3, 4, 5]
    for task in (giant, forgetful, elsewhere, unserved):
        assert farm.state(task) == "ready"
        task.kill()
        assert farm.state(task) == "cancelled"


def test_higher_priorities_start_first(own_farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with aque.graph() as job:
        ids = {p: tasks.record.apply_async((str(path),), priority=p, cpus="all").id for p in (0, -5, 10, 3, 7)}
    own_farm.start_worker("-c", "1", cpus=1)
    job.handle.get(timeout=LIMIT)
    assert path.read_text().split() == [ids[p] for p in (10, 7, 3, 0, -5)]


def test_what_was_claimed_ahead_does_not_wait_behind_a_long_task_while_another_worker_is_idle(
    own_farm: Farm, tmp_path: Path
) -> None:
    own_farm.start_worker("-c", "1", name="busy", cpus=1)
    for number in range(5):  # from now on tasks of this name are known to be short
        assert tasks.started.delay(str(tmp_path / "warm-up")).get(timeout=LIMIT) == 1, number
    gate = tmp_path / "gate"
    long = tasks.started.apply_async((str(tmp_path / "long"), str(gate)), priority=10)
    short = [tasks.started.delay(str(tmp_path / "short")) for _ in range(20)]
    wait_until((tmp_path / "long").exists, LIMIT, "the long one runs")
    own_farm.start_worker("-c", "1", name="idle", cpus=1)
    assert [task.get(timeout=LIMIT) for task in short] == [1] * 20
    assert own_farm.state(long) == "running"
    gate.touch()
    assert long.get(timeout=LIMIT) == 1
