"""Which part of a file is in this host's page cache. Needs Linux; where the kernel does not tell, nothing counts as cached."""

import ctypes
import mmap
import os
import platform
import stat
from fractions import Fraction
from itertools import islice

#: A place is cached from this share of its pages on.
ENOUGH = Fraction(9, 10)
#: So many files of a directory stand for all of it, taken from so many of its entries.
SAMPLE = 32
ENTRIES = 1000
#: cachestat(2), since Linux 6.5; the number is the same on both.
_CACHESTAT = 451 if platform.machine() in ("x86_64", "aarch64") else None
#: mincore(2) needs a byte for each page: of larger files the start stands for the rest.
_MINCORE_BYTES = 1 << 30

#: What SQLite has beside a database that is in use.
_OF_SQLITE = (b"-wal", b"-shm", b"-journal")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


class _Range(ctypes.Structure):
    _fields_ = [("off", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _Cached(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


def is_cached(path: bytes) -> bool:
    """True if nine tenths of a file's pages are in memory; of a directory, those of 32 of its files. False for what is
    empty, cannot be read, or is neither. `path` holds no symbolic links. Blocks as long as the file system does."""
    try:
        counts = [pages(file) for file in _files(path)]
    except OSError:
        return False
    cached, total = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return total > 0 and cached >= ENOUGH * total


def _files(path: bytes) -> list[bytes]:
    mode = os.lstat(path).st_mode
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        return []
    with os.scandir(path) as entries:
        regular = (e.path for e in islice(entries, ENTRIES) if e.is_file(follow_symlinks=False))
        return list(islice(regular, SAMPLE))


def pages(path: bytes) -> tuple[int, int]:
    """How many of a file's pages are in memory, and how many it has; (0, 1) if that cannot be told, or this process may hold
    locks on it."""
    try:
        if _may_be_locked_here(path):
            return 0, 1
        # Between the look and this the name may have become a FIFO's or a device's: to open these must not wait.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0, 1
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return 0, 1
        if found.st_size == 0:
            return 0, 0
        cached = _by_cachestat(fd)
        if cached is None:
            return _by_mincore(fd, min(found.st_size, _MINCORE_BYTES))
        return cached, _pages(found.st_size)
    finally:
        os.close(fd)


def _may_be_locked_here(path: bytes) -> bool:
    """True for a file that this process has open, and for an SQLite database in use. To close any descriptor of a file drops
    all record locks that the process holds on it: an embedded store would lose its own, and with them its integrity."""
    if path.endswith(_OF_SQLITE) or any(os.path.lexists(path + suffix) for suffix in _OF_SQLITE):
        return True
    wanted = os.lstat(path)
    with os.scandir("/proc/self/fd") as entries:
        numbers = [int(entry.name) for entry in entries]
    for number in numbers:
        try:
            if os.path.samestat(os.fstat(number), wanted):
                return True
        except OSError:  # closed meanwhile: the listing's own, for one
            continue
    return False


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE)


def _by_cachestat(fd: int) -> int | None:
    """None where the kernel does not have it, or does not tell."""
    if _CACHESTAT is None:
        return None
    found = _Cached()
    whole = _Range(0, 0)
    arguments = (
        ctypes.c_long(_CACHESTAT),
        ctypes.c_uint(fd),
        ctypes.byref(whole),
        ctypes.byref(found),
        ctypes.c_uint(0),
    )
    return int(found.cached) if _libc.syscall(*arguments) == 0 else None


def _by_mincore(fd: int, size_bytes: int) -> tuple[int, int]:
    # By libc: the address of a read-only mapping of Python's is not to be had.
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return 0, 1
    try:
        resident = ctypes.create_string_buffer(_pages(size_bytes))
        if _libc.mincore(address, size_bytes, resident) != 0:
            return 0, 1
        return sum(byte & 1 for byte in resident.raw), len(resident)
    finally:
        _libc.munmap(address, size_bytes)
