"""IO hints: mount tables, limits of sources, which words are paths, and what stands for the paths of many tasks."""

import posixpath
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aque import hints
from aque.errors import BadSetting
from aque.hints import Cost, Mount, io_capacity, mount_of, parse_io_limits, parse_mounts, paths_in, source_of
from aque.settings import load

MOUNTINFO = rb"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw - proc proc rw
40 22 0:40 / /shots rw,relatime shared:7 master:2 - nfs4 nas1:/shots rw,vers=4.2
41 40 0:41 / /shots/with\040blank\134and\012line rw - xfs /dev/sdb1 rw
42 22 0:42 / /home/me/remote rw - fuse.sshfs me@host:/home rw
43 22 0:43 / /share rw - cifs //server/share rw
44 22 0:44 / /twice rw - ext4 /dev/sdc1 rw
45 44 0:45 / /twice rw - tmpfs scratch rw
46 22 0:46 / /nothing rw - tmpfs  rw
47 22 0:47 / /odd rw - tmpfs caf\303\251\377 rw
"""
MOUNTS = parse_mounts(MOUNTINFO)


def mount(path: str) -> Mount:
    found = mount_of(path.encode(), MOUNTS)
    assert found is not None
    return found


# -- mounts


def test_a_path_lies_on_the_mount_with_the_longest_point_by_whole_components() -> None:
    assert mount("/shots/a/b").source == "nas1:/shots"
    assert mount("/shots").source == "nas1:/shots"
    assert mount("/shotsx").source == "/dev/sda1"
    assert mount("/").source == "/dev/sda1"
    assert mount_of(b"/x", ()) is None


def test_blanks_backslashes_and_line_ends_of_a_mount_point_are_read() -> None:
    assert mount("/shots/with blank\\and\nline/x").source == "/dev/sdb1"


def test_of_two_mounts_over_one_point_the_later_one_is_seen() -> None:
    assert (mount("/twice/x").source, mount("/twice/x").kind) == ("scratch", "tmpfs")
    assert len([m for m in MOUNTS if m.point == b"/twice"]) == 1


def test_a_source_is_text_that_a_database_takes_also_where_it_is_empty_or_no_utf_8() -> None:
    assert mount("/nothing").source == ""
    assert mount("/odd").source == "caf\\xc3\\xa9\\xff" or mount("/odd").source == "caf\u00e9\\xff"
    mount("/odd").source.encode()


def test_the_same_file_system_mounted_again_is_another_mount() -> None:
    again = parse_mounts(MOUNTINFO.replace(b"\n40 22", b"\n99 22"))
    assert mount_of(b"/shots", again) != mount("/shots")


def test_lines_that_are_no_mounts_are_left_out() -> None:
    assert parse_mounts(b"\nx\n1 2 - \n") == ()


@pytest.mark.parametrize(
    ("path", "is_network", "may_hang"),
    [
        ("/", False, False),
        ("/proc", False, False),
        ("/shots", True, True),
        ("/home/me/remote", True, True),
        ("/share", True, True),
        ("/twice", False, False),
    ],
)
def test_what_another_machine_serves_is_a_network_file_system(path: str, is_network: bool, may_hang: bool) -> None:
    assert (mount(path).is_network, mount(path).may_hang) == (is_network, may_hang)


@pytest.mark.parametrize(
    ("source", "kind", "is_network", "may_hang"),
    [
        ("nas1:/shots", "tmpfs", True, True),
        ("//server/share", "unknown", True, True),
        ("10.0.0.1@tcp:/scratch", "lustre", True, True),
        ("beegfs_nodev", "beegfs", True, True),
        ("rclone", "fuse.rclone", False, True),
        ("/etc/auto.home", "autofs", False, True),
        ("/dev/mapper/a:b", "ext4", False, False),
        ("overlay", "overlay", False, False),
    ],
)
def test_a_server_shows_in_the_kind_or_in_the_source(source: str, kind: str, is_network: bool, may_hang: bool) -> None:
    found = Mount(b"/x", source, kind)
    assert (found.is_network, found.may_hang) == (is_network, may_hang)


def test_hosts_share_the_source_of_a_server_and_not_that_of_a_disk() -> None:
    assert source_of(mount("/shots"), "host7") == "nas1:/shots"
    assert source_of(mount("/etc"), "host7") == "host7:/dev/sda1"


# -- limits


def test_the_first_glob_that_matches_a_source_says_how_many_may_use_it() -> None:
    limits = parse_io_limits("nas1:/slow=2, nas*:*=16,/dev/sd*=4,host7:*=1")
    assert limits == (("nas1:/slow", 2), ("nas*:*", 16), ("/dev/sd*", 4), ("host7:*", 1))
    assert io_capacity("nas1:/slow", limits) == 2
    assert io_capacity("nas1:/shots", limits) == 16
    assert io_capacity("anyhost:/dev/sda1", limits) == 4
    assert io_capacity("host7:/dev/nvme0n1", limits) == 1
    assert io_capacity("//server/share", limits) is None
    assert io_capacity("nas1:/shots", ()) is None


def test_the_last_equals_sign_divides() -> None:
    assert parse_io_limits("tag=a:*=3") == (("tag=a:*", 3),)


def test_no_limits_are_none() -> None:
    assert parse_io_limits("") == parse_io_limits(" , ") == ()


@pytest.mark.parametrize(
    "text", ["nas", "=4", "nas*=", "nas*=0", "nas*=x", "nas*=-1", "nas*=1.5", "nas*=1000000", "a=1,b"]
)
def test_io_limits_that_cannot_be_read_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadSetting, match="'nas\\*:\\*=16,/dev/sd\\*=4'"):
        parse_io_limits(text)


def test_io_limits_can_be_a_table_of_the_file_or_a_dict_of_celery() -> None:
    table = {"nas*:*": 16, "/dev/sd*": 4}
    assert load({}, file={"io_limits": table}).io_limits == "nas*:*=16,/dev/sd*=4"
    assert load({}, celery_conf={"aque_io_limits": table}.get).io_limits == "nas*:*=16,/dev/sd*=4"


# -- words


def tree(*paths: bytes) -> Callable[[bytes], bytes | None]:
    """A look at a file system that holds these paths and the directories above them."""
    there = {b"/"}
    for path in paths:
        names = path.split(b"/")
        there |= {b"/".join(names[: n + 1]) for n in range(1, len(names))}

    def look(path: bytes) -> bytes | None:
        while path not in there:
            path = posixpath.dirname(path)
        return path

    return look


CWD = b"/here"
LOOK = tree(
    b"/shots/a/f1.exr", b"/shots/a/f2.exr", b"/shots/out", b"/here/in.txt", b"/here/sub/x", b"/usr/share/y", b"/tmp/z"
)


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        ([b"/shots/a/f1.exr"], [b"/shots/a/f1.exr"]),
        ([b"/shots/a/none.exr"], [b"/shots/a"]),
        ([b"/shots/a/f####.exr"], [b"/shots/a"]),
        ([b"/shots//a/../a/./f1.exr"], [b"/shots/a/f1.exr"]),
        ([b"//shots/a"], [b"/shots/a"]),
        ([b"--out=/shots/out"], [b"/shots/out"]),
        ([b"-o=/shots/out"], [b"/shots/out"]),
        ([b"--in=in.txt"], [b"/here/in.txt"]),
        ([b"-I/shots/a"], [b"/shots/a"]),
        ([b"-I../shots/a"], [b"/shots/a"]),
        ([b"-Isub"], []),
        ([b"if=/shots/a/f1.exr", b"of=/shots/out/new"], [b"/shots/a/f1.exr", b"/shots/out"]),
        ([b"in.txt", b"sub/x", b"./in.txt"], [b"/here/in.txt", b"/here/sub/x"]),
        ([b"absent.txt", b"sub/absent", b"-v", b"--", b"-", b"9"], []),
        ([b"http://host/shots/a", b"s3://bucket/in.txt", b"--url=https://h/shots"], []),
        ([b"/usr/share/y", b"/proc/self", b"/dev/null", b"/etc/passwd", b"/lib64/x", b"/bin/sh", b"/"], []),
        ([b"/absent/x", b"/.."], []),
        ([b"/tmp/z", b"/library"], [b"/tmp/z"]),
        ([b"/shots/a/f1.exr", b"/shots/a/f1.exr"], [b"/shots/a/f1.exr"]),
        ([b"echo /shots/a\nrm in.txt\n"], []),
        ([b""], []),
        ([b"/here/new", b"/here/sub/new"], [b"/here/sub"]),
        ([b"."], [b"/here"]),
        ([b"/here"], [b"/here"]),
        ([b"\xff/\xfe", b"/shots/a/\xff"], [b"/shots/a"]),
    ],
)
def test_the_paths_of_a_command_are_the_prefixes_of_its_words_that_exist(
    words: list[bytes], paths: list[bytes]
) -> None:
    assert paths_in([b"/shots/a/tool", *words], CWD, LOOK) == tuple(paths)


def test_where_looks_tell_nothing_absolute_words_and_relative_ones_with_a_slash_are_taken_as_they_are() -> None:
    words = [b"tool", b"/shots/a/../x", b"sub/y", b"name", b"-v", b"/usr/bin/x"]
    assert paths_in(words, CWD, lambda path: None) == (b"/shots/x", b"/here/sub/y")


def test_no_look_is_taken_at_words_that_are_no_paths_or_of_the_system() -> None:
    asked: list[bytes] = []
    paths_in([b"tool", b"-v", b"/usr/x", b"http://x/y", b"a", b"a"], CWD, lambda path: asked.append(path) or path)
    assert asked == [b"/here/a"]


def test_a_command_with_very_many_paths_keeps_64_of_them() -> None:
    words = [b"tool", *(b"/shots/%03d" % n for n in range(100))]
    assert paths_in(words, CWD, lambda path: path) == tuple(words[1:65])


@given(st.lists(st.binary(max_size=20).filter(lambda word: b"\0" not in word), max_size=10))
def test_whatever_the_words_paths_are_absolute_normal_and_each_once(words: list[bytes]) -> None:
    found = paths_in([b"tool", *words], CWD, lambda path: path)
    assert len(set(found)) == len(found)
    for path in found:
        assert path.startswith(b"/") and path == posixpath.normpath(path) and path != b"/"


# -- places


def test_the_paths_of_few_different_tasks_are_their_places() -> None:
    tasks = [(b"/shots/b", b"/shots/a"), (), (b"/shots/a", b"/shots/b"), (b"/tmp/z",)]
    assert hints.places(tasks, MOUNTS) == [(b"/shots/a", b"/shots/b"), (), (b"/shots/a", b"/shots/b"), (b"/tmp/z",)]


def test_the_paths_of_many_different_tasks_become_their_directories() -> None:
    tasks = [(b"/shots/%d/%03d.exr" % (n % 2, n),) for n in range(65)]
    assert set(hints.places(tasks, MOUNTS)) == {(b"/shots/0",), (b"/shots/1",)}
    assert hints.places(tasks[:64], MOUNTS) == tasks[:64]


def test_a_directory_that_stands_for_paths_is_not_above_their_mount() -> None:
    tasks = [(b"/shots",), *((b"/shots/a/%d" % n,) for n in range(100))]
    assert hints.places(tasks, MOUNTS) == [(b"/shots",), *[(b"/shots/a",)] * 100]


def test_the_paths_of_very_many_directories_become_their_mount_points_also_on_the_root() -> None:
    tasks = [(b"/shots/%d/f" % n, b"/home/%d/f" % n) for n in range(100)]
    assert set(hints.places(tasks, MOUNTS)) == {(b"/", b"/shots")}


def test_at_most_four_places_stand_for_a_task_and_every_mount_comes_first() -> None:
    (found,) = hints.places([(*(b"/a/%d" % n for n in range(9)), b"/shots/x", b"/twice/y")], MOUNTS)
    assert found == (b"/a/0", b"/a/1", b"/shots/x", b"/twice/y")


def test_costs_are_ordered() -> None:
    assert Cost.CACHED < Cost.LOCAL < Cost.NETWORK < Cost.ABSENT
