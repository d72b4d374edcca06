"""Commands under supervision: what they get, what comes back, and that nothing of them stays."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aque import commands, processes, server
from aque.commands import CommandRunner, Running
from aque.supervised import Command, Ended
from tests import servers

LIMIT_SECONDS = 60.0
ENV = {b"PATH": os.environb[b"PATH"]}


class Watched:
    """One command of a test, and all that its callbacks were told."""

    def __init__(self, runner: CommandRunner, command: Command) -> None:
        self.started = threading.Event()
        self.over = threading.Event()
        self.pids: list[int] = []
        self.output = {1: bytearray(), 2: bytearray()}
        self.ends: list[Ended] = []
        self.running: Running = runner.run(command, self._on_started, self._on_output, self._on_ended)

    def _on_started(self, pid: int) -> None:
        self.pids.append(pid)
        self.started.set()

    def _on_output(self, fd: int, offset: int, data: bytes) -> None:
        gap = offset - len(self.output[fd])
        assert gap >= 0
        self.output[fd] += b"?" * gap + data

    def _on_ended(self, ended: Ended) -> None:
        self.ends.append(ended)
        self.over.set()

    @property
    def pid(self) -> int:
        assert self.started.wait(LIMIT_SECONDS), "the command did not start"
        return self.pids[0]

    @property
    def stdout(self) -> bytes:
        return bytes(self.output[1])

    def wait(self) -> Ended:
        assert self.over.wait(LIMIT_SECONDS), "the command did not end"
        (ended,) = self.ends
        return ended


@pytest.fixture
def runner() -> Iterator[CommandRunner]:
    runner = CommandRunner()
    runner.start()
    yield runner
    assert runner.stop()


@pytest.fixture
def run(runner: CommandRunner, tmp_path: Path) -> Callable[..., Watched]:
    def run(*argv: bytes, **given: object) -> Watched:
        return Watched(runner, Command(**{"argv": argv, "env": ENV, "cwd": os.fsencode(tmp_path), **given}))

    return run


def wait_until(condition: Callable[[], bool], what: str) -> None:
    servers.wait_until(condition, LIMIT_SECONDS, what)


def new_mark() -> bytes:
    """Seconds to sleep that no other process sleeps: survivors are found by it."""
    return b"9%d.%d" % (random.randrange(10**4, 10**5), random.randrange(1, 10**6))


def living(mark: bytes) -> set[int]:
    """The processes that have `mark` as an argument; zombies have none."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in words:
                found.add(int(name))
    return found


def parent(pid: int) -> int:
    return next(above for above, below in processes.children_of_all().items() if pid in below)


def server_of(runner: CommandRunner) -> int:
    assert runner._server is not None
    return runner._server.pid


#: Five descendants: a plain one, one in a session of its own, one without environment, one deaf to SIGTERM,
#: one that has lost its parents and holds the output.
TREE = b"""
sleep $0 &
setsid sleep $0 &
env -i /bin/sleep $0 &
(trap '' TERM; sleep $0; sleep $0) &
(setsid sh -c "sleep $0 & exit" &)
"""


# What a command gets


def test_argv_arrives_as_it_is_and_is_not_joined(run):
    words = [b"a b", b"", b"$HOME;*", bytes(range(1, 256))]
    command = run(b"printf", b"%s|", *words)
    assert command.wait().exit_code == 0
    assert command.stdout == b"|".join([*words, b""])


def test_the_environment_is_exactly_the_given_one(run):
    env = {**ENV, b"ODD": bytes(range(1, 256)), b"EMPTY": b""}
    command = run(b"env", b"-0", env=env)
    command.wait()
    assert dict(entry.split(b"=", 1) for entry in command.stdout.split(b"\0")[:-1]) == env


def test_a_program_is_looked_up_in_the_given_path_and_not_the_workers(run, tmp_path):
    (tmp_path / "mine").write_text("#!/bin/sh\necho mine\n")
    (tmp_path / "mine").chmod(0o755)
    assert run(b"mine").wait().reason == "not_found"
    found = run(b"mine", env={b"PATH": b"/nowhere:" + os.fsencode(tmp_path)})
    assert (found.wait().exit_code, found.stdout) == (0, b"mine\n")
    assert run(b"./mine").wait().exit_code == 0


def test_a_script_without_a_first_line_for_the_kernel_is_run_by_the_shell(run, tmp_path):
    (tmp_path / "script").write_text('echo "$1"\n')
    (tmp_path / "script").chmod(0o755)
    for path, env in ((b"./script", ENV), (b"script", {b"PATH": os.fsencode(tmp_path)})):
        command = run(path, b"an argument", env=env)
        assert command.wait().exit_code == 0
        assert command.stdout == b"an argument\n"


def test_the_working_directory_and_umask_are_the_given_ones(run, tmp_path):
    command = run(b"sh", b"-c", b"pwd; umask", umask=0o137)
    command.wait()
    assert command.stdout == b"%s\n0137\n" % os.fsencode(tmp_path)
    usual = run(b"sh", b"-c", b"umask")
    usual.wait()
    mask = os.umask(0)
    os.umask(mask)
    assert usual.stdout == b"%04o\n" % mask


