"""`--local`, `aque worker --one` and `--to-end`: workers for a while."""

import json
import os
import signal
from contextlib import suppress

from tests.servers import wait_until


def live_workers(aque):
    return [json.loads(line) for line in aque("workers", "--json").out.splitlines()]


def test_local_runs_the_command_and_leaves_no_worker(aque):
    done = aque("submit", "--local", "--", "sh", "-c", "echo hello; exit 4")
    assert (done.status, done.out) == (4, "hello\n")
    assert len(done.err.splitlines()) == 1
    assert live_workers(aque) == []
    (row,) = [json.loads(line) for line in aque("workers", "--all", "--json").out.splitlines()]
    assert row["state"] == "stopped"


def test_local_serves_the_queue_that_was_asked_for(aque):
    assert aque("xargs", "--local", "--queue", "mine", "-n1", "echo", given=b"1 2").out == "1\n2\n"


def test_a_local_worker_that_cannot_run_it_is_an_error_and_no_endless_wait(aque):
    done = aque("submit", "--local", "--cpus", "4096", "--", "true")
    assert done.status == 1 and "local worker" in done.err
    aque("kill", "@last")


def test_ctrl_c_stops_the_local_worker(aque):
    process = aque.start("submit", "--local", "--", "sleep", "1000")
    assert process.stderr is not None
    task_id = int(process.stderr.readline())
    wait_until(lambda: aque.state(task_id) == "running")
    (worker,) = live_workers(aque)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "waits for another worker" in process.communicate()[1]
    assert not is_running(worker["pid"]) and live_workers(aque) == []
    assert aque.state(task_id) == "ready"


def test_a_terminated_command_takes_its_local_worker_with_it(aque):
    process = aque.start("submit", "--local", "--", "sleep", "1000")
    task_id = int(process.stderr.readline())
    wait_until(lambda: aque.state(task_id) == "running")
    (worker,) = live_workers(aque)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not is_running(worker["pid"])


def test_a_worker_with_one_runs_one_task_and_exits(aque):
    ids = [aque.submit("--", "true") for _ in range(2)]
    assert aque("worker", "--one", "--cpus", "1").status == 0
    assert sorted(aque.state(task_id) for task_id in ids) == ["ready", "success"]


def test_a_worker_to_the_end_runs_what_there_is_and_exits(aque):
    first = aque.submit("--", "true")
    aque.submit("--after", str(first), "--", "true")
    elsewhere = aque.submit("--queue", "other", "--", "true")
    assert aque("worker", "--to-end", "--cpus", "2").status == 0
    assert aque("status", "--csv", "state").out.split() == ["state", "success", "success", "ready"]
    assert aque.state(elsewhere) == "ready"


def test_a_worker_to_the_end_waits_until_it_has_looked_at_files(aque):
    (aque.cwd / "f").write_text("x")
    for n in range(3):
        (aque.cwd / str(n)).mkdir()
        aque.submit("--", "cat", "f", str(n))
    assert aque("worker", "--to-end", "--cpus", "1").status == 0
    assert "ready" not in aque("status", "--csv", "state").out.split()


def test_what_the_local_worker_cannot_run_is_a_sentence(aque):
    done = aque("submit", "--local", "--tag", "gpubox", "--", "true")
    assert done.status == 1 and "it can run nothing of what is left" in done.err and "[queues]" not in done.err


def test_worker_refuses_bad_options_in_a_sentence(aque):
    for options in (
        ["--cpus", "x"],
        ["--cpus", "0"],
        ["--memory", "x"],
        ["--one", "--to-end"],
        ["-c", "0"],
        ["-E"],
        ["--tag", "a b"],
        ["--tag", "!a"],
    ):
        done = aque("worker", *options)
        assert done.status == 2 and done.err.startswith("aque: ") and done.err.count("\n") == 1, options
    for name, value in (("IO_LIMITS", "nas*:*=0"), ("TAGS", "a b"), ("RESOURCES", "cpus=2")):
        done = aque("worker", env={f"AQUE_{name}": value})
        assert done.status == 2 and done.err.startswith("aque: ") and done.err.count("\n") == 1, name


def is_running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
