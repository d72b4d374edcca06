"""A worker of root's runs each task as its user, functions too, and another interpreter is as good as its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest

import aque
from aque.errors import BadInput, CommandFailed, RemoteError, TaskError
from tests.users import User, two_users
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, PROGRAMS, Farm
from tests.worker.test_command_tasks import script

LIMIT = LIMIT_SECONDS
PYTHON = "/usr/bin/python3"  # one that every user may execute

pytestmark = pytest.mark.skipif(not os.path.exists(PYTHON), reason=f"there is no {PYTHON}")

FUNCTIONS = """
import datetime, decimal, os, subprocess, sys, uuid

def who(*args, **kwargs):
    print("printed")
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {
        "uid": status["Uid"].split(),
        "groups": sorted(map(int, status["Groups"].split())),
        "umask": status["Umask"].strip(),
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),
        "args": args,
        "kwargs": kwargs,
        "executable": sys.executable,
    }

def echo(value): return value
def fail(): raise ValueError("no luck")
def leave(): sys.exit(3)
def die(): os._exit(3)
def crash(): os.kill(os.getpid(), 11)
def large(): return "x" * 2_000_000
def unstorable(): return {1, 2}
def forge(): os.write(3, b"{}"); os._exit(0)
def forge_deep(): os.write(3, b"[" * 200000); os._exit(0)
def forge_long():
    import json
    time = "1" + "0" * 400
    os.write(3, ('{"reason": "", "value": null, "error": {}, "shown": "", "seconds": %s}' % time).encode()); os._exit(0)
def hang():
    subprocess.Popen(["setsid", "sleep", sys.argv[0] and "98765.5"])
    while True: pass
def submit(aque): return subprocess.check_output([aque, "submit", "--", "echo", "child"]).decode()
"""


@pytest.fixture(scope="module")
def users() -> Iterator[tuple[User, User]]:
    with two_users() as users:
        for user in users:
            (user.home / "functions.py").write_text(FUNCTIONS)
        yield users


@pytest.fixture
def user(users: tuple[User, User]) -> User:
    return users[0]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served_by_root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """A farm whose worker, root's, becomes other users; on SQLite too, which only tests allow."""
    directory = tmp_path_factory.mktemp("farm")
    url = f"sqlite:///{directory / 'aque.db'}"
    with ExitStack() as stack:
        if request.param == "postgresql":
            url = stack.enter_context(request.getfixturevalue("postgresql_server").database())
        chosen = {"unsafe_allow_root_sqlite": True, "allow_root_tasks": False}
        farm = stack.enter_context(Farm(url, directory, **chosen))
        farm.start_worker("-c", "1", cpus=4)
        yield farm


@pytest.fixture
def roots_farm(served_by_root: Farm) -> Iterator[Farm]:
    with served_by_root.entered():
        yield served_by_root
    assert served_by_root.findings() == []


def call(farm: Farm, user: User, name: str, *arguments: Any, **options: str) -> aque.Handle:
    """`aque call` of one of the `FUNCTIONS`, by root as `user`, from the user's home."""
    options = {"interpreter": PYTHON, "user": user.name, **options}
    words = [word for option, value in options.items() for word in (f"--{option.replace('_', '-')}", value)]
    words += [f"functions:{name}", json.dumps(arguments)]
    return submit(farm, user, "call", *words)


def submit(farm: Farm, user: User, *words: str, **variables: str) -> aque.Handle:
    """`aque WORDS`, by root in the user's home."""
    environment = {**farm.environment, **variables, "LD_PRELOAD": "", "SUBMITTED": "here"}
    done = subprocess.run(
        [str(PROGRAMS / "aque"), *words], cwd=user.home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tasks.echo.AsyncResult(done.stdout.strip())


def failure(task: aque.Handle) -> TaskError:
    with pytest.raises(TaskError) as raised:
        task.get(timeout=LIMIT)
    return raised.value


# -- a worker of root's ---------------------------------------------------------------------------------------------------


def test_a_command_runs_as_its_user_in_its_directory_with_its_files(roots_farm: Farm, user: User) -> None:
    text = "id -u; id -G; umask; pwd; echo $HOME $USER $SUBMITTED; cat; echo done >&2"
    (user.home / "in").write_text("input\n")
    task = submit(
        roots_farm, user, "submit", "--user", user.name, "--stdin", "in", "--stderr", "err", "--", *script(text)
    )
    task.get(timeout=LIMIT)
    uid, groups, umask, cwd, variables, given = roots_farm.output(task).decode().splitlines()
    assert (uid, {int(group) for group in groups.split()}) == (str(user.uid), {user.gid, user.extra_group})
    assert int(umask, 8) == int(Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0], 8)
    assert (cwd, variables, given) == (str(user.home), f"{user.home} {user.name} here", "input")
    assert ((user.home / "err").read_text(), (user.home / "err").stat().st_uid) == ("done\n", user.uid)


