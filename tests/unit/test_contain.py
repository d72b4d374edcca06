"""What a pool child leaves behind after an attempt, and what comes to a worker whose children die.

Each test runs in an interpreter of its own: what it tests makes a process a subreaper for good.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMON = """
import os, signal, subprocess, sys, threading, time
from aque import contain
from aque.processes import descendants, is_over

def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)

def sleeper():
    return subprocess.Popen(["sleep", "1000"]).pid

TREE = '''
sleep 1000 &
setsid sleep 1000 &
env -i /bin/sleep 1000 &
(trap "" TERM; exec sleep 1000) &
(setsid sh -c "sleep 1000 & exit" &)
'''
# A fork of the shell that is not sleep yet would drop a TERM; and sleep may get its TERM, and end, before the shell gets one.
STAYS = '''
trap "echo tidied; exit" TERM; sleep 1000 &
until read name </proc/$!/comm && [ $name = sleep ]; do :; done; echo; while :; do wait; done
'''
"""


def run(code: str) -> str:
    """What the code prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMON + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# -- in a child of the pool -----------------------------------------------------------------------------------------------


def test_nothing_of_an_attempt_is_left_and_what_was_there_before_is() -> None:
    shown = run(
        """
        contain.enter()
        old = sleeper()
        before = contain.present()
        subprocess.run(["sh", "-c", TREE])
        wait_until(lambda: len(descendants(os.getpid())) >= 6)
        contain.leave_nothing(before)
        print(descendants(os.getpid()) == [old], is_over(old))
        os.kill(old, signal.SIGKILL)
        """
    )
    assert shown == "True False"


def test_what_an_old_process_starts_during_an_attempt_belongs_to_the_attempt() -> None:
    shown = run(
        """
        contain.enter()
        old = subprocess.Popen(["sh", "-c", "read line; sleep 1000 & read line"], stdin=subprocess.PIPE)
        before = contain.present()
        old.stdin.write(b"go\\n")
        old.stdin.flush()
        wait_until(lambda: len(descendants(os.getpid())) == 2)
        contain.leave_nothing(before)
        print([pid for pid in descendants(os.getpid()) if not is_over(pid)] == [old.pid])
        old.kill()
        """
    )
    assert shown == "True"


def test_a_grace_lets_processes_end_by_themselves_and_ends_early_when_they_have() -> None:
    shown = run(
        """
        contain.enter()
        before = contain.present()
        tidy = subprocess.Popen(["sh", "-c", STAYS], stdout=subprocess.PIPE)
        tidy.stdout.readline()
        began = time.monotonic()
        for pid in contain.present():
            os.kill(pid, signal.SIGTERM)
        contain.leave_nothing(before, 100.0)
        print(tidy.stdout.read().decode().strip(), time.monotonic() - began < 90, descendants(os.getpid()))
        """
    )
    assert shown == "tidied True []"


def test_a_soft_time_limit_does_not_interrupt_the_killing() -> None:
    shown = run(
        """
        def limit(number, frame):
            raise RuntimeError("the soft time limit")

        signal.signal(signal.SIGUSR1, limit)
        contain.enter()
        before = contain.present()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; kill -USR1 $PPID; sleep 1000"])
        wait_until(lambda: signal.SIGUSR1 in signal.sigpending())
        contain.leave_nothing(before)
        print(descendants(os.getpid()), signal.sigpending())
        """
    )
    assert shown == "[] set()"


def test_outside_of_a_pool_child_nothing_is_killed() -> None:
    shown = run(
        """
        before = contain.present()
        mine = sleeper()
        contain.leave_nothing(before)
        print(is_over(mine))
        os.kill(mine, signal.SIGKILL)
        """
    )
    assert shown == "False"


# -- in the worker --------------------------------------------------------------------------------------------------------

#: A worker with a process of its own, a supervisor, and a pool child with a tree.
WORKER = """
own, other = sleeper(), sleeper()
strangers = contain.Strangers(lambda: [other])
child = os.fork()
if not child:
    contain.enter()
    subprocess.run(["sh", "-c", TREE + "wait; wait"])
strangers.watch(child)
strangers.look()
wait_until(lambda: len(descendants(child)) >= 6)
tree = descendants(child)

def end():
    for pid in (own, other):
        os.kill(pid, signal.SIGKILL)
"""


def test_what_a_pool_child_that_died_has_left_is_killed_and_nothing_else() -> None:
    shown = run(
        WORKER
        + textwrap.dedent(
            """
            os.kill(child, signal.SIGKILL)
            contain.wait(child)
            strangers.end()
            print(all(map(is_over, tree)), is_over(own), is_over(other), os.waitpid(child, 0)[0] == child)
            print(sorted(descendants(os.getpid())) == sorted([own, other]))  # no zombie is left either
            end()
            """
        )
    )
    assert shown == "True False False True\nTrue"


def test_orphans_are_found_by_the_next_look_and_never_taken_for_the_workers_own() -> None:
    shown = run(
        WORKER
        + textwrap.dedent(
            """
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # as the pool does, before anybody has looked
            def gone():
                strangers.look()
                return all(map(is_over, tree))
            wait_until(gone)
            print(is_over(own), is_over(other))
            end()
            """
        )
    )
    assert shown == "False False"


def test_a_process_that_another_thread_of_the_worker_has_started_is_no_stranger() -> None:
    shown = run(
        WORKER
        + textwrap.dedent(
            """
            started, gate = [], threading.Event()
            thread = threading.Thread(target=lambda: (started.append(sleeper()), gate.wait()))
            thread.start()
            wait_until(lambda: started)
            os.kill(child, signal.SIGKILL)
            contain.wait(child)
            strangers.end()
            print(all(map(is_over, tree)), is_over(started[0]))
            os.kill(started[0], signal.SIGKILL)
            gate.set()
            end()
            """
        )
    )
    assert shown == "True False"


def test_a_stopped_child_is_ended_with_a_tree_that_keeps_forking() -> None:
    shown = run(
        """
        strangers = contain.Strangers(lambda: [])
        child = os.fork()
        if not child:
            contain.enter()
            subprocess.run(["sh", "-c", "while :; do sleep 1000 & setsid sh -c 'sleep 1000 &' & sleep 0.01; done"])
        strangers.watch(child)
        wait_until(lambda: len(descendants(child)) > 30)
        contain.end_below(child)
        print([pid for pid in descendants(child) if not is_over(pid)], is_over(child))
        os.kill(child, signal.SIGKILL)
        contain.wait(child)
        strangers.end()
        os.waitpid(child, 0)
        print(descendants(os.getpid()))
        """
    )
    assert shown == "[] False\n[]"
