"""What a worker knows of paths: costs and sources, what is missing, and that nothing it asks can make it wait."""

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aque import mounts, residency
from aque.hints import Cost
from aque.mounts import Mounts, Seen
from tests.filesystems import FileSystems, mount, unmount, without_cache
from tests.servers import wait_until

MIB = 1 << 20


class Host:
    """The paths of a host, and a bell for what is told of them."""

    def __init__(self) -> None:
        self.rung = threading.Event()
        self.mounts = Mounts("host7", self.rung.set)

    def told(self, ask: Callable[[], mounts.Seen | None]) -> Seen:
        """The answer, asked again when the bell has rung."""
        while (answer := ask()) is None:
            assert self.rung.wait(60), "nobody has told that there is an answer"
            self.rung.clear()
        return answer

    def seen(self, *places: Path) -> Seen:
        return self.told(lambda: self.mounts.seen(tuple(bytes(place) for place in places)))

    def missing(self, *paths: Path) -> dict[Path, str]:
        found = self.told(lambda: self.mounts.missing([bytes(path) for path in paths]))  # type: ignore[arg-type]
        return {Path(os.fsdecode(path)): why for path, why in found.items()}  # type: ignore[attr-defined]


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.mounts.close()


# -- costs and sources


def test_what_is_not_known_yet_is_told_when_it_is(host: Host, tmp_path: Path) -> None:
    assert host.mounts.seen((bytes(tmp_path),)) is None
    assert host.rung.wait(60)
    found = host.mounts.seen((bytes(tmp_path),))
    assert found is not None and all(source.startswith("host7:") for source in found.sources)


def test_no_places_cost_nothing(host: Host) -> None:
    assert host.mounts.seen(()) == Seen(Cost.CACHED, frozenset())
    assert host.mounts.missing(()) == {}


def test_a_file_is_cached_exactly_while_the_kernel_has_its_pages(host: Host, on_disk: Path) -> None:
    file = on_disk / "f"
    file.write_bytes(os.urandom(4 * MIB))
    without_cache(file)
    assert host.seen(file).cost is Cost.LOCAL
    file.read_bytes()
    other = Host()
    assert other.seen(file).cost is Cost.CACHED
    other.mounts.close()


def test_a_file_of_which_much_is_missing_is_not_cached(on_disk: Path) -> None:
    file = on_disk / "f"
    file.write_bytes(os.urandom(4 * MIB))
    without_cache(file)
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no more than is asked for
        opened.read(MIB)
    cached, total = residency.pages(bytes(file))
    assert total == 4 * MIB // os.sysconf("SC_PAGESIZE") and 0 < cached < total
    assert not residency.is_cached(bytes(file))


