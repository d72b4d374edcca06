"""Patterns: ways to run a task that other packages bring, as classes with hooks, found by the entry point `aque.patterns`.

A package says in its pyproject.toml, and installs itself wherever such tasks are submitted and run:

    [project.entry-points."aque.patterns"]
    frames = "studio.patterns:Frames"

A pattern's task is a row of the table like any other function's: its function is `aque.patterns:named.NAME`, its arguments are
the parts that `prepare` has returned, each encoded apart. Hooks run where the task is submitted (`prepare`, `options`), and in
a process of the task's own (`run`, `outcome`); a worker itself never loads a package of patterns.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from aque.errors import BadInput, CommandFailed

ENTRY_POINTS = "aque.patterns"
#: Of a command's stdout, as `CommandPattern.outcome` and results have it.
STDOUT_LIMIT = 64 << 10

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


class Pattern:
    """A function with hooks around it. One object runs many tasks: it keeps nothing about them."""

    #: True: in a child of the worker's pool. False: in a Python of its own under the worker's supervision, which takes 0.1 s
    #: to start; what it writes is captured as a command's, its time limits are a command's, and it needs no slot of the pool.
    in_pool = True

    def prepare(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Where it is submitted: what is stored, from what the caller wrote; handles of tasks stand for their results. To
        refuse it, raise aque.errors.BadInput."""
        if args:
            raise BadInput(f"{type(self).__name__} takes its arguments by name only. Nothing was submitted.")
        return kwargs

    def options(self, **parts: Any) -> Mapping[str, Any]:
        """Where it is submitted: options of the task, as `@aque.task` has them, unless the caller gives others."""
        return {}

    def run(self, **parts: Any) -> Any:
        """In the task: do it."""
        raise NotImplementedError(f"{type(self).__name__} has no run()")

    def outcome(self, end: Any, **parts: Any) -> Any:
        """In the task: judge what `run` has returned. What this returns is the result, what it raises the task's error."""
        return end

    def __call__(self, **parts: Any) -> Any:
        """What a worker calls."""
        return self.outcome(self.run(**parts), **parts)


@dataclass(frozen=True, slots=True)
class End:
    """How a command has ended, with the beginning of what it wrote."""

    exit_code: int | None  #: None: by a signal
    signal: int | None
    stdout: str  #: at most 64 KiB, undecodable bytes backslash-escaped
    truncated: bool  #: it wrote more


class CommandPattern(Pattern):
    """A command with hooks around it. All that it writes is captured, live, as of any command."""

    in_pool = False
    #: Exit codes that count as a success.
    success_codes: Sequence[int] = (0,)

    def argv(self, **parts: Any) -> Sequence[str]:
        """In the task: the command, as a list of words."""
        raise NotImplementedError(f"{type(self).__name__} has no argv()")

    def run(self, **parts: Any) -> End:
        """Run it, in the task's directory and environment."""
        words = [os.fspath(word) for word in self.argv(**parts)]
        kept, written = bytearray(), 0
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                kept += piece[: STDOUT_LIMIT - len(kept)]
                written += len(piece)
                _write(piece)
        status = process.returncode
        shown = kept.decode(errors="backslashreplace")
        return End(None if status < 0 else status, -status if status < 0 else None, shown, written > len(kept))

    def outcome(self, end: End, **parts: Any) -> Any:
        """A result as of `aque.shell`, for a status that counts as a success. Raises CommandFailed for all others."""
        if end.signal is not None:
            raise CommandFailed(f"the command was ended by signal {end.signal}.")
        if end.exit_code not in self.success_codes:
            raise CommandFailed(f"the command exited with status {end.exit_code}.")
        return {name: value for name, value in asdict(end).items() if name != "signal"}


def _write(data: bytes) -> None:
    """To this process's stdout, which the task's is."""
    sys.stdout.flush()
    while data:
        data = data[os.write(1, data) :]


def installed() -> dict[str, EntryPoint]:
    """The patterns that packages bring in this environment, by name; nothing of them is imported. `.value` is where a
    pattern is defined, `.dist.name` the package."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def load(name: str) -> Pattern:
    """The pattern of this name. Raises BadInput, or what its package raises when it is imported."""
    if not _NAME.fullmatch(name):
        raise BadInput(f"a pattern's name is letters, digits, _ and -, and starts with a letter, not {name!r:.80}.")
    found = tuple(entry_points(group=ENTRY_POINTS, name=name))
    if not found:
        known = ", ".join(sorted(installed())) or "none"
        raise BadInput(
            f"there is no pattern {name!r} for {sys.executable}; there are: {known}. Install the package that brings it."
        )
    if len({point.value for point in found}) > 1:
        raise BadInput(
            f"there are several patterns {name!r}, {' and '.join(sorted(point.value for point in found))}: uninstall all "
            "packages but one that bring it."
        )
    kind = found[0].load()
    if not (isinstance(kind, type) and issubclass(kind, Pattern)):
        raise BadInput(f"the pattern {name!r}, {found[0].value}, is no subclass of aque.patterns.Pattern.")
    return kind()


class _Named:
    """Patterns as attributes: as `aque.patterns:named.NAME` a worker finds one as it finds any function."""

    def __getattr__(self, name: str) -> Pattern:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return load(name)
        except BadInput as error:
            raise AttributeError(str(error)) from error


named = _Named()
