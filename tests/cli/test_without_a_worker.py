"""Verbs that need no worker: submit, kill, wait, status, doctor, init, and what they refuse."""

import csv
import json
import os
import re
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from aque.cli.main import SUMMARIES
from aque.store import schema
from tests.servers import wait_until

CONTRACT = [
    "id", "name", "state", "reason", "attempt", "worker", "exit_code", "signal", "priority", "cpus", "memory",
    "depends_on", "parent_id", "job_id", "submitter", "submitted_at", "started_at", "finished_at",
]  # fmt: skip


def rows(aque, *words):
    return [json.loads(line) for line in aque("status", "--json", *words).out.splitlines()]


# -- submit


def test_submit_prints_the_id_alone(aque):
    done = aque("submit", "--", "true")
    assert (done.status, done.out, done.err) == (0, f"{done.id}\n", "")


def test_submit_json_prints_a_line_of_json(aque):
    (line,) = aque("submit", "--json", "--name", "n", "--", "true").out.splitlines()
    assert json.loads(line) == {"id": 1, "job_id": 1, "name": "n", "state": "ready"}


def test_status_json_has_the_fields_of_the_contract_in_their_order(aque):
    first = aque.submit("--", "true")
    second = aque.submit(
        "--after", str(first), "--cpus", "1/4", "--memory", "2K", "--priority", "5", "--", "sh", "-c", "x"
    )
    row = rows(aque)[1]
    assert list(row)[:18] == CONTRACT
    assert row["id"] == row["job_id"] == second
    assert (row["name"], row["state"], row["attempt"], row["priority"]) == ("sh", "pending", 0, 5)
    assert (row["cpus"], row["memory"], row["depends_on"]) == ("1/4", 2048, [first])
    assert row["submitted_at"].endswith("Z") and row["started_at"] is None
    assert row["why"] == "waits for 1 task"


def test_a_task_that_waits_for_its_time_says_so_and_when_that_is(aque):
    task = aque.submit("--", "true")
    with sqlite3.connect(Path(aque.environment["AQUE_STATE_DIR"]) / "aque.db") as database:
        database.create_function("aque_wall_clock", 0, float)
        # The first two seconds of the year 2100.
        database.execute(
            "UPDATE aque_task SET state = 'pending', unmet = 1, not_before = 4102444800, expires_at = 4102444801"
        )
    database.close()
    (row,) = rows(aque)
    assert (row["not_before"], row["expires_at"]) == ("2100-01-01T00:00:00.000000Z", "2100-01-01T00:00:01.000000Z")
    assert row["why"] == "waits for its time, 2100-01-01 00:00:00 UTC"
    assert "waits for its time, 2100-01-01 00:00:00 UTC (in " in aque("explain", str(task)).out
    assert json.loads(aque("explain", "--json", str(task)).out)["reasons"][0]["not_before"] == row["not_before"]


def test_status_json_has_what_attempts_have_used_after_the_fields_of_the_contract(aque):
    aque.submit("--", "true")
    (row,) = rows(aque)
    assert list(row)[18:] == [
        "duration", "io_bytes", "cpu_seconds", "max_rss_bytes", "read_bytes", "written_bytes", "not_before",
        "expires_at", "why",
    ]  # fmt: skip
    assert [row[name] for name in ("cpu_seconds", "max_rss_bytes", "read_bytes", "written_bytes")] == [None] * 4


def test_a_duration_can_be_relative_to_the_average_of_its_priority(aque):
    aque.submit("--duration", "2m", "--priority", "3", "--", "true")
    task_id = aque.submit("--duration", "0.5x", "--priority", "3", "--", "true")
    assert aque("status", str(task_id), "--csv", "duration").out == "duration\n60.0\n"
    called = aque("call", "--duration", "2X", "os:getpid").id
    assert aque("status", str(called), "--csv", "duration").out == "duration\n120.0\n"  # nothing is known: 2 minutes


def test_options_end_at_the_first_word_that_is_not_one(aque):
    task_id = aque.submit("--cpus", "2", "gzip", "--cpus", "9")
    assert aque("status", str(task_id), "--csv", "name,cpus").out == "name,cpus\ngzip,2\n"


