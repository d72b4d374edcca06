"""Captured output as readers see it: piece by piece, with gaps, of many tasks in one query."""

import pytest
from farm import after, claim, finish, ids, outcome, submit, worker

from aque import settings
from aque.cli import captured
from aque.cli.farm import Farm
from aque.errors import UnknownTask
from aque.states import State
from aque.store import Store
from tests.store.statements import counted

Piece = tuple[int, int, int, int, bytes]


def wrote(store: Store, *pieces: Piece) -> None:
    with store.begin() as connection:
        store.append_output(connection, pieces)


def running(store: Store, count: int) -> list[int]:
    new = ids(store, count)
    submit(store, [after(i) for i in new])
    claim(store, new, worker(store))
    return new


def test_a_cut_in_the_middle_of_a_stream_stops_no_reader(store: Store) -> None:
    (task,) = running(store, 1)
    farm = Farm(settings.load({}), store)
    tail = captured.Tail(farm, [task])
    wrote(store, (task, 1, 1, 0, b"head\n"), (task, 1, 1, 5, b"[cut]\n"))
    assert b"".join(data for _, data in tail.read()) == b"head\n[cut]\n"
    wrote(store, (task, 1, 1, 1_000_000, b"tail\n"))
    assert list(tail.read()) == [((task, 1, 1), b"tail\n")]
    assert list(tail.read()) == []
    assert b"".join(captured.pieces(farm, task, 1, 1)) == b"head\n[cut]\ntail\n"


def test_many_streams_are_read_in_one_query_and_none_waits_for_another_s_flood(store: Store) -> None:
    new = running(store, 30)
    flood = [(new[0], 1, 1, n, b"x") for n in range(500)]
    wrote(store, *flood, *[(task, 1, fd, 0, b"y") for task in new[1:] for fd in (1, 2)])
    streams = {(task, 1, fd): -1 for task in new for fd in (1, 2)}
    with store.connect() as connection, counted(store) as statements:
        found = store.output_after(connection, streams)
    assert len(statements) == 1
    assert {task for (task, _, _), _, _ in found} == set(new)
    assert [at for (task, _, _), at, _ in found if task == new[0]] == [0, 1, 2, 3]


def test_a_look_at_all_followed_tasks_costs_two_queries_when_nothing_is_new(store: Store) -> None:
    tail = captured.Tail(Farm(settings.load({}), store), running(store, 200))
    assert list(tail.read()) == []
    with counted(store) as statements:
        assert list(tail.read()) == []
    assert len(statements) <= 3


def test_a_tail_goes_from_one_attempt_to_the_next_and_forgets_what_is_dropped(store: Store) -> None:
    first, second = running(store, 2)
    tail = captured.Tail(Farm(settings.load({}), store), [first, second])
    wrote(store, (first, 1, 1, 0, b"a"), (second, 1, 2, 0, b"b"))
    assert sorted(tail.read()) == [((first, 1, 1), b"a"), ((second, 1, 2), b"b")]
    with store.connect() as connection:
        claims = dict(store.claims_of(connection, store.live_workers(connection)[0].info.id))
    wrote(store, (first, 1, 1, 1, b"A"))
    with store.begin() as connection:
        store.give_back(connection, [(first, claims[first])])
    (again,) = claim(store, [first], worker(store, "other"))
    wrote(store, (first, 2, 1, 0, b"c"))
    assert list(tail.read()) == [((first, 1, 1), b"A"), ((first, 2, 1), b"c")]
    finish(store, outcome(again, State.SUCCESS))
    tail.drop([first])
    wrote(store, (second, 1, 2, 1, b"d"))
    assert list(tail.read()) == [((second, 1, 2), b"d")]


def test_a_task_that_is_not_there_is_named(store: Store) -> None:
    tail = captured.Tail(Farm(settings.load({}), store), [999_999])
    with pytest.raises(UnknownTask, match="999999"):
        list(tail.read())


def test_tagged_lines_are_whole_and_a_last_part_keeps_its_bytes(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    printer = captured.TaggedPrinter({1: 1, 2: 2})
    for stream, data in [
        ((1, 1, 1), b"a"),
        ((2, 1, 1), b"b\nc"),
        ((1, 1, 1), b"A\n"),
        ((1, 1, 2), b"e\n"),
        ((2, 2, 1), b"d\n"),  # another attempt: what the one before left is not part of its line
        ((1, 1, 1), b"\n\xff"),
    ]:
        printer.write(stream, data)
    printer.end(1)
    printer.end(2)
    out, err = capfdbinary.readouterr()
    assert out == b"2\tb\n1\taA\n2\tc\n2\td\n1\t\n1\t\xff"
    assert err == b"1\te\n"
