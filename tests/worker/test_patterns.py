"""Other forms of work in real workers: barriers, reductions, and the patterns of a package (tests/pattern_package)."""

import operator
import sys
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

import aque
from aque.errors import BadInput, CommandFailed, TaskCancelled, TaskError
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


@pytest.fixture(scope="module")
def pattern_farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """A farm with two workers: one has the package of patterns, one, which serves the queue `bare`, has not."""
    directory = tmp_path_factory.mktemp("patterns")
    packages = install(PACKAGE, directory / "packages")
    with Farm(f"sqlite:///{directory / 'aque.db'}", directory) as farm, pytest.MonkeyPatch.context() as here:
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
    program.write_text("\n".join(["#!/bin/sh", 'for file; do echo "rendered $file" | tee "$file"; done', *lines]))
    program.chmod(0o700)
    return str(program)


# -- patterns of packages ----------------------------------------------------------------------------------------------------


def test_the_patterns_that_are_installed_can_be_listed_without_loading_any(installed: Farm) -> None:
    sys.modules.pop("aque_frames", None)
    assert {name: point.value for name, point in aque.patterns.installed().items()} == {
        "frames": "aque_frames:Frames",
        "digest": "aque_frames:Digest",
    }
    assert "aque_frames" not in sys.modules


def test_a_pattern_says_what_is_stored_with_which_options_and_what_its_result_is(
    installed: Farm, tmp_path: Path
) -> None:
    program = renderer(tmp_path)
    frames = aque.pattern("frames", cpus=2)(program, f"{tmp_path}/f.%02d.exr", first=9, last=11)
    files = [f"{tmp_path}/f.{frame}.exr" for frame in ("09", "10", "11")]
    assert frames.get(timeout=LIMIT) == files
    row = installed.row(frames)
    assert (row["name"], row["cpus"], row["priority"]) == ("frames render.sh", "2", 7)


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
    missing = aque.pattern("frames")(renderer(tmp_path, 'rm "$1"'), f"{tmp_path}/c%d", first=1, last=2)
    with pytest.raises(Exception, match="1 of 2 frames are missing") as raised:
        missing.get(timeout=LIMIT)
    assert type(raised.value).__name__ in ("FramesMissing", "RemoteError")


def test_a_kill_ends_the_command_of_a_pattern_too(installed: Farm, tmp_path: Path) -> None:
    program = renderer(tmp_path, "exec sleep 600")
    frames = aque.pattern("frames")(program, f"{tmp_path}/%d", first=1, last=1)
    installed.wait_for_state(frames, "running")
    frames.kill()
    assert installed.wait_for_state(frames, "killed", "error")["state"] == "killed"


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


def test_a_pattern_refuses_what_it_cannot_run_before_anything_is_submitted(installed: Farm) -> None:
    before = installed.counts()
    with pytest.raises(BadInput, match="no frames from 5 to 4"):
        aque.pattern("frames")("true", "%d", first=5, last=4)
    with pytest.raises(BadInput, match=r"no pattern 'houdini' .*there are: digest, frames"):
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
