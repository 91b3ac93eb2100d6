"""`sdlora audit verify`: is what the chain left still what it left."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from pipelines.audits.lock_entries import (
    are_classes_of,
    check_declared,
    check_read,
    check_recorded,
    check_source,
)
from pipelines.data.packed import (
    PACKED,
    TRAINING,
    ImageRow,
    SampleRow,
    read_images,
    read_samples,
    samples_digest,
)
from pipelines.data.split_chain import SAMPLES, SPLIT, TEST, VALIDATION, own_files, part_file
from pipelines.ledger.fit_facts import last_epoch, learned_magnitudes
from pipelines.ledger.journal import RECORDS
from pipelines.ledger.kept import read_notes
from pipelines.ledger.newcomers import unknown_figures
from pipelines.ledger.receipts import IN_PLACE, in_place_of, read_receipts, receipt_of
from pipelines.ledger.verdicts import broken, measured_in
from pipelines.project.errors import FaultError, InputError
from pipelines.project.files import read_json
from pipelines.project.layout import (
    ARTIFACTS,
    CODE,
    CODE_STAGE,
    EVALUATIONS,
    FITS,
    GATES,
    KEPT,
    LOCK,
    METRICS,
    MODELS,
    SPLITS,
    TRAINED,
    StageName,
)
from pipelines.project.params import Params
from pipelines.project.schemas import (
    AuditedRecord,
    ClassMap,
    FreezingFacts,
    Metrics,
    Split,
    SplitRecord,
    Verdict,
)
from pipelines.project.settings import Gate
from pipelines.versioning.artifacts import ArtifactStore, Lock, folder_md5, read_lock
from pipelines.versioning.file_hashes import FileHashes, md5_of
from pipelines.versioning.stores import DeclaredStage, read_dvc_project
from sdlora.ledger import JoinedRecords, classes_of_step, record_hash

if TYPE_CHECKING:
    import pyarrow as pa


_ANSWERS = ("id", "label", "prediction", "confidence")
"""Columns of a file of predictions."""


class StepVerification(NamedTuple):
    """What was verified of one step."""

    step: str
    files: int
    """How many files were read."""
    record: str
    """The hash of its record, step.json; empty where there is none."""
    head: str
    """The hash of its verdict, which holds that of the record and of the verdict before; empty where there is none."""
    fault: str | None
    """The first thing that does not hold: the file, and what is wrong with it."""
    receipt: str = ""
    """The hash of the receipt of its deleted images; empty where they are there."""
    results: Mapping[str, str] = MappingProxyType({})
    """Stage → the hash of the file that stands for what it left."""


def verify() -> Iterator[StepVerification]:
    """Verify step after step, from the files, until something does not hold.

    Of every step: all outputs of its stages are those of dvc.lock, by their bytes; its model folder is what its record
    and the step before say; the images, the fit and the evaluation are those that the record and each other name; what
    dvc.lock says of its stages is what dvc.yaml, params.yaml, its record and its source say. What is not in the
    workspace is read from DVC's cache, or fetched from its remote.
    """
    params = Params.load()
    lock = read_lock(params)
    steps = ["t00", *params.tasks]
    with TemporaryDirectory(prefix="sdlora-audit-") as scratch, FileHashes(_files_of(params, lock)) as hashes:
        of_steps: dict[str | None, list[DeclaredStage]] = {step: [] for step in (*steps, None)}
        for stage in read_dvc_project(Path.cwd()).stages:
            of_steps[_step_of(stage.name, params)].append(stage)
        place = ArtifactStore(lock, Path(scratch), hashes)
        before: Path | None = None
        chain, seen = JoinedRecords(), SeenPictures()
        for step in steps:
            hashes.advance()
            stages = of_steps[step]
            try:
                files, model = _verify_step(place, chain, seen, step, before, stages)
                retired = step != "t00" and params.tasks[step].retired
                receipt = _check_receipt(place, step, chain.record or {}, retired=retired)
                check_declared(lock, stages)
                if step != "t00":
                    check_source(place, params, step, _samples_of(place, step))
            except (FaultError, InputError) as fault:  # a file that is damaged names itself
                yield StepVerification(step, 0, "", "", str(fault))
                return
            head = hashes.sha256(place.find(GATES / step) / "verdict.json")
            results = dict(_results_of(place, stages)) if before else {}
            yield StepVerification(step, files, record_hash(model), head, None, receipt, results)
            before = model
        try:
            files = sum(check_bytes(place, path) for path in lock.outs if not place.checked(path))
            _check_metrics(place, params, chain)
            check_declared(lock, of_steps[None])
            check_read(place, of_steps[None])
        except FaultError as fault:
            yield StepVerification("report", 0, "", "", str(fault))
            return
        yield StepVerification("report", files, "", "", None)


def _files_of(params: Params, lock: Lock) -> Iterator[list[Path]]:
    """Yield the folders that are hashed for each step from t00 on, by dvc.lock. Each source once."""
    outs: dict[str | None, list[Path]] = {}
    for stage, paths in lock.made.items():
        outs.setdefault(_step_of(stage, params), []).extend(map(Path, paths))
    named = {Path(path) for path in lock.outs}
    yield outs.get("t00", [])
    for step, task in params.tasks.items():
        source = {Path(task.source)} - named
        named |= source
        yield [*outs.get(step, []), *source]


def _step_of(stage: str, params: Params) -> str | None:
    """Return the step that a stage belongs to. None where it is of the chain as a whole, or brings a data set."""
    kind, item = StageName.parse(stage)
    if kind in (CODE_STAGE, "start", "backbone"):
        return "t00"
    return item if item in params.tasks else None


def _results_of(place: ArtifactStore, stages: Iterable[DeclaredStage]) -> Iterator[tuple[str, str]]:
    """Yield stages with the hash of the file that stands for what each left, as the journal names it."""
    for stage in stages:
        files = (place.find(Path(out)) / name for out in stage.outs for name in RECORDS)
        path = next((path for path in files if path.is_file()), None)
        if path is not None:
            yield stage.name, place.hashes.sha256(path)


def check_bytes(place: ArtifactStore, path: str) -> int:
    """Compare an output with dvc.lock by all its bytes. Return the number of its files."""
    if path not in place.lock.outs:
        raise FaultError(
            f"{path}: {LOCK} does not know it; restore {LOCK} from version control, or run `sdlora run`"
        )
    found, expected = place.find(Path(path)), place.lock.outs[path]
    if found.is_dir():
        names = sorted(file.relative_to(found).as_posix() for file in found.rglob("*") if file.is_file())
        hashes = {name: place.hashes.md5(found / name) for name in names}
        md5 = folder_md5(hashes)
    else:
        names, hashes, md5 = [path], {}, place.hashes.md5(found)
    if md5 != expected:
        changed = place.changed_file(path, hashes)
        raise FaultError(
            f"{changed}: its bytes are not those of {LOCK} (md5 {md5[:12]}, expected {expected[:12]})"
        )
    place.mark(path, hashes or {"": md5})
    return len(names)


def _verify_step(
    place: ArtifactStore,
    chain: JoinedRecords,
    seen: SeenPictures,
    step: str,
    before: Path | None,
    stages: Sequence[DeclaredStage],
) -> tuple[int, Path]:
    """Verify all outputs of one step, and add its record to those before. Return how many files were read, and its
    model folder.
    """
    from sdlora.verification import faults_of_step

    model = place.find(MODELS / step)
    # The folder's own record first: it can say which tensor of which file is wrong.
    try:
        for fault in faults_of_step(model, step, chain, before=before, sha256=place.hashes.sha256):
            raise FaultError(f"{MODELS / step / fault.file}: {fault.what}")
    except (AttributeError, KeyError, TypeError, IndexError):
        raise FaultError(f"{MODELS / step}/step.json: it is not a record of a step") from None
    kinds = ["model", "split", "evaluation", "gate"] + ([] if step == "t00" else ["train", "fit"])
    outs = [(ARTIFACTS / kind / step).as_posix() for kind in kinds]
    if before is None and str(CODE) in place.lock.outs:  # each stage reads the fingerprint of its code
        outs.append(str(CODE))
    files = sum(check_bytes(place, out) for out in outs)
    check_read(place, stages)
    if step != "t00":
        read_json(model / "step.json", AuditedRecord)
        record = chain.record
        assert record is not None
        _check_origins(place, step, record)
        check_split(place, step, record, seen)
        _check_evaluation(place, step, seen.tests)
        _check_verdict(place, step, record)
        check_recorded(
            place.lock, step, record, read_json(place.find(GATES / step) / "verdict.json", Verdict)
        )
    return files, model


def _check_origins(place: ArtifactStore, step: str, record: dict[str, Any]) -> None:
    """Check that the fit and the training images are those that the ledger names."""
    fit = place.find(FITS / step)
    for name, expected in record["fit"].items():
        if not (fit / name).is_file() or place.hashes.sha256(fit / name) != expected:
            raise FaultError(f"{FITS / step / name}: not the file that the ledger names")
    described = SPLITS / step / TRAINING
    if read_json(place.find(described.parent) / TRAINING) != record["split"]:
        raise FaultError(f"{described}: not what the ledger says of the images")
    train = TRAINED / step / PACKED
    found = place.find(train.parent) / PACKED
    if found.exists() and place.hashes.sha256(found) != record["images"][step]:
        raise FaultError(f"{train}: not the images that the ledger names")
    _check_code(place, step, record)
    told: dict[str, object] = {"metrics": last_epoch(fit)}
    if "learned_magnitudes" in record:  # until records of format 2
        told["learned_magnitudes"] = learned_magnitudes(fit)
    for name, value in told.items():
        if record[name] != value:
            raise FaultError(f"{MODELS / step}/step.json: its {name} do not follow from the fit")


def _check_code(place: ArtifactStore, step: str, record: dict[str, Any]) -> None:
    """Check that the code that made the step is the one that dvc.lock names, or a note says that the step was kept."""
    if str(CODE) not in place.lock.outs or receipt_of(step).exists():
        return  # a chain of before fingerprints; a step that is given back as the code of then made it
    kept = {(name, stage.result) for note in read_notes() for name, stage in note.stages.items()}
    for kind, file in (("fit", f"fit/{step}/fit.json"), ("freeze", f"model/{step}/step.json")):
        if place.hashes.sha256(place.find(CODE) / kind) == record["code"][kind]:
            continue
        path = ARTIFACTS / file
        if (str(StageName(kind, step)), place.hashes.sha256(place.find(path.parent) / path.name)) not in kept:
            raise FaultError(
                f"{path}: made by other code than {CODE / kind}, and no note in {KEPT} says that it was kept"
            )


class SeenPictures:
    """The pictures of all tasks so far: what was trained on, what is tested, and the answers that are asked for."""

    def __init__(self) -> None:
        self.trained: set[str] = set()
        self.tested: set[str] = set()
        self.tests: dict[str, pa.Table] = {}
        """Task → `id` and `label` of its test images."""
        self.class_maps = _ClassMaps()


class _ClassMaps:
    """The hashes of classes.json, step after step, as they follow from the ledger.

    The file of a step names all classes so far. Here each class is written once, however many steps there are: to parse
    and check a file of 10,000 classes takes 28 ms, so 14 s of an audit of 1,000 tasks of ten classes.
    """

    def __init__(self) -> None:
        self._written, self._classes = hashlib.sha256(b'{\n  "classes": [\n'), 0

    def sha256(self, record: dict[str, Any]) -> str:
        """Return the SHA-256 that classes.json has where it says what a record does, and what the one before did."""
        for entry in record["classes"][self._classes :]:
            text = json.dumps(entry, sort_keys=True, indent=2, ensure_ascii=False)
            self._written.update(b",\n" if self._classes else b"")
            self._written.update(textwrap.indent(text, "    ").encode())
            self._classes += 1
        rest = {key: record[key] for key in ("step_classes", "tasks") if key in record}
        text = json.dumps(rest, sort_keys=True, indent=2).removeprefix("{\n")
        whole = self._written.copy()
        whole.update(f"\n  ],\n{text}\n".encode())
        return whole.hexdigest()


def check_split(place: ArtifactStore, step: str, record: dict[str, Any], seen: SeenPictures) -> None:
    """Check that the packed pictures are the samples of the ledger, bytes and all, and add them to those seen.

    Nothing that was ever trained on is tested.
    """
    folder = SPLITS / step
    split, train = place.find(folder), place.find(TRAINED / step) / PACKED
    rows = _samples_of(place, step)
    described = read_json(split / "split.json", Split)
    if (samples_digest(rows), samples_digest(row for row in rows if row.split == "train")) != (
        described["digest"],
        record["split"]["digest"],
    ):
        raise FaultError(f"{folder / part_file(SAMPLES, step)}: not the samples of the ledger")
    if described["counts"] != _counts_of(rows, record["classes"], described["counts"]):
        raise FaultError(f"{folder}/split.json: its counts are not those of the samples")
    named = split / "classes.json"
    if place.hashes.sha256(named) != seen.class_maps.sha256(record):
        held = read_json(named, ClassMap)
        if any(held.get(key) != record.get(key) for key in ("classes", "step_classes")):
            raise FaultError(f"{folder}/classes.json: not the classes of the ledger")
    if {row.label for row in rows} != {entry["label"] for entry in classes_of_step(record, step)}:
        raise FaultError(
            f"{folder / part_file(SAMPLES, step)}: not of the classes that the ledger says {step} saw"
        )
    packed = {"train": (TRAINED / step / PACKED, train)}
    packed |= {
        part: (folder / part_file(part, step), split / part_file(part, step)) for part in (TEST, VALIDATION)
    }
    for part, (name, path) in packed.items():
        mine = [row for row in rows if row.split == part]
        if path.exists():
            _check_pictures(name, read_images(path, *ImageRow._fields), mine)
        elif mine and part != "train":  # of the training images `check_receipt` asks why
            raise FaultError(f"{name}: it is missing, and the ledger has {len(mine)} samples in it")
    _check_follows(place, step, record["tasks"])
    _check_apart(folder, rows, seen)
    tests = read_images(packed[TEST][1], "id", "label").select(["id", "label"])
    seen.tests[step] = tests.take(list(range(len(tests))))  # a copy: no file stays open for each task


def _samples_of(place: ArtifactStore, step: str) -> list[SampleRow]:
    """Return all samples of a step, in their order."""
    return read_samples(place.find(SPLITS / step) / part_file(SAMPLES, step))


def _check_apart(folder: Path, rows: list[SampleRow], seen: SeenPictures) -> None:
    """Check that no picture of the step, and none of an earlier task, is both trained on and tested."""
    seen.trained |= {row.pixels for row in rows if row.split == "train"}
    tested = {row.pixels: row.id for row in rows if row.split != "train"}
    both = [row.id for row in rows if row.split == "train" and row.pixels in seen.tested]
    both += [name for pixels, name in tested.items() if pixels in seen.trained]
    if both:
        raise FaultError(
            f"{folder}/samples: the picture {both[0]} is both trained on and tested, by all tasks so far"
        )
    seen.tested |= tested.keys()


def _check_pictures(name: Path, table: pa.Table, rows: list[SampleRow]) -> None:
    """Check that a file of images holds just these samples in their order, each with the bytes of its hash."""
    columns = [table[column].to_pylist() for column in ("id", "label", "sha256", "pixels")]
    if list(zip(*columns, strict=True)) != [(row.id, row.label, row.sha256, row.pixels) for row in rows]:
        raise FaultError(f"{name}: its pictures are not the samples of the ledger")
    for image, row in zip(table["image"], rows, strict=True):
        if hashlib.sha256(image.as_buffer()).hexdigest() != row.sha256:
            raise FaultError(f"{name}: {row.id} is not the picture of its hash")


def _check_follows(place: ArtifactStore, step: str, tasks: list[str]) -> None:
    """Check that the record of a split names its own files, and the split before, as they are."""
    folder, before = place.find(SPLITS / step), ["t00", *tasks][-2]
    record = read_json(folder / SPLIT, SplitRecord)
    if "files" not in record:
        return  # of before splits named their files: dvc.lock alone holds them
    expected = {
        "task": step,
        "after": before,
        "previous": place.hashes.sha256(place.find(SPLITS / before) / SPLIT),
        "files": own_files(folder, place.hashes.sha256),
    }
    for name, value in expected.items():
        if record.get(name) != value:
            raise FaultError(f"{SPLITS / step / SPLIT}: its {name} is not what follows from the files")


def _counts_of(
    rows: Iterable[SampleRow], classes: Iterable[dict[str, Any]], like: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Samples by class and part, for the classes and parts of `like`."""
    names = {entry["label"]: entry["name"] for entry in classes}
    counts = {name: dict.fromkeys(parts, 0) for name, parts in like.items()}
    for row in rows:
        parts = counts.setdefault(names.get(row.label, ""), {})
        parts[row.split] = parts.get(row.split, 0) + 1
    return counts


