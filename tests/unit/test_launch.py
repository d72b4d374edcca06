"""Commands of other users: exactly that user, in a directory and with files that the user may enter and open."""

import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aque import launch
from aque.commands import CommandRunner
from aque.supervised import Command, OtherUser
from tests.unit.test_supervisor import Watched, living, new_mark
from tests.users import User, two_users

PATH = b"/usr/local/bin:/usr/bin:/bin"
Run = Callable[..., Watched]


@pytest.fixture(scope="module")
def users() -> Iterator[tuple[User, User]]:
    with two_users() as users:
        yield users


@pytest.fixture
def user(users: tuple[User, User]) -> User:
    return users[0]


@pytest.fixture
def runner() -> Iterator[CommandRunner]:
    runner = CommandRunner()
    runner.start()
    yield runner
    assert runner.stop()


@pytest.fixture
def run(runner: CommandRunner, user: User) -> Run:
    def run(*argv: bytes, **given: object) -> Watched:
        options = {"argv": argv, "env": {b"PATH": PATH}, "cwd": b"/", "umask": 0o022, "user": OtherUser(user.name)}
        return Watched(runner, Command(**{**options, **given}))  # type: ignore[arg-type]

    return run


def ran(command: Watched) -> bytes:
    """Its output, after a plain end."""
    ended = command.wait()
    assert (ended.reason, ended.exit_code, bytes(command.output[2])) == ("exit", 0, b""), ended
    return command.stdout


def refused(command: Watched) -> tuple[str, str]:
    ended = command.wait()
    assert command.pids == [], "nothing was started"
    return ended.reason, ended.message


def test_it_has_the_uids_and_exactly_the_groups_of_its_user(run: Run, user: User) -> None:
    status = dict(line.split(":", 1) for line in ran(run(b"cat", b"/proc/self/status")).decode().splitlines())
    assert status["Uid"].split() == [str(user.uid)] * 4
    assert status["Gid"].split() == [str(user.gid)] * 4
    assert {int(group) for group in status["Groups"].split()} == {user.gid, user.extra_group}
    assert status["NoNewPrivs"].strip() == "1"
    assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")] == [0, 0, 0]


def test_it_cannot_become_root_again(run: Run) -> None:
    script = b"import os\ntry: os.setuid(0)\nexcept OSError as e: print(e.strerror)"
    assert ran(run(b"/usr/bin/python3", b"-ISc", script)) == b"Operation not permitted\n"


def test_no_new_privileges_can_be_switched_off(run: Run) -> None:
    assert b"NoNewPrivs:\t0" in ran(run(b"cat", b"/proc/self/status", no_new_privileges=False))


def test_home_shell_and_name_are_those_of_the_user_and_the_rest_is_as_submitted(run: Run, user: User) -> None:
    env = {b"PATH": PATH, b"HOME": b"/root", b"USER": b"root", b"LOGNAME": b"root", b"KEPT": b"\xff\n"}
    found = dict(pair.split(b"=", 1) for pair in ran(run(b"env", b"-0", env=env)).split(b"\0") if pair)
    name = user.name.encode()
    assert found == {
        b"PATH": PATH,
        b"KEPT": b"\xff\n",
        b"HOME": os.fsencode(user.home),
        b"SHELL": b"/bin/sh",
        b"USER": name,
        b"LOGNAME": name,
    }


def test_only_descriptors_0_1_and_2_are_open(run: Run) -> None:
    held = [os.open("/etc/hostname", os.O_RDONLY) for _ in range(50)]
    for fd in held:
        os.set_inheritable(fd, True)
    listing = ran(run(b"/usr/bin/python3", b"-ISc", b"import os; print(*os.listdir('/proc/self/fd'))"))
    assert listing.split() == [b"0", b"1", b"2", b"3"]  # 3 is the listing's own
    with_result = run(
        b"/usr/bin/python3", b"-ISc", b"import os; print(*os.listdir('/proc/self/fd'))", result_limit_bytes=1
    )
    assert ran(with_result).split() == [b"0", b"1", b"2", b"3", b"4"]
    for fd in held:
        os.close(fd)


