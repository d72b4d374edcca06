"""Shapes of Celery's canvas, each with the right result: the same code on plain Celery with Redis, and on Aque.

    python -m tests.canvas.shapes                       # both, side by side; 0 if Aque is right in all
    python -m tests.canvas.shapes --only chord --store postgresql
    python -m tests.canvas.shapes --on aque             # without Redis

Right is what a person reads in the shape: the result, and how often each task runs. What Celery's documentation promises
counts; what this or that version of it happens to do does not.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import chain, chord, chunks, group
from celery.canvas import Signature
from celery.exceptions import TimeoutError as CeleryTimeoutError

from tests.canvas.shape_tasks import (
    RUNS,
    add,
    adds_to_chord,
    app,
    double,
    fail,
    identity,
    power,
    record,
    replaced_by_chain,
    replaced_by_group,
    replaced_by_task,
    second_time,
    stamps,
    total,
    with_error,
    with_id,
    without_result,
)
from tests.servers import Guarded, PostgreSQL, Redis, wait_until

ROOT = Path(__file__).parents[2]
APP = "tests.canvas.shape_tasks"
#: The result of a canvas that must fail: whichever error `get` raises, but not by waiting in vain.
ERROR = "an error"
TIMEOUT = "timeout"
#: Nothing has run for so long: nothing more will.
QUIET_SECONDS = 0.4
#: How long callbacks, which nobody waits for, may take after the result is there.
CALLBACK_SECONDS = 5.0


@dataclass(frozen=True)
class Shape:
    """One canvas."""

    name: str
    result: Any  #: the right one
    runs: Mapping[str, int]  #: how often each task runs; a name without arguments counts whatever they were
    run: Callable[[float], Any]  #: sends it, and returns what `get` does within so many seconds
    seconds: float
    is_quick: bool  #: for the tests


SHAPES: dict[str, Shape] = {}


def shape(
    name: str, result: Any, seconds: float = 15.0, is_quick: bool = True, **runs: int
) -> Callable[[Callable[[float], Any]], None]:
    """Add a function to SHAPES."""

    def keep(run: Callable[[float], Any]) -> None:
        assert name not in SHAPES
        SHAPES[name] = Shape(name, result, runs, run, seconds, is_quick)

    return keep


def simple(
    name: str, result: Any, build: Callable[[], Any], seconds: float = 15.0, is_quick: bool = True, **runs: int
) -> None:
    """A shape that is a signature, and what `delay().get()` returns."""
    shape(name, result, seconds, is_quick, **runs)(lambda limit: build().delay().get(timeout=limit))


# -- chains ---------------------------------------------------------------------------------------------------------------

simple("chain", 10, lambda: chain(add.s(1, 2), add.s(3), add.s(4)), add=3)
simple(
    "chain of 1,000", 1000, lambda: chain(add.s(0, 1), *[add.s(1) for _ in range(999)]), 60, is_quick=False, add=1000
)
simple("chain of immutable signatures", 4, lambda: chain(add.si(1, 1), add.si(2, 2)), add=2)
simple("chain with keyword arguments", 64, lambda: chain(power.s(2, exponent=3), power.s(exponent=2)), power=2)
simple("chain in chain in chain", 7, lambda: chain(add.s(1, 1), chain(add.s(1), chain(add.s(2), add.s(2)))), add=4)


@shape("partial signatures", [6, 9, 8], add=3)
def partial_signatures(limit: float) -> Any:
    partial = add.s(4)
    sent = [partial.delay(2), partial.clone((5,)).delay(), partial.apply_async((4,))]
    return [result.get(timeout=limit) for result in sent]


# -- groups ---------------------------------------------------------------------------------------------------------------

simple("group", [2, 4, 6], lambda: group(add.s(n, n) for n in (1, 2, 3)), add=3)
simple("group of one", [2], lambda: group([add.s(1, 1)]), add=1)
simple("empty group", [], lambda: group([]))
# Celery's way: a group in a group is a part of it.
simple("group in group", [1, 2, 3], lambda: group(group(identity.s(1), identity.s(2)), identity.s(3)), identity=3)
simple("group of chains", [4, 8], lambda: group(chain(double.s(n), double.s()) for n in (1, 2)), double=4)
# Celery's way, too: in a chain it is as if its only task were there.
simple("group of one in a chain", 1, lambda: chain(group([identity.si(1)]), identity.s()), identity=2)


@shape("group saved and restored", [1, 2], identity=2)
def group_restored(limit: float) -> Any:
    sent = group(identity.s(1), identity.s(2)).delay()
    sent.save()
    return app.GroupResult.restore(sent.id).get(timeout=limit)


# -- chords ---------------------------------------------------------------------------------------------------------------

simple("chord", 6, lambda: chord([identity.s(n) for n in (1, 2, 3)], total.s()), identity=3, total=1)
simple("chord with an empty header", 0, lambda: chord([], total.s()), total=1)
simple("chord of one", 1, lambda: chord([identity.s(1)], total.s()), identity=1, total=1)
simple(
    "chord whose body is a chain",
    12,
    lambda: chord([identity.s(2), identity.s(4)], total.s() | double.s()),
    identity=2,
    total=1,
    double=1,
)
simple(
    "chord whose body is a group",
    [3, 3],
    lambda: chord([identity.s(1), identity.s(2)], group(total.s(), total.s())),
    identity=2,
    total=2,
)
simple(
    "chord in chord",
    6,
    lambda: chord([chord([identity.s(1), identity.s(2)], total.s()), identity.s(3)], total.s()),
    identity=3,
    total=2,
)
simple(
    "10,000-wide chord",
    sum(range(10_000)),
    lambda: chord([identity.s(n) for n in range(10_000)], total.s()),
    300,
    is_quick=False,
    identity=10_000,
    total=1,
)
simple(
    "chord of chains of different lengths",
    5,
    lambda: chord([chain(identity.s(1), double.s(), double.s()), identity.s(1)], total.s()),
    identity=2,
    double=2,
    total=1,
)
# Who waits for it gets its value; it is not kept for others.
simple(
    "chord with a task that keeps no result",
    [1, 2],
    lambda: chord([without_result.s(1), identity.s(2)], identity.s()),
    without_result=1,
    identity=2,
)
simple(
    "chord with a task that is tried again",
    3,
    lambda: chord([second_time.s(1), identity.s(2)], total.s()),
    second_time=2,
    identity=1,
    total=1,
)

# -- mixed ----------------------------------------------------------------------------------------------------------------

simple(
    "chain | group | chain | chord",
    20,
    lambda: identity.s(1) | group(add.s(1), add.s(2)) | total.s() | group(double.s(), double.s()) | total.s(),
    identity=1,
    add=2,
    total=2,
    double=2,
)
simple(
    "chords in chains in groups",
    [8, 12],
    lambda: group(chain(identity.s(n), chord([double.s(), double.s()], total.s())) for n in (2, 3)),
    identity=2,
    double=4,
    total=2,
)
simple(
    "groups and chords four deep",
    8,
    lambda: chord(
        [
            chord([group(identity.s(1), identity.s(1)) | total.s(), chord([identity.s(2)], total.s())], total.s())
            | double.s()
        ],
        total.s(),
    ),
    identity=3,
    total=4,
    double=1,
)
simple(
    "layers: group | group | group",
    [9, 9, 9],
    lambda: chain(
        group(identity.si(n) for n in range(3)), group(total.s() for _ in range(3)), group(total.s() for _ in range(3))
    ),
    identity=3,
    total=6,
)
simple(
    "layers: five groups of four",
    [64 * 6] * 4,
    lambda: chain(group(identity.si(n) for n in range(4)), *[group(total.s() for _ in range(4)) for _ in range(4)]),
    30,
    identity=4,
    total=16,
)


@shape("a node shared by two branches", [6, 7], identity=1, add=2)
def shared_node(limit: float) -> Any:
    shared = identity.s(5)
    shared.freeze()
    return group(chain(shared, add.s(1)), chain(shared, add.s(2))).delay().get(timeout=limit)


# -- many calls in one ----------------------------------------------------------------------------------------------------

simple(
    "chunks", [[0, 2, 4, 6], [8, 10]], lambda: chunks(add.s(), [(n, n) for n in range(6)], 4, app=app).group(), add=6
)
simple("map", [2, 4, 6], lambda: double.map([1, 2, 3]), double=3)
simple("starmap", [3, 7], lambda: add.starmap([(1, 2), (3, 4)]), add=2)

# -- callbacks ------------------------------------------------------------------------------------------------------------


@shape("link", 2, add=1, **{"record [2, 5]": 1})
def link(limit: float) -> Any:
    return add.apply_async((1, 1), link=record.s(5)).get(timeout=limit)


@shape("link on a chord", 3, identity=2, total=1, **{"record [3]": 1})
def link_on_chord(limit: float) -> Any:
    return chord([identity.s(1), identity.s(2)], total.s()).apply_async(link=record.s()).get(timeout=limit)


@shape("link on a chain", 4, add=1, double=1, **{"record [4]": 1})
def link_on_chain(limit: float) -> Any:
    return chain(add.s(1, 1), double.s()).apply_async(link=record.s()).get(timeout=limit)


@shape("link on a group", [1, 2], identity=2, record=1)
def link_on_group(limit: float) -> Any:
    linked = group(identity.s(1), identity.s(2))
    linked.link(record.si())
    return linked.delay().get(timeout=limit)


@shape("link_error, with the error", ERROR, fail=1, **{"with_error ValueError": 1})
def link_error(limit: float) -> Any:
    return fail.apply_async((), link_error=with_error.s()).get(timeout=limit)


@shape("link_error, with the id", ERROR, fail=1, **{"with_id ValueError": 1})
def link_error_with_id(limit: float) -> Any:
    return fail.apply_async((), link_error=with_id.s()).get(timeout=limit)


@shape("two error callbacks", ERROR, fail=1, **{"with_error ValueError": 1, "with_id ValueError": 1})
def two_error_callbacks(limit: float) -> Any:
    return fail.apply_async((), link_error=[with_error.s(), with_id.s()]).get(timeout=limit)


simple(
    "on_error of a chain",
    ERROR,
    lambda: chain(identity.s(1), fail.s(), double.s()).on_error(with_error.s()),
    identity=1,
    fail=1,
    with_error=1,
)
simple(
    "on_error of a group",
    ERROR,
    lambda: group(identity.s(1), fail.s()).on_error(with_error.s()),
    identity=1,
    fail=1,
    with_error=1,
)
simple(
    "on_error of a chord",
    ERROR,
    lambda: chord([identity.s(1), fail.s()], total.s()).on_error(with_error.s()),
    identity=1,
    fail=1,
    with_error=1,
)
simple(
    "on_error of a chord of which two fail",
    ERROR,
    lambda: chord([fail.s(), identity.s(1), fail.s()], total.s()).on_error(with_error.s()),
    identity=1,
    fail=2,
    with_error=1,
)
simple(
    "error in a chord in a chain",
    ERROR,
    lambda: chain(identity.s(1), group(identity.s(), fail.s()), total.s(), double.s()).on_error(with_error.s()),
    identity=2,
    fail=1,
    with_error=1,
)

# -- tasks that become something else -------------------------------------------------------------------------------------

simple("replaced by a task", 7, lambda: chain(replaced_by_task.s(3), add.s(1)), replaced_by_task=1, double=1, add=1)
simple("replaced by a chain", 13, lambda: chain(replaced_by_chain.s(3), add.s(1)), replaced_by_chain=1, double=2, add=1)
simple(
    "replaced by a group",
    [2, 4],
    lambda: chain(identity.s([1, 2]), replaced_by_group.s()),
    identity=1,
    replaced_by_group=1,
    double=2,
)
simple(
    "replaced by a group in a chord",
    [[2, 4], 3],
    lambda: chord([replaced_by_group.s([1, 2]), identity.s(3)], identity.s()),
    replaced_by_group=1,
    double=2,
    identity=2,
)
simple(
    "add_to_chord",
    9,
    lambda: chord([adds_to_chord.s(2), identity.s(3)], total.s()),
    adds_to_chord=1,
    identity=1,
    double=1,
    total=1,
)


# -- stamps ---------------------------------------------------------------------------------------------------------------


@shape("stamps", [{"who": "me"}, {"who": "me"}], stamps=2)
def stamped(limit: float) -> Any:
    sent: Signature = group(stamps.s(), stamps.s())
    sent.stamp(who="me")
    return sent.delay().get(timeout=limit)


# -- running them ---------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What became of a shape."""

    name: str
    result: Any = None
    error: str = ""
    seconds: float = 0.0
    runs: dict[str, int] = field(default_factory=dict)

    def is_right(self) -> bool:
        wanted = SHAPES[self.name]
        if wanted.result == ERROR:
            is_result = self.error not in ("", TIMEOUT)
        else:
            is_result = not self.error and self.result == wanted.result
        return is_result and matching(self.runs, wanted.runs) == dict(wanted.runs)

    def outcome(self) -> str:
        return self.error or json.dumps(self.result)


