"""The names of a worker's processes, for `ps` and for `killall -HUP aque-worker`, which is to reach workers only.

A process has two: its title, which `ps` shows, and its comm of 15 bytes, by which `killall` and `pgrep` find it.
"""

import os

import setproctitle

WORKER = "aque-worker"
CHILD = "aque-python"


def show(name: str, rest: str = "") -> None:
    """Name this process: `name` is its comm, and begins its title."""
    title = f"{name}: {rest}" if rest else name
    setproctitle.setproctitle(title.encode(errors="backslashreplace").decode())  # a command line may hold odd bytes
    set_comm(name)  # setproctitle has made the title's beginning the comm as well


def set_comm(name: str) -> None:
    """Set the comm alone."""
    try:
        # The main thread's, which is the process's; PR_SET_NAME would name the calling thread.
        with open("/proc/self/comm", "w") as comm:
            comm.write(name)
    except OSError:
        pass  # no /proc: nobody finds the process by this name there either


def name_children() -> None:
    """Let every fork of this process be named otherwise from its first instruction on: it inherits the worker's comm."""
    os.register_at_fork(after_in_child=lambda: set_comm(CHILD))
