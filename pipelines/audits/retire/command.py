"""`sdlora retire`: say what would be deleted, ask, and delete it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

from pipelines.audits.retire.deletion import delete_everywhere, to_run
from pipelines.audits.retire.stored_images import Left, fetched, left_of
from pipelines.audits.retire.survey import survey
from pipelines.data.pins import PIN
from pipelines.ledger.receipts import Receipt, read_receipt, receipt_of
from pipelines.project.errors import InputError
from pipelines.project.files import write_json
from pipelines.project.layout import DOWNLOADS, LOCK, PARAMS, PINNED, SPLITS, SWEEPS
from pipelines.project.names import is_text
from pipelines.project.params import Params
from pipelines.runtime.console import echo
from pipelines.versioning.project_lock import only_run
from pipelines.versioning.repro import StageFailedError


def retire(task: str, *, by: str | None, why: str | None, dry: bool, yes: bool) -> int:
    """Delete the images of `task` from the source, the split, DVC's cache and its remotes. Return the exit status.

    First the receipt is written, then `params.yaml` names it as the task's source, then images are deleted, then the
    stages that this touches are run, which give back what they left. Ended anywhere, the same command goes on.
    """
    with only_run():
        params = Params.load()
        if task not in params.tasks:
            raise InputError(f"retire: there is no task {task!r}; known are {', '.join(params.tasks)}")
        if any(SWEEPS.glob(f"*/*/{PARAMS}")):
            raise InputError(
                "retire: chains of sweeps may hold the images too; delete .sdlora/sweeps, which a sweep makes again"
            )
        if params.tasks[task].retired:
            receipt = read_receipt(receipt_of(task))
            left = left_of(receipt)
            if not left and not to_run(receipt, params):
                raise InputError(
                    f"retire: {task} is retired already, {receipt.at[:10]} by {receipt.by} ({receipt_of(task)})"
                )
            echo(f"{task}: going on with what {receipt.by} began, {receipt.at}")
        else:
            for option, value in (("--by", by), ("--why", why)):
                if not value or not value.strip() or not is_text(value):
                    raise InputError(
                        f"retire: {option} {value!r}: write a line of text, for those who audit it later"
                    )
            receipt = survey(task, params, by=(by or "").strip(), why=(why or "").strip())
            left = left_of(receipt)
        for line in _preview(receipt, left, params):
            echo(line)
        if dry:
            return 0
        _agree(task, yes=yes)
        if not params.tasks[task].retired:
            write_json(receipt_of(task), receipt.model_dump(mode="json"))
        try:
            delete_everywhere(receipt)
        except StageFailedError as failure:
            sys.stderr.write(f"{failure}\n")
            return failure.status
        echo(f"{task} is retired; add {receipt_of(task)}, {PARAMS} and {LOCK} to version control")
    return 0


def _agree(task: str, *, yes: bool) -> None:
    """Ask whether to delete. Without a terminal to ask on, only `--yes` will do."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError("retire: nothing was deleted; add --yes to delete what is listed above")
    import typer

    if not typer.confirm(f"Delete the images of {task} for good?"):
        raise InputError("retire: nothing was deleted")


def _preview(receipt: Receipt, left: Left, params: Params) -> Iterator[str]:
    """Yield what is to be deleted, what stays, and what nobody here can delete."""
    task = receipt.task
    yield f"{task} ({', '.join(receipt.classes)}): {len(receipt.images)} training images; to be deleted:"
    size = sum(Path(file.path).stat().st_size for file in left.raw)
    yield f"  {receipt.source}: {len(left.raw)} files of train, validation and test, {size:,} bytes"
    if left.packed:
        yield f"  {receipt.train.path}: {Path(receipt.train.path).stat().st_size:,} bytes"
    yield f"  DVC's cache: {len(left.cached)} objects"
    for name, objects in left.stored.items():
        yield f"  DVC's remote {name}: {len(objects)} objects"
    yield f"it stays: {SPLITS / task} (test images too), and every model"
    links = sum(file.link for file in receipt.raw)
    if links:
        yield f"warning: links among the files: {links}; what they lead to stays"
    if receipt.elsewhere:
        first, *others = receipt.elsewhere
        more = f" and {len(others)} more" if others else ""
        yield f"warning: the same picture is in other tasks, and stays there: {first}{more}"
    for path in (file.path for file in receipt.raw if PurePath(file.path).name == PIN):
        yield f"warning: {path} goes; the shards that it pins stay where they are, and in {PINNED} of each clone"
    tracked = _tracked_by_git(receipt)
    if tracked:
        yield f"warning: files in git, whose history keeps them: {tracked}"
    before = list(params.tasks)[: list(params.tasks).index(task)]
    earlier = [name for name in before if not params.tasks[name].retired]
    if earlier:
        yield (
            f"warning: {', '.join(earlier)} not retired: learned again (other parameters, other code), they leave "
            f"{task} behind, which cannot be"
        )
    for name in fetched(receipt, params):
        yield (
            f"warning: {name} is taken out of fetch in {PARAMS}, which would bring the images back; DVC keeps what is "
            f"left in data/raw/{name} no longer: another clone needs a copy of it to learn those tasks again"
        )
        if (DOWNLOADS / name).is_dir():
            yield f"warning: .sdlora/downloads/{name} holds what {name} was made from, and stays"


def _tracked_by_git(receipt: Receipt) -> int:
    """Return how many of the raw files git knows."""
    done = subprocess.run(["git", "ls-files", "-z", "--", receipt.source], capture_output=True, check=False)
    known = {os.fsdecode(name) for name in done.stdout.split(b"\0")}
    return sum(file.path in known for file in receipt.raw)
