"""Why a task is not running: a sentence for every reason there is."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from aque.backfill import Busy
from aque.chooser import Place
from aque.explain import (
    Explanation,
    Limit,
    Link,
    Refusal,
    Situation,
    Subject,
    View,
    Worker,
    blame,
)
from aque.resources import Capacity
from aque.states import State
from aque.values import Condition, Pattern, ReadyTask, Requirement
from aque.words import lasting

NOW = 1_000_000.0  # 13:46:40 UTC
COMMAND = Requirement("celery", Pattern.SHELL)
PLACE = Place("node1", "linux", frozenset({"celery"}), Capacity(Fraction(4), 8 << 30, 2, 100))
TASK = Subject(
    id=1,
    name="render",
    state=State.READY,
    reason=None,
    pattern=Pattern.SHELL,
    class_id=1,
    rank=0,
    duration=0.0,
    unmet=0,
    attempt=0,
    job_id=1,
    submitter="ann",
    near_host="",
    exit_code=None,
    signal=None,
    ready_at=NOW - 60,
    started_at=None,
    finished_at=None,
    worker=None,
)


def busy(cpus: int, ends_in: float = float("inf"), slots: int = 0) -> Busy:
    return Busy(Capacity(Fraction(cpus), python_slots=slots), NOW + ends_in)


def worker(number: int = 1, running: Sequence[Busy] = (), avoids: Sequence[str] = (), **place: Any) -> Worker:
    return Worker(number, f"celery@node{number}", replace(PLACE, host=f"node{number}", **place), running, avoids)


def ready(task: Subject) -> ReadyTask:
    assert task.class_id is not None
    return ReadyTask(task.id, task.class_id, task.rank, task.duration, task.name, task.ready_at or 0.0, task.job_id)


def situation(
    *workers: Worker, task: Subject = TASK, wanted: Requirement = COMMAND, others: Sequence[Subject] = (), **given: Any
) -> Situation:
    """A farm on which `task`, of class 1, and `others` are ready."""
    rows: dict[int, list[ReadyTask]] = {}
    for one in sorted([task, *others], key=lambda t: (-t.rank, -t.duration, t.id)):
        assert one.class_id is not None
        rows.setdefault(one.class_id, []).append(ready(one))
    requirements = {1: wanted, **given.pop("requirements", {})}
    given.setdefault("subjects", {task.id: task})
    return Situation(NOW, workers, requirements, rows, **given)


def texts(explanation: Explanation) -> list[str]:
    return [reason.text for reason in explanation.reasons]


def only_view(at: Situation, task: Subject = TASK) -> View:
    (view,) = at.explain(task).workers
    return view


# -- what has ended, and what runs


def test_a_task_that_has_ended_says_how_and_when() -> None:
    task = replace(TASK, state=State.ERROR, reason="exit", exit_code=3, finished_at=NOW - 38)
    assert texts(Situation(NOW).explain(task)) == ["ended as error: exit 3 at 13:46:02 UTC, 38 s ago"]
    killed = replace(TASK, state=State.ERROR, reason="signal", signal=9, finished_at=NOW - 38)
    assert texts(Situation(NOW).explain(killed)) == ["ended as error: signal 9 at 13:46:02 UTC, 38 s ago"]


def link(downstream: int, upstream: int, state: State, **given: Any) -> Link:
    satisfied = given.pop("is_satisfied", state is State.SUCCESS)
    fields = {"reason": None, "exit_code": None, "signal": None, "duration": 0.0, "started_at": None, **given}
    condition = fields.pop("condition", Condition.OK)
    return Link(downstream, upstream, condition, satisfied, f"task{upstream}", state, **fields)


def test_a_skipped_task_says_which_dependency_made_it_so_and_what_failed_first() -> None:
    links = {
        1: [link(1, 2, State.SUCCESS), link(1, 3, State.SKIPPED, reason="dependency")],
        3: [link(3, 4, State.SKIPPED, reason="dependency")],
        4: [link(4, 5, State.SUCCESS), link(4, 6, State.ERROR, reason="exit", exit_code=7)],
    }
    chain = blame(1, links)
    assert [one.upstream for one in chain] == [3, 4, 6]
    task = replace(TASK, state=State.SKIPPED, reason="dependency", finished_at=NOW)
    explained = Situation(NOW).explain(task, links[1], chain)
    assert texts(explained)[1] == (
        "it needed task 3 (task3) to succeed, which ended as skipped: dependency; that began with task 6 (task6): error: exit 7"
    )
    assert [step["id"] for step in explained.reasons[1].facts["chain"]] == [3, 4, 6]


def test_a_task_that_waited_for_a_failure_says_so_when_there_was_none() -> None:
    chain = [link(1, 2, State.SUCCESS, condition=Condition.FAILED, is_satisfied=False)]
    task = replace(TASK, state=State.SKIPPED, reason="dependency", finished_at=NOW)
    assert "it needed task 2 (task2) to fail, which ended as success" in texts(
        Situation(NOW).explain(task, chain, chain)
    )


def test_a_running_task_says_where_since_when_and_when_it_should_end() -> None:
    task = replace(TASK, state=State.RUNNING, worker="celery@node1", started_at=NOW - 10, duration=60.0)
    assert texts(Situation(NOW).explain(task)) == [
        "running on celery@node1 since 13:46:30 UTC (10 s), expected to end at 13:47:30 UTC (in 50 s)"
    ]
    late = replace(task, duration=5.0)
    assert (
        "longer than the 5.0 s that were expected, expected to end any moment" in texts(Situation(NOW).explain(late))[0]
    )
    assert "its duration is not known" in texts(Situation(NOW).explain(replace(task, duration=0.0)))[0]


def test_a_claimed_task_waits_in_the_buffer_of_its_worker() -> None:
    task = replace(TASK, state=State.CLAIMED, worker="celery@node1")
    assert texts(Situation(NOW).explain(task)) == ["claimed on celery@node1, starts when a place there is free"]


# -- what cannot be claimed yet


def test_dependencies_left_are_counted_with_the_slowest_and_with_what_has_failed() -> None:
    links = [
        link(1, 2, State.SUCCESS),
        link(1, 3, State.RUNNING, duration=60.0, started_at=NOW - 10),
        link(1, 4, State.READY, duration=20.0),
        link(1, 5, State.PENDING),
        link(1, 6, State.ERROR, condition=Condition.ANY, is_satisfied=True),
    ]
    task = replace(TASK, state=State.PENDING, unmet=3)
    at = Situation(NOW)
    explained = at.explain(task, links)
    assert texts(explained) == [
        "waits for 3 of 5 tasks: 3, 4, 5; the slowest is task 3 (task3, running), expected to take 50 s more; without success "
        "has ended: task 6"
    ]
    facts = explained.reasons[0].facts
    assert (facts["left"], facts["of"], facts["ids"], facts["failed"], facts["slowest"]) == (3, 5, [3, 4, 5], [6], 3)
    assert at.why(task) == "waits for 3 tasks"


def test_a_task_that_waits_for_its_time_says_so() -> None:
    task = replace(TASK, state=State.PENDING, unmet=1, not_before=NOW + 60)
    at = Situation(NOW)
    assert at.why(task) == "waits for its time, 13:47:40 UTC"
    assert texts(at.explain(task)) == ["waits for its time, 13:47:40 UTC (in 60 s)"]
    assert at.why(replace(task, not_before=NOW + 3 * 86400)) == "waits for its time, 1970-01-15 13:46:40 UTC"
    assert at.why(replace(task, unmet=3)) == "waits for 2 tasks and its time, 13:47:40 UTC"
    explained = at.explain(replace(task, unmet=2), [link(1, 2, State.READY)])
    assert texts(explained) == ["waits for 1 of 1 task: 2", "waits for its time, 13:47:40 UTC (in 60 s)"]


def test_a_held_task_says_that_a_person_holds_it() -> None:
    task = replace(TASK, state=State.HELD)
    assert texts(Situation(NOW).explain(task)) == ["held: a person keeps it from starting"]
    assert Situation(NOW).why(task) == "held"


# -- what no worker can run


def test_without_a_live_worker_it_says_how_to_start_one() -> None:
    at = situation()
    assert texts(at.explain(TASK)) == ["no live worker: start one with `aque worker`"]
    assert at.why(TASK) == "no live worker"


def test_what_fits_nowhere_is_unsatisfiable_and_each_worker_says_why() -> None:
    at = situation(
        worker(1), worker(2, whole=replace(PLACE.whole, cpus=Fraction(16))), wanted=replace(COMMAND, cpus="64")
    )
    explained = at.explain(TASK)
    assert texts(explained) == ["unsatisfiable: needs 64 cpus, largest worker has 16"]
    assert [view.text for view in explained.workers] == ["needs 64 cpus, there are 4", "needs 64 cpus, there are 16"]
    assert {view.kind for view in explained.workers} == {"never"}
    assert at.why(TASK) == texts(explained)[0]


def test_a_worker_that_could_never_run_it_says_which_wish_it_cannot_fulfil() -> None:
    for wish, said in (
        ({"queue": "nuke"}, "queue 'nuke' is not served"),
        ({"host": "node2"}, "host node1 is not one of node2"),
        ({"platform": "darwin"}, "platform is linux, not darwin"),
        ({"tags": "gpu"}, "has no tag gpu"),
        ({"resources": "gpu=1"}, "needs 1 gpu, there are none"),
    ):
        assert only_view(situation(worker(), wanted=replace(COMMAND, **wish))).text == said


def test_a_worker_that_drains_says_so_and_the_farm_if_it_is_the_only_one() -> None:
    at = situation(worker(draining=True))
    assert only_view(at).kind == "draining"
    assert [reason.kind for reason in at.explain(TASK).reasons] == ["draining"]
    assert situation(worker(draining=True), worker(2)).explain(TASK).reasons[0].kind == "order"


def test_a_host_that_could_not_start_it_is_named_with_until_when_it_leaves_it_alone() -> None:
    message = "cannot enter /shots/a: No such file or directory"
    refusals = {1: [Refusal("node1", message)]}
    avoids = [f"task 1: {message} (until 13:47 UTC)"]
    at = situation(worker(avoids=avoids), worker(2, [busy(4)]), refusals=refusals)
    first, second = at.explain(TASK).workers
    assert (first.kind, first.text) == ("refused", f"its host could not start it: {message} (until 13:47 UTC)")
    assert second.kind == "no_room"
    assert at.why(TASK) == f"refused by node1: {message}"
    over = situation(worker(), refusals=refusals)  # it is tried again
    assert only_view(over).kind == "starts"


def test_a_host_that_leaves_the_whole_job_alone_says_that_others_of_it_could_not_start() -> None:
    at = situation(worker(avoids=["jobs 1, 7: no user ann (until 13:47 UTC)"]))
    assert only_view(at).text == "its host could not start others of it: no user ann (until 13:47 UTC)"
    others = situation(worker(avoids=["jobs 2, 3, 4, 5, 6 and 1 more: no user ann (until 13:47 UTC)"]))
    assert only_view(others).kind != "refused"


def test_a_worker_leaves_it_for_a_moment_to_the_host_that_made_its_input() -> None:
    task = replace(TASK, near_host="node2", ready_at=NOW - 1)
    wanted = replace(COMMAND, places=(b"/shots",))
    at = situation(worker(), worker(2), task=task, wanted=wanted, locality_wait_seconds=3.0)
    first, second = at.explain(task).workers
    assert first.text == "leaves it to node2, where its input was made, until at 13:46:42 UTC (in 2.0 s)"
    assert (first.expected_at, second.kind) == (NOW + 2, "starts")


# -- what is a matter of time


def test_a_full_worker_says_when_it_expects_room() -> None:
    at = situation(worker(running=[busy(2, 38.0), busy(1, 10.0)]), wanted=replace(COMMAND, cpus="3"))
    view = only_view(at)
    assert view.text == "needs 3 cpus, 1 is free: expects room at 13:47:18 UTC (in 38 s)"
    assert (view.kind, view.expected_at) == ("no_room", NOW + 38)
    late = only_view(situation(worker(running=[busy(4, 0.0)])))
    assert late.text == "needs 1 cpus, 0 are free: expects room any moment"
    unknown = only_view(situation(worker(running=[busy(4)])))
    assert (unknown.text, unknown.expected_at) == ("needs 1 cpus, 0 are free", None)


def test_a_function_waits_for_a_slot_of_the_pool() -> None:
    at = situation(
        worker(running=[busy(1, slots=1), busy(1, slots=1)]), wanted=replace(COMMAND, pattern=Pattern.PYTHON)
    )
    assert only_view(at).text == "no free Python slot"


def test_a_limit_is_named_with_who_holds_it() -> None:
    at = situation(worker(), wanted=replace(COMMAND, limits="nuke=2"), limits={"nuke": Limit(10, 1, (12, 13))})
    explained = at.explain(TASK)
    assert texts(explained)[0] == "limit nuke: needs 2, 1 of 10 free (held by tasks 12, 13)"
    assert explained.reasons[0].facts["holders"] == [12, 13]
    assert explained.workers[0].kind == "limit"
    assert at.why(TASK) == "limit nuke: 1 of 10 free"
    many = situation(
        worker(), wanted=replace(COMMAND, limits="nuke=1"), limits={"nuke": Limit(9, 0, tuple(range(20, 29)))}
    )
    assert "held by tasks 20, 21, 22, 23, 24 and 4 more" in texts(many.explain(TASK))[0]


def test_a_limit_that_was_lowered_below_what_a_task_wants_is_named_as_such() -> None:
    at = situation(worker(), wanted=replace(COMMAND, limits="nuke=2"), limits={"nuke": Limit(1, 1)})
    assert (
        at.why(TASK)
        == texts(at.explain(TASK))[0]
        == "limit nuke: needs 2, and is 1: until it is raised it cannot start"
    )


def test_the_limit_of_a_user_holds_for_all_tasks_of_that_user() -> None:
    at = situation(worker(), wanted=replace(COMMAND, user="ann"), limits={"user:ann": Limit(2, 0, (5, 6))})
    assert at.why(TASK) == "limit user:ann: 0 of 2 free"


def test_a_name_that_is_no_limit_bounds_nothing() -> None:
    assert only_view(situation(worker(), wanted=replace(COMMAND, limits="nuke=2"))).kind == "starts"


def test_limits_of_file_systems_that_are_used_up_are_named_for_tasks_with_files() -> None:
    full = {"io:nas:/shots": Limit(2, 0), "io:nas:/cache": Limit(2, 1), "nuke": Limit(1, 0)}
    at = situation(worker(), wanted=replace(COMMAND, places=(b"/shots",)), limits=full)
    assert texts(at.explain(TASK))[0] == "if its files are there, it waits for them: io:nas:/shots (0 of 2 free)"
    assert [reason.kind for reason in situation(worker(), limits=full).explain(TASK).reasons] == ["order"]


def test_the_worker_that_keeps_room_for_it_says_when_it_has_it() -> None:
    at = situation(worker(running=[busy(3, 38.0)]), wanted=replace(COMMAND, cpus="all"), kept={1: 1})
    explained = at.explain(TASK)
    assert texts(explained)[0] == (
        "worker celery@node1 keeps room for it, expects to have it at 13:47:18 UTC (in 38 s)"
    )
    assert [reason.kind for reason in explained.reasons] == ["room_kept"]
    assert at.why(TASK) == "celery@node1 keeps room for it"
    unknown = situation(worker(running=[busy(3)]), wanted=replace(COMMAND, cpus="all"), kept={1: 1})
    assert "cannot say when" in texts(unknown.explain(TASK))[0]


def test_room_that_is_kept_for_another_task_is_not_to_be_had() -> None:
    big = replace(TASK, id=9, class_id=2)
    at = situation(
        worker(running=[busy(3, 38.0)]),
        others=[big],
        requirements={2: replace(COMMAND, cpus="all")},
        kept={1: 9},
        subjects={1: TASK, 9: big},
    )
    view = only_view(at)
    text = "keeps room for task 9, which should start at 13:47:18 UTC (in 38 s)"
    assert (view.kind, view.text, view.expected_at) == ("room_kept", text, None)
    assert at.why(TASK) == "room is kept for task 9"
    short = replace(TASK, duration=30.0)  # it will have ended by then
    assert only_view(replace_task(at, short), short).kind == "starts"
    urgent = replace(TASK, rank=1)
    assert only_view(replace_task(at, urgent), urgent).kind == "starts"


def replace_task(at: Situation, task: Subject) -> Situation:
    assert task.class_id is not None
    rows = {**at.ready, task.class_id: [ready(task)]}
    return replace(at, ready=rows, subjects={**at.subjects, task.id: task})


def test_its_place_in_the_order_is_told_and_only_about_where_not_all_was_read() -> None:
    before = [replace(TASK, id=number, rank=1) for number in range(10, 16)]
    after = [replace(TASK, id=20)]
    at = situation(worker(), others=[*before, *after])
    explained = at.explain(TASK)
    assert texts(explained) == ["6 ready tasks go before it"]
    assert explained.workers[0].text == "has room, which those before it take"
    assert at.why(TASK) == "waits for its turn"
    assert texts(replace(at, cut={1}).explain(TASK)) == ["6 ready tasks go before it"]
    unread = replace(at, cut={1}, ready={1: [ready(task) for task in before]})
    assert texts(unread.explain(TASK)) == ["about 6 ready tasks go before it"]


def test_only_tasks_that_could_take_its_place_go_before_it() -> None:
    elsewhere = replace(TASK, id=5, class_id=2, rank=9)
    at = situation(worker(), worker(2), wanted=replace(COMMAND, host="node1"), others=[elsewhere],
                   requirements={2: replace(COMMAND, host="node2")})  # fmt: skip
    assert texts(at.explain(TASK)) == ["no ready task goes before it"]


def test_of_equal_priority_who_has_fewer_cpus_running_goes_first() -> None:
    other = replace(TASK, id=5, class_id=2)
    at = situation(
        worker(running=[busy(4, 10.0)]),
        wanted=replace(COMMAND, user="ann"),
        others=[other],
        requirements={2: replace(COMMAND, user="bob")},
        usage={"ann": Fraction(4)},
    )
    assert texts(at.explain(TASK)) == ["about 1 ready task goes before it"]
    assert texts(replace(at, usage=None).explain(TASK)) == ["no ready task goes before it"]


def test_a_task_that_has_room_and_nothing_before_it_is_next() -> None:
    assert only_view(situation(worker())).text == "has room: it is next"
    second = situation(worker(), others=[replace(TASK, id=5, rank=1)])
    assert only_view(second).text == "has room for it and those before it"


# -- jobs


def test_a_job_is_its_members_by_reason_with_the_slowest() -> None:
    running = replace(TASK, id=5, state=State.RUNNING, started_at=NOW - 10, duration=60.0)
    members = [
        *(replace(TASK, id=number, state=State.SUCCESS, finished_at=NOW) for number in (2, 3, 4)),
        running,
        replace(TASK, id=6, state=State.ERROR, reason="exit", exit_code=1, finished_at=NOW),
        TASK,
    ]
    job = replace(TASK, id=9, state=State.PENDING, pattern=Pattern.GROUP, class_id=None, unmet=3)
    explained = situation(worker()).explain_job(job, members)
    assert texts(explained) == [
        "3 tasks: success (2, 3, 4)",
        "1 task: error: exit 1 (6)",
        "1 task: running (5)",
        "1 task: waits for its turn (1)",
        "the slowest is task 5 (render, running), expected to take 50 s more",
    ]


def test_lengths_of_time_have_the_unit_that_fits() -> None:
    found = [lasting(seconds) for seconds in (-1, 0.44, 9.6, 38, 600, 9000, 400_000)]
    assert found == ["0.0 s", "0.4 s", "9.6 s", "38 s", "10 min", "2.5 h", "4.63 d"]