def test_one_word_that_a_shell_would_take_apart_is_refused(aque):
    for word in ("sleep 1", "a|b", "a<b", "a;b", "a&"):
        done = aque("submit", "--", word)
        assert done.status == 2 and "--shell" in done.err
    assert rows(aque) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cpus", "many"], "cannot read CPU reservation 'many'"),
        (["--cpus", "5/4"], "cannot read CPU reservation"),
        (["--memory", "2X"], "cannot read memory"),
        (["--duration", "soon"], "cannot read the time 'soon'"),
        (["--duration", "0x"], "cannot read the duration '0x'"),
        (["--duration", "1001x"], "at most 1000"),
        (["--time-limit", "2x"], "cannot read the time '2x'"),
        (["--time-limit", "-1"], "cannot read the time"),
        (["--soft-time-limit", "soon"], "cannot read the time 'soon'"),
        (["--priority", "high"], "'high' is not a valid integer"),
        (["--priority", "99999999999"], "priority must be"),
        (["--max-attempts", "0"], "max_attempts must be"),
        (["--after", "99"], "there is no task 99. Nothing was submitted."),
        (["--after", "x"], "'x' is not a task id"),
        (["--after", "@last"], "has not submitted a task yet"),
        (["--after", "9-3"], "'9-3' is not a task id"),
        (["--bogus"], "no such option '--bogus'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2_and_submits_nothing(aque, options, said):
    done = aque("submit", *options, "--", "true")
    assert done.status == 2
    assert said in done.err.lower() or said in done.err
    assert done.err.startswith("aque: ") and done.err.count("\n") == 1
    assert done.out == "" and aque.count() == 0


def test_no_command_is_refused(aque):
    assert aque("submit").status == 2
    assert aque("submit", "--", "").status == 2


def test_stdin_beyond_the_limit_is_refused(aque):
    done = aque("submit", "--stdin", "-", "--", "cat", given=b"12345", env={"AQUE_STDIN_LIMIT_BYTES": "4"})
    assert done.status == 2 and "stdin_limit_bytes" in done.err


def test_a_task_named_with_two_conditions_is_refused(aque):
    task_id = str(aque.submit("--", "true"))
    done = aque("submit", "--after", task_id, "--after-failed", task_id, "--", "true")
    assert done.status == 2 and f"task {task_id} is named by two" in done.err


def test_words_of_any_bytes_are_taken(aque):
    task_id = aque.submit("--", b"caf\xe9", b"\xff\xfe")
    assert aque("status", str(task_id), "--csv", "name").out == "name\ncaf\\udce9\n"


def test_ids_are_lists_ranges_and_last(aque):
    ids = [aque.submit("--", "true") for _ in range(4)]
    assert rows(aque, f"{ids[0]},{ids[2]}")[1]["id"] == ids[2]
    assert [row["id"] for row in rows(aque, f"{ids[0]}-{ids[-1]}")] == ids
    assert [row["id"] for row in rows(aque, "@last", str(ids[0]))] == [ids[-1], ids[0]]


def test_wait_option_says_that_there_is_no_worker_and_ctrl_c_leaves_the_task(aque):
    process = aque.start("submit", "--wait", "--", "true")
    assert process.stderr is not None
    task_id = int(process.stderr.readline())
    hint = process.stderr.readline()
    assert "`aque worker`" in hint and "--local" in hint
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert f"`aque kill {task_id}`" in process.communicate()[1]
    assert aque.state(task_id) == "ready"


def test_what_shall_become_of_a_lost_attempt_is_stored_with_the_task(aque):
    done = aque("submit", "--no-requeue", "--strict-lease", "--soft-time-limit", "1m", "--", "true")
    assert done.status == 0
    with sqlite3.connect(Path(aque.environment["AQUE_STATE_DIR"]) / "aque.db") as store:
        (requeue,) = store.execute("SELECT requeue FROM aque_task").fetchone()
        stored = store.execute("SELECT strict_lease, soft_time_limit_seconds FROM aque_payload").fetchone()
    assert (requeue, *stored) == (0, 1, 60.0)


# -- call


def test_call_heeds_the_options_of_a_task_that_the_command_line_has_no_name_for(aque):
    (aque.cwd / "slow_tasks.py").write_text(
        "import aque\n@aque.task(countdown=3600, expires=7200, children='cancel', layer='comp', rate_limit='6/m')\n"
        "def later():\n    pass\n@aque.task(expires='2050-01-01T00:00:00Z')\ndef until():\n    pass\n"
    )
    (row,) = rows(aque, str(aque("call", "slow_tasks:later").id))
    (until,) = rows(aque, str(aque("call", "slow_tasks:until").id))
    with sqlite3.connect(Path(aque.environment["AQUE_STATE_DIR"]) / "aque.db") as store:
        layer, children, starts, expires, extra = store.execute(
            "SELECT layer, children, not_before - submitted_at, expires_at - submitted_at, extra FROM aque_task"
            f" JOIN aque_payload ON task_id = id WHERE id = {row['id']}"
        ).fetchone()
    assert (layer, children, round(starts / 60), round(expires / 60)) == ("comp", "cancel", 60, 120)
    assert json.loads(extra)["rate_limit"] == 0.1
    assert until["expires_at"] == "2050-01-01T00:00:00.000000Z"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["math"], "is not MODULE:FUNCTION"),
        (["nosuchmodule:f"], "No module named 'nosuchmodule'"),
        (["math:nosuch"], "math has no function 'nosuch'"),
        (["math:pi"], "of type float"),
        (["math:sqrt", "two"], "is not JSON"),
        (["math:sqrt", "NaN"], "cannot be written as JSON"),
        (["broken:f"], "cannot import broken: ZeroDivisionError"),
    ],
)
def test_call_refuses_what_no_worker_could_run(aque, words, said):
    (aque.cwd / "broken.py").write_text("print('noise')\n1 / 0\n")
    done = aque("call", *words)
    assert done.status == 2 and said in done.err
    assert done.out == "" and aque.count() == 0


