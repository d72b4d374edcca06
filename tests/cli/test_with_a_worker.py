"""What verbs print and how they exit when a worker runs the tasks."""

import json
import signal
import subprocess
import time

import pytest

from tests.servers import wait_until


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--", "sh", "-c", "exit 3"], 3, ""),
        (["--", "true"], 0, ""),
        (["--", "sh", "-c", "kill -SEGV $$"], 139, "SIGSEGV"),
        (["--", "nosuchcommand"], 127, "nosuchcommand"),
        (["--", "/etc/passwd"], 126, "/etc/passwd"),
        (["--cwd", "/no/such/place", "--", "true"], 126, "/no/such/place"),
        (["--time-limit", "0.3", "--", "sleep", "60"], 124, "time limit"),
        (["--soft-time-limit", "0.3", "--", "sleep", "60"], 143, "SIGTERM"),
        (["--soft-time-limit", "0.3", "--", "sh", "-c", "trap 'exit 3' TERM; sleep 60 & wait"], 3, ""),
        (["--strict-lease", "--no-requeue", "--", "sh", "-c", "exit 3"], 3, ""),
    ],
)
def test_submit_wait_exits_as_the_command_did(served, words, status, said):
    done = served("submit", "--wait", *words)
    assert done.status == status
    assert said in done.err and done.err.count("\n") == (2 if said else 1)


def test_submit_wait_prints_the_id_on_stderr_and_what_the_command_writes_where_it_wrote_it(served):
    done = served("submit", "--wait", "--", "sh", "-c", "echo $AQUE_TASK_ID; echo oops >&2; exit 3")
    assert done.status == 3
    assert done.err == f"{done.out}oops\n"


def test_output_is_byte_exact(served):
    every = bytes(range(256)) * 300
    done = served("submit", "--wait", "--stdin", "-", "--", "cat", given=every)
    assert done.raw == every
    assert served("output", done.err.strip()).raw == every


def test_output_of_several_tasks_comes_one_after_another_and_stderr_can_be_had_alone(served):
    ids = [
        str(served("submit", "--wait", "--", "sh", "-c", f"echo o{n}; echo e{n} >&2").err.split()[0]) for n in (1, 2)
    ]
    done = served("output", *ids)
    assert (done.out, done.err) == ("o1\no2\n", "e1\ne2\n")
    assert served("output", "--stderr", *ids).out == "e1\ne2\n"
    assert served("output", "--attempt", "1", ids[0]).out == "o1\n"


def test_the_command_has_the_submitter_s_environment_directory_and_words(served):
    done = served("submit", "--wait", "--", "sh", "-c", 'echo "$MINE $PWD $1"', "sh", "a  b", env={"MINE": "m\nn"})
    assert done.out == f"m\nn {served.cwd} a  b\n"


def test_shell_passes_the_words_that_follow(served):
    done = served("submit", "--wait", "--shell", 'echo "$0" "$#" "$2" | tr a-z A-Z', "x", "y z")
    assert done.out == "AQUE 2 Y Z\n"


