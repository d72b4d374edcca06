"""Start one process of a command: as its user, in its directory, with its files and limits. Standard library alone.

Two ways. What needs nothing but a directory, a umask and pipes is spawned (vfork). What must become another user, open files
as that user, set limits or have a fourth descriptor is forked, and prepares itself between fork and exec: twice the time (1.3
against 0.6 ms), and every step that fails has a name of its own. The order of the steps is what makes them safe.
"""

import ctypes
import errno
import fcntl
import marshal
import os
import pwd
import resource
import signal
import subprocess
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

PR_SET_NO_NEW_PRIVS = 38
#: Descriptor of the pipe for a result, in a command that has one.
RESULT_FD = 3
#: Signals that Python handles or ignores, and a command must not.
_CHANGED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ)


class CannotStart(Exception):
    """`failed` is the step: user, limits, cwd, open or exec; `why` a sentence part; `errno` the system's, if it has one.
    `found`: there is such a program."""

    def __init__(self, failed: str, why: str, errno: int | None = None, found: bool = True) -> None:
        super().__init__(failed, why, errno, found)
        self.failed = failed
        self.why = why
        self.errno = errno
        self.found = found


class Account(NamedTuple):
    """A user as this host knows it, with exactly the groups that it gives the user."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str


def account(name: str, min_uid: int, allow_root: bool) -> Account:
    """The user `name`. Raises CannotStart: for one that is not there, for root unless allowed, and for uids below `min_uid`.

    By name alone: a number, or whatever else the user database does not list, is nobody. Nobody else is fallen back to.
    """
    try:
        found = pwd.getpwnam(name)
    except (KeyError, ValueError, UnicodeError):
        raise CannotStart("user", f"there is no user {name!r} on this host") from None
    if found.pw_uid == 0 and not allow_root:
        raise CannotStart("user", f"{name!r} is root, whose tasks are refused here (unless AQUE_ALLOW_ROOT_TASKS=1)")
    if 0 < found.pw_uid < min_uid:
        raise CannotStart("user", f"the uid of {name!r} is {found.pw_uid}, less than {min_uid} (setting min_uid)")
    groups = tuple(sorted(set(os.getgrouplist(name, found.pw_gid))))
    return Account(name, found.pw_uid, found.pw_gid, groups, found.pw_dir, found.pw_shell or "/bin/sh")


def program(name: bytes, env: dict[bytes, bytes], cwd: bytes) -> bytes | None:
    """The file that `name`, the first word of a command, means in the command's PATH and directory; None: there is none."""
    folders = [b""] if b"/" in name else [os.fsencode(folder) for folder in os.get_exec_path(env)]  # type: ignore[arg-type]
    for folder in folders if name else []:
        path = os.path.join(cwd, folder, name)
        if os.path.isfile(path):
            return path
    return None


def start(spec: dict[str, Any], user: Account | None, descriptors: list[int | None]) -> int:
    """The pid of the command of `spec`, in a session of its own, as `user` (None: as this process). Raises CannotStart.

    `spec`: argv, env, cwd, umask, redirections (paths for 0, 1 and 2, or None), rlimits (resource, soft, hard),
    no_new_privileges, cpus (to bind it to; none: as this process). `descriptors` are what becomes 0, 1, 2 and `RESULT_FD`;
    None: /dev/null, or the redirection; no fourth.
    """
    if not spec["cpus"]:
        return _start(spec, user, descriptors)
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, spec["cpus"])  # it inherits this: 0.7 ms less than a fork that binds itself
    except OSError as error:
        raise CannotStart("exec", f"cannot bind it to CPUs {spec['cpus']}: {error.strerror}", error.errno) from None
    try:
        return _start(spec, user, descriptors)
    finally:
        os.sched_setaffinity(0, own)


def _start(spec: dict[str, Any], user: Account | None, descriptors: list[int | None]) -> int:
    if user is None and not any(spec["redirections"]) and not spec["rlimits"] and descriptors[RESULT_FD] is None:
        return _spawn(spec, spec["argv"], descriptors)
    return _fork(spec, user, descriptors)


