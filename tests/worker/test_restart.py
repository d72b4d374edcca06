"""HUP: the worker's program is started anew in the same process; commands go on, and nothing runs twice."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

import aque
from aque import control
from tests.conftest import ON_POSTGRESQL, ON_SQLITE
from tests.servers import PostgreSQL, wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, PROGRAMS, ROOT, Farm, Worker, processes_with

LIMIT = LIMIT_SECONDS
#: Writes numbered lines until there is the file of the test, at once and without end; then how many it has written.
TALKER = (
    'echo "$AQUE_ATTEMPT $$" >>"$1"; n=0; until [ -e "$2" ]; do n=$((n+1)); echo "line $n"; sleep "$3"; done; '
    'echo "$n" >"$1.lines"; echo error >&2'
)


class Talker:
    """A command that writes all the time, until the test lets it end."""

    def __init__(self, directory: Path, pause: float = 0.02, **options: object) -> None:
        name = uuid4().hex
        self.path, self.gate = directory / f"started-{name}", directory / f"gate-{name}"
        self.mark = f"TEST_MARK={name}"
        script = f"setsid sleep 1000 & {TALKER}"
        words = ["env", self.mark, "sh", "-c", script, "sh", str(self.path), str(self.gate), str(pause)]
        self.task = aque.shell(words, **{"cpus": 0.25, **options})

    @property
    def starts(self) -> list[tuple[int, int]]:
        """(attempt, pid) of each start."""
        text = self.path.read_text() if self.path.exists() else ""
        return [(int(attempt), int(pid)) for attempt, pid in map(str.split, text.splitlines())]

    def wait_until_it_runs(self, attempt: int = 1) -> None:
        wait_until(lambda: [a for a, _ in self.starts][-1:] == [attempt], LIMIT, f"attempt {attempt} runs")

    def finish(self) -> None:
        self.gate.touch()

    def processes(self) -> list[psutil.Process]:
        return processes_with(self.mark)

    def assert_that_it_ran_once(self, farm: Farm) -> None:
        """One start, one attempt, and all that it wrote in the table, byte for byte."""
        row = farm.wait_for_state(self.task, "success", "error", "killed")
        assert (row["state"], row["attempt"], row["lost"], len(self.starts)) == ("success", 1, 0, 1)
        lines = int(Path(f"{self.path}.lines").read_text())
        assert farm.output(self.task) == b"".join(b"line %d\n" % n for n in range(1, lines + 1))
        assert farm.output(self.task, 2) == b"error\n"


def restarts(worker: Worker) -> int:
    """How many images of the worker have taken over from another."""
    return worker.log().count("restarted:")


def restart(worker: Worker, number: signal.Signals = signal.SIGHUP) -> None:
    """Signal the worker, and wait until its new image goes on."""
    before = restarts(worker)
    worker.deliver(number)
    wait_until(lambda: restarts(worker) > before or not worker.running(), LIMIT, "the new image goes on")
    assert worker.running(), worker.log()


def ids(farm: Farm) -> list[int]:
    return [row.info.id for row in farm.live()]


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")


def named_aque_worker(worker: Worker) -> list[int]:
    """Of the worker and all below it, the processes that `killall aque-worker` would signal."""
    found = []
    for process in worker.process.tree():
        with suppress(FileNotFoundError, ProcessLookupError):
            if comm(process.pid) == "aque-worker":
                found.append(process.pid)
    return found


# -- names ------------------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_only_the_worker_itself_is_called_aque_worker(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "2")
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2
    assert comm(worker.pid) == "aque-worker"
    assert " ".join(psutil.Process(worker.pid).cmdline()).startswith("aque-worker")
    others = psutil.Process(worker.pid).children(recursive=True)
    assert len(others) >= 5
    assert named_aque_worker(worker) == [worker.pid]
    assert len(worker.pool_children()) == 2
    talker.finish()
    talker.assert_that_it_ran_once(own_farm)


# -- HUP --------------------------------------------------------------------------------------------------------------


def test_commands_go_on_across_a_restart_and_are_recorded_byte_for_byte(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, lease_seconds=60)
    pid, row = worker.pid, ids(own_farm)
    across, ending = Talker(tmp_path), Talker(tmp_path)
    for talker in (across, ending):
        talker.wait_until_it_runs()
    ending.finish()  # some moment in the middle of it
    restart(worker)
    assert (worker.pid, ids(own_farm)) == (pid, row)
    assert aque.shell(["echo", "new"], cpus=0.25).get(timeout=LIMIT)["stdout"] == "new\n"
    assert tasks.environment.delay().get(timeout=LIMIT).get("AQUE_HANDOVER") is None
    restart(worker)
    across.finish()
    for talker in (across, ending):
        talker.assert_that_it_ran_once(own_farm)


def test_a_restart_waits_for_python_tasks_and_commands_start_meanwhile(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, drain_seconds=60)
    path, gate = tmp_path / "started", tmp_path / "gate"
    function = tasks.started.apply_async((str(path), str(gate)), cpus=0.5)
    wait_until(path.exists, LIMIT, "it runs")
    worker.deliver(signal.SIGHUP)
    wait_until(lambda: "restarting:" in worker.log(), LIMIT, "it has heard")
    later = tasks.add.apply_async((1, 2), cpus=0.1)
    assert aque.shell(["true"], cpus=0.1).get(timeout=LIMIT)["exit_code"] == 0
    assert (own_farm.state(later), restarts(worker)) == ("ready", 0)
    gate.touch()
    assert later.get(timeout=LIMIT) == 3
    assert (function.get(timeout=LIMIT), restarts(worker), len(path.read_text().splitlines())) == (1, 1, 1)


@ON_POSTGRESQL
def test_python_tasks_that_do_not_end_in_time_are_given_back_at_a_restart(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, drain_seconds=0.2)
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    path, gate = tmp_path / "started", tmp_path / "gate"
    function = tasks.started.apply_async((str(path), str(gate)), cpus=0.5)
    wait_until(path.exists, LIMIT, "it runs")
    restart(worker)
    wait_until(lambda: len(path.read_text().splitlines()) == 2, LIMIT, "it runs again")
    gate.touch()
    row = own_farm.wait_for_state(function, "success")
    assert (row["lost"], own_farm.attempts(function)) == (0, [(1, "given back", None)])
    talker.finish()
    talker.assert_that_it_ran_once(own_farm)


@ON_SQLITE
def test_five_hangups_in_two_seconds_and_an_edit_disturb_no_task(own_farm: Farm, tmp_path: Path) -> None:
    code = tmp_path / "project"
    code.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "CELERY_CONFIG_MODULE": "conf"}
    (code / "conf.py").write_text("aque_reload = True\naque_cpus = '12'\n")
    worker = own_farm.start_worker("-c", "2", cwd=code, env=environment, drain_seconds=60)
    pid, row = worker.pid, ids(own_farm)
    commands = [Talker(tmp_path, pause=0.5) for _ in range(20)]
    functions = [tasks.record.apply_async((str(tmp_path / "record"),), cpus=0.1) for _ in range(20)]
    for talker in commands:
        talker.wait_until_it_runs()
    pids = [talker.starts[0][1] for talker in commands]
    began = time.monotonic()
    for n in range(5):
        wait_until(lambda due=began + 0.4 * n: time.monotonic() >= due)  # type: ignore[misc]
        worker.deliver(signal.SIGHUP)
    wait_until(lambda: restarts(worker) >= 1, LIMIT, "the new image goes on")
    (code / "conf.py").write_text("aque_reload = True\naque_cpus = '10'\n")
    wait_until(lambda: [row.info.cpus for row in own_farm.live()] == ["10"], LIMIT, "it has loaded the file")
    assert 2 <= restarts(worker) <= 5
    assert (worker.pid, ids(own_farm)) == (pid, row)
    assert named_aque_worker(worker) == [pid]
    assert [talker.starts[0][1] for talker in commands] == pids
    for talker in commands:
        talker.finish()
    for talker in commands:
        talker.assert_that_it_ran_once(own_farm)
    for function in functions:
        own_farm.wait_for_state(function, "success")
    assert sorted((tmp_path / "record").read_text().split()) == sorted(function.id for function in functions)


@ON_POSTGRESQL
def test_a_function_under_another_interpreter_goes_on_across_a_restart(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2)
    (tmp_path / "functions.py").write_text(
        "import os, time\n"
        "def wait(path):\n"
        "    print('begin', flush=True)\n"
        "    while not os.path.exists(path): time.sleep(0.01)\n"
        "    print('end')\n"
        "    return os.getpid()\n"
    )
    words = ["call", "--interpreter", sys.executable, "functions:wait", f'"{tmp_path / "gate"}"']
    done = subprocess.run(
        [str(PROGRAMS / "aque"), *words],
        cwd=tmp_path,
        env=own_farm.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    task = tasks.echo.AsyncResult(done.stdout.strip())
    wait_until(lambda: own_farm.output(task) == b"begin\n", LIMIT, "it has begun")
    restart(worker)
    (tmp_path / "gate").touch()
    assert isinstance(task.get(timeout=LIMIT), int)
    assert own_farm.output(task) == b"begin\nend\n"
    assert (own_farm.row(task)["attempt"], own_farm.row(task)["lost"]) == (1, 0)


@ON_SQLITE
def test_a_hangup_and_then_a_stop_is_a_stop(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, drain_seconds=60)
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    worker.deliver(signal.SIGHUP)
    worker.deliver(signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in worker.log(), LIMIT, "it has heard")
    talker.finish()
    talker.assert_that_it_ran_once(own_farm)
    wait_until(lambda: not worker.running(), LIMIT, "it has ended")
    assert (worker.process.process.returncode, restarts(worker), own_farm.live()) == (0, 0, [])


@ON_POSTGRESQL
def test_a_stop_that_comes_while_the_new_image_starts_stops_it(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, drain_seconds=60)
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    worker.deliver(signal.SIGHUP)
    wait_until(lambda: comm(worker.process.pid).startswith("python"), LIMIT, "the image is new")
    os.kill(worker.process.pid, signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in worker.log(), LIMIT, "it has heard")
    talker.finish()
    talker.assert_that_it_ran_once(own_farm)
    wait_until(lambda: not worker.running(), LIMIT, "it has ended")
    assert (worker.process.process.returncode, restarts(worker), own_farm.live()) == (0, 1, [])


@ON_SQLITE
def test_a_command_that_was_handed_over_can_be_killed_with_all_its_processes(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2)
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    restart(worker)
    assert len(talker.processes()) >= 2
    talker.task.kill()
    row = own_farm.wait_for_state(talker.task, "killed")
    assert (row["signal"], row["attempt"], talker.processes()) == (signal.SIGTERM, 1, [])


@ON_POSTGRESQL
def test_a_kill_that_comes_before_the_restart_is_carried_out_to_its_end_after_it(
    own_farm: Farm, tmp_path: Path
) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, kill_grace_seconds=8)
    path = tmp_path / "deaf"
    deaf = aque.shell(["sh", "-c", f"trap '' TERM; echo >{path}; while :; do sleep 0.1; done"], cpus=0.5)
    wait_until(path.exists, LIMIT, "it runs")
    deaf.kill()
    restart(worker)
    row = own_farm.wait_for_state(deaf, "killed")
    assert (row["signal"], row["attempt"], restarts(worker)) == (signal.SIGKILL, 1, 1)


def test_what_was_handed_over_dies_with_the_worker_and_runs_again(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2)
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    restart(worker)
    old = talker.processes()
    worker.kill()
    own_farm.start_worker("-c", "1", cpus=2, name="next")
    talker.wait_until_it_runs(2)
    assert not [process for process in old if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    talker.finish()
    own_farm.wait_for_state(talker.task, "success")
    assert own_farm.attempts(talker.task) == [(1, "lost", "worker_lost")]


@ON_SQLITE
def test_a_worker_with_fewer_cpus_after_the_restart_runs_what_it_has_and_claims_nothing(
    own_farm: Farm, tmp_path: Path
) -> None:
    conf = tmp_path / "conf.py"
    conf.write_text("aque_cpus = '2'\n")
    environment = {"PYTHONPATH": str(tmp_path), "CELERY_CONFIG_MODULE": "conf"}
    worker = own_farm.start_worker("-c", "1", env=environment)
    talkers = [Talker(tmp_path, cpus=1), Talker(tmp_path, cpus=1)]
    for talker in talkers:
        talker.wait_until_it_runs()
    conf.write_text("aque_cpus = '1'  # fewer\n")
    restart(worker)
    later, free = aque.shell(["true"], cpus=1), aque.shell(["true"], cpus=0)
    wait_until(lambda: "one@test ready" in worker.log().rpartition("restarted:")[2], LIMIT, "it works")
    # What its tasks have reserved. On a busy machine it may be late to renew its lease.
    wait_until(lambda: [row.info.cpus for row in own_farm.live()] == ["2"], LIMIT, "it has two")
    talkers[0].finish()
    assert free.get(timeout=LIMIT)["exit_code"] == 0
    wait_until(lambda: [row.info.cpus for row in own_farm.live()] == ["1"], LIMIT, "the row says so")
    assert own_farm.state(later) in ("ready", "claimed")  # `true` is short: it may wait here
    talkers[1].finish()
    assert later.get(timeout=LIMIT)["exit_code"] == 0
    for talker in talkers:
        talker.assert_that_it_ran_once(own_farm)


@ON_POSTGRESQL
def test_a_syntax_error_prevents_a_restart_and_not_the_work(own_farm: Farm, tmp_path: Path) -> None:
    conf = tmp_path / "conf.py"
    conf.write_text("aque_cpus = '2'\n")
    worker = own_farm.start_worker("-c", "1", env={"PYTHONPATH": str(tmp_path), "CELERY_CONFIG_MODULE": "conf"})
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    conf.write_text("aque_cpus = '3\n")
    worker.deliver(signal.SIGHUP)
    wait_until(lambda: "does not restart" in worker.log(), LIMIT, "it says so")
    assert f"{conf}, line 1: unterminated string literal" in worker.log()
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2
    conf.write_text("aque_cpus = '3'\n")
    restart(worker)
    wait_until(lambda: [row.info.cpus for row in own_farm.live()] == ["3"], LIMIT, "it has loaded the file")
    talker.finish()
    talker.assert_that_it_ran_once(own_farm)


@ON_SQLITE
def test_a_worker_with_reload_runs_the_new_code_of_a_module_that_only_its_pool_has_imported(
    own_farm: Farm, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "late.py").write_text("def version():\n    return 1\n")
    environment = {"PYTHONPATH": str(code)}
    words = ("aque", "worker", "--reload", "-c", "1", "-n", "one@test")
    worker = Worker(own_farm, "one@test", own_farm.start_program(*words, env=environment))
    own_farm.workers.append(worker)
    worker.wait_until_it_claims()

    def version() -> str:
        called = [PROGRAMS / "aque", "call", "--wait", "late:version"]
        return subprocess.check_output(called, env={**own_farm.environment, **environment}, text=True).strip()

    assert version() == "1"
    (code / "late.py").write_text("def version(:\n")
    (code / "late.py").write_text("def version():\n    return 'second'\n")
    wait_until(lambda: version() == '"second"', LIMIT, "the new code runs")
    (code / "late.py").write_text("def version(:\n")
    wait_until(lambda: "this worker goes on as it is" in worker.log(), LIMIT, "it says what is wrong")
    assert f"{code / 'late.py'}, line 1: " in worker.log()
    assert aque.shell(["true"]).get(timeout=LIMIT)["exit_code"] == 0
    assert restarts(worker) >= 1


@ON_POSTGRESQL
def test_aque_worker_restarts_with_its_own_words_and_keeps_its_pid_file(own_farm: Farm, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    program = own_farm.start_program("aque", "worker", "-c", "1", "-n", "two@test", "--", "--pidfile", str(pidfile))
    worker = Worker(own_farm, "two@test", program)
    own_farm.workers.append(worker)
    worker.wait_until_it_claims()
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    assert comm(worker.pid) == "aque-worker"
    inode = pidfile.stat().st_ino
    missing, enough = [], threading.Event()

    def look() -> None:
        while not enough.wait(0.002):
            if not pidfile.exists():
                missing.append(time.monotonic())

    looking = threading.Thread(target=look)
    looking.start()
    restart(worker)
    talker.finish()
    talker.assert_that_it_ran_once(own_farm)
    enough.set()
    looking.join()
    assert (comm(worker.pid), pidfile.read_text().strip()) == ("aque-worker", str(worker.pid))
    assert len(missing) <= 5, inode  # Celery's new image writes it anew
    worker.stop()
    assert not pidfile.exists()


@ON_SQLITE
def test_a_worker_whose_terminal_is_gone_stops(own_farm: Farm, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [
        "-c",
        f"exec {sys.executable} -m celery -A aque.celery_app worker -n one@test -c 1 -l info <{os.ttyname(theirs)}",
    ]
    worker = Worker(own_farm, "one@test", own_farm.start_program("sh", *words))
    own_farm.workers.append(worker)
    worker.wait_until_it_claims()
    os.close(theirs)
    restart(worker)  # by hand, the terminal is there: a restart like any other
    os.close(ours)
    worker.deliver(signal.SIGHUP)
    wait_until(lambda: not worker.running(), LIMIT, "it has ended")
    assert (worker.process.process.returncode, own_farm.live()) == (0, [])


# -- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGQUIT])
def test_a_second_signal_gives_everything_back_at_once(own_farm: Farm, tmp_path: Path, second: signal.Signals) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, drain_seconds=600)
    talker = Talker(tmp_path)
    path = tmp_path / "started"
    function = tasks.started.apply_async((str(path), str(tmp_path / "never")), cpus=0.5)
    wait_until(path.exists, LIMIT, "it runs")
    talker.wait_until_it_runs()
    worker.deliver(signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in worker.log(), LIMIT, "it has heard")
    worker.stop(second)
    assert talker.processes() == []
    for task in (talker.task, function):
        row = own_farm.row(task)
        assert (row["state"], row["lost"], own_farm.attempts(task)) == ("ready", 0, [(1, "given back", None)])


def test_a_quit_after_a_restart_gives_back_what_was_handed_over(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, drain_seconds=60)
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    restart(worker)
    worker.stop(signal.SIGQUIT)
    row = own_farm.row(talker.task)
    assert (row["state"], row["lost"], talker.processes()) == ("ready", 0, [])
    assert own_farm.attempts(talker.task) == [(1, "given back", None)]


# -- the database -----------------------------------------------------------------------------------------------------


def test_a_restart_while_postgresql_is_away_loses_nothing(own_postgresql: PostgreSQL, tmp_path: Path) -> None:
    with Farm(own_postgresql.url, tmp_path) as farm, farm.entered():
        worker = farm.start_worker("-c", "1", cpus=2, lease_seconds=1)
        across, ending = Talker(tmp_path), Talker(tmp_path)
        for talker in (across, ending):
            talker.wait_until_it_runs()
        own_postgresql.stop("fast")
        ending.finish()  # its end is in the memory of the old image alone
        wait_until(lambda: not ending.processes(), LIMIT, "it is over")
        restart(worker)
        own_postgresql.start()
        farm.store.close()  # this process's connections are gone too
        across.finish()
        for talker in (across, ending):
            talker.assert_that_it_ran_once(farm)
        assert farm.findings() == []


@ON_POSTGRESQL
def test_what_runs_is_killed_and_runs_again_if_the_new_image_cannot_start(own_farm: Farm, tmp_path: Path) -> None:
    conf = tmp_path / "conf.py"
    conf.write_text("aque_cpus = '2'\n")
    worker = own_farm.start_worker("-c", "1", env={"PYTHONPATH": str(tmp_path), "CELERY_CONFIG_MODULE": "conf"})
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    old = talker.processes()
    conf.write_text("raise RuntimeError('no syntax error, and no configuration either')\n")
    worker.deliver(signal.SIGHUP)
    wait_until(lambda: not worker.running(), LIMIT, "it has ended")
    own_farm.start_worker("-c", "1", cpus=2, name="next")
    talker.wait_until_it_runs(2)
    assert not [process for process in old if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    talker.finish()
    own_farm.wait_for_state(talker.task, "success")
    assert own_farm.attempts(talker.task) == [(1, "lost", "worker_lost")]


@ON_SQLITE
def test_a_new_image_that_cannot_read_what_the_old_one_left_gives_everything_back(
    own_farm: Farm, tmp_path: Path
) -> None:
    conf = tmp_path / "conf.py"
    conf.write_text("aque_cpus = '2'\n")
    worker = own_farm.start_worker("-c", "1", env={"PYTHONPATH": str(tmp_path), "CELERY_CONFIG_MODULE": "conf"})
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    row, old = ids(own_farm), talker.processes()
    conf.write_text("from aque import restart\nrestart._format = lambda: 'of another version'\n")
    worker.deliver(signal.SIGHUP)
    talker.wait_until_it_runs(2)
    assert not [process for process in old if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert (ids(own_farm), own_farm.row(talker.task)["lost"]) == (row, 0)
    assert own_farm.attempts(talker.task) == [(1, "given back", None)]
    talker.finish()
    own_farm.wait_for_state(talker.task, "success")


@ON_POSTGRESQL
def test_an_ordinary_task_of_the_app_ends_before_the_restart(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, app="tests.worker.ordinary")
    client = own_farm.client()
    path, gate = tmp_path / "started", tmp_path / "gate"
    client.send_task("tests.worker.ordinary.wait", (str(path), str(gate)))
    wait_until(path.exists, LIMIT, "it runs")
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    worker.deliver(signal.SIGHUP)
    wait_until(lambda: "restarting:" in worker.log(), LIMIT, "it has heard")
    assert aque.shell(["true"], cpus=0.1).get(timeout=LIMIT)["exit_code"] == 0
    assert restarts(worker) == 0
    gate.touch()
    wait_until(lambda: restarts(worker) == 1, LIMIT, "the new image goes on")
    talker.finish()
    talker.assert_that_it_ran_once(own_farm)
    assert path.read_text() == "once\n"
    client.close()


@ON_SQLITE
def test_the_grace_of_a_kill_goes_on_across_a_restart(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2)
    told = tmp_path / "told"
    told_by_term = 'echo told >>"$1"; until [ -e "$1.go" ]; do sleep 0.02; done; exit 7'
    text = f"trap '{told_by_term}' TERM; echo up; while :; do sleep 0.02; done"
    task = aque.shell(["sh", "-c", text, "sh", str(told)], cpus=0.25)
    wait_until(lambda: own_farm.output(task) == b"up\n", LIMIT, "it runs")
    control.kill(own_farm.store, [task.number], signal.SIGTERM, grace_seconds=600)
    wait_until(told.exists, LIMIT, "it was told")
    restart(worker)
    assert aque.shell(["echo", "next"], cpus=0.25).get(timeout=LIMIT)["stdout"] == "next\n"
    assert own_farm.state(task) == "running"
    (tmp_path / "told.go").touch()
    row = own_farm.wait_for_state(task, "killed")
    assert (row["exit_code"], told.read_text()) == (7, "told\n"), "it was told once, and ended by itself"
