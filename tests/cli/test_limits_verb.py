"""`aque limits`, and what submissions say of limits."""

import getpass
import json
from pathlib import Path

import pytest

from aque import settings
from aque.states import State
from aque.store import open_store
from tests.store import farm


def claimed(url: str, limits: dict[int, dict[str, int]]) -> None:
    """Let a worker have these tasks, with these limits."""
    store = open_store(settings.load({"AQUE_BROKER": url}))
    worker_id = farm.worker(store)
    with store.begin() as connection:
        assert len(store.claim(connection, list(limits), worker_id, 7, State.RUNNING, limits=limits)) == len(limits)
    store.close()


def test_without_limits_it_says_how_to_make_one(aque):
    done = aque("limits")
    assert done.status == 0 and "`aque limits set NAME N`" in done.out
    assert aque("limits", "--json").out == ""


def test_limits_are_listed_with_who_holds_them_and_how_many_wait(aque):
    assert aque("limits", "set", "nuke", "10").out == "nuke is 10; 0 tokens in use, 0 ready tasks waiting\n"
    assert aque("limits", "set", "disk", "1").status == 0
    ids = [aque.submit("--limit", "nuke", "--limit", "disk=1", "--", "true") for _ in range(8)]
    file = Path(aque.environment["AQUE_STATE_DIR"]) / "aque.db"
    claimed(f"sqlite:///{file}", {i: {"nuke": 1} for i in ids[:6]} | {ids[6]: {"disk": 1}})
    assert [json.loads(line) for line in aque("limits", "--json").out.splitlines()] == [
        {"name": "disk", "capacity": 1, "used": 1, "waiting": 1, "holders": [ids[6]]},
        {"name": "nuke", "capacity": 10, "used": 6, "waiting": 1, "holders": ids[:6]},
    ]
    header, disk, nuke = (line.split() for line in aque("limits").out.splitlines())
    assert header == ["name", "capacity", "used", "waiting", "holders"]
    assert disk == ["disk", "1", "1", "1", str(ids[6])]
    assert nuke[:5] == ["nuke", "10", "6", "1", f"{ids[0]},"] and nuke[-3:] == ["and", "1", "more"]
    assert "6 tokens in use" in aque("limits", "set", "nuke", "3").out


def test_a_removed_limit_is_gone(aque):
    aque("limits", "set", "nuke", "10")
    assert aque("limits", "rm", "nuke").out == "nuke is no limit any more\n"
    done = aque("limits", "rm", "nuke")
    assert done.status == 2 and "there is no limit 'nuke'. Nothing was changed" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["set", "nuke", "many"], "'many' is not a valid integer"),
        (["set", "nuke", "10001"], "a limit is a whole number from 0 to 10000, not 10001"),
        (["set", "a b", "1"], "a limit's name is"),
        (["set", "nuke"], "missing argument 'N'"),
        (["list"], "no such command 'list'"),
    ],
)
def test_mistakes_are_a_sentence_and_exit_2(aque, words, said):
    done = aque("limits", *words)
    assert done.status == 2 and said in done.err and done.err.count("\n") == 1
    assert aque("limits", "--json").out == ""


def test_a_submission_that_asks_for_a_limit_that_there_is_not_is_refused(aque):
    done = aque("submit", "--limit", "nuke", "--", "true")
    assert done.status == 2
    assert "there is no limit 'nuke'. Nothing was submitted: `aque limits set nuke N` makes it" in done.err
    assert aque("status", "--json").out == ""


def test_a_submission_that_asks_for_more_than_a_limit_has_is_refused(aque):
    aque("limits", "set", "nuke", "2")
    done = aque("submit", "--limit", "nuke=3", "--", "true")
    assert done.status == 2 and "`aque limits set nuke 3`" in done.err
    assert aque("status", "--json").out == ""
    aque.submit("--limit", "nuke=2", "--", "true")


def test_in_a_shared_store_only_administrators_change_limits(aque, fresh_postgresql_url):
    shared = {"AQUE_BROKER": fresh_postgresql_url}
    assert aque("init", env=shared).status == 0
    me = getpass.getuser()
    assert aque("limits", "set", "nuke", "2", env=shared | {"AQUE_ADMINISTRATORS": f"boss,{me}"}).status == 0
    for words in (["set", "nuke", "3"], ["rm", "nuke"]):
        done = aque("limits", *words, env=shared | {"AQUE_ADMINISTRATORS": "boss"})
        assert done.status == 2 and f"{me} is none. Nothing was changed" in done.err
    done = aque("limits", "--json", env=shared | {"AQUE_ADMINISTRATORS": "boss"})
    assert json.loads(done.out)["capacity"] == 2
