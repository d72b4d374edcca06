"""Patterns: ways to run a task that packages bring, as classes with hooks, found by the entry point `aque.patterns`.

`Shell` and `Python` are the two built in, and what others extend. A package says in its pyproject.toml, and installs itself
wherever such tasks are submitted and run:

    [project.entry-points."aque.patterns"]
    frames = "studio.patterns:Frames"

A pattern's task is a row of the table like any other function's: its function is `aque.patterns:named.NAME`, its arguments are
the parts that `prepare` has returned, each encoded apart. `prepare`, `options` and `environment` run where the task is
submitted; `argv`, `run`, `progress` and `outcome` in a process of the task's own; a worker itself never loads a package of
patterns. What overrides none of the latter four needs no such process: its row is a plain command, or a plain call.
"""

import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, ClassVar

from aque import current, taskclient
from aque.errors import BadInput, CommandFailed
from aque.moments import FARTHEST_SECONDS

ENTRY_POINTS = "aque.patterns"
#: Of each of a command's streams, as `Shell.outcome` and results have it.
KEPT_BYTES = 64 << 10
#: What a command tells of its progress is passed on once in so many seconds.
PROGRESS_SECONDS = 1.0
#: A line that is longer is passed to `progress` without its beginning.
LONGEST_LINE = 64 << 10
#: So much is still read when a command has ended: what it had written is in its pipes, what others write does not count.
DRAINED_BYTES = 2 << 20

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_LINE_ENDS = re.compile(rb"[\r\n]+")


class Retry(Exception):
    """Raised in `run` or `outcome`: the task is to be tried again, `countdown` seconds later.

    `why` is a text, or the exception that ends the task when it has failed more than `max_retries` times. Less than 0 is 0.
    Raises BadInput, which tells `why`, for a countdown of more than 1e9 seconds and for more than 1e9 retries.
    """

    def __init__(self, why: str | Exception, countdown: float = 0.0, max_retries: int = 3) -> None:
        super().__init__(why)
        self.error: Exception = why if isinstance(why, Exception) else self
        self.countdown = self._number("countdown", countdown)
        self.max_retries = int(self._number("max_retries", max_retries))

    def _number(self, what: str, value: Any) -> float:
        """From 0 to FARTHEST_SECONDS, as far as the sandbox takes them; a worker holds no larger one for an answer."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not number <= FARTHEST_SECONDS:
            text = f"the {what} of a Retry must be a number of at most 1e9, not {value!r:.60}. It was raised for: {self.error}"
            raise BadInput(text) from None if self.error is self else self.error
        return max(0.0, number)


class Pattern:
    """What all patterns have. One object runs many tasks: hooks keep nothing about a task in it."""

    #: True: in a child of the worker's pool. False: in a Python of its own under the worker's supervision, which takes 0.1 s
    #: to start; what it writes is captured as a command's, its time limits are a command's, and it needs no slot of the pool.
    in_pool = True

    def prepare(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Where it is submitted: what is stored, by name, from what the caller wrote; handles of tasks stand for their
        results. To refuse it, raise aque.errors.BadInput."""
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
        """In the task: judge what `run` has returned. What this returns is the result, what it raises the task's error, and
        Retry another attempt."""
        return end

    def tell(self, progress: Any) -> None:
        """For hooks in the task: show this, anything that JSON has, to whoever asks how far the task is."""
        taskclient.tell(taskclient.own_address(), "PROGRESS", progress)

    @property
    def is_plain(self) -> bool:
        """True if nothing of it happens in the task that a plain command, or call, does not do."""
        return False

    def __call__(self, **parts: Any) -> Any:
        """What a worker calls."""
        return self.outcome(self.run(**parts), **parts)

    def _overrides(self, kind: type, *names: str) -> bool:
        return any(getattr(type(self), name) is not getattr(kind, name) for name in names)


