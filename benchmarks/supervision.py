"""What supervision costs: time per command beside plain `subprocess`, and memory per running command.

    python -m benchmarks.supervision [--commands 2000] [--sleepers 200] [--rounds 3]

Both sides run /bin/true with stdout and stderr captured, one after the other and in turns. Memory is private (USS): what ends
with the process. Exit status 1 if a promise is missed.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time

import psutil

from aque.commands import CommandRunner
from aque.supervised import Command, Ended

TRUE = Command((b"/bin/true",), {b"PATH": b"/usr/bin:/bin"}, b"/")
SLEEP = Command((b"/bin/sleep", b"600"), {b"PATH": b"/usr/bin:/bin"}, b"/")
#: Promised: at most this much of the peer's time; MiB.
RATIO, MEMORY_MIB = 1.5, 4.0


def plain(count: int) -> float:
    """Seconds per command."""
    began = time.perf_counter()
    for _ in range(count):
        done = subprocess.run(["/bin/true"], capture_output=True, check=True, cwd="/", start_new_session=True)
        assert done.returncode == 0
    return (time.perf_counter() - began) / count


def supervised(runner: CommandRunner, count: int) -> float:
    """Seconds per command, until its end is known."""
    over = threading.Event()

    def on_ended(ended: Ended) -> None:
        assert ended.exit_code == 0, ended
        over.set()

    began = time.perf_counter()
    for _ in range(count):
        over.clear()
        runner.run(TRUE, lambda pid: None, lambda fd, offset, data: None, on_ended)
        assert over.wait(60)
    return (time.perf_counter() - began) / count


def memory_of_sleepers(runner: CommandRunner, count: int) -> tuple[float, float]:
    """Private and proportional MiB per running command: of its supervisor, not of the command itself."""
    started = threading.Semaphore(0)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    running = [
        runner.run(SLEEP, lambda pid: started.release(), lambda fd, offset, data: None, lambda ended: None)
        for _ in range(count)
    ]
    for _ in range(count):
        assert started.acquire(timeout=120)
    supervisors = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name() == "aque-superv" and process.pid not in before
    ]
    usage = [process.memory_full_info() for process in supervisors]
    for one in running:
        one.kill(9, 0)
    mib = 1 << 20
    return sum(found.uss for found in usage) / count / mib, sum(found.pss for found in usage) / count / mib


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.supervision")
    parser.add_argument("--commands", type=int, default=2000, help="short commands of each side and round (2000)")
    parser.add_argument("--sleepers", type=int, default=200, help="commands that run at once (200)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    chosen = parser.parse_args()
    runner = CommandRunner()
    runner.start()
    try:
        supervised(runner, 50), plain(50)
        pairs = []
        for number in range(chosen.rounds):
            sides = [lambda: plain(chosen.commands), lambda: supervised(runner, chosen.commands)]
            first, second = (side() for side in (sides if number % 2 == 0 else sides[::-1]))
            pairs.append((first, second) if number % 2 == 0 else (second, first))
        ratio = statistics.median(ours / peers for peers, ours in pairs)
        print(f"{chosen.commands} x /bin/true, captured, one after the other; {chosen.rounds} rounds")
        for name, index in (("subprocess.run", 0), ("supervised", 1)):
            print(f"    {name:15} {1000 * statistics.median(pair[index] for pair in pairs):6.2f} ms each")
        print(f"    ratio           {ratio:6.2f}     (promised: {RATIO})")
        private, shared = memory_of_sleepers(runner, chosen.sleepers)
        print(f"{chosen.sleepers} commands that sleep")
        print(f"    private         {private:6.2f} MiB per command (promised: {MEMORY_MIB:g}); {shared:.2f} MiB of PSS")
    finally:
        runner.stop(30)
    return 0 if ratio <= RATIO and private <= MEMORY_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
