"""`sdlora retire`: delete the images of a task whose step is done, everywhere, and leave a receipt in the ledger."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pipelines.data.packed import PACKED, TRAINING, SampleRow, read_images
from pipelines.data.source_files import refuse
from pipelines.data.sources import read_source
from pipelines.ledger.receipts import (
    Kept,
    Packed,
    Picture,
    RawFile,
    Receipt,
    read_receipt,
    read_receipts,
    receipt_of,
)
from pipelines.planning.tasks import replace_file
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of, write_json
from pipelines.project.layout import (
    ARTIFACTS,
    BACKBONE,
    DOWNLOADS,
    FITS,
    GATES,
    LOCK,
    MODELS,
    PARAMS,
    RAW,
    RETIRED,
    SPLITS,
    STEP_STAGES,
    SWEEPS,
    TRAINED,
    StageName,
)
from pipelines.project.params import Params
from pipelines.project.params_text import with_task, without_fetch
from pipelines.project.settings import Fetch, Task
from pipelines.project.yaml_text import read_text, read_yaml
from pipelines.runtime.console import echo
from pipelines.versioning.artifacts import md5_of
from pipelines.versioning.plan import Plan, read_plan
from pipelines.versioning.project_lock import only_run
from pipelines.versioning.remote import push
from pipelines.versioning.repro import StageFailedError, reproduce_stage, run_dvc
from pipelines.versioning.stores import RemoteStore, Stores, open_stores


class Left(NamedTuple):
    """What of the images is still there."""

    raw: list[RawFile]
    packed: bool
    cached: list[str]
    """objects of DVC's cache"""
    stored: Mapping[str, list[str]]
    """remote → its objects"""

    def __bool__(self) -> bool:
        return bool(self.raw or self.packed or self.cached or any(self.stored.values()))


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
                if not value or not value.strip() or not value.isprintable():
                    raise InputError(
                        f"retire: {option} {value!r}: write a line of text, for those who audit it later"
                    )
            receipt = survey(task, params, by=(by or "").strip(), why=(why or "").strip())
            left = left_of(receipt)
        for line in preview(receipt, left, params):
            echo(line)
        if dry:
            return 0
        agree(task, yes=yes)
        if not params.tasks[task].retired:
            write_json(receipt_of(task), receipt.model_dump(mode="json"))
        try:
            finish(receipt)
        except StageFailedError as failure:
            sys.stderr.write(f"{failure}\n")
            return failure.status
        echo(f"{task} is retired; add {receipt_of(task)}, {PARAMS} and {LOCK} to version control")
    return 0


