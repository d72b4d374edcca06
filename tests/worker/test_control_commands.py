"""Celery's remote control with tasks of the table and ordinary ones: each command, on one broker.

`python -m tests.faults.control` tries the same on all four.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.control import CHECKS, names
from tests.worker.brokers import Brokered, served


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokered]:
    with served("aque+sqlite", tmp_path_factory.mktemp("farm"), env={"TEST_POOL_RESTARTS": "1"}) as brokered:
        yield brokered
        assert brokered.farm.findings() == []


@pytest.mark.parametrize("command", names())
def test_control(on: Brokered, tmp_path: Path, command: str) -> None:
    CHECKS[command](on, tmp_path)