def test_call_finds_functions_in_the_current_directory(aque):
    (aque.cwd / "mine.py").write_text("print('noise')\ndef f(): pass\n")
    done = aque("call", "mine:f", '{"a": 1}')
    assert done.status == 0 and done.out == f"{done.id}\n"
    assert rows(aque)[0]["name"] == "mine.f"


# -- kill, wait


def test_kill_cancels_what_waits_and_settles_what_needs_it(aque):
    first = aque.submit("--", "true")
    second = aque.submit("--after", str(first), "--", "true")
    done = aque("kill", str(first))
    assert (done.status, done.out) == (0, "1 cancelled, 1 skipped\n")
    assert [aque.state(first), aque.state(second)] == ["cancelled", "skipped"]
    again = aque("kill", str(first))
    assert again.status == 1 and "1 already cancelled" in again.out


def test_kill_of_a_job_takes_its_members(aque):
    job = aque("xargs", "--no-wait", "-n1", "true", given=b"1 2 3").id
    assert aque("kill", str(job), program="aque").out == "4 cancelled\n"


def test_kill_takes_dependencies_spares_what_others_need_and_says_so(aque):
    shared, mine = aque.submit("--", "true"), aque.submit("--", "true")
    wanted = aque.submit("--after", f"{shared},{mine}", "--", "true")
    other = aque.submit("--after", str(shared), "--", "true")
    planned = aque("kill", "-r", "--dry-run", str(wanted))
    spared = f"would spare, because others need it, 1 task: {shared}"
    assert planned.out == f"would cancel 2 tasks: {mine}, {wanted}\n{spared}\n"
    done = aque("kill", "--dependencies", str(wanted))
    assert (done.status, done.out) == (0, "2 cancelled, 1 spared, others need it\n")
    assert (aque.state(shared), aque.state(other)) == ("ready", "pending")
    again = aque("kill", "-r", str(wanted))
    assert (again.status, again.out) == (1, "1 spared, others need it, 1 already cancelled, left as it is\n")
    assert aque("kill", "--dependents", str(shared)).out == "2 cancelled\n"
    assert aque("kill", "-r", "--dry-run", str(shared)).status == 1


def test_kill_lists_ids_only_when_they_are_few(aque):
    job = aque("xargs", "--no-wait", "-n1", "true", given=b"x " * 30).id
    assert aque("kill", "--dry-run", str(job)).out == "would cancel 31 tasks\n"


