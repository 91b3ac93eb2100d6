"""The outer flow `sdlora run`: find the stale stages, bring them up to date; and `sdlora status`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.orchestration.overlap import Beside, Order, open_beforehand, room_beside, side_by_side
from pipelines.orchestration.reconcile import close_dead_runs
from pipelines.orchestration.server import prefect_server
from pipelines.planning.keep import require_decision
from pipelines.project.environment import STAGE_SOCKET
from pipelines.project.errors import InputError
from pipelines.project.files import read_json
from pipelines.project.fingerprints import require_own_code
from pipelines.project.layout import StageName
from pipelines.project.params import Params, missing_source
from pipelines.reports.format import percent
from pipelines.runtime.file_lock import held, mend_rwlock
from pipelines.runtime.fork_server import STAGE_ENTRY, fork_server
from pipelines.runtime.processes import wake_the_ending
from pipelines.runtime.stage import Stage, Summary, run_linked, server_missing
from pipelines.versioning.dvc_server import dvc_server
from pipelines.versioning.plan import Plan, read_plan
from pipelines.versioning.remote import make_up, obtain, owe, push, require_remote, unpushed
from pipelines.versioning.repro import StageFailedError, bring, print_line

if TYPE_CHECKING:
    from rich.table import Table


TASKS_IN_THE_TABLE = 20
"""Of more tasks a terminal shows no matrix that could be read; the report has it."""


def run_pipeline(*, retrain: bool = False) -> int:
    """Bring every stage up to date; return the exit status.

    With `retrain`, what was trained by other code is trained again.
    """
    params = Params.load()
    require_own_code()
    with only_run():
        plan = read_plan(params.tasks)
        for line in require_decision(plan, retrain=retrain):
            print_line(line)
        require_sources(params, plan)
        make_up(plan)
        if not plan.stale():
            print_line(f"all up to date: {len(plan.order)} stages, {len(params.tasks)} tasks")
            print_summary(params)
            return 0
        try:
            with prefect_server(Path(".prefect")) as wait, preloaded_processes(plan):
                wait()
                bring = Stage("pipeline", lambda: bring_up_to_date(params, plan))
                missing = server_missing()
                if missing:
                    bring()
                else:
                    close_dead_runs()
                    run_linked(bring, "pipeline", {})
        except StageFailedError as failure:
            sys.stderr.write(f"{failure}\n")
            return failure.status
        print_summary(params)
    return 0


def nothing() -> None:
    """What a run that nobody watches calls between its stages."""


def finish(progressed: Callable[[], None], *, before_each: Callable[[], None] = nothing) -> Summary:
    """Bring every stage up to date inside a flow run that has begun.

    `before_each` is called before a stage, and `progressed` after one that was computed. What other machines have made
    is taken from the remote only where a stage reads it.
    """
    params = Params.load()
    with only_run(wait=True):
        plan = read_plan(params.tasks, lean=True)
        for line in require_decision(plan, retrain=False):
            print_line(line)
        require_remote(plan)
        require_sources(params, plan)
        if server_missing() is None:
            close_dead_runs()
        rows: Summary = []
        if plan.stale():
            with preloaded_processes(plan):
                rows = bring_up_to_date(
                    params, plan, lean=True, before_each=before_each, progressed=progressed
                )
        make_up(plan)
        if unpushed():
            # Another machine would compute it again: better that this one comes back to it.
            raise StageFailedError(
                f"error: the DVC remote did not take {', '.join(sorted(unpushed()))}; what was done is kept here",
                1,
                "",
                cut_off=True,
            )
        return rows


def bring_up_to_date(
    params: Params,
    plan: Plan,
    *,
    lean: bool = False,
    before_each: Callable[[], None] = nothing,
    progressed: Callable[[], None] = nothing,
) -> Summary:
    """Run the stale stages in order; a stage whose inputs turn out to be what they were is left alone.

    Where there is room, a step is evaluated beside the fit of the next task (`beside.side_by_side`).
    """
    room = room_beside(params.training.devices)
    order = Order(plan.stale(), set(), {}) if room is None else side_by_side(plan, params)
    total = len(order.stages)
    heads = {name: f"[{n:{len(str(total))}}/{total}] {name}" for n, name in enumerate(order.stages, 1)}
    rows: Summary = []
    current, outdated = plan, False
    other: Beside | None = None

    def note(name: str, seconds: float, *, cached: bool) -> None:
        if plan.remote:
            push(name)
        if not cached:
            progressed()
        print_line(f"{heads[name]}  {'from the cache' if cached else 'done'}, {seconds:.1f} s")
        rows.append({"stage": name, "seconds": round(seconds, 1), "from cache": "yes" if cached else "no"})

    def join() -> None:
        nonlocal other
        if other is None:
            return
        try:
            cached = other.join()
        except StageFailedError:
            ended, other = other, None
            ended.print_all()
            raise
        ended, other = other, None
        ended.print_all()
        note(ended.name, ended.seconds, cached=cached)

    try:
        for name in order.stages:
            if other is not None and (other.name in plan.needs[name] or name in order.beside):
                join()
            if name in order.opened:
                open_beforehand(order.opened[name])
            if not plan.reasons[name]:
                if outdated:
                    join()
                    current, outdated = read_plan(params.tasks, lean=lean), False
                if not current.reasons[name]:
                    print_line(f"{heads[name]}  inputs are as before")
                    continue
            before_each()
            print_line(f"{heads[name]} …")
            started = time.monotonic()
            if lean:
                obtain(name, plan, params)
            outdated = True
            if plan.remote:
                owe(name)
            if room is not None and name in order.beside:
                other = Beside(name, pull=plan.remote, settings=room)
                continue
            cached = bring(name, pull=plan.remote)
            note(name, time.monotonic() - started, cached=cached)
        join()
    except StageFailedError:
        with contextlib.suppress(StageFailedError):  # its failure comes again; what it has done is kept
            join()
        raise
    except BaseException:
        if other is not None:
            other.stop()
        raise
    return rows


@contextlib.contextmanager
def preloaded_processes(plan: Plan) -> Iterator[None]:
    """Load the libraries once where several stages will need them; for one or two it is not worth a process."""
    if len(plan.stale()) <= 2:
        yield
        return
    with dvc_server(), fork_server(STAGE_ENTRY, STAGE_SOCKET):
        yield


@contextlib.contextmanager
def only_run(*, wait: bool = False) -> Iterator[None]:
    """Refuse to work, or wait, while another `sdlora run` works in the same folder."""
    lock = Path(".sdlora/run.lock")
    wake_the_ending(lock)
    busy = f"another sdlora run is at work in {Path.cwd()}; wait for it or stop it"
    with held(lock, busy=None if wait else busy):
        mend_rwlock()
        yield


def require_sources(params: Params, plan: Plan) -> None:
    """Refuse a task whose folder of images is neither there nor made by a stage, where it would be read."""
    stale = set(plan.stale())
    every = [Path(out) for outs in plan.outs.values() for out in outs]
    for key, task in params.tasks.items():
        source = Path(task.source)
        split = str(StageName("split", key))
        made = split in plan.order and split not in stale
        made |= any(source == out or out in source.parents for out in every)
        if not made and not source.is_dir():
            raise InputError(
                f"tasks.{key}: no folder {task.source}: {missing_source(task.source, params.fetch)}"
            )


def print_summary(params: Params) -> None:
    """Print the accuracy matrix and where the files are."""
    from rich.console import Console

    metrics = read_json(Path("metrics.json"))
    console = Console()
    if len(params.tasks) <= TASKS_IN_THE_TABLE:
        console.print(accuracy_table(params))
    shown = {
        "last accuracy": metrics["last_accuracy"],
        "average accuracy": metrics["average_accuracy"],
        "forgetting": metrics["forgetting"],
    }
    console.print("   ".join(f"{name} [bold]{percent(value, unit=' %')}[/]" for name, value in shown.items()))
    console.print("report   artifacts/report/report.html\nmetrics  metrics.json", highlight=False)


def accuracy_table(params: Params) -> Table:
    """Make a table of the accuracy on each task (columns) after each step (rows)."""
    from rich.table import Table

    tasks = list(params.tasks)
    table = Table(title="accuracy in %, on each task after each step", title_justify="left")
    for heading in ("after", *tasks):
        table.add_column(heading, justify="right")
    for step in tasks:
        accuracy: list[float] = read_json(Path("artifacts/evaluation") / step / "metrics.json")["accuracy"]
        cells = [f"{100 * value:.1f}" for value in accuracy]
        table.add_row(step, *cells, *[""] * (len(tasks) - len(cells)))
    return table


def show_status() -> None:
    """Print a table of tasks and stages, and why those that are not up to date are not."""
    from rich.console import Console
    from rich.table import Table

    plan = read_plan(Params.load().tasks)
    stale = set(plan.stale())
    decision: list[str] = []
    try:
        decision += require_decision(plan, retrain=False)
    except InputError as undecided:
        decision.append(str(undecided))
    kinds = dict.fromkeys(StageName.parse(name).kind for name in plan.order)
    console = Console()
    table = Table()
    table.add_column("")
    rows: dict[str | None, dict[str, Any]] = {}
    for name in plan.order:
        kind, item = StageName.parse(name)
        rows.setdefault(item, {})[kind] = standing(name, plan, stale)
    columns = [kind for kind in kinds if any(kind in cells for item, cells in rows.items() if item)]
    for column in columns:
        table.add_column(column)
    for item, cells in rows.items():
        if item:
            table.add_row(item, *[cells.get(column, "") for column in columns])
    for kind, cell in rows.get(None, {}).items():
        console.print(f"{kind}: {cell}", highlight=False)
    console.print(table)
    for name in plan.order:
        if plan.reasons[name] and name in plan.made:
            first, *rest = plan.reasons[name]
            console.print(f"{name}: {first}" + (f" (and {len(rest)} more)" if rest else ""), highlight=False)
    for line in decision:
        console.print(line, highlight=False)
    left = (
        f"{len(stale)} of {len(plan.order)} stages are not up to date: sdlora run"
        if stale
        else "all up to date"
    )
    console.print(left, highlight=False)


def standing(name: str, plan: Plan, stale: set[str]) -> str:
    """One word for how a stage stands."""
    if name not in stale:
        return "[green]done[/]"
    if name not in plan.made:
        return "[dim]never run[/]"
    return "[yellow]stale[/]" if plan.reasons[name] else "[yellow]may be stale[/]"
