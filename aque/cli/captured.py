"""What tasks wrote, byte for byte: stdout on our stdout, stderr on our stderr."""

import sys
from collections.abc import Iterable, Iterator

from aque.cli.farm import Farm
from aque.errors import UnknownTask

STDOUT, STDERR = 1, 2
#: At most about so much is read at a time.
CHUNK_BYTES = 4 << 20
_BATCH = 500


def write(fd: int, data: bytes) -> None:
    """Write to our stdout or stderr, at once."""
    stream = sys.stdout if fd == STDOUT else sys.stderr
    stream.flush()
    stream.buffer.write(data)
    stream.buffer.flush()


def copy(farm: Farm, ids: Iterable[int]) -> None:
    """Write all that the latest attempts of these tasks wrote, task by task."""
    listed = list(ids)
    for start in range(0, len(listed), _BATCH):
        for fd, data in _latest(farm, listed[start : start + _BATCH]):
            write(fd, data)


def _latest(farm: Farm, ids: list[int]) -> Iterator[tuple[int, bytes]]:
    """Many small outputs cost one query, large ones are read in pieces."""
    with farm.store.connect() as connection:
        sizes: dict[int, list[tuple[int, int, int]]] = {}
        for (task_id, attempt, fd), size in farm.store.output_sizes(connection, ids).items():
            sizes.setdefault(task_id, []).append((fd, attempt, size))
        wrote = [task_id for task_id in ids if task_id in sizes]
        at = 0
        while at < len(wrote):
            together: list[int] = []
            total = 0
            while at < len(wrote):
                size = sum(part[2] for part in sizes[wrote[at]])
                if together and total + size > CHUNK_BYTES:
                    break
                together.append(wrote[at])
                total += size
                at += 1
            if total > CHUNK_BYTES:
                for fd, attempt, _ in sorted(sizes[together[0]]):
                    for data in pieces(farm, together[0], attempt, fd):
                        yield fd, data
                continue
            found = farm.store.outputs(connection, together)
            for task_id in together:
                for fd in (STDOUT, STDERR):
                    if (task_id, fd) in found:
                        yield fd, found[task_id, fd]


def pieces(farm: Farm, task_id: int, attempt: int, fd: int, offset: int = 0) -> Iterator[bytes]:
    """One captured stream from `offset` on, as far as it has been stored."""
    with farm.store.connect() as connection:
        while found := farm.store.output_after(connection, task_id, attempt, fd, offset):
            for where, data in found:
                yield data
                offset = where + len(data)


class Tail:
    """Follows what one task writes, through all the attempts that it makes from now on, and what is there of the latest."""

    def __init__(self, farm: Farm, task_id: int, streams: Iterable[int] = (STDOUT, STDERR)) -> None:
        self._farm = farm
        self._id = task_id
        self._attempt = 0
        self._offsets = dict.fromkeys(streams, 0)

    def read(self) -> Iterator[tuple[int, bytes]]:
        """What is new, as (fd, bytes)."""
        rows = list(self._farm.rows([self._id], ["attempt"]))
        if not rows:
            raise UnknownTask([self._id], "It has been removed.")
        latest = rows[0]["attempt"]
        if self._attempt:
            yield from self._read_attempt()
        if latest != self._attempt and latest > 0:
            self._attempt = latest
            self._offsets = dict.fromkeys(self._offsets, 0)
            yield from self._read_attempt()

    def _read_attempt(self) -> Iterator[tuple[int, bytes]]:
        for fd in self._offsets:
            for data in pieces(self._farm, self._id, self._attempt, fd, self._offsets[fd]):
                self._offsets[fd] += len(data)
                yield fd, data

    def copy(self) -> None:
        """Write what is new."""
        for fd, data in self.read():
            write(fd, data)
