"""Two real users of this machine, for tests of switching to them: made and removed by root, skipped for anybody else."""

import grp
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import wait_until


@dataclass(frozen=True)
class User:
    """A user with a home directory (0700) and a group besides its own."""

    name: str
    uid: int
    gid: int
    home: Path
    extra_group: int


def _run(*argv: str) -> bool:
    """False while another process has the user database locked."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode and "lock" in done.stderr:
        return False
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return True


@contextmanager
def two_users() -> Iterator[tuple[User, User]]:
    """Yields both, and removes them with what is in their homes."""
    if os.geteuid() != 0 or not shutil.which("useradd"):
        pytest.skip("only root can make users, with the program useradd")
    names = [f"aque{os.getpid()}{letter}" for letter in "ab"]
    group = f"aque{os.getpid()}x"
    try:
        wait_until(lambda: _run("groupadd", group), 30, "the user database is not locked")
        for name in names:
            argv = ("useradd", "--create-home", "--user-group", "--groups", group, "--shell", "/bin/sh", name)
            wait_until(lambda argv=argv: _run(*argv), 30, "the user database is not locked")  # type: ignore[misc]
        yield _user(names[0], group), _user(names[1], group)
    finally:
        for name in names:
            subprocess.run(["userdel", "--remove", "--force", name], capture_output=True, check=False)
        subprocess.run(["groupdel", group], capture_output=True, check=False)


def _user(name: str, group: str) -> User:
    found = pwd.getpwnam(name)
    home = Path(found.pw_dir)
    home.chmod(0o700)
    return User(name, found.pw_uid, found.pw_gid, home, grp.getgrnam(group).gr_gid)
