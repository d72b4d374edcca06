"""The worker's side of supervised commands: start them, relay what they write, signal them, learn of their end."""

import errno
import logging
import marshal
import math
import os
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

from aque import cgroups, processes, protocol, server, supervisor
from aque.supervised import Command, Ended, frames_of, name_of, reason_of

logger = logging.getLogger(__name__)

#: Idle supervisors above this many end after `IDLE_SECONDS`; the others spare the next command a fork.
WARM = 2
IDLE_SECONDS = 10.0
#: A server that dies this often in a row without an answer is not started again for the commands that wait for it.
SERVER_STARTS = 3
#: A start can hang in the kernel (a working directory or program on a dead mount). If it does so for this long after the
#: grace of a kill, the supervisor is given up: it waits in the kernel as well, and reads nothing.
START_SECONDS = 2.0
#: The same for one that was killed after its start: its supervisor may be stopped by the command itself, being the same user's.
END_SECONDS = 10.0
RECEIVE_BYTES = 1 << 18
#: The server says when a supervisor that died has left nothing behind; if it does not, the command's end is told after this.
GONE_SECONDS = 10.0

OnStarted = Callable[[int], None]
OnOutput = Callable[[int, int, bytes], None]
OnEnded = Callable[[Ended], None]
Callbacks = tuple[OnStarted, OnOutput, OnEnded]


class Running:
    """A command that was given to a CommandRunner. Its methods may be called from any thread, also after its end."""

    __slots__ = (
        "_channel",
        "_done",
        "_dropped",
        "_given_up",
        "_killed",
        "_result",
        "_runner",
        "_unsent",
        "command",
        "on_ended",
        "on_output",
        "on_started",
        "pid",
        "written",
    )

    def __init__(
        self, runner: "CommandRunner", command: Command, on_started: OnStarted, on_output: OnOutput, on_ended: OnEnded
    ) -> None:
        self.command = command
        self.on_started = on_started
        self.on_output = on_output
        self.on_ended = on_ended
        #: None until `on_started`.
        self.pid: int | None = None
        #: The next byte's offset, by descriptor.
        self.written = {1: 0, 2: 0}
        self._dropped = 0
        self._result = bytearray()
        self._runner = runner
        self._channel: _Channel | None = None
        #: For a supervisor that is still to come: the spec, stdin, then signals.
        self._unsent: list[bytes] = []
        self._done = False
        self._killed = False
        self._given_up = False

    def signal(self, number: int) -> None:
        """Deliver a signal to the command's process group. Nothing ends but by its own doing."""
        self._runner._tell(self, protocol.SIGNAL, protocol.NUMBER.pack(number))

    def kill(self, number: int = SIGTERM, grace_seconds: float = 5.0) -> None:
        """Signal the whole tree, and SIGKILL what is left of it after the grace. A later call can shorten the grace."""
        self._runner._tell(self, protocol.KILL, protocol.KILLING.pack(number, grace_seconds))

    def renew(self, until: float) -> None:
        """Let a command with a lease run until this moment of `processes.lease_clock`."""
        self._runner._tell(self, protocol.LEASE, protocol.MOMENT.pack(until))


class _Channel:
    """The worker's end of one supervisor."""

    __slots__ = ("broken", "control", "gone", "idle_since", "incoming", "outgoing", "pid", "running", "sock")

    def __init__(self, sock: socket.socket, pid: int, control: socket.socket | None) -> None:
        self.sock = sock
        self.pid = pid
        self.control = control  #: of the server that forked it; None: that one is gone
        self.incoming = b""
        #: What the socket did not take; the thread sends it.
        self.outgoing: deque[memoryview] = deque()
        self.running: Running | None = None
        self.idle_since = 0.0
        self.broken = ""
        self.gone = False  #: the server has said so

    def send(self, *parts: bytes) -> bool:
        """Queue and send what the socket takes; true if the thread has to send the rest."""
        self.outgoing.extend(memoryview(part) for part in parts if part)
        return self.flush()

    def flush(self) -> bool:
        while self.outgoing:
            try:
                sent = self.sock.send(self.outgoing[0])
            except BlockingIOError:
                return True
            except OSError:
                self.outgoing.clear()  # the supervisor is gone: the thread reads the end of file, and reports it
                return False
            if sent == len(self.outgoing[0]):
                self.outgoing.popleft()
            else:
                self.outgoing[0] = self.outgoing[0][sent:]
        return False


