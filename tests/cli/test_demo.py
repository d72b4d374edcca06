"""`aque demo`: it reports, checks itself, fails loudly, and leaves nothing behind, whatever the environment says."""

import gzip
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from aque.demo import figures, graph
from aque.demo.figures import Run
from tests.servers import wait_until

AQUE = Path(sys.executable).with_name("aque")


class Demo:
    """A run of `aque demo` among settings that lead elsewhere, with a temporary directory of its own."""

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self.temporary, self.home, self.config = (directory / name for name in ("tmp", "home", "config"))
        for made in (self.temporary, self.home, self.config / "aque"):
            made.mkdir(parents=True)
        (self.config / "aque" / "aque.toml").write_text('broker = "postgresql://nobody@127.0.0.1:1/none"\n')
        self.out = directory / "out"
        foreign = {
            "AQUE_BROKER": "postgresql://nobody@127.0.0.1:1/none",
            "AQUE_CPUS": "-3",
            "AQUE_TASK_ID": "7",
            "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
        }
        places = {
            "TMPDIR": self.temporary,
            "HOME": self.home,
            "XDG_CONFIG_HOME": self.config,
            "XDG_STATE_HOME": self.home,
        }
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [AQUE, "demo"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.home,
                env={**environment, **foreign, **{name: str(path) for name, path in places.items()}},
            )

    @property
    def said(self) -> str:
        return self.out.read_text()

    def wait_for_work(self) -> psutil.Process:
        """Until its tasks run; its worker."""
        wait_until(lambda: "CPUs reserved" in self.said or self.process.poll() is not None, what="progress")
        assert self.process.poll() is None, self.said
        (worker,) = (
            child
            for child in psutil.Process(self.process.pid).children()
            if "worker" in " ".join(child.cmdline())  # and not the `aque` that it may run just now
        )
        return worker

    def end(self) -> int:
        """Its exit status, when nothing is left of it."""
        status = self.process.wait(150)
        wait_until(lambda: not self.processes(), what=f"the end of {self.processes()}")
        assert list(self.temporary.iterdir()) == []
        assert list(self.home.iterdir()) == []
        assert "Traceback" not in self.said.partition("the end of the worker's log:")[0]
        return status

    def processes(self) -> list[psutil.Process]:
        """What lives in its temporary directory."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR", "").startswith(str(self.temporary)):
                    found.append(process)
            except psutil.Error:
                pass
        return found


@pytest.fixture
def demo(environment: dict[str, str], tmp_path: Path) -> Iterator[Demo]:
    run = Demo({name: value for name, value in environment.items() if not name.startswith("AQUE_")}, tmp_path)
    yield run
    for process in run.processes():
        process.kill()
    run.process.wait()


def test_it_reports_and_what_it_reports_is_true(demo: Demo) -> None:
    assert demo.end() == 0, demo.said
    said = demo.said
    assert "WRONG" not in said
    lines, files = (int(re.findall(rf"([\d,]+)  {what}\n", said)[0].replace(",", "")) for what in ("lines", "files"))
    library = graph.library()
    assert files == len(library.files) > 100
    assert lines == sum((library.directory / file).read_bytes().count(b"\n") for file in library.files)
    assert re.search(r"commands +\d+: \d+ success\n", said)
    assert re.search(r"Python tasks +\d+: \d+ success, 1 error\n", said)
    assert re.search(r"longest path \d+\.\d s in \d+ tasks", said)
    assert re.search(r"ok +aque doctor: clean\n", said)
    assert re.search(r"after_failed then ran explain \(\d+\), after_any tidy \(\d+\)\n", said)


def test_ctrl_c_leaves_nothing_behind(demo: Demo) -> None:
    demo.wait_for_work()
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == 130
    assert demo.said.endswith("aque: interrupted.\n")


def test_a_worker_that_dies_fails_it_with_the_end_of_the_log(demo: Demo) -> None:
    demo.wait_for_work().kill()
    assert demo.end() == 1
    assert "the end of the worker's log:" in demo.said
    assert demo.said.endswith("aque: the worker has ended with status -9, before its work was done.\n")


def test_machines_without_gzip_and_sha256sum_get_the_same_files(tmp_path: Path) -> None:
    for folder in ("here/a", "archive/a"):
        (tmp_path / folder).mkdir(parents=True)
    content = os.urandom(1000)
    (tmp_path / "here" / "a" / "b.py").write_bytes(content)
    run = [sys.executable, "-I", "-c"]
    subprocess.run([*run, graph.PYTHON_GZIP, tmp_path / "archive", "a/b.py"], cwd=tmp_path / "here", check=True)
    assert gzip.decompress((tmp_path / "archive" / "a" / "b.py.gz").read_bytes()) == content
    sums = subprocess.check_output([*run, graph.PYTHON_SHA256, "a/b.py"], cwd=tmp_path / "here", text=True)
    assert sums == f"{hashlib.sha256(content).hexdigest()}  a/b.py\n"


# -- figures --------------------------------------------------------------------------------------------------------------


def runs(*given: Run) -> dict[int, Run]:
    return {run.id: run for run in given}


def test_cpus_that_pass_from_one_task_to_the_next_count_once() -> None:
    use = figures.cpu_use([Run(1, "a", Fraction(2), 0.0, 1.0), Run(2, "b", Fraction(2), 1.0, 3.0)])
    assert (use.peak, use.average, use.seconds) == (2, 2.0, 3.0)


def test_cpus_of_tasks_that_overlap_add_up_and_the_peak_names_them() -> None:
    use = figures.cpu_use(
        [
            Run(1, "a", Fraction(1), 0.0, 4.0),
            Run(2, "b", Fraction(1, 2), 1.0, 2.0),
            Run(3, "job", Fraction(0), 4.0, 4.0),
        ]
    )
    assert (use.peak, use.at_peak, use.average) == (Fraction(3, 2), (1, 2), 4.5 / 4)


def test_nothing_ran_is_no_use_and_no_path() -> None:
    assert figures.cpu_use([]).peak == 0
    assert figures.longest_path({}) == []


def test_the_longest_path_is_the_one_with_most_running_time_not_most_tasks() -> None:
    cpus = Fraction(1)
    found = figures.longest_path(
        runs(
            Run(1, "short", cpus, 0.0, 1.0),
            Run(2, "short too", cpus, 1.0, 2.0, (1,)),
            Run(3, "long", cpus, 0.0, 9.0),
            Run(4, "end", cpus, 9.0, 10.0, (2, 3)),
        )
    )
    assert [run.name for run in found] == ["long", "end"]


def test_a_start_before_the_end_of_a_dependency_is_found() -> None:
    early = Run(2, "early", Fraction(1), 0.5, 2.0, (1,))
    upstream = Run(1, "upstream", Fraction(1), 0.0, 1.0)
    assert list(figures.out_of_order(runs(upstream, early))) == [(early, upstream)]
