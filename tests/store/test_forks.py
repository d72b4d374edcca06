"""A child that is forked while other threads use SQLite can use it, too."""

import os
import threading
from pathlib import Path

import pytest

from aque import settings
from aque.store import open_store
from tests.servers import wait_until

CHILDREN = 8


@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_that_was_forked_while_others_wrote_can_write(tmp_path: Path) -> None:
    configured = settings.load({"AQUE_BROKER": f"sqlite:///{tmp_path / 'aque.db'}"})
    store = open_store(configured)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            with store.connect() as connection:
                store.reserve_ids(connection, 1)
            with store.begin() as connection:
                store.reserve_ids(connection, 1)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(CHILDREN):
            child = os.fork()
            if child == 0:
                with open_store(configured).begin() as connection:
                    store.reserve_ids(connection, 1)
                os._exit(0)
            ended = wait_until(lambda child=child: os.waitpid(child, os.WNOHANG)[0], 60, "the child has written")
            assert ended == child
    finally:
        over.set()
        for thread in threads:
            thread.join()
        store.close()
