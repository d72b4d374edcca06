"""The shop has a test suite of its own, which needs a worker: `test_one_line.py` runs it."""

collect_ignore = ["suite"]
