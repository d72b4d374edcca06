"""The shop's tests: against a real worker, which is started once for all of them, as is beat for the test that wants it.

SHOP_BROKER=redis://... SHOP_RESULTS=redis://... python -m pytest
"""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PROCESSES = {**os.environ, "PYTHONPATH": str(ROOT), "SHOP_TRACE": "worker"}
#: Nothing takes a tenth of it.
LIMIT = 60


def wait_until(condition, limit=LIMIT):
    deadline = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit} s"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="session", autouse=True)
def shop_data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shop")
    os.environ["SHOP_DATA"] = PROCESSES["SHOP_DATA"] = str(directory)
    os.environ["SHOP_TRACE"] = "suite"
    return directory


def start(directory, *words):
    log = (directory / f"log-{words[0]}").open("wb")
    command = [sys.executable, "-m", "celery", "-A", "shop", *words, "-l", "info"]
    return subprocess.Popen(command, cwd=directory, env=PROCESSES, stdout=log, stderr=subprocess.STDOUT)


def stop(process):
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


@pytest.fixture(scope="session", autouse=True)
def worker(shop_data):
    from shop import celery_app

    process = start(shop_data, "worker", "-Q", "shop,reports", "-c", "2", "-n", "shop@test")
    try:
        wait_until(lambda: process.poll() is not None or celery_app.control.ping(timeout=0.5))
        assert process.poll() is None, (shop_data / "log-worker").read_text()
        yield process
        assert process.poll() is None, "the worker has died"
    finally:
        stop(process)


@pytest.fixture
def beat(shop_data, worker):
    process = start(shop_data, "beat", "-s", str(shop_data / "schedule"))
    yield process
    stop(process)


@pytest.fixture
def order():
    """The number of a new order."""
    return uuid.uuid4().hex[:8]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed and (directory := item.funcargs.get("shop_data")):
        for log in directory.glob("log-*"):
            report.sections.append((log.name, log.read_text(errors="replace")[-6000:]))
