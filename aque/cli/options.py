"""The options that every submitting verb has, and what they become."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from aque.cli import ids
from aque.cli.farm import Farm
from aque.durations import multiple
from aque.errors import BadInput
from aque.options import Options
from aque.submitter import Submitter
from aque.values import Condition, Dependency, TaskSpec

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([smhd]?)")


def seconds(text: str) -> float:
    """A length of time in seconds: 90, 90s, 1.5m, 2h, 1d. Raises BadInput."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise BadInput(
            f"cannot read the time {text!r}: write seconds, or a number with s, m, h or d such as 90s or 2h."
        )
    return float(match[1]) * _UNITS[match[2]]


def in_seconds(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """The callback of an option that takes a length of time."""
    return None if value is None else seconds(value)


def expected(_context: click.Context, _option: click.Parameter, value: str) -> float | str:
    """The callback of --duration: a length of time in seconds, or a multiple as it was written. Raises BadInput."""
    if value.strip().lower().endswith("x"):
        multiple(value)
        return value
    return seconds(value)


_WHAT = [
    click.option("--name", metavar="TEXT", default="", help="What to call it; else the command's or function's name."),
    click.option("--queue", metavar="NAME", default="", help="The queue; workers choose which they serve."),
    click.option("--priority", metavar="N", type=int, help="Higher starts first (default 0; in a task: its own)."),
    click.option("--memory", metavar="SIZE", default="0", help="Reserve memory: bytes, or with K, M, G or T."),
    click.option("--host", metavar="GLOBS", default="", help="Run only on hosts such as 'node*,!node7'."),
    click.option("--platform", metavar="NAME", default="", help="Run only on this platform, as Python's sys.platform."),
    click.option(
        "--resource", metavar="NAME=N", multiple=True, help="Reserve so many of what workers declare, such as gpu=1."
    ),
    click.option(
        "--limit", metavar="NAME[=N]", multiple=True, help="Take a token (N) of a farm-wide limit: see `aque limits`."
    ),
    click.option(
        "--tag", metavar="TAG", multiple=True, help="Run only on workers with this tag; '!TAG': without it. Repeatable."
    ),
    click.option("--requires", metavar="PATH", multiple=True, help="Run only on hosts that have this path."),
    click.option("--after", metavar="IDS", multiple=True, help="Start when these tasks have succeeded."),
    click.option("--after-any", metavar="IDS", multiple=True, help="Start when these tasks have ended, however."),
    click.option("--after-failed", metavar="IDS", multiple=True, help="Start when these tasks have not succeeded."),
    click.option(
        "--io",
        metavar="PATH",
        multiple=True,
        help="A path that it reads or writes, in place of those that its words name. Repeatable.",
    ),
    click.option("--no-io", is_flag=True, help="It reads and writes nothing to speak of, whatever its words name."),
    click.option(
        "--duration",
        metavar="TIME",
        default="0",
        callback=expected,
        help="Expected run time: 90s 5m 2h 1d, or 2x the average of its priority; else what past runs took.",
    ),
    click.option("--time-limit", metavar="TIME", callback=in_seconds, help="End it after this time."),
    click.option(
        "--soft-time-limit",
        metavar="TIME",
        callback=in_seconds,
        help="Ask it to end after this time: SIGTERM, or SoftTimeLimitExceeded in a function.",
    ),
    click.option("--user", metavar="NAME", default="", help="Run it as this user; only root can name another."),
    click.option("--max-attempts", metavar="N", type=int, default=1, help="Try it so often if it fails (default 1)."),
    click.option("--no-requeue", is_flag=True, help="Do not run it again if its worker dies."),
    click.option(
        "--strict-lease",
        is_flag=True,
        help="Commands: kill it on its machine when its worker could not renew its lease.",
    ),
]
_CPUS = click.option(
    "--cpus", metavar="CPUS", default="1", help="Reserve CPUs: 1.5, or 1/4, 25%, all of the machine, or 0 (default 1)."
)
_STRICT = click.option(
    "--strict", is_flag=True, help="Refuse what no live worker could ever run, in place of waiting for one that can."
)
_LOCAL = click.option("--local", is_flag=True, help="Start a worker for as long as this takes; implies --wait.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the id as a line of JSON.")


def task_options(function: F) -> F:
    """Add the options of every submitting verb; `read` makes `Options` of their values."""
    return _add(function, [*_WHAT, _CPUS, _STRICT, _LOCAL, _JSON])


def many_task_options(function: F) -> F:
    """The same for a verb that has its own way to say how many CPUs each task takes."""
    return _add(function, [*_WHAT, _STRICT, _LOCAL, _JSON])


def _add(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def check_strict(submitter: Submitter, chosen: Mapping[str, Any], specs: Sequence[TaskSpec]) -> None:
    """With --strict, raise BadInput for what no live worker could ever run."""
    if chosen["strict"] and chosen["local"]:
        raise BadInput("--strict is about the workers that run now, and --local starts one: choose one.")
    if chosen["strict"]:
        submitter.check_possible(specs)


def read(farm: Farm, chosen: Mapping[str, Any]) -> Options:
    """The values of `task_options`, by their names. Raises BadInput, or UnknownTask for a dependency that is not there."""
    for option in ("resource", "limit", "tag", "requires"):
        if "" in chosen[option]:  # of a variable of the shell that is not set, for one
            raise BadInput(f"--{option} is empty: give it a value, or leave it out. Nothing was submitted.")
    dependencies: dict[int, Condition] = {}
    for option, condition in (
        ("after", Condition.OK),
        ("after_any", Condition.ANY),
        ("after_failed", Condition.FAILED),
    ):
        for upstream in ids.resolve(farm, chosen[option], "Nothing was submitted.") if chosen[option] else ():
            if dependencies.setdefault(upstream, condition) is not condition:
                raise BadInput(
                    f"task {upstream} is named by two of --after, --after-any and --after-failed: choose one."
                )
    if chosen["io"] and chosen["no_io"]:
        raise BadInput("--io names paths and --no-io says that there are none: choose one. Nothing was submitted.")
    return Options(
        name=chosen["name"],
        queue=chosen["queue"],
        priority=chosen["priority"],
        cpus=chosen["cpus"],
        memory=chosen["memory"],
        host=chosen["host"],
        platform=chosen["platform"],
        resources=",".join(chosen["resource"]),
        limits=",".join(chosen["limit"]),
        tags=",".join(chosen["tag"]),
        requires_paths=chosen["requires"],
        duration=chosen["duration"],
        io_paths=chosen["io"],
        io=not chosen["no_io"],
        time_limit=chosen["time_limit"],
        soft_time_limit=chosen["soft_time_limit"],
        user=chosen["user"],
        interpreter=chosen.get("interpreter", ""),
        max_attempts=chosen["max_attempts"],
        requeue=not chosen["no_requeue"],
        strict_lease=chosen["strict_lease"],
        dependencies=tuple(Dependency(upstream, condition) for upstream, condition in dependencies.items()),
    )
