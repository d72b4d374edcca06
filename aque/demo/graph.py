"""What the demo submits: two jobs by `aque xargs`, and a graph of Python tasks that goes on from them."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aque
from aque.celery_app import Handle
from aque.demo import work
from aque.demo.private_farm import PrivateFarm
from aque.errors import AqueError

#: Directories of the standard library that are left out: tests, and what not every system installs.
LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "turtledemo")
#: Of a larger library the first so many files, so that the demo stays short.
MOST_FILES = 1000
#: Modules that are in no package are done in groups of this size, named first...last.
MODULES_TOGETHER = 24
#: Files for each command.
COMPRESSED_TOGETHER = 8
CHECKSUMS_TOGETHER = 50
#: About how fast `parse` is: with it the longest tasks start first.
PARSED_BYTES_PER_SECOND = 800_000

#: A shell's loop: $0 is the directory to write to, the files are $1, $2, ...
GZIP = 'for file do gzip -9 -c -- "$file" >"$0/$file.gz" || exit; done'
#: The same for a machine without gzip or sha256sum.
PYTHON_GZIP = """\
import gzip, pathlib, sys
for file in sys.argv[2:]:
    pathlib.Path(sys.argv[1], file + ".gz").write_bytes(gzip.compress(pathlib.Path(file).read_bytes()))
"""
PYTHON_SHA256 = """\
import hashlib, pathlib, sys
for file in sys.argv[1:]:
    print(hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() + "  " + file)
"""

BROKEN = "def answer():\n    return (6 * 7\n"


@dataclass(frozen=True, slots=True)
class Library:
    """The files that the report is about: paths relative to `directory`, by package."""

    directory: Path
    packages: dict[str, list[str]]
    left: int  #: files that were left out because there are more than MOST_FILES

    @property
    def files(self) -> list[str]:
        return [file for files in self.packages.values() for file in files]

    def size(self, files: list[str]) -> int:
        """Bytes."""
        return sum((self.directory / file).stat().st_size for file in files)


@dataclass(frozen=True, slots=True)
class Submitted:
    """What to expect of what was submitted."""

    report: Handle
    broken: Handle  #: the task that is made to fail
    explain: Handle  #: runs because it failed
    tidy: Handle  #: runs in any case
    verify: Handle  #: needs the whole machine
    jobs: dict[str, int]


def library() -> Library:
    """The source of the standard library of this Python. Raises AqueError if it is not installed."""
    directory = Path(sysconfig.get_path("stdlib"))
    files = sorted(_python_files(directory))
    if len(files) < 100:
        raise AqueError(
            f"the source of Python's standard library is not in {directory}: there is nothing to report about."
        )
    chosen = files[:MOST_FILES]
    packages: dict[str, list[str]] = {}
    modules = [file for file in chosen if "/" not in file]
    for start in range(0, len(modules), MODULES_TOGETHER):
        together = modules[start : start + MODULES_TOGETHER]
        packages[f"{together[0].removesuffix('.py')}{work.MODULES}{together[-1].removesuffix('.py')}"] = together
    for file in chosen:
        if "/" in file:
            packages.setdefault(file.partition("/")[0], []).append(file)
    return Library(directory, packages, len(files) - len(chosen))


def _python_files(directory: Path) -> Iterator[str]:
    for place, directories, files in os.walk(directory):
        # Packages only: no site-packages, no __pycache__, nothing hidden.
        directories[:] = [d for d in directories if d.isidentifier() and d not in (*LEFT_OUT, "__pycache__")]
        yield from (os.path.relpath(os.path.join(place, file), directory) for file in files if file.endswith(".py"))


def submit(farm: PrivateFarm, what: Library) -> Submitted:
    """Everything. The commands start at once; what depends on them waits for them."""
    files, directory = what.files, str(what.directory)
    archive = farm.directory / "archive"
    for folder in {archive / Path(file).parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    broken_file = farm.directory / "broken.py"
    broken_file.write_text(BROKEN)

    compress = _xargs(farm, what, "compress", ["-n", str(COMPRESSED_TOGETHER)], _gzip(archive))
    checksum = _xargs(farm, what, "checksum", ["-n", str(CHECKSUMS_TOGETHER), "--cpus", "0.5"], _sha256())
    checksums = [
        work.seal.AsyncResult(str(row["id"]))
        for row in aque.tasks({"job_id": checksum}, ["id", "pattern"])
        if row["pattern"] != "group"
    ]

    with aque.graph("report") as job:
        described = []
        for name, some in what.packages.items():
            counted = work.count.apply_async((directory, some), name=f"count {name}")
            expected = what.size(some) / PARSED_BYTES_PER_SECOND
            parsed = work.parse.apply_async((directory, some), name=f"parse {name}", duration=expected)
            described.append(work.describe.apply_async((name, counted, parsed), name=f"describe {name}"))
        whole = work.merge.apply_async((described,), name="merge")
        sealed = work.seal.apply_async((checksums,), name="seal")
        verify = work.verify.apply_async((directory, str(archive), files), name="verify", depends_on=compress)
        broken = work.parse.apply_async((str(farm.directory), [broken_file.name]), name="parse broken.py")
        explain = work.explain.apply_async((str(broken_file),), name="explain", after_failed=broken)
        tidy = work.tidy.apply_async((str(broken_file),), name="tidy", after_any=[broken, explain])
        report = work.report.apply_async((whole, verify, sealed, explain), name="report")
    jobs = {"compress": compress, "checksum": checksum, "report": job.id}
    return Submitted(report, broken, explain, tidy, verify, jobs)


def _xargs(farm: PrivateFarm, what: Library, name: str, options: list[str], command: list[str]) -> int:
    """`aque xargs` on all files, in their directory; the id of the job."""
    given = b"".join(os.fsencode(file) + b"\0" for file in what.files)
    words = ("xargs", "-0", *options, "--name", name, "--no-wait", *command)
    return int(farm.aque(*words, cwd=what.directory, given=given))


def _gzip(archive: Path) -> list[str]:
    if shutil.which("gzip"):
        return ["sh", "-c", GZIP, str(archive)]
    return [sys.executable, "-I", "-c", PYTHON_GZIP, str(archive)]


def _sha256() -> list[str]:
    if shutil.which("sha256sum"):
        return ["sha256sum", "--"]
    return [sys.executable, "-I", "-c", PYTHON_SHA256]
