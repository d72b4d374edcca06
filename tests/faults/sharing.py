"""What many share: a limit over four workers, one of which is killed, and one worker between two users.

    python -m tests.faults.sharing [--tasks 20000]

On a private PostgreSQL. Prints how many tasks ran at once under a limit of 3, looked at a hundred times a second, how long
after a kill -9 of a holder's worker its token was free, and how long ten tasks of one user took while the other had many
waiting. Exit status 1 if a promise is missed; the part with two users needs root.
"""

import argparse
import signal
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import aque
from aque import control
from tests.faults.flood import check
from tests.servers import PostgreSQL, wait_until
from tests.users import two_users
from tests.worker.farm import Farm

LIMIT = 300
LEASE_SECONDS = 3.0


class Sampler:
    """Counts running tasks and held tokens a hundred times a second."""

    def __init__(self, farm: Farm) -> None:
        self.most = self.held = self.samples = 0
        self._over = threading.Event()
        self._farm = farm
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        running = "SELECT count(*) FROM aque_task WHERE state = 'running' AND name = 'limited'"
        held = "SELECT count(*) FROM aque_token WHERE task_id IS NOT NULL"
        with self._farm.store.connect() as connection:
            due = time.monotonic()
            while not self._over.wait(max(due - time.monotonic(), 0)):
                due += 0.01
                self.samples += 1
                self.most = max(self.most, connection.exec_driver_sql(running).scalar_one())
                self.held = max(self.held, connection.exec_driver_sql(held).scalar_one())


def a_limit(farm: Farm) -> bool:
    """Four workers, 200 tasks of 0.1 s that take a token of three, and a kill -9."""
    control.set_limit(farm.store, "nuke", 3)
    workers = {w.name: w for w in (farm.start_worker("-c", "1", name=f"w{n}", cpus=4) for n in range(4))}
    with Sampler(farm) as sampler:
        held = aque.shell(["sleep", "60"], name="limited", limits="nuke", priority=9, requeue=False)
        wait_until(lambda: farm.state(held) == "running", LIMIT, "a task holds a token")
        with aque.graph() as job:
            for _ in range(200):
                aque.shell(["sleep", "0.1"], name="limited", limits="nuke", cpus=0.5)
        wait_until(lambda: farm.counts().get("success", 0) > 40, LIMIT, "many have run")
        workers[farm.row(held)["worker"]].deliver(signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: not tokens_of(farm, held), LIMIT, "its token is free")
        freed = time.monotonic() - began
        job.handle.get(timeout=LIMIT)
    good = check("a limit of 3 on four workers", sampler.most == 3 == sampler.held, f"{sampler.most} at once at most, "
                 f"{sampler.held} tokens held, in {sampler.samples} samples")  # fmt: skip
    good &= check("kill -9 of a holder's worker", freed <= LEASE_SECONDS + 1, f"its token is free after {freed:.2f} s")
    farm.kill_everything()
    return good


def tokens_of(farm: Farm, task: aque.Handle) -> int:
    with farm.store.connect() as connection:
        held = f"SELECT count(*) FROM aque_token WHERE task_id = {int(task.id)}"
        return int(connection.exec_driver_sql(held).scalar_one())


def two_of_them(farm: Farm, count: int) -> bool:
    """One worker of two CPUs; `count` tasks of one user, then ten of another."""
    with two_users() as (anna, bob):
        with aque.graph():
            for _ in range(count):
                aque.shell(["sleep", "0.5"], user=anna.name, cwd="/", cpus=1)
        wait_until(lambda: farm.counts().get("running", 0) >= 2, LIMIT, "hers run")
        began = time.monotonic()
        few = [aque.shell(["sleep", "0.5"], user=bob.name, cwd="/", cpus=1) for _ in range(10)]
        for task in few:
            task.get(timeout=LIMIT)
        took = time.monotonic() - began
        starts = [(farm.row(task)["started_at"] - farm.row(task)["submitted_at"]).total_seconds() for task in few]
        left = farm.counts().get("ready", 0)
        farm.kill_everything()
    text = f"the last of ten started after {max(starts):.1f} s, all had ended after {took:.1f} s; {left} of hers still wait"
    return check(f"two users, one with {count} tasks", max(starts) < 15 and left > count - 200, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.sharing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", type=int, default=20_000, help="of the user who has many (20000)")
    chosen = parser.parse_args()
    good = True
    for part in (a_limit, lambda farm: two_of_them(farm, chosen.tasks)):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aque-sharing-")))
            url = stack.enter_context(PostgreSQL()).url
            farm = stack.enter_context(Farm(url, directory, lease_seconds=LEASE_SECONDS))
            stack.enter_context(farm.entered())
            if part is not a_limit:
                farm.start_worker("-c", "1", cpus=2)
            good &= part(farm)
            good &= check("the doctor", farm.findings() == [], "")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