def matching(runs: Mapping[str, int], wanted: Mapping[str, int]) -> dict[str, int]:
    """What ran, in the words of what should have: without arguments where these do not matter."""
    counted: Counter[str] = Counter()
    for name, n in runs.items():
        counted[name if name in wanted else name.partition(" ")[0]] += n
    return dict(counted)


class OutOfTime(BaseException):
    """Not even sent in time. No Exception: Celery would catch it, and go on."""


def _out_of_time(*_: Any) -> None:
    raise OutOfTime


def run(wanted: Shape) -> Found:
    """Run a shape in this process; its tasks run in a worker that is there already."""
    found = Found(wanted.name)
    runs = Path(RUNS)
    began = time.monotonic()
    offset = runs.stat().st_size
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, wanted.seconds + 10)
    try:
        found.result = wanted.run(wanted.seconds)
    except (CeleryTimeoutError, OutOfTime):
        found.error = TIMEOUT
    except Exception as error:
        found.error = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    found.seconds = time.monotonic() - began
    while True:
        with runs.open() as file:
            file.seek(offset)
            found.runs = dict(Counter(line.strip() for line in file))
        is_complete = matching(found.runs, wanted.runs) == dict(wanted.runs)
        quiet = time.time() - runs.stat().st_mtime
        if quiet > (QUIET_SECONDS if is_complete or found.error == TIMEOUT else CALLBACK_SECONDS):
            return found
        if found.error == TIMEOUT:  # what is left of it must not be the next one's trouble
            app.control.purge()
        time.sleep(0.02)