class Python(Pattern):
    """Call a function: what `aque call` and calls of tasks do."""

    def prepare(self, function: Any, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """`function` is one that has a name, or "module:qualname"."""
        return {"function": function, "args": args, "kwargs": kwargs}

    def run(self, **parts: Any) -> Any:
        """Call it. The parts are `function`, by its name, `args` and `kwargs`."""
        from aque import own_tasks  # Celery: a command's process does not need it, and starts faster without

        (result,) = own_tasks.each(parts["function"], [parts["args"]], kwargs=parts["kwargs"])
        return result

    @property
    def is_plain(self) -> bool:
        return not self._overrides(Python, "run", "outcome", "__call__", "in_pool")


@dataclass(frozen=True, slots=True)
class End:
    """How a command has ended, with some of what it wrote, in which undecodable bytes are backslash-escaped."""

    exit_code: int | None  #: None: by a signal
    signal: int | None
    stdout: str  #: its first 64 KiB
    truncated: bool  #: it wrote more to its stdout
    stderr: str  #: its last 64 KiB


class Shell(Pattern):
    """Run a command: what `aque submit` and `aque.shell` do."""

    in_pool = False
    #: Exit codes that count as a success.
    success_codes: ClassVar[Sequence[int]] = (0,)
    #: Exit codes after which it is tried again, with the seconds until then; the last of `max_retries` is an error.
    retry_codes: ClassVar[Mapping[int, float]] = MappingProxyType({})
    max_retries = 3

    def prepare(self, *words: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The words of the command."""
        if kwargs:
            raise BadInput(f"{type(self).__name__} takes the words of a command only. Nothing was submitted.")
        return {"words": words}

    def environment(self, **parts: Any) -> Mapping[str, str]:
        """Where it is submitted: variables that it gets beside those of this process."""
        return {}

    def argv(self, **parts: Any) -> Sequence[Any]:
        """In the task: the command, as a list of words: texts or paths."""
        words: Sequence[Any] = parts["words"]
        return words

    def progress(self, line: str, **parts: Any) -> Any:
        """In the task, for each line of its stdout and stderr, while it runs: how far it is, as for `tell`, or None. A line
        ends with a line feed or a carriage return."""
        return None

    def run(self, **parts: Any) -> End:
        """Run it, in the task's directory and environment; all that it writes is passed on."""
        words = command_of(self, parts)
        listens = self._overrides(Shell, "progress")
        with _outlasting_signals():
            return _run(words, _Progress(self, parts) if listens else None)

    def outcome(self, end: End, **parts: Any) -> Any:
        """A result as of `aque.shell`, for a status that counts as a success. Raises Retry or CommandFailed for others."""
        if end.signal is not None:
            raise CommandFailed(f"the command was ended by signal {end.signal}.")
        failure = CommandFailed(f"the command exited with status {end.exit_code}.")
        if (countdown := self.retry_codes.get(end.exit_code or 0)) is not None:
            raise Retry(failure, countdown, self.max_retries)
        if end.exit_code not in self.success_codes:
            raise failure
        return {"exit_code": end.exit_code, "stdout": end.stdout, "truncated": end.truncated}

    @property
    def is_plain(self) -> bool:
        own = ("argv", "run", "progress", "outcome", "__call__", "success_codes", "retry_codes", "in_pool")
        return not self._overrides(Shell, *own)


# -- what hooks return, checked ----------------------------------------------------------------------------------------------


def parts_of(pattern: Pattern, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is stored for a caller's arguments. Raises BadInput, and whatever `prepare` raises."""
    return _by_name(pattern, "prepare", pattern.prepare(*args, **kwargs))


def options_of(pattern: Pattern, parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of its task. Raises BadInput, and whatever the hook raises."""
    return _by_name(pattern, "options", pattern.options(**parts))


def environment_of(pattern: Shell, parts: Mapping[str, Any]) -> dict[bytes, bytes]:
    """The variables of its own. Raises BadInput, and whatever the hook raises."""
    found = pattern.environment(**parts)
    try:
        return {os.fsencode(name): os.fsencode(value) for name, value in found.items()}
    except (AttributeError, TypeError):
        raise _wrong(pattern, "environment", "a mapping of texts to texts,", found) from None


def command_of(pattern: Shell, parts: Mapping[str, Any]) -> list[str | bytes]:
    """The words of its command. Raises BadInput, and whatever the hook raises."""
    found = pattern.argv(**parts)
    try:
        words = None if isinstance(found, (str, bytes)) else [os.fspath(word) for word in found]
    except TypeError:
        words = None
    if words is None or not (words or pattern.is_plain):
        raise _wrong(pattern, "argv", "a list of words, texts or paths,", found)
    return words


def _by_name(pattern: Pattern, hook: str, found: Any) -> Mapping[str, Any]:
    if isinstance(found, Mapping) and all(isinstance(name, str) for name in found):
        return found
    raise _wrong(pattern, hook, "a mapping whose keys are texts,", found)


def _wrong(pattern: Pattern, hook: str, what: str, found: Any) -> BadInput:
    return BadInput(
        f"the pattern {type(pattern).__name__} is at fault: its {hook}() must return {what} not {found!r:.60}."
    )


#: The classes of Aque's own: their tasks are called after what they run, others' after the pattern.
BUILT_IN = (Python, Shell)


# -- running a command ------------------------------------------------------------------------------------------------------


class _Progress:
    """What a pattern makes of the lines of its command, told now and then."""

    def __init__(self, pattern: Shell, parts: Mapping[str, Any]) -> None:
        self._pattern = pattern
        self._parts = parts
        self._rest = {1: b"", 2: b""}
        self._untold: Any = None
        self._told_at = -PROGRESS_SECONDS
        self._is_broken = False

    def hear(self, fd: int, piece: bytes) -> None:
        """It has written this. What its pattern raises is written to its stderr, once, and so is that it returns what cannot
        be told: a slip in the reading of lines is no reason to lose hours of work."""
        *lines, rest = _LINE_ENDS.split(self._rest[fd] + piece)
        self._rest[fd] = rest[-LONGEST_LINE:]
        for line in filter(None, () if self._is_broken else lines):
            slip = "raised this"
            try:
                found = self._pattern.progress(line.decode(errors="backslashreplace"), **self._parts)
                slip = "returned what cannot be told"
                json.dumps(found, allow_nan=False)
            except Exception:
                self._give_up(slip)
                return
            if found is not None:
                self._untold = found

    def tell(self) -> float | None:
        """Tell the latest if it is time. Seconds until it is; None: there is nothing to tell."""
        if self._untold is None:
            return None
        now = time.monotonic()
        if (early := self._told_at + PROGRESS_SECONDS - now) > 0:
            return early
        try:
            self._pattern.tell(self._untold)
        except Exception:
            self._give_up("found what could not be told")
        self._untold, self._told_at = None, now
        return None

    def _give_up(self, what: str) -> None:
        self._is_broken = True
        traceback.print_exc()
        print(f"aque: progress() {what}, and is not called any more; the command goes on.", file=sys.stderr)


def _run(words: Sequence[str | bytes], progress: _Progress | None) -> End:
    """Until the command itself has ended, whoever else holds its pipes by then."""
    kept, written = bytearray(), 0
    last: deque[bytes] = deque()
    with (
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None and process.stderr is not None
        selector.register(process.stdout, selectors.EVENT_READ, 1)
        selector.register(process.stderr, selectors.EVENT_READ, 2)
        ended = os.pidfd_open(process.pid)
        selector.register(ended, selectors.EVENT_READ, 0)
        left = DRAINED_BYTES
        while selector.get_map() and left > 0:
            is_over = ended not in selector.get_map()
            timeout = None if progress is None else progress.tell()
            ready = selector.select(0 if is_over else timeout)
            if is_over and not ready:
                break
            for key, _ in ready:
                fd = key.data
                if fd == 0:
                    selector.unregister(ended)
                elif not (piece := os.read(key.fd, 1 << 16)):
                    selector.unregister(key.fileobj)
                else:
                    _write(fd, piece)
                    left -= len(piece) if is_over else 0
                    if fd == 1:
                        kept += piece[: KEPT_BYTES - len(kept)]
                        written += len(piece)
                    else:
                        last.append(piece)
                        while sum(map(len, last)) - len(last[0]) >= KEPT_BYTES:
                            last.popleft()
                    if progress is not None:
                        progress.hear(fd, piece)
        os.close(ended)
    status = process.returncode
    stdout, stderr = (text.decode(errors="backslashreplace") for text in (kept, b"".join(last)[-KEPT_BYTES:]))
    return End(None if status < 0 else status, -status if status < 0 else None, stdout, written > len(kept), stderr)


@contextmanager
def _outlasting_signals() -> Iterator[None]:
    """A signal of the supervisor's reaches this process and the command, which may take its grace to end well: this process
    waits to hear how it does. What gets no supervisor, such as `aque.execute`, is left as it is."""
    if "AQUE_WORKER" not in current.variables() or threading.current_thread() is not threading.main_thread():
        yield
        return
    # Handlers, since the command would inherit that a signal is ignored.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(fd: int, data: bytes) -> None:
    """To this process's stdout or stderr, which the task's is."""
    (sys.stdout if fd == 1 else sys.stderr).flush()
    while data:
        data = data[os.write(fd, data) :]


# -- by their names -----------------------------------------------------------------------------------------------------------


def installed() -> dict[str, EntryPoint]:
    """The patterns that there are in this environment, by name; nothing of them is imported. `.value` is where a pattern is
    defined, `.dist.name` the package."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def load(name: str) -> Pattern:
    """The pattern of this name. Raises BadInput if there is none, or if it cannot be imported."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
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
    try:
        kind = found[0].load()
        pattern = kind() if isinstance(kind, type) and issubclass(kind, Pattern) else None
    except Exception as error:
        raise BadInput(
            f"the pattern {name!r}, {found[0].value}, cannot be loaded for {sys.executable}: {type(error).__name__}: {error}."
        ) from error
    if pattern is None:
        raise BadInput(f"the pattern {name!r}, {found[0].value}, is no subclass of aque.patterns.Pattern.")
    return pattern


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
