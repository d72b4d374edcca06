"""Task ids as people write them: `12,13,20-29,@last`."""

import re
from collections.abc import Iterable

from aque.cli.farm import Farm
from aque.errors import BadInput, UnknownTask
from aque.machine import user_name

#: A range longer than this is a slip of the finger.
LONGEST_RANGE = 1_000_000
#: The largest id that the databases hold.
LARGEST = (1 << 63) - 1
_ID = re.compile(r"[0-9]+")
_RANGE = re.compile(r"([0-9]+)-([0-9]+)")


def parse(words: Iterable[str]) -> list[int | range | None]:
    """Each part of each word: an id, a range of ids, or None for `@last`. Raises BadInput."""
    found: list[int | range | None] = []
    for part in (part.strip() for word in words for part in word.split(",")):
        match = _RANGE.fullmatch(part)
        if part == "@last":
            found.append(None)
        elif _ID.fullmatch(part) and int(part) <= LARGEST:
            found.append(int(part))
        elif match and int(match[1]) <= int(match[2]) <= LARGEST:
            if int(match[2]) - int(match[1]) >= LONGEST_RANGE:
                raise BadInput(f"the range {part} holds more than {LONGEST_RANGE} ids. Nothing was done.")
            found.append(range(int(match[1]), int(match[2]) + 1))
        else:
            raise BadInput(f"{part!r} is not a task id: write ids such as 12 or 12,13,20-29, or @last.")
    return found


def resolve(farm: Farm, words: Iterable[str], consequence: str = "Nothing was done.") -> list[int]:
    """The tasks that `words` name, each once, in their order. Raises BadInput, or UnknownTask with the `consequence`.

    Of a range those that there are: workers and requirement classes take ids from the same sequence, so it has gaps.
    """
    parts = parse(words)
    wanted: dict[int, None] = {}
    unknown: list[object] = []
    singles = [part for part in parts if isinstance(part, int)]
    known = {row["id"] for row in farm.rows(singles, ["id"])}
    for part in parts:
        if part is None:
            wanted[_last(farm)] = None
        elif isinstance(part, int):
            if part in known:
                wanted[part] = None
            else:
                unknown.append(part)
        else:
            within = [row["id"] for row in farm.rows(part, ["id"])]
            if not within:
                unknown.append(f"{part[0]}-{part[-1]}")
            wanted.update(dict.fromkeys(within))
    if unknown:
        raise UnknownTask(unknown, consequence)
    return list(wanted)


def _last(farm: Farm) -> int:
    user = user_name()
    with farm.store.connect() as connection:
        found = farm.store.last_id(connection, user)
    if found is None:
        raise BadInput(f"@last: {user} has not submitted a task yet. Nothing was done.")
    return found
