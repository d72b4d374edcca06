"""The broker is away for 10 s in the middle of work, or hangs. `python -m tests.faults.brokers` prints what that does."""

from pathlib import Path

import pytest

from tests.conftest import start
from tests.faults.brokers import outage
from tests.servers import PostgreSQL, RabbitMQ, Redis
from tests.worker.brokers import BROKERS, served

SERVERS = {"aque+postgresql": PostgreSQL, "rabbitmq": RabbitMQ, "redis": Redis}
SECONDS = 10.0


def skip_without(broker: str) -> None:
    if broker in SERVERS:
        start(SERVERS[broker])  # skips, or fails, where it is not installed


@pytest.mark.parametrize("broker", BROKERS)
def test_while_the_broker_is_away_work_goes_on_and_afterwards_the_worker_obeys_as_before(
    broker: str, tmp_path: Path
) -> None:
    skip_without(broker)
    with served(broker, tmp_path) as on:
        report = outage(on, tmp_path, SECONDS)  # raises if remote control or a result stays away
        assert (report.lost, report.twice, report.survived, report.events_again) == (0, 0, True, True), report
        if broker != "aque+postgresql":  # which is the store, too
            assert report.meanwhile > 0, report
        on.worker.stop()
        assert on.farm.findings() == []


def test_a_worker_stops_although_rabbitmq_hangs(tmp_path: Path) -> None:
    skip_without("rabbitmq")
    with served("rabbitmq", tmp_path) as on:
        assert on.server is not None
        on.server.pause()
        on.worker.stop()
        on.server.resume()
