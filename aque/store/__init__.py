"""The table that is the truth: the only package that imports SQLAlchemy and holds SQL."""

from aque.store.engine import (
    DatabaseError,
    again,
    attempt_write,
    can_run_again,
    is_conflict,
    is_data_error,
    one_statement,
    transaction,
)
from aque.store.limits import LimitRow
from aque.store.recording import SWITCHED_OFF
from aque.store.refusals import Refusal
from aque.store.store import (
    Finding,
    Finished,
    Inherited,
    Kill,
    Killed,
    KnownCall,
    Orders,
    Released,
    Store,
    StoredResult,
    WorkerRow,
    open_store,
    unchecked_store,
)
from aque.store.transitions import CursorRow, Transition

__all__ = [
    "SWITCHED_OFF",
    "CursorRow",
    "DatabaseError",
    "Finding",
    "Finished",
    "Inherited",
    "Kill",
    "Killed",
    "KnownCall",
    "LimitRow",
    "Orders",
    "Refusal",
    "Released",
    "Store",
    "StoredResult",
    "Transition",
    "WorkerRow",
    "again",
    "attempt_write",
    "can_run_again",
    "is_conflict",
    "is_data_error",
    "one_statement",
    "open_store",
    "transaction",
    "unchecked_store",
]
