"""A command runner that is exported in the middle of its work, and the one that goes on with it, here without an exec."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from aque.commands import CommandRunner, Running
from aque.supervised import Command, Ended
from tests.servers import wait_until

LIMIT = 30.0


class Heard:
    """What one command's callbacks were told, by both runners."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.pieces: list[tuple[int, int, bytes]] = []
        self.ends: list[Ended] = []

    @property
    def callbacks(self):
        return self.pids.append, lambda *piece: self.pieces.append(piece), self.ends.append

    def wait(self) -> Ended:
        wait_until(lambda: self.ends, LIMIT, "it has ended")
        return self.ends[0]

    def output(self, fd: int = 1) -> bytes:
        """In order, without gaps and without anything twice."""
        data = b""
        for stream, offset, piece in self.pieces:
            if stream == fd:
                assert offset == len(data)
                data += piece
        return data


class Relay:
    """A command runner that is replaced by another one as at an exec."""

    def __init__(self) -> None:
        self.runner = CommandRunner()
        self.runner.start()
        self.running: dict[int, Running] = {}
        self.heard: dict[int, Heard] = {}

    def run(self, *argv: str | Path, stdin: bytes | None = None, cwd: Path = Path("/")) -> Heard:
        key, heard = len(self.heard), Heard()
        command = Command(
            tuple(os.fsencode(word) for word in argv),
            {b"PATH": os.environb[b"PATH"]},
            os.fsencode(cwd),
            stdin,
            output_limit_bytes=1 << 30,
        )
        self.heard[key] = heard
        self.running[key] = self.runner.run(command, *heard.callbacks)
        return heard

    def replace(self) -> None:
        old = self.runner
        old.freeze()
        exported = old.export({running: key for key, running in self.running.items() if not self.heard[key].ends})
        for channel in old._channels:
            channel.sock.detach()  # an exec closes no descriptor that stays, and no finalizer runs
        if old._control is not None:
            old._control.detach()
        if old._server is not None:
            old._server.returncode = 0  # type: ignore[union-attr]  # nor does one of Popen
        self.runner = CommandRunner()
        callbacks = {key: heard.callbacks for key, heard in self.heard.items()}
        self.running = self.runner.adopt(exported, callbacks)


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    assert made.runner.stop()


@pytest.mark.parametrize("size", [0, 10, 1 << 20, 20 << 20])
def test_input_and_output_are_whole_across_any_number_of_replacements(relay: Relay, size: int) -> None:
    data = os.urandom(size)
    heard = relay.run("cat", stdin=data)
    for _ in range(20):
        relay.replace()
        if heard.ends:
            break
    assert heard.wait().exit_code == 0
    assert (heard.output(), len(heard.pids)) == (data, 1)


def test_a_command_that_waits_for_its_supervisor_starts_after_the_replacement(relay: Relay, tmp_path: Path) -> None:
    many = [relay.run("sh", "-c", 'echo "$0"', str(n)) for n in range(20)]
    relay.replace()
    assert [heard.wait().exit_code for heard in many] == [0] * 20
    assert [heard.output() for heard in many] == [b"%d\n" % n for n in range(20)]
    assert {len(heard.pids) for heard in many} == {1}


def test_a_command_that_was_taken_over_is_signalled_and_killed(relay: Relay) -> None:
    heard = relay.run("sh", "-c", "trap 'echo caught' USR1; echo on; while :; do sleep 0.01; done")
    wait_until(lambda: heard.output() == b"on\n", LIMIT, "it runs")
    relay.replace()
    relay.running[0].signal(signal.SIGUSR1)
    wait_until(lambda: heard.output() == b"on\ncaught\n", LIMIT, "it has caught it")
    relay.running[0].kill(signal.SIGKILL, 0)
    assert (heard.wait().reason, heard.wait().signal) == ("killed", signal.SIGKILL)


def test_supervisors_that_were_idle_run_the_next_commands(relay: Relay) -> None:
    relay.run("true").wait()
    wait_until(lambda: len(relay.runner._idle) == 2, LIMIT, "they are idle")
    idle = {channel.pid for channel in relay.runner._idle}
    relay.replace()
    assert {channel.pid for channel in relay.runner._idle} == idle
    heard = relay.run("sh", "-c", "echo $PPID")
    heard.wait()
    assert int(heard.output()) in idle


def test_a_server_that_was_taken_over_and_dies_is_replaced(relay: Relay) -> None:
    relay.run("true").wait()
    relay.replace()
    server = relay.runner._server
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    many = [relay.run("true") for _ in range(5)]
    assert [heard.wait().exit_code for heard in many] == [0] * 5
    wait_until(lambda: not Path(f"/proc/{server.pid}").exists(), LIMIT, "the old one has been reaped")


def test_a_replacement_while_there_is_no_server_starts_one_for_who_waits(relay: Relay) -> None:
    server = relay.runner._server
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: relay.runner._control is None, LIMIT, "its end is seen")
    relay.replace()
    assert relay.run("true").wait().exit_code == 0
