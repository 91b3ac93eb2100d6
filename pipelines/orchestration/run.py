"""The outer flow of `sdlora run`, and of a worker: find the stale stages, and bring them up to date."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.orchestration.reconcile import close_dead_runs
from pipelines.orchestration.run_notes import local_history, noted
from pipelines.orchestration.server import server_missing
from pipelines.orchestration.stage_runs import run_linked
from pipelines.orchestration.stale_stages import bring_up_to_date, do_nothing
from pipelines.orchestration.status import print_summary
from pipelines.planning.keep import require_decision
from pipelines.project.environment import STAGE_SOCKET
from pipelines.project.errors import InputError
from pipelines.project.fingerprints import require_own_code
from pipelines.project.layout import CODE, MODELS, StageName
from pipelines.project.leftovers import remove_leftovers
from pipelines.project.param_checks import missing_source
from pipelines.project.params import Params
from pipelines.project.settings import Task
from pipelines.reports.format import count
from pipelines.runtime.console import echo
from pipelines.runtime.fork_server import STAGE_ENTRY, fork_server
from pipelines.runtime.stage import Rows, Stage, StageResult
from pipelines.versioning.dvc_server import dvc_server
from pipelines.versioning.plan import Plan, read_plan
from pipelines.versioning.pointers import pointer_of
from pipelines.versioning.project_lock import only_run
from pipelines.versioning.remote import push_pending, require_remote, unpushed
from pipelines.versioning.repro import StageFailedError


def run_pipeline(*, retrain: bool = False, until: str | None = None) -> int:
    """Bring every stage up to date. Return the exit status.

    With `retrain`, what was trained by other code is trained again. With `until`, only the stages of that task and what
    they need run.
    """
    params = Params.load()
    if until is not None and until not in params.tasks:
        raise InputError(f"run: params.yaml has no task {until}; known are {', '.join(params.tasks)}")
    require_own_code()
    with only_run(), contextlib.ExitStack() as servers:
        _leave_removed_tasks_to_the_cache(params)
        if not all((MODELS / task).exists() for task in params.tasks):
            # It takes some five seconds to load, so it does that while the plan is made.
            servers.enter_context(fork_server(STAGE_ENTRY, STAGE_SOCKET))
        plan = read_plan(params.tasks)
        if until is not None:
            plan = plan.until(until)
            params = params.model_copy(update={"tasks": _tasks_of(plan, params)})
        for line in require_decision(plan, params, retrain=retrain):
            echo(line)
        _require_sources(params, plan)
        push_pending(plan)
        if not plan.stale():
            echo(f"all up to date: {count(len(plan.order), 'stage')}, {count(len(params.tasks), 'task')}")
            print_summary(params, until=until)
            return 0
        try:
            with local_history(), _preloaded_processes(plan):
                pipeline = Stage("pipeline", lambda: StageResult(bring_up_to_date(params, plan)))
                if server_missing():
                    noted(pipeline, "pipeline", {})
                else:
                    close_dead_runs()
                    run_linked(pipeline, "pipeline", {})
        except StageFailedError as failure:
            sys.stderr.write(f"{failure}\n")
            return failure.status
        print_summary(params, until=until)
    return 0


def _tasks_of(plan: Plan, params: Params) -> dict[str, Task]:
    """Return the tasks of which a plan has stages."""
    items = {StageName.parse(name).item for name in plan.order}
    return {key: task for key, task in params.tasks.items() if key in items}


def finish(progressed: Callable[[], None], *, before_each: Callable[[], None] = do_nothing) -> Rows:
    """Bring every stage up to date inside a flow run that has begun.

    `before_each` is called before a stage, and `progressed` after one that was computed. What other machines have made
    is taken from the remote only where a stage reads it.
    """
    params = Params.load()
    with only_run(wait=True):
        _leave_removed_tasks_to_the_cache(params)
        plan = read_plan(params.tasks, partial_checkout=True)
        for line in require_decision(plan, params, retrain=False):
            echo(line)
        require_remote(plan)
        _require_sources(params, plan)
        if server_missing() is None:
            close_dead_runs()
        rows: Rows = []
        if plan.stale():
            with _preloaded_processes(plan):
                rows = bring_up_to_date(
                    params, plan, partial_checkout=True, before_each=before_each, progressed=progressed
                )
        push_pending(plan)
        if unpushed():
            # Another machine would compute it again: better that this one comes back to it.
            raise StageFailedError(
                f"error: the DVC remote did not take {', '.join(sorted(unpushed()))}; what was done is kept here",
                1,
                "",
                interrupted=True,
            )
        return rows


@contextlib.contextmanager
def _preloaded_processes(plan: Plan) -> Iterator[None]:
    """Load the libraries once where several stages will need them. For one or two it is not worth a process."""
    if len(plan.stale()) <= 2:
        yield
        return
    with dvc_server(), fork_server(STAGE_ENTRY, STAGE_SOCKET):
        yield


def _leave_removed_tasks_to_the_cache(params: Params) -> None:
    """Remove the outputs of tasks that params.yaml names no more. Adding one again takes them from DVC's cache."""
    removed = remove_leftovers(params.tasks)
    if removed:
        echo(f"{', '.join(removed)}: no task of params.yaml any more; its outputs are in DVC's cache alone")


def _require_sources(params: Params, plan: Plan) -> None:
    """Refuse a task whose folder of images is not there, made by no stage nor kept by DVC, where it would be read."""
    stale = set(plan.stale())
    every = {Path(out) for outs in plan.outs.values() for out in outs}
    for key, task in params.tasks.items():
        source = Path(task.source)
        split = str(StageName("split", key))
        made = split in plan.order and split not in stale
        made |= not every.isdisjoint({source, *source.parents})
        if made or source.is_dir() or pointer_of(source):
            continue
        hint = missing_source(task.source, params.fetch)
        reasons = plan.reasons.get(split, [])
        if reasons and plan.only_missing(split):
            if plan.remote:  # from which DVC takes what the finished stage left, whatever it read
                continue
            hint = f"`dvc checkout` brings what {split} left, if the cache has it; else {hint}"
        elif reasons and split in plan.made and all(reason.startswith(f"{CODE}/") for reason in reasons):
            hint = f"{split} was made by other code; `sdlora keep` keeps what it left, or {hint}"
        raise InputError(f"tasks.{key}: no folder {task.source}: {hint}")
