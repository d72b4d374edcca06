"""Control groups of commands: what escapes the subreaper's signals does not escape its group."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aque import cgroups
from aque.commands import CommandRunner
from aque.supervised import Command
from tests.servers import wait_until
from tests.unit.test_supervisor import Watched, living, new_mark

HOME = cgroups.home()
ENV = {b"PATH": b"/usr/sbin:/usr/bin:/sbin:/bin"}

pytestmark = pytest.mark.skipif(HOME is None, reason="this process cannot make control groups (version 2)")


@pytest.fixture
def runner() -> Iterator[CommandRunner]:
    runner = CommandRunner()
    runner.start()
    yield runner
    assert runner.stop()
    wait_until(lambda: not workers_group().exists(), 60, "the groups are removed")


def workers_group() -> Path:
    assert HOME is not None
    return Path(HOME) / cgroups.name_of(os.getpid())


def members(pid: int) -> set[int]:
    """All that is in the group of a supervisor."""
    return {int(line) for line in (workers_group() / str(pid) / "cgroup.procs").read_text().split()}


def sleeping(runner: CommandRunner, *argv: bytes) -> tuple[Watched, bytes]:
    mark = new_mark()
    command = Watched(runner, Command((*argv, b"sleep", mark), ENV, b"/"))
    wait_until(lambda: living(mark), 60, "it sleeps")
    return command, mark


def test_a_command_is_in_the_group_of_its_supervisor_and_the_worker_says_so(runner: CommandRunner) -> None:
    command, _ = sleeping(runner, b"setsid", b"--wait", b"env", b"-i")
    above = int(Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert {above, command.pid} <= members(above)
    assert runner.containment == "cgroup and subreaper"
    command.running.kill(signal.SIGKILL, 0)
    assert command.wait().reason == "killed"
    assert members(above) == {above}, "the supervisor is back, for the next command"


def test_what_a_command_leaves_behind_dies_with_it(runner: CommandRunner) -> None:
    mark = new_mark()
    command = Watched(runner, Command((b"sh", b"-c", b"setsid sleep $0 & setsid env -i sleep $0 &", mark), ENV, b"/"))
    assert command.wait().exit_code == 0
    assert living(mark) == set()


def test_what_a_killed_supervisor_ran_dies_with_its_group(runner: CommandRunner) -> None:
    command, mark = sleeping(runner)
    above = int(Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(above, signal.SIGKILL)
    assert command.wait().reason == "lost"
    assert living(mark) == set()
    wait_until(lambda: not (workers_group() / str(above)).exists(), 60, "its group is removed")


def test_all_others_in_a_group_are_killed_at_once(tmp_path: Path) -> None:
    code = """
import os, subprocess, sys
from aque import cgroups, processes
outside = cgroups.Group(sys.argv[1])
inside = cgroups.Group(sys.argv[1] + "/inside")
inside.enter()
others = [subprocess.Popen(["sleep", "1000"], start_new_session=True) for _ in range(20)]
inside.kill_others(outside)
print([processes.is_over(one.pid) for one in others] == [True] * 20, [one.wait() for one in others] == [-9] * 20)
cgroups.Group(os.path.dirname(sys.argv[1])).enter()
print(inside.is_populated(), outside.remove(), os.path.exists(sys.argv[1]))
"""
    path = f"{HOME}/test-{os.getpid()}"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "True", "False"]


def test_groups_of_workers_that_are_gone_are_ended_by_the_next(runner: CommandRunner) -> None:
    assert HOME is not None
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = cgroups.Group(f"{HOME}/{cgroups.name_of(gone.pid)}")
    mark = new_mark().decode()
    with open(f"{left.path}/cgroup.procs", "w") as file:
        stray = subprocess.Popen(["sh", "-c", 'read go; exec sleep "$0"', mark], stdin=subprocess.PIPE)
        file.write(str(stray.pid))
    cgroups.Group(HOME).end_left()
    assert stray.wait(20) == -9
    wait_until(left.remove, 60, "the group is empty")


@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare")
def test_groups_of_workers_in_another_pid_namespace_are_let_alone(runner: CommandRunner) -> None:
    command, mark = sleeping(runner)
    code = f"from aque import cgroups; cgroups.Group({HOME!r}).end_left()"
    namespace = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    subprocess.run(namespace, check=True)
    assert living(mark) == {command.pid}
    command.running.kill(signal.SIGKILL, 0)
    assert command.wait().reason == "killed"
