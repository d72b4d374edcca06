"""Settings: which source wins, what each may be, and where the farm is."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest

from aque.errors import BadSetting
from aque.settings import Settings, load

HOME = {"HOME": "/home/someone"}


def test_an_argument_beats_the_environment_celery_the_file_and_the_default() -> None:
    sources: dict[str, Any] = {"celery_conf": {"aque_lease_seconds": 3}.get, "file": {"lease_seconds": 4}}
    environ = {"AQUE_LEASE_SECONDS": "2"}
    assert load(environ, lease_seconds=1.0, **sources).lease_seconds == 1
    assert load(environ, **sources).lease_seconds == 2
    assert load({}, **sources).lease_seconds == 3
    assert load({}, file={"lease_seconds": 4}).lease_seconds == 4
    assert load({}).lease_seconds == 30


def test_an_empty_variable_counts_as_none() -> None:
    assert load({"AQUE_LEASE_SECONDS": ""}, file={"lease_seconds": 4}).lease_seconds == 4


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"AQUE_LEASE_SECONDS": "soon"}, "AQUE_LEASE_SECONDS: lease_seconds must be of type float, not 'soon'"),
        ({"AQUE_LEASE_SECONDS": "0"}, "AQUE_LEASE_SECONDS: lease_seconds must be at least 0.2, not '0'"),
        ({"AQUE_LEASE_SECONDS": "nan"}, "at least 0.2"),
        ({"AQUE_MAX_LOST": "1.5"}, "AQUE_MAX_LOST: max_lost must be of type int, not '1.5'"),
        ({"AQUE_KILL_GRACE_SECONDS": "-1"}, "AQUE_KILL_GRACE_SECONDS: kill_grace_seconds must be at least 0"),
    ],
)
def test_a_bad_value_is_refused_with_its_source(environ: Mapping[str, str], sentence: str) -> None:
    with pytest.raises(BadSetting) as raised:
        load(environ)
    assert sentence in str(raised.value)


def test_a_setting_of_the_file_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BadSetting, match="'leese_seconds'"):
        load({}, file={"leese_seconds": 3})


@pytest.mark.parametrize("name", [spec.name for spec in fields(Settings)])
def test_every_setting_has_a_unit_and_a_help_text_and_a_default_that_is_allowed(name: str) -> None:
    (spec,) = [spec for spec in fields(Settings) if spec.name == name]
    assert spec.metadata["unit"]
    assert len(spec.metadata["help"]) > 10
    minimum = spec.metadata["minimum"]
    assert minimum is None or spec.default >= minimum


@pytest.mark.parametrize(
    ("environ", "store", "bus"),
    [
        (
            HOME,
            "sqlite:////home/someone/.local/state/aque/aque.db",
            "aque+sqlite:////home/someone/.local/state/aque/aque-bus.db",
        ),
        ({**HOME, "XDG_STATE_HOME": "/s"}, "sqlite:////s/aque/aque.db", "aque+sqlite:////s/aque/aque-bus.db"),
        ({**HOME, "AQUE_STATE_DIR": "/d"}, "sqlite:////d/aque.db", "aque+sqlite:////d/aque-bus.db"),
        ({"AQUE_BROKER": "sqlite:////x/farm.db"}, "sqlite:////x/farm.db", "aque+sqlite:////x/farm-bus.db"),
        ({"AQUE_BROKER": "postgresql://u@h/n"}, "postgresql+psycopg2://u@h/n", "aque+postgresql://u@h/n"),
        ({"AQUE_BROKER": "postgres://u@h/n"}, "postgresql+psycopg2://u@h/n", "aque+postgresql://u@h/n"),
        (
            {"AQUE_BROKER": "postgresql://u@h/n", "AQUE_CELERY_BROKER": "redis://r"},
            "postgresql+psycopg2://u@h/n",
            "redis://r",
        ),
    ],
)
def test_one_address_names_the_store_and_the_broker(environ: Mapping[str, str], store: str, bus: str) -> None:
    found = load(environ)
    assert (found.store_url, found.celery_broker_url) == (store, bus)
    assert load({"AQUE_BROKER": found.to_url()}).store_url == store


def test_a_path_with_odd_characters_survives_as_an_address() -> None:
    found = load({"AQUE_STATE_DIR": "/a b/100%?#"})
    assert found.store_url == "sqlite:////a%20b/100%25%3F%23/aque.db"
    assert found.celery_broker_url == "aque+sqlite:////a%20b/100%25%3F%23/aque-bus.db"


@pytest.mark.parametrize(
    "url", ["redis://secret@host", "amqp://u:secret@h//", "mysql://u:secret@h/n", "sqlite://", "farm"]
)
def test_an_address_that_is_no_store_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(BadSetting, match="AQUE_BROKER cannot be") as raised:
        load({"AQUE_BROKER": url})
    assert "secret" not in str(raised.value)
    assert ("AQUE_CELERY_BROKER" in str(raised.value)) == url.startswith(("redis", "amqp"))
