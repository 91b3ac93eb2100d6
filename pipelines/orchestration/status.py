"""Tables of a chain: which stages are done, `sdlora status`, and what a run has come to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipelines.planning.keep import require_decision
from pipelines.project.errors import InputError
from pipelines.project.files import read_json
from pipelines.project.layout import EVALUATIONS, METRICS, REPORT, StageName
from pipelines.project.params import Params
from pipelines.project.schemas import Headline, Metrics
from pipelines.reports.format import percent
from pipelines.runtime.console import echo
from pipelines.versioning.plan import Plan, read_plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_TASKS_IN_THE_TABLE = 20
"""Of more tasks a terminal shows no matrix that could be read; the report has it."""


def print_summary(params: Params, *, until: str | None = None) -> None:
    """Print the accuracy matrix and where the files are. Up to a task there is no report, which needs all of them."""
    from rich.console import Console

    console = Console()
    if len(params.tasks) <= _TASKS_IN_THE_TABLE:
        console.print(_accuracy_table(params))
    if until is not None:
        console.print(f"up to {until}; `sdlora run` does the rest, and the report", highlight=False)
        return
    metrics = read_json(METRICS, Headline)
    shown = {
        "last accuracy": metrics["last_accuracy"],
        "average accuracy": metrics["average_accuracy"],
        "forgetting": metrics["forgetting"],
    }
    console.print("   ".join(f"{name} [bold]{percent(value, unit=' %')}[/]" for name, value in shown.items()))
    console.print(f"report   {REPORT}\nmetrics  {METRICS}", highlight=False)


def _accuracy_table(params: Params) -> Table:
    """Make a table of the accuracy on each task (columns) after each step (rows)."""
    from rich.table import Table

    tasks = list(params.tasks)
    table = Table(title="accuracy in %, on each task after each step", title_justify="left")
    for heading in ("after", *tasks):
        table.add_column(heading, justify="right")
    for step in tasks:
        accuracy: list[float] = read_json(EVALUATIONS / step / "metrics.json", Metrics)["accuracy"]
        cells = [f"{100 * value:.1f}" for value in accuracy]
        table.add_row(step, *cells, *[""] * (len(tasks) - len(cells)))
    return table


def show_status(*, as_json: bool = False) -> None:
    """Print a table of tasks and stages, and why those that are not up to date are not. Or all of it as JSON."""
    from rich.console import Console

    params = Params.load()
    plan = read_plan(params.tasks)
    stale = set(plan.stale())
    if as_json:
        stages = {
            name: {"state": _state_of(name, plan, stale), "reasons": plan.reasons[name]}
            for name in plan.order
        }
        echo(
            json.dumps(
                {"stages": stages, "to_decide": _decision(plan, params), "up_to_date": not stale}, indent=2
            )
        )
        return
    console = Console()
    _print_stages(console, plan, stale)
    for name in plan.order:
        if plan.reasons[name] and name in plan.made:
            first, *rest = plan.reasons[name]
            console.print(f"{name}: {first}" + (f" (and {len(rest)} more)" if rest else ""), highlight=False)
    for line in _decision(plan, params):
        console.print(line, highlight=False)
    left = (
        f"{len(stale)} of {len(plan.order)} stages are not up to date: sdlora run"
        if stale
        else "all up to date"
    )
    console.print(left, highlight=False)


def _print_stages(console: Console, plan: Plan, stale: set[str]) -> None:
    """Print a row for each task, with a column for each of its stages. The other stages stand above."""
    from rich.table import Table

    rows: dict[str | None, dict[str, str]] = {}
    for name in plan.order:
        kind, item = StageName.parse(name)
        state = _state_of(name, plan, stale)
        rows.setdefault(item, {})[kind] = f"[{_COLOURS[state]}]{state}[/]"
    for kind, cell in rows.pop(None, {}).items():
        console.print(f"{kind}: {cell}", highlight=False)
    kinds = dict.fromkeys(StageName.parse(name).kind for name in plan.order)
    columns = [kind for kind in kinds if any(kind in cells for cells in rows.values())]
    table = Table("", *columns)
    for item, cells in rows.items():
        table.add_row(item, *[cells.get(column, "") for column in columns])
    console.print(table)


def _decision(plan: Plan, params: Params) -> list[str]:
    """Return what a person has to decide before a run: whether results of older code are kept."""
    try:
        return list(require_decision(plan, params, retrain=False))
    except InputError as undecided:
        return [str(undecided)]


def _state_of(name: str, plan: Plan, stale: set[str]) -> str:
    """Return one word for how a stage stands."""
    if name not in stale:
        return "done"
    if name not in plan.made:
        return "never run"
    return "stale" if plan.reasons[name] else "may be stale"


_COLOURS = {"done": "green", "never run": "dim", "stale": "yellow", "may be stale": "yellow"}
"""How each state is shown."""
