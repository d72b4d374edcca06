"""`aque demo`: watch Aque at work on real files."""

import click


@click.command(name="demo")
def command() -> int:
    """Build a report about the Python standard library's source with a graph of commands and functions.

    Starts a worker of its own on a store of its own, and leaves nothing behind.

    \b
    aque demo
    """
    from aque.demo import main

    return main()