def agree(task: str, *, yes: bool) -> None:
    """Ask whether to delete. Without a terminal to ask on, only `--yes` will do."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError("retire: nothing was deleted; add --yes to delete what is listed above")
    import typer

    if not typer.confirm(f"Delete the images of {task} for good?"):
        raise InputError("retire: nothing was deleted")


def preview(receipt: Receipt, left: Left, params: Params) -> Iterator[str]:
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
    tracked = tracked_by_git(receipt)
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


def tracked_by_git(receipt: Receipt) -> int:
    """Return how many of the raw files git knows."""
    done = subprocess.run(["git", "ls-files", "-z", "--", receipt.source], capture_output=True, check=False)
    known = {os.fsdecode(name) for name in done.stdout.split(b"\0")}
    return sum(file.path in known for file in receipt.raw)


def fetched(receipt: Receipt, params: Params) -> list[str]:
    """Return the data sets of `fetch` that would bring the raw files back."""
    names = [name for name in Fetch.names() if params.fetch.entry(name) is not None]
    return [
        name for name in names if any(is_within(file.path, (RAW / name).as_posix()) for file in receipt.raw)
    ]


def is_within(path: str, folder: str) -> bool:
    """Return whether a path is a folder or in it, by their names."""
    return path == folder or path.startswith(f"{folder}/")


# ---- before anything is deleted


def survey(task: str, params: Params, *, by: str, why: str) -> Receipt:
    """Return the receipt of what is to be deleted. An `InputError` says why it cannot be."""
    entry = params.tasks[task]
    refuse_joint(params)
    require_done(task, entry, read_plan(params.tasks))
    split, model = SPLITS / task, MODELS / task
    record = read_json(model / "step.json")
    train = TRAINED / task / PACKED
    samples = [SampleRow(**row) for row in read_images(split / f"samples/{task}.arrow").to_pylist()]
    trained = [sample for sample in samples if sample.split == "train"]
    verdicts = [GATES / name / "verdict.json" for name in params.tasks]
    receipts = read_receipts()
    begun = [name for name in receipts if name not in params.tasks or not params.tasks[name].retired]
    if set(begun) - {task}:
        other = min(set(begun) - {task})
        raise InputError(
            f"retire: {receipt_of(other)} was begun and not ended; run `sdlora retire {other}` again first"
        )
    receipts.pop(task, None)  # ended before params.yaml named it: this one is written in its place
    receipt = Receipt(
        task=task,
        classes=entry.classes,
        by=by,
        why=why,
        at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        previous=sha256_of(receipt_of(list(receipts)[-1])) if receipts else None,
        record=sha256_of(model / "step.json"),
        head=sha256_of([path for path in verdicts if path.is_file()][-1]),
        source=entry.source,
        manifest=entry.manifest,
        train=Packed(path=train.as_posix(), sha256=record["images"][task], md5=md5_of(train)),
        images=tuple(Picture(id=sample.id, sha256=sample.sha256) for sample in trained),
        elsewhere=tuple(same_elsewhere(trained, params, task)),
        raw=tuple(raw_files(task, params)),
        objects=(),
        stages={stage: kept(stage, task, entry.after) for stage in ("split", "fit", "freeze")},
    )
    return receipt.model_copy(update={"objects": tuple(objects_of(receipt))})


def refuse_joint(params: Params) -> None:
    """Refuse a method that learns all images with every task: it needs them for ever."""
    records = (MODELS / name / "step.json" for name in params.tasks)
    needed = [path for path in records if path.is_file() and read_json(path).get("needs_old_images")]
    if needed or params.adapter.method == "joint":
        raise InputError(
            "retire: the method joint learns the images of all tasks with every task; none can go"
        )


def require_done(task: str, entry: Task, plan: Plan) -> None:
    """Refuse a step that is not up to date with all that it was made of. Its source may be gone already."""
    gone = f"{entry.source} is missing" if not Path(entry.source).exists() else None
    waiting = [str(StageName(kind, task)) for kind in STEP_STAGES]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        reasons = [reason for reason in plan.reasons[name] if reason != gone]
        if reasons or name not in plan.made:
            why = reasons[0] if name in plan.made else "it has never run"
            raise InputError(
                f"retire: {task} is not up to date ({name}: {why}); run `sdlora run` first: its images are still needed"
            )
        waiting += sorted(plan.needs[name])


def same_elsewhere(trained: Iterable[SampleRow], params: Params, task: str) -> Iterator[str]:
    """Images of other tasks that show the same as those to be deleted. `data.duplicates` may allow it."""
    mine = {sample.pixels for sample in trained}
    for name, entry in params.tasks.items():
        path = SPLITS / name / f"samples/{name}.arrow"
        if name == task or entry.retired or not path.is_file():
            continue
        for row in read_images(path).to_pylist():
            if row["pixels"] in mine:
                yield row["id"]


def raw_files(task: str, params: Params) -> Iterator[RawFile]:
    """Yield the image files of the task's classes in its source. None where that is gone already."""
    entry = params.tasks[task]
    source = Path(entry.source)
    if not source.exists():
        return
    if source.resolve() != Path.cwd().resolve() / source:
        raise InputError(
            f"retire: {source} leads through a link to {source.resolve()}, where nothing is deleted; delete the images "
            f"of {task} there and the link, then run the same again"
        )
    found = read_source(source, entry.classes, manifest=entry.manifest)
    refuse(found.faults)
    owners: dict[Path, str] = {}
    for name, other in params.tasks.items():
        if name != task and not other.retired and Path(other.source).is_dir():
            listed = read_source(Path(other.source), other.classes, manifest=other.manifest).images
            owners |= {image.path: name for image in listed}
    for image in found.images:
        if image.path in owners:
            raise InputError(
                f"retire: {image.path} is an image of {owners[image.path]} too; give {task} files of its own"
            )
        yield RawFile(path=image.path.as_posix(), sha256=sha256_of(image.path), link=image.path.is_symlink())


