"""Every setting: its type, default, unit and meaning, and the one place that reads them.

Precedence: an argument > the environment (`AQUE_LEASE_SECONDS`) > Celery's configuration (`aque_lease_seconds`) >
the file named by `AQUE_CONFIG`, else `$XDG_CONFIG_HOME/aque/aque.toml` (`lease_seconds = 30`) > the default.
The caller passes the environment and the file in: this module touches neither.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from aque.errors import BadSetting

#: As SQLAlchemy reads them: a password may hold anything but @.
_CREDENTIALS = re.compile(r"^[^:/]*(?::[^@]*)?@")


def _setting(default: Any, unit: str, text: str, minimum: float | None = None) -> Any:
    return field(default=default, metadata={"unit": unit, "help": text, "minimum": minimum})


@dataclass(frozen=True, slots=True)
class Settings:
    """One consistent set of settings. Field metadata holds the unit and the help text of each."""

    broker: str = _setting(
        "", "URL", "the farm's store: sqlite:///FILE or postgresql://USER@HOST/NAME; empty: SQLite in state_dir"
    )
    celery_broker: str = _setting("", "URL", "a broker for Celery's control and events; empty: the store carries them")
    state_dir: str = _setting("", "path", "where the embedded store lives; empty: $XDG_STATE_HOME/aque")
    default_queue: str = _setting("celery", "name", "the queue of tasks that name none")
    cpus: str = _setting("", "CPUs", "what a worker may reserve; empty: the CPUs that its process may use")
    memory: str = _setting(
        "", "bytes", "what a worker may reserve, with suffix K, M, G, T; empty: the machine's memory"
    )
    resources: str = _setting(
        "", "names", "a site's own that a worker may reserve, as in `gpu=2,nuke=4`, or by their numbers `gpu=[1,3]`"
    )
    tags: str = _setting("", "names", "what a worker is good for, with commas: tasks can ask for it")
    pin: bool = _setting(False, "yes/no", "bind each task to as many CPUs of the worker's as it reserves")
    set_threads: bool = _setting(
        False, "yes/no", "tell tasks in OMP_NUM_THREADS and its like how many threads they have CPUs for"
    )
    fair_share: str = _setting(
        "auto", "yes/no/auto", "of equal priorities, who has the fewest CPUs running is next; auto: on PostgreSQL"
    )
    administrators: str = _setting("root", "names", "users who may do what others may not, with commas")
    max_user_priority: int = _setting(
        100, "priority", "shared stores: the highest priority that who is no administrator may give"
    )
    priority_per_hour: int = _setting(
        0, "priority", "what a task's priority gains with each hour since its submission; the same for all users", 0
    )
    reserve_after_seconds: float = _setting(
        10.0, "s", "a task that does not fit while smaller ones do gets room kept for it after so long", 0.0
    )
    ingress_user: str = _setting(
        "",
        "name",
        "as whom tasks run that come through the broker (`aque.submit`); empty: the worker's user, if it is no root",
    )
    event_arguments: bool = _setting(
        True,
        "yes/no",
        "show the arguments of tasks in Celery's events and `celery inspect`; no: [hidden] in their place",
    )
    io_hints: bool = _setting(True, "yes/no", "take the words of a command that are paths as its io_paths")
    io_limits: str = _setting(
        "",
        "limits",
        "how many tasks may use a file system at once on the farm: globs of its source, as in `nas*:*=16,/dev/sd*=4`",
    )
    locality_wait_seconds: float = _setting(
        3.0, "s", "so long a task with io_paths waits for the host on which what it waited for has ended", 0.0
    )
    back_off_seconds: float = _setting(
        60.0,
        "s",
        "so long a host does not try again what it could not start; twice as long each time, up to 16 times",
        0.1,
    )
    lease_seconds: float = _setting(30.0, "s", "a worker that has not renewed for this long may lose its tasks", 0.2)
    poll_seconds: float = _setting(1.0, "s", "an idle worker looks this often even if no doorbell rings", 0.01)
    kill_grace_seconds: float = _setting(5.0, "s", "between the first signal of a kill and SIGKILL", 0.0)
    most_blocked: int = _setting(
        100, "tasks", "so many functions of a worker may wait for other tasks at once, each in a process of its own", 0
    )
    drain_seconds: float = _setting(
        60.0, "s", "how long a stopping worker waits for what it runs before it gives it back", 0.0
    )
    max_lost: int = _setting(3, "attempts", "a task whose workers died this often ends in error", 1)
    result_limit_bytes: int = _setting(1 << 20, "bytes", "the largest result that is stored", 1)
    inputs_limit_bytes: int = _setting(64 << 20, "bytes", "the most that dependencies' results may add to one task", 1)
    stdin_limit_bytes: int = _setting(8 << 20, "bytes", "the largest stdin that is stored with a task", 0)
    output_limit_bytes: int = _setting(
        8 << 20, "bytes", "captured output kept of one attempt: half of it from the start, half from the end", 0
    )
    output_retention_seconds: float = _setting(
        14 * 86400.0, "s", "captured output of tasks that ended so long ago is removed; 0: never", 0.0
    )
    result_retention_seconds: float = _setting(
        0.0, "s", "and their results; 0: with their tasks, or as Celery's `result_expires` says where that is set", 0.0
    )
    task_retention_seconds: float = _setting(
        90 * 86400.0, "s", "and they themselves, whole jobs at once, with all that is theirs; 0: never", 0.0
    )
    output_quota_bytes: int = _setting(
        20 << 30, "bytes", "captured output of all tasks; of more the oldest is removed; 0: no bound", 0
    )
    unknown_result: str = _setting(
        "pending",
        "pending/wait/raise",
        "of an id that is not in the table: `.state` is PENDING and `.get()` raises UnknownTask; wait: `.get()` waits "
        "for it, as Celery does; raise: both raise",
    )
    event_retention_seconds: float = _setting(
        86400.0, "s", "what has happened to tasks is kept so long for those who listen; 0: for ever", 0.0
    )
    min_uid: int = _setting(1000, "uid", "shared stores: tasks of users below this are refused", 0)
    allow_root_tasks: bool = _setting(False, "yes/no", "shared stores: run the tasks of root, as root")
    unsafe_allow_root_sqlite: bool = _setting(
        False, "yes/no", "SQLite: let root switch to the users of tasks; for tests, since anybody who can write may lie"
    )
    environment_allow: str = _setting(
        "*", "globs", "of a task's environment, as submitted: the variables that a command of another user gets"
    )
    environment_deny: str = _setting(
        "LD_PRELOAD,LD_AUDIT", "globs", "of these, those that it does not get; names with commas, * for any text"
    )
    no_new_privileges: bool = _setting(
        True, "yes/no", "a command of another user cannot gain privileges (sudo, ping and other setuid programs fail)"
    )
    rlimits: str = _setting(
        "",
        "limits",
        "resource limits of commands, as in `nofile=4096,core=0`; after a colon the hard limit, else the same",
    )

    @property
    def store_url(self) -> str:
        """The store as an SQLAlchemy URL with its driver, e.g. `postgresql+psycopg2://...` or `sqlite:////...`."""
        if not self.broker:
            return "sqlite:///" + quote(str(PurePosixPath(self.state_dir) / "aque.db"))
        # SQLAlchemy 2.1 reads a bare postgresql:// as psycopg 3.
        return "postgresql+psycopg2://" + self.broker.partition("://")[2] if self.is_shared else self.broker

    @property
    def celery_broker_url(self) -> str:
        """What Celery connects to for remote control, events and ordinary tasks."""
        if self.celery_broker:
            return self.celery_broker
        if self.is_shared:
            return "aque+postgresql://" + self.broker.partition("://")[2]
        file = PurePosixPath(unquote(urlsplit(self.store_url).path)[1:])
        return "aque+sqlite:///" + quote(str(file.with_name(file.stem + "-bus.db")))

    @property
    def is_fair(self) -> bool:
        """True if users share the farm: see `fair_share`."""
        return self.is_shared if self.fair_share == "auto" else self.fair_share == "yes"

    def is_administrator(self, user: str) -> bool:
        """True for a user who may do what others may not; in a store of one person, for everybody."""
        return not self.is_shared or user in [name.strip() for name in self.administrators.split(",")]

    @property
    def is_shared(self) -> bool:
        """True for a store that several users reach (PostgreSQL)."""
        return self.broker.startswith("postgres")

    def to_url_of_others(self) -> str:
        """The same without user and password: other users have their own, which libpq finds."""
        if not self.is_shared:
            return self.to_url()
        scheme, _, rest = self.broker.partition("://")
        return f"{scheme}://{_CREDENTIALS.sub('', rest, count=1).partition('?')[0]}"

    def to_url(self) -> str:
        """The URL that makes another process, handed it as AQUE_BROKER, use the same farm."""
        return self.broker or self.store_url


def load(
    environ: Mapping[str, str],
    file: Mapping[str, Any] | None = None,
    celery_conf: Callable[[str], Any] | None = None,
    **given: Any,
) -> Settings:
    """Settings from all sources; `given` (arguments) wins, None there means "not given".

    `celery_conf` maps `aque_NAME` to a value or None. Raises BadSetting, naming the source and the setting.
    """
    known = {f.name: f for f in fields(Settings)}
    for name in file or {}:
        if name not in known:
            raise BadSetting(f"the configuration file sets {name!r}, which Aque does not have; see docs/settings.md.")
    values: dict[str, Any] = {}
    for name, spec in known.items():
        sources = [
            ("argument", given.get(name)),
            (f"AQUE_{name.upper()}", environ.get(f"AQUE_{name.upper()}")),
            (f"Celery setting aque_{name}", celery_conf(f"aque_{name}") if celery_conf else None),
            ("configuration file", (file or {}).get(name)),
        ]
        for source, value in sources:
            if value is not None and value != "":
                values[name] = _parse(name, value, type(spec.default), spec.metadata["minimum"], source)
                break
    if not values.get("state_dir"):
        base = environ.get("XDG_STATE_HOME") or environ.get("HOME", "") + "/.local/state"
        values["state_dir"] = str(PurePosixPath(base) / "aque")
    _check_broker(values.get("broker", ""))
    if values.get("fair_share", "auto") not in ("yes", "no", "auto"):
        raise BadSetting(f"fair_share must be yes, no or auto, not {values['fair_share']!r}.")
    if values.get("unknown_result", "pending") not in ("pending", "wait", "raise"):
        raise BadSetting(f"unknown_result must be pending, wait or raise, not {values['unknown_result']!r}.")
    return Settings(**values)


def _parse(name: str, value: Any, kind: type, minimum: float | None, source: str) -> Any:
    if name == "io_limits" and isinstance(value, Mapping):  # a table of the file, a dict of Celery's configuration
        value = ",".join(f"{glob}={number}" for glob, number in value.items())
    try:
        parsed = _boolean(value) if kind is bool else kind(value)
    except (TypeError, ValueError, KeyError):
        raise BadSetting(f"{source}: {name} must be of type {kind.__name__}, not {value!r}.") from None
    if minimum is not None and not parsed >= minimum:
        raise BadSetting(f"{source}: {name} must be at least {minimum:g}, not {value!r}.")
    return parsed


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}[str(value).lower()]


def _check_broker(url: str) -> None:
    scheme, separator, rest = url.partition("://")
    if (
        not url
        or scheme in ("postgresql", "postgres")
        or (scheme == "sqlite" and rest.startswith("//") and len(rest) > 2)
    ):
        return
    hint = ""
    if scheme in ("redis", "rediss", "amqp", "amqps", "pyamqp"):
        hint = " A message broker goes into AQUE_CELERY_BROKER."
    shown = f"{scheme}://..." if separator else repr(url)
    raise BadSetting(
        f"AQUE_BROKER cannot be {shown}: write sqlite:////absolute/file.db or postgresql://user@host/name.{hint}"
    )
