"""`aque demo`: Aque at work on real files, the source of Python's standard library. It reads in this order:

private_farm.py   a store and a worker of the demo's own, and nothing left of them
graph.py          what is submitted: two `aque xargs` and a graph of Python tasks
work.py           what the Python tasks do, in the worker
figures.py        what the finished tasks' rows say: the longest path, the CPUs in use
run.py            the demo from start to end: progress, report, checks
"""


def main() -> int:
    """Run the demo; 0 if everything that it checks held. Raises AqueError with a sentence if not."""
    from aque.demo import run  # workers import this package too, and need only `work`

    return run.main()
