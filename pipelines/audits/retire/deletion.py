"""The deletion of a task's images: params.yaml, the sources, DVC's cache and remotes, and the stages that follow."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pipelines.audits.retire.stored_images import answering, fetched, is_there, is_within, left_of, stores
from pipelines.ledger.receipts import Receipt
from pipelines.planning.tasks import replace_file
from pipelines.project.errors import InputError
from pipelines.project.layout import PARAMS, RETIRED, StageName
from pipelines.project.params import Params
from pipelines.project.params_text import with_task, without_fetch
from pipelines.project.yaml_text import read_text
from pipelines.versioning.plan import read_plan
from pipelines.versioning.remote import push
from pipelines.versioning.repro import reproduce_stage, run_dvc


def delete_everywhere(receipt: Receipt) -> None:
    """Do what is left to do."""
    _name_receipt(receipt)
    _delete_raw(receipt)
    _commit_data(receipt)
    Path(receipt.train.path).unlink(missing_ok=True)
    _delete_objects(receipt)
    _run_stages(receipt)


def _name_receipt(receipt: Receipt) -> None:
    """Make the receipt the source of its task in params.yaml, and fetch no more what would bring the images back."""
    params = Params.load()
    task = params.tasks[receipt.task]
    if task.retired:
        return
    entry = task.model_copy(update={"source": f"{RETIRED}/{receipt.task}", "manifest": None})
    text = with_task(read_text(PARAMS), receipt.task, entry)
    names = fetched(receipt, params)
    if names:
        text = without_fetch(text, names)
        left = params.fetch.model_copy(update={name.replace("-", "_"): None for name in names})
        if Params.parse(text, origin=f"{PARAMS} (not changed)").fetch != left:
            raise InputError(
                f"{PARAMS}: its fetch block is written in a way that cannot be edited safely; edit by hand"
            )
    replace_file(PARAMS, text, expected={**params.tasks, receipt.task: entry})


def _delete_raw(receipt: Receipt) -> None:
    """Delete the files of the source that are the ones of the receipt, and folders that this empties."""
    source = Path(receipt.source)
    for file in receipt.raw:
        path = Path(file.path)
        if not is_there(file, receipt):
            continue
        path.unlink()
        for folder in path.parents:
            if folder == source or source not in folder.parents or any(folder.iterdir()):
                break
            folder.rmdir()


def _commit_data(receipt: Receipt) -> None:
    """Have DVC note what is left of data that it keeps (`dvc add`)."""
    with stores() as held:
        owners = {
            out.owner
            for out in held.outputs()
            if out.is_data and any(is_within(file.path, out.path) for file in receipt.raw)
        }
    for owner in sorted(owners):
        if run_dvc(["commit", "--force", owner]):
            raise InputError(
                f"{owner}: DVC could not note what is left of it (reason above); run the same again"
            )


def _delete_objects(receipt: Receipt) -> None:
    """Delete the objects from all remotes and the cache, and from DVC's memory of runs what names them."""
    left = left_of(receipt)
    with stores() as held:
        stale = [
            path for path in held.runs.glob("*/*/*") if path.is_file() and _names_any(path, receipt.objects)
        ]
        for name, remote in held.remotes.items():
            with answering(name):
                remote.delete(left.stored[name], [path.relative_to(held.runs) for path in stale])
        for path in stale:
            path.unlink()
        for md5 in left.cached:
            held.object_path(md5).unlink()


def _names_any(path: Path, objects: Iterable[str]) -> bool:
    """Return whether a file of text has one of these names in it."""
    return not set(re.findall(r"[0-9a-f]{32}(?:\.dir)?", path.read_text(encoding="utf-8"))).isdisjoint(
        objects
    )


def to_run(receipt: Receipt, params: Params) -> list[str]:
    """Return the stages that read what was deleted and have not run since: they leave what they left before.

    That of the task is the last of its kind: once it has run, what is left to do shows in the report alone.
    """
    plan = read_plan(params.tasks)
    shared = [
        str(StageName("split", key))
        for key, task in params.tasks.items()
        if not task.retired
        and (is_within(receipt.source, task.source) or is_within(task.source, receipt.source))
    ]
    own = str(StageName("split", receipt.task))
    if plan.reasons[own]:
        return [*(name for name in shared if plan.reasons[name] and name in plan.made), own]
    return ["report"] if plan.stale() == ["report"] else []


def _run_stages(receipt: Receipt) -> None:
    """Run the stages that the deletion touches, so that the project is up to date again."""
    params = Params.load()
    with stores() as held:
        share = held.shares
    while names := to_run(receipt, params):
        for name in names:
            reproduce_stage(name, pull=share)
            if share:
                push(name)
