"""`aque set`: change what waits, all of it or nothing."""

import json

import pytest


def row(aque, task_id, *fields):
    (line,) = aque("status", str(task_id), "--csv", ",".join(fields)).out.splitlines()[1:]
    return line


def test_a_priority_and_a_duration_are_set_of_several_tasks_at_once(aque):
    first, second = aque.submit("--", "true"), aque.submit("--priority", "2", "--", "true")
    done = aque("set", f"{first},{second}", "priority=7", "duration=2m")
    assert (done.status, done.out, done.err) == (0, "2 tasks changed\n", "")
    assert [row(aque, task, "priority", "duration") for task in (first, second)] == ["7,120.0"] * 2


def test_what_a_waiting_task_needs_is_changed_and_the_rest_of_it_stays(aque):
    task = aque.submit("--cpus", "2", "--tag", "gpu", "--host", "node1", "--", "true")
    assert aque("set", str(task), "cpus=1/4", "memory=2K", "resources=gpu=1", "host=", "queue=nuke").status == 0
    assert row(aque, task, "cpus", "memory", "resources", "host", "queue", "tags") == "1/4,2048,gpu=1,,nuke,gpu"
    assert aque("set", str(task), "queue=", "tags=").status == 0
    assert row(aque, task, "queue", "tags", "cpus") == "celery,,1/4"


def test_tasks_of_different_needs_each_keep_what_is_not_set(aque):
    first, second = aque.submit("--cpus", "2", "--", "true"), aque.submit("--cpus", "3", "--", "true")
    assert aque("set", f"{first},{second}", "memory=1K").status == 0
    assert [row(aque, task, "cpus", "memory") for task in (first, second)] == ["2,1024", "3,1024"]


def test_a_jobs_id_stands_for_its_members(aque):
    job = aque("xargs", "--no-wait", "-n1", "true", given=b"a b c").id
    done = aque("set", str(job), "priority=3", "cpus=2", "--json")
    changed = json.loads(done.out)
    assert len(changed["changed"]) == 3 and job not in changed["changed"] and changed["left"] == {}
    found = [json.loads(line) for line in aque("status", "--job", str(job), "--json").out.splitlines()]
    assert {(task["priority"], task["cpus"]) for task in found if task["id"] != job} == {(3, "2")}


def test_members_of_a_job_that_have_ended_are_left_and_a_task_that_is_named_is_an_error(aque):
    job = aque("xargs", "--no-wait", "-n1", "true", given=b"a b c").id
    first = min(json.loads(line)["id"] for line in aque("status", "--json").out.splitlines()) + 1
    assert aque("kill", str(first)).status == 0
    done = aque("set", str(job), "priority=3")
    assert (done.status, done.out) == (0, "2 tasks changed, 1 already cancelled, left as it is\n")
    named = aque("set", str(first), "priority=3")
    assert (named.status, named.err) == (2, f"aque: task {first} has ended as cancelled. Nothing was changed.\n")
    assert aque("kill", str(job)).status == 0
    over = aque("set", str(job), "priority=4")
    assert (over.status, over.out) == (1, "0 tasks changed, 3 already cancelled, left as it is\n")


def test_it_is_all_or_nothing(aque):
    first, second = aque.submit("--", "true"), aque.submit("--", "true")
    aque("kill", str(second))
    for words in (
        [f"{first},{second}", "priority=3"],
        [str(first), "99", "priority=3"],
        [str(first), "priority=3", "cpus=many"],
        [str(first), "priority=3", "limits=nuke=0"],
    ):
        done = aque("set", *words)
        assert done.status == 2 and done.out == ""
    assert row(aque, first, "priority", "cpus") == "0,1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["1"], "write ids and what to set"),
        (["priority=1"], "write ids and what to set"),
        (["1", "colour=red"], "'colour' cannot be set; there are: priority, duration, queue"),
        (["1", "priority=1", "priority=2"], "priority is given twice"),
        (["1", "priority=high"], "a priority is a whole number"),
        (["1", "priority=3000000000"], "a priority is a whole number"),
        (["1", "duration=soon"], "cannot read the time 'soon'"),
        (["1", "cpus="], "cannot read CPU reservation"),
        (["1", "limits=user:ann"], "taken for every task of that user"),
        (["1", "tags=a b"], "a tag is letters"),
    ],
)
def test_what_cannot_be_set_is_refused_with_a_sentence(aque, words, said):
    aque.submit("--", "true")
    done = aque("set", *words)
    assert done.status == 2 and said in done.err and done.out == ""


def test_only_limits_that_there_are_and_no_more_than_they_have_can_be_set(aque):
    task = aque.submit("--", "true")
    assert aque("limits", "set", "nuke", "2").status == 0
    for wanted, said in (
        ("nuke=3", "3 of the limit 'nuke', which is 2"),
        ("maya", "1 of the limit 'maya', which there is not"),
    ):
        refused = aque("set", str(task), f"limits={wanted}")
        assert refused.status == 2 and said in refused.err and "Nothing was changed" in refused.err
    assert aque("set", str(task), "limits=nuke=2").status == 0
    assert row(aque, task, "limits") == "nuke=2"


def test_a_task_that_a_worker_has_keeps_its_needs_and_can_have_another_duration(served):
    task = served.submit("--", "sleep", "60")
    served("wait", "--timeout", "0.1", str(task))
    while served.state(task) != "running":
        pass
    refused = served("set", str(task), "cpus=2")
    assert refused.status == 2
    assert refused.err == (
        f"aque: task {task} is running: a worker has it, and cpus can be set of what waits only. Nothing was changed.\n"
    )
    assert served("set", str(task), "duration=5m").status == 0
    assert "expected to end at" in served("explain", str(task)).out
    assert served("kill", str(task)).status == 0


def test_a_task_that_did_not_fit_runs_as_soon_as_it_asks_for_less(served):
    task = served.submit("--cpus", "64", "--", "true")
    assert "unsatisfiable" in served("status", str(task)).out
    assert served("set", str(task), "cpus=1").status == 0
    assert served("wait", "--timeout", "30", str(task)).status == 0
