"""Workers in a thread of one process, started and stopped again and again: what they leave there.

python -m tests.faults.embedded [POOL] [CYCLES] [BROKER]     (solo, threads or prefork; 50 times; a file of its own)

Prints one JSON object: what the process had after the second cycle (in the first one modules are imported and caches filled)
and what it had after the last one. The two are equal, but for some memory. With prefork a pool child is killed in each cycle;
processes that the program itself has started must live.
"""

import atexit
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import celery.contrib.testing.tasks  # noqa: F401  the ping by which `start_worker` sees that the worker works
import psutil
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker

import aque
from tests.servers import text_of, wait_until
from tests.worker import tasks

PR_GET_CHILD_SUBREAPER = 37


def main(pool: str = "solo", cycles: str = "50", broker: str = "") -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="aque-") as directory:
        os.environ |= {"AQUE_BROKER": broker or f"sqlite:///{directory}/aque.db", "AQUE_STATE_DIR": directory}
        os.environ |= {"AQUE_LEASE_SECONDS": "3", "AQUE_KILL_GRACE_SECONDS": "0.5", "AQUE_ALLOW_ROOT_TASKS": "yes"}
        mine = subprocess.Popen(["sleep", "1000"])
        # In a session of its own, with its parent gone: in a worker's own process it would be a stranger.
        subprocess.run(["sh", "-c", f"setsid sleep 1000 & echo $! > {directory}/orphan"], check=True)
        orphan = int(Path(directory, "orphan").read_text())
        looks = []
        try:
            for cycle in range(int(cycles)):
                _cycle(pool, cycle, Path(directory))
                looks.append(_look(mine.pid, cycle))
            lives = psutil.pid_exists(orphan) and mine.poll() is None
        finally:
            mine.kill()
            os.kill(orphan, signal.SIGKILL)
        return {"pool": pool, "cycles": cycles, "first": looks[1], "last": looks[-1], "others live": lives}


def _cycle(pool: str, cycle: int, directory: Path) -> None:
    app = aque.App("embedded", set_as_current=False)
    queues = dict(app.amqp.queues)
    with setup_default_app(app):
        with start_worker(app, pool=pool, concurrency=2, shutdown_timeout=30.0):
            assert tasks.add.delay(cycle, 1).get(timeout=30) == cycle + 1
            assert aque.shell(["echo", "hello"]).get(timeout=30)["stdout"] == "hello\n"
            if pool == "prefork":
                _kill_child(directory / f"started-{cycle}")
        assert dict(app.amqp.queues) == queues
        assert app.conf.result_backend == f"aque+{os.environ['AQUE_BROKER']}"
        bus = app.conf.result_backend.replace("aque.db", "aque-bus.db")
        assert app.conf.broker_url == bus


def _kill_child(path: Path) -> None:
    """Kill a child of the pool in the middle of a task, which then runs once more."""
    task = tasks.started.delay(str(path), str(path) + ".gate")
    os.kill(int(text_of(path, 30).split()[1]), signal.SIGKILL)
    Path(f"{path}.gate").touch()
    assert task.get(timeout=30) == 2


def _look(mine: int, cycle: int) -> dict[str, Any]:
    """What belongs to this process now."""
    gc.collect()
    with suppress(AssertionError):  # a thread that was told to end has a moment for it
        wait_until(lambda: threading.active_count() == 1, 2)
    me = psutil.Process()
    is_subreaper = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(is_subreaper), 0, 0, 0)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AQUE_")}
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": me.num_fds(),
        "children": [child.pid for child in me.children(recursive=True) if child.pid != mine],
        "is_subreaper": bool(is_subreaper.value),
        "name": [me.name(), me.cmdline()],
        "path": sys.path,
        "environment": environment,
        "handlers": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "exit functions": atexit._ncallbacks() - cycle,  # billiard leaves one whenever Celery sets up its logs
        "apps": sum(1 for thing in gc.get_objects() if isinstance(thing, aque.App)),
        "rss_bytes": me.memory_info().rss,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:]), indent=1))
