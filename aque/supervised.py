"""A supervised command as values: what its supervisor is told to run, and how it ended, with the sentence that says why."""

import errno
import marshal
from collections.abc import Mapping
from dataclasses import dataclass
from signal import Signals
from typing import Any, Literal

from aque import protocol

Reason = Literal[
    "exit",
    "signal",
    "time_limit",
    "killed",
    "cannot_execute",
    "not_found",
    "cannot_enter_cwd",
    "cannot_become_user",
    "cannot_open",
    "lease",
    "lost",
]


@dataclass(frozen=True, slots=True)
class OtherUser:
    """A user to become, which takes a worker of root's."""

    name: str
    #: Of this user nothing is run if the uid is smaller; 0 is refused unless `allow_root`.
    min_uid: int = 1000
    allow_root: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. Bytes throughout: argv, environment and paths of Unix have no encoding."""

    #: Executed, never joined; `argv[0]` without a slash is looked up in the PATH of `env`.
    argv: tuple[bytes, ...]
    #: All of the command's environment.
    env: Mapping[bytes, bytes]
    cwd: bytes
    #: None or empty: /dev/null.
    stdin: bytes | None = None
    #: Files in place of stdin, stdout and stderr, opened as the command's user below `cwd`; outputs are emptied first.
    redirections: tuple[bytes | None, bytes | None, bytes | None] = (None, None, None)
    #: None: the worker's.
    umask: int | None = None
    #: None: the worker's own. HOME, SHELL, USER and LOGNAME of `env` become this user's.
    user: OtherUser | None = None
    #: It cannot gain privileges by setuid programs; for another user only.
    no_new_privileges: bool = True
    #: In a login shell: that of `env`.
    login: bool = False
    #: Resource (as in the module `resource`), soft limit, hard limit.
    rlimits: tuple[tuple[int, int, int], ...] = ()
    #: Half of it for the first bytes of both streams, a quarter for the last ones of each; what is between is read, counted
    #: and dropped.
    output_limit_bytes: int = 8 << 20
    #: It writes a result of at most so many bytes to descriptor 3; None: it has no such descriptor.
    result_limit_bytes: int | None = None
    time_limit_seconds: float | None = None
    #: After this time the tree gets SIGTERM, and how the command ends is up to it.
    soft_time_limit_seconds: float | None = None
    #: A moment of `processes.lease_clock`: unless `Running.renew` names a later one, nothing of the command lives then.
    lease_until: float | None = None
    #: Between the SIGTERM of a time limit and SIGKILL.
    kill_grace_seconds: float = 5.0
    #: The CPUs that it is bound to, with all that it starts; empty: all of the worker's.
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. By then nothing of its tree lives, except for `lost` if the server is gone as well as the
    supervisor: then what it ran is the worker's to kill."""

    #: Why it ended. A command that exits by itself after a kill is `killed`, and its exit code says how it took it.
    reason: Reason
    #: A sentence, for everything but a plain exit.
    message: str = ""
    exit_code: int | None = None
    signal: int | None = None
    #: For a command that was never started: why not.
    errno: int | None = None
    #: All that was written, with what was dropped.
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    #: Some of the output was dropped.
    truncated: bool = False
    #: What it wrote to descriptor 3; None: nothing, or more than its limit.
    result: bytes | None = None
    result_bytes: int = 0
    #: User and system time of the tree, without processes that nobody waited for.
    cpu_seconds: float = 0.0
    #: The largest process's. Linux counts from the fork on: never less than the supervisor's own, about 12 MiB.
    max_rss_bytes: int = 0
    #: From and to disks and servers, of the tree as well.
    read_bytes: int = 0
    written_bytes: int = 0


def name_of(command: Command) -> str:
    """The command in a sentence: its first word, in quotes."""
    return repr(command.argv[0].decode(errors="backslashreplace")) if command.argv else "a command without words"


def frames_of(command: Command) -> list[bytes]:
    """What a supervisor reads to run the command."""
    stdin = command.stdin or b""
    spec = marshal.dumps(
        {
            "argv": list(command.argv),
            "env": dict(command.env),
            "cwd": command.cwd,
            "umask": command.umask,
            "user": command.user and command.user.name,
            "min_uid": command.user and command.user.min_uid,
            "allow_root": command.user and command.user.allow_root,
            "no_new_privileges": command.no_new_privileges,
            "login": command.login,
            "rlimits": list(command.rlimits),
            "redirections": list(command.redirections),
            "stdin_bytes": len(stdin),
            "output_limit_bytes": command.output_limit_bytes,
            "result_limit_bytes": command.result_limit_bytes,
            "time_limit_seconds": command.time_limit_seconds,
            "soft_time_limit_seconds": command.soft_time_limit_seconds,
            "lease_until": command.lease_until,
            "kill_grace_seconds": command.kill_grace_seconds,
            "cpus": list(command.cpus),
        }
    )
    return [protocol.FRAME.pack(protocol.RUN, len(spec)) + spec, stdin]


def reason_of(command: Command, report: dict[str, Any], code: int | None) -> tuple[Reason, str]:
    """Why a command ended, and the sentence about it."""
    name = name_of(command)
    if report["failure"]:
        return _reason_of_failure(command, name, *report["failure"])
    if code is None:
        how = "has not ended"
    elif code < 0:
        how = f"ended by {_signal_name(-code)}"
    else:
        how = f"exited with {code}"
    if report["why"] == "time_limit":
        limit = command.time_limit_seconds
        return "time_limit", f"{name} ran longer than its time limit of {limit:g} s: it was killed, and {how}."
    if report["why"] == "lease":
        return "lease", f"the worker did not renew its lease in time: {name} was killed, and {how}."
    if report["why"] == "killed":
        return "killed", f"{name} was killed, and {how}."
    return ("exit", "") if code is not None and code >= 0 else ("signal", f"{name} {how}.")


def _reason_of_failure(
    command: Command, name: str, failed: str, why: str, code: int | None, found: bool
) -> tuple[Reason, str]:
    """Why a command was not started, and the sentence about it."""
    if failed == "user":
        return "cannot_become_user", f"cannot run {name} as its user: {why}. Nothing was started."
    if failed == "open":
        return "cannot_open", f"cannot open {why}. {name} was not started."
    if failed == "cwd":
        cwd = command.cwd.decode(errors="backslashreplace")
        return "cannot_enter_cwd", f"cannot enter the working directory {cwd!r}: {why}. {name} was not started."
    if failed == "limits":
        return "cannot_execute", f"cannot set a limit of {name} (setting rlimits), {why}. Nothing was started."
    missing = code in (errno.ENOENT, errno.ENOTDIR)
    if not found and (missing or (code == errno.EACCES and "/" not in name)):
        where = "there is no such file" if "/" in name else "it is in no directory of the command's PATH"
        return "not_found", f"cannot find {name}: {where}."
    if missing:
        return "cannot_execute", f"cannot execute {name}: the file exists, the interpreter it names does not."
    return "cannot_execute", f"cannot execute {name}: {why}."


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"
