"""A broker that is away for a moment, in the middle of work: `python -m tests.faults.brokers` does it for longer, and with the
store as the broker, of which tests/transport has the rest."""

from pathlib import Path

import pytest

from tests.conftest import start
from tests.faults.brokers import outage
from tests.servers import RabbitMQ, Redis, Server
from tests.worker.brokers import served


@pytest.mark.parametrize(("name", "server"), [("rabbitmq", RabbitMQ), ("redis", Redis)])
def test_nothing_is_lost_or_run_twice_while_the_broker_is_away(name: str, server: type[Server], tmp_path: Path) -> None:
    start(server)  # skips, or fails, where it is not installed
    with served(name, tmp_path) as on:
        report = outage(on, tmp_path, 2.0)
        assert on.farm.findings() == []
    assert (report.lost, report.twice, report.survived) == (0, 0, True), report
    assert report.meanwhile > 0, report
