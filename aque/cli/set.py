"""`aque set`: change tasks that wait."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import click

from aque import control
from aque.cli import ids
from aque.cli.farm import open_farm
from aque.cli.options import seconds
from aque.cli.show import as_json, count
from aque.errors import BadInput
from aque.options import parse_requirement
from aque.states import COMPLETE_STATES

#: What every unfinished task has, and what is settled when a worker takes it.
_ALWAYS = ("priority", "duration")
_WAITING = ("queue", "cpus", "memory", "host", "platform", "resources", "limits", "tags")


@click.command(name="set")
@click.option("--json", "as_line_of_json", is_flag=True, help="Print what was done as a line of JSON.")
@click.argument("words", metavar="IDS... NAME=VALUE...", nargs=-1, required=True)
def command(words: tuple[str, ...], as_line_of_json: bool) -> int:
    """Change tasks that have not ended: all of them or, with an error, none.

    priority and duration; of tasks that no worker has also queue, cpus, memory, host, platform, resources, limits and tags,
    as `aque submit` takes them. An empty value takes a wish back: `limits=`. A job's id stands for all of its tasks that can
    be changed. Waiting work is reordered at once. Exits with 1 if there was nothing to change.

    \b
    aque set 12 priority=10
    aque set 12,20-29 cpus=2 memory=4G host='node*,!node7'
    aque set @last limits=
    """
    given = _given([word for word in words if "=" in word])
    named = [word for word in words if "=" not in word]
    if not named or not given:
        raise BadInput("write ids and what to set, as in `aque set 12 priority=10`. Nothing was changed.")
    with open_farm() as farm:
        if given.get("queue") == "":
            given["queue"] = farm.settings.default_queue
        changed = control.change(
            farm.store,
            farm.settings,
            ids.resolve(farm, named, "Nothing was changed."),
            priority=_read(given, "priority", _priority),
            duration=_read(given, "duration", seconds),
            requirement=parse_requirement({name: given[name] for name in _WAITING if name in given}),
        )
    left = Counter(changed.left.values())
    if as_line_of_json:
        print(as_json({"changed": changed.ids, "left": {str(state): n for state, n in sorted(left.items())}}))
    else:
        parts = [f"{count(len(changed.ids), 'task')} changed"]
        for state, number in sorted(left.items()):
            parts.append(f"{number} {'already ' if state in COMPLETE_STATES else ''}{state}, left as it is")
        print(", ".join(parts))
    return 0 if changed.ids else 1


def _given(words: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in (*_ALWAYS, *_WAITING):
            known = ", ".join([*_ALWAYS, *_WAITING])
            raise BadInput(f"{name!r} cannot be set; there are: {known}. Nothing was changed.")
        if name in given:
            raise BadInput(f"{name} is given twice. Nothing was changed.")
        given[name] = value
    return given


def _read(given: dict[str, str], name: str, reader: Callable[[str], Any]) -> Any:
    return reader(given[name]) if name in given else None


def _priority(text: str) -> int:
    try:
        priority = int(text)
    except ValueError:
        priority = 1 << 31
    if not -(1 << 31) <= priority < 1 << 31:
        raise BadInput(f"a priority is a whole number such as 10 or -5, not {text!r:.60}. Nothing was changed.")
    return priority
