"""How xargs's input becomes commands."""

import random
import shutil
import subprocess

import pytest

from aque.cli.xargs_input import BadXargsInput, commands, delimited_words, delimiter, words


def split(data, **options):
    return [argv[1:] for argv in commands([b"c"], words(data), **options)]


def refused(data, **options):
    """What is run before the input breaks off."""
    run = []
    with pytest.raises(BadXargsInput):
        for argv in commands([b"c"], words(data), **options):
            run.append(argv[1:])
    return run


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"a b\tc\nd", [b"a", b"b", b"c", b"d"]),
        (b"a\\ b 'c d' \"e\tf\"", [b"a b", b"c d", b"e\tf"]),
        (b"a\"b c\"'d'", [b"ab cd"]),
        (b"\"a\\n\" 'b\\'", [b"a\\n", b"b\\"]),
        (b"a\\\nb", [b"a\nb"]),
        (b"'' x", [b"", b"x"]),
        (b"\xe2\x80\xa8 \xc2\xa0 a\x0bb\r\n", ["\u2028".encode(), "\u00a0".encode(), b"a\x0bb\r"]),
        (b"\xff\xfe", [b"\xff\xfe"]),
        (b"a\0b c", [b"a", b"c"]),
    ],
)
def test_words_are_bytes_between_spaces_tabs_and_newlines(data, found):
    assert split(data) == [found]


@pytest.mark.parametrize("data", [b"", b" \n\t\n"])
def test_input_without_words_runs_the_command_once_unless_told_otherwise(data):
    assert split(data) == [[]]
    assert split(data, max_args=3) == [[]]
    assert split(data, run_if_empty=False) == []


def test_n_takes_so_many_words():
    assert split(b"1 2 3 4 5", max_args=2) == [[b"1", b"2"], [b"3", b"4"], [b"5"]]


def test_l_takes_so_many_lines_and_a_blank_at_the_end_joins_the_next():
    assert split(b"a b\n\nc\nd \ne\n", max_lines=1) == [[b"a", b"b"], [b"c"], [b"d", b"e"]]


def test_a_quote_that_its_line_does_not_end_stops_there():
    assert refused(b"a b\nc 'd\ne'") == [[b"a", b"b", b"c"]]
    assert refused(b"a\nb 'c\n", max_lines=1) == [[b"a"]]


def test_a_command_holds_so_many_bytes_and_no_more():
    assert split(b"aaa bbb ccc", limit=2 + 8) == [[b"aaa", b"bbb"], [b"ccc"]]
    assert refused(b"a bbbbbbbbbb", limit=10) == [[b"a"]]


def test_null_and_delimiter_take_everything_between_them():
    assert [w.text for w in delimited_words(b"a 'b\0\0c\nd", b"\0")] == [b"a 'b", b"", b"c\nd"]
    assert [w.text for w in delimited_words(b"a,b\n", b",")] == [b"a", b"b\n"]


def test_a_delimiter_is_a_byte_or_an_escape_of_one():
    assert [delimiter(text) for text in (b",", b"\\n", b"\\x1f", b"\\037", b"\\\\")] == [
        b",",
        b"\n",
        b"\x1f",
        b"\x1f",
        b"\\",
    ]
    for text in (b"", b"ab", b"\\q", b"\\x100", "é".encode()):
        with pytest.raises(ValueError):
            delimiter(text)


@pytest.fixture
def gnu_xargs(tmp_path):
    """Runs GNU xargs with a command that shows its words."""
    program = shutil.which("xargs")
    if program is None or b"GNU findutils" not in subprocess.check_output([program, "--version"]):
        pytest.skip("there is no GNU xargs to compare with")
    show = tmp_path / "show"
    show.write_text("#!/bin/sh\nprintf '<'; for a; do printf '%s\\001' \"$a\"; done; printf '>'\n")
    show.chmod(0o755)

    def run(data, *options):
        done = subprocess.run([program, *options, show], input=data, capture_output=True, check=False)
        return done.stdout, done.returncode

    return run


def test_random_input_is_split_as_gnu_xargs_splits_it(gnu_xargs):
    rng = random.Random(7)
    choices = [((), {}), (("-n2",), {"max_args": 2}), (("-L2",), {"max_lines": 2}), (("-r",), {"run_if_empty": False})]
    for _ in range(300):
        data = bytes(rng.choices(b"ab  \t\n\n'\"\\\r\x0b\0", k=rng.randrange(14)))
        options, ours = rng.choice(choices)
        shown, status = b"", 0
        try:
            for argv in commands([b"c"], words(data), **ours):
                shown += b"<" + b"".join(word + b"\x01" for word in argv[1:]) + b">"
        except BadXargsInput:
            status = 1
        assert (shown, status) == gnu_xargs(data, *options), (data, options)
