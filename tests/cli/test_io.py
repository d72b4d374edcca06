"""--io and --no-io, and that no path that cannot be looked at keeps a verb waiting."""

import csv

from tests.filesystems import FileSystems


def places(aque, *ids):
    rows = csv.DictReader(aque("status", *map(str, ids), "--csv", "id,places").out.splitlines())
    found = {int(row["id"]): row["places"].split() for row in rows}
    return found[ids[0]] if len(ids) == 1 else [found[task_id] for task_id in ids]


def test_submit_takes_the_words_that_are_paths_those_that_io_names_or_none(aque):
    (aque.cwd / "f").touch()
    here = str(aque.cwd)
    assert places(aque, aque.submit("--", "gzip", "f")) == [here]
    assert places(aque, aque.submit("--io", "/shots/a", "--io", "b", "--", "gzip", "f")) == sorted(
        ["/shots/a", f"{here}/b"]
    )
    assert places(aque, aque.submit("--no-io", "--", "gzip", "f")) == []


def test_io_and_no_io_exclude_each_other(aque):
    done = aque("submit", "--io", "/x", "--no-io", "--", "true")
    assert done.status == 2 and "choose one" in done.err


def test_the_commands_of_xargs_have_each_its_own_paths(aque):
    for name in ("a", "b"):
        (aque.cwd / name).touch()
    job = aque("xargs", "--no-wait", "-n1", "gzip", given=b"a b c").id
    assert places(aque, job + 1, job + 2, job + 3) == [[f"{aque.cwd}/a"], [f"{aque.cwd}/b"], []]


def test_call_asks_the_task_for_its_paths(aque):
    (aque.cwd / "tasks_of_mine.py").write_text(
        "import aque\n@aque.task(io_paths=lambda path: [path])\ndef convert(path):\n    pass\n"
    )
    assert places(aque, aque("call", "tasks_of_mine:convert", '"/shots/a"').id) == ["/shots/a"]
    assert places(aque, aque("call", "--io", "/shots/b", "tasks_of_mine:convert", '"/shots/a"').id) == ["/shots/b"]
    assert places(aque, aque("call", "--no-io", "tasks_of_mine:convert", '"/shots/a"').id) == []
    (aque.cwd / "tasks_with_needs.py").write_text(
        "import aque\n@aque.task(resources={'gpu': 1}, limits='nuke=2', tags='fast', requires_paths=['/shots'], cpus=0)\n"
        "def render():\n    pass\n"
    )
    refused = aque("call", "tasks_with_needs:render")
    assert refused.status == 2 and "no limit 'nuke'" in refused.err
    assert aque("limits", "set", "nuke", "2").status == 0
    task_id = aque("call", "tasks_with_needs:render").id
    shown = aque("status", str(task_id), "--csv", "resources,limits,tags,requires_paths").out
    _, needs = csv.reader(shown.splitlines())
    assert needs == ["gpu=1", "nuke=2", "fast", "/shots"]
    wrong = aque("call", "tasks_of_mine:convert", "{}")
    assert wrong.status == 2 and "io_paths" in wrong.err and "Nothing was submitted" in wrong.err


def test_submit_and_xargs_return_where_a_mount_does_not_answer(aque, file_systems: FileSystems):
    hung, _ = file_systems.hung()
    assert places(aque, aque.submit("--", "gzip", f"{hung}/a/b")) == [f"{hung}/a"]
    words = b"".join(b"%s/%d\n" % (bytes(hung), n) for n in range(300))
    job = aque("xargs", "--no-wait", "-n1", "gzip", given=words).id
    assert places(aque, job + 1) == [str(hung)]
