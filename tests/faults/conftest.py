"""The farms of tests/worker, for tests in which something dies."""

from tests.worker.conftest import own_farm, pytest_runtest_makereport

__all__ = ["own_farm", "pytest_runtest_makereport"]
