"""Workers that die, stop or stall, and databases that go away: nothing is lost, nothing is recorded twice."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil
import psycopg2
import pytest

import aque
from aque import machine
from aque.states import State
from aque.values import WorkerInfo
from tests.conftest import ON_POSTGRESQL, ON_SQLITE
from tests.faults import dag
from tests.faults.trees import Tree
from tests.servers import PostgreSQL, text_of, wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, Farm, Worker, processes_with

LIMIT = LIMIT_SECONDS
#: `python -m tests.faults.dag --tasks 10000 --kill` runs the large one.
DAG_TASKS = 1000
#: Writes its attempt, then waits for the gate of this attempt.
STEP = 'echo "$AQUE_ATTEMPT" >>"$1"; until [ -e "$2.$AQUE_ATTEMPT" ]; do sleep 0.02; done'


class Step:
    """A command or function that runs until the test opens its gate, and says which attempts have started."""

    def __init__(self, directory: Path, kind: str = "command", **options: object) -> None:
        name = uuid4().hex
        self.path, self.gate = directory / f"started-{name}", directory / f"gate-{name}"
        self.mark = f"TEST_MARK={name}"
        if kind == "command":
            words = ["env", self.mark, "sh", "-c", f"setsid sleep 1000 & {STEP}", "sh", str(self.path), str(self.gate)]
            self.task = aque.shell(words, cpus=0.5, **options)
        else:
            self.gate = self.gate.with_suffix(".1")
            self.task = tasks.started.apply_async((str(self.path), str(self.gate)), cpus=0.5, **options)

    @property
    def attempts(self) -> list[int]:
        return [int(line.split()[0]) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def wait_until_it_runs(self, attempt: int = 1) -> None:
        wait_until(lambda: self.attempts[-1:] == [attempt], LIMIT, f"attempt {attempt} runs")

    def finish(self, attempt: int = 1) -> None:
        """Let this attempt end by itself."""
        (self.gate if self.gate.suffix else self.gate.with_suffix(f".{attempt}")).touch()

    def processes(self) -> list[psutil.Process]:
        """All of the command that lives."""
        return processes_with(self.mark)

    def shell(self) -> psutil.Process:
        """The command itself, and not what it starts, which is a shell too until it is something else."""

        def first() -> list[psutil.Process]:
            found = []
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    if (parent := process.parent()) is not None and parent.name() == "aque-superv":
                        found.append(process)
            return found

        return wait_until(lambda: first() if len(first()) == 1 else [], LIMIT, "the command has its shell")[0]


def expired(farm: Farm, worker: Worker) -> float:
    """How many seconds ago the lease of a worker ended."""
    with farm.store.connect() as connection:
        return max(row.expired_seconds for row in farm.store.workers(connection) if row.info.name == worker.name)


# -- kill -9 --------------------------------------------------------------------------------------------------------------


def test_a_graph_survives_that_one_of_two_workers_is_killed_in_the_middle(own_farm: Farm, tmp_path: Path) -> None:
    found = dag.run(own_farm, tmp_path, DAG_TASKS, dag.kill_one_and_start_another)
    assert found.states == {"success": DAG_TASKS + 1}
    assert (found.never_ran, found.out_of_order, found.findings) == ([], [], [])


def test_what_a_killed_worker_ran_is_gone_before_it_runs_again(own_farm: Farm, tmp_path: Path) -> None:
    first = own_farm.start_worker("-c", "1", name="first", cpus=2)
    command, function = Step(tmp_path), Step(tmp_path, "function")
    for step in (command, function):
        step.wait_until_it_runs()
    old = [*command.processes(), psutil.Process(int(text_of(function.path).split()[1]))]
    assert len(old) >= 3
    first.kill()
    own_farm.start_worker("-c", "1", name="second", cpus=2)
    for step in (command, function):
        step.wait_until_it_runs(2)
        assert not [process for process in old if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        step.finish(2)
        own_farm.wait_for_state(step.task, "success")
        assert own_farm.attempts(step.task) == [(1, "lost", "worker_lost")]


def test_a_task_whose_workers_die_three_times_ends_as_lost(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", name="worker1", cpus=1)
    step = Step(tmp_path)
    for attempt in (1, 2, 3):
        step.wait_until_it_runs(attempt)
        worker.kill()
        worker = own_farm.start_worker("-c", "1", name=f"worker{attempt + 1}", cpus=1)
    row = own_farm.wait_for_state(step.task, "error")
    assert (row["reason"], row["lost"], row["attempt"]) == ("worker_lost", 3, 3)
    assert aque.shell(["true"]).get(timeout=LIMIT)["exit_code"] == 0


def test_a_task_that_was_killed_while_its_worker_was_dead_never_starts_again(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", name="first")
    step = Step(tmp_path)
    step.wait_until_it_runs()
    worker.kill()
    step.task.kill()
    own_farm.start_worker("-c", "1", name="second")
    row = own_farm.wait_for_state(step.task, "killed")
    assert (row["reason"], step.attempts) == ("request", [1])


@ON_SQLITE
def test_the_supervisor_of_a_command_that_is_killed_costs_an_attempt_and_leaves_no_process(
    own_farm: Farm, tmp_path: Path
) -> None:
    own_farm.start_worker("-c", "1")
    step = Step(tmp_path)
    step.wait_until_it_runs()
    shell = step.shell()
    old = step.processes()
    supervisor = shell.parent()
    assert supervisor is not None
    supervisor.kill()
    step.wait_until_it_runs(2)
    assert not [process for process in old if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    step.finish(2)
    own_farm.wait_for_state(step.task, "success")
    assert own_farm.attempts(step.task) == [(1, "lost", "worker_lost")]


@ON_POSTGRESQL
def test_the_supervisors_server_that_is_killed_is_replaced(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2)
    step = Step(tmp_path)
    step.wait_until_it_runs()
    shell = step.shell()
    supervisor = shell.parent()
    assert supervisor is not None
    server = supervisor.parent()
    assert server is not None
    assert server.pid != worker.pid
    server.kill()
    assert aque.shell(["echo", "next"], cpus=0.5).get(timeout=LIMIT)["stdout"] == "next\n"
    step.finish(1)
    step.finish(2)
    own_farm.wait_for_state(step.task, "success")


# -- stopped and stalled --------------------------------------------------------------------------------------------------


def test_the_only_worker_may_stand_still_for_three_leases_and_its_command_ends_as_attempt_1(
    own_farm: Farm, tmp_path: Path
) -> None:
    worker = own_farm.start_worker("-c", "1", lease_seconds=1, cpus=2)
    running, ending = Step(tmp_path), Step(tmp_path)
    for step in (running, ending):
        step.wait_until_it_runs()
    worker.deliver(signal.SIGSTOP)
    try:
        ending.finish()  # while nobody can hear of it
        wait_until(lambda: expired(own_farm, worker) > 3, LIMIT, "three leases are over")
    finally:
        worker.deliver(signal.SIGCONT)
    running.finish()
    for step in (running, ending):
        assert own_farm.wait_for_state(step.task, "success", "error")["attempt"] == 1
        assert (own_farm.state(step.task), step.attempts) == ("success", [1])


@contextmanager
def another_pid_namespace() -> Iterator[list[str]]:
    """The words before a command that make it see no process of ours, as on another machine."""
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        pytest.skip("only root can make a pid namespace")
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare --pid --mount-proc does not work here")
    yield words


@ON_POSTGRESQL  # a file is one machine's, and locked for all while one that has it stands still
def test_a_worker_that_stalls_past_its_lease_loses_its_tasks_to_another_machine_and_kills_them(
    own_farm: Farm, tmp_path: Path
) -> None:
    with another_pid_namespace() as elsewhere:
        stalled = own_farm.start_worker("-c", "1", name="stalled", cpus=2, lease_seconds=1)
        command, function = Step(tmp_path), Step(tmp_path, "function")
        for step in (command, function):
            step.wait_until_it_runs()
        old = [*command.processes(), psutil.Process(int(text_of(function.path).split()[1]))]
        stalled.deliver(signal.SIGSTOP)
        try:
            own_farm.start_worker("-c", "1", name="elsewhere", cpus=2, lease_seconds=60, before=elsewhere)
            for step in (command, function):
                step.wait_until_it_runs(2)
            command.finish(2)
            own_farm.wait_for_state(command.task, "success")
        finally:
            stalled.deliver(signal.SIGCONT)
        gone, alive = psutil.wait_procs(old, timeout=LIMIT)
        assert alive == []
        assert len(gone) == len(old)
        wait_until(lambda: "lost_lease" in stalled.log(), LIMIT, "it says what happened")
        function.finish()
        for step in (command, function):
            row = own_farm.wait_for_state(step.task, "success")
            assert (row["attempt"], row["worker"]) == (2, "elsewhere@test")
            assert own_farm.attempts(step.task) == [(1, "lost", "worker_lost")]
            assert step.attempts == [1, 2]
        assert aque.shell(["true"], cpus=2).get(timeout=LIMIT)["exit_code"] == 0
        wait_until(lambda: len(own_farm.live()) == 2, LIMIT, "the one that stalled works again, as a new worker")


@ON_POSTGRESQL  # a file is one machine's, and locked for all while one that has it stands still
def test_a_stalled_worker_kills_the_whole_tree_of_a_function_that_it_has_lost(own_farm: Farm, tmp_path: Path) -> None:
    with another_pid_namespace() as elsewhere:
        stalled = own_farm.start_worker("-c", "1", name="stalled", cpus=1, lease_seconds=1)
        grown = Tree(tmp_path, "function")
        grown.wait_until_it_has_grown()
        stalled.deliver(signal.SIGSTOP)
        try:
            own_farm.start_worker("-c", "1", name="elsewhere", cpus=1, lease_seconds=60, before=elsewhere)
            row = own_farm.wait_for_state(grown.task, "success")
            assert grown.living()  # nobody could end them there
        finally:
            stalled.deliver(signal.SIGCONT)
        wait_until(lambda: not grown.living(), LIMIT, "the tree is gone")
        assert (row["attempt"], row["worker"]) == (2, "elsewhere@test")
        assert [found for _, _, found in grown.records()] == ["clean", "overlaps"]
        wait_until(lambda: len(own_farm.live()) == 2, LIMIT, "the one that stalled works again, as a new worker")
        assert own_farm.row(grown.task) == row


@ON_POSTGRESQL  # a file is one machine's, and locked for all while one that has it stands still
def test_with_a_strict_lease_two_attempts_never_overlap(own_farm: Farm, tmp_path: Path) -> None:
    with another_pid_namespace() as elsewhere:
        stalled = own_farm.start_worker("-c", "1", name="stalled", cpus=1, lease_seconds=6)
        grown = Tree(tmp_path, "command", strict_lease=True)
        grown.wait_until_it_has_grown()
        stalled.deliver(signal.SIGSTOP)
        try:
            own_farm.start_worker("-c", "1", name="elsewhere", cpus=1, lease_seconds=60, before=elsewhere)
            row = own_farm.wait_for_state(grown.task, "success")
            assert not grown.living()  # while the worker stands still
        finally:
            stalled.deliver(signal.SIGCONT)
        assert (row["attempt"], row["worker"]) == (2, "elsewhere@test")
        assert [found for _, _, found in grown.records()] == ["clean", "clean"]
        wait_until(lambda: len(own_farm.live()) == 2, LIMIT, "the one that stalled works again, as a new worker")
        assert own_farm.row(grown.task) == row


@ON_SQLITE
def test_a_strict_lease_that_is_renewed_harms_nothing(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "1", cpus=1, lease_seconds=5)
    step = Step(tmp_path, strict_lease=True)
    step.wait_until_it_runs()
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 6, LIMIT, "the lease that it started with is over")
    step.finish()
    row = own_farm.wait_for_state(step.task, "success")
    assert (row["attempt"], row["lost"], step.attempts) == (1, 0, [1])


def test_the_tasks_of_a_worker_that_ran_before_this_machine_was_booted_are_free_at_once(
    own_farm: Farm, tmp_path: Path
) -> None:
    boot, namespace, machine_id = machine.parts(machine.host_id())
    if not machine_id:
        pytest.skip("this machine has no /etc/machine-id")
    earlier = f"{'0' * len(boot)} {namespace} {machine_id}"
    tasks_of = {}
    for name, host, seen in (("before", socket.gethostname(), 0.0), ("copy", socket.gethostname(), time.time())):
        step = Step(tmp_path)
        tasks_of[name] = step
        with own_farm.store.begin() as connection:
            (worker_id,) = own_farm.store.reserve_ids(connection, 1)
            info = WorkerInfo(
                worker_id,
                name,
                host,
                1,
                0.0,
                earlier,
                "1",
                1 << 30,
                1,
                1,
                ("celery",),
                "linux",
                "0",
                1e6,
                "",
                False,
                "",
            )
            own_farm.store.register(connection, info)
            own_farm.store.claim(connection, [step.task.number], worker_id, 7, State.RUNNING)
            connection.exec_driver_sql(f"UPDATE aque_worker SET seen_at = {seen} WHERE id = {worker_id}")
    own_farm.start_worker("-c", "1", cpus=2)
    before, copy = tasks_of["before"], tasks_of["copy"]
    before.wait_until_it_runs(2)
    before.finish(2)
    own_farm.wait_for_state(before.task, "success")
    if own_farm.url.startswith("sqlite"):  # one machine: whatever ran before the boot is gone
        copy.wait_until_it_runs(2)
        copy.finish(2)
        own_farm.wait_for_state(copy.task, "success")
    else:
        assert own_farm.state(copy.task) == "running"
        with own_farm.store.begin() as connection:
            connection.exec_driver_sql("UPDATE aque_worker SET lease_until = 0 WHERE name = 'copy'")
        copy.wait_until_it_runs(2)
        copy.finish(2)
        own_farm.wait_for_state(copy.task, "success")


def test_a_command_that_may_not_be_requeued_ends_with_its_worker(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", name="first")
    step = Step(tmp_path, requeue=False)
    step.wait_until_it_runs()
    worker.kill()
    own_farm.start_worker("-c", "1", name="second")
    row = own_farm.wait_for_state(step.task, "error")
    assert (row["reason"], row["attempt"], row["lost"], step.attempts) == ("worker_lost", 1, 1, [1])


# -- a worker that is told to stop ------------------------------------------------------------------------------------------


@ON_SQLITE
def test_sigterm_lets_a_worker_finish_what_it_runs_and_start_nothing(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=1, drain_seconds=60)
    command, function = Step(tmp_path), Step(tmp_path, "function")
    for step in (command, function):
        step.wait_until_it_runs()
    worker.deliver(signal.SIGTERM)
    later: list[aque.Handle] = []

    def starts_nothing() -> bool:  # nobody says when it has seen the signal
        later.append(aque.shell(["true"], cpus=0))
        with suppress(AssertionError):
            wait_until(lambda: own_farm.state(later[-1]) != "ready", 2)
        return own_farm.state(later[-1]) == "ready"

    wait_until(starts_nothing, LIMIT, "it starts nothing any more")
    command.finish()
    function.finish()
    wait_until(lambda: not worker.running(), LIMIT, "it has ended")  # a second signal would not let them end
    for step in (command, function):
        row = own_farm.row(step.task)
        assert (row["state"], row["attempt"], step.attempts) == ("success", 1, [1])
    assert own_farm.state(later[-1]) == "ready"
    assert own_farm.live() == []


@ON_POSTGRESQL
def test_a_worker_that_has_drained_long_enough_gives_back_what_runs(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=1, drain_seconds=0.2)
    command, function = Step(tmp_path), Step(tmp_path, "function")
    for step in (command, function):
        step.wait_until_it_runs()
    worker.stop(signal.SIGTERM)
    assert command.processes() == []
    for step in (command, function):
        row = own_farm.row(step.task)
        assert (row["state"], row["lost"], own_farm.attempts(step.task)) == ("ready", 0, [(1, "given back", None)])


def test_sigquit_makes_a_worker_give_back_what_it_runs_at_once_without_spending_an_attempt(
    own_farm: Farm, tmp_path: Path
) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=1, drain_seconds=60)
    command, function = Step(tmp_path), Step(tmp_path, "function")
    for step in (command, function):
        step.wait_until_it_runs()
    worker.stop(signal.SIGQUIT)
    assert command.processes() == []
    for step in (command, function):
        row = own_farm.row(step.task)
        assert (row["state"], row["lost"], own_farm.attempts(step.task)) == ("ready", 0, [(1, "given back", None)])
    own_farm.start_worker("-c", "1", name="next", cpus=1)
    for step in (command, function):
        wait_until(lambda step=step: len(step.attempts) == 2, LIMIT, "it runs again")  # type: ignore[misc]
        step.finish(step.attempts[-1])
        row = own_farm.wait_for_state(step.task, "success")
        assert (row["lost"], row["attempt"]) == (0, step.attempts[-1])


# -- the database -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def postgresql_farm(own_postgresql: PostgreSQL, tmp_path: Path) -> Iterator[Farm]:
    with Farm(own_postgresql.url, tmp_path) as farm, farm.entered():
        yield farm
        assert farm.findings() == []


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_nothing_is_lost_when_postgresql_restarts(
    own_postgresql: PostgreSQL, postgresql_farm: Farm, tmp_path: Path, mode: str
) -> None:
    long = Step(tmp_path)

    def trouble(workers: list[Worker]) -> None:
        long.wait_until_it_runs()
        own_postgresql.restart(mode)
        postgresql_farm.store.close()  # this process's connections are gone too
        assert all(worker.running() for worker in workers)
        long.finish()
        postgresql_farm.wait_for_state(long.task, "success")

    found = dag.run(postgresql_farm, tmp_path, 400, trouble)
    assert found.states == {"success": 402}
    assert (found.never_ran, found.out_of_order, found.findings, found.lost) == ([], [], [], 0)
    assert (postgresql_farm.row(long.task)["attempt"], long.attempts) == (1, [1])


def test_a_command_that_ends_while_postgresql_is_away_is_recorded_when_it_is_back(
    own_postgresql: PostgreSQL, postgresql_farm: Farm, tmp_path: Path
) -> None:
    postgresql_farm.start_worker("-c", "1", cpus=2, lease_seconds=1)
    command, function = Step(tmp_path), Step(tmp_path, "function")
    for step in (command, function):
        step.wait_until_it_runs()
    own_postgresql.stop("fast")
    for step in (command, function):
        step.finish()
    wait_until(lambda: not command.processes(), LIMIT, "it is over")
    own_postgresql.start()
    postgresql_farm.store.close()  # this process's connections are gone too
    for step in (command, function):
        row = postgresql_farm.wait_for_state(step.task, "success")
        assert (row["attempt"], row["lost"], step.attempts) == (1, 0, [1])


def test_nothing_is_lost_when_all_connections_are_ended_again_and_again(
    own_postgresql: PostgreSQL, postgresql_farm: Farm, tmp_path: Path
) -> None:
    enough, rounds = threading.Event(), 0

    def end_connections() -> None:
        nonlocal rounds
        while not enough.wait(0.03):
            with suppress(psycopg2.OperationalError):
                own_postgresql.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                )
            rounds += 1

    ending = threading.Thread(target=end_connections)

    def trouble(workers: list[Worker]) -> None:
        ending.start()
        try:
            wait_until(lambda: rounds >= 100, LIMIT, "a hundred rounds of it")
        finally:
            enough.set()
            ending.join()
            postgresql_farm.store.close()  # this process's connections are gone too
        assert all(worker.running() for worker in workers)

    found = dag.run(postgresql_farm, tmp_path, 600, trouble, at=0.1)
    assert found.states == {"success": 601}
    assert (found.never_ran, found.out_of_order, found.findings, found.lost) == ([], [], [], 0)


@ON_SQLITE
def test_idle_pool_children_that_are_killed_do_not_freeze_the_pool(own_farm: Farm) -> None:
    worker = own_farm.start_worker("-c", "2")
    worker.wait_until_it_claims()
    for child in worker.pool_children():
        child.kill()  # one of them has the lock of the pipe that all of them read
        assert [tasks.add.delay(n, n).get(timeout=LIMIT) for n in range(3)] == [0, 2, 4]