def test_only_descriptors_0_1_and_2_are_open(run):
    command = run(sys.executable.encode(), b"-ISc", b"import os; print(*os.listdir('/proc/self/fd'))")
    command.wait()
    assert command.stdout.split() == [b"0", b"1", b"2", b"3"]  # 3 is the listing's own


def test_no_signal_is_ignored_or_blocked_even_if_the_worker_ignores_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    runner = CommandRunner()
    try:
        runner.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    argv = (b"grep", b"-E", b"Sig(Blk|Ign)", b"/proc/self/status")
    command = Watched(runner, Command(argv, ENV, b"/"))
    command.wait()
    runner.stop()
    # The C library keeps 32 and 33 for itself: no program can change them, and who starts these tests may ignore them.
    reset = ~sum(1 << number - 1 for number in (32, 33))
    assert [int(line.split()[1], 16) & reset for line in command.stdout.splitlines()] == [0, 0]


def test_it_leads_a_session_of_its_own_without_a_terminal(run):
    command = run(b"cat", b"/proc/self/stat")
    command.wait()
    _, group, session, terminal = (int(word) for word in command.stdout.rpartition(b")")[2].split()[1:5])
    assert group == session == command.pids[0] == command.running.pid
    assert terminal == 0


def test_stdin_arrives_byte_for_byte(run):
    data = random.randbytes(1 << 20)
    command = run(b"cat", stdin=data)
    command.wait()
    assert command.stdout == data


def test_a_command_may_ignore_its_stdin(run):
    assert run(b"true", stdin=bytes(1 << 20)).wait().exit_code == 0


def test_no_stdin_is_an_empty_one(run):
    for nothing in (None, b""):
        command = run(b"wc", b"-c", stdin=nothing)
        command.wait()
        assert command.stdout.strip() == b"0"


# What comes back


def test_output_is_byte_exact_and_the_streams_are_kept_apart(run):
    script = b"import os; os.write(1, bytes(range(256)) * 999); os.write(2, bytes(range(255, -1, -1)))"
    command = run(sys.executable.encode(), b"-ISc", script)
    ended = command.wait()
    assert command.stdout == bytes(range(256)) * 999
    assert bytes(command.output[2]) == bytes(range(255, -1, -1))
    assert (ended.stdout_bytes, ended.stderr_bytes) == (256 * 999, 256)
    assert not ended.truncated


def test_of_output_beyond_the_limit_the_start_and_the_end_are_kept(run):
    script = b"seq 1 3000000; echo end >&2"
    command = run(b"sh", b"-c", script, output_limit_bytes=100_002)
    ended = command.wait()
    whole = b"".join(b"%d\n" % number for number in range(1, 3_000_001))
    assert command.stdout[:50_002] == whole[:50_002]
    assert command.stdout[-25_000:] == whole[-25_000:]
    assert command.stdout[50_002:-25_000] == b"?" * (len(whole) - 75_002)
    assert bytes(command.output[2]) == b"end\n"
    assert (ended.stdout_bytes, ended.stderr_bytes, ended.truncated) == (len(whole), 4, True)


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 7])
def test_a_limit_may_be_tiny(run, limit):
    command = run(b"printf", b"123456789", output_limit_bytes=limit)
    ended = command.wait()
    assert (ended.stdout_bytes, ended.truncated) == (9, True)
    assert len(command.stdout.replace(b"?", b"")) == limit - limit // 4  # one stream has no use for the other's quarter


def test_output_that_just_fits_is_whole(run):
    command = run(b"sh", b"-c", b"head -c 1000 /dev/zero; head -c 1000 /dev/zero >&2", output_limit_bytes=4000)
    ended = command.wait()
    assert (command.stdout, bytes(command.output[2]), ended.truncated) == (bytes(1000), bytes(1000), False)


def test_a_command_that_reads_its_own_output_away_cannot_hold_its_supervisor(run):
    script = b"import os\nfd = os.open('/proc/self/fd/1', os.O_RDONLY)\nwhile True: os.write(1, b'x'); os.read(fd, 1)"
    command = run(sys.executable.encode(), b"-ISc", script, time_limit_seconds=1.0, kill_grace_seconds=0.2)
    assert command.wait().reason == "time_limit"


def test_a_command_that_stops_its_supervisor_can_be_killed(runner, run, monkeypatch):
    monkeypatch.setattr(commands, "END_SECONDS", 0.3)
    mark = new_mark()
    command = run(b"sh", b"-c", b'kill -STOP $PPID; exec sleep "$0"', mark)
    wait_until(lambda: living(mark), "it sleeps")
    command.running.kill(signal.SIGTERM, 0.1)
    assert command.wait().reason in ("killed", "lost")  # the worker may have heard of the start, or not
    assert living(mark) == set()


