"""The commands `aque`, `aque-worker`, `aque-xargs` and `aque-kill`: which verbs there are, and how a run of one ends.

A verb lives in the module of its name, as `command`, which returns the exit status; only the one that is called is imported.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module

import click

from aque.cli.show import complain
from aque.errors import AqueError, BadInput
from aque.version import __version__

#: Verb -> what it does, as `aque` alone lists them.
VERBS = {
    "Submit": {
        "submit": "run a command",
        "call": "run a Python function",
        "xargs": "run a command on the words of standard input, as xargs does",
    },
    "Look": {
        "status": "list tasks, and say why they are not running",
        "explain": "say why tasks are not running, worker by worker",
        "output": "print what tasks wrote",
        "wait": "wait for tasks to end",
        "events": "print what happens to tasks, as it happens",
        "workers": "list workers",
        "patterns": "list the patterns that packages bring",
        "doctor": "check the store",
    },
    "Change": {
        "kill": "end tasks, or withdraw them before they start",
        "set": "change tasks that wait: priority, cpus, host, ...",
        "limits": "bound how many tasks of the farm use something at once",
    },
    "Set up": {
        "worker": "run tasks on this machine",
        "init": "create or upgrade the tables of the store",
        "demo": "watch Aque at work on real files",
    },
}
SUMMARIES = {verb: summary for verbs in VERBS.values() for verb, summary in verbs.items()}


class Verbs(click.Group):
    """The verbs, imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load(cmd_name) if cmd_name in SUMMARIES else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in SUMMARIES and not args[0].startswith("-"):
            close = get_close_matches(args[0], SUMMARIES, n=1)
            hint = f"did you mean `aque {close[0]}`?" if close else "`aque --help` lists the verbs."
            raise BadInput(f"there is no verb {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, verbs in VERBS.items():
            with formatter.section(group):
                formatter.write_dl([(verb.ljust(8), summary) for verb, summary in verbs.items()])


@click.group(cls=Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="aque %(version)s")
@click.pass_context
def aque(context: click.Context) -> int:
    """Run graphs of commands and Python functions on your machines.

    \b
    aque worker                          in one terminal, and in another:
    aque submit --wait -- gzip -9 file   run a command, wait for it, exit as it does
    aque status                          see what runs, what waits, and why
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    return 0


def load(verb: str) -> click.Command:
    """The command of a verb."""
    command = import_module(f"aque.cli.{verb}").command
    assert isinstance(command, click.Command)
    return command


def run(command: click.Command, program: str, arguments: Sequence[str]) -> int:
    """Run a command and return its exit status. Whatever happens is at most one sentence on stderr."""
    debug = bool(os.environ.get("AQUE_DEBUG"))
    _open_what_is_closed()
    stdout = sys.stdout
    try:
        status = command.main(args=list(arguments), prog_name=program, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        return _leave_broken_pipe()
    except SystemExit:
        if sys.stdout is not stdout:  # click has seen a broken pipe first, and muffled stdout
            return _leave_broken_pipe()
        raise
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error, click.Abort) and not isinstance(error.__cause__, KeyboardInterrupt):
            complain("nothing was done.")  # the answer to a question was no
            return 1
        complain("interrupted.")
        return 130
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else program
        text = error.format_message()
        end = "" if text.endswith(("?", ".")) else "."
        complain(f"{text[:1].lower()}{text[1:]}{end} `{path} --help` shows how to use it.")
        return error.exit_code
    except click.ClickException as error:
        complain(error.format_message())
        return error.exit_code
    except AqueError as error:
        if debug:
            raise
        complain(str(error))
        return error.exit_status
    except OSError as error:
        if debug:
            raise
        what = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        complain(f"{what}{error.strerror or error}.")
        return 1
    except Exception as error:
        if debug:
            raise
        # By name: importing SQLAlchemy to ask costs more than most verbs take.
        from_store = type(error).__module__.startswith(("sqlalchemy.", "psycopg2", "sqlite3"))
        lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [""]
        what = "the store failed, what was submitted goes on" if from_store else "Aque failed, which is a bug"
        complain(f"{what}: {type(error).__name__}: {lines[0]}. Set AQUE_DEBUG=1 to see where.")
        return 69 if from_store else 1


def _open_what_is_closed() -> None:
    """Who starts a program without stdout or stderr (`>&-`) wants to read nothing of it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  until the end of the process


def _leave_broken_pipe() -> int:
    """The reader of stdout has gone: end as quietly as a program that dies of SIGPIPE."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):
        os.dup2(nothing, sys.stdout.fileno())  # or the interpreter complains when it flushes at its end
    return 141


def main() -> int:
    """`aque VERB ...`"""
    return run(aque, "aque", sys.argv[1:])


def worker_main() -> int:
    """`aque-worker ...`, the same as `aque worker ...`"""
    return run(load("worker"), "aque-worker", sys.argv[1:])


def xargs_main() -> int:
    """`aque-xargs ...`, the same as `aque xargs ...`"""
    return run(load("xargs"), "aque-xargs", sys.argv[1:])


def kill_main() -> int:
    """`aque-kill ...`, the same as `aque kill ...`"""
    return run(load("kill"), "aque-kill", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
