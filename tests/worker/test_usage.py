"""What a running task gets of a real worker (CPUs, numbers of resources, threads), and what is recorded of its use."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aque
from aque import settings
from aque.options import Options
from aque.store.engine import file_system
from aque.submitter import Submitter
from tests.conftest import ON_POSTGRESQL, ON_SQLITE
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, PROGRAMS, Farm
from tests.worker.test_restart import restart

LIMIT = LIMIT_SECONDS
MIB = 1 << 20
#: Programs that each use one thing, in the middle of nothing else.
BURN = "import time\nwhile time.process_time() < 1: pass"
HOLD = "x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1"
WRITE = "import os, sys\nf = open(sys.argv[1], 'wb'); f.write(bytes(50 << 20)); f.flush(); os.fsync(f.fileno())"
#: Prints what the test asks for, and waits for its gate if there is one.
SHOW = (
    "import json, os, sys, time\n"
    "print(json.dumps([sorted(os.sched_getaffinity(0)), dict(os.environ)]), flush=True)\n"
    "while len(sys.argv) > 1 and not os.path.exists(sys.argv[1]): time.sleep(0.01)"
)
CPUS = sorted(os.sched_getaffinity(0))


def python(program: str, *words: object, **options: Any) -> aque.Handle:
    return aque.shell([sys.executable, "-c", program, *map(str, words)], **options)


def shown(farm: Farm, task: Any) -> tuple[list[int], dict[str, str]]:
    """The affinity and the environment that SHOW has printed."""
    wait_until(lambda: farm.output(task).endswith(b"\n"), LIMIT, f"{task} has printed")
    affinity, environment = json.loads(farm.output(task))
    return affinity, environment


# -- use ------------------------------------------------------------------------------------------------------------------


def test_commands_show_what_they_have_used(farm: Farm, tmp_path: Path) -> None:
    if file_system(tmp_path) == "tmpfs":
        pytest.skip("nothing that is written there goes to a disk")
    burn, hold, write = python(BURN), python(HOLD), python(WRITE, tmp_path / "file")
    rows = [farm.wait_for_state(task, "success", "error") for task in (burn, hold, write)]
    assert [row["state"] for row in rows] == ["success"] * 3
    burnt, held, written = rows
    assert 1.0 <= burnt["cpu_seconds"] < 10
    assert 200 * MIB <= held["max_rss_bytes"] < 300 * MIB
    assert 50 * MIB <= written["written_bytes"] < 60 * MIB
    assert max(burnt["max_rss_bytes"], written["max_rss_bytes"]) < 120 * MIB
    assert max(burnt["written_bytes"], held["written_bytes"]) < 5 * MIB


def test_so_do_functions_in_the_pool_each_its_own(farm: Farm, tmp_path: Path) -> None:
    if file_system(tmp_path) == "tmpfs":
        pytest.skip("nothing that is written there goes to a disk")
    used = [tasks.use.delay(0, 0, 0), tasks.use.delay(1, 200, 50, str(tmp_path / "file")), tasks.use.delay(0, 0, 0)]
    rows = [farm.wait_for_state(task, "success", "error") for task in used]
    assert [row["state"] for row in rows] == ["success"] * 3
    assert 1.0 <= rows[1]["cpu_seconds"] < 10
    assert 200 * MIB <= rows[1]["max_rss_bytes"] < 400 * MIB
    assert 50 * MIB <= rows[1]["written_bytes"] < 60 * MIB
    for row in (rows[0], rows[2]):
        assert row["cpu_seconds"] < 1
        assert 5 * MIB < row["max_rss_bytes"] < 200 * MIB
        assert row["written_bytes"] < 5 * MIB


@ON_SQLITE
def test_a_child_of_the_pool_forgets_the_size_of_an_earlier_function(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=1)
    sizes = []
    for mib in (0, 200, 0):
        task = tasks.use.delay(0, mib, 0)
        task.get(timeout=LIMIT)
        sizes.append(own_farm.row(task)["max_rss_bytes"])
    assert sizes[1] > sizes[0] + 190 * MIB
    assert sizes[2] < sizes[0] + 50 * MIB


def test_a_function_under_another_interpreter_shows_it_as_a_command_does(farm: Farm) -> None:
    task = tasks.use.apply_async((1, 200, 0), interpreter=sys.executable)
    row = farm.wait_for_state(task, "success", "error")
    assert row["state"] == "success"
    assert 1.0 <= row["cpu_seconds"] < 10
    assert 200 * MIB <= row["max_rss_bytes"] < 400 * MIB


def test_what_could_not_be_started_has_used_nothing(farm: Farm) -> None:
    row = farm.wait_for_state(aque.shell(["/no/such/program"]), "error")
    assert [row[name] for name in ("cpu_seconds", "max_rss_bytes", "read_bytes", "written_bytes")] == [None] * 4


# -- CPUs -----------------------------------------------------------------------------------------------------------------


@ON_POSTGRESQL
@pytest.mark.skipif(len(CPUS) < 2, reason="there is nothing to choose from")
def test_a_pinned_worker_binds_each_task_to_as_many_cpus_as_it_reserves(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "2", cpus=2, pin=True)
    gate = tmp_path / "gate"
    whole = [python(SHOW, gate), python(SHOW, gate)]
    first, second = (shown(own_farm, task)[0] for task in whole)
    assert len(first) == len(second) == 1
    assert first != second
    gate.touch()
    for task in whole:
        own_farm.wait_for_state(task, "success")
    quarters = [python(SHOW, cpus="1/4") for _ in range(3)]
    for task in quarters:
        (cpu,) = shown(own_farm, task)[0]
        assert cpu in CPUS
    assert shown(own_farm, python(SHOW, cpus=0))[0] == CPUS
    assert shown(own_farm, python(SHOW, cpus=2))[0] == CPUS[:2]


@ON_SQLITE
@pytest.mark.skipif(len(CPUS) < 2, reason="there is nothing to choose from")
def test_a_pinned_worker_binds_functions_and_frees_their_child_afterwards(own_farm: Farm) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, pin=True)
    assert tasks.affinity.delay().get(timeout=LIMIT) == CPUS[:1]
    assert tasks.affinity.apply_async(cpus=0).get(timeout=LIMIT) == CPUS
    (child,) = worker.pool_children()
    assert child.cpu_affinity() == CPUS


def test_without_pinning_nothing_is_bound(farm: Farm) -> None:
    assert shown(farm, python(SHOW))[0] == CPUS
    assert tasks.affinity.delay().get(timeout=LIMIT) == CPUS


# -- resources ------------------------------------------------------------------------------------------------------------


@ON_POSTGRESQL
def test_each_task_sees_the_numbers_of_its_own_pieces(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "2", cpus=4, resources="gpu=[1,3],licence=2")
    gate = tmp_path / "gate"
    options = {"cpus": 0.5, "resources": {"gpu": 1}}
    first = python(SHOW, gate, io=False, **options)  # or what has no files goes before it
    second = tasks.gpu_then_wait.apply_async((str(tmp_path / "seen"), str(gate)), **options)
    third = python(SHOW, **options)
    other = python(SHOW, cpus=0.5, resources={"licence": 2})
    wait_until((tmp_path / "seen").exists, LIMIT, "the function has started")
    mine = shown(own_farm, first)[1]["AQUE_GPU_INDICES"]
    assert {mine, (tmp_path / "seen").read_text()} == {"1", "3"}
    variables = shown(own_farm, other)[1]
    assert variables["AQUE_LICENCE_INDICES"] == "0,1"
    assert "AQUE_GPU_INDICES" not in variables
    assert own_farm.state(third) in ("ready", "claimed")  # both are taken
    gate.touch()
    assert second.get(timeout=LIMIT) == (tmp_path / "seen").read_text()
    assert shown(own_farm, third)[1]["AQUE_GPU_INDICES"] in {"1", "3"}
    elsewhere = tasks.environment.apply_async(interpreter=sys.executable, resources="gpu=2")
    assert elsewhere.get(timeout=LIMIT)["AQUE_GPU_INDICES"] == "1,3"
    assert "AQUE_GPU_INDICES" not in tasks.environment.delay().get(timeout=LIMIT)


@ON_SQLITE
def test_a_child_does_not_inherit_the_numbers_of_its_parent(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=2, resources="gpu=1", set_threads=True)
    words = [str(PROGRAMS / "aque"), "submit", "--cpus", "2", "--", sys.executable, "-c", SHOW]
    parent = aque.shell(words, resources={"gpu": 1})
    child = int(parent.get(timeout=LIMIT)["stdout"])
    variables = shown(own_farm, child)[1]
    assert "AQUE_GPU_INDICES" not in variables
    assert (variables["AQUE_CPUS"], variables["OMP_NUM_THREADS"]) == ("2", "2")


@ON_POSTGRESQL
def test_what_is_handed_over_at_a_restart_keeps_its_numbers_and_cpus_and_nobody_else_gets_them(
    own_farm: Farm, tmp_path: Path
) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=4, resources="gpu=2", pin=True)
    gate = tmp_path / "gate"
    across = python(SHOW, gate, resources={"gpu": 1})
    cpus, variables = shown(own_farm, across)
    assert variables["AQUE_GPU_INDICES"] == "0"
    for _ in range(2):
        restart(worker)
    new = python(SHOW, gate, resources={"gpu": 1})
    new_cpus, new_variables = shown(own_farm, new)
    assert new_variables["AQUE_GPU_INDICES"] == "1"
    assert len(CPUS) < 2 or set(new_cpus).isdisjoint(cpus)
    waiting = python(SHOW, resources={"gpu": 1})
    gate.touch()
    own_farm.wait_for_state(across, "success")
    assert shown(own_farm, waiting)[1]["AQUE_GPU_INDICES"] in {"0", "1"}
    assert own_farm.row(across)["max_rss_bytes"] > MIB  # its use is measured across the restarts


# -- threads --------------------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_tasks_are_told_how_many_threads_they_have_cpus_for_unless_they_say_it_themselves(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=4, set_threads=True, env={"OMP_NUM_THREADS": "64"})
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    names += ("VECLIB_MAXIMUM_THREADS", "RAYON_NUM_THREADS")
    variables = shown(own_farm, python(SHOW, cpus=2.5))[1]
    assert {name: variables.get(name) for name in names} == dict.fromkeys(names, "3")
    assert shown(own_farm, python(SHOW, cpus=0))[1]["OMP_NUM_THREADS"] == "1"
    own = shown(own_farm, python(SHOW, cpus=2, env={"OMP_NUM_THREADS": "7"}))[1]
    assert (own["OMP_NUM_THREADS"], own["MKL_NUM_THREADS"]) == ("7", "2")
    assert tasks.variable.apply_async(("OMP_NUM_THREADS",), cpus=3).get(timeout=LIMIT) == "3"
    assert tasks.variable.apply_async(("OMP_NUM_THREADS",), cpus=1).get(timeout=LIMIT) == "1"


def test_without_the_setting_they_are_not(farm: Farm) -> None:
    assert "RAYON_NUM_THREADS" not in shown(farm, python(SHOW, env={}))[1]


# -- run times ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def expected(own_farm: Farm) -> Callable[..., float]:
    """The expected duration of a new task, by a submitter that has read nothing yet."""

    def expected(name: str) -> float:
        submitter = Submitter(own_farm.store, settings.load(own_farm.settings))
        spec = submitter.command(submitter.next_id(), ["true"], Options(name=name, queue="nobody"))
        submitter.submit([spec])
        return float(own_farm.row(spec.id)["duration"])

    return expected


def test_what_one_worker_has_measured_is_the_expected_duration_of_the_next_submission(
    own_farm: Farm, expected: Callable[..., float]
) -> None:
    own_farm.start_worker("-c", "1", cpus=2)
    aque.shell(["sleep", "0.3"], name="nap_1").get(timeout=LIMIT)
    aque.shell(["false"], name="fail_1").get(timeout=LIMIT, propagate=False)
    wait_until(lambda: expected("nap_2") > 0, LIMIT, "a beat has written it")
    assert 0.3 <= expected("nap_2") < LIMIT
    assert expected("fail_2") == 0


def test_a_stop_and_a_restart_leave_no_run_time_unwritten(own_farm: Farm, expected: Callable[..., float]) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=2, lease_seconds=600)
    aque.shell(["true"], name="before").get(timeout=LIMIT)
    restart(worker)
    wait_until(lambda: expected("before") > 0, LIMIT, "the new image has written what it was handed")
    aque.shell(["true"], name="after").get(timeout=LIMIT)
    worker.stop()
    assert expected("after") > 0


def test_status_shows_use_and_expected_durations(farm: Farm) -> None:
    task = aque.shell(["true"], duration=12)
    task.get(timeout=LIMIT)
    words = [str(PROGRAMS / "aque"), "status", "--csv", "duration,cpu_seconds,max_rss_bytes,read_bytes,written_bytes"]
    program = farm.start_program(*words, task.id)
    assert program.process.wait(LIMIT) == 0
    header, row, *rest = program.log.read_text().splitlines()
    program.end(15)
    assert header == words[-1]
    duration, cpu_seconds, max_rss_bytes, read_bytes, written_bytes = row.split(",")
    assert (float(duration), rest) == (12.0, [])
    assert 0 < float(cpu_seconds) < 5
    assert int(max_rss_bytes) > MIB
    assert min(int(read_bytes), int(written_bytes)) >= 0
