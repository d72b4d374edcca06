"""`aque events`, and the switch of `aque init`."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from aque import control, settings
from aque.store import open_store
from tests.cli.conftest import Aque
from tests.servers import wait_until
from tests.store import farm


def lines(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def cancelled(aque: Aque, name: str) -> int:
    """A task that has an event although no worker is there."""
    file = Path(aque.environment["AQUE_STATE_DIR"]) / "aque.db"
    store = open_store(settings.load({"AQUE_STATE_DIR": str(file.parent)}))
    (task_id,) = farm.ids(store, 1)
    farm.submit(store, [replace(farm.SPEC, id=task_id, name=name)])
    control.kill(store, [task_id], signal.SIGTERM)
    store.close()
    return task_id


def test_what_has_happened_is_printed_oldest_first(aque: Aque) -> None:
    assert aque("events").out == ""
    first, second = cancelled(aque, "a\x1bb"), cancelled(aque, "second")
    shown = aque("events").out.splitlines()
    assert [line.split()[1:] for line in shown] == [
        ["task.cancelled", str(first), "a\\x1bb", "request"],
        ["task.cancelled", str(second), "second", "request"],
    ]
    assert aque("events", "--limit", "1", "task.cancelled").out.splitlines() == shown[1:]
    assert aque("events", "task.success").out == ""


def test_json_has_a_line_for_each_event(aque: Aque) -> None:
    task_id = cancelled(aque, "x")
    (event,) = lines(aque("events", "--json").out)
    assert event.pop("at").endswith("Z")  # type: ignore[attr-defined]
    assert event == {
        "kind": "task.cancelled",
        "task_id": task_id,
        "job_id": task_id,
        "name": "x",
        "state": "cancelled",
        "reason": "request",
        "attempt": 0,
        "worker_id": None,
        "seq": 1,
    }


def test_a_cursor_shows_each_event_once(aque: Aque) -> None:
    cancelled(aque, "before")
    assert aque("events", "--cursor", "nightly").out == ""  # made now: what was before is not for it
    after = cancelled(aque, "after")
    (entry,) = lines(aque("events", "--cursors", "--json").out)
    assert (entry["name"], entry["behind"], entry["holder"]) == ("nightly", 1, None)
    assert [e["task_id"] for e in lines(aque("events", "--cursor", "nightly", "--json").out)] == [after]
    assert aque("events", "--cursor", "nightly").out == ""
    assert aque("events", "--cursors").out.splitlines()[1].split() == ["nightly", "2", "0", "no"]
    assert "0 transitions had not been seen" in aque("events", "--remove-cursor", "nightly").out
    assert "there are no cursors" in aque("events", "--cursors").out


@pytest.fixture
def follower(aque: Aque) -> Iterator[object]:
    process = aque.start("events", "--follow", "--json", "--cursor", "follower")
    yield process
    process.kill()
    process.communicate()


def test_follow_goes_on_with_what_happens(aque: Aque, follower) -> None:
    wait_until(lambda: "follower" in aque("events", "--cursors", "--json").out, what="it listens")
    task_id = cancelled(aque, "x")
    assert json.loads(follower.stdout.readline())["task_id"] == task_id


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.finished"], "there is no event 'task.finished'; there are: task.cancelled"),
        (["--cursor", ""], "--cursor begins where the cursor"),
        (["--remove-cursor", "none"], "there is no cursor 'none'. Nothing was removed"),
    ],
)
def test_mistakes_are_a_sentence_and_exit_2(aque: Aque, words: list[str], said: str) -> None:
    done = aque("events", *words)
    assert done.status == 2 and said in done.err and done.err.count("\n") == 1


def test_a_farm_that_records_nothing_says_so(aque: Aque) -> None:
    assert aque("init", "--no-events").out.splitlines()[-1] == "what happens to tasks is not recorded"
    assert "as before" in aque("init", "--no-events").out
    cancelled(aque, "x")
    done = aque("events")
    assert done.status == 69 and "`aque init --events`" in done.err
    assert aque("init", "--events").out.splitlines()[-1] == "what happens to tasks is recorded"
    task_id = cancelled(aque, "y")
    gap, event = lines(aque("events", "--json").out)
    assert gap["kind"] == "task.gap" and event["task_id"] == task_id
