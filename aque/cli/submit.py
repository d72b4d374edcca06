"""`aque submit`: run a command."""

import os
import sys
from typing import Any

import click

from aque.cli import captured, waiting
from aque.cli.exit_status import exit_status, sentence
from aque.cli.farm import Farm, open_farm
from aque.cli.options import check_strict, read, task_options
from aque.cli.pattern_tasks import pattern_spec
from aque.cli.show import as_json, complain
from aque.errors import BadInput
from aque.states import State
from aque.submitter import Submitter
from aque.values import TaskSpec

#: One word with any of these is meant for a shell.
_FOR_A_SHELL = frozenset(" \t\n|<>;&")


@click.command(name="submit", context_settings={"allow_interspersed_args": False})
@task_options
@click.option("--pattern", metavar="NAME", help="Give the words to this pattern: see `aque patterns`.")
@click.option("--cwd", metavar="DIR", help="Run it in this directory; else in the current one.")
@click.option("--stdin", metavar="FILE", help="Its input: a file there, or `-`: ours, read now and stored; else none.")
@click.option(
    "--stdout", metavar="FILE", help="Write its output to this file there, emptied first; else it is captured."
)
@click.option("--stderr", metavar="FILE", help="The same for its error output.")
@click.option("--login", is_flag=True, help="Run it in a login shell, which reads the user's profile.")
@click.option("--shell", metavar="SCRIPT", help="Run a script of /bin/sh; the words that follow are its $1, $2, ...")
@click.option("--wait", is_flag=True, help="Wait, then print what it wrote and exit as it did.")
@click.option("--watch", is_flag=True, help="As --wait, and print what it writes as it comes.")
@click.argument("words", metavar="[--] COMMAND...", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...], **chosen: Any) -> int:
    """Run a command with this environment and working directory, and print its id.

    Options end at the first word that is not one. The command is executed as it is, with no shell in between.
    With --wait the id is on stderr, and the exit status is the command's own; 128+n after signal n, 124 after its time
    limit, 125 if it never ran, 126 if it cannot be executed, 127 if there is no such command.

    \b
    aque submit -- gzip -9 scan.exr
    aque submit --cpus 1/4 --memory 2G --after 12,20-29 -- render scene.blend
    aque submit --wait --local -- make
    aque submit --shell 'sort "$1" | uniq -c > counts' names.txt
    aque submit --pattern nuke -- comp.nk 1 24
    """
    with open_farm() as farm:
        submitter = Submitter(farm.store, farm.settings)
        spec = (
            _of_pattern(farm, submitter, words, chosen)
            if chosen["pattern"]
            else _command(farm, submitter, words, chosen)
        )
        check_strict(submitter, chosen, [spec])
        states = submitter.submit([spec])
        if not (chosen["wait"] or chosen["watch"] or chosen["local"]):
            print_id(spec, states[spec.id], chosen["as_json"], waits=False)
            return 0
        print_id(spec, states[spec.id], chosen["as_json"], waits=True)
        return _wait(farm, spec, chosen["watch"], chosen["local"])


def _command(farm: Farm, submitter: Submitter, words: tuple[str, ...], chosen: dict[str, Any]) -> TaskSpec:
    argv = _argv(words, chosen["shell"])
    options = read(farm, chosen)
    is_ours = chosen["stdin"] == "-"
    stdin = sys.stdin.buffer.read(farm.settings.stdin_limit_bytes + 1) if is_ours else None
    files = submitter.redirections(None if is_ours else chosen["stdin"], chosen["stdout"], chosen["stderr"])
    (task_id,) = submitter.reserve(1)
    cwd = os.path.abspath(chosen["cwd"]) if chosen["cwd"] else None
    return submitter.command(task_id, argv, options, stdin=stdin, redirections=files, login=chosen["login"], cwd=cwd)


def _of_pattern(farm: Farm, submitter: Submitter, words: tuple[str, ...], chosen: dict[str, Any]) -> TaskSpec:
    if said := [option for option in ("cwd", "stdin", "stdout", "stderr", "login", "shell") if chosen[option]]:
        raise BadInput(
            f"--{said[0]} is for commands as they stand; what becomes of its words is the pattern's business. Nothing was "
            "submitted: choose one."
        )
    (task_id,) = submitter.reserve(1)
    return pattern_spec(farm, submitter, task_id, chosen, words, {})


def print_id(spec: TaskSpec, state: State, as_line_of_json: bool, waits: bool) -> None:
    """The id of what was submitted: on stdout, or on stderr if what the task writes comes there."""
    line = str(spec.id)
    if as_line_of_json:
        job_id = spec.id if spec.job_id is None else spec.job_id
        line = as_json({"id": spec.id, "job_id": job_id, "name": spec.name, "state": str(state)})
    print(line, file=sys.stderr if waits else sys.stdout, flush=True)


def _wait(farm: Farm, spec: TaskSpec, live: bool, local: bool) -> int:
    try:
        with waiting.someone_to_run(farm, [spec], local) as worker:
            tail = captured.Tail(farm, [spec.id])
            for _ in waiting.until_ended(farm, [spec.id], local=worker, every=waiting.LIVE_SECONDS if live else 1.0):
                if live:
                    tail.copy()
            if not live:
                captured.copy(farm, [spec.id])
            (end,) = waiting.ends(farm, [spec.id])
    except KeyboardInterrupt:
        return waiting.interrupted(spec.id, local)
    if said := sentence(end):
        complain(said)
    return exit_status(end)


def _argv(words: tuple[str, ...], script: str | None) -> list[str]:
    if script is not None:
        return ["/bin/sh", "-c", script, "aque", *words]
    if len(words) == 1 and _FOR_A_SHELL.intersection(words[0]):
        raise BadInput(
            f"{words[0]!r} is one word, which would be the name of a program. Nothing was submitted: give the words of the "
            "command one by one, or a script with --shell."
        )
    return list(words)
