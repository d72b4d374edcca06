"""Real file systems for tests: one with any source, and one that never answers. Only root can mount; skipped for others."""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


def mount(source: str, point: Path, kind: str, options: str) -> None:
    """mount(2); skips the test where this process must not."""
    if _libc.mount(source.encode(), bytes(point), kind.encode(), 0, options.encode()) != 0:
        number = ctypes.get_errno()
        if number in (errno.EPERM, errno.EACCES, errno.ENODEV):
            pytest.skip(f"this process cannot mount {kind}: {os.strerror(number)}")
        raise OSError(number, os.strerror(number), str(point))


def unmount(point: Path) -> None:
    """Also where something hangs in it."""
    if _libc.umount2(bytes(point), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(point))


class FileSystems:
    """Mounts things, and at the end unmounts them."""

    def __init__(self, base: Path, at_end: ExitStack) -> None:
        self._base = base
        self._at_end = at_end

    def tmpfs(self, source: str, name: str = "shots") -> Path:
        """A directory on a file system of its own that says it comes from `source`."""
        point = self._new_directory(name)
        mount(source, point, "tmpfs", "size=8m")
        self._at_end.callback(unmount, point)
        return point

    def hung(self, name: str = "hung") -> tuple[Path, Callable[[], None]]:
        """A directory in which every look waits until the second result is called; then it fails with ENOTCONN."""
        if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
            pytest.skip("only root can mount, and FUSE needs /dev/fuse")
        point = self._new_directory(name)
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        close = ExitStack()
        close.callback(os.close, device)
        self._at_end.callback(close.close)  # before anything else that could touch it: nobody waits any more
        mount("nobody", point, "fuse", f"fd={device},rootmode=40000,user_id=0,group_id=0")
        self._at_end.callback(unmount, point)
        return point, close.close

    def _new_directory(self, name: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("only root can mount")
        point = self._base / name
        point.mkdir()
        return point


@contextmanager
def file_systems(base: Path) -> Iterator[FileSystems]:
    """What it mounts lies in `base`, a directory, and is gone at the end."""
    with ExitStack() as at_end:
        yield FileSystems(base, at_end)


def without_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
