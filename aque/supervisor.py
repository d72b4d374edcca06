"""Supervise commands: each in a session of its own, bounded output, and no descendant left alive at its end.

    worker ---- control socket ----> server ---- fork ----> supervisor ---- spawn ----> the command
       \\------------------- channel, one per supervisor -------/

Run as `python -I -S -c PROGRAM CONTROL_FD WORKER_PID`, so that it needs the standard library alone and starts as a fresh,
single-threaded interpreter: forking it is safe and cheap, forking a worker full of threads is neither.

The server forks a supervisor when the worker asks for one, and answers with the worker's end of the channel. A supervisor
runs one command at a time; between two commands it has no child. It ends, and kills what it runs, when its channel closes or
the worker's process ends. Should a supervisor itself be killed, the server inherits what it ran and kills that. When the
worker's process ends, the server also ends the processes of its pool, with all that they started.

Control socket, messages of kind and number (`ORDER`) from the worker:
    FORK    how many supervisors are wanted. Answered by one message for each (`NUMBER`): its pid with the channel attached,
            or a negated errno with nothing attached
    ABANDON the pid of a supervisor that does not answer: it is killed, and what it was about to start
    WATCH   the pid of a process of the worker's pool
and to the worker:
    GONE    the pid of a supervisor that has ended, once nothing lives of what it ran
Channel, frames of kind and length (`FRAME`), then the body:
    to the supervisor   RUN     a marshalled dict, see `Supervisor.start`; `stdin_bytes` of stdin follow it unframed
                        SIGNAL  number (`NUMBER`): to the command's process group
                        KILL    number, seconds (`KILLING`): to the whole tree; what is left after the seconds gets SIGKILL
                        LEASE   until when (`MOMENT`, see `lease_clock`) the command may run, unless another such frame comes
    to the worker       STARTED pid (`NUMBER`) of the command
                        STDOUT, STDERR, RESULT  bytes as written, in order
                        TAIL    kind, offset (`PIECE`), bytes: the end of a stream whose middle was dropped
                        ENDED   a marshalled dict, see `Supervisor.report`
                        BROKEN  text: the supervisor has failed, and has killed what it ran
Marshal and not JSON: it carries bytes, costs no import, and both ends are one version of Python and trust each other.
"""

import ctypes
import errno
import gc
import marshal
import math
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from aque import launch

ORDER = struct.Struct("=ci")
FRAME = struct.Struct("=cI")
NUMBER = struct.Struct("=i")
KILLING = struct.Struct("=id")
PIECE = struct.Struct("=cQ")
MOMENT = struct.Struct("=d")
FORK, ABANDON, WATCH, GONE = b"F", b"A", b"W", b"G"
RUN, SIGNAL, KILL, LEASE = b"R", b"S", b"K", b"L"
STARTED, STDOUT, STDERR, RESULT, TAIL, ENDED, BROKEN = b"P", b"1", b"2", b"3", b"T", b"E", b"!"

#: How to start a fresh interpreter with this module: its own directory of packages at the end of the path, and nothing else.
PROGRAM = "import sys; sys.path.append(sys.argv[3]); from aque.supervisor import main; main()"

#: How long output is still read after the command's end while a process that it left behind holds the pipe.
DRAIN_SECONDS = 0.2
#: Small writes wait this long for company: the start, output and end of a short command then wake the worker once.
GATHER_SECONDS = 0.002
#: Supervisors that have not ended this long after the worker are stopped, or hang in the kernel. They are killed then, and
#: what they ran by the server.
PATIENCE_SECONDS = 5.0
#: poll takes no more than 24 days.
LONGEST_WAIT_SECONDS = 86400.0
#: poll does not count the time that the machine sleeps, the lease's clock does: with a lease, look at it this often.
LEASE_LOOK_SECONDS = 1.0
READ_BYTES = 1 << 16
#: With this much waiting for the worker, the command's pipes are no longer read: the command waits as well.
PENDING_BYTES = 1 << 17

PR_SET_CHILD_SUBREAPER = 36
READABLE = select.POLLIN | select.POLLHUP | select.POLLERR

prctl: Callable[[int, int, int, int, int], int] = ctypes.CDLL(None).prctl


class Gone(Exception):
    """The channel closed, or the worker's process ended."""


