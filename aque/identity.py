"""As whom a task runs on a worker, and with which environment. Pure."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from fractions import Fraction

from aque.assignments import Assigned
from aque.chooser import Place, is_own
from aque.settings import Settings
from aque.values import ClaimedTask


def refusal(task: ClaimedTask, place: Place, settings: Settings) -> str | None:
    """Why this worker must not run a task of its own user as itself, as a sentence; None if it may.

    Only root is refused, and only in a store that others can write: who can write a row there would be root here.
    """
    if place.switches_user and is_own(task, place) and not settings.allow_root_tasks:
        return (
            f"the task is of {place.user}, and so is this worker: tasks of root are refused in a store that others can write. "
            "Nothing was started: submit it as another user, or start the worker with AQUE_ALLOW_ROOT_TASKS=1."
        )
    return None


def environment(submitted: bytes, own: Mapping[str, str], *, allow: str = "*", deny: str = "") -> dict[bytes, bytes]:
    """The variables of a command: those that were submitted (NAME=VALUE, each ended by NUL) whose names match one of the globs
    `allow` and none of `deny` (with commas), and then the task's `own`."""
    pairs = (pair.partition(b"=") for pair in submitted.split(b"\0") if b"=" in pair)
    allowed, denied = _globs(allow), _globs(deny)
    kept = {name: value for name, _, value in pairs if _matches(name, allowed) and not _matches(name, denied)}
    return kept | {name.encode(): value.encode() for name, value in own.items()}


#: How many threads the libraries that read these would start otherwise: one for each CPU of the machine.
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)


def thread_variables(cpus: Fraction, submitted: bytes) -> dict[str, str]:
    """As many threads as CPUs, at least one, for whatever the submitted environment says nothing of. AQUE_THREAD_VARIABLES
    names them: a child of the task has CPUs of its own, and must not inherit its parent's numbers as if they were asked for."""
    said = {pair.partition(b"=")[0] for pair in submitted.split(b"\0")}
    found = {name: str(max(math.ceil(cpus), 1)) for name in _THREADS if name.encode() not in said}
    return found | {"AQUE_THREAD_VARIABLES": ",".join(found)}


def index_variables(assigned: Assigned) -> dict[str, str]:
    """Which pieces of its resources a task has: AQUE_GPU_INDICES=0,2."""
    return {f"AQUE_{name.upper()}_INDICES": ",".join(map(str, found)) for name, found in assigned.indices.items()}


def _globs(text: str) -> list[str]:
    return [glob.strip() for glob in text.split(",") if glob.strip()]


def _matches(name: bytes, globs: list[str]) -> bool:
    return any(fnmatchcase(name.decode(errors="surrogateescape"), glob) for glob in globs)
