"""As whom a task runs, and with which environment."""

from dataclasses import replace

import pytest

from aque import identity, settings
from aque.chooser import Place, is_own, runs_in_pool, why_never
from aque.values import Pattern, Requirement
from tests.unit.test_chooser import PLACE

ROOT = replace(PLACE, user="root", switches_user=True)
SERVICE = replace(PLACE, user="farm")
PERSONAL = PLACE
TASK = Requirement("celery", Pattern.PYTHON, user="alice")
DEFAULTS = settings.load({})


@pytest.mark.parametrize(("place", "own"), [(PERSONAL, True), (SERVICE, False), (ROOT, False)])
def test_only_in_a_store_of_one_person_everything_is_the_workers_own(place: Place, own: bool) -> None:
    assert is_own(TASK, place) == own  # type: ignore[arg-type]


def test_a_worker_that_is_not_roots_runs_tasks_of_its_own_user_only() -> None:
    assert why_never(TASK, SERVICE) == "user is farm, who cannot run tasks of alice"
    assert why_never(replace(TASK, user="farm"), SERVICE) is None
    assert why_never(TASK, ROOT) is None
    assert why_never(TASK, PERSONAL) is None


def test_the_pool_runs_functions_of_the_workers_own_user_under_its_own_interpreter() -> None:
    assert runs_in_pool(replace(TASK, user="root"), ROOT)
    assert not runs_in_pool(TASK, ROOT)
    assert not runs_in_pool(replace(TASK, user="root", interpreter="/usr/bin/python3"), ROOT)
    assert not runs_in_pool(replace(TASK, user="root", pattern=Pattern.SHELL), ROOT)
    assert runs_in_pool(TASK, PERSONAL)


@pytest.mark.parametrize("chosen", [DEFAULTS, settings.load({"AQUE_ALLOW_ROOT_TASKS": "yes"})])
def test_tasks_of_root_are_refused_in_a_store_that_others_can_write(chosen: settings.Settings) -> None:
    roots = replace(TASK, user="root")
    refusal = identity.refusal(roots, ROOT, chosen)  # type: ignore[arg-type]
    assert (refusal is None) == chosen.allow_root_tasks
    assert identity.refusal(TASK, ROOT, chosen) is None  # type: ignore[arg-type]
    assert identity.refusal(replace(TASK, user="farm"), SERVICE, chosen) is None  # type: ignore[arg-type]
    assert identity.refusal(roots, PERSONAL, chosen) is None  # type: ignore[arg-type]


def test_the_environment_is_the_submitted_one_through_both_lists_and_then_the_tasks_own() -> None:
    submitted = b"PATH=/bin\0LD_PRELOAD=x\0LC_ALL=C\0EMPTY=\0WITH=a=b\0AQUE_TASK_ID=1\0\xffODD=\xff\0"
    own = {"AQUE_TASK_ID": "7"}
    assert identity.environment(submitted, own) == {
        b"PATH": b"/bin",
        b"LD_PRELOAD": b"x",
        b"LC_ALL": b"C",
        b"EMPTY": b"",
        b"WITH": b"a=b",
        b"AQUE_TASK_ID": b"7",
        b"\xffODD": b"\xff",
    }
    narrow = identity.environment(submitted, own, allow="PATH, L*", deny="LD_*")
    assert narrow == {b"PATH": b"/bin", b"LC_ALL": b"C", b"AQUE_TASK_ID": b"7"}


@pytest.mark.parametrize(
    ("url", "others"),
    [
        ("postgresql://aque:secret@db:5432/farm?password=x", "postgresql://db:5432/farm"),
        ("postgresql://aque:pa/ss@db/farm", "postgresql://db/farm"),
        ("postgresql://aque:pa?ss@db/farm?application_name=a@b", "postgresql://db/farm"),
        ("postgresql://db/farm?application_name=a@b", "postgresql://db/farm"),
        ("postgresql://db/farm", "postgresql://db/farm"),
        ("sqlite:////x/aque.db", "sqlite:////x/aque.db"),
    ],
)
def test_other_users_get_the_address_of_the_store_without_a_secret(url: str, others: str) -> None:
    assert settings.load({"AQUE_BROKER": url}).to_url_of_others() == others