def kept(stage: str, task: str, after: str) -> Kept:
    """Return what can be given back of a stage. Of `split` that is all but the training images, which are an output
    apart.
    """
    folders = {"split": "split", "fit": "fit", "freeze": "model"}
    out = (ARTIFACTS / folders[stage] / task).as_posix()
    entry = read_yaml(read_text(LOCK), origin=str(LOCK))["stages"][str(StageName(stage, task))]
    md5 = next(its["md5"] for its in entry["outs"] if its["path"] == out)
    with stores() as held:
        listing = held.object_path(md5)
        files = (
            {its["relpath"]: its["md5"] for its in json.loads(listing.read_bytes())}
            if listing.is_file()
            else {}
        )
        missing = [name for name, its in files.items() if not held.object_path(its).is_file()]
    if missing or not files:
        raise InputError(
            f"retire: {out}/{missing[0] if missing else ''}: it is not in DVC's cache, from which it would be given "
            f"back; run `dvc fetch {out}` or `dvc commit {StageName(stage, task)}` first"
        )
    split, before = SPLITS, MODELS / after / "step.json"
    backbone, described = BACKBONE / "step.json", split / task / TRAINING
    inputs = {
        "split": [split / after / "classes.json"],
        "fit": [described, split / task / "classes.json", before, backbone],
        "freeze": [described, FITS / task / "fit.json", before, backbone],
    }
    return Kept(
        out=out,
        md5=md5,
        files=files,
        # How a source that is gone would be divided is of no use to know.
        parameters={} if stage == "split" else entry["params"][str(PARAMS)],
        inputs={path.as_posix(): sha256_of(path) for path in inputs[stage]},
    )


# ---- DVC's cache and remotes


@contextlib.contextmanager
def stores() -> Iterator[Stores]:
    """Open the project's cache and every remote that it names. All of them let their objects be deleted."""
    with open_stores() as held:
        for name, remote in held.remotes.items():
            if remote.protocol == "local" and not Path(remote.folder).is_dir():  # it would look empty
                raise InputError(
                    f"retire: DVC's remote {name}: there is no folder {remote.folder}; mount it, or take the remote "
                    f"out if nothing was ever pushed there (`dvc remote remove {name}`)"
                )
            if remote.protocol in ("http", "https"):
                raise InputError(
                    f"retire: DVC's remote {name} is reached over HTTP, which deletes nothing; have its copies "
                    f"deleted where it is kept, then take it out (`dvc remote remove {name}`)"
                )
        yield held


@dataclass(frozen=True)
class Listings:
    """What the project holds by name: files that are to go, and objects that must stay."""

    used: set[str]
    listed: set[str]
    """objects under the paths that are to go"""


def listings(held: Stores, receipt: Receipt) -> Listings:
    """Return the objects that the outputs of this project use beside those that the receipt is about."""
    gone = {receipt.train.path, *(file.path for file in receipt.raw)}
    used = {md5 for its in receipt.stages.values() for md5 in its.files.values()}
    listed = set()
    for out in held.outputs():
        if not any(is_within(path, out.path) for path in gone):
            used |= out.objects()
            continue
        files = out.files()
        used |= {md5 for path, md5 in files.items() if path not in gone}
        listed |= {md5 for path, md5 in files.items() if path in gone}
        if out.md5 and not gone & files.keys():
            used.add(out.md5)
    return Listings(used, listed)


def objects_of(receipt: Receipt) -> list[str]:
    """Return the objects in the cache and in any remote that hold the images, packed or not, now or earlier."""
    with stores() as held:
        found = listings(held, receipt)
        candidates = {receipt.train.md5, *found.listed, *(md5_of(Path(file.path)) for file in receipt.raw)}
        train = Path(receipt.train.path)
        for data in read_images(train)["image"]:
            candidates.add(hashlib.md5(data.as_buffer(), usedforsecurity=False).hexdigest())
        candidates |= set(packed_earlier(held.cache, {image.sha256 for image in receipt.images}))
        candidates -= found.used
        candidates |= set(naming_listings(held.cache, candidates)) - found.used
        objects = {md5 for md5 in candidates if held.object_path(md5).exists()}
        for remote in held.remotes.values():
            objects |= set(stored(remote, candidates))
    return sorted(objects)


