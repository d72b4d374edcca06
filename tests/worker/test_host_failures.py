"""What a host cannot start is no fault of the task: another host runs it, and this one leaves the like of it alone."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aque
from aque.errors import TaskError
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, PROGRAMS, Farm, Worker

LIMIT = LIMIT_SECONDS
AS_ANOTHER_HOST = 'hostname "$1"; shift; exec "$@"'
WITHOUT_A_MOUNT = 'hostname "$1"; mount -t tmpfs none "$2"; shift 2; exec "$@"'

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another host name and hide a mount")


@pytest.fixture
def own_farm(fresh_postgresql_url: str, tmp_path: Path) -> Iterator[Farm]:
    """A store that is shared: in one person's there is one host."""
    with Farm(fresh_postgresql_url, tmp_path) as farm, farm.entered():
        yield farm
        assert farm.findings() == []


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where jobs have their directories; on host `bad` it is empty."""
    (tmp_path / "shots" / "a").mkdir(parents=True)
    return tmp_path / "shots"


def start_bad(farm: Farm, shots: Path, **chosen: Any) -> Worker:
    before = ["unshare", "--uts", "--mount", "sh", "-ec", WITHOUT_A_MOUNT, "sh", "bad", str(shots)]
    return farm.start_worker("-c", "1", name="bad", before=before, cpus=2, **chosen)


def start_good(farm: Farm) -> Worker:
    before = ["unshare", "--uts", "sh", "-ec", AS_ANOTHER_HOST, "sh", "good"]
    return farm.start_worker("-c", "1", name="good", before=before, cpus=2)


def cli(farm: Farm, *words: str) -> str:
    return subprocess.check_output([str(PROGRAMS / "aque"), *words], env=farm.environment, text=True)


def refusals(farm: Farm) -> list[tuple[int, str]]:
    """(task, host), in the order of tasks."""
    with farm.store.connect() as connection:
        ids = [row["id"] for row in farm.store.tasks(connection, fields=["id"])]
        return [(i, one.host) for i, found in farm.store.refusals.of(connection, ids).items() for one in found]


def avoids(farm: Farm, name: str = "bad") -> tuple[str, ...]:
    return next(row.avoids for row in farm.live() if row.info.name == f"{name}@test")


def test_one_of_two_workers_lacks_a_mount_all_tasks_succeed_and_workers_says_why_that_host_is_avoided(
    own_farm: Farm, shots: Path
) -> None:
    start_bad(own_farm, shots)
    start_good(own_farm)
    with aque.graph() as job:
        for _ in range(300):
            aque.shell(["true"], cwd=str(shots / "a"))
    assert job.handle.get(timeout=2 * LIMIT) is None
    assert own_farm.counts() == {"success": 301}
    refused = refusals(own_farm)
    assert 3 <= len(refused) <= 4, "three, and what ran beside the third"
    assert {host for _, host in refused} == {"bad"}
    with own_farm.store.connect() as connection:
        rows = own_farm.store.tasks(connection, {"id": [i for i, _ in refused]}, ["attempt", "lost", "reason"])
        assert all((row["lost"], row["reason"]) == (0, None) for row in rows)
    assert own_farm.attempts(refused[0][0])[0] == (1, "given back", "cannot_enter_cwd")
    why = f"cannot enter {shots}/a: No such file or directory (until "
    wait_until(lambda: any(why in line for line in avoids(own_farm)), LIMIT, "the row says so")
    (line,) = [line for line in cli(own_farm, "workers").splitlines() if "avoids" in line]
    assert f"avoids job {job.id}: {why}" in line
    shown = {row["name"]: row["avoids"] for row in map(json.loads, cli(own_farm, "workers", "--json").splitlines())}
    assert shown["good@test"] == [] and [line.partition(" (")[0] for line in shown["bad@test"]] == [
        f"job {job.id}: cannot enter {shots}/a: No such file or directory"
    ]


def test_a_refused_task_waits_for_the_other_host_and_says_who_refused_it_and_why(own_farm: Farm, shots: Path) -> None:
    start_bad(own_farm, shots)
    good = start_good(own_farm)
    blockers = [aque.shell(["sleep", "600"], host="good") for _ in range(2)]
    for blocker in blockers:
        own_farm.wait_for_state(blocker, "running")
    task = aque.shell(["true"], cwd=str(shots / "a"), max_attempts=1)
    wait_until(lambda: refusals(own_farm) == [(int(task.id), "bad")], LIMIT, "it is refused")
    why = f"refused by bad: cannot enter {shots}/a: No such file or directory"
    assert json.loads(cli(own_farm, "status", "--json", task.id))["why"] == why
    assert why in cli(own_farm, "status", task.id)
    assert own_farm.state(task) == "ready"
    for blocker in blockers:
        blocker.kill()
    task.get(timeout=LIMIT)
    row = own_farm.row(task)
    assert (row["attempt"], row["worker"], row["lost"]) == (2, good.name, 0)


def test_a_refused_task_can_be_killed_while_it_waits(own_farm: Farm, shots: Path) -> None:
    start_bad(own_farm, shots)
    start_good(own_farm)
    blockers = [aque.shell(["sleep", "600"], host="good") for _ in range(2)]
    for blocker in blockers:
        own_farm.wait_for_state(blocker, "running")
    task = aque.shell(["true"], cwd=str(shots / "a"))
    wait_until(lambda: refusals(own_farm), LIMIT, "it is refused")
    task.kill()
    assert own_farm.state(task) == "cancelled"
    for blocker in blockers:
        blocker.kill()
        own_farm.wait_for_state(blocker, "killed")


def test_what_every_host_has_refused_ends_in_error_with_the_reason_and_the_message(own_farm: Farm, shots: Path) -> None:
    start_bad(own_farm, shots)
    start_good(own_farm)
    task = aque.shell(["true"], cwd=str(shots / "nowhere"))
    with pytest.raises(TaskError, match=f"{shots}/nowhere"):
        task.get(timeout=LIMIT)
    row = own_farm.row(task)
    assert (row["state"], row["reason"], row["attempt"]) == ("error", "cannot_enter_cwd", 2)


def test_what_no_other_host_could_run_ends_at_once(own_farm: Farm, shots: Path) -> None:
    start_bad(own_farm, shots)
    start_good(own_farm)
    task = aque.shell(["true"], cwd=str(shots / "a"), host="bad")
    with pytest.raises(TaskError):
        task.get(timeout=LIMIT)
    assert own_farm.row(task)["attempt"] == 1
    assert refusals(own_farm) == []


def test_a_directory_that_comes_back_is_found_by_a_probe_when_the_back_off_has_ended(
    own_farm: Farm, shots: Path
) -> None:
    """The worker looks by itself: nothing rings, and its polls are far away."""
    bad = start_bad(own_farm, shots, back_off_seconds=1, poll_seconds=600)
    start_good(own_farm)
    blockers = [aque.shell(["sleep", "600"], host="good") for _ in range(2)]
    for blocker in blockers:
        own_farm.wait_for_state(blocker, "running")
    with aque.graph() as job:
        for _ in range(20):
            aque.shell(["true"], cwd=str(shots / "a"))
    wait_until(lambda: len(refusals(own_farm)) >= 3, LIMIT, "it is refused")
    subprocess.check_call(["nsenter", "--mount", f"--target={bad.pid}", "mkdir", "--parents", str(shots / "a")])
    assert job.handle.get(timeout=LIMIT) is None
    wait_until(lambda: avoids(own_farm) == (), LIMIT, "nothing is avoided any more")
    for blocker in blockers:
        blocker.kill()
        own_farm.wait_for_state(blocker, "killed")


def test_a_restart_forgets_what_was_avoided(own_farm: Farm, shots: Path) -> None:
    bad = start_bad(own_farm, shots, back_off_seconds=3600)
    start_good(own_farm)
    aque.shell(["true"], cwd=str(shots / "a"), name="first").get(timeout=LIMIT)
    with aque.graph() as job:
        for _ in range(50):
            aque.shell(["true"], cwd=str(shots / "a"))
    job.handle.get(timeout=LIMIT)
    wait_until(lambda: avoids(own_farm), LIMIT, "it is avoided")
    bad.deliver(signal.SIGHUP)
    wait_until(lambda: avoids(own_farm) == (), LIMIT, "nothing is avoided any more")


def test_an_interpreter_that_a_host_lacks_is_the_hosts_failure_and_a_command_that_it_lacks_the_tasks(
    own_farm: Farm, shots: Path
) -> None:
    start_bad(own_farm, shots)
    good = start_good(own_farm)
    (shots / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (shots / "python").chmod(0o755)
    both = [tasks.add.apply_async((1, n), interpreter=str(shots / "python"), host="bad,good") for n in range(20)]
    assert [task.get(timeout=LIMIT) for task in both] == [1 + n for n in range(20)]
    refused = refusals(own_farm)
    assert refused and all(own_farm.attempts(i) == [(1, "given back", "not_found")] for i, _ in refused)
    assert {own_farm.row(task)["worker"] for task in both} == {good.name}
    command = aque.shell([str(shots / "python"), "-c", ""], host="bad")
    with pytest.raises(TaskError):
        command.get(timeout=LIMIT)
    assert own_farm.row(command)["reason"] == "not_found"
    assert len(refusals(own_farm)) == len(refused)


def test_a_user_whom_a_host_refuses_is_left_to_another(own_farm: Farm, shots: Path) -> None:
    start_bad(own_farm, shots, allow_root_tasks=False)
    task = aque.shell(["hostname"])
    row = own_farm.wait_for_state(task, "error")
    assert (row["reason"], row["attempt"], refusals(own_farm)) == ("cannot_become_user", 1, []), (
        "there is no other host"
    )
    start_good(own_farm)
    with aque.graph() as job:
        several = [aque.shell(["hostname"]) for _ in range(20)]
    job.handle.get(timeout=LIMIT)
    assert {own_farm.output(task) for task in several} == {b"good\n"}
    assert all(host == "bad" for _, host in refusals(own_farm))
