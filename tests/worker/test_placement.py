"""Limits over several workers, files that are cheap here, file systems that are dead, and users who share a farm."""

import os
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

import aque
from aque import control
from aque.machine import user_name
from tests.conftest import ON_POSTGRESQL, ON_SQLITE
from tests.filesystems import FileSystems, without_cache
from tests.servers import wait_until
from tests.users import User, two_users
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, Farm, Worker
from tests.worker.test_host_failures import AS_ANOTHER_HOST
from tests.worker.test_reservations import WRITE, peak

LIMIT = LIMIT_SECONDS


def limit(farm: Farm, name: str, capacity: int) -> None:
    control.set_limit(farm.store, name, capacity)


def used(farm: Farm) -> dict[str, int]:
    with farm.store.connect() as connection:
        return {row.name: row.used for row in farm.store.limits.rows(connection)}


def test_a_limit_holds_over_four_workers_and_a_dead_ones_tokens_come_back(own_farm: Farm, tmp_path: Path) -> None:
    limit(own_farm, "nuke", 3)
    workers = {worker.name: worker for worker in (start(own_farm, n) for n in range(4))}
    path, choose = str(tmp_path / "log"), random.Random(7)
    gates = [tmp_path / f"gate-{n}" for n in range(3)]
    held = [tasks.started.apply_async((f"{gate}.on", str(gate)), limits="nuke", priority=5) for gate in gates]
    wait_until(lambda: used(own_farm) == {"nuke": 3}, LIMIT, "all tokens are held")
    with aque.graph() as job:
        for _ in range(60):
            aque.shell(
                ["sh", "-c", WRITE, "sh", path, "1", f"{choose.uniform(0, 0.05):.3f}"],
                cpus=0.5,
                limits={"nuke": 1},
                io=False,
            )
    gates[0].touch()
    workers[own_farm.row(held[1])["worker"]].kill()
    for gate in gates:
        gate.touch()
    job.handle.get(timeout=LIMIT)
    lines = Path(path).read_text().splitlines()
    assert len(lines) >= 120
    assert peak_of(lines) <= 3
    assert used(own_farm) == {"nuke": 0}
    assert [own_farm.wait_for_state(task, "success")["state"] for task in held] == ["success"] * 3


def start(farm: Farm, number: int) -> Worker:
    return farm.start_worker("-c", "1", name=f"w{number}", cpus=4)


def peak_of(lines: list[str]) -> int:
    """The most that ran at once; what its worker's death has cut off has no end of its own."""
    open_: set[str] = set()
    most = 0
    for line in lines:
        what, task_id, _ = line.split()
        open_ = open_ | {task_id} if what == "start" else open_ - {task_id}
        most = max(most, len(open_))
    return most


def test_a_file_system_is_used_by_no_more_tasks_than_the_settings_say_on_all_workers_together(
    own_farm: Farm, file_systems: FileSystems, tmp_path: Path
) -> None:
    shots, textures = file_systems.tmpfs("nas1:/shots", "shots"), file_systems.tmpfs("nas2:/tex", "textures")
    for name in ("one", "two"):
        own_farm.start_worker("-c", "1", name=name, cpus=8, io_limits="nas1:*=2,nas2:*=5")
    logs = {shots: tmp_path / "shots-log", textures: tmp_path / "textures-log"}
    with aque.graph() as job:
        for number in range(80):
            place = (shots, textures)[number % 2]
            words = ["sh", "-c", WRITE, "sh", str(logs[place]), "1", "0.05"]
            aque.shell(words, cpus=0.25, io_paths=[str(place / f"f{number}")])
    job.handle.get(timeout=LIMIT)
    peaks = {place: peak(log.read_text().splitlines(), Fraction(100)) for place, log in logs.items()}
    assert peaks[shots] == 2 < peaks[textures] <= 5  # a busy machine may be too slow to have five at once
    assert used(own_farm) == {"io:nas1:/shots": 0, "io:nas2:/tex": 0}


@ON_SQLITE
def test_tasks_whose_files_are_in_memory_start_first(own_farm: Farm, on_disk: Path, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "1", cpus=1)
    record, gate = tmp_path / "record", tmp_path / "gate"
    files = [on_disk / f"file-{n}" for n in range(7)]
    for number, file in enumerate(files):
        file.write_bytes(bytes(1 << 20))
        if number % 2 == 0:
            without_cache(file)
    blocker = tasks.started.apply_async((str(tmp_path / "on"), str(gate)))
    wait_until((tmp_path / "on").exists, LIMIT, "the worker is full")
    say = 'echo "$2" >>"$1"'
    words = [["sh", "-c", say, "sh", str(record), str(number)] for number in range(6)]
    with aque.graph() as job:
        for number, argv in enumerate(words):
            aque.shell(argv, io_paths=[str(files[number])])
    # One thread looks at this disk, in order: who has seen this file has seen the others.
    seen = aque.shell(["true"], cpus=0, priority=-1, io_paths=[str(files[6])])
    assert seen.get(timeout=LIMIT)["exit_code"] == 0
    gate.touch()
    job.handle.get(timeout=LIMIT)
    assert blocker.get(timeout=LIMIT) == 1
    order = [int(line) for line in record.read_text().split()]
    assert order == [1, 3, 5, 0, 2, 4]


