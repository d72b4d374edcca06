"""What a block of a test sends to the database."""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from aque.store import Store


@contextmanager
def counted(store: Store) -> Iterator[list[str]]:
    """The statements that are executed inside the block."""
    seen: list[str] = []

    def see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    sa.event.listen(store.engine, "before_cursor_execute", see)
    try:
        yield seen
    finally:
        sa.event.remove(store.engine, "before_cursor_execute", see)