class Supervisor:
    """One supervisor process. `worker` is a pidfd: a fork of the worker can hold a copy of the channel, so that its end of
    file may never come."""

    def __init__(self, channel: socket.socket, worker: int) -> None:
        self.channel = channel
        self.worker = worker
        self.wakeup = catch_signals()
        self.umask = os.umask(0o022)
        os.umask(self.umask)
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.poll = select.poll()
        for fd in (channel.fileno(), worker, self.wakeup):
            self.poll.register(fd, select.POLLIN)
        self.terminated = False
        signal.signal(signal.SIGTERM, self.on_terminate)
        signal.signal(signal.SIGINT, self.on_terminate)
        self.reset()

    def reset(self) -> None:
        #: The command's pid; 0: no command. Its wait status; None: it has not been reaped.
        self.command = 0
        self.status: int | None = None
        self.has_children = False
        #: Why the tree is being killed: "killed", "time_limit", "lease", or None.
        self.why: str | None = None
        #: When what is left gets SIGKILL.
        self.kill_at = math.inf
        self.flush_at = math.inf
        self.limit_at = math.inf
        self.soft_limit_at = math.inf
        self.lease_until = math.inf
        self.grace_seconds = 0.0
        #: Open pipe -> kind of its frames; bytes read of each kind.
        self.streams: dict[int, bytes] = {}
        self.total = {STDOUT: 0, STDERR: 0, RESULT: 0}
        #: Bytes of output that are still forwarded at once, of both streams together; of each, its last so many are kept.
        self.head_bytes = 0
        self.tail_bytes = 0
        self.tails = {STDOUT: bytearray(), STDERR: bytearray()}
        #: Bytes of a result that are still forwarded.
        self.result_bytes = 0
        #: Pipes that are not polled, because the worker does not keep up.
        self.paused: set[int] = set()
        self.cpu_seconds = 0.0
        self.max_rss_bytes = 0
        self.immortal: set[int] = set()

    def on_terminate(self, number: int, _frame: object) -> None:
        self.terminated = True

    # The channel

    def serve(self) -> None:
        """Run commands until the worker is gone."""
        while True:
            kind, body = self.next_frame()
            if kind == RUN:
                spec = marshal.loads(body)
                del body  # megabytes, perhaps
                self.reset()
                started = self.begin(spec)
                del spec  # its environment is of no more use, and the command may live for days
                if started:
                    self.watch()
                    self.report()
                self.flush()
                if self.has_children:  # immortal ones: their ends must not be taken for those of the next command
                    raise Gone
                self.terminated = False
            # A signal for the last command that crossed its end: nobody is left to receive it.

    def next_frame(self) -> tuple[bytes, bytes]:
        while (frame := self.take_frame()) is None:
            self.receive(wait=True)
        return frame

    def take_frame(self) -> tuple[bytes, bytes] | None:
        if len(self.incoming) < FRAME.size:
            return None
        kind, length = FRAME.unpack_from(self.incoming)
        if len(self.incoming) < FRAME.size + length:
            return None
        body = bytes(memoryview(self.incoming)[FRAME.size : FRAME.size + length])
        del self.incoming[: FRAME.size + length]
        return kind, body

    def receive(self, wait: bool) -> None:
        """Read what the worker has sent; with `wait`, at least one byte: for moments without a command."""
        if wait and self.poll_idle():
            raise Gone
        try:
            data = self.channel.recv(READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:
            raise Gone from None
        if not data:
            raise Gone
        self.incoming += data

    def poll_idle(self) -> bool:
        """Wait for the channel; true if there is nothing more to wait for."""
        for fd, _ in self.poll.poll():
            if fd == self.worker:
                return True
            if fd == self.wakeup:
                os.read(self.wakeup, 512)
        return self.terminated

    def send(self, kind: bytes, body: bytes) -> None:
        if not self.outgoing:
            self.flush_at = time.monotonic() + GATHER_SECONDS
        self.outgoing += FRAME.pack(kind, len(body))
        self.outgoing += body

    def push(self) -> None:
        """Send what the socket takes now."""
        self.flush_at = math.inf
        try:
            while self.outgoing:
                sent = self.channel.send(self.outgoing, socket.MSG_DONTWAIT)
                del self.outgoing[:sent]
        except BlockingIOError:
            pass
        except ConnectionError:
            raise Gone from None

    def flush(self) -> None:
        """Send everything, however slowly the worker reads."""
        self.push()
        if self.outgoing:
            waiting = select.poll()
            waiting.register(self.channel, select.POLLOUT)
            waiting.register(self.worker, select.POLLIN)
            while self.outgoing:
                if any(fd == self.worker for fd, _ in waiting.poll()):
                    raise Gone
                self.push()

    # One command

    def begin(self, spec: dict[str, Any]) -> bool:
        """Start a command, or report why that is impossible."""
        stdin = self.take_stdin(spec["stdin_bytes"])
        try:
            self.start(spec, stdin)
        except launch.CannotStart as error:
            self.report(error)
            return False
        finally:
            if stdin is not None:
                os.close(stdin)
        self.send(STARTED, NUMBER.pack(self.command))
        return True

    def take_stdin(self, size: int) -> int | None:
        """A descriptor to read the command's stdin from; None: this process's own, /dev/null.

        A file in memory needs no pumping, and no room in this process.
        """
        if not size:
            return None
        memory = os.memfd_create("stdin", os.MFD_CLOEXEC)
        while True:
            part = self.incoming[:size]
            del self.incoming[:size]
            size -= len(part)
            while part:
                del part[: os.write(memory, part)]
            if not size:
                os.lseek(memory, 0, os.SEEK_SET)
                return memory
            self.receive(wait=True)

    def start(self, spec: dict[str, Any], stdin: int | None) -> None:
        """Start the command of `spec`. Raises CannotStart.

        Besides what `launch.start` reads: user (a name with min_uid and allow_root; None: this process's), login,
        stdin_bytes, output_limit_bytes, result_limit_bytes (None: it has no result), time_limit_seconds and
        soft_time_limit_seconds (None: none), lease_until (None: no lease), kill_grace_seconds.
        """
        user = None
        if spec["user"] is not None:
            user = launch.account(spec["user"], spec["min_uid"], spec["allow_root"])
            spec["env"].update(
                {b"HOME": os.fsencode(user.home), b"SHELL": os.fsencode(user.shell)}
                | dict.fromkeys((b"USER", b"LOGNAME"), os.fsencode(user.name))
            )
        if spec["login"]:
            shell = spec["env"].get(b"SHELL") or b"/bin/sh"
            spec["argv"] = [shell, b"-l", b"-c", b'exec "$@"', shell, *spec["argv"]]
        if spec["umask"] is None:
            spec["umask"] = self.umask
        pipes: dict[bytes, tuple[int, int]] = {}
        try:
            for kind, path in ((STDOUT, spec["redirections"][1]), (STDERR, spec["redirections"][2])):
                if path is None:
                    pipes[kind] = os.pipe2(os.O_CLOEXEC)
            if spec["result_limit_bytes"] is not None:
                pipes[RESULT] = os.pipe2(os.O_CLOEXEC)
            ends = {kind: writable for kind, (_, writable) in pipes.items()}
            descriptors = [stdin, ends.get(STDOUT), ends.get(STDERR), ends.get(RESULT)]
            self.command = launch.start(spec, user, descriptors)
        except BaseException:
            for readable, _ in pipes.values():
                os.close(readable)
            raise
        finally:
            for _, writable in pipes.values():
                os.close(writable)
        self.has_children = True
        self.grace_seconds = spec["kill_grace_seconds"]
        if (limit := spec["time_limit_seconds"]) is not None:
            self.limit_at = time.monotonic() + limit
        if (limit := spec["soft_time_limit_seconds"]) is not None:
            self.soft_limit_at = time.monotonic() + limit
        if spec["lease_until"] is not None:
            self.lease_until = spec["lease_until"]
        self.streams = {readable: kind for kind, (readable, _) in pipes.items()}
        limit_bytes = spec["output_limit_bytes"]
        self.head_bytes, self.tail_bytes = limit_bytes - limit_bytes // 4 * 2, limit_bytes // 4
        self.result_bytes = spec["result_limit_bytes"] or 0
        for fd in self.streams:
            self.poll.register(fd, select.POLLIN)

    def watch(self) -> None:
        """Until nothing of the command lives and its output is read."""
        channel = self.channel.fileno()
        if self.incoming:
            self.obey()
        while self.has_children:
            now = time.monotonic()
            if self.flush_at <= now:
                self.push()
            if self.limit_at <= now:
                self.limit_at = math.inf
                if self.status is None:
                    self.kill(signal.SIGTERM, self.grace_seconds, "time_limit")
            if self.soft_limit_at <= now:
                self.soft_limit_at = math.inf
                if self.status is None:
                    self.signal_tree(signal.SIGTERM)  # how the command takes it is up to the command
            if self.lease_until < math.inf and self.lease_left() <= 0:
                self.kill(signal.SIGTERM, self.lease_left() + self.grace_seconds, "lease")
                self.lease_until = math.inf
            if self.terminated:
                self.terminated = False
                self.kill(signal.SIGTERM, self.grace_seconds, "killed")
            if self.kill_at <= now:
                self.leave_nothing()
                break
            self.balance(channel)
            longest = LONGEST_WAIT_SECONDS if self.lease_until == math.inf else LEASE_LOOK_SECONDS
            due = min(self.flush_at, self.limit_at, self.soft_limit_at, self.kill_at, now + longest)
            seconds = min(due - now, self.lease_left())
            for fd, event in self.poll.poll(max(0, math.ceil(seconds * 1000))):
                if fd in self.streams:
                    self.relay(fd, event)
                elif fd == self.wakeup:
                    os.read(fd, 512)
                    self.reap()
                elif fd == self.worker:
                    raise Gone
                elif event & READABLE:
                    self.receive(wait=False)
                    self.obey()
                else:
                    self.push()
        self.resume(channel)
        while self.streams and (ready := self.poll_streams()):
            for fd, event in ready:
                self.relay(fd, event)
        for fd in list(self.streams):
            self.close(fd)

    def balance(self, channel: int) -> None:
        """Back-pressure: read the command's pipes only while the worker keeps up, except what is dropped anyway."""
        if len(self.outgoing) >= PENDING_BYTES:
            self.push()
        behind = len(self.outgoing) >= PENDING_BYTES
        if behind and not self.paused:
            self.poll.modify(channel, select.POLLIN | select.POLLOUT)
        if behind:
            for fd, kind in self.streams.items():
                if self.room(kind) and fd not in self.paused:
                    # Not modify to no events: the end of the pipe would be reported all the same, and with it data lost.
                    self.poll.unregister(fd)
                    self.paused.add(fd)
        elif self.paused:
            self.resume(channel)

    def resume(self, channel: int) -> None:
        self.poll.modify(channel, select.POLLIN)
        for fd in self.paused:
            self.poll.register(fd, select.POLLIN)
        self.paused.clear()

    def poll_streams(self) -> list[tuple[int, int]]:
        """The pipes with something in them now."""
        streams = select.poll()
        for fd in self.streams:
            streams.register(fd, select.POLLIN)
        return streams.poll(0)

    def relay(self, fd: int, event: int) -> None:
        kind = self.streams[fd]
        data = os.read(fd, READ_BYTES) if event & select.POLLIN else b""
        if not data:
            self.close(fd)
            return
        self.total[kind] += len(data)
        head = data[: self.room(kind)]
        if head:
            self.send(kind, head)
            if kind == RESULT:
                self.result_bytes -= len(head)
            else:
                self.head_bytes -= len(head)
        if kind != RESULT and len(head) < len(data):
            tail = self.tails[kind]
            tail += data[len(head) :]
            if len(tail) > self.tail_bytes + READ_BYTES:
                del tail[: len(tail) - self.tail_bytes]

    def room(self, kind: bytes) -> int:
        """How many bytes of this stream would be forwarded at once."""
        return self.result_bytes if kind == RESULT else self.head_bytes

    def send_tails(self) -> None:
        """What was kept of the ends of streams that were too long."""
        for kind, tail in self.tails.items():
            del tail[: max(0, len(tail) - self.tail_bytes)]
            offset = self.total[kind] - len(tail)
            for start in range(0, len(tail), READ_BYTES):
                self.send(TAIL, PIECE.pack(kind, offset + start) + tail[start : start + READ_BYTES])

    def close(self, fd: int) -> None:
        if fd in self.paused:
            self.paused.discard(fd)
        else:
            self.poll.unregister(fd)
        os.close(fd)
        del self.streams[fd]
        self.hasten()

    def obey(self) -> None:
        while (frame := self.take_frame()) is not None:
            kind, body = frame
            if kind == KILL:
                number, seconds = KILLING.unpack(body)
                self.kill(number, seconds, "killed")
            elif kind == LEASE and self.lease_until < math.inf:
                (self.lease_until,) = MOMENT.unpack(body)
            elif kind == SIGNAL and self.status is None:
                try:
                    os.killpg(self.command, NUMBER.unpack(body)[0])
                except OSError:
                    pass  # not ours any more (a setuid program), or not a signal

    # The tree

    def kill(self, number: int, grace_seconds: float, why: str) -> None:
        """Signal the whole tree, and SIGKILL it when the grace is over. A later, shorter grace wins."""
        if self.status is None and self.why is None:
            self.why = why
        self.signal_tree(number)
        now = time.monotonic()
        self.kill_at = min(self.kill_at, now if number == signal.SIGKILL else now + grace_seconds)

    def signal_tree(self, number: int) -> None:
        for pid in descendants(os.getpid()):
            send_signal(pid, number)

    def lease_left(self) -> float:
        """Seconds until the command has to be told to end, so that after the grace nothing of it outlives the lease."""
        return self.lease_until - self.grace_seconds - lease_clock()

    def reap(self) -> None:
        """Collect all that has ended; orphans of the tree are children of this process."""
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                self.has_children = False
                return
            if not pid:
                return
            self.cpu_seconds += used.ru_utime + used.ru_stime
            self.max_rss_bytes = max(self.max_rss_bytes, used.ru_maxrss * 1024)
            if pid == self.command:
                self.status = status
                self.hasten()

    def hasten(self) -> None:
        """The command has ended by itself: what it left behind dies once the output is read, or after a short drain."""
        if self.status is not None and self.why is None:
            self.kill_at = min(self.kill_at, time.monotonic() + (DRAIN_SECONDS if self.streams else 0))

    def leave_nothing(self) -> None:
        """SIGKILL every descendant until there is none; except what the kernel does not let this user signal."""
        pause = 0.005
        self.has_children = True
        self.reap()
        while self.has_children:
            # At once again while new ones appear: a tree that forks is outrun, or at least kept busy dying.
            seen: set[int] = set()
            for _ in range(100):
                new = [pid for pid in descendants(os.getpid()) if pid not in seen]
                if not new:
                    break
                seen.update(new)
                self.immortal.update(pid for pid in new if not send_signal(pid, signal.SIGKILL))
            self.immortal &= seen
            if seen and seen == self.immortal:
                return
            waiting = select.poll()
            waiting.register(self.wakeup, select.POLLIN)
            if waiting.poll(pause * 1000):
                os.read(self.wakeup, 512)
            pause = min(pause * 1.5, 1.0)
            self.reap()

    def report(self, failure: launch.CannotStart | None = None) -> None:
        """Tell the worker of the end, or why there was no start."""
        self.send_tails()
        self.send(
            ENDED,
            marshal.dumps(
                {
                    "status": self.status,
                    "why": self.why,
                    "failure": None if failure is None else failure.args,
                    "stdout_bytes": self.total[STDOUT],
                    "stderr_bytes": self.total[STDERR],
                    "result_bytes": self.total[RESULT],
                    "cpu_seconds": self.cpu_seconds,
                    "max_rss_bytes": self.max_rss_bytes,
                    "immortal": sorted(self.immortal),
                }
            ),
        )
        self.command = 0


def children(pid: int) -> list[int]:
    """The children of all threads of `pid`, by the kernel's own lists."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it ended meanwhile: its children are someone else's now, and the next look finds them
    return found


def children_of_all() -> dict[int, list[int]]:
    """Parent -> children, of every process: for kernels without lists of children (CONFIG_PROC_CHILDREN)."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The command's name is in parentheses and may hold anything, parentheses and spaces too.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.setdefault(parent, []).append(int(name))
    return found


HAS_LISTS = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def descendants(ancestor: int, except_for: set[int] | None = None) -> list[int]:
    """Every descendant of `ancestor`, parents first, without the children `except_for` and theirs; zombies too."""
    everyone = {} if HAS_LISTS else children_of_all()
    found: list[int] = []
    level = [ancestor]
    while level:
        parents, level = level, []
        for parent in parents:
            level += children(parent) if HAS_LISTS else everyone.get(parent, [])
        if except_for:
            level = [pid for pid in level if pid not in except_for]
        found += level
    return found


def send_signal(pid: int, number: int) -> bool:
    """False if the kernel does not allow it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    except OSError:
        pass  # not a signal
    return True


def is_over(pid: int) -> bool:
    """True for a process that has ended, whether or not somebody has reaped it; false while one of its threads runs."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return True
    return fields[0] in b"ZX" and int(fields[17]) <= 1


def is_stopped(pid: int) -> bool:
    """True if no thread of the process runs, because it was stopped or because there is no such process."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[0] not in b"TtZX":
                    return False
    except FileNotFoundError:
        return is_over(pid)
    return True


def leave_none(look: Callable[[], list[int]], patience_seconds: float = math.inf, reap: bool = False) -> None:
    """SIGKILL what `look` finds until all of it is over, or the patience is; except what the kernel does not let this user
    signal. `reap`: collect those that are children of this process, each by its pid."""
    until = time.monotonic() + patience_seconds
    over: set[int] = set()
    seen: set[int] = set()
    pause = 0.0005
    # An orphan moves up while the tree is read, and can be missed: only a look that finds nothing new is the last.
    while found := [pid for pid in look() if pid not in over]:
        for pid in found:
            may = send_signal(pid, signal.SIGKILL)
            if not may or (is_over(pid) and not (reap and reaped(pid))):
                over.add(pid)
        if time.monotonic() >= until:
            return
        if seen.issuperset(found):
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        seen.update(found)


def reaped(pid: int) -> bool:
    """Collect this child, if it is one and has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


def end_descendants(subreaper: int) -> None:
    """Stop another subreaper, and kill all its descendants: once stopped, it forks no more and collects every orphan."""
    send_signal(subreaper, signal.SIGSTOP)
    until = time.monotonic() + PATIENCE_SECONDS  # for a thread that hangs in the kernel and cannot be stopped
    stopped = False
    while not stopped:
        stopped = is_stopped(subreaper) or time.monotonic() >= until
        leave_none(lambda: descendants(subreaper))
        if not stopped:
            time.sleep(0.0005)


def end_tree(subreaper: int) -> None:
    """Kill another subreaper and all its descendants."""
    end_descendants(subreaper)
    send_signal(subreaper, signal.SIGKILL)


def lease_clock() -> float:
    """Seconds since the boot, with the time that the machine slept: the lease goes on in its sleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def become_subreaper() -> None:
    """Have descendants that lose their parents come to this process, wherever they went."""
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("this kernel has no PR_SET_CHILD_SUBREAPER")


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def catch_signals() -> int:
    """A pipe that becomes readable with every SIGCHLD, SIGTERM and SIGINT."""
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return readable


class Server:
    """Forks supervisors, and kills what a killed supervisor leaves behind."""

    def __init__(self, control: socket.socket, worker: int) -> None:
        self.control = control
        self.worker = worker
        self.supervisors: set[int] = set()
        #: Supervisors that have ended, with what they ran perhaps still dying.
        self.ended: list[int] = []
        #: pidfd -> pid of the processes of the worker's pool: a pid alone may be another's by the time that it matters.
        self.pool: dict[int, int] = {}
        self.wakeup = catch_signals()

    def serve(self) -> None:
        """Until the worker is gone, and all supervisors with what they ran after it."""
        poll = select.poll()
        for fd in (self.control.fileno(), self.worker, self.wakeup):
            poll.register(fd, select.POLLIN)
        strangers = False
        pause = 10.0
        patience_until = math.inf
        while True:
            pause = min(pause * 1.5, 1000) if strangers or patience_until < math.inf else 10.0
            for fd, _ in poll.poll(pause if pause > 10.0 else None):
                if fd == self.wakeup:
                    os.read(fd, 512)
                elif fd == self.worker:
                    poll.unregister(fd)
                    for pidfd in self.pool:
                        with suppress(KeyError):
                            poll.unregister(pidfd)
                    self.end_pool()
                    patience_until = time.monotonic() + PATIENCE_SECONDS
                    break  # what else was ready may be closed
                elif fd in self.pool:
                    poll.unregister(fd)
                    os.close(fd)
                    del self.pool[fd]
                elif not self.answer():
                    # It stops, or dies: a process that ends closes its files first. Its pool is watched to the end of either.
                    poll.unregister(fd)
                    self.control.close()
                    patience_until = time.monotonic() + PATIENCE_SECONDS
                    for pidfd in self.pool:
                        poll.register(pidfd, select.POLLIN)
            strangers = self.reap()
            if patience_until < math.inf and not self.supervisors and not strangers and not self.pool:
                return
            if patience_until <= time.monotonic():
                for pid in self.supervisors:
                    send_signal(pid, signal.SIGKILL)

    def answer(self) -> bool:
        """Fork what the worker asks for; false if it is gone."""
        try:
            message = self.control.recv(ORDER.size)
            if not message:
                return False
            kind, number = ORDER.unpack(message)
            if kind == ABANDON and number in self.supervisors:
                send_signal(number, signal.SIGKILL)
            elif kind == WATCH:
                self.watch(number)
            for _ in range(number if kind == FORK else 0):
                try:
                    pid, channel = self.fork()
                except OSError as error:
                    self.control.send(NUMBER.pack(-(error.errno or errno.EAGAIN)))
                    continue
                with channel:
                    fds = struct.pack("i", channel.fileno())
                    self.control.sendmsg([NUMBER.pack(pid)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        except ConnectionError:
            return False
        return True

    def fork(self) -> tuple[int, socket.socket]:
        # The pair is made here and not in the worker: a fork of the worker must never hold the supervisor's end.
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if not pid:
                ours.close()
                self.become_supervisor(theirs)
        self.supervisors.add(pid)
        return pid, ours

    def become_supervisor(self, channel: socket.socket) -> NoReturn:
        code = 1
        try:
            self.control.close()
            os.close(self.wakeup)
            os.close(signal.set_wakeup_fd(-1))
            become_subreaper()  # a fork does not inherit it
            supervisor = Supervisor(channel, self.worker)
            failure = ""
            try:
                supervisor.serve()
            except Gone:
                code = 0
            except BaseException:
                failure = traceback.format_exc()
            supervisor.leave_nothing()
            if failure:
                supervisor.send(BROKEN, failure.encode())
                supervisor.flush()
        finally:
            # No clean-up of what belongs to the server; and never back into its loop.
            os._exit(code)

    def watch(self, pid: int) -> None:
        for pidfd in [pidfd for pidfd in self.pool if is_readable(pidfd)]:
            os.close(pidfd)
            del self.pool[pidfd]
        with suppress(OSError):  # it has ended already
            self.pool[os.pidfd_open(pid)] = pid

    def end_pool(self) -> None:
        """The worker's process has ended. Each process of its pool is ended by a fork: one may hang in the kernel."""
        while self.control.fileno() >= 0 and is_readable(self.control.fileno()) and self.answer():
            pass  # what it still had to say of its pool
        for pidfd, pid in self.pool.items():
            if is_readable(pidfd):
                continue
            try:
                fork = os.fork()
            except OSError:
                end_tree(pid)
                continue
            if not fork:
                try:
                    end_tree(pid)
                finally:
                    os._exit(0)
            self.supervisors.add(fork)
        self.pool.clear()

    def tell_gone(self) -> None:
        with suppress(OSError):  # nobody reads: the worker does not wait for ever
            for pid in self.ended:
                self.control.send(ORDER.pack(GONE, pid), socket.MSG_DONTWAIT)
        self.ended.clear()

    def reap(self) -> bool:
        """Collect the dead, and kill what dead supervisors have left; true while some of that lives."""
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.tell_gone()
                return False
            if not pid:
                break
            if pid in self.supervisors:
                self.supervisors.discard(pid)
                self.ended.append(pid)
        strangers = descendants(os.getpid(), except_for=self.supervisors)
        # All get the signal. Those that may not be signalled are not waited for: nothing more can be done about them.
        left = [send_signal(pid, signal.SIGKILL) for pid in strangers].count(True) > 0
        if not left:
            self.tell_gone()
        return left


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    worker_pid = int(sys.argv[2])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)  # what the worker ignores, commands must not
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Popen gives commands the default again
    # The server goes when its worker goes. If a stop of the whole service signalled it, nobody would kill for the supervisors.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open("/proc/self/comm", "w") as comm:
        comm.write("aque-superv")  # and not aque-worker: `killall aque-worker` is for workers
    become_subreaper()
    worker = os.pidfd_open(worker_pid)
    if os.getppid() != worker_pid:
        return  # it ended already, and the pid may be another's
    gc.freeze()  # a collection in a fork would touch, and so copy, all that it shares with the server
    Server(control, worker).serve()


if __name__ == "__main__":
    main()
