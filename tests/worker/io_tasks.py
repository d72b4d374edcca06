"""Tasks that say what they read."""

import aque


@aque.task(io_paths=lambda path, *, beside="": [path, *([beside] if beside else [])])
def convert(path: str, *, beside: str = "") -> str:
    return path


@aque.task(io_paths=["/shots/always"])
def render() -> None:
    pass
