"""Five HUPs in two seconds and an edit under --reload, while commands and functions run.

    python -m tests.faults.hangups [--broker URL] [--seconds 30]

On a private PostgreSQL and on SQLite. Exit status 1 if a command changed its pid or ran twice, a function did not run once, or
more than one process is called aque-worker.
"""

import argparse
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import aque
from tests.faults.flood import check
from tests.servers import PostgreSQL, wait_until
from tests.worker import tasks
from tests.worker.farm import ROOT, Farm
from tests.worker.test_restart import ids, named_aque_worker, restarts

LIMIT = 300
#: Notes its pid, writes a line twice a second for so many seconds, and notes that it has ended.
COMMAND = (
    'echo "$$" >>"$1"; i=0; while [ $i -lt "$2" ]; do i=$((i+1)); echo "line $i"; sleep 0.5; done; echo end >>"$1"'
)


def measure(farm: Farm, directory: Path, seconds: float) -> bool:
    """One worker; True if all is as promised."""
    code = directory / "project"
    code.mkdir()
    (code / "conf.py").write_text("aque_reload = True\naque_cpus = '30'\n")
    environment = {"PYTHONPATH": str(ROOT), "CELERY_CONFIG_MODULE": "conf"}
    worker = farm.start_worker("-c", "2", cwd=code, env=environment, drain_seconds=60)
    pid, row, lines = worker.pid, ids(farm), int(2 * seconds)
    files = [directory / f"command-{n}" for n in range(20)]
    commands = [aque.shell(["sh", "-c", COMMAND, "sh", str(file), str(lines)], cpus=0.5) for file in files]
    record = directory / "record"
    functions = [tasks.record.apply_async((str(record),), cpus=0.1) for _ in range(20)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), LIMIT, "all commands run")
    before = [file.read_text() for file in files]
    began = time.monotonic()
    for n in range(5):
        wait_until(lambda due=began + 0.4 * n: time.monotonic() >= due)  # type: ignore[misc]
        worker.deliver(signal.SIGHUP)
    hangups = time.monotonic() - began
    wait_until(lambda: restarts(worker) >= 1, LIMIT, "the new image goes on")
    (code / "conf.py").write_text("aque_reload = True\naque_cpus = '29'\n")
    wait_until(lambda: [row.info.cpus for row in farm.live()] == ["29"], LIMIT, "it has loaded the edit")
    good = check(
        "restarts", 2 <= restarts(worker) <= 6, f"{restarts(worker)}, after five HUPs in {hangups:.1f} s and an edit"
    )
    good &= check("the worker", (worker.pid, ids(farm)) == (pid, row), "the same pid, the same row")
    good &= check("processes called aque-worker", named_aque_worker(worker) == [pid], str(named_aque_worker(worker)))
    states = {farm.wait_for_state(task, "success", "error", "killed")["state"] for task in commands}
    once = [file.read_text() for file in files] == [f"{text.split()[0]}\nend\n" for text in before]
    good &= check(
        f"{len(files)} commands of {seconds:g} s", states == {"success"} and once, "one start each, the pid it had"
    )
    whole = b"".join(b"line %d\n" % n for n in range(1, lines + 1))
    good &= check(
        "their output", all(farm.output(task) == whole for task in commands), f"{len(whole)} bytes each, exact"
    )
    rows = [farm.wait_for_state(task, "success") for task in (*commands, *functions)]
    good &= check("attempts", {(row["attempt"], row["lost"]) for row in rows} == {(1, 0)}, "1 each, none lost")
    ran = sorted(record.read_text().split()) == sorted(function.id for function in functions)
    good &= check(f"{len(functions)} functions", ran, "one run each")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.hangups", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--broker", help="an empty store, as AQUE_BROKER names it; else both kinds")
    parser.add_argument("--seconds", type=float, default=30, help="how long each of the 20 commands takes (30)")
    chosen = parser.parse_args()
    good = True
    for kind in [chosen.broker] if chosen.broker else ["postgresql", "sqlite"]:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aque-hangups-")))
            url = f"sqlite:///{directory / 'aque.db'}" if kind == "sqlite" else kind
            url = stack.enter_context(PostgreSQL()).url if kind == "postgresql" else url
            farm = stack.enter_context(Farm(url, directory))
            stack.enter_context(farm.entered())
            print(kind)
            good &= measure(farm, directory, chosen.seconds)
            good &= check("the doctor", farm.findings() == [], "")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
