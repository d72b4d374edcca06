"""Statements that run for each task: compiled once, given to the driver directly, and prepared on PostgreSQL.

Of a statement about one task its execution is the least part: SQLAlchemy's `execute` takes 0.1 ms of CPU, PostgreSQL's parser
and planner 0.1 to 0.5 ms, and what they do is the same each time.
"""

import time
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import sqlalchemy as sa

from aque.store.engine import run_text

#: PostgreSQL: prepared for this use of it on a connection and later ones: a program that runs a statement once gains nothing.
PREPARE_FROM = 3
#: A plan is made anew after so long: a table that was empty then may have 100,000 rows now, without statistics to say so.
PLAN_SECONDS = 1.0

#: In the `info` of a connection: what is known of its session.
SESSION = "aque_hot"
#: What PostgreSQL says where a session has forgotten what was prepared, or a table is not as it was then (SQLSTATE).
FORGOTTEN = frozenset({"26000", "0A000"})

Process = Callable[[Any], Any] | None

#: Never the same twice: who was interrupted after a PREPARE does not know that it was done.
_numbers = count(1)


class _Hot:
    """A statement as the driver wants it, for one dialect."""

    def __init__(self, statement: Any, dialect: sa.Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self.text: str = compiled.string
        binds = {compiled.bind_names[bind]: bind for bind in compiled.bind_names}
        self.order: list[str] = list(compiled.positiontup or ())
        #: What the caller gives; anything else in the statement is a constant.
        self.parameters: list[tuple[str, Process]] = []
        self.constants: dict[str, Any] = {}
        self._types: list[str] = []
        for name, bind in binds.items():
            process = bind.type.dialect_impl(dialect).bind_processor(dialect)
            if bind.required:
                self.parameters.append((name, process))
                self._types.append(dialect.type_compiler_instance.process(bind.type))
            else:
                self.constants[name] = process(bind.value) if process else bind.value
        self._columns = list(statement.exported_columns)
        names = [column.key for column in self._columns]
        self._make_row: Callable[[Any], Any] = namedtuple("Row", names)._make  # type: ignore[attr-defined]
        #: By position, of the columns that are not as the driver gives them; the first result says which these are.
        self._processes: list[tuple[int, Callable[[Any], Any]]] | None = None

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the caller gives, as the driver wants it."""
        return {name: process(given[name]) if process else given[name] for name, process in self.parameters}

    def prepare(self, connection: sa.Connection) -> str:
        """PostgreSQL: prepare it in this session; returns the text that executes it."""
        as_is = connection.dialect.loaded_dbapi.extensions.AsIs
        numbered = {name: as_is(f"${n}") for n, (name, _) in enumerate(self.parameters, 1)}
        text = connection.connection.cursor().mogrify(self.text, self.constants | numbered).decode()
        types = f"({', '.join(self._types)})" if self._types else ""
        name = f"aque_{next(_numbers)}"
        run_text(connection, f"PREPARE {name} {types} AS {text}")
        marks = ", ".join(f"%({name})s" for name, _ in self.parameters)
        return f"EXECUTE {name} ({marks})" if marks else f"EXECUTE {name}"

    def rows(self, cursor: Any, dialect: sa.Dialect) -> list[Any]:
        """What the driver has found, with the names and types of the statement's columns."""
        if self._processes is None:
            kinds = [column.type.dialect_impl(dialect) for column in self._columns]
            codes = [column[1] for column in cursor.description]
            all_of_them = [kind.result_processor(dialect, code) for kind, code in zip(kinds, codes, strict=True)]
            self._processes = [(i, process) for i, process in enumerate(all_of_them) if process]
        made = []
        for row in cursor.fetchall():
            values = list(row)
            for i, process in self._processes:
                values[i] = process(values[i])
            made.append(self._make_row(values))
        return made


@dataclass(slots=True)
class _Session:
    """What is known of a connection to PostgreSQL."""

    uses: dict[_Hot, int] = field(default_factory=dict)
    calls: dict[_Hot, str] = field(default_factory=dict)  #: of what is prepared, what executes it
    planned_at: float = 0.0  #: the oldest plan, at most


_hot: dict[tuple[Any, str], _Hot] = {}


def run(connection: sa.Connection, statement: Any, parameters: Mapping[str, Any]) -> list[Any]:
    """What `connection.execute(statement, parameters).all()` returns, and raises, as named tuples. The statement is one of
    those that `statements` makes once; its parameters are all given, and none is an expanding one."""
    dialect = connection.dialect
    hot = _hot.get((statement, dialect.name))
    if hot is None:
        hot = _hot[statement, dialect.name] = _Hot(statement, dialect)
    values = hot.values(parameters)
    if dialect.name == "sqlite":
        values |= hot.constants
        cursor = run_text(connection, hot.text, [values[name] for name in hot.order])
    else:
        cursor = _run_postgresql(connection, hot, values)
    return hot.rows(cursor, dialect) if cursor.description else []


def _run_postgresql(connection: sa.Connection, hot: _Hot, values: dict[str, Any]) -> Any:
    session: _Session = connection.info.setdefault(SESSION, _Session())
    text = session.calls.get(hot)
    if text is None:
        uses = session.uses[hot] = session.uses.get(hot, 0) + 1
        if uses < PREPARE_FROM:
            return run_text(connection, hot.text, values | hot.constants)
        text = session.calls[hot] = hot.prepare(connection)
    now = time.monotonic()
    if now - session.planned_at > PLAN_SECONDS:
        session.planned_at = now
        text = f"DISCARD PLANS; {text}"
    try:
        return run_text(connection, text, values)
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "pgcode", None) in FORGOTTEN:
            connection.info.pop(SESSION, None)
        raise
