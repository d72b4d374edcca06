"""What people type all day starts fast: without Celery, and without the verbs that were not called."""

import subprocess
import sys

import pytest

from tests.cli.conftest import Aque


def imported(aque: Aque, *words: str) -> set[str]:
    """The modules that a run imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "aque.cli.main", *words],
        capture_output=True,
        text=True,
        cwd=aque.cwd,
        env=aque.environment,
        check=False,
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize(
    "words",
    [
        ("--version",),
        ("status",),
        ("output", "@last"),
        ("wait", "--timeout", "0", "@last"),
        ("explain", "@last"),
        ("kill", "@last"),
        ("set", "@last", "priority=1"),
        ("workers",),
        ("doctor",),
        ("patterns",),
        ("events",),
        ("init",),
        ("submit", "--", "true"),
        ("xargs", "--no-wait", "true"),
    ],
    ids=lambda words: words[0],
)
def test_a_verb_starts_without_celery(aque, words):
    aque.submit("--", "true")
    modules = imported(aque, *words)
    assert "click" in modules
    assert {name.partition(".")[0] for name in modules} & {"celery", "kombu"} == set()


def test_only_the_verb_that_is_called_is_imported(aque):
    assert {name for name in imported(aque, "--version") if name.startswith("aque.cli.")} == {"aque.cli.show"}
    assert "aque.cli.xargs" not in imported(aque, "status")


def test_the_version_needs_no_database_driver(aque):
    assert not {"sqlalchemy", "psycopg2"} & imported(aque, "--version")
