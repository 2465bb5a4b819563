"""``phi1 doctor``: print what this machine gives to training."""

from __future__ import annotations

import json as json_format
import sys
from typing import Annotated

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phi1_megatron.doctor import Report, Status, examine

COLOURS = {
    Status.OK: "green",
    Status.FALLBACK: "yellow",
    Status.MISSING: "dim",
    Status.BROKEN: "bold red",
}


def doctor(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Tell what this machine gives: what is live, and what falls back to what.

    Exits with 1 where training cannot run here (no torch or megatron-core, no gloo, no usable
    shared memory), else with 0.

    Parameters
    ----------
    json
        Print the report as one JSON object in place of the tables.
    """
    with Console(stderr=True).status("Looking at this machine ..."):
        report = examine()
    if json:
        sys.stdout.write(json_format.dumps(report.as_dict(), indent=2) + "\n")
    else:
        show(report, Console())
    if not report.can_train:
        raise SystemExit(1)


def show(report: Report, console: Console) -> None:
    """Print the findings, then who does the work of a training step, then the verdict."""
    console.print(findings_table(report))
    console.print(kernels_table(report))
    if report.can_train:
        console.print("[green]Training can run here.[/]")
        return
    console.print("[bold red]Training cannot run here.[/]")
    for finding in report.blockers:
        console.print(f"  {escape(f'{finding.name}: {finding.found}. {finding.means}.')}")


def findings_table(report: Report) -> Table:
    """One row a probe: what was found and, dimmed below it, what follows."""
    table = Table(
        box=box.SIMPLE_HEAD, title=f"phi1_megatron {report.version}", title_justify="left"
    )
    table.add_column("part", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("what there is, and what follows", overflow="fold")
    for finding in report.findings:
        text = escape(finding.found)
        if finding.means:
            text += f"\n[dim]→ {escape(finding.means)}[/]"
        colour = COLOURS[finding.status]
        table.add_row(finding.name, f"[{colour}]{finding.status}[/]", text)
    return table


def kernels_table(report: Report) -> Table:
    """One row a kind of work in a training step: who does it here, and why."""
    table = Table(box=box.SIMPLE_HEAD, title="In a training step", title_justify="left")
    table.add_column("work", no_wrap=True)
    table.add_column("done by", no_wrap=True)
    table.add_column("because", overflow="fold")
    for kernel in report.kernels:
        table.add_row(kernel.work, escape(kernel.live), f"[dim]{escape(kernel.why)}[/]")
    return table