def packed_earlier(cache: Path, images: set[str]) -> Iterator[str]:
    """Files of packed images in the cache that hold one of these, such as what an earlier split left."""
    import pyarrow as pa

    for path in cache.glob("??/*"):
        with path.open("rb") as file:
            if file.read(6) != b"ARROW1":
                continue
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError):
            continue  # damaged, or another kind of Arrow file
        if {"image", "sha256"} <= set(table.column_names) and not images.isdisjoint(
            table["sha256"].to_pylist()
        ):
            yield path.parent.name + path.name


def naming_listings(cache: Path, objects: set[str]) -> Iterator[str]:
    """Listings of folders in the cache that name one of these objects: without it they are of no use."""
    for path in cache.glob("??/*.dir"):
        if any(its["md5"] in objects for its in json.loads(path.read_bytes())):
            yield path.parent.name + path.name


def left_of(receipt: Receipt) -> Left:
    """Return what of all that the receipt names is still there, and used by nothing else."""
    with stores() as held:
        used = listings(held, receipt).used
        objects = [md5 for md5 in receipt.objects if md5 not in used]
        return Left(
            raw=[file for file in receipt.raw if is_there(file, receipt)],
            packed=Path(receipt.train.path).exists(),
            cached=[md5 for md5 in objects if held.object_path(md5).exists()],
            stored={name: stored(remote, objects) for name, remote in held.remotes.items()},
        )


def stored(remote: RemoteStore, objects: Iterable[str]) -> list[str]:
    """Return which of some objects a remote has. An `InputError` where it does not answer."""
    with answering(remote.name):
        return remote.held(objects)


@contextlib.contextmanager
def answering(name: str) -> Iterator[None]:
    """Make one line of whatever a remote raises that cannot be reached, or lets nobody delete."""
    try:
        yield
    except Exception as trouble:  # every kind of storage raises its own
        raise InputError(
            f"retire: DVC's remote {name} does not let its copies be deleted ({one_line(trouble)}); run the same "
            f"when it does, or take it out (`dvc remote remove {name}`) if it is gone"
        ) from trouble


def is_there(file: RawFile, receipt: Receipt) -> bool:
    """Return whether a file of the source is the one that the receipt names, and really in the source."""
    path = Path(file.path)
    home = Path.cwd().resolve() / path.parent
    if path.parent.resolve() != home or not is_within(file.path, receipt.source):
        return False
    if file.link:
        return path.is_symlink()
    return path.is_file() and not path.is_symlink() and sha256_of(path) == file.sha256


# ---- the deletion


def finish(receipt: Receipt) -> None:
    """Do what is left to do."""
    name_receipt(receipt)
    delete_raw(receipt)
    commit_data(receipt)
    Path(receipt.train.path).unlink(missing_ok=True)
    delete_objects(receipt)
    run_stages(receipt)


def name_receipt(receipt: Receipt) -> None:
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


def delete_raw(receipt: Receipt) -> None:
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


def commit_data(receipt: Receipt) -> None:
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


def delete_objects(receipt: Receipt) -> None:
    """Delete the objects from all remotes and the cache, and from DVC's memory of runs what names them."""
    left = left_of(receipt)
    with stores() as held:
        stale = [
            path for path in held.runs.glob("*/*/*") if path.is_file() and names_any(path, receipt.objects)
        ]
        for name, remote in held.remotes.items():
            with answering(name):
                remote.delete(left.stored[name], [path.relative_to(held.runs) for path in stale])
        for path in stale:
            path.unlink()
        for md5 in left.cached:
            held.object_path(md5).unlink()


def names_any(path: Path, objects: Iterable[str]) -> bool:
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


def run_stages(receipt: Receipt) -> None:
    """Run the stages that the deletion touches, so that the project is up to date again."""
    params = Params.load()
    with stores() as held:
        share = held.shares
    while names := to_run(receipt, params):
        for name in names:
            reproduce_stage(name, pull=share)
            if share:
                push(name)