def test_kill_takes_signals_by_number_and_times_with_units(aque):
    assert aque("kill", "-s", "9", "--grace", "1m", str(aque.submit("--", "true"))).out == "1 cancelled\n"
    task_id = str(aque.submit("--", "true"))
    assert aque("kill", "-s", "40", task_id).out == "1 ready, left as it is\n"
    assert aque("kill", "-s", "99", task_id).status == 2
    assert aque("kill", "--grace", "soon", task_id).status == 2


def test_kill_is_installed_by_its_own_name(aque):
    assert aque(str(aque.submit("--", "true")), program="aque-kill").out == "1 cancelled\n"


def test_kill_refuses_unknown_signals_and_ids(aque):
    task_id = str(aque.submit("--", "true"))
    assert aque("kill", "-s", "NOPE", task_id).status == 2
    assert aque("kill", "9999").status == 2
    assert aque("kill", f"{task_id},9999").status == 2
    assert aque.state(int(task_id)) == "ready"


def test_wait_exits_with_the_largest_status_and_125_for_what_never_ran(aque):
    task_id = str(aque.submit("--", "true"))
    assert aque("wait", "--timeout", "0.1", task_id).status == 124
    aque("kill", task_id)
    done = aque("wait", task_id)
    assert (done.status, done.out) == (125, f"{task_id} cancelled\n")
    assert aque("wait", "--quiet", task_id).out == ""


@pytest.mark.parametrize("verb", ["status", "output", "wait", "kill"])
@pytest.mark.parametrize("word", ["12345", "a", "-1-2", "1-99999999", "99999999999999999999", "900-999"])
def test_an_id_that_is_none_is_exit_2(aque, verb, word):
    done = aque(verb, "--", word)
    assert done.status == 2 and done.err.startswith("aque: ") and done.out == ""


# -- status


def test_status_says_why_a_task_does_not_run(aque):
    aque.submit("--", "true")
    done = aque("status")
    assert done.out.splitlines()[0] == "1 task: 1 ready"
    assert "no live worker" in done.out


def test_a_name_cannot_drive_the_terminal(aque):
    aque.submit("--name", "\x1b[31mred\x9b\r\n\u202e", "--", "true")
    for words in (["status"], ["status", "--csv", "name"], ["status", "--json"]):
        shown = aque(*words).raw
        assert (
            b"\x1b" not in shown and b"\r" not in shown and "\u202e".encode() not in shown and b"\xc2\x9b" not in shown
        )
    assert r"\x1b[31mred\x9b\r\n\u202e" in aque("status").out


def test_csv_has_a_header_and_the_fields_asked_for(aque):
    first = aque.submit("--name", 'a,"b"', "--", "true")
    second = aque.submit("--after", str(first), "--", "true")
    found = list(csv.reader(aque("status", "--csv", "id,name,depends_on,reason").out.splitlines()))
    assert found == [
        ["id", "name", "depends_on", "reason"],
        [str(first), 'a,"b"', "", ""],
        [str(second), "true", str(first), ""],
    ]


def test_unknown_fields_and_states_are_named_with_those_there_are(aque):
    done = aque("status", "--csv", "id,nope")
    assert done.status == 2 and "'nope'" in done.err and "exit_code" in done.err
    done = aque("status", "--state", "done")
    assert done.status == 2 and "'done'" in done.err and "success" in done.err


def test_status_shows_the_newest_for_people_and_everything_to_programs(aque):
    aque("xargs", "--no-wait", "-n1", "true", given=b"x\n" * 60)
    assert len(rows(aque)) == 61
    assert len(aque("status").out.splitlines()) == 3 + 50
    assert len(aque("status", "--limit", "5").out.splitlines()) == 3 + 5
    assert len(rows(aque, "--state", "ready", "--limit", "7")) == 7
    assert len(rows(aque, "--job", "@last")) == 61


