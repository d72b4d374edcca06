"""The trees of processes that tests/faults/trees.py grows: as a command, and as a function."""

import fcntl
import os
import subprocess
from pathlib import Path

import aque
from tests.worker.tasks import append

PROCESSES = 5
#: $1: a directory, $2: the seconds that each of the five sleeps, $3: `ends` to leave them behind when there is a file `go`.
_FIVE = """
/bin/sleep "$2" &
setsid /bin/sleep "$2" &
env -i /bin/sleep "$2" &
(trap '' TERM; exec /bin/sleep "$2") &
(setsid sh -c '/bin/sleep "$0" & exit' "$2" &)
[ "$3" = ends ] || wait
until [ -e "$1/go" ]; do sleep 0.02; done
"""
#: An attempt after the first only looks whether the locks of those before are free.
COMMAND = (
    """
cd "$1" || exit 1
found=clean
for old in lock.*; do
    [ ! -e "$old" ] || flock --nonblock "$old" true || found=overlaps
done
exec 9>"lock.$AQUE_ATTEMPT"
flock --shared 9
echo "$AQUE_ATTEMPT $$ $found" >>started
[ "$AQUE_ATTEMPT" = 1 ] || exit 0
"""
    + _FIVE
)


def _is_free(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@aque.task
def grow(directory: str, seconds: str, ends: str) -> None:
    """The same as `COMMAND`."""
    place, attempt = Path(directory), os.environ["AQUE_ATTEMPT"]
    found = "clean" if all(_is_free(old) for old in place.glob("lock.*")) else "overlaps"
    with (place / f"lock.{attempt}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        append(str(place / "started"), f"{attempt} {os.getpid()} {found}")
        if attempt == "1":
            words = ["sh", "-c", _FIVE, "tree", directory, seconds, ends]
            subprocess.run(words, pass_fds=[lock.fileno()], check=False)