def test_watch_prints_what_is_written_while_the_command_runs(served):
    process = served.start("submit", "--watch", "--", "sh", "-c", "echo first; read x < fifo; echo last")
    subprocess.run(["mkfifo", served.cwd / "fifo"], check=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    (served.cwd / "fifo").write_text("go\n")
    assert process.communicate(timeout=60)[0] == "last\n"
    assert process.returncode == 0


def test_output_watch_follows_a_task_to_its_end(served):
    task_id = served.submit("--shell", "for i in 1 2 3; do echo $i; sleep 0.2; done")
    assert served("output", "-w", str(task_id)).out == "1\n2\n3\n"
    assert served.state(task_id) == "success"


def test_a_failed_attempt_is_tried_again_and_each_attempt_s_output_is_kept(served):
    done = served("submit", "--wait", "--max-attempts", "2", "--shell", "echo $AQUE_ATTEMPT; test $AQUE_ATTEMPT = 2")
    assert (done.status, done.out) == (0, "2\n")
    assert served("output", "--attempt", "1", done.err.split()[0]).out == "1\n"


def test_call_prints_the_result_as_json(served):
    (served.cwd / "mine.py").write_text(
        "def twice(x, times=2): return {'got': x * times}\ndef bad(x):\n    raise ValueError('not ' + x)\n"
    )
    done = served("call", "--wait", "mine:twice", '"ab"')
    assert (done.status, json.loads(done.out)) == (0, {"got": "abab"})
    assert json.loads(served("call", "--wait", "mine:twice", '{"x": [1], "times": 3}').out) == {"got": [1, 1, 1]}
    assert json.loads(served("call", "--wait", "mine:twice", "[2, 5]").out) == {"got": 10}
    done = served("call", "--wait", "mine:bad", '"x"')
    assert (done.status, done.out) == (1, "") and "ValueError: not x" in done.err


def test_a_dependent_is_skipped_and_never_ran(served):
    first = served.submit("--", "false")
    done = served("submit", "--wait", "--after", str(first), "--", "true")
    assert done.status == 125 and "skipped" in done.err
    assert served("submit", "--wait", "--after-failed", str(first), "--", "true").status == 0


def test_wait_prints_how_tasks_ended_and_exits_with_the_largest_status(served):
    ids = [str(served.submit("--", "sh", "-c", f"exit {n}")) for n in (0, 5, 2)]
    done = served("wait", ",".join(ids))
    assert done.status == 5
    assert sorted(done.out.splitlines()) == sorted([f"{ids[0]} success", f"{ids[1]} error", f"{ids[2]} error"])


def test_kill_ends_a_running_command(served):
    task_id = served.submit("--", "sleep", "1000")
    wait_until(lambda: served.state(task_id) == "running")
    assert served("kill", str(task_id)).out == "1 signalled\n"
    assert served("wait", str(task_id)).status == 143
    assert served.state(task_id) == "killed"


def test_a_signal_that_ends_nothing_is_delivered(served):
    task_id = served.submit("--shell", "trap 'echo got it; exit 0' USR1; echo up; while :; do sleep 0.05; done")
    wait_until(lambda: served("output", str(task_id)).out == "up\n")
    assert served("kill", "-s", "usr1", str(task_id)).status == 0
    assert served("wait", "--timeout", "60", str(task_id)).status == 0
    assert served("output", str(task_id)).out == "up\ngot it\n"


def test_ctrl_c_leaves_the_task_running(served):
    process = served.start("submit", "--wait", "--", "sleep", "1000")
    assert process.stderr is not None
    task_id = int(process.stderr.readline())
    wait_until(lambda: served.state(task_id) == "running")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "goes on" in process.communicate()[1] and served.state(task_id) == "running"
    served("kill", str(task_id))
    served("wait", str(task_id))


def test_a_task_that_no_worker_can_run_is_told_at_once(served):
    process = served.start("submit", "--wait", "--cpus", "64", "--", "true")
    assert process.stderr is not None
    task_id = int(process.stderr.readline())
    assert "unsatisfiable: needs 64 cpus, largest worker has 4" in process.stderr.readline()
    assert "needs 64 cpus" in served("status", str(task_id)).out
    served("kill", str(task_id))
    process.communicate(timeout=60)
    assert process.returncode == 125


def test_xargs_prints_in_the_order_of_the_input(served):
    done = served("xargs", "-n1", "-P4", "sh", "-c", "sleep 0.$((4 - $0)); echo $0; echo e$0 >&2", given=b"1 2 3 4")
    assert (done.status, done.out) == (0, "1\n2\n3\n4\n")
    assert done.err.split()[1:] == ["e1", "e2", "e3", "e4"]


def test_xargs_runs_twenty_commands_for_a_hundred_numbers(served):
    numbers = "".join(f"{n}\n" for n in range(1, 101)).encode()
    done = served("xargs", "-n5", "-P4", "echo", given=numbers)
    assert done.status == 0 and len(done.out.splitlines()) == 20
    assert done.out.split() == [str(n) for n in range(1, 101)]


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 123), ("exit 127", 123), ("exit 255", 124), ("kill -9 $$", 125)],
)
def test_xargs_exits_as_xargs_does(served, script, status):
    assert served("xargs", "-n1", "-P1", "sh", "-c", script, given=b"1 2").status == status


def test_xargs_exits_with_126_and_127_for_what_cannot_be_started(served):
    assert served("xargs", "/etc/passwd").status == 126
    assert served("xargs", "nosuchcommand").status == 127


def test_xargs_starts_nothing_more_after_a_255(served):
    done = served("xargs", "-n1", "--cpus", "4", "sh", "-c", "echo $0; sleep 0.1; exit 255", given=b"x " * 100)
    assert done.status == 124
    assert "not started" in done.err and len(done.out.split()) < 50


