"""What a scheduler has to write: nothing is lost, nothing is written twice, and output does not hold up the rest."""

from aque.batch import OUTPUT_BYTES, OUTPUT_LIMIT_BYTES, OUTPUT_SECONDS, Batch, Unwritten
from aque.states import Reason, State
from aque.values import Outcome

NOW = 1000.0


def success(task: int) -> Outcome:
    return Outcome(task, 1, task + 100, State.SUCCESS)


def piece(task: int, offset: int = 0, size: int = 1) -> tuple[int, int, int, int, bytes]:
    return (task, 1, 1, offset, b"x" * size)


def test_nothing_to_write_is_false_and_each_kind_of_thing_is_not() -> None:
    assert not Batch()
    claim = (1, 101)
    for batch in (
        Batch(outcomes=[success(1)]),
        Batch(started=[(1, 101, NOW)]),
        Batch(output=[piece(1)]),
        Batch(blocked={claim: True}),
        Batch(told={claim: ("PROGRESS", b"1")}),
        Batch(returned=[claim]),
    ):
        assert batch


def test_one_success_for_which_nothing_waits_is_alone_and_with_anything_else_it_is_not() -> None:
    assert Batch(outcomes=[success(1)], lone={1}).is_lone_success()
    assert not Batch(outcomes=[success(1)]).is_lone_success()
    assert not Batch(outcomes=[success(1), success(2)], lone={1, 2}).is_lone_success()
    assert not Batch(outcomes=[success(1)], lone={1}, output=[piece(1)]).is_lone_success()
    assert not Batch(outcomes=[success(1)], lone={1}, returned=[(2, 102)]).is_lone_success()
    lost = Outcome(1, 1, 101, State.ERROR, Reason.EXCEPTION)
    assert not Batch(outcomes=[lost], lone={1}).is_lone_success()


def test_output_waits_until_it_is_due_and_the_rest_does_not() -> None:
    unwritten = Unwritten()
    assert unwritten.output_due_at is None
    assert unwritten.add_output(piece(1), NOW)
    assert not unwritten.add_output(piece(1, 1), NOW + 0.1)
    assert unwritten.output_due_at == NOW + OUTPUT_SECONDS
    unwritten.batch.started.append((2, 102, NOW))
    taken = unwritten.take(NOW + 0.1, all_output=False)
    assert (taken.output, taken.started) == ([], [(2, 102, NOW)])
    unwritten.written()
    assert unwritten.take(NOW + OUTPUT_SECONDS, all_output=False).output == [piece(1), piece(1, 1)]
    assert unwritten.output_due_at is None


def test_output_of_what_has_ended_goes_with_its_outcome_and_so_does_its_start() -> None:
    unwritten = Unwritten()
    for task in (1, 2, 3):
        unwritten.add_output(piece(task), NOW)
        unwritten.batch.started.append((task, task + 100, NOW))
        unwritten.batch.blocked[task, task + 100] = False
    unwritten.batch.outcomes.append(success(1))
    unwritten.batch.returned.append((2, 102))
    taken = unwritten.take(NOW, all_output=False)
    assert taken.output == [piece(1), piece(2)]
    assert taken.started == [(3, 103, NOW)]  # of the others the end says it
    assert taken.blocked == {(3, 103): False}
    assert unwritten.batch.output == [piece(3)]


def test_of_much_output_a_transaction_gets_a_bounded_part_and_who_writes_more_has_to_wait() -> None:
    unwritten, size = Unwritten(), OUTPUT_BYTES // 2
    count = OUTPUT_LIMIT_BYTES // size + 1
    assert [unwritten.add_output(piece(1, n * size, size), NOW) for n in range(count)][:4] == [True, False, True, True]
    assert unwritten.is_flooded
    written: list[int] = []
    while taken := unwritten.take(NOW, all_output=True).output:
        assert len(taken) <= 2
        written += [offset for _, _, _, offset, _ in taken]
        unwritten.written()
    assert written == [n * size for n in range(count)]
    assert not unwritten.is_flooded


def test_what_could_not_be_written_is_written_before_what_has_come_since() -> None:
    unwritten = Unwritten()
    unwritten.batch.outcomes.append(success(1))
    unwritten.add_output(piece(1), NOW)
    unwritten.take(NOW, all_output=True)
    unwritten.batch.outcomes.append(success(2))
    unwritten.add_output(piece(2), NOW + 1)
    unwritten.failed(NOW + 2)
    assert unwritten.output_due_at == NOW + 1 + OUTPUT_SECONDS
    taken = unwritten.take(NOW + 2, all_output=True)
    assert [outcome.id for outcome in taken.outcomes] == [1, 2]
    assert taken.output == [piece(1), piece(2)]
    unwritten.written()
    unwritten.failed(NOW + 3)  # what is in the table does not come back
    assert not unwritten.take(NOW + 3, all_output=True)
    unwritten.add_output(piece(3), NOW + 4)
    unwritten.take(NOW + 4, all_output=True)
    unwritten.failed(NOW + 5)
    assert unwritten.output_due_at == NOW + 5 + OUTPUT_SECONDS


def test_another_image_of_the_process_goes_on_with_what_is_left() -> None:
    unwritten = Unwritten()
    unwritten.adopt(Batch(outcomes=[success(1)], output=[piece(1)]), NOW)
    assert unwritten.output_due_at == NOW + OUTPUT_SECONDS
    assert unwritten.take(NOW, all_output=False).output == [piece(1)]
