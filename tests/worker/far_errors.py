"""An exception whose module only the worker has loaded."""


class Far(Exception):
    """With two arguments."""
