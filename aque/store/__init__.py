"""The table that is the truth: the only package that imports SQLAlchemy and holds SQL."""

from aque.store.engine import again, can_run_again, transaction
from aque.store.store import Finding, Finished, Kill, Killed, Released, Store, StoredResult, WorkerRow, open_store

__all__ = [
    "Finding",
    "Finished",
    "Kill",
    "Killed",
    "Released",
    "Store",
    "StoredResult",
    "WorkerRow",
    "again",
    "can_run_again",
    "open_store",
    "transaction",
]
