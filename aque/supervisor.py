"""Supervise commands: each in a session of its own, bounded output, and no descendant left alive at its end.

A supervisor is forked by the server (`aque.server`) and talks with the worker through a channel (`aque.protocol`). It runs one
command at a time; between two commands it has no child. It ends, and kills what it runs, when its channel closes or the
worker's process ends. Standard library alone.
"""

import marshal
import math
import os
import select
import signal
import socket
import time
from typing import Any

from aque import launch
from aque.cgroups import Group
from aque.processes import catch_signals, descendants, lease_clock, send_signal
from aque.protocol import (
    ENDED,
    FRAME,
    KILL,
    KILLING,
    LEASE,
    MOMENT,
    NUMBER,
    PIECE,
    RESULT,
    RUN,
    SIGNAL,
    STARTED,
    STDERR,
    STDOUT,
    TAIL,
)

#: How long output is still read after the command's end while a process that it left behind holds the pipe.
DRAIN_SECONDS = 0.2
#: Small writes wait this long for company: the start, output and end of a short command then wake the worker once.
GATHER_SECONDS = 0.002
#: poll takes no more than 24 days.
LONGEST_WAIT_SECONDS = 86400.0
#: poll does not count the time that the machine sleeps, the lease's clock does: with a lease, look at it this often.
LEASE_LOOK_SECONDS = 1.0
READ_BYTES = 1 << 16
#: With this much waiting for the worker, the command's pipes are no longer read: the command waits as well.
PENDING_BYTES = 1 << 17

READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


class Gone(Exception):
    """The channel closed, or the worker's process ended."""


class Supervisor:
    """One supervisor process. `worker` is a pidfd: a fork of the worker can hold a copy of the channel, so that its end of
    file may never come. `group` is for this process and what it runs, `outside` is above it; None: there are no groups here."""

    def __init__(self, channel: socket.socket, worker: int, group: Group | None, outside: Group | None) -> None:
        self.group = group
        self.outside = outside
        if group is not None:
            try:
                group.enter()
            except OSError:
                self.group = None
        self.channel = channel
        self.blocked = False  #: the channel took less than there was to send
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
        #: As the kernel counts them, of 512 bytes: read from and written to disks and servers.
        self.blocks_read = self.blocks_written = 0
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
        if self.blocked != bool(self.outgoing):  # the rest goes as soon as there is room for it
            self.blocked = bool(self.outgoing)
            self.poll.modify(self.channel, select.POLLIN | select.POLLOUT if self.blocked else select.POLLIN)

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
            if spec["lease_until"] is not None:
                self.lease_until, self.grace_seconds = spec["lease_until"], spec["kill_grace_seconds"]
                if self.lease_left() <= 0:
                    self.why = "lease"
                    self.report()
                    return False
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
        self.streams = {readable: kind for kind, (readable, _) in pipes.items()}
        limit_bytes = spec["output_limit_bytes"]
        self.head_bytes, self.tail_bytes = limit_bytes - limit_bytes // 4 * 2, limit_bytes // 4
        self.result_bytes = spec["result_limit_bytes"] or 0
        for fd in self.streams:
            os.set_blocking(fd, False)  # a command can open its own end for reading, and be faster than we are
            self.poll.register(fd, select.POLLIN)

    def watch(self) -> None:
        """Until nothing of the command lives and its output is read."""
        self.receive(wait=False)  # what has come while it started: a kill, a longer lease
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
            self.balance()
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
                else:
                    if event & READABLE:
                        self.receive(wait=False)
                        self.obey()
                    if event & select.POLLOUT:
                        self.push()
        self.resume()
        while self.streams and (ready := self.poll_streams()):
            for fd, event in ready:
                self.relay(fd, event)
        for fd in list(self.streams):
            self.close(fd)

    def balance(self) -> None:
        """Back-pressure: read the command's pipes only while the worker keeps up, except what is dropped anyway."""
        if len(self.outgoing) >= PENDING_BYTES:
            self.push()
        behind = len(self.outgoing) >= PENDING_BYTES
        if behind:
            for fd, kind in self.streams.items():
                if self.room(kind) and fd not in self.paused:
                    # Not modify to no events: the end of the pipe would be reported all the same, and with it data lost.
                    self.poll.unregister(fd)
                    self.paused.add(fd)
        elif self.paused:
            self.resume()

    def resume(self) -> None:
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
        try:
            data = os.read(fd, READ_BYTES) if event & select.POLLIN else b""
        except BlockingIOError:
            return
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
            self.blocks_read += used.ru_inblock
            self.blocks_written += used.ru_oublock
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
        if self.has_children and self.group is not None and self.outside is not None:
            try:
                self.group.kill_others(self.outside)
            except OSError:
                self.group = None  # signals do alone from now on
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
                    "read_bytes": self.blocks_read * 512,
                    "written_bytes": self.blocks_written * 512,
                    "immortal": sorted(self.immortal),
                }
            ),
        )
        self.command = 0
