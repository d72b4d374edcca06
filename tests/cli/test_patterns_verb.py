"""`aque patterns`, and `--pattern` of `aque submit` and `aque call`, with the package of tests/pattern_package."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Aque
from tests.worker.test_patterns import PACKAGE, install, renderer


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with the package."""
    return {"PYTHONPATH": str(install(PACKAGE, tmp_path_factory.mktemp("packages")))}


def test_patterns_are_listed_with_their_package_and_what_they_do(bare: Aque, packages: dict[str, str]) -> None:
    listed = bare("patterns", env=packages)
    assert listed.status == 0
    names = [line.split()[0] for line in listed.out.splitlines()]
    assert names == ["name", "awaited", "digest", "frames", "licensed", "python", "shell"]
    rows = [json.loads(line) for line in bare("patterns", "--json", env=packages).out.splitlines()]
    assert rows[2] == {
        "name": "frames",
        "package": "aque-frames 1.0",
        "class": "aque_frames:Frames",
        "summary": "A range of frames, rendered by one command.",
        "error": None,
    }
    assert (rows[5]["package"].split()[0], rows[5]["summary"][:14]) == ("aque", "Run a command:")


def test_a_broken_pattern_is_listed_with_its_error_beside_the_others(bare: Aque, tmp_path: Path) -> None:
    about = tmp_path / "broken-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[aque.patterns]\nnuke = no_such_module:Nuke\nother = json:JSONDecoder\n")
    listed = bare("patterns", env={"PYTHONPATH": str(tmp_path)})
    assert listed.status == 1
    lines = {line.split()[0]: line for line in listed.out.splitlines()}
    assert "broken: the pattern 'nuke'" in lines["nuke"] and "No module named 'no_such_module'" in lines["nuke"]
    assert "is no subclass of aque.patterns.Pattern" in lines["other"]
    assert "Run a command" in lines["shell"]
    refused = bare("submit", "--pattern", "nuke", "--", "a.nk", env={"PYTHONPATH": str(tmp_path)})
    assert (refused.status, refused.out) == (2, "")
    assert "No module named 'no_such_module'" in refused.err


def test_submit_gives_its_words_to_a_pattern_and_runs_what_becomes_of_them(
    served: Aque, packages: dict[str, str]
) -> None:
    served("limits", "set", "renderer", "1")
    done = served(
        "submit", "--pattern", "licensed", "--wait", "--", "sh", "-c", "echo in $STUDIO; exit 4", env=packages
    )
    assert (done.status, done.out) == (4, "in /studio\n")
    row = json.loads(served("status", "--json", done.err.split()[0]).out)
    assert (row["name"], row["exit_code"], row["cpus"]) == ("licensed", 4, "1")


def test_call_gives_json_to_a_pattern_and_prints_its_result(
    served: Aque, packages: dict[str, str], tmp_path: Path
) -> None:
    # The worker of this store lacks the package: with --local one that has it serves a queue of its own.
    served("limits", "set", "renderer", "1")
    program = renderer(tmp_path, "exit 100")
    asked = json.dumps({"program": program, "output": f"{tmp_path}/%d", "first": 1, "last": 2})
    done = served("call", "--pattern", "frames", "--local", "--queue", "own", "--cpus", "1", asked, env=packages)
    assert (done.status, json.loads(done.out)) == (0, [f"{tmp_path}/1", f"{tmp_path}/2"])
    row = json.loads(served("status", "--json", done.err.split()[0]).out)
    assert (row["cpus"], row["priority"], row["name"]) == ("1", 7, "frames render.sh")


def test_options_on_the_command_line_stand_above_those_of_the_pattern(aque: Aque, packages: dict[str, str]) -> None:
    aque("limits", "set", "renderer", "1")
    first = aque.submit("--", "true")
    words = ["/bin/true", "%d", "1", "2"]
    plain = aque("submit", "--pattern", "frames", *words, env=packages).id
    own = aque(
        "submit", "--pattern", "frames", "--priority", "-1", "--name", "mine", "--after-any", str(first), *words,
        env=packages,
    ).id  # fmt: skip
    rows = {row["id"]: row for row in map(json.loads, aque("status", "--json").out.splitlines())}
    assert [rows[plain][name] for name in ("priority", "name", "cpus", "depends_on")] == [7, "frames true", "2", []]
    assert [rows[own][name] for name in ("priority", "name", "cpus", "depends_on")] == [-1, "mine", "2", [first]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit", "--pattern", "houdini", "--", "x"], "there is no pattern 'houdini'"),
        (["submit", "--pattern", "frames", "--", "render"], "TypeError: Frames.prepare() missing 3 required"),
        (["submit", "--pattern", "frames", "--", "render", "%d", "5", "4"], "there are no frames from 5 to 4"),
        (["submit", "--pattern", "licensed", "--cwd", "/", "--", "true"], "--cwd is for commands as they stand"),
        (["submit", "--pattern", "licensed", "--", "true"], "there is no limit"),
        (["submit", "--pattern", "shell"], "there is no command to run"),
        (["call", "--pattern", "python", '"no function"'], "is not MODULE:FUNCTION"),
        (["call"], "is not MODULE:FUNCTION"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_a_pattern_cannot_take_is_one_sentence_and_nothing_is_submitted(
    aque: Aque, packages: dict[str, str], words: list[str], said: str
) -> None:
    done = aque(*words, env=packages)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err
    assert aque.count() == 0
