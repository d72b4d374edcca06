"""A chord whose worker is killed: its body runs once, with every member's result."""

from pathlib import Path

from celery import chord

from tests.servers import wait_until
from tests.worker import celery_tasks as tasks
from tests.worker.farm import LIMIT_SECONDS, Farm

WIDTH = 2000


def test_the_body_of_a_wide_chord_runs_once_though_its_worker_is_killed(own_farm: Farm, tmp_path: Path) -> None:
    members, bodies = tmp_path / "members", tmp_path / "bodies"
    members.touch()
    result = chord(tasks.mark.s(n, str(members)) for n in range(WIDTH))(tasks.add_up.s(str(bodies)))
    worker = own_farm.start_worker("-c", "2", cpus=2)

    def ran() -> int:
        return members.read_bytes().count(b"\n")

    wait_until(lambda: ran() > WIDTH // 4, LIMIT_SECONDS, "a quarter of the members have run")
    worker.kill()
    assert ran() < WIDTH, "it was killed too late for this test"
    own_farm.start_worker("-c", "2", cpus=2, name="two")
    assert result.get(timeout=2 * LIMIT_SECONDS) == sum(range(WIDTH))
    assert bodies.read_text() == "body\n"
    assert {int(line) for line in members.read_text().split()} == set(range(WIDTH))
