"""HUP: the worker's program is started anew in the same process; commands go on, and nothing runs twice."""

import os
import pty
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

import aque
from tests.conftest import start
from tests.servers import PostgreSQL, wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, ROOT, Farm, Worker, processes_with

LIMIT = LIMIT_SECONDS
#: Writes numbered lines until there is the file of the test, at once and without end; then how many it has written.
TALKER = (
    'echo "$AQUE_ATTEMPT $$" >>"$1"; n=0; until [ -e "$2" ]; do n=$((n+1)); echo "line $n"; sleep 0.01; done; '
    'echo "$n" >"$1.lines"; echo error >&2'
)


class Talker:
    """A command that writes all the time, until the test lets it end."""

    def __init__(self, directory: Path, **options: object) -> None:
        name = uuid4().hex
        self.path, self.gate = directory / f"started-{name}", directory / f"gate-{name}"
        self.mark = f"TEST_MARK={name}"
        words = ["env", self.mark, "sh", "-c", f"setsid sleep 1000 & {TALKER}", "sh", str(self.path), str(self.gate)]
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


# -- names ------------------------------------------------------------------------------------------------------------


def test_only_the_worker_itself_is_called_aque_worker(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "2")
    talker = Talker(tmp_path)
    talker.wait_until_it_runs()
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2
    assert comm(worker.pid) == "aque-worker"
    assert " ".join(psutil.Process(worker.pid).cmdline()).startswith("aque-worker")
    others = psutil.Process(worker.pid).children(recursive=True)
    assert len(others) >= 5
    assert "aque-worker" not in {process.name() for process in others}
    assert len(worker.pool_children()) == 2
    talker.finish()
    talker.assert_that_it_ran_once(own_farm)


# -- HUP --------------------------------------------------------------------------------------------------------------


def test_commands_go_on_across_a_restart_and_are_recorded_byte_for_byte(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2)
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
