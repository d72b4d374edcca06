"""Control groups (version 2): what keeps a command's processes together besides the subreaper. Standard library alone.

A process cannot leave its group without the right to write where it goes, and `cgroup.kill` ends all in a group at once: also a
tree that forks faster than it can be looked at, and what a setuid program has made another user's. Used where a worker can
make groups (root on most machines, a service with `Delegate=yes`); everywhere else the subreaper does alone.
"""

import os
import time
from contextlib import suppress

#: The kernel empties a group a moment after its kill.
EMPTY_SECONDS = 2.0


def home() -> str | None:
    """The group of this process, if it can make groups below it; None: it cannot."""
    try:
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
        with open("/proc/self/cgroup") as file:
            own = [line.strip().split(":", 2)[2] for line in file if line.startswith("0::")]
    except OSError:
        return None
    points = [words[4] for words in mounts if words[words.index("-") + 1] == "cgroup2"]
    if not points or not own:
        return None
    path = points[0] + own[0].rstrip("/")
    probe = f"{path}/aque-probe-{os.getpid()}"
    try:
        os.mkdir(probe)
        found = os.path.exists(f"{probe}/cgroup.kill")  # Linux 5.14
        os.rmdir(probe)
    except OSError:
        return None
    return path if found else None


def name_of(worker: int) -> str:
    """The name of a worker's group, in which each supervisor has one called by its pid. A pid means something in its namespace
    only: a container may see the groups of others, and not their processes."""
    return f"{_prefix()}{worker}"


def _prefix() -> str:
    namespace = "".join(c for c in os.readlink("/proc/self/ns/pid") if c.isdigit())
    return f"aque-{namespace}-"


class Group:
    """One group. `path` need not exist yet, and its parent must."""

    def __init__(self, path: str) -> None:
        self.path = path
        with suppress(FileExistsError):
            os.mkdir(path)

    def enter(self) -> None:
        """Move this process here; its children will be born here. OSError."""
        self._write("cgroup.procs", "0")

    def kill(self) -> None:
        """Kill all that is in the group, and in groups below it."""
        with suppress(OSError):
            self._write("cgroup.kill", "1")

    def kill_others(self, outside: "Group") -> None:
        """Kill all but this process, which waits in `outside` until they are gone. OSError: it could not leave, or return."""
        outside.enter()
        try:
            self.kill()
            until = time.monotonic() + EMPTY_SECONDS
            while self.is_populated() and time.monotonic() < until:
                time.sleep(0.0005)
        finally:
            self.enter()

    def is_populated(self) -> bool:
        """True while a process is in it that is not a zombie."""
        try:
            with open(f"{self.path}/cgroup.events") as file:
                return "populated 1" in file.read()
        except OSError:
            return False

    def remove(self) -> bool:
        """Remove it with the groups below it, all of them empty; False if one is not."""
        for path, names, _ in os.walk(self.path, topdown=False):
            for name in names:
                with suppress(OSError):
                    os.rmdir(f"{path}/{name}")
        try:
            os.rmdir(self.path)
        except OSError:
            return not os.path.exists(self.path)
        return True

    def end_left(self) -> None:
        """Of the groups below it, kill and remove those of workers that are gone: nobody is left to look after them."""
        prefix = _prefix()
        with suppress(OSError), os.scandir(self.path) as entries:
            for name in [entry.name for entry in entries if entry.name.startswith(prefix)]:
                if not os.path.exists(f"/proc/{name[len(prefix) :]}"):
                    left = Group(f"{self.path}/{name}")
                    left.kill()
                    left.remove()

    def _write(self, file: str, text: str) -> None:
        with open(f"{self.path}/{file}", "w") as opened:
            opened.write(text)
