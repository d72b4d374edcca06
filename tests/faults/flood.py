"""A gigabyte of output, a million lines and every byte: what is kept, what it costs the worker, and what others notice.

    python -m tests.faults.flood [--bytes 1000000000] [--broker URL]

On a private PostgreSQL and on SQLite, each with a real worker. Exit status 1 if a digest is wrong, the worker grew by more than
64 MiB, or the output of another task came more than twice as late as without the flood.
"""

import argparse
import array
import hashlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil

import aque
from tests.servers import PostgreSQL, wait_until
from tests.worker.farm import Farm

GROWTH_MIB, RATIO = 64, 2.0
LIMIT_SECONDS = 600
PROBES = 30
#: Writes so many bytes, each 8-byte word the number of the word: any byte lost or moved is seen.
COUNT = "import os, sys, array; n = int(sys.argv[1]) // 8; f = lambda a, b: array.array('Q', range(a, b)).tobytes()\n"
COUNT += "for a in range(0, n, 1 << 16):\n  d = f(a, min(n, a + (1 << 16)))\n  while d: d = d[os.write(1, d):]"


def words(first: int, last: int) -> bytes:
    """The bytes of `COUNT`'s words from `first` up to `last`."""
    return array.array("Q", range(first, last)).tobytes()


def probe(farm: Farm) -> float:
    """Seconds from the submission of a command that prints a line to that line in the table."""
    began = time.perf_counter()
    task = aque.shell(["sh", "-c", "echo line; sleep 0.4"], cpus=0)
    wait_until(lambda: farm.output(task) == b"line\n", LIMIT_SECONDS, "the line is in the table")
    return time.perf_counter() - began


def check(what: str, right: bool, figures: str) -> bool:
    print(f"    {what:42} {'ok ' if right else 'BAD'} {figures}", flush=True)
    return right


def measure(farm: Farm, size: int) -> bool:
    """Everything on one farm; True if all is as promised."""
    limit = 32 << 20
    head, tail = limit - limit // 4 * 2, limit // 4
    worker = farm.start_worker("-c", "1", cpus=4, output_limit_bytes=limit)
    process = psutil.Process(worker.pid)
    quiet = [probe(farm) for _ in range(PROBES)]
    before, most, over = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    task = aque.shell([sys.executable, "-c", COUNT, str(size)])
    flooded = []
    while farm.state(task) in ("ready", "claimed", "running") or len(flooded) < PROBES:
        flooded.append(probe(farm))
        if farm.state(task) == "success" and len(flooded) < PROBES:
            task = aque.shell([sys.executable, "-c", COUNT, str(size)])
    took = time.perf_counter() - began
    over.set()
    watching.join()
    kept, n = farm.output(task), size // 8
    mark = b"\n[aque: %d bytes are cut out here]\n" % (n * 8 - head - tail)
    good = check(
        f"{size / 1e9:g} GB: start, mark and end", kept == words(0, head // 8) + mark + words(n - tail // 8, n), ""
    )
    good &= check("    flagged on the task", farm.row(task)["truncated"] is True, f"{took:.1f} s of floods")
    growth = (most[0] - before) / (1 << 20)
    good &= check("    growth of the worker", growth <= GROWTH_MIB, f"{growth:.1f} MiB (at most {GROWTH_MIB})")
    ratio = statistics.median(flooded) / statistics.median(quiet)
    figures = f"{1e3 * statistics.median(quiet):.0f} -> {1e3 * statistics.median(flooded):.0f} ms, {ratio:.2f}x"
    good &= check("    output of other tasks, median", ratio <= RATIO, f"{figures} (at most {RATIO:g}x)")
    good &= check("a million lines", *_whole(farm, ["seq", "1000000"], _lines))
    good &= check(
        "every byte, 10,000 times", *_whole(farm, [sys.executable, "-c", EVERY], lambda: bytes(range(256)) * 10_000)
    )
    return good


EVERY = "import os; d = bytes(range(256)) * 10000\nwhile d: d = d[os.write(1, d):]"


def _lines() -> bytes:
    return b"".join(b"%d\n" % number for number in range(1, 1_000_001))


def _whole(farm: Farm, argv: list[str], expected: Callable[[], bytes]) -> tuple[bool, str]:
    began = time.perf_counter()
    task = aque.shell(argv)
    task.get(timeout=LIMIT_SECONDS)
    took = time.perf_counter() - began
    found, wanted = (hashlib.sha256(data).hexdigest()[:12] for data in (farm.output(task), expected()))
    return found == wanted, f"sha256 {found} of {len(expected())} bytes, {took:.2f} s"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.flood", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--bytes", type=int, default=10**9, help="of the flood (1,000,000,000)")
    parser.add_argument("--broker", help="an empty store, as AQUE_BROKER names it; else both kinds")
    chosen = parser.parse_args()
    good = True
    for kind in [chosen.broker] if chosen.broker else ["postgresql", "sqlite"]:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aque-flood-")))
            url = f"sqlite:///{directory / 'aque.db'}" if kind == "sqlite" else kind
            url = stack.enter_context(PostgreSQL()).url if kind == "postgresql" else url
            farm = stack.enter_context(Farm(url, directory))
            stack.enter_context(farm.entered())
            print(kind)
            good &= measure(farm, chosen.bytes)
            good &= check("the doctor", farm.findings() == [], "")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