@ON_POSTGRESQL
def test_a_file_system_that_does_not_answer_stops_only_what_requires_it(
    own_farm: Farm, file_systems: FileSystems
) -> None:
    hung, _ = file_systems.hung()
    worker = own_farm.start_worker("-c", "1", cpus=2)
    needing = aque.shell(["true"], requires_paths=[str(hung)], io=False)
    hinted = aque.shell(["true"], io_paths=[str(hung / "file")])
    others = [aque.shell(["true"]) for _ in range(20)]
    assert [task.get(timeout=LIMIT)["exit_code"] for task in [*others, hinted]] == [0] * 21
    assert own_farm.state(needing) == "ready"
    silent = {os.fsencode(hung): f"{hung} does not answer"}
    wait_until(lambda: [row.missing_paths for row in own_farm.live()] == [silent], LIMIT, "the worker says why")
    assert aque.shell(["true"]).get(timeout=LIMIT)["exit_code"] == 0
    needing.kill()
    worker.stop()  # it can, with a look that never returns


@ON_SQLITE
def test_a_task_runs_as_soon_as_the_path_that_it_requires_is_there(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "1", cpus=2)
    path = tmp_path / "shots"
    task = aque.shell(["true"], requires_paths=[str(path)])
    wait_until(lambda: any(row.missing_paths for row in own_farm.live()), LIMIT, "it is missing")
    assert own_farm.state(task) == "ready"
    path.mkdir()
    assert task.get(timeout=LIMIT)["exit_code"] == 0


@pytest.mark.parametrize(("wait", "where"), [(60, "near"), (0, "far")])
def test_what_reads_what_a_host_has_written_waits_a_moment_for_that_host(
    own_farm: Farm, tmp_path: Path, wait: float, where: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a worker another host name")
    for name in ("near", "far"):
        before = ["unshare", "--uts", "sh", "-ec", AS_ANOTHER_HOST, "sh", name]
        own_farm.start_worker("-c", "1", name=name, cpus=1, before=before, locality_wait_seconds=wait)
    gates = {name: tmp_path / f"{name}-gate" for name in ("make", "busy", "far")}

    def hold(name: str, host: str, **options: object) -> aque.Handle:
        text = 'touch "$1.on"; until [ -e "$1" ]; do sleep 0.05; done'
        return aque.shell(["sh", "-c", text, "sh", str(gates[name])], host=host, io=False, **options)

    made = hold("make", "near")
    far = hold("far", "far")
    wait_until(lambda: own_farm.counts().get("running") == 2, LIMIT, "both are busy")
    busy = hold("busy", "near", priority=9)
    read = aque.shell(["hostname"], io_paths=[str(tmp_path)], depends_on=made)
    gates["make"].touch()
    wait_until(lambda: own_farm.state(busy) == "running", LIMIT, "something more urgent took its place")
    gates["far"].touch()
    assert far.get(timeout=LIMIT)["exit_code"] == 0
    if where == "near":
        again = hold("far", "far")  # that one is idle, and takes what it may
        assert again.get(timeout=LIMIT)["exit_code"] == 0
        assert own_farm.state(read) == "ready"
        gates["busy"].touch()
    assert read.get(timeout=LIMIT)["stdout"].strip() == where
    gates["busy"].touch()
    assert busy.get(timeout=LIMIT)["exit_code"] == 0


@pytest.fixture(scope="module")
def users() -> Iterator[tuple[User, User]]:
    with two_users() as both:
        yield both


def test_a_user_with_many_tasks_does_not_keep_another_from_starting(own_farm: Farm, users: tuple[User, User]) -> None:
    anna, bob = users
    chosen = {"fair_share": "yes", "unsafe_allow_root_sqlite": True}
    own_farm.start_worker("-c", "1", cpus=2, **chosen)
    os.environ["AQUE_UNSAFE_ALLOW_ROOT_SQLITE"] = "yes"  # of the farm's environment, which the fixture puts back
    try:
        with aque.graph():
            for _ in range(1500):
                aque.shell(["sleep", "0.02"], user=anna.name, cwd="/", io=False)
        wait_until(lambda: own_farm.counts().get("success", 0) > 5, LIMIT, "hers run")
        few = [aque.shell(["sleep", "0.02"], user=bob.name, cwd="/", io=False) for _ in range(10)]
        assert [task.get(timeout=LIMIT)["exit_code"] for task in few] == [0] * 10
        assert own_farm.counts().get("ready", 0) > 500
        own_farm.kill_everything()
    finally:
        del os.environ["AQUE_UNSAFE_ALLOW_ROOT_SQLITE"]


def test_a_limit_of_a_user_counts_each_of_that_users_tasks(own_farm: Farm, tmp_path: Path) -> None:
    limit(own_farm, f"user:{user_name()}", 2)
    own_farm.start_worker("-c", "1", cpus=8)
    path = str(tmp_path / "log")
    with aque.graph() as job:
        for _ in range(12):
            aque.shell(["sh", "-c", WRITE, "sh", path, "1", "0.05"], cpus=0.1, io=False)
    job.handle.get(timeout=LIMIT)
    assert peak(Path(path).read_text().splitlines(), Fraction(100)) == 2
