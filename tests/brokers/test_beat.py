"""`celery beat` with tasks of the table."""

import signal
import sys
from pathlib import Path
from typing import Any

from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.brokers import Brokered
from tests.worker.farm import LIMIT_SECONDS


def test_a_schedule_runs_tasks_of_the_table_once_a_tick_beside_ordinary_ones(on: Brokered, tmp_path: Path) -> None:
    words = ["-A", "tests.worker.beaten", "beat", "-l", "info", "-s", str(tmp_path / "schedule")]
    env = {"TEST_TICKS": str(tmp_path / "ticks")}
    beat = on.farm.start_program(sys.executable, "-m", "celery", *words, env=env)

    def count(kind: str) -> int:
        path = tmp_path / f"ticks.{kind}"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def sent(kind: str) -> int:
        return beat.log.read_text().count(f"Sending due task {kind}")

    def rows() -> list[dict[str, Any]]:
        with on.farm.store.connect() as connection:
            return list(on.farm.store.tasks(connection, {"name": tasks.record.name}, ["state", "priority"]))

    wait_until(lambda: min(count("table"), count("ordinary")) >= 3, LIMIT_SECONDS, "three ticks of each")
    assert beat.end(signal.SIGTERM)
    wait_until(lambda: {row["state"] for row in rows()} == {"success"}, LIMIT_SECONDS, "all have run")
    assert {row["priority"] for row in rows()} == {3}
    assert len(rows()) == count("table")
    for kind in ("table", "ordinary"):  # the stop may have come when the last was announced and not yet sent
        wait_until(lambda kind=kind: count(kind) >= sent(kind) - 1, LIMIT_SECONDS, f"{sent(kind)} of {kind}")  # type: ignore[misc]
        assert count(kind) <= sent(kind)
