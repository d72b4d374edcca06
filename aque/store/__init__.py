"""The table that is the truth: the only package that imports SQLAlchemy and holds SQL."""

from aque.store.controls import Scheduled, scheduled, stamped
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
from aque.store.groups import Tree
from aque.store.limits import LimitRow
from aque.store.recording import SWITCHED_OFF
from aque.store.refusals import Refusal
from aque.store.retention import Ages, Removed, Sizes
from aque.store.rows import (
    Call,
    Finding,
    Finished,
    Inherited,
    Kill,
    Killed,
    KnownCall,
    Orders,
    Released,
    StoredResult,
    WorkerRow,
)
from aque.store.store import Store, open_store, unchecked_store
from aque.store.transitions import CursorRow, Transition

__all__ = [
    "SWITCHED_OFF",
    "Ages",
    "Call",
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
    "Removed",
    "Scheduled",
    "Sizes",
    "Store",
    "StoredResult",
    "Transition",
    "Tree",
    "WorkerRow",
    "again",
    "attempt_write",
    "can_run_again",
    "is_conflict",
    "is_data_error",
    "one_statement",
    "open_store",
    "scheduled",
    "stamped",
    "transaction",
    "unchecked_store",
]