def _may_change(name: str, step: str) -> bool:
    """Return whether a file of a retired task's split may be another by now.

    The record names the split before, which may have been made anew. Splits of before held files of other tasks too.
    """
    kind, _, file = name.partition("/")
    return name == SPLIT or (kind in (SAMPLES, TEST, VALIDATION) and file != f"{step}.arrow")


def _check_receipt(place: ArtifactStore, step: str, chain: Mapping[str, Any], *, retired: bool) -> str:
    """Check that the training images are there, or that a receipt names just these. Return its hash, if any.

    Its own bytes are those of dvc.lock, and the receipts hold each other's hashes in the order of writing.
    """
    path, train = receipt_of(step), TRAINED / step / PACKED
    if step == "t00":
        return ""
    found = place.find(train.parent)
    there = (found / PACKED).exists()
    if not retired:
        if path.exists():
            raise FaultError(f"{path}: {step} is not retired to the end; run `sdlora retire {step}` again")
        if not there:
            raise FaultError(f"{train}: it is missing, and no receipt says that it was deleted")
        return ""
    receipt = read_receipts().get(step)
    if receipt is None:
        raise FaultError(f"{path}: the receipt is missing; restore it from version control")
    if there:
        raise FaultError(f"{train}: {path} says that it was deleted; run `sdlora retire {step}` again")
    model = place.find(MODELS / step)
    record = read_json(model / "step.json", AuditedRecord)
    samples = _samples_of(place, step)
    expected = {
        "train": (receipt.train.path, receipt.train.sha256) == (train.as_posix(), record["images"][step]),
        "record": receipt.record == place.hashes.sha256(model / "step.json"),
        "classes": are_classes_of(receipt.classes, step, chain),
        "images": [(image.id, image.sha256) for image in receipt.images]
        == [(row.id, row.sha256) for row in samples if row.split == "train"],
        "stages": all(
            place.md5(f"{kept.out}/{name}") == md5
            for kept in receipt.stages.values()
            for name, md5 in kept.files.items()
            if not (kept.out.startswith(SPLITS.as_posix()) and _may_change(name, step))
        ),
    }
    for name, holds in expected.items():
        if not holds:
            raise FaultError(f"{path}: its {name} is not what follows from the files")
    if read_json(found / IN_PLACE) != in_place_of(receipt):
        raise FaultError(f"{train.parent / IN_PLACE}: it is not what {path} says")
    if place.lock.deps[str(StageName("split", step))].get(path.parent.as_posix()) != folder_md5(
        {path.name: md5_of(path)}
    ):
        raise FaultError(f"{path}: its bytes are not those of {LOCK}")
    return place.hashes.sha256(path)