def test_a_function_runs_as_its_user_too(roots_farm: Farm, user: User) -> None:
    task = call(roots_farm, user, "who", 1, "ü")
    found = task.get(timeout=LIMIT)
    assert found["uid"] == [str(user.uid)] * 4
    assert found["groups"] == sorted({user.gid, user.extra_group})
    assert (found["cwd"], found["args"], found["descriptors"]) == (str(user.home), [1, "ü"], [0, 1, 2, 3, 4])
    seen = found["environment"]
    assert (seen["HOME"], seen["USER"], seen["SUBMITTED"]) == (str(user.home), user.name, "here")
    assert (seen["AQUE_TASK_ID"], seen["AQUE_ATTEMPT"]) == (task.id, "1")
    assert "LD_PRELOAD" not in seen
    assert roots_farm.output(task) == b"printed\n"


def test_no_secret_of_the_worker_reaches_another_user(fresh_postgresql_url: str, user: User, tmp_path: Path) -> None:
    secret = fresh_postgresql_url.replace("postgres@", "postgres:sesame@")
    with Farm(secret, tmp_path, allow_root_tasks=False) as farm, farm.entered():
        worker = farm.start_worker("-c", "1")
        text = f"env -0; cat /proc/$PPID/environ /proc/{worker.pid}/environ 2>&1"
        task = submit(farm, user, "submit", "--user", user.name, "--", *script(text))
        with pytest.raises(CommandFailed):
            task.get(timeout=LIMIT)
        written = farm.output(task)
        assert b"AQUE_BROKER=postgresql://" in written and written.count(b"Permission denied") == 2
        assert b"sesame" not in written
        assert farm.findings() == []


def test_who_cannot_be_become_is_an_error_with_its_reason(roots_farm: Farm, user: User) -> None:
    for name, why in (("nosuchuser", "no user"), ("daemon", "min_uid")):
        task = aque.shell(["true"], user=name)
        error = failure(task)
        assert isinstance(error, CommandFailed) and why in str(error)
        assert roots_farm.row(task)["reason"] == "cannot_become_user"


def test_tasks_of_root_are_refused(roots_farm: Farm) -> None:
    for task in (aque.shell(["true"]), tasks.add.delay(1, 2)):
        assert "AQUE_ALLOW_ROOT_TASKS" in str(failure(task))
        assert roots_farm.row(task)["reason"] == "cannot_become_user"


def test_a_directory_and_a_file_that_the_user_may_not_open_are_errors_of_their_own(
    roots_farm: Farm, users: tuple[User, User]
) -> None:
    user, other = users
    closed = aque.shell(["true"], user=user.name, cwd=str(other.home))
    assert failure(closed).reason == "cannot_enter_cwd"
    victim = other.home / "victim"
    victim.write_text("untouched")
    victim.chmod(0o600)
    (user.home / "link").unlink(missing_ok=True)
    (user.home / "link").symlink_to(victim)
    linked = aque.shell(["echo", "x"], user=user.name, cwd=str(user.home), stdout="link")
    assert failure(linked).reason == "cannot_open" and "Permission denied" in str(failure(linked))
    assert victim.read_text() == "untouched"


def test_the_tree_of_another_users_command_is_gone_after_a_kill(roots_farm: Farm, user: User) -> None:
    task = call(roots_farm, user, "hang")
    roots_farm.wait_for_state(task, "running")
    task.kill()
    assert roots_farm.wait_for_state(task, "killed")["signal"] == signal.SIGTERM
    assert not [process.pid for process in psutil.process_iter(["uids"]) if process.info["uids"].real == user.uid]


def test_limits_of_the_setting_hold(made_store_url: str, user: User, tmp_path: Path) -> None:
    chosen = {"unsafe_allow_root_sqlite": True, "rlimits": "nofile=100:200,core=0"}
    with Farm(made_store_url, tmp_path, **chosen) as farm, farm.entered():
        farm.start_worker("-c", "1")
        for task in (
            aque.shell(script("ulimit -n; ulimit -Hn; ulimit -c"), user=name, cwd="/") for name in ("", user.name)
        ):
            assert task.get(timeout=LIMIT)["stdout"].split() == ["100", "200", "0"]


def test_who_is_not_root_cannot_submit_for_others(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    aque.shell(["true"]).get(timeout=LIMIT)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BadInput, match="only root"):
        aque.shell(["true"], user="somebody-else")


def test_in_a_store_of_one_person_nobody_else_can_be_named(farm: Farm, user: User) -> None:
    if farm.store.dialect == "sqlite":
        with pytest.raises(BadInput, match="runs as its owner"):
            aque.shell(["id", "-u"], user=user.name)
    else:
        task = aque.shell(["id", "-u"], user=user.name, cwd="/")
        assert task.get(timeout=LIMIT)["stdout"] == f"{user.uid}\n"


# -- another interpreter ----------------------------------------------------------------------------------------------------

#: No database has a part in it.
on_one_database = pytest.mark.parametrize("served_farm", ["sqlite"], indirect=True)


