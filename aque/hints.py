"""IO hints: which words of a command are paths, which file system holds a path, what may be done there at once. Pure: mount
tables and looks at the file system arrive as arguments.

Paths are bytes, absolute and normalised, unless said otherwise.
"""

import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase

from aque.errors import BadSetting
from aque.resources import LARGEST_LIMIT

#: File systems that other machines reach too. SQLite's locks or its shared memory do not work there.
NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "ceph",
        "glusterfs",
        "lustre",
        "gpfs",
        "beegfs",
        "fuse.sshfs",
        "ncpfs",
    }
)
#: `server:/export` or `//server/share`, whatever the file system calls itself.
_SERVER = re.compile(r"[^/:]+:/.*|//[^/]+/.+")
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")

#: More paths of one command than this say nothing more about it.
MOST_PATHS = 64
#: So many paths stand for a task in its requirement class.
MOST_PLACES = 4
#: So many different tuples of places one submission may add to the requirement classes.
MOST_TUPLES = 64

#: The system's own directories.
_WITHOUT_DATA = re.compile(rb"/(?:proc|sys|dev|usr|bin|sbin|lib|lib32|lib64|libx32|etc)(?:/|$)")
_URL = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://")
_OPTION_WITH_VALUE = re.compile(rb"--?[A-Za-z0-9][A-Za-z0-9_.-]*=(.*)")
#: -I/path, -L../lib; not -Ilib, which could as well be three options.
_LETTER_AND_PATH = re.compile(rb"-[A-Za-z](\.{0,2}/.*)")
#: As dd and make have it.
_NAME_AND_PATH = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*=(/.*)")
_LONGEST_PATH = 4096


class Cost(IntEnum):
    """How dear it is for a host to read a path: what costs less starts first there."""

    CACHED = 0  #: it is in this host's memory
    LOCAL = 1
    NETWORK = 2
    ABSENT = 3  #: it is not there, or its file system does not answer


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system in the tree of a host."""

    point: bytes
    source: str  #: as in /proc/self/mountinfo: /dev/sda1, nas1:/shots
    kind: str  #: its type, such as ext4
    number: int = 0  #: of the mount: the same file system, mounted again, has another

    @property
    def is_network(self) -> bool:
        """True if it is another machine that serves it."""
        return self.kind in NETWORK_FILE_SYSTEMS or _SERVER.fullmatch(self.source) is not None

    @property
    def may_hang(self) -> bool:
        """True if a look there may never return, because a server or a process has to answer."""
        return self.is_network or self.kind.startswith("fuse") or self.kind == "autofs"


def parse_mounts(mountinfo: bytes) -> tuple[Mount, ...]:
    """The mounts that can be seen, from the text of /proc/self/mountinfo: of several over one point the last."""
    found: dict[bytes, Mount] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(b" - ")
        mounted, system = left.split(b" "), right.split(b" ")
        if len(mounted) < 5 or len(system) < 2:
            continue
        point = _unescaped(mounted[4])
        # Not surrogateescape: a source is the name of a limit, and databases take UTF-8 only.
        source, kind = (_unescaped(field).decode(errors="backslashreplace") for field in (system[1], system[0]))
        found[point] = Mount(point, source, kind, int(mounted[0]))
    return tuple(found.values())


def _unescaped(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)


def mount_of(path: bytes, mounts: Sequence[Mount]) -> Mount | None:
    """The mount below which `path` lies by its text, symbolic links unseen; None if not even / is in the table."""
    best: Mount | None = None
    for mount in mounts:
        if is_below(path, mount.point) and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def is_below(path: bytes, directory: bytes) -> bool:
    """True if `path` is `directory` or lies in it, by their text."""
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")


def source_of(mount: Mount, host: str) -> str:
    """What the farm calls a file system: the same on all hosts for what a server exports (nas1:/shots), and for a disk with
    its host (host7:/dev/sda1), since two hosts' disks are different ones."""
    return mount.source if mount.is_network else f"{host}:{mount.source}"


# -- limits ---------------------------------------------------------------------------------------------------------------


def parse_io_limits(text: str) -> tuple[tuple[str, int], ...]:
    """Glob of a source and how many tasks may use it at once, from `nas*:*=16,/dev/sd*=4`. Raises BadSetting."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        glob, _, number = part.rpartition("=")  # the last one, since a source may hold others
        if (
            not glob.strip()
            or not number.strip().isascii()
            or not number.strip().isdecimal()
            or not 0 < int(number) <= LARGEST_LIMIT
        ):
            raise BadSetting(
                f"io_limits cannot be {text!r}, because of {part!r}: write globs of sources and whole numbers from 1 to "
                f"{LARGEST_LIMIT}, as in 'nas*:*=16,/dev/sd*=4'."
            )
        found.append((glob.strip(), int(number)))
    return tuple(found)


def limit_of(source: str) -> str:
    """The name of the limit of a file system: what a limit's name cannot hold is an underscore."""
    return "io:" + re.sub(r"[^A-Za-z0-9_.:/@+-]", "_", source)[:190]


