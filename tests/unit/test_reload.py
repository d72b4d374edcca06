"""What `--reload` watches, and what it lets a worker restart for."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from aque import reload


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def module(file: Path) -> ModuleType:
    made = ModuleType(file.stem)
    made.__file__ = str(file)
    return made


def test_directories_of_imported_modules_are_watched_with_their_packages_and_not_their_data(tmp_path: Path) -> None:
    tasks = write(tmp_path / "tasks.py")
    write(tmp_path / "lib" / "__init__.py")
    write(tmp_path / "lib" / "deep" / "__init__.py")
    write(tmp_path / "frames" / "0001.exr")
    found = reload.directories([module(tasks), os, ModuleType("builtin"), None], 5.0, {}, [])
    assert found == dict.fromkeys([tmp_path, tmp_path / "lib", tmp_path / "lib" / "deep"], 5.0)


@pytest.mark.parametrize(
    ("name", "file", "directory"),
    [
        ("render", "render.py", "."),
        ("farm.render", "farm/__init__.py", "farm"),
        ("loose.render", "loose/render.py", "loose"),
    ],
)
def test_a_module_that_only_the_pool_has_imported_is_found(
    tmp_path: Path, name: str, file: str, directory: str
) -> None:
    write(tmp_path / file)
    assert reload.directories([], 5.0, {name: 7.0}, [str(tmp_path), *sys.path]) == {
        (tmp_path / directory).absolute(): 7.0
    }
    assert name not in sys.modules


def test_modules_of_installed_packages_are_not_watched() -> None:
    assert (
        reload.directories([os, pytest], 5.0, dict.fromkeys(["json", "sqlalchemy.orm", "no_such"], 7.0), sys.path) == {}
    )


def test_a_file_that_cannot_be_compiled_is_a_sentence(tmp_path: Path) -> None:
    good = write(tmp_path / "good.py", "x = 1\n")
    broken = write(tmp_path / "broken.py", "x = 1\ndef (:\n")
    assert reload.problem([good, tmp_path / "deleted.py"]) is None
    assert reload.problem([good, broken]) == f"{broken}, line 2: invalid syntax."


def test_a_configuration_file_that_cannot_be_read_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AQUE_CONFIG", str(write(tmp_path / "aque.toml", "lease_seconds = \n")))
    assert "cannot read the configuration file" in (reload.problem([]) or "")


def test_what_was_written_while_the_worker_started_is_seen(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old.py"), write(tmp_path / "new.py")
    os.utime(old, (1000, 1000))
    os.utime(new, (3000, 3000))
    assert reload.changed_since({tmp_path: 2000, tmp_path / "gone": 0}) == [new]
