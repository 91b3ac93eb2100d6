"""What machines share through the DVC remote: fetched where a stage reads it, pushed where one has left it."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import TRAINED, UNPUSHED, StageName, read_beside_deps
from pipelines.project.params import Params, tasks_read
from pipelines.runtime.console import echo
from pipelines.versioning.dvc_failures import dvc_errors
from pipelines.versioning.patches import apply_patches
from pipelines.versioning.plan import Plan
from pipelines.versioning.pointers import pointer_of
from pipelines.versioning.repro import StageFailedError, reproduce_stage, run_dvc


def fetch_images(name: str, plan: Plan) -> None:
    """Fetch what a stage reads that no stage makes and DVC keeps by a file of its own, and this machine does not hold.

    Raises:
        InputError: neither the remote nor the cache has it.
    """
    for dep in map(Path, [] if plan.only_missing(name) and plan.remote else plan.deps[name]):
        if dep.exists() or not pointer_of(dep):
            continue
        run_dvc(["pull" if plan.remote else "checkout", str(dep)])
        if not dep.exists():
            where = "neither remote nor cache has" if plan.remote else "the cache has not"
            raise InputError(
                f"{dep}: DVC keeps it, and {where} it; `dvc push {dep}` where it is, then `dvc pull {dep}` here"
            )


def fetch_inputs(name: str, plan: Plan, params: Params) -> None:
    """Fetch what a stage reads and this machine does not hold. What the remote has lost is made again.

    Training images, and the folders of earlier steps, are fetched only where the stage will really look at them.
    """
    _pull([Path(dep) for dep in plan.deps[name]], plan, params)
    made = {out for outs in plan.outs.values() for out in outs}
    images = [Path(out) for out in _images_read(name, params) if out in made]
    beside = [*images, *read_beside_deps(StageName.parse(name), list(params.tasks))]
    if not all(path.exists() for path in beside) and not _restore_from_run_cache(name):
        _pull(beside, plan, params)


def _pull(read: list[Path], plan: Plan, params: Params) -> None:
    """Fetch outputs that are read and not here, or have their stages make them."""
    missing = {
        maker: [out for out in plan.outs[maker] if not Path(out).exists() and _is_read(Path(out), read)]
        for maker in plan.order
    }
    paths = [out for outs in missing.values() for out in outs]
    if not paths or not plan.remote or not run_dvc(["pull", *paths]):
        return
    require_remote(plan)  # what it has lost is made again; what it only cannot give now is not
    for maker, outs in missing.items():
        if not all(Path(out).exists() for out in outs):
            fetch_inputs(maker, plan, params)
            reproduce_stage(maker, pull=True)
            push(maker)


def _images_read(name: str, params: Params) -> list[str]:
    """Return the folders of training images that a stage reads: they are no deps, what describes them is."""
    kind, task = StageName.parse(name)
    if task is None or kind not in ("fit", "freeze"):
        return []
    return [(TRAINED / key).as_posix() for key in (tasks_read(params, task) if kind == "fit" else [task])]


def _restore_from_run_cache(name: str) -> bool:
    """Restore what a stage leaves from DVC's run-cache, here or in the remote. False where it has to be computed."""
    with dvc_errors():
        from dvc.repo import Repo, lock_repo
        from dvc.stage.cache import RunCacheNotFoundError, RunCacheNotSupported

        from pipelines.versioning.patches.errors import RunCacheError

        apply_patches()
        # Whether a stage came from the cache is told elsewhere, and what the remote has lost is made again.
        logging.getLogger("dvc.stage.cache").setLevel(logging.WARNING)
        logging.getLogger("dvc.data_cloud").setLevel(logging.ERROR)
        with contextlib.closing(Repo(_wait_for_lock=True)) as repo, lock_repo(repo):
            try:
                repo.stage_cache.pull(None)
            except RunCacheNotSupported:
                pass
            except RunCacheError as error:
                raise StageFailedError(f"error: {error}", 1, name, interrupted=True) from error
            try:
                repo.stage_cache.restore(repo.stage.load_one(name=name), pull=True)
            except RunCacheNotFoundError:
                return False
            return True


def _is_read(out: Path, read: list[Path]) -> bool:
    return any(dep.is_relative_to(out) or out.is_relative_to(dep) for dep in read)


def mark_unpushed(name: str) -> None:
    """Record a stage as not yet pushed before it runs, so that the next run can push it if this one is killed."""
    write_whole(UNPUSHED, "\n".join(sorted(unpushed() | {name})).encode())


def push(name: str) -> None:
    """Push what a stage has left. What the remote does not take stays recorded, for `push_pending`."""
    mark_unpushed(name)
    if run_dvc(["push", "--run-cache", name]):
        echo(f"{name} could not be pushed to the DVC remote; it is kept here, and pushed by the next run")
        return
    write_whole(UNPUSHED, "\n".join(sorted(unpushed() - {name})).encode())


def unpushed() -> set[str]:
    """Return the stages whose outputs the remote has not taken yet."""
    return set(UNPUSHED.read_text(encoding="utf-8").split()) if UNPUSHED.is_file() else set()


def push_pending(plan: Plan) -> None:
    """Push what earlier runs could not, and forget stages that are no more."""
    for name in sorted(unpushed()) if plan.remote else []:
        if name in plan.order:
            push(name)
        else:
            write_whole(UNPUSHED, "\n".join(sorted(unpushed() - {name})).encode())


def require_remote(plan: Plan) -> None:
    """Refuse to work where the remote does not answer: what it holds would be computed again, and may come out other.

    Object stores say so themselves; a folder that is not mounted just looks empty.
    """
    if not plan.remote:
        return
    with dvc_errors():
        from dvc.repo import Repo

        with contextlib.closing(Repo()) as repo:
            remote = repo.cloud.get_remote_odb()
            root = remote.path.removesuffix("/files/md5")
            try:
                there = remote.fs.protocol != "local" or remote.fs.exists(root)
                list(remote.list_oids_exists(["0" * 32]))
            except Exception as trouble:  # every kind of storage raises its own
                raise StageFailedError(
                    f"error: the DVC remote does not answer ({one_line(trouble)})", 1, "", interrupted=True
                ) from trouble
    if not there:
        raise StageFailedError(
            f"error: the DVC remote is the folder {root}, which is not there; mount it, or make it if it is new",
            1,
            "",
            interrupted=True,
        )