@pytest.fixture(scope="module")
def own_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a virtual environment of its own, which has Aque."""
    directory = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "aque.pth").write_text("\n".join(path for path in sys.path if path) + "\n")
    return str(directory / "bin" / "python")


@pytest.fixture
def me(tmp_path: Path) -> User:
    """Whoever runs the tests, with the `FUNCTIONS` in a directory of the test's."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return User("", os.geteuid(), os.getegid(), tmp_path, 0)


@on_one_database
def test_a_function_runs_under_another_interpreter_in_its_directory(farm: Farm, me: User) -> None:
    found = call(farm, me, "who", 1, [2, {"3": None}]).get(timeout=LIMIT)
    assert os.path.samefile(found["executable"], PYTHON)
    assert (found["cwd"], found["args"]) == (str(me.home), [1, [2, {"3": None}]])


@on_one_database
def test_a_function_under_the_systems_python_submits_a_child(farm: Farm, me: User) -> None:
    parent = call(farm, me, "submit", str(PROGRAMS / "aque"))
    child = int(parent.get(timeout=LIMIT))
    assert farm.row(child)["parent_id"] == int(parent.id)
    assert farm.wait_for_state(child, "success")


@on_one_database
def test_a_function_in_a_virtual_environment_of_its_own_submits_a_child(farm: Farm, own_python: str) -> None:
    parent = tasks.submit_one_more.apply_async(interpreter=own_python)
    child = parent.get(timeout=LIMIT)
    assert farm.row(child)["parent_id"] == parent.number
    assert tasks.whoami.AsyncResult(str(child)).get(timeout=LIMIT)["parent_id"] == parent.number


@on_one_database
@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2.5, "ü\0\ud800", {"a": [None, True]}],
        b"\xff\0",
        datetime(2026, 1, 2, 3, 4, 5, 678, UTC),
        datetime(2026, 1, 2),
        datetime(2026, 1, 2).date(),
        datetime(2026, 1, 2, 3, 4, 5).time(),
        UUID(int=7),
        Decimal("1.10"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_and_results_of_dependencies_survive_the_way_there_and_back(
    farm: Farm, own_python: str, value: Any
) -> None:
    first = tasks.echo.apply_async((value,), interpreter=own_python)
    second = tasks.echo.apply_async(([first],), interpreter=own_python)
    assert second.get(timeout=LIMIT) == [value]


@on_one_database
def test_an_exception_comes_back_with_its_traceback(farm: Farm, me: User) -> None:
    task = call(farm, me, "fail")
    with pytest.raises(ValueError, match="no luck"):
        task.get(timeout=LIMIT)
    assert farm.row(task)["reason"] == "exception"
    assert "in fail" in task.traceback


@on_one_database
@pytest.mark.parametrize(
    ("name", "reason", "text"),
    [
        ("leave", "exception", "SystemExit: 3"),
        ("die", "exit", "no answer: it exited with status 3"),
        ("crash", "signal", "SIGSEGV"),
        ("large", "not_storable", "result_limit_bytes"),
        ("unstorable", "not_storable", "of type set"),
        ("forge", "exit", "no answer"),
        ("forge_deep", "exit", "no answer"),
        ("forge_long", "exit", "no answer"),
        ("missing", "cannot_import", "has no attribute 'missing'"),
    ],
)
def test_other_ends_are_errors_with_a_reason(farm: Farm, me: User, name: str, reason: str, text: str) -> None:
    error = failure(call(farm, me, name))
    assert isinstance(error, RemoteError) and text in str(error)
    assert error.reason == reason


@on_one_database
def test_a_module_with_tasks_of_aque_needs_no_aque_there(farm: Farm, me: User) -> None:
    (me.home / "decorated.py").write_text(
        "import aque, sys\n@aque.task\ndef plain(): return sys.executable\n"
        f"@aque.task(cpus='1/8', interpreter={PYTHON!r})\ndef with_options(): return sys.executable\n"
    )
    words = ("call", "--interpreter", PYTHON, "decorated:plain"), ("call", "decorated:with_options")
    for task in (submit(farm, me, *each) for each in words):
        assert os.path.samefile(task.get(timeout=LIMIT), PYTHON)
    assert [farm.row(task)[name] for name in ("cpus", "interpreter")] == ["1/8", PYTHON], "as the decorator says"
    other = submit(farm, me, "call", "--cpus", "0.5", "decorated:with_options")
    other.get(timeout=LIMIT)
    assert farm.row(other)["cpus"] == "0.5", "unless the command line says otherwise"


@on_one_database
def test_an_interpreter_that_is_not_there_is_an_error(farm: Farm, me: User) -> None:
    assert failure(call(farm, me, "who", interpreter="/no/such/python")).reason == "not_found"


@on_one_database
def test_a_time_limit_ends_a_function_under_another_interpreter_with_its_tree(farm: Farm, me: User) -> None:
    task = call(farm, me, "hang", time_limit="0.5s")
    assert failure(task).reason == "time_limit"
    assert not [p for p in psutil.process_iter(["cmdline"]) if "98765.5" in (p.info["cmdline"] or [])]
