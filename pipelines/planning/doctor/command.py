"""`sdlora doctor`: print what is wrong, or looks wrong, before any training."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipelines.planning.doctor.examination import examine
from pipelines.planning.doctor.findings import Finding

_SHOWN = 10
"""Places of one finding that the table names; --json has all of them."""


def doctor(source: Path | None, *, as_json: bool, quick: bool) -> int:
    """Examine a source as the next task, or all tasks and the machine. Print it. Return 2 if there is an error."""
    findings = examine(source, quick=quick)
    if as_json:
        levels = Counter(finding.level for finding in findings)
        shown = {
            "errors": levels["error"],
            "warnings": levels["warning"],
            "findings": [finding._asdict() for finding in findings],
        }
        sys.stdout.write(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
    else:
        _show(findings)
    return 2 if any(finding.level == "error" for finding in findings) else 0


def _show(findings: Sequence[Finding]) -> None:
    """Print findings as a table, then the places of each. All of them where files cannot be read."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    colours = {"error": "red", "warning": "yellow", "ok": "green"}
    table = Table(show_lines=False)
    for column in ("", "task", "check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    alike: dict[tuple[str, ...], list[str]] = {}
    for finding in findings:
        row = (finding.level, finding.check, finding.what, finding.remedy, *finding.where)
        alike.setdefault(row, []).append(finding.task)
    for (level, check, what, remedy, *_), tasks in alike.items():
        keys = tasks[0] if len(tasks) == 1 else f"{tasks[0]} … {tasks[-1]}"
        cells = [Text(cell) for cell in (keys, check, what, remedy)]
        table.add_row(Text(level, style=colours[level]), *cells)
    console.print(table)
    for finding in findings:
        if finding.where:
            console.print(Text(f"{finding.task} {finding.check}: {finding.what}".strip(), style="bold"))
            limit = len(finding.where) if finding.check in ("unreadable", "source") else _SHOWN
            for place in finding.where[:limit]:
                console.print(Text(f"  {place}"), soft_wrap=True)
            if len(finding.where) > limit:
                console.print(Text(f"  … and {len(finding.where) - limit} more (--json has all)"))
    levels = Counter(finding.level for finding in findings)
    verdict = ", ".join(
        f"{levels[level]} {level if levels[level] == 1 else f'{level}s'}" for level in ("error", "warning")
    )
    console.print(Text(verdict, style="red" if levels["error"] else "green"))
