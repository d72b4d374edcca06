"""Patterns without a farm: what a retry may ask for, and what hooks may return."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aque import patterns, sandbox
from aque.errors import BadInput, CommandFailed
from aque.patterns import Retry, Shell

TOO_MUCH = [{"countdown": float("inf")}, {"countdown": float("nan")}, {"countdown": 1e10}, {"max_retries": 10**10}]


@pytest.mark.parametrize("asked", TOO_MUCH, ids=str)
def test_a_retry_that_asks_for_too_much_is_refused_and_tells_what_it_was_raised_for(asked: dict[str, Any]) -> None:
    why = CommandFailed("the command exited with status 75.")
    with pytest.raises(BadInput, match=r"of a Retry must be .*at most 1e9.*exited with status 75") as raised:
        Retry(why, **asked)
    assert raised.value.__cause__ is why


@pytest.mark.parametrize("countdown", [-1.0, 0, 1e9])
@pytest.mark.parametrize("max_retries", [-1, 0, 10**9])
def test_whatever_a_retry_may_ask_for_a_worker_takes_as_an_answer(countdown: float, max_retries: int) -> None:
    asks = Retry("not yet", countdown, max_retries)
    wanted = [asks.countdown, asks.max_retries]
    fields: dict[str, Any] = {"reason": "exception", "value": None, "error": {}, "seconds": 1.0, "retry": wanted}
    assert sandbox.answer(json.dumps(fields).encode()).retry == (max(0, countdown), max(0, max_retries))


class Echo(Shell):
    """Its hooks return what a test says."""

    def __init__(self, returned: Any) -> None:
        self._returned = returned

    def prepare(self, *words: Any, **kwargs: Any) -> Any:
        return self._returned

    def options(self, **parts: Any) -> Any:
        return self._returned

    def environment(self, **parts: Any) -> Any:
        return self._returned

    def argv(self, **parts: Any) -> Any:
        return self._returned


ASK: dict[str, Callable[[Echo], Any]] = {
    "prepare": lambda echo: patterns.parts_of(echo, [], {}),
    "options": lambda echo: patterns.options_of(echo, {}),
    "environment": lambda echo: patterns.environment_of(echo, {}),
    "argv": lambda echo: echo.run(),
}
WRONG = [
    *[("argv", found) for found in ("echo hi", b"echo hi", 7, None, [], ["echo", 7])],
    *[("environment", found) for found in (7, None, {"X": 1}, ["X"])],
    *[(hook, found) for hook in ("prepare", "options") for found in (7, None, {1: "one"})],
]


@pytest.mark.parametrize(("hook", "returned"), WRONG, ids=str)
def test_a_hook_that_returns_what_it_must_not_is_named(hook: str, returned: Any) -> None:
    with pytest.raises(BadInput, match=rf"the pattern Echo .* its {hook}\(\) must return .*, not "):
        ASK[hook](Echo(returned))


def test_words_can_be_paths_and_variables_can_be_bytes() -> None:
    assert patterns.command_of(Echo(("cat", Path("/a"), b"b")), {}) == ["cat", "/a", b"b"]
    assert patterns.environment_of(Echo({"A": b"b", b"C": Path("/d")}), {}) == {b"A": b"b", b"C": b"/d"}
