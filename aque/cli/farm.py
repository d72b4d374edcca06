"""The farm that a verb works on: its settings, its store, and the workers that live on it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aque.chooser import Place
from aque.machine import settings_here
from aque.settings import Settings
from aque.store import Store, open_store

#: So many ids go into one query: databases bound the parameters of a statement.
BATCH = 1000


@dataclass(frozen=True, slots=True)
class Farm:
    """An open store and the settings that led to it."""

    settings: Settings
    store: Store

    def places(self) -> list[Place]:
        """The live workers."""
        with self.store.connect() as connection:
            return [row.place for row in self.store.workers(connection) if row.is_live]

    def rows(self, ids: Sequence[int], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        """`fields` of those of `ids` that there are, in id order within each batch."""
        with self.store.connect() as connection:
            for batch in batches(ids):
                yield from self.store.tasks(connection, {"id": batch}, fields)

    def members(self, ids: Sequence[int]) -> list[int]:
        """`ids` with every job replaced by the tasks that are its members."""
        jobs = [row["id"] for row in self.rows(ids, ["id", "pattern"]) if row["pattern"] == "group"]
        if not jobs:
            return list(ids)
        with self.store.connect() as connection:
            found = [
                row["id"] for batch in batches(jobs) for row in self.store.tasks(connection, {"job_id": batch}, ["id"])
            ]
        left_out = set(jobs)
        return [i for i in dict.fromkeys([*ids, *found]) if i not in left_out]


@contextmanager
def open_farm() -> Iterator[Farm]:
    """The farm that the environment and the configuration name. Raises BadSetting or a StoreError."""
    settings = settings_here()
    store = open_store(settings)
    try:
        yield Farm(settings, store)
    finally:
        store.close()


def batches(ids: Iterable[int]) -> Iterator[list[int]]:
    """`ids` in lists that fit into one query each."""
    listed = list(ids)
    for start in range(0, len(listed), BATCH):
        yield listed[start : start + BATCH]
