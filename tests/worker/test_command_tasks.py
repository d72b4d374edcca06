"""Commands in real workers: what they get, what comes back byte for byte, how they end, and that nothing of them stays."""

import os
import signal
from pathlib import Path
from uuid import uuid4

import pytest

import aque
from aque.errors import CommandFailed, TaskError, TaskKilled
from aque.states import Reason
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, PROGRAMS, Farm, processes_with

LIMIT = LIMIT_SECONDS
EVERY_BYTE = bytes(range(256))


def script(text: str, *words: str | bytes) -> list[str | bytes]:
    return ["sh", "-c", text, "sh", *words]


# -- what comes back ------------------------------------------------------------------------------------------------------


def test_output_is_kept_byte_for_byte(farm: Farm, tmp_path: Path) -> None:
    every = tmp_path / "every"
    every.write_bytes(EVERY_BYTE * 1000)
    task = aque.shell(script('cat "$1"; cat "$1" >&2', str(every)))
    assert task.get(timeout=LIMIT)["exit_code"] == 0
    assert farm.output(task, 1) == EVERY_BYTE * 1000
    assert farm.output(task, 2) == EVERY_BYTE * 1000


def test_the_result_shows_undecodable_bytes_escaped_and_only_the_beginning_of_much_output(farm: Farm) -> None:
    odd = aque.shell(["printf", "a\\377\\000b"]).get(timeout=LIMIT)
    assert odd == {"exit_code": 0, "stdout": "a\\xff\0b", "truncated": False}
    much = aque.shell(script("head -c 100000 /dev/zero | tr '\\0' x")).get(timeout=LIMIT)
    assert (len(much["stdout"]), much["truncated"]) == (64 << 10, True)


def test_words_reach_the_command_byte_for_byte(farm: Farm) -> None:
    words = [EVERY_BYTE[1:], b"", b"-n", b" two  words ", b"\xff\xfe", "ü".encode(), b"'\"$(`*?\n"]
    task = aque.shell([b"printf", b"%s\\0", *words])
    task.get(timeout=LIMIT)
    assert farm.output(task) == b"".join(word + b"\0" for word in words)


def test_stdin_reaches_the_command_byte_for_byte(farm: Farm) -> None:
    task = aque.shell(["cat"], stdin=EVERY_BYTE * 5000)
    task.get(timeout=LIMIT)
    assert farm.output(task) == EVERY_BYTE * 5000


def test_a_command_without_stdin_reads_an_end_of_file(farm: Farm) -> None:
    assert aque.shell(["cat"]).get(timeout=LIMIT)["stdout"] == ""


def test_of_much_output_the_start_and_the_end_are_kept_with_a_mark_between_and_the_worker_goes_on(farm: Farm) -> None:
    task = aque.shell(script("seq 1 6000000; echo last >&2"))
    beside = aque.shell(["echo", "unharmed"])
    assert task.get(timeout=LIMIT)["truncated"]
    whole = b"".join(b"%d\n" % number for number in range(1, 6_000_001))
    head, tail = 4 << 20, 2 << 20
    mark = b"\n[aque: %d bytes are cut out here]\n" % (len(whole) - head - tail)
    assert farm.output(task) == whole[:head] + mark + whole[-tail:]
    assert farm.output(task, 2) == b"last\n"
    assert farm.row(task)["truncated"] is True
    assert beside.get(timeout=LIMIT)["stdout"] == "unharmed\n"
    assert farm.row(beside)["truncated"] is False


