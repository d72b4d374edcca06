"""The pages that are printed from the code say what the code says."""

from dataclasses import fields
from pathlib import Path

from aque.settings import Settings
from aque.states import diagram

DOCS = Path(__file__).parents[2] / "docs"


def test_the_life_cycle_in_the_docs_is_the_one_in_the_code() -> None:
    assert diagram() in (DOCS / "states.md").read_text()


def test_every_setting_is_documented_with_its_default_and_unit() -> None:
    page = (DOCS / "settings.md").read_text()
    for setting in fields(Settings):
        default = f"`{setting.default!r}`"
        assert f"| `{setting.name}` | {default} | {setting.metadata['unit']} | {setting.metadata['help']} |" in page
