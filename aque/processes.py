"""Processes and those below them: find them, signal them, kill them until none is left. Standard library alone."""

import ctypes
import math
import os
import select
import signal
import time
from collections.abc import Callable

PR_SET_CHILD_SUBREAPER = 36
#: How long another subreaper may take to stop: a thread of it may hang in the kernel.
STOP_SECONDS = 5.0

prctl: Callable[[int, int, int, int, int], int] = ctypes.CDLL(None).prctl


def children(pid: int) -> list[int]:
    """The children of all threads of `pid`, by the kernel's own lists."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it ended meanwhile: its children are someone else's now, and the next look finds them
    return found


def children_of_all() -> dict[int, list[int]]:
    """Parent -> children, of every process: for kernels without lists of children (CONFIG_PROC_CHILDREN)."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The command's name is in parentheses and may hold anything, parentheses and spaces too.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.setdefault(parent, []).append(int(name))
    return found


HAS_LISTS = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def descendants(ancestor: int, except_for: set[int] | None = None) -> list[int]:
    """Every descendant of `ancestor`, parents first, without the children `except_for` and theirs; zombies too."""
    everyone = {} if HAS_LISTS else children_of_all()
    found: list[int] = []
    level = [ancestor]
    while level:
        parents, level = level, []
        for parent in parents:
            level += children(parent) if HAS_LISTS else everyone.get(parent, [])
        if except_for:
            level = [pid for pid in level if pid not in except_for]
        found += level
    return found


def send_signal(pid: int, number: int) -> bool:
    """False if the kernel does not allow it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    except OSError:
        pass  # not a signal
    return True


def is_over(pid: int) -> bool:
    """True for a process that has ended, whether or not somebody has reaped it; false while one of its threads runs."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return True
    return fields[0] in b"ZX" and int(fields[17]) <= 1


def parent(pid: int) -> int:
    """0: there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def is_stopped(pid: int) -> bool:
    """True if no thread of the process runs, because it was stopped or because there is no such process."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[0] not in b"TtZX":
                    return False
    except FileNotFoundError:
        return is_over(pid)
    return True


def leave_none(look: Callable[[], list[int]], patience_seconds: float = math.inf, reap: bool = False) -> None:
    """SIGKILL what `look` finds until all of it is over, or the patience is; except what the kernel does not let this user
    signal. `reap`: collect those that are children of this process, each by its pid."""
    until = time.monotonic() + patience_seconds
    over: set[int] = set()
    seen: set[int] = set()
    pause = 0.0005
    # An orphan moves up while the tree is read, and can be missed: only a look that finds nothing new is the last.
    while found := [pid for pid in look() if pid not in over]:
        for pid in found:
            may = send_signal(pid, signal.SIGKILL)
            # A zombie below one that dies comes to this process next, which then reaps it.
            if not may or (is_over(pid) and not (reap and (reaped(pid) or parent(pid) in found))):
                over.add(pid)
        if time.monotonic() >= until:
            return
        if seen.issuperset(found):
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        seen.update(found)


def reaped(pid: int) -> bool:
    """Collect this child, if it is one and has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


def end_descendants(subreaper: int) -> None:
    """Stop another subreaper, and kill all its descendants: once stopped, it forks no more and collects every orphan."""
    send_signal(subreaper, signal.SIGSTOP)
    until = time.monotonic() + STOP_SECONDS  # for a thread that hangs in the kernel and cannot be stopped
    stopped = False
    while not stopped:
        stopped = is_stopped(subreaper) or time.monotonic() >= until
        leave_none(lambda: descendants(subreaper))
        if not stopped:
            time.sleep(0.0005)


def end_tree(subreaper: int) -> None:
    """Kill another subreaper and all its descendants."""
    end_descendants(subreaper)
    send_signal(subreaper, signal.SIGKILL)


def lease_clock() -> float:
    """Seconds since the boot, with the time that the machine slept: the lease goes on in its sleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def become_subreaper() -> None:
    """Have descendants that lose their parents come to this process, wherever they went."""
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("this kernel has no PR_SET_CHILD_SUBREAPER")


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def catch_signals() -> int:
    """A pipe that becomes readable with every SIGCHLD, SIGTERM and SIGINT."""
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return readable
