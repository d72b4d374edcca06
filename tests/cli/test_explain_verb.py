"""`aque explain` and the `why` of `aque status`, on real stores and a real worker of four CPUs."""

import json

from tests.servers import wait_until


def explained(aque, task_id):
    (line,) = aque("explain", "--json", str(task_id)).out.splitlines()
    return json.loads(line)


def why(aque, task_id):
    (line,) = aque("status", "--json", str(task_id)).out.splitlines()
    return json.loads(line)["why"]


def running(aque, *words):
    task = aque.submit(*words)
    wait_until(lambda: aque.state(task) == "running", what="it runs")
    return task


def test_without_a_worker_it_says_so_and_names_the_verb_that_starts_one(aque):
    task = aque.submit("--", "true")
    assert aque("explain", str(task)).out == f"{task} true: ready\n  no live worker: start one with `aque worker`\n"
    assert why(aque, task) == "no live worker"


def test_dependencies_that_are_left_are_named(aque):
    first = aque.submit("--duration", "2m", "--", "true")
    second = aque.submit("--after", str(first), "--", "true")
    slowest = f"the slowest is task {first} (true, ready), expected to take 2 min more"
    assert aque("explain", "@last").out == f"{second} true: pending\n  waits for 1 of 1 task: {first}; {slowest}\n"
    assert why(aque, second) == "waits for 1 task"
    facts = explained(aque, second)["reasons"][0]
    assert (facts["kind"], facts["left"], facts["ids"], facts["slowest_seconds"]) == ("dependencies", 1, [first], 120.0)


def test_what_was_skipped_leads_to_the_first_failure(served):
    first = served.submit("--shell", "exit 3")
    second = served.submit("--after", str(first), "--", "true")
    third = served.submit("--after", str(second), "--name", "last", "--", "true")
    served("wait", str(third))
    out = served("explain", str(third)).out
    assert f"it needed task {second} (true) to succeed, which ended as skipped: dependency" in out
    assert f"that began with task {first} (sh): error: exit 3" in out
    assert [step["id"] for step in explained(served, third)["reasons"][1]["chain"]] == [second, first]


def test_each_worker_says_what_is_in_the_way_and_when_it_expects_room(served):
    first = running(served, "--cpus", "3", "--duration", "10m", "--", "sleep", "600")
    # With names of their own: what is known to be short is claimed ahead of room for it.
    waiting = served.submit("--name", "waiting", "--cpus", "2", "--", "true")
    (view,) = explained(served, waiting)["workers"]
    assert view["kind"] == "no_room" and view["worker"].startswith("celery@")
    assert view["text"].startswith("needs 2 cpus, 1 is free: expects room at ") and view["expected_at"].endswith("Z")
    assert why(served, waiting) == "waits for its turn"
    behind = served.submit("--name", "behind", "--cpus", "2", "--", "true")
    assert "1 ready task goes before it" in served("explain", str(behind)).out
    served("set", str(behind), "priority=1")
    assert "no ready task goes before it" in served("explain", str(behind)).out
    out = served("explain", str(first)).out
    assert "running on" in out and "expected to end at" in out
    assert served("kill", f"{first},{waiting},{behind}").status == 0


def test_a_limit_that_is_used_up_is_named_with_who_holds_it(served):
    served("limits", "set", "nuke", "1")
    holder = running(served, "--limit", "nuke", "--", "sleep", "600")
    task = served.submit("--limit", "nuke", "--", "true")
    assert f"limit nuke: needs 1, 0 of 1 free (held by task {holder})" in served("explain", str(task)).out
    assert why(served, task) == "limit nuke: 0 of 1 free"
    assert explained(served, task)["workers"][0]["kind"] == "limit"
    assert served("set", str(task), "limits=").status == 0
    assert served("wait", "--timeout", "30", str(task)).status == 0
    served("kill", str(holder))
    served("wait", str(holder))
    served("limits", "rm", "nuke")


def test_what_fits_nowhere_is_unsatisfiable(served):
    task = served.submit("--cpus", "64", "--", "true")
    assert "unsatisfiable: needs 64 cpus, largest worker has 4" in served("explain", str(task)).out
    assert explained(served, task)["workers"][0]["kind"] == "never"
    served("set", str(task), "cpus=1", "host=elsewhere")
    assert "is not one of elsewhere" in served("explain", str(task)).out
    served("kill", str(task))


def test_a_job_is_summed_up(served):
    first = running(served, "--cpus", "4", "--", "sleep", "600")
    job = served("xargs", "--no-wait", "--name", "part", "-n1", "true", given=b"a b c").id
    out = served("explain", str(job)).out
    assert out.splitlines()[0] == f"{job} part: pending"
    assert "3 tasks: waits for its turn" in out
    served("kill", str(first))
    served("wait", str(job))
    assert "3 tasks: success" in served("explain", str(job)).out


def test_an_id_that_there_is_not_is_an_error(aque):
    done = aque("explain", "99")
    assert done.status == 2 and done.out == "" and "there is no task 99" in done.err


def test_strict_refuses_what_no_live_worker_could_ever_run(aque, served):
    refused = aque("submit", "--strict", "--", "true")
    assert refused.status == 2 and refused.err.startswith("aque: no live worker. Nothing was submitted")
    for words in (["submit", "--"], ["xargs", "--no-wait"]):
        done = served(words[0], "--strict", "--cpus", "64", *words[1:], "true")
        assert done.status in (1, 2) and "unsatisfiable: needs 64 cpus, largest worker has 4" in done.err
    call = served("call", "--strict", "--queue", "other", "os:getpid")
    assert call.status == 2 and "no worker serves queue 'other'" in call.err
    assert served("status", "--state", "ready", "--csv", "id").out == "id\n"
    assert aque("submit", "--strict", "--local", "--", "true").status == 2
    assert served("submit", "--strict", "--wait", "--", "true").status == 0
