"""A worker in a thread of somebody else's process: Celery's test tools with an app of Aque's."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.worker.farm import ROOT

LIMIT = 120.0
PAGE = ROOT / "docs" / "testing.md"


def run_python(environment: dict[str, str], *words: str, cwd: Path = ROOT) -> str:
    """What a run of this interpreter prints; it succeeds."""
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_project_in_the_docs_passes_its_tests(tmp_path: Path, environment: dict[str, str]) -> None:
    files = re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["work.py", "conftest.py", "test_work.py"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    said = run_python(environment, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", cwd=tmp_path)
    assert "4 passed" in said


@pytest.mark.parametrize(("pool", "kind"), [("solo", "postgresql"), ("prefork", "sqlite")])
def test_nothing_is_left_of_a_worker_that_has_stopped(
    pool: str, kind: str, environment: dict[str, str], request: pytest.FixtureRequest
) -> None:
    cycles, broker = 5, []
    if kind == "postgresql":
        broker = [request.getfixturevalue("fresh_postgresql_url")]
        run_python({**environment, "AQUE_BROKER": broker[0]}, "-m", "aque.cli.main", "init")
    said = run_python(environment, "-m", "tests.faults.embedded", pool, str(cycles), *broker)
    found: dict[str, Any] = json.loads(said)
    assert found["others live"]
    first, last = found["first"], found["last"]
    grown = (last.pop("rss_bytes") - first.pop("rss_bytes")) / (cycles - 2)
    assert grown < 4 << 20
    assert last == first
    assert (last["threads"], last["children"], last["is_subreaper"]) == (["MainThread"], [], False)


def test_a_store_that_cannot_be_used_is_an_error_of_whoever_starts_the_worker(environment: dict[str, str]) -> None:
    script = """if True:
        import aque, celery.contrib.testing.tasks
        from aque.errors import AqueError
        from celery.contrib.testing.worker import start_worker
        for settings in ({"aque_broker": "sqlite:////nowhere/aque.db"}, {"aque_cpus": "many"}):
            app = aque.App("embedded")
            app.conf.update(settings, broker_url="memory://")
            try:
                with start_worker(app):
                    pass
            except AqueError as error:
                print(error)
    """
    said = run_python(environment, "-c", script)
    assert "/nowhere, which does not exist" in said
    assert "many" in said