def test_a_reader_that_leaves_is_no_error(aque):
    aque("xargs", "--no-wait", "-n1", "true", given=b"x\n" * 3000)
    process = aque.start("status", "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


# -- xargs


def test_xargs_makes_one_job_of_all_commands(aque):
    job = aque("xargs", "--no-wait", "-n5", "-P4", "--name", "n", "echo", "a", given=b"1\n" * 12)
    members = rows(aque, "--job", str(job.id))
    assert [row["job_id"] for row in members] == [job.id] * 4
    assert [row["cpus"] for row in members] == [None, "1/4", "1/4", "1/4"]
    assert members[0]["depends_on"] == [row["id"] for row in members[1:]]
    assert {row["name"] for row in members} == {"n"}


def test_xargs_reserves_one_cpu_unless_told_otherwise(aque):
    for options, cpus in ((["-P0"], "0"), ([], "1"), (["--cpus", "2"], "2")):
        job = aque("xargs", "--no-wait", *options, "true").id
        assert rows(aque, "--job", str(job))[1]["cpus"] == cpus


@pytest.mark.parametrize(
    "options",
    [["--nope"], ["-n0"], ["-nx"], ["-P-1"], ["-d", "ab"], ["-a", "/nope"], ["-P2", "--cpus", "1"], ["--cpus", "x"]],
)
def test_xargs_exits_with_1_for_its_own_errors(aque, options):
    done = aque("xargs", *options, "true", given=b"1")
    assert done.status == 1 and done.err.startswith("aque: ") and rows(aque) == []


def test_xargs_without_words_runs_once_and_with_r_never(aque):
    assert aque("xargs", "--no-wait", "true").out == "1\n"
    assert aque("xargs", "-r", "true").status == 0
    assert len(rows(aque)) == 2


def test_xargs_submits_what_comes_before_an_unmatched_quote(aque):
    done = aque("xargs", "--no-wait", "-n1", "true", given=b"1 2\n'3")
    assert done.status == 1 and "unmatched single quote" in done.err
    assert len(rows(aque)) == 3


# -- the store


def test_init_says_what_it_did(bare):
    assert "created tables of version" in bare("init").out
    assert "is up to date" in bare("init").out


def test_reset_asks_tells_what_there_was_and_removes_it(aque):
    aque.submit("--", "true")
    refused = aque("init", "--reset", given=b"n\n")
    assert refused.status == 1 and "1 task" in refused.out and len(rows(aque)) == 1
    assert aque("init", "--reset").status == 1
    done = aque("init", "--reset", "--yes")
    assert done.status == 0 and "removed 1 task" in done.out
    assert rows(aque) == []


def test_a_store_of_another_version_is_left_alone_with_exit_69(aque):
    aque.submit("--", "true")
    file = Path(aque.environment["AQUE_STATE_DIR"]) / "aque.db"
    for version, said in (("9999", "upgrade Aque"), ("0000", "aque init")):
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE aque_schema_version SET version_num = ?", [version])
        for words in (["submit", "--", "true"], ["status"], ["doctor"], ["worker"], ["wait", "1"]):
            done = aque(*words)
            assert done.status == 69 and said in done.err, words
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE aque_schema_version SET version_num = ?", [schema.HEAD])


def test_an_unreachable_database_is_exit_69_without_the_password(aque):
    env = {"AQUE_BROKER": "postgresql://someone:secret@127.0.0.1:9/aque"}
    (aque.cwd / "mine.py").write_text("def f(): pass\n")
    for words in (
        ["submit", "--", "true"], ["call", "mine:f"], ["xargs", "true"], ["status"], ["output", "1"], ["kill", "1"],
        ["wait", "1"], ["workers"], ["doctor"], ["init"], ["worker"],
    ):  # fmt: skip
        done = aque(*words, env=env)
        assert done.status == 69, words
        assert "127.0.0.1" in done.err and "secret" not in done.err and done.err.count("\n") == 1


def test_a_file_that_is_no_database_is_exit_69(aque, tmp_path):
    (tmp_path / "bad.db").write_bytes(b"this is no database, " * 100)
    done = aque("status", env={"AQUE_BROKER": f"sqlite:///{tmp_path / 'bad.db'}"})
    assert done.status == 69 and done.err.count("\n") == 1


def test_a_state_directory_that_cannot_be_made_is_exit_69(aque):
    done = aque("status", env={"AQUE_STATE_DIR": "/proc/nowhere"})
    assert done.status == 69 and "AQUE_STATE_DIR" in done.err


def test_a_message_broker_in_the_place_of_the_store_is_refused(aque):
    done = aque("status", env={"AQUE_BROKER": "redis://localhost"})
    assert done.status == 2 and "AQUE_CELERY_BROKER" in done.err


def test_a_full_disk_under_stdout_is_one_sentence(aque):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            ["aque", "status"], stdout=full, stderr=subprocess.PIPE, env=aque.environment, text=True, check=False
        )
    assert done.returncode == 1 and done.stderr == "aque: No space left on device.\n"