def test_a_time_limit_counts_while_the_start_hangs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "START_SECONDS", 0.1)
    os.mkfifo(tmp_path / "fifo")
    command = run(b"cat", redirections=(b"fifo", None, None), time_limit_seconds=0.3)
    ended = command.wait()
    assert (ended.reason, command.pids) == ("time_limit", [])
    assert "had not started" in ended.message


def test_a_supervisor_whose_worker_was_slow_once_sleeps_again(runner, tmp_path):
    proceed, over, pids, read = threading.Event(), threading.Event(), [], []
    script = b"head -c 3000000 /dev/zero; exec 1>&- 2>&-; exec sleep 1000"
    command = Command((b"sh", b"-c", script), ENV, os.fsencode(tmp_path), output_limit_bytes=4_000_000)

    def on_output(_fd, _offset, data):
        read.append(len(data))
        proceed.wait(LIMIT_SECONDS)

    running = runner.run(command, pids.append, on_output, lambda _ended: over.set())
    wait_until(lambda: read, "something was read")
    above = processes.parent(pids[0])
    wait_until(lambda: state(above) == "S", "the supervisor waits for the worker")
    proceed.set()
    wait_until(lambda: sum(read) >= 2_000_000, "the head was read")
    wait_until(lambda: [state(above) for _ in range(200)] == ["S"] * 200, "it waits for the command, and uses no CPU")
    running.kill(signal.SIGKILL, 0)
    assert over.wait(LIMIT_SECONDS)


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_result_comes_back_through_its_own_descriptor(run):
    command = run(b"sh", b"-c", b"echo out; printf result >&3", result_limit_bytes=6)
    ended = command.wait()
    assert (command.stdout, ended.result, ended.result_bytes) == (b"out\n", b"result", 6)


def test_a_result_above_its_limit_is_counted_and_dropped(run):
    ended = run(b"sh", b"-c", b"head -c 5000000 /dev/zero >&3", result_limit_bytes=100).wait()
    assert (ended.exit_code, ended.result, ended.result_bytes) == (0, None, 5_000_000)


def test_output_is_read_while_the_command_runs(run):
    command = run(b"sh", b"-c", b"echo first; exec sleep " + new_mark())
    wait_until(lambda: command.stdout == b"first\n", "the first line is here")
    assert not command.over.is_set()
    command.running.kill(signal.SIGKILL, 0)
    command.wait()


