"""Patterns of an imaginary studio: frames that a program renders, and digests of what it has rendered."""

import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from aque.errors import BadInput
from aque.patterns import CommandPattern, End, Pattern


class FramesMissing(Exception):
    """The program says that it has rendered, and has not."""


class Frames(CommandPattern):
    """A range of frames, rendered by one command: `aque.pattern("frames")("render.sh", "/shots/a/%04d.exr", first=1, last=24)`.

    The command gets the file of each frame as an argument; each must be there at its end. The result is the list of files.
    """

    #: 100: rendered, with warnings that nobody has ever minded.
    success_codes = (0, 100)

    def prepare(self, program: str, output: str, *, first: int, last: int) -> Mapping[str, Any]:
        if last < first:
            raise BadInput(f"there are no frames from {first} to {last}. Nothing was submitted.")
        return {"program": os.path.abspath(program), "files": [output % frame for frame in range(first, last + 1)]}

    def options(self, program: str, files: Sequence[str]) -> Mapping[str, Any]:
        return {
            "name": f"frames {os.path.basename(program)}",
            "io_paths": [program, os.path.dirname(files[0])],
            "cpus": 4,
            "priority": 7,
        }

    def argv(self, program: str, files: Sequence[str]) -> Sequence[str]:
        return [program, *files]

    def outcome(self, end: End, program: str, files: Sequence[str]) -> list[str]:
        super().outcome(end)
        if missing := [file for file in files if not Path(file).is_file()]:
            raise FramesMissing(f"{len(missing)} of {len(files)} frames are missing: {missing[0]} ...")
        return list(files)


class Digest(Pattern):
    """The SHA-256 of each of some files, by path; in the worker's pool, since each is short."""

    def prepare(self, files: Iterable[str]) -> Mapping[str, Any]:
        return {"files": files}

    def run(self, files: Iterable[str]) -> dict[str, str]:
        return {file: sha256(Path(file).read_bytes()).hexdigest() for file in files}
