"""The shop's data: SQLite, and a directory of small files, below SHOP_DATA."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS orders (id TEXT PRIMARY KEY, amount INTEGER, state TEXT);
CREATE TABLE IF NOT EXISTS stock (item TEXT PRIMARY KEY, n INTEGER);
CREATE TABLE IF NOT EXISTS journal (at REAL, what TEXT, about TEXT);
"""


def data():
    return Path(os.environ["SHOP_DATA"])


def execute(statement, *values):
    """Run one statement in a transaction of its own; its rows."""
    with closing(sqlite3.connect(data() / "shop.db", timeout=30)) as connection, connection:
        connection.executescript(SCHEMA)
        return connection.execute(statement, values).fetchall()


def note(what, about=""):
    """A line in the journal."""
    execute("INSERT INTO journal VALUES (julianday('now') * 86400, ?, ?)", what, str(about))


def journal(what):
    """(when, in seconds; about what) of the lines of a kind, in order."""
    return execute("SELECT at, about FROM journal WHERE what = ? ORDER BY rowid", what)
