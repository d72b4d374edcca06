"""`farm`: a store with a worker that the tests of a module share. `own_farm`: a store of the test's own, without one.

Each test that touches a store ends with the doctor; the logs of the workers are shown when one fails.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker.brokers import Brokered, of_the_run
from tests.worker.farm import Farm


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    report = (yield).get_result()
    for value in getattr(item, "funcargs", {}).values():
        farm = value.farm if isinstance(value, Brokered) else value
        if report.failed and isinstance(farm, Farm):
            report.sections.append(("workers", farm.log()))
            break


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served_farm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """A farm on each kind of database, with one worker of four CPUs and three pool children."""
    directory = tmp_path_factory.mktemp("farm")
    with of_the_run(request, f"aque+{request.param}", directory) as chosen, Farm(directory=directory, **chosen) as farm:
        farm.start_worker("-c", "3", cpus=4, memory="1G")
        yield farm


@pytest.fixture
def farm(served_farm: Farm) -> Iterator[Farm]:
    """The shared farm; afterwards its worker lives, nothing is left to do and the doctor finds it sound."""
    with served_farm.entered():
        yield served_farm
    served_farm.kill_everything()  # a test that failed must not be the next one's trouble
    assert [worker.name for worker in served_farm.workers if not worker.running()] == []
    assert served_farm.findings() == []


@pytest.fixture
def own_farm(made_store_url: str, tmp_path: Path) -> Iterator[Farm]:
    """A farm without a worker; the doctor finds it sound after the test, and no process of it is left."""
    with Farm(made_store_url, tmp_path) as farm, farm.entered():
        yield farm
        assert farm.findings() == []
