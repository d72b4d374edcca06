"""Patterns of an imaginary studio: frames that a program renders, commands with a licence, digests of what was rendered."""

import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from aque.errors import BadInput
from aque.patterns import End, Pattern, Python, Retry, Shell


class FramesMissing(Exception):
    """The program says that it has rendered, and has not."""


class Frames(Shell):
    """A range of frames, rendered by one command.

    The program gets the file of each frame as an argument; each must be there at its end. The result is the list of files.
    """

    success_codes = (0, 100)  # 100: with warnings that nobody has ever minded
    #: No licence was free. A licence server of the real world gets a minute.
    retry_codes: ClassVar[Mapping[int, float]] = {75: 0.5}
    max_retries = 2

    def prepare(self, program: str, output: str, first: int | str, last: int | str) -> Mapping[str, Any]:
        first, last = int(first), int(last)  # a command line has texts
        if last < first:
            raise BadInput(f"there are no frames from {first} to {last}. Nothing was submitted.")
        return {"program": os.path.abspath(program), "files": [output % frame for frame in range(first, last + 1)]}

    def options(self, program: str, files: Sequence[str]) -> Mapping[str, Any]:
        return {"name": f"frames {Path(program).name}", "cpus": 2, "limits": {"renderer": 1}, "priority": 7}

    def environment(self, program: str, files: Sequence[str]) -> Mapping[str, str]:
        return {"RENDER_CACHE": os.path.dirname(files[0])}

    def argv(self, program: str, files: Sequence[str]) -> Sequence[str]:
        return [program, "--threads", os.environ["AQUE_CPUS"], *files]

    def progress(self, line: str, program: str, files: Sequence[str]) -> Any:
        if line.startswith("rendered "):
            return {"current": files.index(line.removeprefix("rendered ")) + 1, "total": len(files)}
        if line.startswith("layers "):
            return set(line.split()[1:])  # a slip: JSON has no sets
        return None

    def outcome(self, end: End, program: str, files: Sequence[str]) -> list[str]:
        if "cannot open the scene" in end.stderr:  # it exits with 0 nevertheless
            raise FramesMissing(f"{program} cannot open its scene")
        super().outcome(end)
        if missing := [file for file in files if not Path(file).is_file()]:
            raise FramesMissing(f"{len(missing)} of {len(files)} frames are missing: {missing[0]} ...")
        return list(files)


class Licensed(Shell):
    """A command that takes a licence of the renderer, in the studio's environment."""

    def options(self, words: Sequence[str]) -> Mapping[str, Any]:
        return {"limits": {"renderer": 1}}

    def environment(self, words: Sequence[str]) -> Mapping[str, str]:
        return {"STUDIO": "/studio"}


class Awaited(Python):
    """A function that is called again, as often as twice, while what it looks for is not there."""

    def outcome(self, end: Any, **parts: Any) -> Any:
        if not end:
            raise Retry(f"{parts['function']} has found nothing", countdown=0.1, max_retries=2)
        return end


class Digest(Pattern):
    """The SHA-256 of each of some files, by path."""

    def prepare(self, files: Iterable[str]) -> Mapping[str, Any]:
        return {"files": files}

    def run(self, files: Sequence[str]) -> dict[str, str]:
        digests = {}
        for number, file in enumerate(files, start=1):
            digests[file] = sha256(Path(file).read_bytes()).hexdigest()
            self.tell({"current": number, "total": len(files)})
        return digests
