"""`aque doctor`: check the store."""

import click

from aque.cli.farm import Farm, open_farm
from aque.cli.show import as_json, count, escape, size, span
from aque.store import Finding, Sizes, WorkerRow, schema


@click.command(name="doctor")
@click.option("--json", "as_line_of_json", is_flag=True, help="Print one JSON object.")
def command(as_line_of_json: bool) -> int:
    """Check what must always hold in the store, such as that every task's open dependencies are counted right, and tell how
    much it holds.

    Exits with 0 if all is well, 1 if something was found, 69 if the store cannot be reached.

    \b
    aque doctor
    aque doctor --json
    """
    with open_farm() as farm, farm.store.connect() as connection:
        findings = farm.store.doctor(connection)
        workers = farm.store.workers(connection)
        sizes = farm.store.retention.sizes()
        print(_json(farm, findings, workers, sizes) if as_line_of_json else _text(farm, findings, workers, sizes))
    return 1 if findings else 0


def _lost(workers: list[WorkerRow]) -> list[WorkerRow]:
    """Workers that went without a word, whether or not another one has noticed."""
    return [row for row in workers if row.state != "stopped" and not row.is_live]


def _json(farm: Farm, findings: list[Finding], workers: list[WorkerRow], sizes: Sizes) -> str:
    return as_json(
        {
            "clean": not findings,
            "findings": [{"rule": finding.rule, "ids": finding.ids} for finding in findings],
            "store": farm.store.engine.url.render_as_string(hide_password=True),
            "schema": schema.HEAD,
            "live_workers": [row.info.name for row in workers if row.is_live],
            "lost_workers": [row.info.name for row in _lost(workers)],
            "output_bytes": sizes.output,
            "result_bytes": sizes.results,
            "row_bytes": sizes.rows,
            "table_bytes": sizes.tables,
        }
    )


def _text(farm: Farm, findings: list[Finding], workers: list[WorkerRow], sizes: Sizes) -> str:
    live = sum(row.is_live for row in workers)
    lines = [
        f"store    {farm.store.engine.url.render_as_string(hide_password=True)}",
        f"schema   {schema.HEAD}",
        f"workers  {live} live, {len(_lost(workers))} lost",
    ]
    quota = farm.settings.output_quota_bytes
    lines += [
        f"holds    output   {size(sizes.output)}" + (f" of at most {size(quota)}" if quota else ""),
        f"         results  {size(sizes.results)}",
        f"         rows     {size(sizes.rows)}, with their indexes",
    ]
    for row in _lost(workers):
        if row.state == "live":  # those that a reaper has seen to are history
            lines.append(f"         {escape(row.info.name)} has not been heard of for {span(row.expired_seconds)}")
    for finding in findings:
        more = ", ..." if len(finding.ids) > 10 else ""
        ids = ", ".join(map(str, finding.ids[:10])) + more
        lines.append(f"broken   {finding.rule}: {ids}")
    lines.append(count(len(findings), "broken rule") if findings else "clean")
    return "\n".join(lines)
