"""Every command of Celery's remote control on every broker: `python -m tests.faults.control [BROKER...]` prints a table.

Each check is a function of a farm with one worker, see `tests.worker.brokers`; tests/brokers/test_remote_control.py runs the
same ones.
"""

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import aque
from aque.graphs import submit_or_add
from aque.handles import Handle, submitter_of
from aque.options import Options
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.brokers import APP, BROKERS, Brokered, served
from tests.worker.farm import LIMIT_SECONDS

LIMIT = LIMIT_SECONDS

Check = Callable[[Brokered, Path], None]
#: By the name of the command.
CHECKS: dict[str, Check] = {}
#: Those after which the worker is gone, or another one.
LAST = ("pool_restart", "shutdown")


def check(function: Check) -> Check:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def running(on: Brokered, directory: Path) -> tuple[Any, Any, Any, Path]:
    """A function and a command of the table and an ordinary task, which run until there is a gate."""
    mark = uuid4().hex[:8]
    gate, started = directory / f"gate-{mark}", str(directory / f"started-{mark}")
    function = tasks.started.delay(started, str(gate))
    command = aque.shell(["sh", "-c", 'until [ -e "$1" ]; do sleep 0.05; done', "sh", str(gate)])
    plain = on.send("wait", started, str(gate))
    # An ordinary task has begun some moments before the worker, which hears of it from the pool's child, says so.
    all_of = {function.id, command.id, plain.id}
    wait_until(lambda: all_of <= known(on.ask("active")).keys(), LIMIT, "they run")
    return function, command, plain, gate


def end(gate: Path, *all_of: Any) -> None:
    gate.touch()
    for task in all_of:
        task.get(timeout=LIMIT)


