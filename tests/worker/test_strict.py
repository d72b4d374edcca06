"""`strict`: what no live worker could ever run is refused, and nothing of it is written."""

import pytest

import aque
from aque.errors import BadInput
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, Farm


def test_without_a_worker_everything_strict_is_refused(own_farm: Farm) -> None:
    with pytest.raises(BadInput, match=r"no live worker\. Nothing was submitted"):
        aque.shell(["true"], strict=True)
    assert own_farm.counts() == {}


def test_a_worker_that_could_run_it_is_enough_and_other_wishes_are_refused(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=2, tags="fast")
    done = aque.shell(["true"], cpus=2, tags="fast", strict=True)
    with pytest.raises(BadInput, match="unsatisfiable: needs 64 cpus, largest worker has 2"):
        aque.shell(["true"], cpus=64, strict=True)
    with pytest.raises(BadInput, match="has no tag slow"):
        tasks.add.apply_async((1, 2), tags="slow", strict=True)
    with pytest.raises(BadInput, match="no worker serves queue 'other'"), aque.graph():
        aque.shell(["true"])
        aque.shell(["true"], queue="other", strict=True)
    assert done.get(timeout=LIMIT_SECONDS)["exit_code"] == 0
    assert own_farm.counts() == {"success": 1}
