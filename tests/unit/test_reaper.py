"""Whom to reap, and which workers a reboot has ended."""

import pytest

from aque.machine import host_id, parts
from aque.reaper import is_of_earlier_boot, may_reap
from aque.store import WorkerRow
from aque.values import WorkerInfo

UP_SECONDS = 100.0


def row(
    boot_id: str = "old pid:[1] machine", host: str = "here", *, unseen: float = 200.0, state: str = "live"
) -> WorkerRow:
    info = WorkerInfo(
        1, "one@here", host, 10, 0.0, boot_id, "2", 1, 1, 1, ("celery",), "linux", "0", 30.0, "", False, "subreaper"
    )
    return WorkerRow(info, state, 0.0, 0.0, 0.0, unseen - 30.0, unseen, False)


def is_gone(found: WorkerRow, host_id: str = "new pid:[1] machine") -> bool:
    return is_of_earlier_boot(found, "here", host_id, UP_SECONDS)


def test_a_worker_of_this_machine_that_was_last_seen_before_it_was_booted_is_gone() -> None:
    assert is_gone(row())


def test_a_worker_that_was_seen_since_this_boot_runs_on_a_copy_of_this_machine() -> None:
    assert not is_gone(row(unseen=UP_SECONDS - 1))


@pytest.mark.parametrize(
    "found",
    [
        row("new pid:[1] machine"),
        row("new pid:[2] machine"),
        row("old pid:[1] another"),
        row("old pid:[1] "),
        row("old"),
        row(host="elsewhere"),
    ],
    ids=["this boot", "another container", "another machine", "no machine id", "an old row", "another name"],
)
def test_other_workers_are_not(found: WorkerRow) -> None:
    assert not is_gone(found)


def test_without_a_machine_id_nothing_is_known_of_earlier_boots() -> None:
    assert not is_gone(row("old pid:[1] "), "new pid:[1] ")


def test_this_process_has_a_boot_and_a_pid_namespace() -> None:
    boot, namespace, _ = parts(host_id())
    assert boot
    assert namespace.startswith("pid:")


def test_a_worker_that_lives_here_keeps_its_tasks_however_late_it_is() -> None:
    assert not may_reap(row(), 2, is_here=True, is_alive=True)
    assert may_reap(row(), 2, is_here=True, is_alive=False)
    assert may_reap(row(), 2, is_here=False, is_alive=False)
    assert not may_reap(row(unseen=1.0), 2, is_here=False, is_alive=False)  # its lease holds
    assert not may_reap(row(), 1, is_here=True, is_alive=False)  # itself
