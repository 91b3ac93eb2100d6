"""The survey before anything is deleted: whether a task may be retired, and the receipt of its images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipelines.audits.retire.stored_images import objects_of, stores
from pipelines.data.packed import PACKED, TRAINING, SampleRow, read_images, read_samples
from pipelines.data.pins import PIN
from pipelines.data.shards import shard_classes, shards_of
from pipelines.data.source_files import Fault, Shard, refuse
from pipelines.data.sources import read_source
from pipelines.data.split_chain import SAMPLES, part_file
from pipelines.ledger.receipts import Kept, Packed, Picture, RawFile, Receipt, read_receipts, receipt_of
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of
from pipelines.project.layout import (
    ARTIFACTS,
    BACKBONE,
    FITS,
    GATES,
    LOCK,
    MODELS,
    PARAMS,
    SPLITS,
    STEP_STAGES,
    TRAINED,
    StageName,
)
from pipelines.project.param_checks import JOINT_METHODS
from pipelines.project.params import Params
from pipelines.project.settings import Task
from pipelines.project.yaml_text import read_lock_file
from pipelines.versioning.file_hashes import md5_of
from pipelines.versioning.plan import Plan, read_plan
from sdlora.ledger import read_own_record


def survey(task: str, params: Params, *, by: str, why: str) -> Receipt:
    """Return the receipt of what is to be deleted. An `InputError` says why it cannot be."""
    entry = params.tasks[task]
    _refuse_joint(params)
    _require_done(task, entry, read_plan(params.tasks))
    split, model = SPLITS / task, MODELS / task
    record = read_own_record(model)
    train = TRAINED / task / PACKED
    samples = read_samples(split / part_file(SAMPLES, task))
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
        elsewhere=tuple(_same_elsewhere(trained, params, task)),
        raw=tuple(raw_files(task, params)),
        objects=(),
        stages={stage: _kept(stage, task, entry.after) for stage in ("split", "fit", "freeze")},
    )
    return receipt.model_copy(update={"objects": tuple(objects_of(receipt))})


def _refuse_joint(params: Params) -> None:
    """Refuse a method that learns all images with every task: it needs them for ever."""
    records = (MODELS / name / "step.json" for name in params.tasks)
    needed = [path for path in records if path.is_file() and read_json(path).get("needs_old_images")]
    if needed or params.adapter.method in JOINT_METHODS:
        raise InputError(
            "retire: the method joint learns the images of all tasks with every task; none can go"
        )


def _require_done(task: str, entry: Task, plan: Plan) -> None:
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


def _same_elsewhere(trained: Iterable[SampleRow], params: Params, task: str) -> Iterator[str]:
    """Images of other tasks that show the same as those to be deleted. `data.duplicates` may allow it."""
    mine = {sample.pixels for sample in trained}
    for name, entry in params.tasks.items():
        path = SPLITS / name / part_file(SAMPLES, name)
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
    if shards := shards_of(source, entry.manifest):
        yield from _raw_shards(task, entry, shards)
        return
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


def _raw_shards(task: str, entry: Task, shards: Sequence[Shard]) -> Iterator[RawFile]:
    """Yield the shards of a task's source, or what pins them, if no image of another class is in them."""
    names = shard_classes(shards)
    others = set() if isinstance(names, Fault) else names - set(entry.classes)
    if others:
        raise InputError(
            f"retire: {entry.source}: the shards with the images of {task} hold another class too ({min(others)}), and "
            "are deleted as a whole; move them away by hand"
        )
    pinned = Path(entry.source) / PIN
    for path in [pinned] if entry.manifest is None and pinned.is_file() else [shard.path for shard in shards]:
        yield RawFile(path=path.as_posix(), sha256=sha256_of(path), link=path.is_symlink())


def _kept(stage: str, task: str, after: str) -> Kept:
    """Return what can be given back of a stage. Of `split` that is all but the training images, which are an output
    apart.
    """
    folders = {"split": "split", "fit": "fit", "freeze": "model"}
    out = (ARTIFACTS / folders[stage] / task).as_posix()
    entry = read_lock_file(LOCK)["stages"][str(StageName(stage, task))]
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