def test_no_signal_is_ignored_or_blocked(run: Run) -> None:
    found = ran(run(b"grep", b"-E", b"Sig(Blk|Ign)", b"/proc/self/status"))
    reset = ~sum(1 << number - 1 for number in (32, 33))  # the C library's own
    assert [int(line.split()[1], 16) & reset for line in found.splitlines()] == [0, 0]


def test_umask_and_limits_are_set(run: Run, user: User) -> None:
    limits = ((resource.RLIMIT_NOFILE, 1000, 2000), (resource.RLIMIT_CORE, 0, 0))
    command = run(b"sh", b"-c", b"umask; ulimit -n; ulimit -Hn; ulimit -c", umask=0o027, rlimits=limits)
    assert ran(command).split() == [b"0027", b"1000", b"2000", b"0"]


def test_a_limit_that_cannot_be_set_is_named(run: Run) -> None:
    reason, message = refused(run(b"true", rlimits=((resource.RLIMIT_NOFILE, 2000, 1000),)))
    assert reason == "cannot_execute" and "rlimits" in message


def test_it_leads_a_session_of_its_own(run: Run) -> None:
    command = run(b"cat", b"/proc/self/stat")
    _, group, session, terminal = (int(word) for word in ran(command).rpartition(b")")[2].split()[1:5])
    assert (group, session, terminal) == (command.pids[0], command.pids[0], 0)


def test_stdin_arrives_and_dev_stdout_and_stderr_can_be_opened_by_name(run: Run) -> None:
    command = run(b"sh", b"-c", b"cat /dev/stdin >/dev/stdout; echo error >/dev/stderr", stdin=b"words\n")
    ended = command.wait()
    assert (ended.exit_code, command.stdout, bytes(command.output[2])) == (0, b"words\n", b"error\n")


@pytest.mark.parametrize("name", ["nosuchuser", "", "0", "+0", "+", "-1", "root\0", "12345", "a" * 5000, "root "])
def test_whoever_is_not_in_the_user_database_is_nobody(run: Run, name: str) -> None:
    reason, message = refused(run(b"id", user=OtherUser(name, allow_root=True, min_uid=0)))
    assert reason == "cannot_become_user" and "there is no user" in message


def test_root_and_users_of_the_system_are_refused_unless_they_are_allowed(run: Run) -> None:
    reason, message = refused(run(b"id", user=OtherUser("root")))
    assert reason == "cannot_become_user" and "AQUE_ALLOW_ROOT_TASKS" in message
    reason, message = refused(run(b"id", user=OtherUser("daemon")))
    assert reason == "cannot_become_user" and "min_uid" in message
    assert ran(run(b"id", b"-un", user=OtherUser("daemon", min_uid=0))) == b"daemon\n"
    assert ran(run(b"id", b"-u", user=OtherUser("root", allow_root=True))) == b"0\n"


