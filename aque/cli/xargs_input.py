"""xargs's input and how it is split into commands, byte for byte as GNU xargs 4.9 does. Pure.

What surprises: only space, tab and newline separate words; quotes and backslashes are not the shell's (a backslash inside
quotes is a backslash); an input without words runs the command once; a line ends for `-L` only if no blank precedes its end.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: GNU's default for `-s`: the bytes of a command's words, with one for the end of each.
COMMAND_BYTES = 131072

_PLAIN = re.compile(rb"[^ \t\n\\'\"]+")
#: After a separator these are skipped as well, though inside a word only the first three separate.
_SKIPPED = frozenset(b" \t\n\r\v\f")
_ESCAPES = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v", b"\\": b"\\"}


class BadXargsInput(Exception):
    """The input breaks off here; xargs runs what came before."""


@dataclass(frozen=True, slots=True)
class Word:
    """One word of the input; `lines` is how many lines, as `-L` counts, have ended with it."""

    text: bytes
    lines: int = 0


def delimiter(text: bytes) -> bytes:
    """The byte that `-d` names: itself, or an escape such as \\n, \\x1f or \\037. Raises ValueError."""
    if len(text) == 1:
        return text
    if text[:1] == b"\\":
        if text[1:] in _ESCAPES:
            return _ESCAPES[text[1:]]
        base = 16 if text[1:2] == b"x" else 8
        return bytes([int(text[2:] if base == 16 else text[1:], base)])
    raise ValueError


def delimited_words(data: bytes, end: bytes) -> Iterator[Word]:
    """The words of `-0` and `-d`: all that stands before each `end`, empty or not; the last needs none."""
    parts = data.split(end)
    if not parts[-1]:
        parts.pop()
    for part in parts:
        yield Word(part.partition(b"\0")[0], 1)


def words(data: bytes) -> Iterator[Word]:
    """The words of an input with quotes. Raises BadXargsInput at a quote that its line does not end."""
    at, size = 0, len(data)
    while at < size:
        # One round is one line, or several that a blank at the end joins.
        word, lines, previous, skipping = bytearray(), 0, 0, True
        line: list[bytes] = []
        while True:
            if at >= size:
                if word:
                    line.append(bytes(word))
                yield from _line(line, 1)
                return
            if skipping and data[at] in _SKIPPED:
                at += 1
                continue
            skipping = False
            if plain := _PLAIN.match(data, at):
                word += plain[0]
                at = plain.end()
                previous = word[-1]
                continue
            byte = data[at]
            at += 1
            if byte == 0x0A:
                lines += previous not in b" \t"
                line.append(bytes(word))
                break
            if byte in b" \t":
                line.append(bytes(word))
                word = bytearray()
                skipping = True
            elif byte == 0x5C:
                if at >= size:
                    continue
                word.append(data[at])
                previous = data[at]
                at += 1
            else:
                close = data.find(byte, at)
                newline = data.find(b"\n", at)
                if close < 0 and newline < 0 and at == size and not word:
                    continue  # GNU lets a quote go that opens at the very end
                if close < 0 or 0 <= newline < close:
                    yield from _line(line, 0)
                    kind = "double" if byte == 0x22 else "single"
                    raise BadXargsInput(
                        f"unmatched {kind} quote; by default quotes are special to xargs unless you use the -0 option"
                    )
                word += data[at:close]
                at = close + 1
                previous = byte
        yield from _line(line, lines)


def _line(line: list[bytes], lines: int) -> Iterator[Word]:
    for position, text in enumerate(line):
        yield Word(text.partition(b"\0")[0], lines if position == len(line) - 1 else 0)


def commands(
    initial: list[bytes],
    items: Iterable[Word],
    *,
    max_args: int | None = None,
    max_lines: int | None = None,
    run_if_empty: bool = True,
    limit: int = COMMAND_BYTES,
) -> Iterator[list[bytes]]:
    """The commands that xargs would run, one after another. Raises BadXargsInput where xargs would stop."""
    start = sum(len(word) + 1 for word in initial)
    if start > limit:
        raise BadXargsInput(f"the command and its initial arguments have more than {limit} bytes")
    pending: list[bytes] = []
    used, lines, any_run = start, 0, False
    try:
        for item in items:
            length = len(item.text) + 1
            if start + length > limit:
                raise BadXargsInput("argument line too long")
            if used + length > limit or (max_args is not None and len(pending) == max_args):
                if used + length > limit and max_lines is not None:
                    pending = []  # lines are never divided: -L implies -x
                    raise BadXargsInput("argument list too long")
                yield [*initial, *pending]
                pending, used, any_run = [], start, True
            pending.append(item.text)
            used += length
            lines += item.lines
            if max_lines is not None and lines >= max_lines:
                yield [*initial, *pending]
                pending, used, lines, any_run = [], start, 0, True
    except BadXargsInput:
        if pending and max_lines is None:
            yield [*initial, *pending]
        raise
    if pending or (run_if_empty and not any_run):
        yield [*initial, *pending]
