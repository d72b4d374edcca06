"""A random layered graph on several workers, with trouble in the middle, and what became of it.

    python -m tests.faults.dag --tasks 10000 --broker postgresql://postgres@127.0.0.1/test --kill
    python -m tests.faults.dag --tasks 10000 --redis stop --seconds 10      # or: --redis pause

Half of the tasks are Python functions, half are commands; each appends its id to a file with one write.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aque
from tests.servers import PostgreSQL, Redis, wait_until
from tests.worker import tasks
from tests.worker.farm import Farm, Worker

APPEND = 'echo "$AQUE_TASK_ID" >>"$1"'
WORKER = ("-c", "2")


@dataclass
class Found:
    """What became of a graph."""

    states: dict[str, int]
    lost: int  #: attempts that were lost
    runs: int  #: lines in the file: tasks that were started again have several
    never_ran: list[int] = field(default_factory=list)
    out_of_order: list[tuple[int, int]] = field(default_factory=list)  #: (task, dependency)
    findings: list[str] = field(default_factory=list)  #: the doctor's
    seconds: float = 0.0

    @property
    def is_sound(self) -> bool:
        return set(self.states) == {"success"} and not (self.never_ran or self.out_of_order or self.findings)


class Dag:
    """A graph of tasks, each of which depends on up to three of the two layers above its own."""

    def __init__(self, farm: Farm, directory: Path, count: int, seed: int) -> None:
        self.farm = farm
        self.path = directory / "runs"
        self.edges: dict[int, list[int]] = {}
        choose = random.Random(seed)
        width = max(4, round(count**0.5))
        layers: list[list[aque.Handle]] = [[]]
        with aque.graph(f"dag of {count}") as self.job:
            for number in range(count):
                if number % width == 0:
                    layers.append([])
                above = layers[-2] + (layers[-3] if len(layers) > 2 else [])
                upstream = choose.sample(above, min(len(above), choose.randint(1, 3)))
                if number % 2:
                    task = tasks.record.apply_async((str(self.path),), depends_on=upstream, cpus=0.5)
                else:
                    task = aque.shell(["sh", "-c", APPEND, "sh", str(self.path)], depends_on=upstream, cpus=0.5)
                layers[-1].append(task)
                self.edges[int(task.id)] = [int(one.id) for one in upstream]

    def done(self) -> int:
        """How many tasks have succeeded; the job itself is one more."""
        return self.farm.counts().get("success", 0)

    def wait_until_done(self, share: float, limit: float) -> None:
        wait_until(lambda: self.done() >= share * len(self.edges), limit, f"{share:.0%} of the tasks are done")

    def wait_until_over(self, limit: float) -> None:
        wait_until(
            lambda: self.farm.state(self.job.id) in ("success", "error", "killed", "cancelled", "skipped"),
            limit,
            "the graph is over",
        )

    def found(self) -> Found:
        """Compare the table with the file."""
        with self.farm.store.connect() as connection:
            rows = list(self.farm.store.tasks(connection, None, ["id", "state", "lost"]))
        lines = [int(line) for line in self.path.read_text().split()] if self.path.exists() else []
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for position, task_id in enumerate(lines):
            first.setdefault(task_id, position)
            last[task_id] = position
        states: dict[str, int] = {}
        for row in rows:
            states[row["state"]] = states.get(row["state"], 0) + 1
        return Found(
            states,
            sum(row["lost"] for row in rows),
            len(lines),
            [task_id for task_id in self.edges if task_id not in first],
            [
                (task_id, other)
                for task_id, upstream in self.edges.items()
                for other in upstream
                if task_id in first and other in last and last[other] > first[task_id]
            ],
            [f"{finding.rule}: {finding.ids[:5]}" for finding in self.farm.findings()],
        )


def run(
    farm: Farm,
    directory: Path,
    count: int,
    trouble: Callable[[list[Worker]], None],
    *,
    seed: int = 1,
    at: float = 0.4,
    workers: int = 2,
    limit: float = 120,
) -> Found:
    """Submit `count` tasks, let `workers` run them, make `trouble` when the share `at` of them is done, wait for all."""
    with farm.entered():
        dag = Dag(farm, directory, count, seed)
        began = time.monotonic()
        started = [farm.start_worker(*WORKER, name=f"worker{n}", cpus=2) for n in range(workers)]
        dag.wait_until_done(at, limit)
        trouble(started)
        dag.wait_until_over(limit)
        found = dag.found()
        found.seconds = time.monotonic() - began
        return found


def kill_one_and_start_another(workers: list[Worker]) -> None:
    """The first worker dies as if the machine had run out of memory."""
    farm = workers[0].farm
    workers[0].kill()
    farm.start_worker(*WORKER, name="another", cpus=2)


@contextmanager
def _farm(broker: str | None, redis: Redis | None, directory: Path) -> Iterator[Farm]:
    chosen = {"celery_broker": redis.url} if redis else {}
    with ExitStack() as stack:
        url = broker or stack.enter_context(PostgreSQL()).url
        yield stack.enter_context(Farm(url, directory, **chosen))


def main() -> int:
    """Print what was found; 0 if every task succeeded once, in order, in a sound store."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.dag", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--broker", help="an empty store, as AQUE_BROKER names it; else a private PostgreSQL")
    parser.add_argument("--workers", type=int, default=2, help="how many (2)")
    parser.add_argument("--seed", type=int, default=1, help="of the graph (1)")
    parser.add_argument("--kill", action="store_true", help="kill -9 one worker in the middle, and start another")
    parser.add_argument(
        "--redis", choices=["run", "stop", "pause"], help="a private Redis as AQUE_CELERY_BROKER, and its fate"
    )
    parser.add_argument("--seconds", type=float, default=10, help="how long Redis stays away (10)")
    parser.add_argument("--limit", type=float, default=900, help="give up after so many seconds (900)")
    chosen = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aque-dag-")))
        redis = stack.enter_context(Redis()) if chosen.redis else None
        farm = stack.enter_context(_farm(chosen.broker, redis, directory))

        def trouble(workers: list[Worker]) -> None:
            if chosen.kill:
                kill_one_and_start_another(workers)
            if redis and chosen.redis != "run":
                redis.stop("kill") if chosen.redis == "stop" else redis.pause()
                time.sleep(chosen.seconds)
                redis.start() if chosen.redis == "stop" else redis.resume()

        found = run(
            farm, directory, chosen.tasks, trouble, seed=chosen.seed, workers=chosen.workers, limit=chosen.limit
        )
    print(f"tasks by state: {found.states} (with the job itself)")
    print(f"runs: {found.runs}, attempts lost: {found.lost}, seconds: {found.seconds:.1f}")
    print(
        f"never ran: {found.never_ran[:10]}, out of order: {found.out_of_order[:10]}, doctor: {found.findings or 'clean'}"
    )
    return 0 if found.is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