def test_xargs_commands_read_nothing_of_ours(served):
    assert served("xargs", "-n1", "sh", "-c", "cat; echo $0", given=b"a b").out == "a\nb\n"


def test_a_job_is_waited_for_killed_and_printed_as_one(served):
    job = str(served("xargs", "--no-wait", "-n1", "sh", "-c", "echo $0; exit $0", given=b"0 4 1").id)
    assert served("wait", job).status == 4
    assert served("output", job).out == "0\n4\n1\n"
    job = str(served("xargs", "--no-wait", "-n1", "-P4", "sleep", given=b"1000 " * 6).id)
    assert served("kill", job).status == 0
    assert served("wait", "--timeout", "60", job).status in (125, 143)


def test_workers_shows_what_is_reserved(served):
    task_id = served.submit("--cpus", "1.5", "--", "sleep", "1000")
    wait_until(lambda: served.state(task_id) == "running")
    (row,) = [json.loads(line) for line in served("workers", "--json").out.splitlines()]
    assert (row["state"], row["cpus"], row["running"], row["reserved_cpus"]) == ("live", "4", 1, "3/2")
    assert "1.5 cpus" in served("workers").out
    served("kill", str(task_id))
    served("wait", str(task_id))


def test_status_shows_exit_codes_signals_and_the_worker(served):
    task_id = served("submit", "--wait", "--", "sh", "-c", "kill -9 $$").err.split()[0]
    row = json.loads(served("status", task_id, "--json").out)
    assert (row["state"], row["reason"], row["exit_code"], row["signal"], row["attempt"]) == (
        "error",
        "signal",
        None,
        9,
        1,
    )
    assert row["worker"] and row["started_at"] <= row["finished_at"]


def test_an_idle_wait_is_woken_by_the_end_and_does_not_poll_for_it(served):
    def seconds(*words: str) -> float:
        """The least that this takes, since the machine may be busy."""
        took = []
        for _ in range(5):
            began = time.monotonic()
            assert served("submit", *words, "--", "true").status == 0
            took.append(time.monotonic() - began)
        return min(took)

    assert seconds("--wait") - seconds() < 0.75  # a poll, a second after a first look in vain, would be later


# -- several tasks at once


def ids_of(*tasks: int) -> str:
    return ",".join(map(str, tasks))


def test_output_watch_follows_several_tasks_at_once(served):
    loop = "echo $0-1; until [ -e go-$0 ]; do sleep 0.02; done; echo $0-2 >&2; printf $0-3"
    ids = [served.submit("--cpus", "0", "--", "sh", "-c", loop, name) for name in ("a", "b")]
    process = served.start("output", "-w", ids_of(*ids))
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in ids) == ["a-1\n", "b-1\n"]
    for name, task_id in zip("ba", reversed(ids), strict=True):  # not in the order in which they were named
        (served.cwd / f"go-{name}").touch()
        assert process.stdout.read(3) == f"{name}-3"
        served("wait", str(task_id))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "b-2\na-2\n")


def test_output_watch_is_byte_exact_for_each_task(served):
    every = bytes(range(256)) * 1000
    ids = [served("submit", "--stdin", "-", "--", "cat", given=every[n:]).id for n in range(3)]
    done = served("output", "-w", ids_of(*ids))
    assert sorted(done.raw) == sorted(b"".join(every[n:] for n in range(3)))
    for n, task_id in enumerate(ids):
        assert served("output", str(task_id)).raw == served("output", "-w", str(task_id)).raw == every[n:]


def test_output_shows_what_is_written_within_half_a_second(served):
    script = "while read -r x; do date +%s.%N; done <lines"
    subprocess.run(["mkfifo", served.cwd / "lines"], check=True)
    watched = [served.submit("--cpus", "0", "--shell", script), served.submit("--cpus", "0", "--", "true")]
    process = served.start("output", "-w", ids_of(*watched))
    assert process.stdout is not None
    late = []
    with (served.cwd / "lines").open("w", buffering=1) as lines:
        for _ in range(8):
            lines.write("\n")
            written = float(process.stdout.readline())
            late.append(time.time() - written)
    assert process.wait(60) == 0
    assert min(late) < 0.5  # on a busy machine any may be late; but of polls, each would be