def test_a_slow_reader_slows_the_command_and_loses_nothing(runner, tmp_path):
    # Writes as much as it can until nothing more was taken for a while, then notes how much that was.
    script = b"""
import os, select
os.set_blocking(1, False)
written = 0
while written < 50_000_000 and select.select([], [1], [], 0.5)[1]:
    written += os.write(1, b"%07d\\n" % (written // 8))
open("written", "x").write(str(written))
"""
    proceed, over, pids, got, ends = threading.Event(), threading.Event(), [], [], []

    def on_output(_fd: int, _offset: int, data: bytes) -> None:
        got.append(data)
        proceed.wait(LIMIT_SECONDS)

    command = Command(
        (sys.executable.encode(), b"-ISc", script), ENV, os.fsencode(tmp_path), output_limit_bytes=1 << 30
    )
    runner.run(command, pids.append, on_output, lambda ended: (ends.append(ended), over.set()))
    wait_until((tmp_path / "written").exists, "the command has to wait")
    wait_until(lambda: not Path(f"/proc/{pids[0]}").exists(), "it has ended, with output still on its way")
    proceed.set()
    assert over.wait(LIMIT_SECONDS)
    written = int((tmp_path / "written").read_text())
    assert b"".join(got) == b"".join(b"%07d\n" % n for n in range(written // 8))
    assert ends[0].stdout_bytes == written < 2 << 20


def test_exit_code_and_signal_are_told_apart(run):
    ended = run(b"sh", b"-c", b"exit 143").wait()
    assert (ended.reason, ended.exit_code, ended.signal) == ("exit", 143, None)
    ended = run(b"sh", b"-c", b"kill -TERM $$").wait()
    assert (ended.reason, ended.exit_code, ended.signal) == ("signal", None, 15)
    assert ended.message == "'sh' ended by SIGTERM."


def test_cpu_time_and_memory_of_the_tree_are_measured(run):
    script = b"%s -ISc 'x = bytearray(80_000_000); sum(range(3_000_000))'; exit 0" % sys.executable.encode()
    ended = run(b"sh", b"-c", script).wait()
    assert ended.cpu_seconds > 0.02
    assert 80_000_000 < ended.max_rss_bytes < 200_000_000


def test_a_missing_command_is_not_found(run):
    ended = run(b"no-such-command").wait()
    assert (ended.reason, ended.errno, ended.exit_code) == ("not_found", 2, None)
    assert ended.message == "cannot find 'no-such-command': it is in no directory of the command's PATH."
    assert run(b"./no-such-file").wait().message == "cannot find './no-such-file': there is no such file."
    assert run(b"").wait().reason == "not_found"


def test_a_file_that_is_no_program_cannot_be_executed(run, tmp_path):
    (tmp_path / "plain").write_text("")
    ended = run(b"./plain").wait()
    assert (ended.reason, ended.errno) == ("cannot_execute", 13)
    assert ended.message == "cannot execute './plain': Permission denied."


def test_a_script_whose_interpreter_is_missing_says_so(run, tmp_path):
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    ended = run(b"./script").wait()
    assert ended.reason == "cannot_execute"
    assert ended.message == "cannot execute './script': the file exists, the interpreter it names does not."


@pytest.mark.parametrize("argv", [(), (b"a\0b",), (b"true", b"x" * 3_000_000)], ids=["none", "NUL", "too long"])
def test_words_that_cannot_be_an_argv_are_reported_and_harm_nobody(run, argv):
    ended = run(*argv).wait()
    assert (ended.reason, ended.exit_code) == ("cannot_execute", None)
    assert run(b"true").wait().exit_code == 0


def test_a_missing_working_directory_cannot_be_entered(run):
    ended = run(b"true", cwd=b"/no/such/directory").wait()
    assert (ended.reason, ended.errno, ended.exit_code) == ("cannot_enter_cwd", 2, None)
    assert ended.message == (
        "cannot enter the working directory '/no/such/directory': No such file or directory. 'true' was not started."
    )


# The end of a tree


def test_a_kill_leaves_none_of_a_tree_alive(run):
    mark = new_mark()
    command = run(b"sh", b"-c", TREE + b"wait", mark)
    wait_until(lambda: len(living(mark)) >= 6, "the tree stands")
    command.running.kill(signal.SIGTERM, 0.3)
    ended = command.wait()
    assert living(mark) == set()
    assert (ended.reason, ended.signal) == ("killed", 15)
    assert ended.message == "'sh' was killed, and ended by SIGTERM."


def test_the_whole_tree_gets_the_signal_and_may_use_the_grace_to_clean_up(run, tmp_path):
    # The command itself goes at once; its child, in another session, takes its time.
    child = b"trap 'sleep 0.3; echo tidy > tidied; exit' TERM; echo ready; while :; do sleep 0.01; done"
    command = run(b"sh", b"-c", b'setsid sh -c "$0" & wait', child)
    wait_until(lambda: command.stdout == b"ready\n", "the trap is set")
    command.running.kill(signal.SIGTERM, LIMIT_SECONDS)
    assert command.wait().reason == "killed"
    assert (tmp_path / "tidied").read_text() == "tidy\n"


def test_a_command_that_survives_the_signal_and_exits_is_killed_with_its_exit_code(run):
    command = run(b"sh", b"-c", b"trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done")
    wait_until(lambda: command.stdout == b"ready\n", "the trap is set")
    command.running.kill(signal.SIGTERM, LIMIT_SECONDS)
    ended = command.wait()
    assert (ended.reason, ended.exit_code, ended.signal) == ("killed", 7, None)


def test_a_second_kill_can_shorten_the_grace(run):
    command = run(b"sh", b"-c", b"trap '' TERM; echo ready; while :; do sleep 0.01; done")
    wait_until(lambda: command.stdout == b"ready\n", "the trap is set")
    command.running.kill(signal.SIGTERM, 1000)
    command.running.kill(signal.SIGKILL, 0)
    assert command.wait().signal == 9


def test_a_signal_is_only_delivered(run):
    command = run(b"sh", b"-c", b"trap 'echo caught' USR1; echo ready; while :; do sleep 0.01; done")
    wait_until(lambda: command.stdout == b"ready\n", "the trap is set")
    command.running.signal(signal.SIGUSR1)
    wait_until(lambda: command.stdout == b"ready\ncaught\n", "the signal was caught")
    assert not command.over.is_set()
    command.running.kill(signal.SIGKILL, 0)
    assert command.wait().reason == "killed"


def test_signals_and_kills_after_the_end_reach_nobody(runner, run):
    first = run(b"true")
    first.wait()
    mark = new_mark()
    second = run(b"sleep", mark)  # on the same supervisor
    assert second.pid
    first.running.kill(signal.SIGKILL, 0)
    first.running.signal(signal.SIGKILL)
    assert run(b"true").wait().exit_code == 0
    assert living(mark) == {second.pid}


def test_a_command_killed_at_once_is_killed_once(run):
    mark = new_mark()
    for _ in range(50):
        command = run(b"sleep", mark)
        command.running.kill(signal.SIGKILL, 0)
        assert command.wait().reason == "killed"
    assert living(mark) == set()


def test_a_background_child_that_holds_the_output_does_not_hold_the_task(run):
    mark = new_mark()
    command = run(b"sh", b"-c", b"sleep $0 & echo out", mark)
    ended = command.wait()
    assert (ended.reason, ended.exit_code, command.stdout) == ("exit", 0, b"out\n")
    assert living(mark) == set()


def test_what_a_command_leaves_behind_dies_with_it(run):
    mark = new_mark()
    command = run(b"sh", b"-c", TREE + b"until [ $(pgrep -cf $0) -ge 6 ]; do :; done; exit 4", mark)
    ended = command.wait()
    assert living(mark) == set()
    assert (ended.reason, ended.exit_code) == ("exit", 4)


def test_a_time_limit_kills_a_tree_that_is_deaf_to_sigterm(run):
    mark = new_mark()
    script = b"trap '' TERM; sleep $0 & sleep $0"
    command = run(b"sh", b"-c", script, mark, time_limit_seconds=0.3, kill_grace_seconds=0.3)
    ended = command.wait()
    assert living(mark) == set()
    assert (ended.reason, ended.signal) == ("time_limit", 9)
    assert ended.message == "'sh' ran longer than its time limit of 0.3 s: it was killed, and ended by SIGKILL."


def test_at_the_soft_time_limit_the_tree_gets_sigterm_and_how_the_command_ends_is_up_to_it(run):
    obeys = run(b"sh", b"-c", b"sleep 1000", soft_time_limit_seconds=0.2)
    asked = run(b"sh", b"-c", b"trap 'exit 3' TERM; sleep 1000 & wait", soft_time_limit_seconds=0.2)
    ended = obeys.wait()
    assert (ended.reason, ended.signal) == ("signal", signal.SIGTERM)
    ended = asked.wait()
    assert (ended.reason, ended.exit_code) == ("exit", 3)


def test_after_the_soft_time_limit_the_hard_one_is_still_in_force(run):
    mark = new_mark()
    command = run(
        b"sh",
        b"-c",
        b"trap '' TERM; sleep $0",
        mark,
        soft_time_limit_seconds=0.1,
        time_limit_seconds=0.5,
        kill_grace_seconds=0.1,
    )
    ended = command.wait()
    assert (ended.reason, ended.signal) == ("time_limit", signal.SIGKILL)
    assert living(mark) == set()


def test_nothing_of_a_command_lives_when_its_lease_ends(run):
    mark = new_mark()
    until = processes.lease_clock() + 1.0
    command = run(b"sh", b"-c", TREE + b"trap '' TERM; wait; wait", mark, lease_until=until, kill_grace_seconds=0.4)
    ended = command.wait()
    assert ended.reason == "lease"
    assert living(mark) == set()


def test_the_signal_comes_the_grace_before_the_end_of_the_lease(run):
    until = processes.lease_clock() + 1000
    ended = run(b"sleep", b"10000", lease_until=until, kill_grace_seconds=999.5).wait()
    assert (ended.reason, ended.signal) == ("lease", signal.SIGTERM)
    assert processes.lease_clock() < until


def test_a_lease_that_is_renewed_goes_on_and_one_that_is_over_lets_nothing_start(run, tmp_path):
    until = processes.lease_clock() + 2.0
    renewed = run(b"sh", b"-c", b"until [ -e gate ]; do sleep 0.01; done", lease_until=until, kill_grace_seconds=0.1)
    assert renewed.pid
    renewed.running.renew(until + 1000)
    late = run(b"sleep", b"1000", lease_until=processes.lease_clock() - 1)
    assert late.wait().reason == "lease"
    wait_until(lambda: processes.lease_clock() > until, "the first lease would be over")
    (tmp_path / "gate").touch()
    assert renewed.wait().reason == "exit"


def test_a_command_without_a_lease_cannot_be_given_one(run):
    command = run(b"sh", b"-c", b"read line; exit 5")
    command.running.renew(0.0)
    assert command.wait().exit_code in (1, 5)


def test_a_tree_that_keeps_forking_dies(run):
    mark = new_mark()
    # Each generation starts two and ends: no process lives for long, the tree for ever; but not without bound.
    most = sum(name.isdigit() for name in os.listdir("/proc")) + 300
    script = (
        b'sleep 0.02; [ $(ls /proc | grep -c \'^[0-9]\') -lt %d ] && for i in 1 2; do sh -c "$1" $0 "$1" & done; exit'
    )
    script %= most
    command = run(b"sh", b"-c", b'sh -c "$1" $0 "$1" & sleep 90', mark, script)
    wait_until(lambda: len(living(mark)) > 20, "it has forked a lot")
    command.running.kill(signal.SIGTERM, 0)
    assert command.wait().reason == "killed"
    assert living(mark) == set()


def test_orphans_are_reaped_while_the_command_runs(run):
    command = run(b"sh", b"-c", b"for i in $(seq 50); do (true &); done; echo done; exec sleep " + new_mark())
    wait_until(lambda: command.stdout == b"done\n", "the orphans were made")
    above = parent(command.pid)
    wait_until(lambda: processes.children(above) == [command.pid], "no zombie is left")
    command.running.kill(signal.SIGKILL, 0)
    command.wait()


def test_a_kill_reaches_a_command_whose_start_hangs(runner, run, monkeypatch):
    monkeypatch.setattr(commands, "START_SECONDS", 0.1)
    assert run(b"true").wait().exit_code == 0
    hanging = runner._idle[-1].pid
    os.kill(hanging, signal.SIGSTOP)  # it reads no more than one that hangs on a dead mount
    mark = new_mark()
    command = run(b"sleep", mark)
    command.running.kill(signal.SIGTERM, 0.1)
    ended = command.wait()
    assert ended.reason == "killed"
    assert ended.message == "'sleep' was killed before it had started: its directory or program did not answer."
    assert living(mark) == set()
    assert run(b"true").wait().exit_code == 0


def test_a_time_limit_may_be_years(run):
    assert run(b"true", time_limit_seconds=1e9).wait().exit_code == 0


# Deaths of others


WORKER = """
import os, sys, threading
from aque.commands import CommandRunner
from aque.supervised import Command
mark, tree = sys.argv[1].encode(), sys.argv[2].encode()
runner = CommandRunner()
runner.start()
started = threading.Event()
command = Command((b"sh", b"-c", tree + b"wait", mark), {b"PATH": os.environb[b"PATH"]}, b"/")
runner.run(command, lambda pid: started.set(), lambda *output: None, lambda ended: None)
started.wait(20)
fork = os.fork()  # holds copies of all sockets, as pool processes do
if fork:
    print(fork, runner._server.pid, flush=True)
threading.Event().wait(60)
"""


def test_nothing_survives_a_worker_that_is_killed_even_if_a_fork_of_it_holds_its_sockets():
    mark = new_mark()
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, mark, TREE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as worker:
        assert worker.stdout is not None
        fork, server = map(int, worker.stdout.readline().split())
        try:
            wait_until(lambda: len(living(mark) - {worker.pid, fork}) >= 6, "the tree stands")
            worker.kill()
            wait_until(lambda: not living(mark) - {fork}, "the tree is gone")
            wait_until(lambda: not Path(f"/proc/{server}").exists(), "the server is gone")
            assert Path(f"/proc/{fork}/cmdline").read_bytes()  # it was there all the time
        finally:
            os.kill(fork, signal.SIGKILL)


def test_a_supervisor_that_hangs_does_not_keep_its_command_alive_after_the_worker(runner, run):
    mark = new_mark()
    command = run(b"sleep", mark)
    os.kill(parent(command.pid), signal.SIGSTOP)
    server = runner._server
    assert not runner.stop(timeout_seconds=0.5)
    assert command.wait().reason == "lost"
    assert server.wait(LIMIT_SECONDS) == 0
    assert living(mark) == set()


def test_the_death_of_a_supervisor_loses_its_command_and_leaves_nothing_of_it(runner, run):
    mark = new_mark()
    command = run(b"sh", b"-c", TREE + b"wait", mark)
    other = run(b"sleep", new_mark())
    wait_until(lambda: len(living(mark)) >= 6 and other.started.is_set(), "the tree stands")
    os.kill(parent(command.pid), signal.SIGKILL)
    ended = command.wait()
    assert (ended.reason, ended.exit_code) == ("lost", None)
    wait_until(lambda: not living(mark), "the server has killed the tree")
    assert not other.over.is_set()
    assert run(b"true").wait().exit_code == 0


def test_the_death_of_a_supervisor_is_told_when_nothing_lives_of_what_it_ran(runner, run):
    mark = new_mark()
    command = run(b"sh", b"-c", TREE + b"wait", mark)
    above = parent(command.pid)
    wait_until(lambda: len(living(mark)) >= 6, "the tree stands")
    os.kill(server_of(runner), signal.SIGSTOP)  # nobody kills for it now
    try:
        os.kill(above, signal.SIGKILL)
        wait_until(lambda: above in runner._lost, "the worker knows")
        assert not command.ends
        assert len(living(mark)) >= 6
    finally:
        os.kill(server_of(runner), signal.SIGCONT)
    assert command.wait().reason == "lost"
    assert living(mark) == set()


#: A worker with a process of its pool, a subreaper that is deaf to SIGTERM, and a tree below that.
POOL = """
import os, signal, subprocess, sys, threading
from aque import processes
from aque.commands import CommandRunner
from aque.supervised import Command
mark, tree = sys.argv[1:]
runner = CommandRunner()
runner.start()
child = os.fork()
if not child:
    processes.become_subreaper()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.run(["sh", "-c", tree + "wait; wait; sleep $0", mark])
runner.watch(child)
answered = threading.Event()
command = Command((b"true",), {b"PATH": os.environb[b"PATH"]}, b"/")
runner.run(command, lambda pid: None, lambda *output: None, lambda ended: answered.set())
answered.wait(20)
print(child, runner._server.pid, flush=True)
if sys.stdin.readline() == "stop\\n":
    runner.stop()
    print("stopped", flush=True)
threading.Event().wait(60)
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["killed", "killed after it has stopped its supervisors"])
def test_the_pool_of_a_worker_that_is_killed_is_ended_with_all_that_it_started(stopped):
    mark = new_mark()
    with subprocess.Popen(
        [sys.executable, "-c", POOL, mark, TREE],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdin is not None
        child, server = map(int, worker.stdout.readline().split())
        wait_until(lambda: len(living(mark)) >= 8, "the tree stands")
        if stopped:
            worker.stdin.write(b"stop\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == b"stopped\n"
            assert len(living(mark)) >= 8
        worker.kill()
        wait_until(lambda: not living(mark), "the tree is gone")
        wait_until(lambda: processes.is_over(child) and processes.is_over(server), "and so are they")


def test_commands_outlive_the_server_and_the_next_ones_get_another(runner, run):
    commands = [run(b"sh", b"-c", b"read line < /dev/null; sleep 0.2; echo out") for _ in range(4)]
    assert all(command.started.wait(LIMIT_SECONDS) for command in commands)
    first = server_of(runner)
    os.kill(first, signal.SIGKILL)
    more = [run(b"echo", b"more") for _ in range(8)]
    assert {command.wait().exit_code for command in [*commands, *more]} == {0}
    assert {command.stdout for command in commands} == {b"out\n"}
    assert server_of(runner) != first


def test_a_supervisor_that_fails_kills_its_tree_and_says_why(run, caplog):
    mark = new_mark()
    command = run(b"sh", b"-c", TREE + b"wait", mark, time_limit_seconds=0.5, kill_grace_seconds="no number")
    ended = command.wait()
    assert ended.reason == "lost"
    assert "ended (TypeError: unsupported operand" in ended.message
    assert living(mark) == set()
    assert "a supervisor failed, and killed what it ran:\nTraceback" in caplog.text


def test_a_server_that_cannot_start_refuses_commands_and_does_not_hold_them(runner, run, monkeypatch, tmp_path):
    held = run(b"sleep", new_mark())
    assert held.pid
    while runner._idle:
        os.kill(runner._idle[0].pid, signal.SIGKILL)
        wait_until(lambda gone=runner._idle[0]: gone not in runner._channels, "the supervisor is gone")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    os.kill(server_of(runner), signal.SIGKILL)
    ended = run(b"true").wait()
    assert ended.reason == "cannot_execute"
    assert ended.message == (
        "'true' was not started: there is no supervisor for it (the supervisors' server does not start)."
    )
    monkeypatch.setattr(sys, "executable", "/no/such/interpreter")
    assert run(b"true").wait().errno == 2
    monkeypatch.undo()
    assert run(b"true").wait().exit_code == 0
    assert not held.over.is_set()


def test_sigterm_to_a_supervisor_kills_what_it_runs(run):
    mark = new_mark()
    command = run(b"sh", b"-c", TREE + b"wait", mark, kill_grace_seconds=0.2)
    wait_until(lambda: len(living(mark)) >= 6, "the tree stands")
    os.kill(parent(command.pid), signal.SIGTERM)
    assert command.wait().reason == "killed"
    assert living(mark) == set()


def test_stop_kills_and_reports_what_still_runs(tmp_path):
    runner = CommandRunner()
    runner.start()
    mark = new_mark()
    command = Watched(runner, Command((b"sh", b"-c", TREE + b"wait", mark), ENV, os.fsencode(tmp_path)))
    wait_until(lambda: len(living(mark)) >= 6, "the tree stands")
    server = server_of(runner)
    assert runner.stop()
    assert living(mark) == set()
    assert command.wait().reason == "killed"
    assert not Path(f"/proc/{server}").exists()
    with pytest.raises(RuntimeError, match="the command runner is stopped: 'true' was not started"):
        Watched(runner, Command((b"true",), ENV, b"/"))


def test_a_runner_that_was_not_started_says_so():
    with pytest.raises(RuntimeError, match="not started in this process"):
        Watched(CommandRunner(), Command((b"true",), ENV, b"/"))


def test_the_server_is_in_a_session_of_its_own_and_not_named_as_a_worker(runner):
    server = server_of(runner)
    assert os.getsid(server) == server != os.getsid(0)
    wait_until(lambda: Path(f"/proc/{server}/comm").read_text() == "aque-superv\n", "the server has its name")


# Many


def test_supervisors_that_are_idle_for_long_end(runner, run, monkeypatch):
    monkeypatch.setattr(commands, "IDLE_SECONDS", 0.1)
    for command in [run(b"sleep", b"0.1") for _ in range(10)]:
        command.wait()
    wait_until(lambda: len(processes.children(server_of(runner))) == commands.WARM, "the others have ended")
    assert run(b"true").wait().exit_code == 0


def test_two_hundred_commands_run_at_once_in_little_memory(run):
    mark = new_mark()
    commands = [run(b"sleep", mark) for _ in range(200)]
    assert all(command.started.wait(LIMIT_SECONDS) for command in commands)
    assert len(living(mark)) == 200
    private = [private_bytes(parent(command.pid)) for command in commands[::20]]
    for command in commands:
        command.running.kill(signal.SIGTERM, LIMIT_SECONDS)
    assert {command.wait().reason for command in commands} == {"killed"}
    assert living(mark) == set()
    assert max(private) <= 4 << 20


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def test_descriptors_do_not_leak(runner, tmp_path):
    def open_here() -> int:
        return len(os.listdir("/proc/self/fd")) - len(runner._channels)

    def open_there() -> int:
        pids = processes.descendants(os.getpid())
        return max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

    cwds = [os.fsencode(tmp_path), b"/nowhere"]
    argvs = [(b"true",), (b"no-such-command",), (b"sh", b"-c", b"echo x; exit 3")]

    def run_many(number: int) -> None:
        commands = [
            Watched(runner, Command(argvs[n % 3], ENV, cwds[n % 5 == 0], stdin=b"x" * (n % 2))) for n in range(number)
        ]
        for command in commands:
            command.wait()

    run_many(20)
    here, there = open_here(), open_there()
    for _ in range(100):
        run_many(20)
    assert open_here() <= here
    assert open_there() <= there


def test_a_callback_that_raises_harms_nobody(runner, tmp_path, caplog):
    def fail(*_given: object) -> None:
        raise ValueError("a callback's own fault")

    runner.run(Command((b"echo",), ENV, os.fsencode(tmp_path)), fail, fail, fail)
    assert Watched(runner, Command((b"true",), ENV, b"/")).wait().exit_code == 0
    wait_until(lambda: caplog.text.count("a callback's own fault") >= 3, "all three were logged")


def test_both_ways_to_find_children_agree(run):
    mark = new_mark()
    command = run(b"sh", b"-c", TREE + b"wait", mark)
    wait_until(lambda: len(living(mark)) >= 6, "the tree stands")
    above = parent(command.pid)
    wait_until(lambda: sorted(processes.children(above)) == sorted(processes.children_of_all()[above]), "they agree")
    command.running.kill(signal.SIGKILL, 0)
    command.wait()


def test_the_supervisor_needs_nothing_but_the_standard_library():
    code = server.PROGRAM.replace("main()", "print(*[name for name in sys.modules if 'aque' in name])")
    root = str(Path(server.__file__).parents[1])
    done = subprocess.run([sys.executable, "-ISc", code, "", "", root], capture_output=True, check=True, text=True)
    assert sorted(done.stdout.split()) == [
        "aque",
        "aque.cgroups",
        "aque.launch",
        "aque.processes",
        "aque.protocol",
        "aque.server",
        "aque.supervisor",
        "aque.version",
    ]


# -- what it uses, and the CPUs that it has -----------------------------------------------------------------------------


def test_what_a_command_and_its_descendants_have_used_is_reported(run: Callable[..., Watched]) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    hold = "x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1"
    script = f'"$0" -c "{burn}"; "$0" -c "{hold}"; (setsid "$0" -c "{burn}" &)'
    ended = run(b"sh", b"-c", os.fsencode(script + "; sleep 1"), os.fsencode(sys.executable)).wait()
    assert ended.reason == "exit"
    assert ended.cpu_seconds >= 0.5  # also of the one in a session of its own, which lost its parents
    assert 200 << 20 <= ended.max_rss_bytes < 400 << 20


def test_what_it_has_written_to_a_disk_is_reported_and_what_it_has_not_is_not(
    run: Callable[..., Watched], tmp_path: Path
) -> None:
    write = "import os, sys\nf = open(sys.argv[1], 'wb'); f.write(bytes(20 << 20)); f.flush(); os.fsync(f.fileno())"
    words = [os.fsencode(word) for word in (sys.executable, "-c", write)]
    first = run(*words, os.fsencode(tmp_path / "file")).wait()
    second = run(*words, b"/dev/null").wait()  # by the same supervisor
    assert (first.reason, second.reason) == ("exit", "exit"), (first, second)
    assert 20 << 20 <= first.written_bytes < 22 << 20
    assert second.written_bytes < 1 << 20


def affinity(command: Watched) -> set[int]:
    assert command.wait().reason == "exit"
    return set(eval(command.stdout))


def test_a_command_is_bound_to_its_cpus_and_the_next_one_is_not(run: Callable[..., Watched], tmp_path: Path) -> None:
    words = [os.fsencode(sys.executable), b"-c", b"import os; print(os.sched_getaffinity(0))"]
    own = os.sched_getaffinity(0)
    (last,) = sorted(own)[-1:]
    assert affinity(run(*words, cpus=(last,))) == {last}
    assert affinity(run(*words)) == own
    assert affinity(run(*words, cpus=(last,), redirections=(b"/dev/null", None, None))) == {last}  # by a fork
    assert affinity(run(*words)) == own


def test_a_command_that_cannot_be_bound_is_not_started(run: Callable[..., Watched]) -> None:
    ended = run(b"true", cpus=(4000,)).wait()
    assert ended.reason == "cannot_execute"
    assert "4000" in ended.message
