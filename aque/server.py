"""The supervisors' server: forks supervisors, kills what a killed supervisor leaves behind, ends a dead worker's pool.

It forks a supervisor when the worker asks for one, and answers with the worker's end of the channel (`aque.protocol`). Should a
supervisor be killed, the server inherits what it ran and kills that. When the worker's process ends, the server also ends the
processes of its pool, with all that they started.

Run as `python -I -S -c PROGRAM CONTROL_FD WORKER_PID PATH GROUP`, so that it needs the standard library alone and starts as a
fresh, single-threaded interpreter: forking it is safe and cheap, forking a worker full of threads is neither.
"""

import errno
import gc
import math
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from aque.cgroups import Group, name_of
from aque.processes import become_subreaper, catch_signals, descendants, end_tree, is_readable, parent, send_signal
from aque.protocol import ABANDON, BROKEN, FORK, GONE, NUMBER, ORDER, WATCH
from aque.supervisor import Gone, Supervisor

#: How to start a fresh interpreter with this module: its own directory of packages at the end of the path, and nothing else.
PROGRAM = "import sys; sys.path.append(sys.argv[3]); from aque.server import main; main()"
#: Supervisors that have not ended this long after the worker are stopped, or hang in the kernel. They are killed then, and
#: what they ran by the server.
PATIENCE_SECONDS = 5.0


class Server:
    """Forks supervisors, and kills what a killed supervisor leaves behind."""

    def __init__(self, control: socket.socket, worker: int, group: Group | None) -> None:
        """`worker` is its pidfd; supervisors get groups below `group`, None: there are no groups here."""
        self.control = control
        self.worker = worker
        self.group = group
        self.supervisors: set[int] = set()
        #: Supervisors that have ended, with what they ran perhaps still dying; those of them that have a group yet.
        self.ended: list[int] = []
        self.left_groups: set[int] = set()
        #: Forks of this process that end the pool of a dead worker.
        self.enders: set[int] = set()
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
            busy = self.supervisors or self.enders or strangers or self.pool
            if patience_until < math.inf and not busy:
                if self.group is not None:
                    self.group.remove()
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
        if pid in self.left_groups or pid in self.ended:  # the number is used again
            self.left_groups.discard(pid)
            self.ended.remove(pid)
        return pid, ours

    def become_supervisor(self, channel: socket.socket) -> NoReturn:
        code = 1
        try:
            self.control.close()
            os.close(self.wakeup)
            os.close(signal.set_wakeup_fd(-1))
            become_subreaper()  # a fork does not inherit it
            supervisor = Supervisor(channel, self.worker, self.group_of(os.getpid()), self.group)
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

    def group_of(self, supervisor: int) -> Group | None:
        """The group of a supervisor and what it runs."""
        if self.group is None:
            return None
        try:
            return Group(f"{self.group.path}/{supervisor}")
        except OSError:
            return None

    def watch(self, pid: int) -> None:
        for pidfd in [pidfd for pidfd in self.pool if is_readable(pidfd)]:
            os.close(pidfd)
            del self.pool[pidfd]
        with suppress(OSError):  # it has ended already
            pidfd = os.pidfd_open(pid)
            if parent(pid) == os.getppid():  # else it has ended, and the number is another's
                self.pool[pidfd] = pid
            else:
                os.close(pidfd)

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
            self.enders.add(fork)
        self.pool.clear()

    def tell_gone(self) -> None:
        with suppress(OSError):  # nobody reads: the worker does not wait for ever
            for pid in self.ended:
                self.control.send(ORDER.pack(GONE, pid), socket.MSG_DONTWAIT)
        self.ended.clear()

    def reap(self) -> bool:
        """Collect the dead, and kill what dead supervisors have left; true while some of that lives."""
        with suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                self.enders.discard(pid)
                if pid in self.supervisors:
                    self.supervisors.discard(pid)
                    self.ended.append(pid)
                    self.left_groups.add(pid)
        strangers = descendants(os.getpid(), except_for=self.supervisors | self.enders)
        # All get the signal. Those that may not be signalled are not waited for: nothing more can be done about them.
        left = [send_signal(pid, signal.SIGKILL) for pid in strangers].count(True)
        self.left_groups = {pid for pid in self.left_groups if not self.end_group(pid)}
        left += len(self.left_groups)
        if not left:
            self.tell_gone()
        return left > 0

    def end_group(self, supervisor: int) -> bool:
        """Kill what is in the group of a supervisor that has ended; true once it is empty and removed."""
        group = self.group_of(supervisor)
        if group is None:
            return True
        group.kill()
        return group.remove()


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
    group = None
    if home := sys.argv[4]:
        Group(home).end_left()
        with suppress(OSError):
            group = Group(f"{home}/{name_of(worker_pid)}")
    gc.freeze()  # a collection in a fork would touch, and so copy, all that it shares with the server
    Server(control, worker, group).serve()
