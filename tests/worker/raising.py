"""Tasks that raise what is hard to send."""

from datetime import UTC, datetime
from typing import Any

import aque

#: Lone surrogates, as file names that are no UTF-8 have them in Python, and NUL.
ODD_TEXT = "caf\udce9 \x00 \ud83d ü"


class Demanding(Exception):
    """Its constructor wants other things than its args, which is what it keeps."""

    def __init__(self, code: int, path: str) -> None:
        super().__init__(f"{path} failed with {code}")
        self.code = code
        self.path = path


class Keeping(Exception):
    """With an attribute that is no argument."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Outer:
    class Inner(ValueError):
        """Not at the top of its module."""


class NotOnlyText(Exception):
    """Holds what is not JSON."""


class Raising(Exception):
    """Nobody can make it a second time."""

    made = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.handle = object()
        Raising.made += 1
        if Raising.made > 1:
            raise RuntimeError("only one")


def odd_error(kind: str) -> BaseException:
    class Local(Exception):
        pass

    errors: dict[str, Any] = {
        "arguments": lambda: ValueError("text", 7, [1, {"a": None}], datetime(2026, 1, 2, tzinfo=UTC), b"\xff"),
        "demanding": lambda: Demanding(7, "/path"),
        "keeping": lambda: Keeping("text", code=7),
        "inner": lambda: Outer.Inner("text"),
        "os": lambda: FileNotFoundError(2, "No such file or directory", "/no/such/file"),
        "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        "group": lambda: ExceptionGroup("several", [ValueError("one")]),
        "not only text": lambda: NotOnlyText("text", object()),
        "raising": lambda: Raising("text"),
        "local": lambda: Local("text"),
        "odd text": lambda: ValueError(ODD_TEXT),
        "huge": lambda: ValueError("x" * 3_000_000),
        "noted": lambda: ValueError("text"),
    }
    error: BaseException = errors[kind]()
    if kind == "noted":
        error.add_note("a note")
    return error


@aque.task
def raise_odd(kind: str) -> None:
    raise odd_error(kind)


@aque.task
def raise_from_afar() -> None:
    from tests.worker.far_errors import Far

    try:
        raise KeyError("the cause")
    except KeyError as cause:
        raise Far("far", 3) from cause
