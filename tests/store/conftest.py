"""A store for the suite below, on both databases; every test ends with the doctor."""

from collections.abc import Iterator

import pytest

from aque import settings
from aque.store import Store, open_store, schema
from aque.store.engine import open_engine


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    configured = settings.load({"AQUE_BROKER": store_url})
    schema.upgrade(open_engine(configured.store_url))
    opened = open_store(configured)
    yield opened
    with opened.connect() as connection:
        assert opened.doctor(connection) == []
    opened.close()