@pytest.mark.parametrize("verb", ["status", "workers", "doctor"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stdout_or_stderr_is_nobodys_error(aque, verb, closed):
    script = f"exec aque {verb} {closed}"
    done = subprocess.run(["/bin/sh", "-c", script], env=aque.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_working_directory_that_is_gone_is_one_sentence(aque, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec aque submit -- true"
    done = subprocess.run(["/bin/sh", "-c", script], env=aque.environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stderr.startswith("aque: ") and "Traceback" not in done.stderr


# -- help


def test_aque_alone_lists_the_verbs_in_groups(aque):
    done = aque()
    assert done.status == 0
    for word in ("Submit:", "Look:", "xargs", "doctor", "run a command"):
        assert word in done.out


@pytest.mark.parametrize("verb", SUMMARIES)
def test_every_verb_has_help_with_an_example(aque, verb):
    done = aque(verb, "--help")
    assert done.status == 0
    assert f"aque {verb}" in done.out.split("Options:")[0].partition("\n")[2]


def test_a_verb_that_does_not_exist_is_exit_2_with_a_guess(aque):
    done = aque("stats")
    assert done.status == 2 and "`aque status`" in done.err


def test_an_error_of_ours_says_how_to_see_more(aque):
    environment = {**aque.environment, "AQUE_DEBUG": "1"}
    done = subprocess.run(["aque", "status", "x"], env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


def test_wait_until_a_kill_in_another_terminal(aque):
    task_id = aque.submit("--", "true")
    process = aque.start("wait", str(task_id))
    assert process.stderr is not None
    assert "no worker" in process.stderr.readline()
    aque("kill", str(task_id))
    wait_until(lambda: process.poll() is not None)
    assert (process.returncode, process.communicate()[0]) == (125, f"{task_id} cancelled\n")


def test_doctor_finds_a_broken_invariant(aque):
    task_id = aque.submit("--", "true")
    file = Path(aque.environment["AQUE_STATE_DIR"]) / "aque.db"
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE aque_task SET unmet = 1")
    done = aque("doctor", "--json")
    found = json.loads(done.out)
    assert done.status == 1 and not found["clean"]
    assert [task_id] in [finding["ids"] for finding in found["findings"]]
    assert aque("doctor").status == 1
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE aque_task SET unmet = 0")


def test_doctor_tells_what_the_store_holds(aque):
    aque.submit("--", "true")
    found = json.loads(aque("doctor", "--json").out)
    assert (found["output_bytes"], found["result_bytes"]) == (0, 0)
    assert found["row_bytes"] > 0
    assert re.search(
        r"output +0 bytes of at most 20\.0 GiB\n +results +0 bytes\n +rows +\S+ [KM]iB", aque("doctor").out
    )


def test_the_state_directory_is_private(aque):
    aque("status")
    state = Path(aque.environment["AQUE_STATE_DIR"])
    assert os.stat(state).st_mode & 0o077 == 0 and os.stat(state / "aque.db").st_mode & 0o077 == 0


def test_reload_without_its_package_is_a_sentence(aque, tmp_path):
    (tmp_path / "watchfiles.py").write_text("raise ImportError('not installed')\n")
    done = aque("worker", "--reload", env={"PYTHONPATH": str(tmp_path)})
    assert (done.status, done.err) == (
        2,
        "aque: --reload needs the package watchfiles: install aque[reload].\n",
    )


def test_a_wish_that_is_empty_or_contradicts_itself_is_refused(aque):
    for words in (
        ["--tag", ""],
        ["--requires", ""],
        ["--limit", ""],
        ["--tag", "a", "--tag", "!a"],
        ["--time-limit", "0"],
    ):
        done = aque("submit", *words, "--", "true")
        assert done.status == 2 and "Nothing was submitted" in done.err, words
    assert aque("submit", "--resource", "cpus=1", "--", "true").status == 2