def io_capacity(source: str, io_limits: Sequence[tuple[str, int]]) -> int | None:
    """How many tasks may use the source at once: the first glob that matches it, with its host or without; None: any."""
    without_host = source.partition(":")[2] or source
    for glob, capacity in io_limits:
        if fnmatchcase(source, glob) or fnmatchcase(without_host, glob):
            return capacity
    return None


# -- the words of a command -----------------------------------------------------------------------------------------------


def words_that_look_like_paths(argv: Sequence[bytes]) -> Iterator[bytes]:
    """The words after the first, and the values of options, that could be paths, as they are written: with a slash, or the
    name of something in the working directory."""
    for word in argv[1:]:
        path = word
        if word.startswith(b"-"):
            match = _OPTION_WITH_VALUE.fullmatch(word) or _LETTER_AND_PATH.fullmatch(word)
            if match is None:
                continue
            path = match[1]
        elif match := _NAME_AND_PATH.fullmatch(word):
            path = match[1]
        # A script has lines; no name of a file that people give a program does.
        if path and len(path) <= _LONGEST_PATH and b"\n" not in path and not _URL.match(path):
            yield path


def paths_in(argv: Sequence[bytes], cwd: bytes, look: Callable[[bytes], bytes | None]) -> tuple[bytes, ...]:
    """What the words of a command name on the file system: each word's longest prefix that exists, each path once, in their
    order, at most 64. System directories, and the working directory unless it is named, are left out.

    `look` gives the longest prefix of a path that exists; None if that cannot be told: an absolute word is then taken as it
    is, and of relative ones those with a slash. A relative word counts only if all of it exists.
    """
    found: dict[bytes, None] = {}
    for word in words_that_look_like_paths(argv):
        is_relative = not word.startswith(b"/")
        path = absolute(word, cwd)
        if path in found or not _may_hold_data(path):
            continue
        there = look(path)
        if there is None:
            there = path if not is_relative or b"/" in word else b"/"
        if there != path and (is_relative or there == cwd):
            continue
        if _may_hold_data(there):
            found[there] = None
            if len(found) == MOST_PATHS:
                break
    return tuple(found)


def absolute(path: bytes, cwd: bytes) -> bytes:
    """The path from the root, without `.`, `..` and doubled slashes."""
    joined = path if path.startswith(b"/") else cwd + b"/" + path
    if b"/." not in joined and b"//" not in joined and not joined.endswith(b"/"):  # as nearly all
        return joined
    normal = posixpath.normpath(joined)
    return normal[1:] if normal.startswith(b"//") else normal  # which POSIX keeps apart and Linux does not


def _may_hold_data(path: bytes) -> bool:
    return path != b"/" and not _WITHOUT_DATA.match(path)


# -- places ---------------------------------------------------------------------------------------------------------------


def places(
    paths_of_tasks: Sequence[tuple[bytes, ...]], mounts: Sequence[Mount], most: int = MOST_TUPLES
) -> list[tuple[bytes, ...]]:
    """For the paths of each task, what stands for them in its requirement class: at most four of them, sorted, if the tasks
    have together at most `most` different such tuples; else their directories; else their mount points."""
    of_paths: dict[tuple[bytes, ...], tuple[bytes, ...]] = {}
    different = set()
    for paths in dict.fromkeys(paths_of_tasks):
        of_paths[paths] = _few(paths, mounts)
        different.add(of_paths[paths])
        if len(different) > most:
            break
    if len(different) > most:
        of_paths = {paths: directories(paths, mounts) for paths in dict.fromkeys(paths_of_tasks)}
    if len(set(of_paths.values())) > most:
        of_paths = {paths: mount_points(paths, mounts) for paths in paths_of_tasks}
    return [of_paths[paths] for paths in paths_of_tasks]


def directories(paths: Sequence[bytes], mounts: Sequence[Mount]) -> tuple[bytes, ...]:
    """The directories of the paths (of a mount point: itself): at most four, sorted."""
    directory = _Directories(mounts)
    return _few({directory[path] for path in paths}, mounts)


def mount_points(paths: Sequence[bytes], mounts: Sequence[Mount]) -> tuple[bytes, ...]:
    """The mount points of the paths: at most four, sorted."""
    return _few({mount.point for path in paths if (mount := mount_of(path, mounts))}, mounts)


class _Directories(dict[bytes, bytes]):
    """path -> its directory, which is never above its mount point: that would be another file system."""

    def __init__(self, mounts: Sequence[Mount]) -> None:
        self._mounts = mounts
        self._points = {mount.point for mount in mounts}

    def __missing__(self, path: bytes) -> bytes:
        self[path] = path if path in self._points else posixpath.dirname(path)
        return self[path]


def _few(paths: Sequence[bytes] | set[bytes], mounts: Sequence[Mount]) -> tuple[bytes, ...]:
    """At most four of the paths, sorted: one of each mount first, since each has a limit of its own."""
    if len(paths) == 1:
        return tuple(paths)
    rising = sorted(set(paths))
    if len(rising) > MOST_PLACES:
        by_mount: dict[Mount | None, bytes] = {}
        for path in rising:
            by_mount.setdefault(mount_of(path, mounts), path)
        first = list(by_mount.values())
        rising = sorted([*first, *(path for path in rising if path not in first)][:MOST_PLACES])
    return tuple(rising)
