"""What a worker knows of the paths that tasks need: is it there, on which file system, in memory already. It never blocks its
caller: it answers with what it has seen, and looks in threads, of which a file system that does not answer stops only its own.
"""

import errno
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from aque.hints import Cost, Mount, absolute, mount_of, parse_mounts, source_of
from aque.residency import is_cached

#: What is known is looked at again after this, and later where a look takes long: looks take a thousandth of the time.
AGE_SECONDS = 5.0
LONGEST_AGE_SECONDS = 60.0
#: A look that has not returned after this makes its file system one that does not answer.
HUNG_SECONDS = 2.0
#: What nobody has asked for so long is forgotten.
FORGET_SECONDS = 600.0
MOST_LINKS = 40
#: For a process without a mount table.
_NOWHERE = Mount(b"/", "", "")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.EIO, errno.ENOTCONN)


@dataclass(frozen=True, slots=True)
class Seen:
    """What some places are for a host."""

    cost: Cost  #: the largest of them
    sources: frozenset[str]  #: the file systems on which they are, see `hints.source_of`


@dataclass(frozen=True, slots=True)
class _Question:
    path: bytes
    with_cost: bool  #: whether it is in memory is asked too


@dataclass(frozen=True, slots=True)
class _There:
    """What a look has found."""

    real: bytes  #: without symbolic links
    reason: str  #: why there is nothing; empty: there is
    cost: Cost


@dataclass(slots=True)
class _Answer:
    there: _There
    named: Mount | None  #: that holds the path by its text
    mount: Mount  #: that holds what the path leads to
    fresh_until: float
    asked_at: float


@dataclass(slots=True)
class _Looker:
    """The looks at one mount, one after the other."""

    mount: Mount
    todo: deque[tuple[_Question, bytes, int]] = field(default_factory=deque)  #: question, where to look, links followed
    has_thread: bool = False
    began: float | None = None  #: the look that is under way
    is_hung: bool = False


