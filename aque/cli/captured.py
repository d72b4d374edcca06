"""What tasks wrote, byte for byte: stdout on our stdout, stderr on our stderr."""

import sys
from collections.abc import Iterable, Iterator, Mapping

from aque.cli.farm import Farm
from aque.errors import UnknownTask

STDOUT, STDERR = 1, 2
#: (task, attempt, fd)
Stream = tuple[int, int, int]
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


def pieces(farm: Farm, task_id: int, attempt: int, fd: int) -> Iterator[bytes]:
    """One captured stream, as far as it has been stored."""
    last = -1
    with farm.store.connect() as connection:
        while found := farm.store.output_after(connection, {(task_id, attempt, fd): last}):
            yield from (data for _, _, data in found)
            last = found[-1][1]


class Tail:
    """Follows what tasks write, through all the attempts that they make from now on, and what is there of the latest."""

    def __init__(self, farm: Farm, ids: Iterable[int], streams: Iterable[int] = (STDOUT, STDERR)) -> None:
        self._farm = farm
        self._fds = tuple(streams)
        self._attempts = dict.fromkeys(ids, 0)
        #: offset of the last piece that was read
        self._last: dict[Stream, int] = {}

    def read(self) -> Iterator[tuple[Stream, bytes]]:
        """What is new: in order within each stream, and about as it was written among them."""
        latest = {row["id"]: row["attempt"] for row in self._farm.rows(list(self._attempts), ["id", "attempt"])}
        if gone := [task_id for task_id in self._attempts if task_id not in latest]:
            raise UnknownTask(gone, "Removed while it was followed.")
        yield from self._read()  # what was left of earlier attempts comes before the next
        for task_id, attempt in latest.items():
            if attempt != self._attempts[task_id]:
                self._forget(task_id)
                self._attempts[task_id] = attempt
                self._last |= {(task_id, attempt, fd): -1 for fd in self._fds}
        yield from self._read()

    def _read(self) -> Iterator[tuple[Stream, bytes]]:
        wanted = dict(self._last)
        with self._farm.store.connect() as connection:
            while found := self._farm.store.output_after(connection, wanted):
                for stream, last, data in found:
                    self._last[stream] = last
                    yield stream, data
                wanted = {stream: self._last[stream] for stream, _, _ in found}

    def drop(self, ids: Iterable[int]) -> None:
        """These have ended, and been read to their ends."""
        for task_id in ids:
            self._forget(task_id)
            self._attempts.pop(task_id, None)

    def _forget(self, task_id: int) -> None:
        for fd in self._fds:
            self._last.pop((task_id, self._attempts.get(task_id, 0), fd), None)

    def copy(self) -> None:
        """Write what is new."""
        for (_, _, fd), data in self.read():
            write(fd, data)


class Printer:
    """Writes what tasks wrote, as it is."""

    def __init__(self, ours: Mapping[int, int]) -> None:
        """`ours`: which of our streams stands for a stream of the tasks."""
        self._ours = ours

    def write(self, stream: Stream, data: bytes) -> None:
        """Write what comes next in a stream of a task."""
        write(self._ours[stream[2]], data)

    def end(self, task_id: int) -> None:
        """Nothing more comes of this task."""


class TaggedPrinter(Printer):
    """Writes lines with the id of their task and a tab before each. A line that is not complete waits for its rest."""

    def __init__(self, ours: Mapping[int, int]) -> None:
        super().__init__(ours)
        self._parts: dict[int, dict[Stream, bytes]] = {}  #: by task: the beginning of a line
        self._is_open: set[int] = set()  #: of our streams, those whose last line has no end yet

    def write(self, stream: Stream, data: bytes) -> None:
        """Write the lines that `data` completes."""
        parts = self._parts.setdefault(stream[0], {})
        if any(earlier[1] != stream[1] for earlier in parts):
            self._flush(parts)  # of an attempt before this one
        *lines, rest = (parts.pop(stream, b"") + data).split(b"\n")
        if rest:
            parts[stream] = rest
        if lines:
            self._put(stream, b"".join(b"%d\t%s\n" % (stream[0], line) for line in lines))

    def end(self, task_id: int) -> None:
        """Write what is left, which has no line end: whatever follows it begins on a line of its own."""
        self._flush(self._parts.pop(task_id, {}))

    def _flush(self, parts: dict[Stream, bytes]) -> None:
        for stream, rest in parts.items():
            self._put(stream, b"%d\t%s" % (stream[0], rest))
            self._is_open.add(self._ours[stream[2]])
        parts.clear()

    def _put(self, stream: Stream, data: bytes) -> None:
        fd = self._ours[stream[2]]
        if fd in self._is_open:
            self._is_open.discard(fd)
            data = b"\n" + data
        write(fd, data)