class CommandRunner:
    """Runs the commands of one worker, each under a supervisor of its own (see `aque.supervisor`).

    Callbacks are called in one thread of this object's, in order for each command: `on_started(pid)` unless it could not be
    started, `on_output(fd, offset, data)` with fd 1 or 2 and rising offsets, with a gap where bytes were dropped,
    `on_ended(ended)` exactly once. They may come before `run` returns.
    They must be quick, since all commands share the thread: while one of them takes its time, the commands' pipes fill up and
    the commands wait. They may call `run`, `signal` and `kill`, not `stop`. An exception is logged, and changes nothing else.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._selector = selectors.DefaultSelector()
        self._buffer = bytearray(RECEIVE_BYTES)
        self._owner = 0
        self._wakeup = -1
        self._thread: threading.Thread | None = None
        self._stopping = self._frozen = False
        self._group = cgroups.home()
        self._server: subprocess.Popen[bytes] | _Inherited | None = None
        self._control: socket.socket | None = None
        #: Supervisors asked for and not here yet; starts of the server since it last answered.
        self._asked = 0
        self._starts = 0
        self._channels: set[_Channel] = set()
        #: The last used is used next, so that the others can go.
        self._idle: list[_Channel] = []
        self._waiting: deque[Running] = deque()
        #: Commands whose supervisors died, by the supervisor's pid: when their ends are told at the latest, and the channel.
        self._lost: dict[int, tuple[float, Running, _Channel]] = {}
        #: Processes of the worker's pool, for the server to end if the worker dies.
        self._pool: set[int] = set()
        #: Commands that should have started, or ended, by then: supervisors that answer no more are given up.
        self._overdue: dict[Running, float] = {}
        #: Work for the thread: unsent channels, and ends without a supervisor.
        self._posted: deque[Callable[[], object]] = deque()

    def start(self) -> None:
        """Start the server and the thread. Call it from the main thread, before there are pool processes."""
        if self._thread is not None:
            raise RuntimeError("the command runner was started before: it can be started once.")
        self._open()
        with self._lock:
            self._start_server()
            self._ask(WARM)
        self._start_thread()

    def watch(self, pid: int) -> None:
        """Have the server end this process of the worker's pool, with all that it started, should the worker die."""
        with self._lock:
            self._pool.add(pid)
            if self._control is not None:
                self._order(protocol.WATCH, pid)

    @property
    def containment(self) -> str:
        """How commands are kept together, for people."""
        return "subreaper" if self._group is None else "cgroup and subreaper"

    def pids(self) -> set[int]:
        """The server and the supervisors."""
        with self._lock:
            server = set() if self._server is None else {self._server.pid}
            return server | {channel.pid for channel in self._channels} | self._lost.keys()

    def run(self, command: Command, on_started: OnStarted, on_output: OnOutput, on_ended: OnEnded) -> Running:
        """Start a command, soon; from any thread. What prevents its start is told to `on_ended`, not raised."""
        running = Running(self, command, on_started, on_output, on_ended)
        unsent = frames_of(command)
        with self._lock:
            if self._thread is None or self._stopping or self._owner != os.getpid():
                state = "stopped" if self._stopping else "not started in this process"
                raise RuntimeError(f"the command runner is {state}: {name_of(command)} was not started.")
            running._unsent = unsent
            self._waiting.append(running)
            if self._idle:
                self._assign(self._idle.pop())
            else:
                self._ask(len(self._waiting))
        return running

    def stop(self, timeout_seconds: float = 10.0) -> bool:
        """Kill all that runs, and end the supervisors, the server and the thread. Ends are reported as usual.

        False if something could not be killed in time (a process in a system call that does not return): its end is reported
        as `lost`, and its supervisor goes on killing it. In a fork of the worker this does nothing.
        """
        if self._thread is None or self._owner != os.getpid():
            return True
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback of the command runner cannot stop it: it would wait for itself.")
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            self._stopping = True
            active = [*self._waiting, *(channel.running for channel in self._channels if channel.running)]
        for running in active:
            running.kill(SIGKILL, 0)
        with self._changed:
            clean = self._changed.wait_for(self._is_quiet, timeout_seconds)
        with self._lock:
            self._post(self._close)
        self._thread.join(max(0.1, deadline - time.monotonic()))
        if not self._pool:  # else it stays for as long as the pool does
            clean = self.join(max(0.1, deadline - time.monotonic())) and clean
        return clean

    def join(self, timeout_seconds: float) -> bool:
        """After `stop` and the end of the pool: wait for the server, which must not stay as a zombie. False: it lives on."""
        if self._server is None or self._owner != os.getpid():
            return True
        try:
            self._server.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    # A new image of the process (see aque.restart)

    def freeze(self) -> None:
        """End the thread: nobody is called back any more. The commands go on, and others may still be given to `run`;
        `export` is next."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lost, GONE_SECONDS)
            self._frozen = True
            self._post(lambda: None)
        if self._thread is not None:
            self._thread.join()

    def export(self, keys: Mapping[Running, int]) -> dict[str, Any]:
        """What `adopt` needs in the new image; `keys` names every command that has not ended. Call it after `freeze`.

        What had ended without a supervisor is called back here.
        """
        while self._posted:
            self._posted.popleft()()
        channels = list(self._channels)
        running = [r for r in (*self._waiting, *(channel.running for channel in channels)) if r is not None]
        return {
            "server": 0 if self._server is None or self._control is None else self._server.pid,
            "control": -1 if self._control is None else self._control.fileno(),
            "asked": self._asked,
            "channels": [
                {
                    "fd": channel.sock.fileno(),
                    "pid": channel.pid,
                    "incoming": channel.incoming,
                    "outgoing": b"".join(channel.outgoing),
                    "broken": channel.broken,
                    "running": None if channel.running is None else keys[channel.running],
                    "idle_since": channel.idle_since if channel in self._idle else None,
                }
                for channel in channels
            ],
            "waiting": [keys[r] for r in self._waiting],
            "overdue": [(keys[r], due) for r, due in self._overdue.items() if not r._done],
            "running": {
                keys[r]: {
                    "command": replace(r.command, env={}, stdin=None),  # sent, or among what is unsent
                    "pid": r.pid,
                    "written": r.written,
                    "dropped": r._dropped,
                    "result": r._result,
                    "unsent": r._unsent,
                    "killed": r._killed,
                }
                for r in running
            },
        }

    @staticmethod
    def descriptors(exported: Mapping[str, Any]) -> list[int]:
        """Those that must stay open across the exec."""
        found = [exported["control"], *(channel["fd"] for channel in exported["channels"])]
        return [descriptor for descriptor in found if descriptor >= 0]

    def adopt(self, exported: Mapping[str, Any], callbacks: Mapping[int, Callbacks]) -> dict[int, Running]:
        """Take over what the image before this one has exported, and start the thread: in place of `start`.

        The callbacks go on where they were: `on_started` comes if it had not, offsets count from the command's start.
        """
        if self._thread is not None:
            raise RuntimeError("the command runner was started before: it can take nothing over.")
        self._open()
        runnings: dict[int, Running] = {}
        for key, kept in exported["running"].items():
            running = runnings[key] = Running(self, kept["command"], *callbacks[key])
            running.pid, running.written, running._killed = kept["pid"], kept["written"], kept["killed"]
            running._unsent, running._dropped, running._result = kept["unsent"], kept["dropped"], kept["result"]
        with self._lock:
            self._waiting.extend(runnings[key] for key in exported["waiting"])
            self._overdue = {runnings[key]: due for key, due in exported["overdue"]}
            if exported["control"] >= 0:
                self._server = _Inherited(exported["server"])
                self._asked = exported["asked"]
                self._listen(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, exported["control"]))
            elif self._waiting:
                self._post(self._revive)
            for kept in exported["channels"]:
                self._adopt_channel(kept, runnings)
            self._idle.sort(key=lambda channel: channel.idle_since)
        self._start_thread()
        return runnings

    def _adopt_channel(self, kept: Mapping[str, Any], runnings: Mapping[int, Running]) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, kept["fd"])
        channel = _Channel(sock, kept["pid"], self._control)
        channel.incoming, channel.broken = kept["incoming"], kept["broken"]
        self._channels.add(channel)
        self._selector.register(channel.sock, selectors.EVENT_READ)
        self._watch(channel, selectors.EVENT_READ)
        if kept["running"] is not None:
            channel.running = runnings[kept["running"]]
            channel.running._channel = channel
            self._send(channel, kept["outgoing"])
        elif kept["idle_since"] is not None:
            channel.idle_since = kept["idle_since"]
            self._idle.append(channel)

    def _open(self) -> None:
        self._owner = os.getpid()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wakeup, selectors.EVENT_READ, lambda _events: os.eventfd_read(self._wakeup))

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="aque-commands", daemon=True)
        self._thread.start()

    # Below: with the lock held

    def _is_quiet(self) -> bool:
        busy = self._waiting or self._posted or self._lost
        return not busy and all(channel.running is None for channel in self._channels)

    def _start_server(self) -> None:
        self._starts += 1
        self._asked = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        arguments = (theirs.fileno(), os.getpid(), Path(__file__).parents[1], self._group or "")
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", server.PROGRAM, *map(str, arguments)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                # The environment of a worker holds passwords, and nothing else that the server needs.
                env={name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"},
                start_new_session=True,  # Ctrl-C is for the worker, which then decides
            )
        # By now a pid may be another's.
        self._pool = {pid for pid in self._pool if processes.parent(pid) == os.getpid()}
        self._listen(ours)

    def _listen(self, control: socket.socket) -> None:
        self._control = control
        for pid in self._pool:
            self._order(protocol.WATCH, pid)
        self._post(lambda: self._selector.register(control, selectors.EVENT_READ, lambda _events: self._on_control()))

    def _ask(self, wanted: int) -> None:
        """Have `wanted` supervisors on their way."""
        if self._control is None:
            self._post(self._revive)
        elif wanted > self._asked and self._order(protocol.FORK, wanted - self._asked):
            self._asked = wanted  # else it is full: asked again with the next answer; or gone: with the next server

    def _order(self, kind: bytes, number: int) -> bool:
        assert self._control is not None
        try:
            self._control.send(protocol.ORDER.pack(kind, number))
        except OSError:
            return False
        return True

    def _assign(self, channel: _Channel) -> None:
        """Give the channel the next command; without one, keep it for later."""
        if not self._waiting:
            channel.idle_since = time.monotonic()
            self._idle.append(channel)
            return
        running = self._waiting.popleft()
        running._channel = channel
        channel.running = running
        if (limit := running.command.time_limit_seconds) is not None:  # its supervisor counts from the start on
            self._expect(running, limit + START_SECONDS)
        self._send(channel, *running._unsent)
        running._unsent = []

    def _expect(self, running: Running, seconds: float) -> None:
        """Give its supervisor up unless by then the command has started, or ended if it had started already."""
        self._overdue[running] = min(self._overdue.get(running, math.inf), time.monotonic() + seconds)
        self._post(lambda: None)  # the thread waits for what is due next

    def _send(self, channel: _Channel, *parts: bytes) -> None:
        if channel.send(*parts):
            self._post(lambda: self._watch(channel, selectors.EVENT_READ | selectors.EVENT_WRITE))

    def _post(self, work: Callable[[], object]) -> None:
        """Have the thread do it, without the lock."""
        if self._wakeup >= 0:
            self._posted.append(work)
            os.eventfd_write(self._wakeup, 1)

    def _release(self, channel: _Channel) -> Running | None:
        """Forget the channel, and return the command on it."""
        self._channels.discard(channel)
        with suppress(ValueError):
            self._idle.remove(channel)
        running, channel.running = channel.running, None
        if running is not None:
            running._done = True
            self._overdue.pop(running, None)
        return running

    # Below: from any thread, without the lock

    def _tell(self, running: Running, kind: bytes, body: bytes) -> None:
        frame = protocol.FRAME.pack(kind, len(body)) + body
        with self._lock:
            if running._done:
                return
            if running._channel is not None:
                self._send(running._channel, frame)
                if kind == protocol.KILL:
                    running._killed = True
                    grace = protocol.KILLING.unpack(body)[1]
                    self._expect(running, grace + (START_SECONDS if running.pid is None else END_SECONDS))
            elif kind == protocol.KILL:
                running._done = True
                self._waiting.remove(running)
                ended = Ended("killed", f"{name_of(running.command)} was killed before it was started.")
                self._post(lambda: self._call(running.on_ended, ended))
            else:
                running._unsent.append(frame)

    # Below: in the thread, without the lock

    def _loop(self) -> None:
        while self._wakeup >= 0 and not self._frozen:
            try:
                for key, events in self._selector.select(self._do_due()):
                    key.data(events)
                while self._posted:
                    self._posted.popleft()()
                    with self._changed:
                        self._changed.notify_all()
            except Exception:
                logger.exception("the command runner goes on after an error of its own: please report it.")

    def _do_due(self) -> float | None:
        """End supervisors that are idle for long, and those that hang; return the seconds until there is more to do."""
        now = time.monotonic()
        expired: list[_Channel] = []
        given_up: list[int] = []
        with self._lock:
            given_up = [pid for pid, (due, _, _) in self._lost.items() if due <= now]
            for running in [running for running, due in self._overdue.items() if due <= now]:
                del self._overdue[running]
                if not running._done and running._channel and self._control:
                    running._given_up = True
                    self._order(protocol.ABANDON, running._channel.pid)
            while len(self._idle) > WARM and self._idle[0].idle_since + IDLE_SECONDS <= now:
                expired.append(self._idle[0])
                self._release(self._idle[0])
            due_times = list(self._overdue.values())
            due_times += [due for pid, (due, _, _) in self._lost.items() if pid not in given_up]
            if len(self._idle) > WARM:
                due_times.append(self._idle[0].idle_since + IDLE_SECONDS)
        for channel in expired:
            self._disconnect(channel)
        for pid in given_up:
            self._tell_lost(pid)
        return min(max(0.0, min(due_times) - now), supervisor.LONGEST_WAIT_SECONDS) if due_times else None

    def _watch(self, channel: _Channel, events: int) -> None:
        if channel in self._channels:
            self._selector.modify(channel.sock, events, lambda happened: self._on_channel(channel, happened))

    def _disconnect(self, channel: _Channel) -> None:
        self._selector.unregister(channel.sock)
        # A fork of the worker may hold a copy of the socket: closing alone would not be an end of file.
        with suppress(OSError):
            channel.sock.shutdown(socket.SHUT_RDWR)
        channel.sock.close()

    def _on_control(self) -> None:
        control = self._control
        while control is not None:
            try:
                message, fds, _, _ = socket.recv_fds(control, protocol.ORDER.size, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not message:
                self._on_server_lost(control)
                return
            if len(message) == protocol.ORDER.size:
                self._on_gone(protocol.ORDER.unpack(message)[1])
                continue
            (pid,) = protocol.NUMBER.unpack(message)
            refused: Running | None = None
            with self._lock:
                self._starts = 0
                self._asked = max(0, self._asked - 1)
                if fds:
                    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fds[0])
                    sock.setblocking(False)
                    channel = _Channel(sock, pid, control)
                    self._channels.add(channel)
                    self._selector.register(sock, selectors.EVENT_READ)
                    self._watch(channel, selectors.EVENT_READ)
                    self._assign(channel)
                elif self._waiting:
                    refused = self._waiting.popleft()
                    refused._done = True
                if self._waiting:
                    self._ask(len(self._waiting))
            if refused is not None:
                # Without a descriptor, either the server could not fork, or this process has no descriptor left.
                self._refuse(refused, -pid if pid < 0 else errno.EMFILE)

    def _refuse(self, running: Running, code: int | None) -> None:
        why = "the supervisors' server does not start" if code is None else os.strerror(code)
        message = f"{name_of(running.command)} was not started: there is no supervisor for it ({why})."
        self._call(running.on_ended, Ended("cannot_execute", message, errno=code))

    def _on_gone(self, pid: int) -> None:
        """A supervisor has ended, and nothing lives of what it ran."""
        with self._lock:
            for channel in self._channels:
                channel.gone = channel.gone or channel.pid == pid
        self._tell_lost(pid)

    def _tell_lost(self, pid: int) -> None:
        with self._changed:
            found = self._lost.pop(pid, None)
            self._changed.notify_all()
        if found is not None:
            self._call(found[1].on_ended, _lost(found[1], found[2]))

    def _on_server_lost(self, control: socket.socket) -> None:
        """Supervisors go on without their server; new ones need a new one."""
        logger.error("the supervisors' server died; running commands go on, the next one starts another server.")
        self._selector.unregister(control)
        control.close()
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        for pid in list(self._lost):
            self._tell_lost(pid)
        with self._lock:
            self._control = None
            given_up = self._starts >= SERVER_STARTS
        if given_up:
            self._starts = 0
            self._refuse_all(None)
        else:
            self._revive()

    def _revive(self) -> None:
        """Start another server, if somebody waits for it or there is a pool to end with the worker."""
        try:
            with self._lock:
                if self._control is None and (self._waiting or self._pool):
                    self._start_server()
                    self._ask(len(self._waiting))
        except OSError as error:
            self._refuse_all(error.errno)

    def _refuse_all(self, code: int | None) -> None:
        with self._lock:
            refused = list(self._waiting)
            self._waiting.clear()
            for running in refused:
                running._done = True
        for running in refused:
            self._refuse(running, code)

    def _on_channel(self, channel: _Channel, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            with self._lock:
                more = channel.flush()
            if not more:
                self._watch(channel, selectors.EVENT_READ)
        if events & selectors.EVENT_READ:
            try:
                size = channel.sock.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if size:
                self._read_frames(channel, memoryview(self._buffer)[:size])
            else:
                self._on_supervisor_lost(channel)

    def _read_frames(self, channel: _Channel, received: memoryview) -> None:
        data = memoryview(channel.incoming + received) if channel.incoming else received
        start = 0
        while len(data) - start >= protocol.FRAME.size:
            kind, length = protocol.FRAME.unpack_from(data, start)
            end = start + protocol.FRAME.size + length
            if end > len(data):
                break
            self._on_frame(channel, kind, bytes(data[start + protocol.FRAME.size : end]))
            start = end
        channel.incoming = bytes(data[start:])

    def _on_frame(self, channel: _Channel, kind: bytes, body: bytes) -> None:
        running = channel.running
        if kind == protocol.BROKEN:
            channel.broken = body.decode()
            logger.error("a supervisor failed, and killed what it ran:\n%s", channel.broken)
        elif running is None:
            logger.error("a supervisor without a command sent %r.", kind)
        elif kind == protocol.STARTED:
            (running.pid,) = protocol.NUMBER.unpack(body)
            with self._lock:
                if not running._killed:
                    self._overdue.pop(running, None)
            self._call(running.on_started, running.pid)
        elif kind == protocol.ENDED:
            report = marshal.loads(body)
            with self._changed:
                running._done = True
                self._overdue.pop(running, None)
                running._channel = channel.running = None
                # One that could not kill everything ends: it would take those processes for the next command's.
                if not report["immortal"]:
                    self._assign(channel)
                self._changed.notify_all()
            self._call(running.on_ended, _ended(running, report))
        elif kind == protocol.RESULT:
            running._result += body
        elif kind == protocol.TAIL:
            kind, offset = protocol.PIECE.unpack_from(body)
            self._on_output(running, kind, offset, body[protocol.PIECE.size :])
        else:
            self._on_output(running, kind, running.written[_FDS[kind]], body)

    def _on_output(self, running: Running, kind: bytes, offset: int, data: bytes) -> None:
        fd = _FDS[kind]
        running._dropped += offset - running.written[fd]
        running.written[fd] = offset + len(data)
        self._call(running.on_output, fd, offset, data)

    def _on_supervisor_lost(self, channel: _Channel) -> None:
        with self._changed:
            running = self._release(channel)
            if running is not None:
                has_server = channel.control is not None and channel.control is self._control
                unheard = has_server and not channel.gone and not self._stopping
                seconds = GONE_SECONDS if unheard else 0.0
                self._lost[channel.pid] = (time.monotonic() + seconds, running, channel)
            self._changed.notify_all()
        self._disconnect(channel)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception:
            logger.exception("a callback of a command failed; the command goes on.")

    def _close(self) -> None:
        for channel in list(self._channels):
            self._on_supervisor_lost(channel)
        for pid in list(self._lost):
            self._tell_lost(pid)
        with self._lock:
            if self._control is not None:
                with suppress(OSError):
                    self._control.shutdown(socket.SHUT_RDWR)
                self._control.close()
                self._control = None
            self._selector.close()
            os.close(self._wakeup)
            self._wakeup = -1


class _Inherited:
    """The server that the image before this one started: a child of this process like any other."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, SIGKILL)

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended, and reap it. Raises TimeoutExpired as Popen does."""
        with suppress(ProcessLookupError, ChildProcessError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if not select.select([pidfd], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("the supervisors' server", timeout or 0.0)
            finally:
                os.close(pidfd)
            os.waitpid(self.pid, 0)


_FDS = {protocol.STDOUT: 1, protocol.STDERR: 2}


def _lost(running: Running, channel: _Channel) -> Ended:
    name = name_of(running.command)
    if running._killed and running.pid is None:
        return Ended("killed", f"{name} was killed before it had started: its directory or program did not answer.")
    if running._given_up and running.pid is None:
        limit = running.command.time_limit_seconds
        return Ended("time_limit", f"{name} had not started when its time limit of {limit:g} s was over.")
    why = channel.broken.strip().rpartition("\n")[2] or "it was killed, or the runner was stopped"
    return Ended(
        "lost",
        f"the supervisor of {name} ended ({why}): how the command ended is not known.",
        stdout_bytes=running.written[1],
        stderr_bytes=running.written[2],
    )


def _ended(running: Running, report: dict[str, Any]) -> Ended:
    code = None if report["status"] is None else os.waitstatus_to_exitcode(report["status"])
    number = -code if code is not None and code < 0 else None
    reason, message = reason_of(running.command, report, code)
    if report["immortal"]:
        pids = ", ".join(map(str, report["immortal"]))
        message = f"{message} These of its processes belong to another user, and live on: {pids}.".lstrip()
    return Ended(
        reason,
        message,
        exit_code=None if number else code,
        signal=number,
        errno=report["failure"] and report["failure"][2],
        stdout_bytes=report["stdout_bytes"],
        stderr_bytes=report["stderr_bytes"],
        truncated=running._dropped > 0
        or report["stdout_bytes"] > running.written[1]
        or report["stderr_bytes"] > running.written[2],
        result=bytes(running._result) if 0 < report["result_bytes"] == len(running._result) else None,
        result_bytes=report["result_bytes"],
        cpu_seconds=report["cpu_seconds"],
        max_rss_bytes=report["max_rss_bytes"],
        read_bytes=report.get("read_bytes", 0),  # of a supervisor from before there were any: not counted
        written_bytes=report.get("written_bytes", 0),
    )
