"""A Celery project with a test suite of its own passes it on plain Celery, and after one line (see shop/celery.py) on Aque."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.servers import Redis
from tests.worker.brokers import BROKERS, of_the_run
from tests.worker.farm import Farm

PROJECT = Path(__file__).parent


def run_suite(environment: Mapping[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    words = ["--rootdir", ".", "--confcutdir", ".", "--basetemp", str(directory)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-p", "no:cacheprovider", "-p", "no:xdist"],
        env={**environment, "PYTEST_ADDOPTS": ""},
        cwd=PROJECT / "suite",
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def passed(done: subprocess.CompletedProcess[str]) -> int:
    """How many tests passed, if all did."""
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    (summary,) = [line for line in done.stdout.splitlines() if " passed" in line]
    return int(summary.split(" passed")[0].split()[-1])


def test_the_suite_passes_on_plain_celery(redis_server: Redis, tmp_path: Path) -> None:
    redis = redis_server.fresh_url()
    environment = {**os.environ, "SHOP_WITH": "celery", "SHOP_BROKER": redis, "SHOP_RESULTS": redis}
    assert passed(run_suite(environment, tmp_path / "suite")) > 20


@pytest.mark.parametrize("broker", BROKERS)
def test_the_suite_passes_on_aque(request: pytest.FixtureRequest, broker: str, tmp_path: Path) -> None:
    with of_the_run(request, broker, tmp_path) as chosen, Farm(directory=tmp_path, **chosen) as farm:
        done = run_suite({**farm.environment, "SHOP_WITH": "aque"}, tmp_path / "suite")
        assert passed(done) > 20
        assert farm.findings() == []


def test_one_line_is_all_the_difference() -> None:
    sources = {path.name: path.read_text() for path in (PROJECT / "shop").glob("*.py")}
    assert [file for file, text in sources.items() if "SHOP_WITH" in text] == ["celery.py"]
    assert [file for file, text in sources.items() if "aque" in text] == ["celery.py"]
    assert sum("aque.setup(" in line for line in sources["celery.py"].splitlines()) == 1
