"""What a submission writes about the paths of its tasks: which, how large, and what stands for them in the requirement."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from aque import settings
from aque.options import Options
from aque.store import Store, submissions
from aque.store.tables import payload, requirement, task
from aque.submitter import Submitter
from aque.values import TaskSpec
from tests.filesystems import FileSystems


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    yield directory


@pytest.fixture
def submitter(store: Store) -> Submitter:
    return Submitter(store, settings.load({"AQUE_STATE_DIR": "/nowhere"}))


def written(store: Store, ids: list[int]) -> list[tuple[list[bytes], int, list[bytes]]]:
    """io_paths, io_bytes and places of these tasks."""
    query = (
        sa.select(payload.c.io_paths, task.c.io_bytes, requirement.c.places)
        .join(task, task.c.id == payload.c.task_id)
        .join(requirement, requirement.c.id == task.c.requirement_id)
        .where(task.c.id.in_(ids))
        .order_by(task.c.id)
    )
    with store.connect() as connection:
        rows = connection.execute(query).all()
    return [(bytes(a).split(b"\0")[:-1], size, bytes(b).split(b"\0")[:-1]) for a, size, b in rows]


def submit(
    submitter: Submitter, *argvs: list[str | bytes], **options: object
) -> list[tuple[list[bytes], int, list[bytes]]]:
    ids = submitter.reserve(len(argvs))
    chosen = Options(**options)  # type: ignore[arg-type]
    submitter.submit([submitter.command(i, argv, chosen) for i, argv in zip(ids, argvs, strict=True)])
    return written(submitter.store, ids)


def test_the_words_of_a_command_that_are_paths_are_its_io_paths_and_places(submitter: Submitter, here: Path) -> None:
    (here / "in.txt").write_bytes(b"123")
    (here / "sub").mkdir()
    inside = bytes(here / "in.txt")
    words = ["sort", "-o", str(here / "sub" / "new"), "in.txt"]
    found, other = submit(submitter, words, ["cat", "in.txt"])
    assert found == ([bytes(here / "sub"), inside], 3, [inside, bytes(here / "sub")])
    assert other == ([inside], 3, [inside])
    assert submit(submitter, words) == [([bytes(here / "sub"), inside], 3, [bytes(here)])], "alone: the directories"


def test_a_command_without_paths_has_none(submitter: Submitter, here: Path) -> None:
    assert submit(submitter, ["true"], ["sleep", "1"]) == [([], 0, [])] * 2


def test_files_in_place_of_streams_count_as_words(submitter: Submitter, here: Path) -> None:
    (here / "in.txt").write_bytes(b"123")
    (task_id,) = submitter.reserve(1)
    files = submitter.redirections(stdin="in.txt")
    submitter.submit([submitter.command(task_id, ["sort"], Options(), redirections=files)])
    assert written(submitter.store, [task_id])[0][:2] == ([bytes(here / "in.txt")], 3)


def test_paths_that_are_given_count_in_place_of_guesses_and_need_not_exist(submitter: Submitter, here: Path) -> None:
    (here / "in.txt").touch()
    (found,) = submit(submitter, ["sort", "in.txt"], io_paths=["/shots/later", "sub/../x", "x"])
    assert found == ([b"/shots/later", bytes(here / "x")], 0, [b"/shots/later", bytes(here / "x")])


def test_without_io_there_are_none(store: Store, submitter: Submitter, here: Path) -> None:
    (here / "in.txt").touch()
    assert submit(submitter, ["sort", "in.txt"], io=False) == [([], 0, [])]
    assert submit(submitter, ["sort", "in.txt"], io=False, io_paths=["/shots"]) == [([], 0, [])]
    off = Submitter(store, settings.load({"AQUE_STATE_DIR": "/nowhere", "AQUE_IO_HINTS": "no"}))
    assert submit(off, ["sort", "in.txt"]) == [([], 0, [])]
    assert submit(off, ["sort", "in.txt"], io_paths=["in.txt"])[0][0] == [bytes(here / "in.txt")]


def test_a_function_has_the_paths_that_are_given(submitter: Submitter, here: Path) -> None:
    (task_id,) = submitter.reserve(1)
    (here / "a").write_bytes(b"12")
    submitter.submit([submitter.function(task_id, "m:f", "m.f", b"[[],{}]", [], Options(io_paths=("a",)))])
    assert written(submitter.store, [task_id]) == [([bytes(here / "a")], 2, [bytes(here / "a")])]


def test_many_commands_have_few_requirement_classes(submitter: Submitter, here: Path) -> None:
    for n in range(200):
        (here / f"{n}.exr").write_bytes(bytes(n))
    found = submit(submitter, *(["gzip", f"{n}.exr"] for n in range(200)))
    assert [paths for paths, _, _ in found] == [[bytes(here / f"{n}.exr")] for n in range(200)]
    assert [size for _, size, _ in found] == list(range(200))
    assert {tuple(places) for _, _, places in found} == {(bytes(here),)}
    with submitter.store.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(requirement)).scalar_one() == 1


def test_copies_of_a_command_with_other_words_have_the_paths_of_their_own_words(
    submitter: Submitter, here: Path
) -> None:
    for name in ("a", "b"):
        (here / name).touch()
    ids = submitter.reserve(2)
    first = submitter.command(ids[0], ["gzip", "a"], Options())
    second: TaskSpec = replace(first, id=ids[1], argv=(b"gzip", b"b"))
    submitter.submit([first, second])
    assert [paths for paths, _, _ in written(submitter.store, ids)] == [[bytes(here / "a")], [bytes(here / "b")]]


def test_on_a_crowded_farm_new_classes_have_mount_points_for_places(
    submitter: Submitter, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "MOST_CLASSES", 3)
    for n in range(6):
        (here / str(n)).mkdir()
        (here / str(n) / "f").touch()
    found = [submit(submitter, ["gzip", f"{n}/f"])[0] for n in range(6)]
    points = {os.fsencode(str(p)) for p in (here, *here.parents) if os.path.ismount(p)}
    assert [places == [bytes(here / str(n))] for n, (_, _, places) in enumerate(found)] == [True] * 4 + [False] * 2
    assert all(set(places) <= points for _, _, places in found[4:])
    assert [paths for paths, _, _ in found] == [[bytes(here / str(n) / "f")] for n in range(6)]
    # A class that there is already is no burden, and neither is one without paths.
    assert submit(Submitter(submitter.store, submitter.settings), ["gzip", "1/f"])[0][2] == [bytes(here / "1")]
    assert submit(submitter, ["true"])[0][2] == []


def test_classes_without_ready_tasks_do_not_make_a_farm_crowded(
    submitter: Submitter, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "MOST_CLASSES", 1)
    (here / "f").touch()
    for n in range(4):
        submit(submitter, ["gzip", "f"], queue=f"q{n}")
        with submitter.store.begin() as connection:
            connection.execute(sa.update(task).where(task.c.state == "ready").values(state="held"))
    assert submit(submitter, ["gzip", "f"], queue="last")[0][2] == [bytes(here)]


def test_a_path_on_a_mount_that_does_not_answer_is_taken_as_it_is_written(
    submitter: Submitter, here: Path, file_systems: FileSystems
) -> None:
    hung, _ = file_systems.hung()
    (here / "in.txt").write_bytes(b"123")
    (found,) = submit(submitter, ["cp", "in.txt", str(hung / "a" / "b")])
    assert found == (
        [bytes(here / "in.txt"), bytes(hung / "a" / "b")],
        3,
        sorted([bytes(here), bytes(hung / "a")]),
    )