def test_mincore_counts_the_same_pages_as_cachestat(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = on_disk / "f"
    file.write_bytes(os.urandom(2 * MIB + 1))
    for drop in (False, True):
        if drop:
            without_cache(file)
        counted = residency.pages(bytes(file))
        with monkeypatch.context() as without:
            without.setattr(residency, "_CACHESTAT", None)
            assert residency.pages(bytes(file)) == counted == (0 if drop else counted[1], counted[1])


def test_files_on_which_this_process_may_hold_locks_are_left_alone(on_disk: Path) -> None:
    mine, database, other = on_disk / "mine", on_disk / "aque.db", on_disk / "other"
    for file in (mine, database, other, on_disk / "aque.db-wal"):
        file.write_bytes(bytes(1 << 16))
    asked = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with mine.open("r+") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        assert [residency.pages(bytes(file)) for file in (mine, database)] == [(0, 1), (0, 1)]
        assert residency.pages(bytes(other)) == (16, 16)
        got = subprocess.run([sys.executable, "-c", asked, str(mine)], check=False, capture_output=True)
        assert got.returncode != 0, "the lock is gone"
    assert residency.pages(bytes(mine)) == (16, 16)


def test_a_directory_is_cached_if_its_files_are(on_disk: Path) -> None:
    assert not residency.is_cached(bytes(on_disk)), "it is empty"
    for n in range(40):
        (on_disk / str(n)).write_bytes(os.urandom(8192))
    assert residency.is_cached(bytes(on_disk))
    for n in range(40):
        without_cache(on_disk / str(n))
    assert not residency.is_cached(bytes(on_disk))


def test_nothing_but_regular_files_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("fifo", "empty", "link", "absent", "."):
        assert not residency.is_cached(bytes(tmp_path / name))
    # And where a file has become a FIFO since the look at it, to open that does not wait.
    assert residency.pages(bytes(tmp_path / "fifo")) == (0, 1)


def test_a_server_costs_more_than_a_disk_and_what_is_not_there_most(host: Host, file_systems: FileSystems) -> None:
    shots = file_systems.tmpfs("nas1:/shots", "shots")
    scratch = file_systems.tmpfs("scratch", "scratch")
    assert host.seen(shots) == Seen(Cost.NETWORK, frozenset({"nas1:/shots"}))
    assert host.seen(scratch) == Seen(Cost.LOCAL, frozenset({"host7:scratch"}))
    assert host.seen(scratch, shots) == Seen(Cost.NETWORK, frozenset({"host7:scratch", "nas1:/shots"}))
    assert host.seen(shots / "absent", scratch).cost is Cost.ABSENT
    (shots / "f").write_bytes(bytes(MIB))  # tmpfs is memory
    assert host.seen(shots / "f") == Seen(Cost.CACHED, frozenset({"nas1:/shots"}))


def test_the_source_of_a_link_is_where_it_leads(host: Host, file_systems: FileSystems, tmp_path: Path) -> None:
    shots = file_systems.tmpfs("nas1:/shots")
    (shots / "a").mkdir()
    (tmp_path / "jobs").symlink_to(shots)
    (tmp_path / "again").symlink_to("jobs/a")
    assert host.seen(tmp_path / "jobs" / "a") == Seen(Cost.NETWORK, frozenset({"nas1:/shots"}))
    assert host.seen(tmp_path / "again").sources == {"nas1:/shots"}


def test_links_in_a_circle_lead_nowhere(host: Host, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert host.missing(tmp_path / "a") == {tmp_path / "a": "Too many levels of symbolic links"}


# -- what is missing


def test_missing_paths_have_their_reasons(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    wanted = (tmp_path, tmp_path / "file", tmp_path / "absent", tmp_path / "file" / "x", tmp_path / "dangling")
    assert host.missing(*wanted) == {
        tmp_path / "absent": "No such file or directory",
        tmp_path / "file" / "x": "Not a directory",
        tmp_path / "dangling": "No such file or directory",
    }


def test_old_answers_are_served_while_a_new_look_is_under_way(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "AGE_SECONDS", 0.0)
    monkeypatch.setattr(mounts, "LONGEST_AGE_SECONDS", 0.0)
    path = tmp_path / "late"
    assert host.missing(path) == {path: "No such file or directory"}
    wait_until(lambda: not looks())
    may_look, look = threading.Event(), mounts._look
    monkeypatch.setattr(mounts, "_look", lambda *args: may_look.wait(60) and look(*args))
    host.rung.clear()
    path.touch()
    assert host.mounts.missing([bytes(path)]) == {bytes(path): "No such file or directory"}
    may_look.set()
    assert host.rung.wait(60), "what has changed is told"
    assert host.mounts.missing([bytes(path)]) == {}


def test_a_new_mount_over_a_path_is_seen_at_once(host: Host, tmp_path: Path, file_systems: FileSystems) -> None:
    point = file_systems.tmpfs("nas1:/shots")
    assert host.seen(point).sources == {"nas1:/shots"}
    mount("nas2:/shots", point, "tmpfs", "size=1m")
    assert host.seen(point).sources == {"nas2:/shots"}
    unmount(point)
    assert host.seen(point).sources == {"nas1:/shots"}


# -- what does not answer


def quick(ask: Callable[[], object]) -> object:
    """The answer of `ask`, which another thread waits for: one that hangs fails the test in place of hanging it."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "the caller was made to wait"
    return found[0]


def looks() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "aque-mount"]


def test_a_mount_that_does_not_answer_is_absent_and_keeps_no_other_from_being_seen(
    host: Host, file_systems: FileSystems
) -> None:
    hung, _ = file_systems.hung()
    fine = file_systems.tmpfs("nas1:/shots")
    inside = bytes(hung / "x")
    assert quick(lambda: host.mounts.seen((inside,))) is None
    assert quick(lambda: host.mounts.missing([inside])) is None
    assert host.seen(fine) == Seen(Cost.NETWORK, frozenset({"nas1:/shots"}))
    assert host.seen(hung / "x") == Seen(Cost.ABSENT, frozenset({"host7:nobody"}))
    assert host.missing(hung / "x", fine) == {hung / "x": f"{hung} does not answer"}
    # What has not been asked before is answered at once, and nobody else is sent there.
    for n in range(20):
        another = bytes(hung / str(n))
        assert host.mounts.seen((another, bytes(fine))) == Seen(Cost.ABSENT, frozenset({"host7:nobody", "nas1:/shots"}))
        assert host.mounts.missing([another]) == {another: f"{hung} does not answer"}
    assert len(looks()) == 1


def test_a_link_into_a_mount_that_does_not_answer_stops_the_looks_at_that_mount_alone(
    host: Host, file_systems: FileSystems, tmp_path: Path
) -> None:
    hung, _ = file_systems.hung()
    (tmp_path / "jobs").symlink_to(hung / "jobs")
    (tmp_path / "file").touch()
    assert host.missing(tmp_path / "jobs" / "x") == {tmp_path / "jobs" / "x": f"{hung} does not answer"}
    assert host.missing(tmp_path / "file") == {}
    assert host.seen(tmp_path / "jobs").sources == {"host7:nobody"}


def test_a_mount_that_answers_again_is_looked_at_again(host: Host, file_systems: FileSystems) -> None:
    hung, let_go = file_systems.hung()
    assert host.missing(hung / "x") == {hung / "x": f"{hung} does not answer"}
    host.rung.clear()
    let_go()
    wait_until(lambda: host.mounts.missing([bytes(hung / "x")]) == {bytes(hung / "x"): os.strerror(107)})
    assert host.rung.is_set()


def test_a_mount_that_hangs_and_is_unmounted_is_forgotten(host: Host, file_systems: FileSystems) -> None:
    hung, _ = file_systems.hung()
    assert host.missing(hung / "x") == {hung / "x": f"{hung} does not answer"}
    mount("nas1:/shots", hung, "tmpfs", "size=1m")  # over it
    assert host.missing(hung / "x") == {hung / "x": "No such file or directory"}
    assert host.seen(hung).sources == {"nas1:/shots"}
    unmount(hung)


def test_after_its_end_nothing_is_told_any_more(file_systems: FileSystems) -> None:
    hung, let_go = file_systems.hung()
    host = Host()
    assert host.missing(hung / "x")
    host.mounts.close()
    host.mounts.close()
    host.rung.clear()
    let_go()
    wait_until(lambda: not looks(), what="the thread that hung has ended")
    assert not host.rung.is_set()
    assert host.mounts.seen((b"/",)) is None