def known(requests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {request["id"]: request for request in requests}


# -- questions ------------------------------------------------------------------------------------------------------------


@check
def check_ping(on: Brokered, directory: Path) -> None:
    assert on.ask("ping") == {"ok": "pong"}


@check
def check_active(on: Brokered, directory: Path) -> None:
    function, command, plain, gate = running(on, directory)
    shown = known(on.ask("active"))
    assert {function.id, command.id, plain.id} <= shown.keys()
    assert shown[function.id]["name"] == tasks.started.name
    assert shown[command.id]["args"][0] == "sh"
    end(gate, function, command, plain)


@check
def check_query_task(on: Brokered, directory: Path) -> None:
    function, command, plain, gate = running(on, directory)
    found = on.ask("query_task", ids=[function.id, command.id, plain.id, "unknown"])
    assert {i: state for i, (state, _) in found.items()} == dict.fromkeys((function.id, command.id, plain.id), "active")
    end(gate, function, command, plain)


@check
def check_reserved(on: Brokered, directory: Path) -> None:
    function, command, plain, gate = running(on, directory)
    more = [on.send("wait", str(directory / "more"), str(gate)) for _ in range(4)]  # there is a child for one of them

    def of_them(question: str) -> set[str]:
        return known(on.ask(question)).keys() & {sent.id for sent in more}

    wait_until(lambda: (len(of_them("active")), len(of_them("reserved"))) == (1, 3), LIMIT, "one runs, three wait")
    end(gate, function, command, plain, *more)


@check
def check_scheduled(on: Brokered, directory: Path) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    ours = tasks.echo.apply_async((1,), eta=at)
    elsewhere = tasks.echo.apply_async((1,), eta=at, queue="elsewhere")
    plain = on.send("multiply", 1, 1, eta=at)
    shown: dict[str, Any] = {}

    def both() -> bool:
        shown.update({entry["request"]["id"]: entry for entry in on.ask("scheduled")})
        return {ours.id, plain.id} <= shown.keys()

    wait_until(both, LIMIT, "both are scheduled")
    assert elsewhere.id not in shown
    assert datetime.fromisoformat(shown[ours.id]["eta"]) == at
    assert shown[ours.id]["request"]["args"] == [1]
    on.client.control.revoke([ours.id, elsewhere.id, plain.id])
    for task in (ours, elsewhere):
        on.farm.wait_for_state(task, "cancelled")


@check
def check_stats(on: Brokered, directory: Path) -> None:
    function, command, plain, gate = running(on, directory)
    # What an ordinary task had is free a moment after its result is there.
    wait_until(lambda: on.ask("stats")["aque"]["cpus"] == {"whole": "4", "free": "1"}, LIMIT, "three CPUs are taken")
    stats = on.ask("stats")
    assert stats["pool"]["max-concurrency"] == 3
    assert stats["aque"]["python_slots"] == {"whole": 3, "free": 1}
    assert stats["aque"]["running"] == 2
    end(gate, function, command, plain)


@check
def check_registered(on: Brokered, directory: Path) -> None:
    assert {f"{APP}.multiply", tasks.echo.name, "aque.submit"} <= set(on.ask("registered"))


@check
def check_active_queues(on: Brokered, directory: Path) -> None:
    assert [queue["name"] for queue in on.ask("active_queues")] == ["celery"]


@check
def check_report(on: Brokered, directory: Path) -> None:
    assert "celery:" in on.ask("report", timeout=30)["ok"]


@check
def check_conf(on: Brokered, directory: Path) -> None:
    assert APP.rpartition(".")[0] in json.dumps(on.ask("conf"))


@check
def check_clock(on: Brokered, directory: Path) -> None:
    assert on.ask("clock")["clock"] > 0


# -- ending tasks ---------------------------------------------------------------------------------------------------------


@check
def check_revoke(on: Brokered, directory: Path) -> None:
    """What waits is withdrawn, what runs goes on; with `terminate` it is ended."""
    function, command, plain, gate = running(on, directory)
    waiting = tasks.echo.apply_async((1,), depends_on=function)
    on.ask("revoke", task_id=[function.id, waiting.id])
    on.farm.wait_for_state(waiting, "cancelled")
    assert on.farm.state(function) == "running"
    on.ask("revoke", task_id=[function.id, command.id, plain.id], terminate=True, signal="SIGKILL")
    for task in (function, command):
        on.farm.wait_for_state(task, "killed")
    wait_until(lambda: not on.ask("active"), LIMIT, "nothing runs")
    gate.touch()


@check
def check_terminate(on: Brokered, directory: Path) -> None:
    function, command, plain, gate = running(on, directory)
    on.ask("terminate", signal="KILL", task_id=[function.id, command.id, plain.id])
    for task in (function, command):
        assert on.farm.wait_for_state(task, "killed")["signal"] == 9
    wait_until(lambda: not on.ask("active"), LIMIT, "nothing runs")
    gate.touch()


def stamped(value: str, path: str, gate: str) -> Handle:
    """A task of the table that bears a stamp."""
    submitter = submitter_of(tasks.started._get_app())
    new = submitter.next_id()
    arguments = json.dumps([[path, gate], {}]).encode()
    extra = {"stamped_headers": ["show"], "stamps": {"show": [value]}}
    options = Options(extra=extra)
    spec = submitter.function(new, "tests.worker.tasks:started", tasks.started.name, arguments, (), options)
    submit_or_add(submitter, None, replace(spec, extra=extra), False)
    return tasks.started.AsyncResult(str(new))


@check
def check_revoke_by_stamped_headers(on: Brokered, directory: Path) -> None:
    gate = directory / "gate-of-stamps"
    mine, other = (stamped(value, str(directory / value), str(gate)) for value in ("mine", "other"))
    for task in (mine, other):
        on.farm.wait_for_state(task, "running")
    on.ask("revoke_by_stamped_headers", headers={"show": ["mine"]}, terminate=True)
    on.farm.wait_for_state(mine, "killed")
    assert on.farm.state(other) == "running"
    end(gate, other)


# -- limits ---------------------------------------------------------------------------------------------------------------


@check
def check_time_limit(on: Brokered, directory: Path) -> None:
    """For tasks that start from now on, functions and commands; a limit of the task's own stands."""
    assert "ok" in on.ask("time_limit", task_name=tasks.nap.name, hard=0.3)
    assert "ok" in on.ask("time_limit", task_name="sleep", hard=0.3)
    for task in (tasks.nap.delay(100), aque.shell(["sleep", "100"])):
        assert on.farm.wait_for_state(task, "error")["reason"] == "time_limit"
    assert aque.shell(["sleep", "0.5"], time_limit=100).get(timeout=LIMIT)["exit_code"] == 0
    assert "error" in on.ask("time_limit", task_name="sleep", hard=-1)
    for name in (tasks.nap.name, "sleep"):
        on.ask("time_limit", task_name=name)
    assert tasks.nap.delay(0.5).get(timeout=LIMIT) == 0.5


@check
def check_rate_limit(on: Brokered, directory: Path) -> None:
    """Ordinary tasks: Celery's buckets."""
    name = f"{APP}.multiply"
    assert on.ask("rate_limit", task_name=name, rate_limit="100/s") == {"ok": "new rate limit set successfully"}
    assert on.send("multiply", 2, 3).get(timeout=LIMIT) == 6
    assert "error" in on.ask("rate_limit", task_name=name, rate_limit="often")
    assert "error" in on.ask("rate_limit", task_name="no.such.task", rate_limit="1/s")
    on.ask("rate_limit", task_name=name, rate_limit=0)


# -- the pool -------------------------------------------------------------------------------------------------------------


def slots(on: Brokered) -> tuple[int, int, int]:
    """Python tasks at a time: as the table says, as the ledger says, and children that there are."""
    stats = on.ask("stats")
    in_table = on.farm.live()[0].info.python_slots
    return in_table, stats["aque"]["python_slots"]["whole"], len(stats["pool"]["processes"])


@check
def check_pool_grow(on: Brokered, directory: Path) -> None:
    assert on.ask("pool_grow", n=1) == {"ok": "pool will grow"}
    wait_until(lambda: slots(on) == (4, 4, 4), LIMIT, "there are four")
    gate = directory / "gate-of-four"
    four = [tasks.started.apply_async((str(directory / f"four-{n}"), str(gate)), cpus=0.5) for n in range(4)]
    for task in four:
        on.farm.wait_for_state(task, "running")
    end(gate, *four)


@check
def check_pool_shrink(on: Brokered, directory: Path) -> None:
    """No task is ended: one that runs keeps its child until it is done."""
    gate = directory / "gate-of-shrinking"
    count = slots(on)[0]
    busy = [tasks.started.apply_async((str(directory / f"busy-{n}"), str(gate)), cpus=0.5) for n in range(count)]
    for task in busy:
        on.farm.wait_for_state(task, "running")
    assert on.ask("pool_shrink", n=1) == {"ok": "pool will shrink"}
    assert slots(on) == (count, count, count)
    end(gate, *busy)
    wait_until(lambda: slots(on) == (count - 1,) * 3, LIMIT, "one is gone")
    assert "error" in on.ask("pool_shrink", n=count)
    assert [tasks.echo.delay(n).get(timeout=LIMIT) for n in range(3)] == [0, 1, 2]
    if count - 1 < 3:  # whichever check comes next counts on three
        on.ask("pool_grow", n=1)
        wait_until(lambda: slots(on) == (3, 3, 3), LIMIT, "there are three")


@check
def check_autoscale(on: Brokered, directory: Path) -> None:
    """This worker was not started with --autoscale."""
    assert "Autoscale not enabled" in str(on.ask("autoscale", max=10, min=1)["error"])


@check
def check_pool_restart(on: Brokered, directory: Path) -> None:
    """The worker restarts in place: the command that runs goes on."""
    command = aque.shell(["sh", "-c", 'until [ -e "$1" ]; do sleep 0.05; done', "sh", str(directory / "restarted")])
    on.farm.wait_for_state(command, "running")
    pid, children = on.worker.pid, set(on.ask("stats")["pool"]["processes"])
    assert "restarts in place" in on.ask("pool_restart")["ok"]

    def others() -> bool:
        stats = on.worker.ask(on.client, "stats").get(on.worker.name)
        return bool(stats) and not children & set(stats["pool"]["processes"])

    wait_until(others, LIMIT, "there are other children")
    assert on.worker.pid == pid
    end(directory / "restarted", command)
    assert on.farm.row(command)["attempt"] == 1


# -- queues and events ----------------------------------------------------------------------------------------------------


@check
def check_add_consumer(on: Brokered, directory: Path) -> None:
    queue = f"queue-{uuid4().hex[:8]}"
    ours, plain = tasks.echo.apply_async((1,), queue=queue), on.send("multiply", 2, 2, queue=queue)
    assert on.ask("add_consumer", queue=queue) == {"ok": f"add consumer {queue}"}
    assert (ours.get(timeout=LIMIT), plain.get(timeout=LIMIT)) == (1, 4)
    on.ask("cancel_consumer", queue=queue)
    wait_until(lambda: queue not in on.farm.live()[0].info.queues, LIMIT, "the table says so")


@check
def check_cancel_consumer(on: Brokered, directory: Path) -> None:
    queue = f"queue-{uuid4().hex[:8]}"
    on.ask("add_consumer", queue=queue)
    wait_until(lambda: queue in on.farm.live()[0].info.queues, LIMIT, "the table says so")
    assert on.ask("cancel_consumer", queue=queue) == {"ok": f"no longer consuming from {queue}"}
    wait_until(lambda: queue not in on.farm.live()[0].info.queues, LIMIT, "the table says so")
    left = tasks.echo.apply_async((2,), queue=queue)
    assert tasks.echo.delay(0).get(timeout=LIMIT) == 0
    assert on.farm.state(left) == "ready"
    left.kill()


@check
def check_heartbeat(on: Brokered, directory: Path) -> None:
    seen: list[str] = []
    with on.client.connection() as connection:
        receiver = on.client.events.Receiver(connection, handlers={"*": lambda event: seen.append(event["type"])})
        with receiver.consumer_context() as (listening, _, _):
            on.client.control.heartbeat(destination=[on.worker.name])
            until = time.monotonic() + LIMIT
            while "worker-heartbeat" not in seen and time.monotonic() < until:
                listening.drain_events(timeout=LIMIT)
    assert "worker-heartbeat" in seen


@check
def check_enable_events(on: Brokered, directory: Path) -> None:
    assert on.ask("enable_events") == {"ok": "task events already enabled"}  # started with -E


@check
def check_disable_events(on: Brokered, directory: Path) -> None:
    """Celery's own: of a worker that was started with -E it turns nothing off."""
    assert "ok" in on.ask("disable_events")


@check
def check_shutdown(on: Brokered, directory: Path) -> None:
    done = tasks.echo.delay(1)
    done.get(timeout=LIMIT)
    on.client.control.shutdown(destination=[on.worker.name])
    wait_until(lambda: not on.worker.running(), LIMIT, "the worker has stopped")


def names() -> list[str]:
    """In an order in which each leaves to the next what it needs."""
    return [name for name in CHECKS if name not in LAST] + list(LAST)


def main() -> int:
    table: dict[tuple[str, str], str] = {}
    brokers = [name for name in sys.argv[1:] if name in BROKERS] or list(BROKERS)
    chosen = [name for name in sys.argv[1:] if name in CHECKS] or names()
    for broker in brokers:
        with tempfile.TemporaryDirectory() as base:
            directory = Path(base)
            with served(broker, directory, env={"TEST_POOL_RESTARTS": "1"}) as on:
                for name in chosen:
                    began = time.monotonic()
                    try:
                        CHECKS[name](on, directory)
                        table[name, broker] = f"{time.monotonic() - began:.1f} s"
                    except BaseException as error:
                        traceback.print_exc()
                        table[name, broker] = f"FAILED {type(error).__name__}"
                        on.kill_everything()
                    print(f"{broker:16} {name:26} {table[name, broker]}", flush=True)
                assert on.farm.findings() == []
    print(f"\n{'':26}" + "".join(f"{broker:>18}" for broker in brokers))
    for name in chosen:
        print(f"{name:26}" + "".join(f"{table[name, broker]:>18}" for broker in brokers))
    return any("FAILED" in cell for cell in table.values())


if __name__ == "__main__":
    sys.exit(main())
