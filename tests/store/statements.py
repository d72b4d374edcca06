"""What a block of a test sends to the database."""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from aque.store import Store, engine


@contextmanager
def counted(store: Store) -> Iterator[list[str]]:
    """The statements that are executed inside the block."""
    seen: list[str] = []

    def see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    send = engine._send

    def see_and_send(cursor: object, text: str, values: object) -> None:
        seen.append(text)
        send(cursor, text, values)

    sa.event.listen(store.engine, "before_cursor_execute", see)
    engine._send = see_and_send
    try:
        yield seen
    finally:
        engine._send = send
        sa.event.remove(store.engine, "before_cursor_execute", see)
