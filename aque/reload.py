"""Reload: notice that the code of a worker has changed, and say whether a new image could load it.

What is watched are directories with code of yours, not installed packages: those of the modules that the worker has imported,
and those in which the modules of the tasks that it has started are found, which only its pool children import; below them
the packages, and no other directory, for data may lie there as well. In them every `.py` file counts, and the configuration
file.
"""

import logging
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from aque import machine
from aque.errors import AqueError, BadSetting

logger = logging.getLogger(__name__)

#: A change counts when it has been quiet for so long: editors and `git checkout` write many files.
QUIET_SECONDS = 0.5
#: However busy the directories are, a change counts after this long.
LONGEST_SECONDS = 10.0
#: So often a look at what has been imported since.
LOOK_SECONDS = 1.0

_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def require() -> Any:
    """The module watchfiles. Raises BadSetting."""
    try:
        import watchfiles
    except ImportError:
        raise BadSetting("--reload needs the package watchfiles: install aque[reload].") from None
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change that counts or not
    return watchfiles


def own_files(modules: Iterable[ModuleType | None]) -> list[Path]:
    """The source files of those of `modules` that are not installed packages."""
    names = [getattr(module, "__file__", None) for module in modules]
    found = (os.path.abspath(name) for name in names if isinstance(name, str) and name.endswith(".py"))
    return [Path(name) for name in found if not name.startswith(_INSTALLED) and "site-packages" not in name]


def find(module: str, path: Iterable[str]) -> Path | None:
    """The directory in which a module's outermost package, or the module itself, is found; nothing is imported."""
    parts = module.split(".")
    for folder in path:
        # The last one: in a directory that is a package without an __init__.py.
        for name in (Path(folder, parts[0], "__init__.py"), Path(folder, *parts[:-1], f"{parts[-1]}.py")):
            if name.is_file():
                return name.parent.absolute()
    return None


def with_packages(directory: Path) -> Iterator[Path]:
    """The directory and all packages below it."""
    yield directory
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and os.path.isfile(os.path.join(entry.path, "__init__.py")):
                yield from with_packages(Path(entry.path))


def directories(
    modules: Iterable[ModuleType | None], began: float, started: Mapping[str, float], path: Iterable[str]
) -> dict[Path, float]:
    """What to watch, and since when what is in it counts (seconds since 1970): for `modules` that have been imported here
    since `began`, and for modules by the names of which tasks were `started`."""
    found = {file.parent: began for file in own_files(modules)}
    here = list(path)
    for name, moment in started.items():
        place = find(name, here)
        if place is not None and not str(place).startswith(_INSTALLED):
            found[place] = min(moment, found.get(place, moment))
    return {place: moment for directory, moment in found.items() for place in with_packages(directory)}


def changed_since(directories: Mapping[Path, float]) -> list[Path]:
    """The source files in these directories that were written after the moment that stands with each."""
    found = []
    for directory, moment in directories.items():
        with suppress(OSError), os.scandir(directory) as entries:
            found += [Path(e.path) for e in entries if e.name.endswith(".py") and e.stat().st_mtime > moment]
    return found


def problem(files: Iterable[Path]) -> str | None:
    """Why a new image could not start with these files, as a sentence; None if nothing speaks against it."""
    for file in files:
        try:
            if file.suffix == ".py" and file.exists():
                compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            return f"{file}{line}: {getattr(error, 'msg', error)}."
        except OSError as error:
            return f"cannot read {file}: {error.strerror}."
    try:
        machine.settings_here()
    except AqueError as error:
        return str(error)
    return None


def problem_since(moment: float) -> str | None:
    """The same for whatever has changed after `moment` among the files of the modules that are imported here."""
    changed = []
    for file in own_files(list(sys.modules.values())):
        with suppress(OSError):
            if file.stat().st_mtime > moment:
                changed.append(file)
    return problem(changed)


class Watch:
    """Calls `on_change` once what this process has loaded since it `began` has changed on disk, and would load.

    `started` gives the modules whose functions were started as tasks, and when first. Times are seconds since 1970.
    """

    def __init__(self, began: float, started: Callable[[], Mapping[str, float]], on_change: Callable[[], None]) -> None:
        self._watchfiles = require()
        self._began = began
        self._started = started
        self._on_change = on_change
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aque-reload", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Nothing is called any more."""
        self._stop.set()
        self._thread.join(2)

    def _directories(self) -> dict[Path, float]:
        return directories(list(sys.modules.values()), self._began, self._started(), sys.path)

    def _run(self) -> None:
        seen: set[Path] = set()  # what has changed and would not load: until it does, or its next change
        looked: dict[Path, float] = {}  #: when what had changed in a watched directory was last seen
        while not self._stop.is_set():
            try:
                watched = self._directories()
                for changed in self._changes({**watched, **{p: looked[p] for p in watched if p in looked}}):
                    looked |= dict.fromkeys(watched, time.time())
                    seen |= changed
                    if changed and self._may_restart(seen):
                        self._on_change()
                        seen.clear()
            except Exception:
                logger.exception("watching for changes failed; it goes on")
                self._stop.wait(LOOK_SECONDS)

    def _changes(self, watched: Mapping[Path, float]) -> Iterator[set[Path]]:
        """Sets of files that have changed in the watched directories; ends when others should be watched."""
        config = machine.settings_file()
        places = {*watched, config.parent} if config.parent.is_dir() else set(watched)
        found = self._watchfiles.watch(
            *places,
            watch_filter=lambda _change, name: name.endswith(".py") or name == str(config),
            step=int(QUIET_SECONDS * 1000),
            debounce=int(LONGEST_SECONDS * 1000),
            stop_event=self._stop,
            rust_timeout=int(LOOK_SECONDS * 1000),
            yield_on_timeout=True,
            raise_interrupt=False,
            recursive=False,
        )
        first = True
        for changes in found:
            files = {Path(name) for _, name in changes}
            if first:  # written before the watch stood
                files |= set(changed_since(watched))
                first = False
            yield files
            if self._directories().keys() != watched.keys():
                return

    def _may_restart(self, changed: set[Path]) -> bool:
        if why := problem(sorted(changed)):
            logger.error("code has changed, but this worker goes on as it is: %s", why)
            return False
        logger.warning("code has changed: %s", ", ".join(sorted(map(str, changed))[:5]))
        return True
