"""`--pattern`: a task of a pattern, from what was said on the command line."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from aque.cli.farm import Farm
from aque.cli.options import read
from aque.errors import AqueError, BadInput
from aque.options import Options
from aque.submitter import Submitter
from aque.values import Condition, TaskSpec

#: Of the command line's names for options those that Python has other names for.
_NAMES = {
    "resource": "resources",
    "limit": "limits",
    "tag": "tags",
    "requires": "requires_paths",
    "no_requeue": "requeue",
}
_DEPENDENCIES = {Condition.OK: "depends_on", Condition.ANY: "after_any", Condition.FAILED: "after_failed"}


def pattern_spec(
    farm: Farm,
    submitter: Submitter,
    task_id: int,
    chosen: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> TaskSpec:
    """The task of the pattern `chosen["pattern"]` with these arguments; the options that were given stand above the pattern's
    own. Raises BadInput, also for whatever a hook raises."""
    from aque import forms, patterns  # Celery

    name, given = chosen["pattern"], _given(read(farm, chosen))
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the id
            found = patterns.load(name)
            parts = patterns.parts_of(found, args, kwargs)
            options = {**patterns.options_of(found, parts), **given}
            return forms.pattern_spec(submitter, task_id, name, found, parts, options)
    except AqueError:
        raise
    except Exception as error:
        raise BadInput(
            f"the pattern {name!r} cannot take this: {type(error).__name__}: {error}. Nothing was submitted."
        ) from error


def _given(options: Options) -> dict[str, Any]:
    """What was said on the command line, and not what is so by default, by the names that Python has for it."""
    context = click.get_current_context()
    said = {
        _NAMES.get(name, name)
        for name in context.params
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if said & {"io", "no_io"}:  # either replaces all that a pattern says of paths
        said |= {"io", "io_paths"}
    given = {field.name: getattr(options, field.name) for field in fields(options) if field.name in said}
    for condition, name in _DEPENDENCIES.items():
        if ids := [edge.upstream for edge in options.dependencies if edge.condition is condition]:
            given[name] = ids
    return given
