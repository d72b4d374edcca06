"""`on`: a farm with a worker for each of the four brokers, which all tests of this directory share."""

from collections.abc import Iterator

import pytest

from aque.machine import user_name
from tests.worker.brokers import BROKERS, Brokered, of_the_run, working
from tests.worker.conftest import pytest_runtest_makereport
from tests.worker.farm import Farm

__all__ = ["pytest_runtest_makereport"]


@pytest.fixture(scope="package", params=BROKERS)
def brokered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokered]:
    """The servers are the run's: do not stop them."""
    directory, env = tmp_path_factory.mktemp("farm"), {"TEST_POOL_RESTARTS": "1"}
    if request.param == "aque+postgresql":
        env["AQUE_INGRESS_USER"] = user_name()  # root would have to say as whom; a file is one person's
    with (
        of_the_run(request, request.param, directory) as chosen,
        Farm(directory=directory, **chosen) as farm,
        working(farm, request.param, env=env) as on,
    ):
        yield on


@pytest.fixture
def on(brokered: Brokered) -> Iterator[Brokered]:
    """The shared farm, with a worker that lives; afterwards nothing is left to do and the doctor finds it sound."""
    with brokered.farm.entered():
        if not brokered.worker.running():
            brokered.start_worker()
        yield brokered
    brokered.kill_everything()
    assert brokered.farm.findings() == []
