"""`aque limits`: list, set and remove the farm's limits."""

import click

from aque import control
from aque.cli.farm import Farm, open_farm
from aque.cli.show import as_json, columns, count
from aque.errors import BadInput
from aque.machine import user_name

#: So many holders are listed one by one.
FEW = 5


@click.group(name="limits", invoke_without_command=True)
@click.option("--json", "as_lines_of_json", is_flag=True, help="Print one JSON object a line.")
@click.pass_context
def command(context: click.Context, as_lines_of_json: bool) -> int:
    """List the farm's limits: how many tokens of each there are, who holds them, how many tasks wait.

    A task that was submitted with `--limit NAME` holds a token while it runs, on whichever worker.

    \b
    aque limits
    aque limits set nuke 10
    aque submit --limit nuke -- render shot.nk
    aque limits rm nuke
    """
    return 0 if context.invoked_subcommand else _list(as_lines_of_json)


@command.command(name="set")
@click.argument("name", metavar="NAME")
@click.argument("capacity", metavar="N", type=int)
def set_(name: str, capacity: int) -> int:
    """Let tasks hold at most N (0 to 10000) tokens of this limit together; make it if there is none.

    When it is lowered, what runs goes on, and nothing more starts until there is room.

    \b
    aque limits set nuke 10
    aque limits set user:ann 4
    """
    with open_farm() as farm:
        _check_administrator(farm)
        row = control.set_limit(farm.store, name, capacity)
    print(f"{name} is {capacity}; {count(row.used, 'token')} in use, {count(row.waiting, 'ready task')} waiting")
    return 0


@command.command(name="rm")
@click.argument("name", metavar="NAME")
def rm(name: str) -> int:
    """Remove a limit: nothing bounds the tasks that ask for it any more.

    \b
    aque limits rm nuke
    """
    with open_farm() as farm:
        _check_administrator(farm)
        control.remove_limit(farm.store, name)
    print(f"{name} is no limit any more")
    return 0


def _check_administrator(farm: Farm) -> None:
    user = user_name()
    if not farm.settings.is_administrator(user):
        raise BadInput(
            f"limits are changed by administrators (setting administrators), and {user} is none. Nothing was changed: ask one."
        )


def _list(as_lines_of_json: bool) -> int:
    with open_farm() as farm, farm.store.connect() as connection:
        rows = farm.store.limits.rows(connection)
    if as_lines_of_json:
        for row in rows:
            values = {"name": row.name, "capacity": row.capacity, "used": row.used, "waiting": row.waiting}
            print(as_json({**values, "holders": row.holders}))
        return 0
    if not rows:
        print("there are no limits: `aque limits set NAME N` makes one.")
        return 0
    table = []
    for row in rows:
        more = [f"and {len(row.holders) - FEW} more"] if len(row.holders) > FEW else []
        holders = ", ".join([*map(str, row.holders[:FEW]), *more])
        table.append([row.name, str(row.capacity), str(row.used), str(row.waiting), holders])
    header = ["name", "capacity", "used", "waiting", "holders"]
    print("\n".join(columns(header, table, frozenset(header[1:4]))))
    return 0