def _spawn(spec: dict[str, Any], argv: list[bytes], descriptors: list[int | None]) -> int:
    """By vfork: as quick as posix_spawn, which on some builds of Python cannot setsid."""
    stdin, stdout, stderr, _ = descriptors
    try:
        process = subprocess.Popen(
            argv,
            env=spec["env"],
            cwd=spec["cwd"],
            umask=spec["umask"],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    except (ValueError, IndexError):  # a NUL byte, or no argv at all
        raise CannotStart("exec", os.strerror(errno.EINVAL), errno.EINVAL) from None
    except OSError as error:
        # Popen names the directory when it could not enter it, else the program; both may be equal, never the same.
        if error.filename is spec["cwd"]:
            raise _failed("cwd", error) from None
        script = program(spec["argv"][0], spec["env"], spec["cwd"])
        if error.errno == errno.ENOEXEC and script is not None and argv is spec["argv"]:
            # A script without a first line that names its interpreter: a shell's, as execvp has it.
            return _spawn(spec, [b"/bin/sh", script, *argv[1:]], descriptors)
        raise _failed("exec", error, script is not None) from None
    process.returncode = 0  # the supervisor reaps by itself: else Popen would warn, and wait for a stranger one day
    return process.pid


def _fork(spec: dict[str, Any], user: Account | None, descriptors: list[int | None]) -> int:
    told, telling = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError as error:
        os.close(told)
        os.close(telling)
        raise _failed("exec", error) from None
    if not pid:
        _prepare_and_execute(spec, user, descriptors, telling)
    os.close(telling)
    with open(told, "rb") as pipe:
        failure = pipe.read()
    if failure:
        os.waitpid(pid, 0)
        raise CannotStart(*marshal.loads(failure))
    return pid


def _prepare_and_execute(
    spec: dict[str, Any], user: Account | None, descriptors: list[int | None], telling: int
) -> NoReturn:
    try:
        telling = fcntl.fcntl(telling, fcntl.F_DUPFD_CLOEXEC, 64)  # out of the way of what `_arrange` closes
        signal.set_wakeup_fd(-1)  # it is the supervisor's
        for number in _CHANGED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        _limit(spec["rlimits"])  # before the user changes: only root may raise a hard limit
        if user is not None:
            _leave_keyring()
            for fd in descriptors[1:3]:
                if fd is not None:
                    os.fchown(fd, user.uid, -1)  # or it could not open its own /dev/stdout
            _become(user, spec["no_new_privileges"])
        os.umask(spec["umask"])
        _enter(spec["cwd"])
        _arrange(_open(spec["redirections"], descriptors), telling)
        _execute(spec["argv"], spec["env"])
    except CannotStart as error:
        os.write(telling, marshal.dumps(error.args))
    except BaseException as error:
        os.write(telling, marshal.dumps(("exec", f"{type(error).__name__}: {error}"[:1000], None, True)))
    finally:
        os._exit(127)


def _limit(limits: list[tuple[int, int, int]]) -> None:
    for number, soft, hard in limits:
        try:
            resource.setrlimit(number, (soft, hard))
        except (OSError, ValueError) as error:
            raise CannotStart("limits", f"resource {number}, {soft}:{hard}: {error}") from None


#: keyctl by machine, and its KEYCTL_JOIN_SESSION_KEYRING. The C library has no function for it.
_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1


def _leave_keyring() -> None:
    """A change of the user keeps the session's keyring, with the keys of whoever started the worker: take a new one."""
    number = _KEYCTL.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, _JOIN_SESSION_KEYRING, None)


def _become(user: Account, no_new_privileges: bool) -> None:
    """Become `user` for ever: the groups while that is allowed, the group, the user; then look whether it holds."""
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        raise _failed("user", error) from None
    now = (os.getresuid(), os.getresgid(), tuple(sorted(set(os.getgroups()))))
    if now != ((user.uid,) * 3, (user.gid,) * 3, user.groups):
        raise CannotStart("user", f"the kernel has made it {now}")
    if user.uid and _succeeds(os.setuid, 0):
        raise CannotStart("user", "it could become root again")
    if no_new_privileges and ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise CannotStart("user", "the kernel has no PR_SET_NO_NEW_PRIVS")


def _succeeds(call: Any, *args: int) -> bool:
    try:
        call(*args)
    except OSError:
        return False
    return True


def _enter(cwd: bytes) -> None:
    """As the user: root would enter what the user may not, and may not enter what a file server keeps from root."""
    try:
        os.chdir(cwd)
    except (OSError, ValueError) as error:
        raise _failed("cwd", error) from None


def _open(redirections: list[bytes | None], descriptors: list[int | None]) -> list[int | None]:
    """The descriptors, and in place of some the files of `redirections`; one file for both outputs is opened once."""
    opened = list(descriptors)
    for place, path in enumerate(redirections):
        if path is None:
            continue
        if place == 2 and path == redirections[1]:
            opened[2] = opened[1]
            continue
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if place else os.O_RDONLY
        try:
            opened[place] = os.open(path, flags | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            what = f"{('stdin', 'stdout', 'stderr')[place]}, {os.fsdecode(path)!r}: "
            raise _failed("open", error, what=what) from None
    return opened


def _arrange(descriptors: list[int | None], telling: int) -> None:
    """Put the descriptors into their places, and close all others but `telling`, which exec closes."""
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    places = descriptors if descriptors[RESULT_FD] is not None else descriptors[:RESULT_FD]
    # First out of the way: a place may hold another's descriptor.
    moved = [fcntl.fcntl(nothing if fd is None else fd, fcntl.F_DUPFD_CLOEXEC, len(places)) for fd in places]
    for place, fd in enumerate(moved):
        os.dup2(fd, place, inheritable=True)
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= len(places) and int(name) != telling:
            with suppress(OSError):  # the listing's own
                os.close(int(name))


def _execute(argv: list[bytes], env: dict[bytes, bytes]) -> NoReturn:
    name = argv[0] if argv else b""
    try:
        if not name:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.execvpe(name, argv, env)
    except (OSError, ValueError) as error:
        script = program(name, env, b".")
        if getattr(error, "errno", None) == errno.ENOEXEC and script is not None:  # as in `_spawn`
            os.execve(b"/bin/sh", [b"/bin/sh", script, *argv[1:]], env)
        raise _failed("exec", error, script is not None) from None


def _failed(step: str, error: OSError | ValueError, found: bool = True, what: str = "") -> CannotStart:
    """A ValueError is a NUL byte where the system allows none."""
    number = getattr(error, "errno", None) or errno.EINVAL
    return CannotStart(step, what + os.strerror(number), number, found)
