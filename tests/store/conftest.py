"""A store for the suite below, on both databases; every test ends with the doctor."""

from collections.abc import Iterator

import pytest

from aque import settings
from aque.store import Store, open_store


@pytest.fixture
def store(made_store_url: str) -> Iterator[Store]:
    opened = open_store(settings.load({"AQUE_BROKER": made_store_url}))
    yield opened
    with opened.connect() as connection:
        assert opened.doctor(connection) == []
    opened.close()