class Mounts:
    """The paths of one host. `on_change` is called, by a thread of this object, whenever an answer may have become another;
    it must be quick."""

    def __init__(self, host: str, on_change: Callable[[], None]) -> None:
        self._host = host
        self._on_change = on_change
        self._lock = threading.Condition()
        self._answers: dict[_Question, _Answer] = {}
        self._pending: dict[_Question, _Looker] = {}
        self._lookers: dict[Mount, _Looker] = {}
        self._pruned_at = time.monotonic()
        self._watcher: threading.Thread | None = None
        self._is_closed = False
        self._table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._table, select.POLLPRI | select.POLLERR)
        self._mounts = self._read_table()

    def seen(self, places: tuple[bytes, ...]) -> Seen | None:
        """What these places cost here, and on which file systems they are. None: not known yet; a look has begun, and
        `on_change` will tell that it has ended."""
        known = self._known(_Question(path, True) for path in places)
        if known is None:
            return None
        return Seen(
            max((answer.there.cost for answer in known), default=Cost.CACHED),
            frozenset(source_of(answer.mount, self._host) for answer in known),
        )

    def missing(self, paths: Iterable[bytes]) -> Mapping[bytes, str] | None:
        """Those of the paths that this host has not, and why not. None: not known yet, as `seen` has it."""
        wanted = list(paths)
        known = self._known(_Question(path, False) for path in wanted)
        if known is None:
            return None
        return {path: answer.there.reason for path, answer in zip(wanted, known, strict=True) if answer.there.reason}

    def close(self) -> None:
        """Look no more. A look that hangs keeps its thread, which does not keep the process."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._on_change = _tell_nobody
            for looker in self._lookers.values():
                looker.todo.clear()
            os.close(self._table)
            self._lock.notify_all()

    # -- what is known ------------------------------------------------------------------------------------------------

    def _known(self, questions: Iterable[_Question]) -> list[_Answer] | None:
        with self._lock:
            now = time.monotonic()
            if self._is_closed:
                return None
            if self._poll.poll(0):
                self._take_table()
            if now - self._pruned_at > FORGET_SECONDS:
                self._forget(now)
            found = [self._answer(question, now) for question in questions]  # all are asked, also after a None
        return None if None in found else [answer for answer in found if answer is not None]

    def _answer(self, question: _Question, now: float) -> _Answer | None:
        answer = self._answers.get(question)
        if answer is not None:
            answer.asked_at = now
        if (answer is None or now >= answer.fresh_until) and question not in self._pending:
            self._ask(question, question.path)
        hung = self._pending.get(question)
        if (hung is None or not hung.is_hung) and answer is not None:
            hung = self._lookers.get(answer.mount)
        if hung is not None and hung.is_hung:
            silent = _There(question.path, f"{os.fsdecode(hung.mount.point)} does not answer", Cost.ABSENT)
            return _Answer(silent, hung.mount, hung.mount, now, now)
        return answer

    def _forget(self, now: float) -> None:
        self._pruned_at = now
        self._answers = {q: a for q, a in self._answers.items() if now - a.asked_at < FORGET_SECONDS}

    # -- the mount table ----------------------------------------------------------------------------------------------

    def _read_table(self) -> tuple[Mount, ...]:
        os.lseek(self._table, 0, os.SEEK_SET)
        return parse_mounts(b"".join(iter(lambda: os.read(self._table, 1 << 16), b"")))

    def _take_table(self) -> None:
        """After a change: what is known of paths that are on another file system now is forgotten, and so are mounts that
        are gone, with the thread that may hang in one."""
        self._mounts = self._read_table()
        self._answers = {
            question: answer
            for question, answer in self._answers.items()
            if mount_of(answer.there.real, self._mounts) == answer.mount
            and mount_of(question.path, self._mounts) == answer.named
        }
        there = set(self._mounts)
        self._lookers = {mount: looker for mount, looker in self._lookers.items() if mount in there}
        self._pending = {q: looker for q, looker in self._pending.items() if looker.mount in there}

    # -- looks --------------------------------------------------------------------------------------------------------

    def _ask(self, question: _Question, path: bytes, links: int = 0) -> None:
        """Let the thread of the mount that holds `path` look there for an answer."""
        mount = mount_of(path, self._mounts) or _NOWHERE
        looker = self._lookers.setdefault(mount, _Looker(mount))
        looker.todo.append((question, path, links))
        self._pending[question] = looker
        if not looker.has_thread:
            looker.has_thread = True
            threading.Thread(target=self._work, args=(looker,), name="aque-mount", daemon=True).start()
            self._lock.notify_all()
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="aque-mounts", daemon=True)
            self._watcher.start()

    def _work(self, looker: _Looker) -> None:
        while True:
            with self._lock:
                if self._is_closed or not looker.todo or self._lookers.get(looker.mount) is not looker:
                    looker.has_thread = False
                    return
                question, path, links = looker.todo.popleft()
                looker.began = time.monotonic()
            found = _look(path, looker.mount, question.with_cost)
            with self._lock:
                took, was_hung = time.monotonic() - looker.began, looker.is_hung
                looker.began, looker.is_hung = None, False
                is_news = self._take(looker, question, found, links, took) or was_hung
            if is_news:
                self._on_change()

    def _take(self, looker: _Looker, question: _Question, found: "_There | bytes", links: int, took: float) -> bool:
        """Keep what a look has found; True if the answer is another now."""
        if self._is_closed or self._pending.get(question) is not looker:
            return False
        if isinstance(found, bytes) and links < MOST_LINKS:
            self._ask(question, found, links + 1)
            return self._pending[question].is_hung
        there = _There(question.path, os.strerror(errno.ELOOP), Cost.ABSENT) if isinstance(found, bytes) else found
        del self._pending[question]
        if mount_of(there.real, self._mounts) not in (looker.mount, None):  # something has been mounted there meanwhile
            self._ask(question, question.path)
            return self._pending[question].is_hung
        now = time.monotonic()
        fresh_until = now + min(max(AGE_SECONDS, 1000 * took), LONGEST_AGE_SECONDS)
        before = self._answers.get(question)
        named = mount_of(question.path, self._mounts)
        answer = _Answer(there, named, looker.mount, fresh_until, before.asked_at if before else now)
        self._answers[question] = answer
        return before is None or (before.there, before.mount) != (answer.there, answer.mount)

    def _watch(self) -> None:
        """Tell of looks that do not return."""
        while True:
            with self._lock:
                if self._is_closed:
                    return
                now = time.monotonic()
                busy = [looker for looker in self._lookers.values() if looker.has_thread and not looker.is_hung]
                hung = [looker for looker in busy if looker.began is not None and now - looker.began > HUNG_SECONDS]
                for looker in hung:
                    looker.is_hung = True
                if not hung:
                    self._lock.wait(HUNG_SECONDS / 4 if busy else None)
                    continue
            self._on_change()


def _tell_nobody() -> None:
    pass


def _look(path: bytes, mount: Mount, with_cost: bool) -> "_There | bytes":
    """What is at `path`, which lies on `mount`; or the path to go on with, at the first symbolic link. The kernel is not left
    to follow links: they may lead to a file system that does not answer."""
    real = mount.point
    names = [name for name in path[len(mount.point) :].split(b"/") if name]
    dear = Cost.NETWORK if mount.is_network else Cost.LOCAL
    try:
        os.lstat(real)
        for position, name in enumerate(names):
            child = real.rstrip(b"/") + b"/" + name
            try:
                target = os.readlink(child)
            except OSError as error:
                if error.errno != errno.EINVAL:  # EINVAL: it is there, and no link
                    raise
                real = child
            else:
                return absolute(b"/".join([target, *names[position + 1 :]]), real)
    except OSError as error:
        return _There(path, os.strerror(error.errno or 0), Cost.ABSENT if error.errno in _GONE else dear)
    return _There(real, "", Cost.CACHED if with_cost and is_cached(real) else dear)