def _check_evaluation(place: ArtifactStore, step: str, tests: Mapping[str, pa.Table]) -> None:
    """Check that the predictions are of the test images in their order, and the metrics follow from them."""
    import pyarrow as pa

    folder = EVALUATIONS / step
    found = place.find(folder)
    predictions, metrics = (
        read_images(found / "predictions.arrow", *_ANSWERS),
        read_json(found / "metrics.json", Metrics),
    )
    for column in ("id", "label"):
        expected = pa.chunked_array(
            [chunk for table in tests.values() for chunk in table[column].chunks], predictions[column].type
        )
        if not predictions[column].equals(expected):
            raise FaultError(
                f"{folder}/predictions.arrow: its column {column} is not that of the test images"
            )
    counts = [len(table) for table in tests.values()]
    correct = _correct_of(predictions, counts)
    accuracy = [round(right / count, 6) for right, count in zip(correct, counts, strict=True)]
    if (metrics["accuracy"], metrics["samples"], metrics["correct"]) != (accuracy, counts, correct):
        raise FaultError(f"{folder}/metrics.json: its accuracies do not follow from predictions.arrow")


def _check_verdict(place: ArtifactStore, step: str, record: dict[str, Any]) -> None:
    """Check that the verdict holds the hash of the one before, of the record, the samples and the results.

    Its numbers follow.
    """
    folder, before = GATES / step, ("t00", *record["tasks"])[-2]
    verdict = read_json(place.find(folder) / "verdict.json", Verdict)
    evaluation, earlier = (place.find(EVALUATIONS / name) for name in (step, before))
    expected = {
        "step": step,
        "previous": place.hashes.sha256(place.find(GATES / before) / "verdict.json"),
        "record": place.hashes.sha256(place.find(MODELS / step) / "step.json"),
        "samples": read_json(place.find(SPLITS / step) / "split.json", Split)["digest"],
        "evaluation": {path.name: place.hashes.sha256(path) for path in sorted(evaluation.iterdir())},
        "measured": measured_in(
            evaluation, earlier, verdict["limits"].get("on", "test"), model=place.find(MODELS / step)
        ),
    }
    for name, value in expected.items():
        if verdict.get(name) != value:
            raise FaultError(f"{folder}/verdict.json: its {name} is not what follows from the files")
    try:
        limits = Gate.model_validate(verdict["limits"])
    except ValidationError:
        raise FaultError(f"{folder}/verdict.json: its limits are none of a gate") from None
    faults = broken(limits, verdict["measured"])
    if verdict["broken"] != faults or (faults and not verdict["approved"]):
        raise FaultError(f"{folder}/verdict.json: it let a step through that breaks a limit")


def _check_metrics(place: ArtifactStore, params: Params, chain: JoinedRecords) -> None:
    """Check that metrics.json follows from the evaluations."""
    from pipelines.reports.history import thresholds_of
    from pipelines.reports.statistics import headline_of

    evaluations = [
        read_json(place.find(EVALUATIONS / task) / "metrics.json", Metrics) for task in params.tasks
    ]
    records = [read_json(place.find(MODELS / task) / "step.json", FreezingFacts) for task in params.tasks]
    unknown = unknown_figures(
        list(params.tasks), lambda task: place.find(EVALUATIONS / task), thresholds_of(records)
    )
    classes = chain.record["classes"] if chain.record else []
    if read_json(place.find(METRICS)) != headline_of(list(params.tasks), len(classes), evaluations, unknown):
        raise FaultError("metrics.json: it does not follow from the evaluations")


def _correct_of(predictions: pa.Table, counts: list[int]) -> list[int]:
    """Return how many predictions of each task are right, tasks having so many images in a row."""
    import numpy as np

    right = np.equal(predictions["prediction"].to_numpy(), predictions["label"].to_numpy())
    ends = np.cumsum([0, *counts])
    return [int(right[start:end].sum()) for start, end in pairwise(ends)]
