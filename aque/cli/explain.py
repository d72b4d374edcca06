"""`aque explain`: say why tasks are not running."""

from collections.abc import Mapping
from typing import Any

import click

from aque import observer
from aque.cli import ids
from aque.cli.farm import open_farm
from aque.cli.show import as_json, columns, escape
from aque.explain import Explanation
from aque.moments import utc

#: Facts that are moments, in seconds since 1970.
_MOMENTS = frozenset({"started_at", "finished_at", "expected_at", "not_before"})


@click.command(name="explain")
@click.option("--json", "as_lines_of_json", is_flag=True, help="Print one JSON object a task.")
@click.argument("words", metavar="IDS...", nargs=-1, required=True)
def command(words: tuple[str, ...], as_lines_of_json: bool) -> int:
    """Say why tasks are not running: what each waits for, then worker by worker the first thing that is in the way.

    Of a job: what becomes of its tasks, summed up. Of a task that was skipped: the failure that began it.

    \b
    aque explain 12
    aque explain @last
    aque explain --json 12,20-29
    """
    with open_farm() as farm:
        for explanation in observer.explain_tasks(farm.store, farm.settings, ids.resolve(farm, words)):
            if as_lines_of_json:
                print(as_json(_values(explanation)))
            else:
                print("\n".join(_lines(explanation)))
    return 0


def _lines(explanation: Explanation) -> list[str]:
    subject = explanation.subject
    lines = [escape(f"{subject.id} {subject.name}: {subject.state}")]
    lines += [escape(f"  {reason.text}") for reason in explanation.reasons]
    if explanation.workers:
        rows = [[f"    {view.worker}", view.text] for view in explanation.workers]
        lines += columns(["    worker", "what is in the way"], rows)
    return lines


def _values(explanation: Explanation) -> dict[str, Any]:
    subject = explanation.subject
    return {
        "id": subject.id,
        "name": subject.name,
        "state": str(subject.state),
        "reasons": [
            {"kind": reason.kind, "text": reason.text, **_facts(reason.facts)} for reason in explanation.reasons
        ],
        "workers": [
            {
                "worker": view.worker,
                "host": view.host,
                "kind": view.kind,
                "text": view.text,
                **_facts({"expected_at": view.expected_at}),
            }
            for view in explanation.workers
        ],
    }


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: utc(value) if name in _MOMENTS and value is not None else value for name, value in facts.items()}