def test_output_tag_begins_each_line_with_its_task_and_joins_what_was_written_in_parts(served):
    script = "printf 'one\\npar'; sleep 0.5; printf 't\\n\\377\\n'; printf last; echo oops >&2"
    ids = [served.submit("--cpus", "0", "--shell", script) for _ in range(2)]
    done = served("output", "-w", "--tag", ids_of(*ids))
    lines = done.raw.split(b"\n")
    for task_id in ids:
        mine = [line for line in lines if line.startswith(b"%d\t" % task_id)]
        assert mine == [b"%d\t%s" % (task_id, line) for line in (b"one", b"part", b"\xff", b"last")]
    assert sorted(done.err.splitlines()) == [f"{task_id}\toops" for task_id in sorted(ids)]
    alone = served("output", "--tag", str(ids[0]))
    assert alone.raw == b"".join(b"%d\t%s" % (ids[0], line) for line in (b"one\n", b"part\n", b"\xff\n", b"last"))
    assert served("output", "--tag", "--stderr", str(ids[0])).out == f"{ids[0]}\toops\n"


def test_output_watch_goes_on_with_the_next_attempt(served):
    script = "echo $AQUE_ATTEMPT; until [ -e failing ]; do sleep 0.02; done; test $AQUE_ATTEMPT = 2"
    task_id = served.submit("--max-attempts", "2", "--shell", script)
    process = served.start("output", "-w", str(task_id))
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    (served.cwd / "failing").touch()
    assert process.communicate(timeout=60)[0] == "2\n"
    assert served("output", "--tag", "--attempt", "1", str(task_id)).out == f"{task_id}\t1\n"


# -- kills along the graph, and their grace


def test_kill_dry_run_prints_what_would_be_done_and_does_nothing(served):
    running = served.submit("--", "sleep", "1000")
    wait_until(lambda: served.state(running) == "running")
    waiting = served.submit("--after", str(running), "--", "true")
    planned = served("kill", "-r", "--dry-run", str(waiting))
    assert planned.status == 0
    assert planned.out == f"would cancel 1 task: {waiting}\nwould signal 1 task: {running}\n"
    assert (served.state(running), served.state(waiting)) == ("running", "pending")
    assert served("kill", "-r", str(waiting)).out == "1 cancelled, 1 signalled\n"
    assert served("wait", str(running)).status == 143


def test_kill_grace_ends_what_ignores_the_signal(served):
    task_id = served.submit("--shell", "trap '' TERM; echo up; while :; do sleep 0.05; done")
    wait_until(lambda: served("output", str(task_id)).out == "up\n")
    assert served("kill", "--grace", "1000", str(task_id)).status == 0
    assert served("kill", "--grace", "0.1s", str(task_id)).status == 0
    assert served("wait", "--timeout", "60", str(task_id)).status != 124
    assert served.state(task_id) == "killed"


# -- drained workers


def test_a_worker_is_drained_and_undrained_by_its_name(served):
    (row,) = [json.loads(line) for line in served("workers", "--json").out.splitlines()]
    name = row["name"]
    done = served("workers", "drain", name)
    assert (done.status, done.out) == (0, f"{name} drains, it claims nothing more; it runs 0 tasks\n")
    (row,) = [json.loads(line) for line in served("workers", "--json").out.splitlines()]
    assert row["state"] == "draining" and "draining" in served("workers").out
    process = served.start("submit", "--wait", "--", "echo", "ran")
    assert process.stderr is not None
    task_id = int(process.stderr.readline())
    assert "the worker that could run it is draining" in process.stderr.readline()
    assert "is draining" in served("status", str(task_id)).out
    watching = served.start("output", "-w", str(task_id))
    assert watching.stderr is not None
    assert "every running worker is draining" in watching.stderr.readline()
    assert served.state(task_id) == "ready"
    assert served("workers", "undrain", name).out.startswith(f"{name} claims again; it runs ")
    assert process.communicate(timeout=60)[0] == watching.communicate(timeout=60)[0] == "ran\n"
    assert "live" in served("workers").out


def test_a_worker_of_an_unknown_name_is_exit_2(served):
    done = served("workers", "drain", "celery@nowhere")
    assert done.status == 2 and "there is no live worker 'celery@nowhere'" in done.err and "Nothing was" in done.err
    assert served("workers", "rest").status == 2
    assert served("workers", "drain").status == 2