def test_output_can_be_read_while_the_command_runs(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    task = aque.shell(script('echo early; until [ -e "$1" ]; do sleep 0.02; done; echo late', str(gate)))
    wait_until(lambda: farm.output(task) == b"early\n", LIMIT, "its first line is there")
    assert farm.state(task) == "running"
    gate.touch()
    task.get(timeout=LIMIT)
    assert farm.output(task) == b"early\nlate\n"


def test_a_background_child_that_holds_the_output_does_not_hold_the_task(farm: Farm) -> None:
    mark = f"TEST_MARK={uuid4().hex}"
    task = aque.shell(script(f"export {mark}; sleep 1000 & echo started"))
    assert task.get(timeout=LIMIT)["stdout"] == "started\n"
    assert processes_with(mark) == []


# -- how they end ---------------------------------------------------------------------------------------------------------


def test_an_exit_status_other_than_0_is_an_error_with_its_status(farm: Farm) -> None:
    task = aque.shell(script("echo partial; exit 3"))
    with pytest.raises(CommandFailed, match="status 3"):
        task.get(timeout=LIMIT)
    row = farm.row(task)
    assert (row["state"], row["reason"], row["exit_code"], row["signal"]) == ("error", "exit", 3, None)
    assert farm.output(task) == b"partial\n"


def test_a_signal_that_ends_the_command_is_an_error_with_its_number(farm: Farm) -> None:
    task = aque.shell(script("kill -s USR1 $$"))
    with pytest.raises(CommandFailed, match="signal 10"):
        task.get(timeout=LIMIT)
    row = farm.row(task)
    assert (row["reason"], row["exit_code"], row["signal"]) == ("signal", None, signal.SIGUSR1)


def test_a_dependent_of_a_failed_command_sees_its_status(farm: Farm) -> None:
    broken = aque.shell(script("echo out; exit 7"))
    after = tasks.echo.apply_async(("cleanup",), after_failed=broken)
    assert after.get(timeout=LIMIT) == "cleanup"


def test_a_command_is_repeated_as_often_as_it_may_and_each_attempt_knows_its_number(farm: Farm, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    task = aque.shell(script('echo $AQUE_ATTEMPT >>"$1"; [ $AQUE_ATTEMPT = 3 ]', str(seen)), max_attempts=5)
    assert task.get(timeout=LIMIT)["exit_code"] == 0
    assert seen.read_text().split() == ["1", "2", "3"]
    assert farm.attempts(task) == [(1, "error", "exit"), (2, "error", "exit")]


@pytest.mark.parametrize("command", ["no-such-command-anywhere", "./no-such-file", "/no/such/file"])
def test_a_command_that_does_not_exist_says_not_found(farm: Farm, command: str) -> None:
    task = aque.shell([command])
    with pytest.raises(CommandFailed, match="cannot find"):
        task.get(timeout=LIMIT)
    row = farm.row(task)
    assert (row["reason"], row["exit_code"], row["signal"]) == (Reason.NOT_FOUND, None, None)


def test_a_file_that_is_not_executable_says_so(farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "orphan").write_text("#!/no/such/interpreter\n")
    (tmp_path / "orphan").chmod(0o755)
    for name in ("plain", "orphan", ""):
        task = aque.shell([str(tmp_path / name)])
        with pytest.raises(CommandFailed, match="cannot execute"):
            task.get(timeout=LIMIT)
        assert farm.row(task)["reason"] == "cannot_execute", name


def test_a_working_directory_that_is_missing_or_a_file_says_so(farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cwd in (tmp_path / "missing", tmp_path / "file"):
        task = aque.shell(["pwd"], cwd=str(cwd))
        with pytest.raises(CommandFailed, match="working directory"):
            task.get(timeout=LIMIT)
        assert farm.row(task)["reason"] == "cannot_enter_cwd"


def test_a_command_that_runs_longer_than_its_time_limit_is_ended_with_all_that_it_started(farm: Farm) -> None:
    mark = f"TEST_MARK={uuid4().hex}"
    task = aque.shell(script(f"export {mark}; setsid sleep 1000 & sleep 1000"), time_limit=0.3)
    with pytest.raises(TaskError, match="time limit"):
        task.get(timeout=LIMIT)
    assert farm.row(task)["reason"] == "time_limit"
    assert processes_with(mark) == []


# -- kills ----------------------------------------------------------------------------------------------------------------


def test_a_kill_leaves_no_process_of_the_command(farm: Farm, tmp_path: Path) -> None:
    mark, up = f"TEST_MARK={uuid4().hex}", tmp_path / "up"
    text = f'trap "" TERM; export {mark}; sleep 1000 & setsid sh -c "sleep 1000 & wait" & (setsid sleep 1000 &) ; '
    task = aque.shell(script(text + 'touch "$1"; sleep 1000; sleep 1000', str(up)))
    wait_until(up.exists, LIMIT, "it runs")
    wait_until(lambda: len(processes_with(mark)) >= 4, LIMIT, "all of it runs")
    task.kill()
    with pytest.raises(TaskKilled):
        task.get(timeout=LIMIT)
    assert processes_with(mark) == []
    row = farm.row(task)
    assert (row["state"], row["reason"], row["attempt"]) == ("killed", "request", 1)


def test_a_command_that_answers_the_signal_by_itself_is_killed_all_the_same(farm: Farm, tmp_path: Path) -> None:
    up = tmp_path / "up"
    task = aque.shell(script('trap "echo cleaned; exit 0" TERM; touch "$1"; while :; do sleep 0.02; done', str(up)))
    wait_until(up.exists, LIMIT, "it runs")
    task.kill()
    row = farm.wait_for_state(task, "killed", "success", "error")
    assert row["state"] == "killed"
    assert farm.output(task) == b"cleaned\n"


def test_a_signal_that_does_not_end_a_task_is_delivered_and_the_exit_decides(farm: Farm, tmp_path: Path) -> None:
    up, got = tmp_path / "up", tmp_path / "got"
    text = 'trap "touch $2" USR1; touch "$1"; until [ -e "$2" ]; do sleep 0.02; done; exit 0'
    task = aque.shell(script(text, str(up), str(got)))
    wait_until(up.exists, LIMIT, "it runs")
    task.kill("USR1")
    assert task.get(timeout=LIMIT)["exit_code"] == 0
    assert farm.row(task)["state"] == "success"


def test_a_signal_that_only_is_delivered_withdraws_nothing_that_waits(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = tasks.started.delay(str(tmp_path / "started"), str(gate))
    second = aque.shell(["true"], depends_on=first)
    second.kill("USR1")
    gate.touch()
    assert second.get(timeout=LIMIT)["exit_code"] == 0


def test_a_kill_of_a_complete_task_changes_nothing(farm: Farm) -> None:
    task = aque.shell(["true"])
    task.get(timeout=LIMIT)
    before = farm.row(task)
    task.kill()
    assert farm.row(task) == before


# -- what a command sees --------------------------------------------------------------------------------------------------


def test_a_command_knows_its_id_attempt_cpus_and_farm(farm: Farm) -> None:
    variables = "$AQUE_TASK_ID $AQUE_TID $AQUE_ATTEMPT $AQUE_CPUS $AQUE_BROKER"
    task = aque.shell(script(f'echo "{variables}"'), cpus="1/8")
    assert task.get(timeout=LIMIT)["stdout"].split() == [task.id, task.id, "1", "0.5", farm.url]


def test_a_command_gets_the_submitters_environment_directory_and_umask_and_nothing_of_the_workers(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONLY_HERE", "1")
    monkeypatch.delenv("TEST_FARM")
    umask = os.umask(0o027)
    try:
        task = aque.shell(script("echo $ONLY_HERE; pwd; umask; echo ${TEST_FARM-none}"))
    finally:
        os.umask(umask)
    assert task.get(timeout=LIMIT)["stdout"].split() == ["1", str(tmp_path), "0027", "none"]


def test_a_given_environment_is_all_that_a_command_gets(farm: Farm) -> None:
    odd = os.fsdecode(b"\xff=\n")
    task = aque.shell(["/usr/bin/env", "-0"], env={"ODD": odd, "EMPTY": ""})
    task.get(timeout=LIMIT)
    seen = dict(pair.split(b"=", 1) for pair in farm.output(task).split(b"\0")[:-1])
    assert {name: value for name, value in seen.items() if not name.startswith(b"AQUE_")} == {
        b"ODD": b"\xff=\n",
        b"EMPTY": b"",
    }


def test_a_command_submits_tasks_that_are_its_children(farm: Farm) -> None:
    parent = aque.shell([str(PROGRAMS / "aque"), "submit", "--wait", "--", "sh", "-c", "echo $AQUE_PARENT_ID"], cpus=0)
    assert parent.get(timeout=LIMIT)["stdout"].split() == [parent.id]


def test_500_commands_all_end_and_keep_their_own_output(farm: Farm) -> None:
    with aque.graph() as job:
        many = [aque.shell(["echo", str(number)], cpus=0.25) for number in range(500)]
    job.handle.get(timeout=LIMIT)
    assert [farm.output(task) for task in many] == [f"{number}\n".encode() for number in range(500)]
