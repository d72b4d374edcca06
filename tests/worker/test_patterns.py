"""Other forms of work in real workers: barriers, reductions, and the patterns of a package (tests/pattern_package)."""

import operator
import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest

import aque
from aque import control
from aque.celery_app import app_in_use
from aque.errors import BadInput, CommandFailed, TaskCancelled, TaskError
from aque.forms import pattern_spec
from aque.handles import submitter_of
from tests.servers import wait_until
from tests.worker import functions, tasks
from tests.worker.farm import LIMIT_SECONDS, Farm

LIMIT = LIMIT_SECONDS
PACKAGE = Path(__file__).parents[1] / "pattern_package"


def install(package: Path, directory: Path) -> Path:
    """The package as pip would leave it in a directory of its own: its modules, and what it says of itself."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    about = directory / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines))
    (directory / "aque_frames").symlink_to(package / "aque_frames")
    return directory


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def pattern_farm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """A farm with two workers: one has the package of patterns, one, which serves the queue `bare`, has not. Its limit
    `renderer` is 2."""
    directory = tmp_path_factory.mktemp("patterns")
    packages = install(PACKAGE, directory / "packages")
    with ExitStack() as stack:
        if request.param == "postgresql":
            url = stack.enter_context(request.getfixturevalue("postgresql_server").database())
        else:
            url = f"sqlite:///{directory / 'aque.db'}"
        farm = stack.enter_context(Farm(url, directory))
        here = stack.enter_context(pytest.MonkeyPatch.context())
        control.set_limit(farm.store, "renderer", 2)
        farm.start_worker("-c", "2", cpus=4, env={"PYTHONPATH": str(packages)})
        farm.start_worker("-c", "1", "-Q", "bare", name="bare", cpus=4)
        here.setenv("PYTHONPATH", str(packages))  # submitters hand their environment on
        here.setattr(sys, "path", [*sys.path, str(packages)])
        with farm.entered():
            yield farm


@pytest.fixture
def installed(pattern_farm: Farm) -> Iterator[Farm]:
    yield pattern_farm
    pattern_farm.kill_everything()
    assert pattern_farm.findings() == []


def renderer(directory: Path, *lines: str) -> str:
    """A program that renders the frames that it is told to, and does `lines` in the end."""
    program = directory / "render.sh"
    render = 'for file; do echo "rendered $file" | tee "$file"; done'
    program.write_text("\n".join(["#!/bin/sh", "threads=$2; shift 2", render, *lines]))
    program.chmod(0o700)
    return str(program)


# -- patterns of packages ----------------------------------------------------------------------------------------------------


def test_the_patterns_that_are_installed_can_be_listed_without_loading_any(installed: Farm) -> None:
    sys.modules.pop("aque_frames", None)
    found = {name: point.value for name, point in aque.patterns.installed().items()}
    assert found == {
        "shell": "aque.patterns:Shell",
        "python": "aque.patterns:Python",
        "frames": "aque_frames:Frames",
        "licensed": "aque_frames:Licensed",
        "awaited": "aque_frames:Awaited",
        "digest": "aque_frames:Digest",
    }
    assert "aque_frames" not in sys.modules


def test_a_pattern_says_what_is_stored_with_which_options_and_what_its_result_is(
    installed: Farm, tmp_path: Path
) -> None:
    program = renderer(tmp_path, 'echo "$threads threads, cache in $RENDER_CACHE"')
    frames = aque.pattern("frames", cpus=3)(program, f"{tmp_path}/f.%02d.exr", first=9, last=11)
    files = [f"{tmp_path}/f.{frame}.exr" for frame in ("09", "10", "11")]
    assert frames.get(timeout=LIMIT) == files
    row = installed.row(frames)
    assert (row["name"], row["cpus"], row["priority"]) == ("frames render.sh", "3", 7)
    assert installed.output(frames).endswith(f"3 threads, cache in {tmp_path}\n".encode())


def test_what_the_command_of_a_pattern_writes_is_captured(installed: Farm, tmp_path: Path) -> None:
    program = renderer(tmp_path, "echo mind this >&2")
    frames = aque.pattern("frames")(program, f"{tmp_path}/%d", first=1, last=2)
    frames.get(timeout=LIMIT)
    assert installed.output(frames) == f"rendered {tmp_path}/1\nrendered {tmp_path}/2\n".encode()
    assert installed.output(frames, 2) == b"mind this\n"


def test_a_pattern_judges_the_end_of_its_command(installed: Farm, tmp_path: Path) -> None:
    warned = aque.pattern("frames")(renderer(tmp_path, "exit 100"), f"{tmp_path}/a%d", first=1, last=1)
    assert warned.get(timeout=LIMIT) == [f"{tmp_path}/a1"]
    failed = aque.pattern("frames")(renderer(tmp_path, "exit 3"), f"{tmp_path}/b%d", first=1, last=1)
    with pytest.raises(CommandFailed, match="exited with status 3"):
        failed.get(timeout=LIMIT)
    assert installed.row(failed)["attempt"] == 1
    missing = aque.pattern("frames")(renderer(tmp_path, 'rm "$1"'), f"{tmp_path}/c%d", first=1, last=2)
    with pytest.raises(Exception, match="1 of 2 frames are missing") as raised:
        missing.get(timeout=LIMIT)
    assert type(raised.value).__name__ in ("FramesMissing", "RemoteError")
    said = aque.pattern("frames")(
        renderer(tmp_path, "echo cannot open the scene >&2"), f"{tmp_path}/d%d", first=1, last=1
    )
    with pytest.raises(Exception, match="cannot open its scene"):
        said.get(timeout=LIMIT)


def test_an_exit_code_can_mean_that_the_command_is_tried_again_later(installed: Farm, tmp_path: Path) -> None:
    once = renderer(tmp_path, f"test -e {tmp_path}/licence || {{ touch {tmp_path}/licence; exit 75; }}")
    frames = aque.pattern("frames")(once, f"{tmp_path}/%d", first=1, last=1)
    after = functions.length.delay(frames)
    assert after.get(timeout=LIMIT) == 1
    assert [how for _, how, _ in installed.attempts(frames)] == ["retry"]  # and the second has succeeded


def test_an_exit_code_that_means_another_attempt_is_an_error_when_there_were_enough(
    installed: Farm, tmp_path: Path
) -> None:
    never = aque.pattern("frames")(renderer(tmp_path, "exit 75"), f"{tmp_path}/%d", first=1, last=1)
    with pytest.raises(CommandFailed, match="exited with status 75"):
        never.get(timeout=LIMIT)
    assert installed.row(never)["attempt"] == 3


def test_a_pattern_takes_a_limit_and_tells_how_far_its_command_is(installed: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    program = renderer(tmp_path, f"until test -e {gate}; do sleep 0.05; done")
    frames = aque.pattern("frames")(program, f"{tmp_path}/%d", first=1, last=3)
    wait_until(lambda: frames.state == "PROGRESS" and frames.info["current"] == 3, LIMIT, "the last line is told")
    assert frames.info == {"current": 3, "total": 3}
    with installed.store.connect() as connection:
        (limit,) = installed.store.limits.rows(connection)
    assert (limit.name, limit.used, limit.holders) == ("renderer", 1, (frames.number,))
    gate.touch()
    assert len(frames.get(timeout=LIMIT)) == 3


def test_a_slip_in_the_reading_of_progress_does_not_stop_the_command(installed: Farm, tmp_path: Path) -> None:
    program = renderer(tmp_path, "echo rendered what nobody has asked for", "echo rendered more", "sleep 0.2")
    frames = aque.pattern("frames")(program, f"{tmp_path}/%d", first=1, last=1)
    assert frames.get(timeout=LIMIT) == [f"{tmp_path}/1"]
    told = installed.output(frames, 2).decode()
    assert told.count("ValueError") == 1
    assert told.endswith("progress() raised this, and is not called any more; the command goes on.\n")


def test_progress_that_cannot_be_told_does_not_stop_the_command(installed: Farm, tmp_path: Path) -> None:
    program = renderer(tmp_path, "echo layers 1 2", "sleep 0.2", "echo layers 3", "sleep 0.2", "echo the end")
    frames = aque.pattern("frames")(program, f"{tmp_path}/%d", first=1, last=1)
    assert frames.get(timeout=LIMIT) == [f"{tmp_path}/1"]
    assert installed.output(frames).endswith(b"the end\n")
    told = installed.output(frames, 2).decode()
    assert told.count("Traceback") == 1 and "set is not JSON serializable" in told
    assert told.endswith("progress() returned what cannot be told, and is not called any more; the command goes on.\n")


def test_a_kill_ends_the_command_of_a_pattern_too(installed: Farm, tmp_path: Path) -> None:
    program = renderer(tmp_path, "exec sleep 600")
    frames = aque.pattern("frames")(program, f"{tmp_path}/%d", first=1, last=1)
    installed.wait_for_state(frames, "running")
    frames.kill()
    assert installed.wait_for_state(frames, "killed", "error")["state"] == "killed"


def test_a_command_that_is_asked_to_end_is_heard_to_its_end_and_judged(installed: Farm, tmp_path: Path) -> None:
    program = renderer(tmp_path, "trap 'sleep 0.2; echo saved; exit 100' TERM", "while :; do sleep 0.05; done")
    frames = aque.pattern("frames", soft_time_limit=1)(program, f"{tmp_path}/%d", first=1, last=1)
    assert frames.get(timeout=LIMIT) == [f"{tmp_path}/1"]
    assert installed.output(frames).endswith(b"saved\n")


def test_a_process_that_a_command_leaves_behind_does_not_hold_the_task_of_a_pattern(
    installed: Farm, tmp_path: Path
) -> None:
    frames = aque.pattern("frames")(renderer(tmp_path, "sleep 600 &"), f"{tmp_path}/%d", first=1, last=1)
    assert frames.get(timeout=LIMIT) == [f"{tmp_path}/1"]


@pytest.mark.parametrize("name", ["json", "aque", "selectors"])
def test_a_file_in_the_directory_of_a_task_does_not_stand_in_for_what_aque_itself_imports(
    installed: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is another module')\n")
    frames = aque.pattern("frames")(renderer(tmp_path), f"{tmp_path}/%d", first=1, last=1)
    assert frames.get(timeout=LIMIT) == [f"{tmp_path}/1"]


def test_a_function_is_found_in_the_directory_of_its_task_before_all_else(
    installed: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wave.py").write_text("def value(): return 'mine'\n")  # not that of the standard library
    assert aque.pattern("python", interpreter="worker")("wave:value").get(timeout=LIMIT) == "mine"


def test_patterns_are_part_of_graphs_like_any_task(installed: Farm, tmp_path: Path) -> None:
    program = renderer(tmp_path)
    with aque.graph():
        frames = aque.pattern("frames")(program, f"{tmp_path}/%d", first=1, last=2)
        digests = aque.pattern("digest")(frames)
        count = functions.length.delay(digests)
    assert count.get(timeout=LIMIT) == 2
    expected = sha256(f"rendered {tmp_path}/1\n".encode()).hexdigest()
    assert digests.get(timeout=LIMIT)[f"{tmp_path}/1"] == expected


@pytest.mark.parametrize("name", ["digest", "frames"])
def test_a_worker_without_the_pattern_says_which_one_it_lacks(
    installed: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    submit = aque.pattern(name, queue="bare")
    monkeypatch.delenv("PYTHONPATH")
    task = submit([]) if name == "digest" else submit("true", f"{tmp_path}/%d", first=1, last=1)
    with pytest.raises(TaskError, match=f"no pattern '{name}'"):
        task.get(timeout=LIMIT)
    assert installed.row(task)["reason"] == "cannot_import"


def test_a_pattern_of_which_nothing_runs_in_the_task_is_a_command_and_needs_no_package_on_the_worker(
    installed: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = aque.pattern("licensed", queue="bare")
    monkeypatch.delenv("PYTHONPATH")
    task = submit("sh", "-c", "echo in $STUDIO; exit 4")
    with pytest.raises(CommandFailed, match="status 4"):
        task.get(timeout=LIMIT)
    row = installed.row(task)
    assert (row["pattern"], row["exit_code"], row["name"]) == ("shell", 4, "licensed")
    assert installed.output(task) == b"in /studio\n"


def test_a_pattern_can_ask_for_another_attempt_of_any_function(installed: Farm, tmp_path: Path) -> None:
    record = tmp_path / "record"
    assert aque.pattern("awaited")(functions.third_time, str(record)).get(timeout=LIMIT) == 3
    never = aque.pattern("awaited")("aque.own_tasks:same", value=0)
    with pytest.raises(Exception, match="own_tasks:same has found nothing"):
        never.get(timeout=LIMIT)
    assert installed.row(never)["attempt"] == 3


def test_the_built_in_patterns_are_plain_commands_and_calls(installed: Farm) -> None:
    command, call = aque.pattern("shell")("echo", "one"), aque.pattern("python")(operator.add, 1, tasks.echo.delay(2))
    assert command.get(timeout=LIMIT) == {"exit_code": 0, "stdout": "one\n", "truncated": False}
    assert call.get(timeout=LIMIT) == 3
    rows = [installed.row(task) for task in (command, call, aque.pattern("python")(tasks.echo, 3))]
    assert [(row["pattern"], row["name"]) for row in rows] == [
        ("shell", "echo"),
        ("python", "_operator.add"),
        ("python", tasks.echo.name),
    ]


def test_a_result_can_be_a_word_of_a_command(installed: Farm) -> None:
    command = aque.pattern("shell")("echo", tasks.echo.delay("from a task"))
    assert command.get(timeout=LIMIT)["stdout"] == "from a task\n"


def test_the_paths_among_the_parts_of_a_command_pattern_are_its_io_hints(installed: Farm, tmp_path: Path) -> None:
    (tmp_path / "scene").mkdir()
    submitter, found = submitter_of(app_in_use()), aque.patterns.load("frames")
    parts = {"program": "/usr/bin/render", "files": [f"{tmp_path}/scene/1.exr"]}
    for options, expected in (({}, [tmp_path / "scene"]), ({"io_paths": ["/a"]}, [Path("/a")]), ({"io": False}, [])):
        spec = pattern_spec(submitter, 1, "frames", found, parts, options)
        assert spec.io_paths == tuple(os.fsencode(path) for path in expected)


def test_patterns_run_in_this_process_too(installed: Farm, tmp_path: Path) -> None:
    once = renderer(tmp_path, f"test -e {tmp_path}/licence || {{ touch {tmp_path}/licence; exit 75; }}")
    assert aque.execute(lambda: aque.pattern("frames")(once, f"{tmp_path}/%d", first=1, last=1)) == [f"{tmp_path}/1"]
    with pytest.raises(CommandFailed, match="status 75"):
        aque.execute(lambda: aque.pattern("frames")(renderer(tmp_path, "exit 75"), f"{tmp_path}/%d", 1, 1))


def test_a_pattern_refuses_what_it_cannot_run_before_anything_is_submitted(installed: Farm) -> None:
    before = installed.counts()
    with pytest.raises(BadInput, match="no frames from 5 to 4"):
        aque.pattern("frames")("true", "%d", first=5, last=4)
    with pytest.raises(BadInput, match=r"no pattern 'houdini' .*there are: awaited, digest, frames"):
        aque.pattern("houdini")
    with pytest.raises(BadInput, match="unknown task options cpu"):
        aque.pattern("frames", cpu=1)
    assert installed.counts() == before


# -- reduce ---------------------------------------------------------------------------------------------------------------


def test_a_reduction_keeps_the_order_of_its_items(farm: Farm) -> None:
    letters = [tasks.echo.delay(letter) for letter in "abcdefg"]
    assert aque.reduce(operator.add, letters).get(timeout=LIMIT) == "abcdefg"
    assert aque.reduce(operator.add, letters, initial=">").get(timeout=LIMIT) == ">abcdefg"


def test_a_reduction_is_a_tree(farm: Farm) -> None:
    last = aque.reduce(functions.deepest, [0] * 100)
    assert last.get(timeout=LIMIT) == 7  # and not 99
    assert aque.reduce(functions.deepest, [0] * 100, arity=10).get(timeout=LIMIT) == 2


def test_a_reduction_of_one_item_is_the_item(farm: Farm) -> None:
    task = tasks.echo.delay(1)
    assert aque.reduce(operator.add, [task]) is task
    assert aque.reduce(operator.add, ["only"]).get(timeout=LIMIT) == "only"
    assert aque.reduce(operator.add, [], initial=0).get(timeout=LIMIT) == 0


def test_nothing_cannot_be_reduced(farm: Farm) -> None:
    with pytest.raises(BadInput, match="nothing to reduce"):
        aque.reduce(operator.add, [])
    with pytest.raises(BadInput, match="at least 2 items"):
        aque.reduce(operator.add, [1, 2], arity=1)


def test_a_reduction_can_be_part_of_a_graph_and_fails_with_its_items(farm: Farm) -> None:
    with aque.graph() as job:
        total = aque.reduce(operator.add, [aque.reduce(operator.add, range(10)), 5])
        doubled = tasks.add.delay(total, total)
        broken = aque.reduce(operator.add, [tasks.echo.delay(1), tasks.fail.delay(), tasks.echo.delay(2)])
    assert doubled.get(timeout=LIMIT) == 100
    assert farm.wait_for_state(job.handle, "success", "error")["state"] == "error"
    assert farm.state(broken) == "skipped"


# -- barriers -------------------------------------------------------------------------------------------------------------


def test_what_waits_for_a_barrier_starts_when_all_of_it_has_ended(farm: Farm, tmp_path: Path) -> None:
    with aque.graph():
        first = [tasks.record.delay(str(tmp_path / "first")) for _ in range(3)]
        passed = aque.barrier(first, name="first layer")
        second = [functions.lines.apply_async([str(tmp_path / "first")], depends_on=passed) for _ in range(3)]
        last = tasks.echo.apply_async(["after"], depends_on=aque.barrier(second))
    assert last.get(timeout=LIMIT) == "after"
    assert [task.get(timeout=LIMIT) for task in second] == [3, 3, 3]
    assert (farm.row(passed)["name"], passed.get(timeout=LIMIT)) == ("first layer", None)


def test_a_barrier_fails_with_any_of_its_tasks_and_not_before_all_have_ended(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow, bad = tasks.started.delay(str(tmp_path / "slow"), str(gate)), tasks.fail.delay()
    passed = aque.barrier([slow, bad])
    after = tasks.echo.apply_async([1], depends_on=passed)
    regardless = tasks.echo.apply_async([2], after_any=passed)
    farm.wait_for_state(bad, "error")
    assert farm.state(passed) == "pending"
    gate.touch()
    assert regardless.get(timeout=LIMIT) == 2
    assert (farm.state(passed), farm.state(after)) == ("error", "skipped")


def test_a_barrier_for_nothing_is_passed_at_once(farm: Farm) -> None:
    assert aque.barrier([]).get(timeout=LIMIT) is None


def test_a_barrier_that_is_killed_leaves_its_tasks_alone(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    task = tasks.started.delay(str(tmp_path / "x"), str(gate))
    passed = aque.barrier([task])
    passed.kill()
    with pytest.raises(TaskCancelled):
        passed.get(timeout=LIMIT)
    gate.touch()
    assert task.get(timeout=LIMIT) == 1
