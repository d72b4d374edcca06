"""`aque patterns`: list the patterns that there are."""

import inspect
import sys
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint

import click

from aque import patterns
from aque.cli.show import as_json, columns
from aque.errors import BadInput


@click.command(name="patterns")
@click.option("--json", "as_lines_of_json", is_flag=True, help="Print one JSON object a line.")
def command(as_lines_of_json: bool) -> int:
    """List the patterns that packages bring to this Python, each with its package and what it does.

    Each is loaded: one that cannot be is listed with the error, and the exit status is 1. A worker needs them in its own
    Python.

    \b
    aque patterns
    aque submit --pattern shell -- gzip -9 file
    """
    rows = [_row(name, point) for name, point in sorted(patterns.installed().items())]
    if as_lines_of_json:
        for row in rows:
            print(as_json(row))
    elif not rows:
        print(f"no package brings patterns to {sys.executable}.")
    else:
        table = [[str(row[column] or "") for column in ("name", "package", "class", "summary")] for row in rows]
        for row, line in zip(rows, table, strict=True):
            line[3] = f"broken: {row['error']}" if row["error"] else line[3]
        print("\n".join(columns(["name", "package", "class", "does"], table)))
    return 1 if any(row["error"] for row in rows) else 0


def _row(name: str, point: EntryPoint) -> dict[str, object]:
    package = "" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    row: dict[str, object] = {"name": name, "package": package, "class": point.value, "summary": None, "error": None}
    try:
        with redirect_stdout(sys.stderr):
            found = patterns.load(name)
    except BadInput as error:
        return row | {"error": str(error)}
    lines = (inspect.getdoc(type(found)) or "").splitlines()
    return row | {"summary": lines[0] if lines else ""}
