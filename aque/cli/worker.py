"""`aque worker`: run tasks on this machine."""

from typing import Any

import click

from aque import reload, restart
from aque.cli.farm import open_farm
from aque.errors import BadInput
from aque.resources import parse_indices, parse_memory, parse_tags


@click.command(name="worker", context_settings={"allow_interspersed_args": False})
@click.option("--cpus", metavar="N", help="CPUs that tasks may reserve; else those that this process may use.")
@click.option("--memory", metavar="SIZE", help="Memory that tasks may reserve, with K, M, G, T; else the machine's.")
@click.option(
    "--resource",
    metavar="NAME=N",
    multiple=True,
    help="What tasks may reserve besides: gpu=2, or by their numbers 'gpu=[1,3]'. Repeatable.",
)
@click.option("--tag", metavar="TAG", multiple=True, help="What this worker is good for: tasks can ask for it.")
@click.option("--pin", is_flag=True, help="Bind each task to as many CPUs as it reserves.")
@click.option("-Q", "--queues", metavar="NAMES", help="The queues to serve, with commas; else the default queue.")
@click.option(
    "-c", "--concurrency", metavar="N", type=click.IntRange(min=1), help="Python tasks at once; else the CPUs."
)
@click.option("-n", "--name", metavar="NAME", help="The name of this worker, as Celery's -n.")
@click.option("--one", is_flag=True, help="Run one task and exit.")
@click.option("--to-end", is_flag=True, help="Exit when no unfinished task is left that this worker could run.")
@click.option("--reload", is_flag=True, help="Restart when the code of tasks, or the configuration, has changed.")
@click.option("-l", "--loglevel", metavar="LEVEL", default="INFO", help="DEBUG INFO WARNING ERROR (INFO).")
@click.argument("celery_args", metavar="[-- CELERY ARGUMENTS...]", nargs=-1, type=click.UNPROCESSED)
def command(celery_args: tuple[str, ...], **chosen: Any) -> int:
    """Run tasks on this machine until it is told to stop (Ctrl-C; once more: at once).

    A Celery worker with all that it has: `celery inspect`, events, Flower. What follows `--` goes to it as it is.

    \b
    aque worker
    aque worker --cpus 8 --memory 24G --queues celery,render
    aque worker --to-end
    aque worker -- --max-tasks-per-child 100
    """
    if chosen["one"] and chosen["to_end"]:
        raise BadInput("--one and --to-end say two different times to exit: choose one.")
    _check_cpus(chosen["cpus"])
    if chosen["memory"] is not None:
        parse_memory(chosen["memory"])
    resources = ",".join(chosen["resource"])
    parse_indices(resources)
    parse_tags(",".join(chosen["tag"]))
    queues = [name.strip() for name in (chosen["queues"] or "").split(",") if name.strip()]
    if chosen["reload"]:
        reload.require()
    if restart.handover is None:  # the store may be away while it restarts: all the more reason to keep what runs
        with open_farm():
            pass  # a store that cannot be used is one sentence here, and pages of log later
    from aque.celery_app import run_worker

    return run_worker(
        cpus=chosen["cpus"],
        memory=chosen["memory"],
        resources=resources or None,
        tags=",".join(chosen["tag"]) or None,
        pin=chosen["pin"],
        queues=queues or None,
        concurrency=chosen["concurrency"],
        name=chosen["name"],
        until="one" if chosen["one"] else "end" if chosen["to_end"] else None,
        reload=chosen["reload"],
        loglevel=chosen["loglevel"].upper(),
        celery_args=list(celery_args),
    )


def _check_cpus(text: str | None) -> None:
    try:
        if text is None or float(text) > 0:
            return
    except ValueError:
        pass
    raise BadInput(f"--cpus {text}: write how many CPUs tasks may reserve on this machine, such as 8 or 1.5.")
