"""`celery beat` with tasks of the table."""

import signal
import sys
from pathlib import Path

from tests.servers import wait_until
from tests.worker.farm import LIMIT_SECONDS, Farm

APP = "tests.worker.beaten"


def test_a_schedule_runs_tasks_of_the_table_once_a_tick_beside_ordinary_ones(tmp_path: Path) -> None:
    ticks = tmp_path / "ticks"
    with Farm(f"sqlite:///{tmp_path / 'aque.db'}", tmp_path) as farm, farm.entered():
        env = {"TEST_TICKS": str(ticks)}
        farm.start_worker("-c", "1", app=APP, env=env)
        schedule = str(tmp_path / "schedule")
        beat = farm.start_program(
            sys.executable, "-m", "celery", "-A", APP, "beat", "-l", "info", "-s", schedule, env=env
        )

        def count(line: str) -> int:
            return ticks.read_text().split().count(line) if ticks.exists() else 0

        wait_until(lambda: min(count("table"), count("ordinary")) >= 3, LIMIT_SECONDS, "three ticks of each")
        assert beat.end(signal.SIGTERM)
        sent = beat.log.read_text().count("Sending due task table")
        wait_until(lambda: farm.counts() == {"success": sent}, LIMIT_SECONDS, f"{sent} rows, and no more")
        assert count("table") == sent
        with farm.store.connect() as connection:
            rows = list(farm.store.tasks(connection, None, ["name", "priority"]))
        assert {(row["name"], row["priority"]) for row in rows} == {(f"{APP}.tick", 3)}
        assert farm.findings() == []
