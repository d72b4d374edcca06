"""A submitter's looks: what they find, how few they are, and that none lasts for ever."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aque import looks
from aque.looks import FileSystems, Looks
from tests.filesystems import FileSystems as Mounting


class Counted(FileSystems):
    """Counts the looks."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[bytes] = []

    def call(self, function: Callable[[bytes], Any], path: bytes) -> Any:
        self.paths.append(path)
        return super().call(function, path)


def prefix(path: Path | str) -> str | None:
    found = Looks(FileSystems()).prefix(os.fsencode(path))
    return None if found is None else os.fsdecode(found)


def test_the_longest_prefix_that_exists_is_found(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "f").touch()
    assert prefix(tmp_path / "a" / "b") == str(tmp_path / "a" / "b")
    assert prefix(tmp_path / "a" / "c" / "d") == str(tmp_path / "a")
    assert prefix(tmp_path / "a" / "f" / "x") == str(tmp_path / "a" / "f")
    assert prefix("/") == "/"
    assert prefix("/no such directory/x") == "/"
    assert prefix(f"{tmp_path}/{'n' * 300}/x") == str(tmp_path)
    assert prefix(str(tmp_path) + "/x" * 1500) == str(tmp_path)


def test_links_are_followed_and_shown_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "real" / "d").mkdir(parents=True)
    (tmp_path / "real" / "d" / "f").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "far").symlink_to(tmp_path / "link" / "d")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    assert prefix(tmp_path / "link" / "d" / "f") == str(tmp_path / "link" / "d" / "f")
    assert prefix(tmp_path / "far" / "f" / "x") == str(tmp_path / "far" / "f")
    assert prefix(tmp_path / "far" / "absent") == str(tmp_path / "far")
    assert prefix(tmp_path / "dangling" / "x") == str(tmp_path)
    assert prefix(tmp_path / "circle") == str(tmp_path)
    assert Looks(FileSystems()).size(bytes(tmp_path / "far" / "f")) == 5


def test_files_have_sizes_and_nothing_else_has(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1234))
    os.mkfifo(tmp_path / "fifo")
    look = Looks(FileSystems())
    assert [look.size(bytes(tmp_path / name)) for name in ("f", "fifo", ".", "absent", "f/x")] == [1234, 0, 0, 0, 0]


def test_a_directory_of_which_many_names_are_asked_is_read_once(tmp_path: Path) -> None:
    for n in range(500):
        (tmp_path / f"{n}").write_bytes(bytes(n))
    counted = Counted()
    look = Looks(counted)
    for n in range(500):
        assert look.prefix(b"%s/%d" % (bytes(tmp_path), n)) == b"%s/%d" % (bytes(tmp_path), n)
        assert look.prefix(b"%s/absent%d" % (bytes(tmp_path), n)) == bytes(tmp_path)
    assert len(counted.paths) < 20
    assert [look.size(b"%s/%d" % (bytes(tmp_path), n)) for n in range(500)] == list(range(500))


def test_after_a_thousand_looks_a_word_is_taken_for_its_deepest_known_directory(tmp_path: Path) -> None:
    for n in range(600):
        (tmp_path / f"{n}" / "d").mkdir(parents=True)
    counted = Counted()
    look = Looks(counted)
    found = [look.prefix(b"%s/%d/d/f" % (bytes(tmp_path), n)) for n in range(600)]
    assert found[0] == bytes(tmp_path / "0" / "d")
    assert found[-1] == bytes(tmp_path / "599"), "its name came with those of the others"
    assert len(counted.paths) == looks.CALLS
    assert look.size(bytes(tmp_path / "599")) == 0


def test_after_half_a_second_nothing_more_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "SECONDS", 0.0)
    assert prefix(tmp_path) == "/"


def test_a_directory_that_is_too_long_to_be_read_is_asked_name_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "LONGEST_LISTING", 5)
    for n in range(50):
        (tmp_path / f"{n}").touch()
    look = Looks(FileSystems())
    for n in range(50):
        assert look.prefix(b"%s/%d" % (bytes(tmp_path), n)) == b"%s/%d" % (bytes(tmp_path), n)
    assert look.prefix(bytes(tmp_path / "absent")) == bytes(tmp_path)


def test_where_a_mount_does_not_answer_the_text_says_nothing_and_other_mounts_are_seen(
    file_systems: Mounting, tmp_path: Path
) -> None:
    hung, let_go = file_systems.hung()
    fine = file_systems.tmpfs("nas1:/shots")
    (fine / "f").write_bytes(b"123")
    (tmp_path / "jobs").symlink_to(hung)
    shared = FileSystems()
    look = Looks(shared)
    assert look.prefix(bytes(hung / "x")) is None
    assert look.prefix(bytes(tmp_path / "jobs" / "y")) is None
    assert look.size(bytes(hung / "x")) == 0
    assert look.prefix(bytes(fine / "f")) == bytes(fine / "f")
    assert look.size(bytes(fine / "f")) == 3
    # The next submission does not send another thread there.
    for _ in range(20):
        assert Looks(shared).prefix(bytes(hung / "x")) is None
    stuck = [thread for thread in threading.enumerate() if thread.name == "aque-look"]
    assert len(stuck) == 1
    let_go()
    stuck[0].join(20)
    assert Looks(shared).prefix(bytes(hung / "x")) is not None, "it is asked again when it has answered"