def test_a_directory_of_roots_own_cannot_be_entered(run: Run, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    reason, message = refused(run(b"pwd", cwd=os.fsencode(closed)))
    assert (reason, message.split(": ")[1]) == ("cannot_enter_cwd", "Permission denied. 'pwd' was not started.")


def test_a_directory_that_only_the_user_may_enter_is_entered(run: Run, user: User) -> None:
    assert ran(run(b"pwd", cwd=os.fsencode(user.home))) == os.fsencode(user.home) + b"\n"


def test_files_are_opened_as_the_user_in_the_directory_of_the_command(run: Run, user: User) -> None:
    (user.home / "in").write_text("input")
    os.chown(user.home / "in", user.uid, user.gid)
    (user.home / "in").chmod(0o400)
    command = run(
        b"sh",
        b"-c",
        b"cat; echo error >&2",
        cwd=os.fsencode(user.home),
        umask=0o077,
        redirections=(b"in", b"out", os.fsencode(user.home / "err")),
    )
    assert ran(command) == b""
    assert [(user.home / name).read_text() for name in ("out", "err")] == ["input", "error\n"]
    found = (user.home / "out").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (user.uid, user.gid, 0o600)


def test_an_output_file_is_emptied_first_and_one_for_both_streams_has_both_in_order(run: Run, user: User) -> None:
    script = b"echo 1; echo 2 >&2; echo 3"
    for _ in range(2):
        ran(run(b"sh", b"-c", script, cwd=os.fsencode(user.home), redirections=(None, b"both", b"both")))
    assert (user.home / "both").read_text() == "1\n2\n3\n"


def test_a_link_to_a_file_of_somebody_else_is_the_users_own_error(
    run: Run, users: tuple[User, User], tmp_path: Path
) -> None:
    user, other = users
    victims = [other.home / "secret", tmp_path / "roots"]
    os.chmod(tmp_path, 0o755)
    for victim in victims:
        victim.write_text("untouched")
    os.chown(victims[0], other.uid, other.gid)
    for number, victim in enumerate(victims):
        victim.chmod(0o600)
        link = user.home / f"link{number}"
        link.symlink_to(victim)
        for redirections in ((None, os.fsencode(link), None), (os.fsencode(link), None, None)):
            reason, message = refused(run(b"true", redirections=redirections))
            assert reason == "cannot_open" and "Permission denied" in message and str(link) in message
        assert victim.read_text() == "untouched"


def test_a_file_that_cannot_be_opened_is_named_for_ones_own_commands_too(run: Run, tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "no" / "file", "No such file"), ("a\0b", "Invalid")):
        reason, message = refused(run(b"true", user=None, redirections=(None, None, os.fsencode(path))))
        assert reason == "cannot_open" and why in message and "stderr" in message


def test_a_missing_program_one_that_may_not_be_run_and_a_script_without_first_line(
    run: Run, user: User, tmp_path: Path
) -> None:
    assert refused(run(b"nosuchprogram"))[0] == "not_found"
    assert refused(run(b"./nosuch", cwd=b"/tmp"))[0] == "not_found"
    (user.home / "plain").write_text("echo script $1")
    assert refused(run(b"./plain", cwd=os.fsencode(user.home)))[0] == "cannot_execute"
    (user.home / "plain").chmod(0o755)
    os.chown(user.home / "plain", user.uid, user.gid)
    assert ran(run(b"./plain", b"x", cwd=os.fsencode(user.home))) == b"script x\n"
    (user.home / "broken").write_text("#!/no/such/interpreter\n")
    (user.home / "broken").chmod(0o755)
    reason, message = refused(run(b"./broken", cwd=os.fsencode(user.home)))
    assert reason == "cannot_execute" and "interpreter" in message


def test_a_login_shell_reads_the_users_profile(run: Run, user: User) -> None:
    (user.home / ".profile").write_text("export FROM_PROFILE=yes\n")
    found = ran(run(b"sh", b"-c", b'echo $FROM_PROFILE "$@"', b"x", b"a b", b"$c", login=True))
    assert found == b"yes a b $c\n"


def test_nothing_of_its_tree_survives_a_kill(run: Run) -> None:
    mark = new_mark()
    script = b"setsid sleep $0 & (trap '' TERM; sleep $0; sleep $0) & env -i sleep $0 & sleep $0"
    command = run(b"sh", b"-c", script, mark)
    assert command.pid
    command.running.kill(signal.SIGTERM, 0.2)
    assert command.wait().reason == "killed"
    assert living(mark) == set()


def test_it_cannot_signal_its_supervisor(run: Run) -> None:
    command = run(b"sh", b"-c", b"kill -9 $PPID 2>/dev/null || echo no")
    assert ran(command) == b"no\n"


def test_an_account_has_exactly_the_groups_of_the_user_database(user: User) -> None:
    found = launch.account(user.name, 1000, False)
    assert (found.uid, found.gid, found.groups) == (
        user.uid,
        user.gid,
        tuple(sorted({user.gid, user.extra_group})),
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="for a worker that is not root's")
def test_who_is_not_root_cannot_become_somebody_else(runner: CommandRunner) -> None:
    command = Watched(runner, Command((b"id",), {b"PATH": PATH}, b"/", user=OtherUser("nobody", min_uid=0)))
    assert refused(command)[0] == "cannot_become_user"