def run_here(names: list[str]) -> None:
    """What the process does that `run_on` starts: a line of JSON for each shape."""
    Path(RUNS).touch()
    for name in names:
        print(json.dumps(vars(run(SHAPES[name]))), flush=True)


def run_on(environment: Mapping[str, str], names: list[str]) -> Iterator[Found]:
    """Run shapes in a process of this environment."""
    command = [sys.executable, "-m", "tests.canvas.shapes", "--here", json.dumps(names)]
    process = subprocess.Popen(command, env=dict(environment), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Found(**json.loads(line))
    assert process.returncode == 0, f"the process with the shapes ended with {process.returncode}"


@contextmanager
def on_celery(redis: Redis, directory: Path) -> Iterator[dict[str, str]]:
    """The environment of a project with a worker of plain Celery on Redis."""
    environment = {
        **os.environ,
        "SHAPES_ON": "celery",
        "SHAPES_BROKER": redis.url,
        "SHAPES_RUNS": str(directory / "runs"),
    }
    words = ["-A", APP, "worker", "-c", "4", "-n", "plain@test", "-l", "warning"]
    worker = Guarded([sys.executable, "-m", "celery", *words], directory=directory, env=environment, cwd=ROOT)
    try:
        app.conf.broker_url = redis.url
        wait_until(lambda: app.control.ping(timeout=0.5), 60, "the worker answers")
        yield environment
    finally:
        worker.end(signal.SIGTERM, 10)


@contextmanager
def on_aque(store: str, directory: Path) -> Iterator[dict[str, str]]:
    """The environment of the same project after `aque.setup(app, tasks="all")`, with a worker."""
    from tests.worker.farm import Farm  # not in the process with the shapes: it forgets whose farm that is in

    with Farm(store, directory) as farm:
        chosen = {"SHAPES_ON": "aque", "SHAPES_RUNS": str(directory / "runs")}
        farm.start_worker("-c", "4", app=APP, env=chosen, cpus=4)
        yield {**farm.environment, **chosen}
        if findings := farm.findings():
            raise AssertionError(f"the doctor says: {findings}")


def main() -> int:
    """Print a table; 0 if Aque is right in all."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.canvas.shapes", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--on", choices=["celery", "aque", "both"], default="both", help="which (both)")
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite", help="of Aque (sqlite)")
    parser.add_argument("--only", default="", help="shapes with this in their name")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.here:
        run_here(json.loads(chosen.here))
        return 0
    names = [name for name in SHAPES if chosen.only in name]
    names.sort(key=lambda name: not SHAPES[name].is_quick)  # what a large one leaves is not the next one's trouble
    found: dict[str, dict[str, Found]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aque-shapes-")))
        if chosen.on != "aque":
            (directory / "celery").mkdir()
            plain = stack.enter_context(on_celery(stack.enter_context(Redis()), directory / "celery"))
            found["Celery+Redis"] = _told(run_on(plain, names), "Celery+Redis")
        if chosen.on != "celery":
            (directory / "aque").mkdir()
            url = (
                f"sqlite:///{directory / 'aque.db'}"
                if chosen.store == "sqlite"
                else stack.enter_context(PostgreSQL()).url
            )
            found["Aque"] = _told(run_on(stack.enter_context(on_aque(url, directory / "aque")), names), "Aque")
    print(table(found, names))
    wrong = {side: [name for name in names if not results[name].is_right()] for side, results in found.items()}
    for side, names_of in wrong.items():
        print(
            f"{side}: {len(names) - len(names_of)} of {len(names)} right"
            + "".join(f"\n    wrong: {n}" for n in names_of)
        )
    return 1 if wrong.get("Aque") else 0


def _told(results: Iterator[Found], side: str) -> dict[str, Found]:
    by_name = {}
    for found in results:
        by_name[found.name] = found
        print(f"{side}: {found.name}: {'right' if found.is_right() else 'wrong'}", file=sys.stderr, flush=True)
    return by_name


def table(found: Mapping[str, Mapping[str, Found]], names: list[str]) -> str:
    """The shapes as rows of Markdown: what each side made of it, and what is right."""

    def cell(result: Found) -> str:
        outcome = result.outcome() if len(result.outcome()) <= 40 else result.outcome()[:37] + "..."
        ran = sum(result.runs.values())
        return f"{'' if result.is_right() else '**wrong** '}{outcome}, {ran} runs, {result.seconds:.2f} s"

    lines = ["| shape | right | " + " | ".join(found) + " |", "| --- | --- |" + " --- |" * len(found)]
    for name in names:
        wanted = SHAPES[name]
        right = f"{wanted.result if wanted.result == ERROR else json.dumps(wanted.result)}, {sum(wanted.runs.values())} runs"
        lines.append(f"| {name} | {right} | " + " | ".join(cell(results[name]) for results in found.values()) + " |")
    return "\n".join(line.replace("\n", " ") for line in lines)


if __name__ == "__main__":
    sys.exit(main())
