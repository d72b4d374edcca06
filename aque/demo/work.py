"""What the demo's Python tasks do. Workers import these functions by name."""
# mypy: disable-error-code="untyped-decorator"

import ast
import gzip
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import Any

import aque

#: So many of the longest functions and of the most imported modules are reported.
TOP = 10
#: In the name of a group of modules that are in no package.
MODULES = "..."


@aque.task(cpus=0.5)
def count(directory: str, files: Sequence[str]) -> dict[str, int]:
    """Files, lines and bytes."""
    texts = [Path(directory, file).read_bytes() for file in files]
    lines = sum(text.count(b"\n") + (text[-1:] not in (b"", b"\n")) for text in texts)
    return {"files": len(texts), "lines": lines, "bytes": sum(map(len, texts))}


@aque.task
def parse(directory: str, files: Sequence[str]) -> dict[str, Any]:
    """Functions, classes, the longest functions, and in how many files each module is imported. Raises SyntaxError."""
    functions: list[tuple[int, str, str]] = []
    classes = 0
    imports: Counter[str] = Counter()
    for file in files:
        tree = _tree(Path(directory, file))
        imports.update(_imported(tree))
        for name, node in _definitions(tree, _module(file)):
            if isinstance(node, ast.ClassDef):
                classes += 1
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                functions.append((lines, name, f"{file}:{node.lineno}"))
    return {
        "functions": len(functions),
        "classes": classes,
        "longest": sorted(functions, reverse=True)[:TOP],
        "imports": dict(imports),
    }


@aque.task(cpus=0.5)
def describe(name: str, counted: dict[str, int], parsed: dict[str, Any]) -> dict[str, Any]:
    """One package: what was counted and what was parsed."""
    return {"name": name, **counted, **parsed}


@aque.task(cpus=0.5)
def merge(packages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All packages as one."""
    imports: Counter[str] = Counter()
    for package in packages:
        imports.update(package["imports"])
    longest = sorted((tuple(function) for package in packages for function in package["longest"]), reverse=True)
    return {
        **{name: sum(p[name] for p in packages) for name in ("files", "lines", "bytes", "functions", "classes")},
        "largest": sorted(((p["lines"], p["name"]) for p in packages if MODULES not in p["name"]), reverse=True)[:TOP],
        "longest": longest[:TOP],
        "imports": sorted(imports.items(), key=lambda item: (-item[1], item[0]))[:TOP],
    }


@aque.task(cpus="all")
def verify(directory: str, archive: str, files: Sequence[str]) -> dict[str, int]:
    """Unpack everything with all CPUs that are reserved for it, and compare it with the originals."""
    here = aque.current_task()
    threads = ceil(here.cpus) if here else 1

    def unpack(file: str) -> tuple[int, int]:
        packed = Path(archive, f"{file}.gz").read_bytes()
        unpacked = gzip.decompress(packed)
        if unpacked != Path(directory, file).read_bytes():
            raise ValueError(f"{file} was not compressed faithfully")
        return len(packed), len(unpacked)

    with ThreadPoolExecutor(threads) as pool:
        sizes = list(pool.map(unpack, files))
    return {
        "files": len(sizes),
        "packed_bytes": sum(packed for packed, _ in sizes),
        "unpacked_bytes": sum(unpacked for _, unpacked in sizes),
        "threads": threads,
    }


@aque.task(cpus=0.5)
def seal(commands: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A checksum of the checksums that these commands have printed."""
    if any(command["truncated"] for command in commands):
        raise ValueError("a command has printed more checksums than its result holds")
    lines = sorted(line for command in commands for line in command["stdout"].splitlines())
    return {"checksums": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


@aque.task(cpus=0)
def explain(path: str) -> str:
    """Why a file cannot be parsed."""
    try:
        ast.parse(Path(path).read_bytes())
    except SyntaxError as error:
        return f"{Path(path).name}, line {error.lineno}: {error.msg}"
    return f"{Path(path).name}: nothing is wrong with it"


@aque.task(cpus=0)
def tidy(path: str) -> str:
    """Remove a file."""
    Path(path).unlink()
    return path


@aque.task(cpus=0.5)
def report(whole: dict[str, Any], archive: dict[str, int], sealed: dict[str, Any], mistake: str) -> dict[str, Any]:
    """Everything in one."""
    return {"whole": whole, "archive": archive, "seal": sealed, "mistake": mistake}


def _tree(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in old strings
        return ast.parse(path.read_bytes(), filename=path.name)


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Classes and functions below `node`, each with its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{name}.{child.name}", child
            yield from _definitions(child, f"{name}.{child.name}")
        elif not isinstance(child, ast.expr):
            yield from _definitions(child, name)


def _imported(tree: ast.AST) -> set[str]:
    """Top-level modules that are imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found
