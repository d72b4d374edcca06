"""A submitter's looks at the file system: which paths are there and how large they are. Few looks, and none for ever.

Symbolic links are followed here and not by the kernel, since one on a local disk may lead to a server that does not answer.
"""

import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from aque import hints, machine

T = TypeVar("T")

#: What one submission may spend on looks, in system calls and in seconds; what it asks after that is taken for unknown.
CALLS = 1000
SECONDS = 0.5
#: So long a look waits for a server or a process to answer.
ANSWER_SECONDS = 1.0
#: From so many names in one directory on, it is read as a whole: on a server that is one question in place of thousands.
FEW = 4
LONGEST_LISTING = 100_000
#: The mount table is read again after this.
MOUNTS_SECONDS = 1.0
MOST_LINKS = 40


class NoAnswer(Exception):
    """A file system does not answer."""


class _Spent(Exception):
    """The submission may not look any more."""


class FileSystems:
    """The mounted file systems of this host; knows which ones do not answer. Safe to share between threads."""

    def __init__(self) -> None:
        self._stuck: dict[hints.Mount, threading.Thread] = {}
        self._mounts: tuple[hints.Mount, ...] = ()
        self._read_at = -MOUNTS_SECONDS

    def mounts(self) -> tuple[hints.Mount, ...]:
        """The mount table, at most a second old."""
        now = time.monotonic()
        if now - self._read_at >= MOUNTS_SECONDS:
            self._mounts, self._read_at = machine.mounts(), now
        return self._mounts

    def call(self, function: Callable[[bytes], T], path: bytes) -> T:
        """`function(path)`, which looks at `path` and follows no link. Raises NoAnswer after a second; then, until that
        look returns, at once."""
        mount = hints.mount_of(path, self.mounts())
        if mount is None or not mount.may_hang:
            return function(path)
        stuck = self._stuck.get(mount)
        if stuck is not None and stuck.is_alive():
            raise NoAnswer
        results: list[T] = []
        errors: list[OSError] = []

        def look() -> None:
            try:
                results.append(function(path))
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=look, name="aque-look", daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)
        if thread.is_alive():
            self._stuck[mount] = thread
            raise NoAnswer
        for error in errors:
            raise error
        return results[0]


class _Kind(Enum):
    DIRECTORY = auto()
    LINK = auto()
    FILE = auto()  #: whatever holds no other names


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is of a path that was asked for."""

    text: bytes  #: its longest prefix that exists
    real: bytes  #: the same without symbolic links
    kind: _Kind


class Looks:
    """The looks of one submission, which remembers what it has seen."""

    def __init__(self, file_systems: FileSystems) -> None:
        self._file_systems = file_systems
        self.mounts = file_systems.mounts()
        self._calls = CALLS
        self._seconds = SECONDS
        self._found = {b"/": _Found(b"/", b"/", _Kind.DIRECTORY)}
        self._kinds: dict[bytes, _Kind | None] = {}  # by real path; None: there is no such thing
        self._sizes: dict[bytes, int] = {}
        self._names = Counter[bytes]()
        self._whole: dict[bytes, bool] = {}  # directories that were read; False: not to their ends
        self._links = 0

    def prefix(self, path: bytes) -> bytes | None:
        """The longest prefix of the path that exists, as far as the submission may look; None if its file system does not
        answer."""
        try:
            return self._walk(path).text
        except NoAnswer:
            return None

    def size(self, path: bytes) -> int:
        """Bytes of a file; 0 for anything else, and where that cannot be told."""
        try:
            found = self._walk(path)
            if found.text != path or found.kind is not _Kind.FILE:
                return 0
            if found.real not in self._sizes and self._calls > 0:
                self._stat(found.real)
            return self._sizes.get(found.real, 0)
        except (NoAnswer, _Spent):
            return 0

    def _walk(self, path: bytes) -> _Found:
        if path in self._found:
            return self._found[path]
        names: list[bytes] = []
        known = path
        while (found := self._found.get(known)) is None:
            directory, _, name = known.rpartition(b"/")
            known = directory or b"/"
            names.append(name)
        for name in reversed(names):
            if found.text == known:
                found = self._step(found, name)
            known = _join(known, name)
            self._found[known] = found
        return found

    def _step(self, directory: _Found, name: bytes) -> _Found:
        """The entry of a directory; the directory itself if it has none of this name."""
        if directory.kind is not _Kind.DIRECTORY:
            return directory
        real = _join(directory.real, name)
        try:
            kind = self._kind(directory.real, real)
            if kind is None:
                return directory
            if kind is _Kind.LINK:
                target = hints.absolute(self._call(os.readlink, real), directory.real)
                end = self._behind_link(target)
                if end.text != target:  # it leads nowhere
                    return directory
                real, kind = end.real, end.kind
        except (_Spent, OSError):
            return directory
        return _Found(_join(directory.text, name), real, kind)

    def _behind_link(self, target: bytes) -> _Found:
        self._links += 1
        try:
            if self._links > MOST_LINKS:
                raise _Spent
            return self._walk(target)
        finally:
            self._links -= 1

    def _kind(self, directory: bytes, path: bytes) -> _Kind | None:
        if path in self._kinds:
            return self._kinds[path]
        if directory not in self._whole:
            self._names[directory] += 1
            if self._names[directory] > FEW:
                self._list(directory)
        if self._whole.get(directory) or path in self._kinds:
            return self._kinds.get(path)
        return self._stat(path)

    def _list(self, directory: bytes) -> None:
        self._whole[directory] = False
        try:
            kinds = self._call(_entries, directory)
        except OSError:  # one may enter it, but not read it
            return
        self._kinds |= kinds
        self._whole[directory] = len(kinds) < LONGEST_LISTING

    def _stat(self, path: bytes) -> _Kind | None:
        try:
            found = self._call(os.lstat, path)
        except OSError:
            self._kinds[path] = None
            return None
        kind = _Kind.FILE
        if stat.S_ISDIR(found.st_mode):
            kind = _Kind.DIRECTORY
        elif stat.S_ISLNK(found.st_mode):
            kind = _Kind.LINK
        self._sizes[path] = found.st_size if stat.S_ISREG(found.st_mode) else 0
        self._kinds[path] = kind
        return kind

    def _call(self, function: Callable[[bytes], T], path: bytes) -> T:
        if self._calls <= 0 or self._seconds <= 0:
            raise _Spent
        self._calls -= 1
        began = time.monotonic()
        try:
            found = self._file_systems.call(function, path)
        except OSError:
            self._seconds -= time.monotonic() - began
            raise
        self._seconds -= time.monotonic() - began  # not if it hung: others have nothing to do with that
        return found


def _entries(directory: bytes) -> dict[bytes, _Kind | None]:
    """Path -> kind of what a directory holds, as far as it is read."""
    kinds: dict[bytes, _Kind | None] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink():
                kinds[entry.path] = _Kind.LINK
            else:
                kinds[entry.path] = _Kind.DIRECTORY if entry.is_dir(follow_symlinks=False) else _Kind.FILE
            if len(kinds) == LONGEST_LISTING:
                break
    return kinds


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + name if directory == b"/" else directory + b"/" + name
