"""This host and this process: CPUs, memory, identity, and the settings that its environment and files give."""

import os
import pwd
import resource
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from aque import hints, settings
from aque.errors import BadReservation, BadSetting
from aque.resources import parse_indices, parse_tags


def user_name() -> str:
    """Whose process this is, by its effective uid: not by variables that anybody can set."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a uid without a name, as in many containers
        return str(os.geteuid())


def usable_cpus() -> int:
    """The CPUs that this process may use: its affinity, which containers and `taskset` narrow."""
    return len(os.sched_getaffinity(0))


def total_memory_bytes() -> int:
    """The memory of this machine, or of the container if that has a limit."""
    total = int(psutil.virtual_memory().total)
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total


def mounts() -> tuple[hints.Mount, ...]:
    """The mounts that this process sees; none where there is no /proc."""
    try:
        return hints.parse_mounts(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        return ()


def boot_id() -> str:
    """Changes with every boot; with a pid and its start time it names one process for ever."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(psutil.boot_time())


def machine_id() -> str:
    """Stays the same over boots; empty where there is none, as in many containers."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


def host_id() -> str:
    """The same for two processes exactly if each can tell by its pid whether the other lives: same boot, same pid
    namespace (two containers on a machine share the former only). With the machine's id, see `parts`."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{boot_id()} {namespace} {machine_id()}"


def parts(host_id: str) -> tuple[str, str, str]:
    """Boot, pid namespace and machine of a `host_id`; empty where it has none."""
    boot, namespace, machine, *_ = [*host_id.split(" "), "", ""]
    return boot, namespace, machine


def process_started(pid: int) -> float | None:
    """When this process started, in seconds since 1970; None if there is none. A zombie counts as gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def is_alive(pid: int, started: float) -> bool:
    """True if the process with this pid is the one that started then. Clock adjustments move the reading a little."""
    found = process_started(pid)
    return found is not None and abs(found - started) < 1.0


def parse_rlimits(text: str) -> tuple[tuple[int, int, int], ...]:
    """Resource, soft and hard limit of each part of `nofile=4096:8192,core=0,nproc=unlimited`. Raises BadSetting."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, amounts = part.partition("=")
        number = getattr(resource, f"RLIMIT_{name.strip().upper()}", None)
        soft, _, hard = amounts.partition(":")
        try:
            found.append((int(number), _amount(soft), _amount(hard or soft)))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise BadSetting(
                f"rlimits cannot be {text!r}, because of {part!r}: write names of the module `resource` and numbers, as in "
                "nofile=4096:8192,core=0,nproc=unlimited."
            ) from None
    return tuple(found)


def _amount(text: str) -> int:
    return resource.RLIM_INFINITY if text.strip() == "unlimited" else int(text)


def settings_file() -> Path:
    """The configuration file of this process, whether or not it exists."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(os.environ.get("AQUE_CONFIG") or Path(base) / "aque" / "aque.toml").absolute()


def settings_here(celery_conf: Callable[[str], Any] | None = None, **given: Any) -> settings.Settings:
    """The settings of this process. Raises BadSetting."""
    name = os.environ.get("AQUE_CONFIG")
    file = settings_file()
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError:
        if name:
            raise BadSetting(f"AQUE_CONFIG names {name}, which does not exist.") from None
        values = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(f"cannot read the configuration file {file}: {error}.") from error
    loaded = settings.load(os.environ, values, celery_conf, **given)
    hints.parse_io_limits(loaded.io_limits)
    try:
        parse_tags(loaded.tags)
        parse_indices(loaded.resources)
    except BadReservation as error:
        raise BadSetting(str(error)) from error
    return loaded
